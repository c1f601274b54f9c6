/**
 * Which rows share the next launch: the state of all jobs, and every decision about them, without a clock, a runtime or a
 * tensor, so that it can be tested under any sequence of events.
 *
 * A job has rows, a row has launches in a fixed order. Rows whose next launches have the same key may share one, wherever
 * each is in its schedule. The caller reports events (`start`, `abort`, `finished`, `preempted`, `failed`) and asks for
 * the next submission with `plan`. A row advances when it is planned, not when it has run: submissions run in the order of
 * planning, so that the next one can be planned and submitted while this one runs.
 *
 * A failure reaches only the job that caused it. A submission of one job fails that job. A submission of several does not
 * say which one is at fault: each of them starts again, from now on in submissions of its own. Submissions that were
 * planned after the one that failed, and read what it should have written, cannot run; their jobs start again, too.
 */

import { comparePriorities, type Priority } from "./priority.js";
import { type BatchCost, cheapestSplit, launchBatches } from "./split.js";

/** A launch that a row makes. */
export interface RowLaunch {
  /** Rows may share a launch if their keys are equal: the same graph, size and operands that are not per row. */
  readonly key: string;
  readonly graph: string;
  readonly size: string;
  /** At most this many rows in one launch. */
  readonly maxRows: number;
  /** Whether it may be held back for others to share it: alone it leaves the device half empty (refiners, coarse stages). */
  readonly deferrable: boolean;
}

export interface ScheduledJob {
  readonly id: number;
  readonly priority: Priority;
  /** Launches of each row. */
  readonly rows: readonly (readonly RowLaunch[])[];
  /** Every launch is padded to this batch, or to as much of it as `maxRows` allows. */
  readonly pin: number | null;
}

/** A row's place in a launch. */
export interface PlannedRow {
  readonly job: number;
  /** How often the job has been started. */
  readonly attempt: number;
  readonly row: number;
  /** Index among the row's launches. */
  readonly launch: number;
  /** Whether this is the row's last launch. */
  readonly last: boolean;
}

export interface PlannedLaunch {
  readonly graph: string;
  readonly size: string;
  /** At least the number of rows; the rest is padding. */
  readonly batch: number;
  readonly rows: readonly PlannedRow[];
}

/** A part of the work that is handed to the runtime at once: launches in order. */
export interface Submission {
  readonly id: number;
  readonly launches: readonly PlannedLaunch[];
  /** Whether it holds all that is left of the only job, and is to be preempted when another job starts. */
  readonly preemptible: boolean;
}

export interface SchedulerOptions {
  /** Compiled batches. */
  readonly batches: readonly number[];
  /** How long a launch may be held back for rows that will soon make the same one, in milliseconds. */
  readonly maxWait: number;
  /** Whether submissions can be preempted. */
  readonly preemption?: boolean;
  /** Milliseconds of a launch, or null if nothing is known about it. */
  readonly cost: (graph: string, size: string, batch: number) => number | null;
  /** As `cost`, but in any unit where nothing is known. */
  readonly relativeCost: (graph: string, size: string, batch: number) => number;
}

/** What follows from a failure. */
export interface Verdict {
  /** Jobs that caused it; they are over. */
  readonly rejected: readonly number[];
  /** Jobs that start again from their first launch. */
  readonly restarted: readonly number[];
}

/**
 * A submission takes at least this long, so that the overhead of submitting stays small: about half a millisecond of a
 * core, where a step of a small picture takes eight. The only job delays no other by longer submissions. Where they can be
 * preempted, all of it is one, and a newcomer waits for one launch; otherwise a newcomer waits for at most two of them.
 */
const submissionMilliseconds = { preemptible: Number.POSITIVE_INFINITY, alone: 40, shared: 10 } as const;

/**
 * How much cheaper rows of several jobs must be together, as a part of their cost alone. Sharing delays the job that goes
 * first, so that the gain has to be beyond measuring errors. Deferrable launches are shared even at a loss: they are short,
 * and rarely meet others. Rows of one job end together: what is cheapest is best for all of them.
 */
const gainNeeded = { usual: 0.02, deferrable: -0.1 } as const;

/** Rows of a group that a split is planned for. More of them do not change the first batch, which is all that is planned. */
const rowsAhead = { least: 64, batches: 4 } as const;

/** No other job is slowed down for one that would be late by more than this part of its time limit. */
const hopelessPart = 0.25;

interface Row {
  readonly state: JobState;
  readonly index: number;
  readonly launches: readonly RowLaunch[];
  /** The next launch to plan. */
  next: number;
  /** Since when that one could have been planned. */
  since: number;
  /** Launches that have run. */
  done: number;
}

/** A job with its progress. */
interface JobState {
  readonly job: ScheduledJob;
  readonly rows: Row[];
  /** For each launch, milliseconds from it to the end, if the job has the device to itself; null if not known. */
  readonly left: readonly number[] | null;
  attempt: number;
  /** Whether its submissions hold no other job. */
  isolated: boolean;
}

export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #jobs = new Map<number, JobState>();
  readonly #inFlight = new Map<number, Submission>();
  #submissions = 0;

  constructor(options: SchedulerOptions) {
    this.#options = options;
  }

  /** Jobs that have been started and are not over. */
  get jobs(): number {
    return this.#jobs.size;
  }

  /** Submissions that were planned and are neither finished nor failed. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** The submission in flight that another job waits for, and that is to be preempted: until then nothing is planned. */
  get toPreempt(): number | null {
    return this.#jobs.size > 1 ? (this.#preemptible?.id ?? null) : null;
  }

  get #preemptible(): Submission | undefined {
    return [...this.#inFlight.values()].find(({ preemptible }) => preemptible);
  }

  /** @throws RangeError for an id in use, or a job without rows or with a row without launches */
  start(job: ScheduledJob, now: number): void {
    if (this.#jobs.has(job.id)) throw new RangeError(`There is a job ${job.id} already.`);
    if (job.rows.length === 0 || job.rows.some((launches) => launches.length === 0))
      throw new RangeError("A job needs rows with launches.");
    const state: JobState = { job, rows: [], left: this.#left(job), attempt: 0, isolated: false };
    for (const [index, launches] of job.rows.entries())
      state.rows.push({ state, index, launches, next: 0, since: now, done: 0 });
    this.#jobs.set(job.id, state);
  }

  /**
   * Removes a job; unknown ones are ignored.
   * @returns submissions in flight that need not run: no job needs them, and no submission that a job needs reads what they
   *   write (a shared launch still gathers the rows of a job that is gone)
   */
  abort(id: number): number[] {
    if (!this.#jobs.delete(id)) return [];
    const droppable: number[] = [];
    const needed = new Set<string>();
    for (const submission of [...this.#inFlight.values()].reverse()) {
      const members = membersOf(submission);
      if (this.#isNeeded(submission) || members.some((member) => needed.has(member)))
        for (const member of members) needed.add(member);
      else droppable.push(submission.id);
    }
    return droppable.reverse();
  }

  #left({ rows, pin }: ScheduledJob): number[] | null {
    const longest = rows.reduce((a, b) => (b.length > a.length ? b : a));
    const left: number[] = new Array(longest.length + 1).fill(0);
    for (let index = longest.length - 1; index >= 0; index--) {
      const { graph, size, maxRows } = longest[index]!;
      const batches = launchBatches(this.#options.batches, maxRows, pin);
      const cost = (batch: number) => this.#options.cost(graph, size, batch);
      if (cost(batches[0]!) === null) return null;
      const { milliseconds } = cheapestSplit(rows.length, batches, (batch) => cost(batch)!);
      left[index] = left[index + 1]! + milliseconds;
    }
    return left;
  }

  /** The next submission; null if every launch of every job has been planned, or a preemptible submission is in flight. */
  plan(now: number): Submission | null {
    if (this.#preemptible) return null;
    const launches: PlannedLaunch[] = [];
    let alone: JobState | null = null;
    let isAll = false;
    const isOnly = this.#jobs.size === 1;
    const least = submissionMilliseconds[isOnly ? (this.#options.preemption ? "preemptible" : "alone") : "shared"];
    for (let milliseconds = 0; milliseconds < least; ) {
      const rows = this.#choose(now, alone);
      if (!rows) {
        isAll = true;
        break;
      }
      const { state } = rows[0]!;
      // A job that runs alone has submissions of its own, from the first launch to the last.
      if (state.isolated && launches.length > 0 && alone !== state) break;
      if (state.isolated) alone = state;
      const launch = this.#launch(rows, now, now + this.#ahead() + milliseconds);
      launches.push(launch);
      milliseconds += this.#options.cost(launch.graph, launch.size, launch.batch) ?? Number.POSITIVE_INFINITY;
    }
    if (launches.length === 0) return null;
    const submission = {
      id: this.#submissions++,
      launches,
      preemptible: isOnly && isAll && (this.#options.preemption ?? false),
    };
    this.#inFlight.set(submission.id, submission);
    return submission;
  }

  /** A submission has run. @returns the jobs that it has completed */
  finished(id: number): number[] {
    const submission = this.#take(id);
    const over: number[] = [];
    for (const { rows } of submission.launches)
      for (const planned of rows) {
        const state = this.#current(planned);
        if (!state) continue;
        state.rows[planned.row]!.done++;
        if (state.rows.every(({ done, launches }) => done === launches.length)) {
          this.#jobs.delete(planned.job);
          over.push(planned.job);
        }
      }
    return over;
  }

  /**
   * A submission was preempted: its other launches are to be planned again.
   * @param made launches that have run
   */
  preempted(id: number, made: number, now: number): void {
    for (const [index, { rows }] of this.#take(id).launches.entries())
      for (const planned of rows) {
        const row = this.#current(planned)?.rows[planned.row];
        if (!row) continue;
        if (index < made) row.done++;
        else {
          row.next = Math.min(row.next, planned.launch);
          row.since = now;
        }
      }
  }

  /**
   * A submission has failed.
   * @param lost whether all registers are gone with it: every job starts again, and no submission in flight counts
   */
  failed(id: number, lost: boolean, now: number): Verdict {
    const submission = this.#take(id);
    const rejected: number[] = [];
    const again = new Set<JobState>();
    const involved = this.#involved(submission);
    if (involved.size === 1) {
      const [state] = involved as Set<JobState>;
      this.#jobs.delete(state!.job.id);
      rejected.push(state!.job.id);
    } else
      for (const state of involved) {
        state.isolated = true;
        again.add(state);
      }
    // At once, before anything else is planned: otherwise each of them could fail later submissions, again and again.
    for (const reader of this.#readersOf(submission)) for (const state of this.#involved(reader)) again.add(state);
    if (lost) {
      this.#inFlight.clear();
      for (const state of this.#jobs.values()) again.add(state);
    }
    for (const state of again) restart(state, now);
    return { rejected, restarted: [...again].map(({ job }) => job.id) };
  }

  /** Jobs, not over, with rows in a submission. */
  #involved(submission: Submission): Set<JobState> {
    const involved = new Set<JobState>();
    for (const { rows } of submission.launches)
      for (const planned of rows) {
        const state = this.#current(planned);
        if (state) involved.add(state);
      }
    return involved;
  }

  /** Submissions in flight that cannot run: they read what the failed one, or another of these, should have written. */
  #readersOf(failed: Submission): Submission[] {
    const missing = new Set(membersOf(failed));
    const readers: Submission[] = [];
    for (const submission of this.#inFlight.values()) {
      const members = membersOf(submission);
      if (submission.id < failed.id || !members.some((member) => missing.has(member))) continue;
      readers.push(submission);
      for (const member of members) missing.add(member);
    }
    return readers;
  }

  #take(id: number): Submission {
    const submission = this.#inFlight.get(id);
    if (!submission) throw new RangeError(`There is no submission ${id} in flight.`);
    this.#inFlight.delete(id);
    return submission;
  }

  /** Whether a job still needs it. */
  #isNeeded(submission: Submission): boolean {
    return submission.launches.some(({ rows }) => rows.some((row) => this.#current(row)));
  }

  /** The job that a planned row belongs to, unless it is over or has been started again since. */
  #current({ job: id, attempt }: PlannedRow): JobState | null {
    const state = this.#jobs.get(id);
    return state?.attempt === attempt ? state : null;
  }

  /** The rows that may share the next launch, by priority; null if there are none. */
  #choose(now: number, alone: JobState | null): Row[] | null {
    const waiting: Row[] = [];
    for (const state of this.#jobs.values())
      if (alone === null || state === alone)
        for (const row of state.rows) if (row.next < row.launches.length) waiting.push(row);
    if (waiting.length === 0) return null;
    waiting.sort(
      (a, b) =>
        comparePriorities(a.state.job.priority, b.state.job.priority, now) || a.next - b.next || a.index - b.index,
    );
    const groups = new Map<string, Row[]>();
    for (const row of waiting) {
      const key = groupOf(row);
      const group = groups.get(key);
      if (group) group.push(row);
      else groups.set(key, [row]);
    }
    for (const group of groups.values()) if (!this.#isHeld(group, waiting, now)) return group;
    return groups.values().next().value!;
  }

  /** Whether a group is held back for another row that will make the same launch soon enough. */
  #isHeld(group: readonly Row[], waiting: readonly Row[], now: number): boolean {
    const [first] = group as [Row];
    const launch = first.launches[first.next]!;
    if (!launch.deferrable || first.state.isolated || group.length >= Math.max(...this.#batchesOf(first))) return false;
    // With a time limit only where there is plenty of time.
    const { priority } = first.state.job;
    if (priority.due !== null && priority.due - now < 2 * (first.state.left?.[first.next] ?? 0)) return false;
    // The row that has waited longest decides.
    const patience = this.#options.maxWait - (now - Math.min(...group.map(({ since }) => since)));
    if (patience <= 0) return false;
    const key = groupOf(first);
    return waiting.some((row) => !group.includes(row) && this.#timeUntil(row, key, patience) <= patience);
  }

  /** Milliseconds until a row makes a launch of this group, if it runs alone; infinite where costs are not known. */
  #timeUntil(row: Row, key: string, limit: number): number {
    let milliseconds = 0;
    for (let index = row.next; index < row.launches.length && milliseconds <= limit; index++) {
      const launch = row.launches[index]!;
      if (groupOf(row, index) === key) return milliseconds;
      milliseconds += this.#options.cost(launch.graph, launch.size, 1) ?? Number.POSITIVE_INFINITY;
    }
    return Number.POSITIVE_INFINITY;
  }

  /** Batches that a launch of this row's group may have. */
  #batchesOf({ state, launches, next }: Row): readonly number[] {
    return launchBatches(this.#options.batches, launches[next]!.maxRows, state.job.pin);
  }

  /**
   * Plans the launch of the first rows of a group, as many as pay.
   * @param start when it will begin
   */
  #launch(group: readonly Row[], now: number, start: number): PlannedLaunch {
    const [first] = group as [Row];
    const { graph, size } = first.launches[first.next]!;
    let batches = this.#batchesOf(first);
    let batch = this.#batch(group, batches);
    for (;;) {
      // Sharing delays the job that goes first: no more rows than every time limit allows.
      batches = batches.filter((smaller) => smaller < batch);
      if (batches.length === 0 || !this.#makesLate(group.slice(0, batch), batch, now, start)) break;
      batch = this.#batch(group.slice(0, batch - 1), batches);
    }
    const rows = group.slice(0, batch).map((row): PlannedRow => {
      const launch = row.next++;
      row.since = now;
      const { job, attempt } = row.state;
      return { job: job.id, attempt, row: row.index, launch, last: row.next === row.launches.length };
    });
    return { graph, size, batch, rows };
  }

  /**
   * Whether some job would be late if these rows shared the next launch, and would not be if the first job had it to itself.
   * The rest is assumed to run by priority, job after job.
   */
  #makesLate(rows: readonly Row[], batch: number, now: number, start: number): boolean {
    const [first] = rows as [Row];
    const { graph, size } = first.launches[first.next]!;
    const own = rows.filter(({ state }) => state === first.state).length;
    if (own === rows.length && batch === own) return false;
    const shared = this.#options.cost(graph, size, batch);
    if (shared === null) return false;
    const waiting = [...this.#jobs.values()].sort((a, b) => comparePriorities(a.job.priority, b.job.priority, now));
    // Milliseconds until the jobs so far are done, with the shared launch and without it.
    let withIt = shared;
    let without = 0;
    for (const state of waiting) {
      const left = leftOf(state);
      const inIt = rows.filter((row) => row.state === state).length;
      const part = inIt === 0 ? 0 : ((left[0] - left[1]) * inIt) / state.rows.length;
      without += left[0];
      withIt += left[0] - part;
      const { due, arrival } = state.job.priority;
      if (due === null || withIt <= without) continue;
      // Jobs that are hopelessly late do not slow down others.
      const hopeless = due + hopelessPart * (due - arrival);
      // With time for one more such launch: a launch that has begun is not interrupted for a job that arrives.
      if (start + withIt + shared > due && start + without <= hopeless) return true;
    }
    return false;
  }

  /** Milliseconds of the submissions in flight. */
  #ahead(): number {
    let milliseconds = 0;
    for (const { launches } of this.#inFlight.values())
      for (const { graph, size, batch } of launches) milliseconds += this.#options.cost(graph, size, batch) ?? 0;
    return milliseconds;
  }

  /** The batch of the next launch of these rows: the first of their cheapest split. */
  #batch(group: readonly Row[], batches: readonly number[]): number {
    const [first] = group as [Row];
    const { graph, size, deferrable } = first.launches[first.next]!;
    const rows = Math.min(group.length, Math.max(rowsAhead.least, rowsAhead.batches * Math.max(...batches)));
    const cost: BatchCost = (batch) => this.#options.relativeCost(graph, size, batch);
    const cheapest = () => cheapestSplit(rows, batches, cost).batches[0]!;
    if (group.every(({ state }) => state === first.state)) return cheapest();
    const gain = gainNeeded[deferrable ? "deferrable" : "usual"];
    const shared = cheapestSplit(rows, batches, (batch) => cost(batch) * (1 + gain * (1 - 1 / batch))).batches[0]!;
    // Sharing is worth a loss, padding is not.
    return shared > rows ? cheapest() : shared;
  }
}

/** Milliseconds that a job still needs, now and after its next launches. */
function leftOf({ left, rows }: JobState): readonly [number, number] {
  if (left === null) return [0, 0];
  const next = Math.min(...rows.map((row) => row.next));
  return [left[next]!, left[next + 1] ?? 0];
}

/** Rows in a submission, those of jobs that are over included; each attempt of each has registers of its own. */
function membersOf(submission: Submission): string[] {
  return [
    ...new Set(
      submission.launches.flatMap(({ rows }) => rows.map(({ job, attempt, row }) => `${job}.${attempt}.${row}`)),
    ),
  ];
}

function restart(state: JobState, now: number): void {
  state.attempt++;
  for (const row of state.rows) {
    row.next = 0;
    row.done = 0;
    row.since = now;
  }
}

/** Rows of one group may share a launch. */
function groupOf({ state, launches, next }: Row, index = next): string {
  const { id, pin } = state.job;
  return `${launches[index]!.key}|${pin ?? ""}|${state.isolated ? id : ""}`;
}
