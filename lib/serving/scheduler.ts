/**
 * Which rows share the next launch: the state of all jobs, and every decision about them, without a clock, a runtime or a
 * tensor, so that it can be tested under any sequence of events.
 *
 * A job has rows, a row has launches in a fixed order. Rows whose next launches have the same key may share one, wherever
 * each is in its schedule. The caller reports events (`start`, `abort`, `finished`, `failed`) and asks for the next
 * submission with `assign`. A row advances when its launch is assigned, not when it has run: submissions run in the order
 * of assignment, so that the next one can be assigned and submitted while this one runs.
 *
 * A failure reaches only the job that caused it. A submission of one job fails that job. A submission of several does not
 * say which one is at fault: each of them starts again, from now on in submissions of its own. Submissions that were
 * assigned after the one that failed, and read what it should have written, cannot run; their jobs start again, too.
 * Where a failure is nobody's fault (a process that was killed before it worked on the submission), no job fails by it.
 *
 * There may be several devices, each with costs of its own. A submission is for one of them, and a row is bound to the device
 * of its first launch, which has its registers from then on. Which device that is follows from what all of them have to
 * do (`placement.ts`), anew before each submission; a row that is not bound waits for a device that will be done with it sooner, even if
 * another one is idle. The rows of one job may be on several devices.
 */

import type { CostTable } from "./costs.js";
import { comparableCosts, placeRows, type RowWork, type WorkPart } from "./placement.js";
import { comparePriorities, type Priority } from "./priority.js";
import type { RowLaunch } from "./rows.js";
import { cheapestSplit, launchBatches } from "./split.js";

export interface ScheduledJob {
  readonly id: number;
  readonly priority: Priority;
  /** Launches of each row. */
  readonly rows: readonly (readonly RowLaunch[])[];
  /** Every launch is padded to this batch, or to as much of it as `maxRows` allows. */
  readonly pin: number | null;
}

/** A row's place in a launch. */
export interface AssignedRow {
  readonly job: number;
  /** How often the job has been started again. */
  readonly attempt: number;
  readonly row: number;
  /** Index among the row's launches. */
  readonly launch: number;
  /** Whether this is the row's last launch. */
  readonly last: boolean;
}

export interface AssignedLaunch {
  readonly graph: string;
  readonly size: string;
  /** At least the number of rows; the rest is padding. */
  readonly batch: number;
  readonly rows: readonly AssignedRow[];
}

/** A part of the work that is handed to the runtime of one device at once: launches in order. */
export interface Submission {
  readonly id: number;
  readonly device: number;
  readonly launches: readonly AssignedLaunch[];
  /** Whether it holds only work of the only job, and is to be preempted when another job starts. */
  readonly preemptible: boolean;
}

export interface SchedulerOptions {
  /** Compiled batches. */
  readonly batches: readonly number[];
  /** How long a launch may be held back for rows that will soon make the same one. */
  readonly maxWaitMs: number;
  /** Whether submissions can be preempted. */
  readonly preemption: boolean;
  /** What launches cost; of several devices a table each, in their order. */
  readonly costs: DeviceCosts | readonly DeviceCosts[];
}

/** What launches cost on a device. */
export type DeviceCosts = Pick<CostTable, "estimate" | "relative">;

/**
 * A submission takes at least this long, so that the overhead of submitting stays small: about half a millisecond of a
 * core, where a step of a small picture takes eight. The only job delays no other by longer submissions. Where they can be
 * preempted, all of it is one, and a new job waits for one launch; otherwise it waits for at most two of them.
 */
const submissionMilliseconds = { preemptible: Number.POSITIVE_INFINITY, alone: 40, shared: 10 } as const;

/**
 * Rows that are looked at for one submission, launch by launch: it is put together in one turn of the event loop, at a
 * microsecond or two for each. A job of one row has that many launches in a submission, one of a thousand rows four.
 */
const rowsLookedAt = 4096;

/**
 * How much cheaper rows of several jobs must be together, as a part of their cost alone. Sharing delays the job that goes
 * first, so that the gain has to be beyond measuring errors. Deferrable launches are shared even at a loss: they are short,
 * and rarely meet others. Rows of one job end together: what is cheapest is best for all of them.
 */
const gainNeeded = { usual: 0.02, deferrable: -0.1 } as const;

/** Rows of a group that are split. More of them do not change the first batch, which is all that is assigned. */
const rowsAhead = { least: 64, batches: 4 } as const;

/** How often in a row a job starts again after failures that were nobody's fault: what fails again and again ends all the same. */
const blamelessRestarts = 3;

/** No other job is slowed down for one that would be late by more than this part of its time limit. */
const latePart = 0.25;

interface Row {
  readonly state: JobState;
  readonly index: number;
  readonly launches: readonly RowLaunch[];
  /** The device that has its registers; null before its first launch. Where there is one device, that from the beginning. */
  device: number | null;
  /** The next launch to assign. */
  next: number;
  /** Since when that one could have been assigned. */
  since: number;
  /** Launches that have run. */
  done: number;
}

/** A job with its progress. */
interface JobState {
  readonly job: ScheduledJob;
  readonly rows: Row[];
  /**
   * By device and number of rows: for each launch, milliseconds from it to the end, if they have the device to themselves; null if
   * not known.
   */
  readonly left: Map<string, readonly number[] | null>;
  attempt: number;
  /** How often that was after a failure of its own that was not its fault, since one of its launches has run. */
  blameless: number;
  /** Whether its submissions hold no other job. */
  isolated: boolean;
  /** Whether a device was lost for good by a submission that it was in. */
  hasLostDevice: boolean;
}

/** A device at work. */
interface DeviceState {
  readonly costs: DeviceCosts;
  /** Whether it takes rows: not once it is lost for good. */
  isThere: boolean;
  /** Since when its oldest submission can have run. */
  since: number;
}

/** What a device sees while a submission for it is put together. */
interface DeviceView {
  readonly device: number;
  readonly now: number;
  /** The rows that are for it. */
  readonly own: ReadonlySet<Row>;
}

export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #devices: readonly DeviceState[];
  /** What a launch takes on each device, comparable among them. */
  readonly #comparable: readonly ((graph: string, size: string, batch: number) => number)[];
  readonly #jobs = new Map<number, JobState>();
  readonly #inFlight = new Map<number, Submission>();
  #submissions = 0;

  constructor(options: SchedulerOptions) {
    this.#options = options;
    const tables = "estimate" in options.costs ? [options.costs] : options.costs;
    this.#devices = tables.map((costs) => ({ costs, isThere: true, since: 0 }));
    this.#comparable = comparableCosts(
      tables.map(
        (table) =>
          (...launch) =>
            table.estimate(...launch),
      ),
    );
  }

  /** Submissions that were assigned and are neither finished nor failed. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** The same of one device. */
  inFlightOn(device: number): number {
    return this.#on(device).length;
  }

  /** The submission in flight that another job waits for, and that is to be preempted: until then nothing is assigned. */
  get toPreempt(): number | null {
    return this.toPreemptOn(0);
  }

  /** The same of one device. */
  toPreemptOn(device: number): number | null {
    return this.#jobs.size > 1 ? (this.#preemptibleOn(device)?.id ?? null) : null;
  }

  /** Submissions in flight on a device, in their order. */
  #on(device: number): Submission[] {
    return [...this.#inFlight.values()].filter((submission) => submission.device === device);
  }

  #preemptibleOn(device: number): Submission | undefined {
    return this.#on(device).find(({ preemptible }) => preemptible);
  }

  /** @throws RangeError for an id in use, or a job without rows or with a row without launches */
  start(job: ScheduledJob, now: number): void {
    if (this.#jobs.has(job.id)) throw new RangeError(`There is a job ${job.id} already.`);
    if (job.rows.length === 0 || job.rows.some((launches) => launches.length === 0))
      throw new RangeError("A job needs rows with launches.");
    const fresh = { attempt: 0, blameless: 0, isolated: false, hasLostDevice: false };
    const state: JobState = { job, rows: [], left: new Map(), ...fresh };
    for (const [index, launches] of job.rows.entries())
      state.rows.push({ state, index, launches, device: this.#unbound, next: 0, since: now, done: 0 });
    // As it is when the job comes; where there are several devices, when its rows are first looked at.
    if (this.#unbound !== null) this.#leftOn(state, this.#unbound, state.rows.length);
    this.#jobs.set(job.id, state);
  }

  /** Where a row is before its first launch. */
  get #unbound(): number | null {
    return this.#devices.length === 1 ? 0 : null;
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
      if (this.#jobsOf(submission).size > 0 || members.some((member) => needed.has(member)))
        for (const member of members) needed.add(member);
      else droppable.push(submission.id);
    }
    return droppable.reverse();
  }

  /** As `JobState.left`, of so many of its rows. */
  #leftOn(state: JobState, device: number, count: number): readonly number[] | null {
    const key = `${device} ${count}`;
    const known = state.left.get(key);
    if (known !== undefined) return known;
    const left = this.#left(state.job, device, count);
    state.left.set(key, left);
    return left;
  }

  #left({ rows, pin }: ScheduledJob, device: number, count: number): number[] | null {
    const { costs } = this.#devices[device]!;
    const longest = rows.reduce((a, b) => (b.length > a.length ? b : a));
    const left: number[] = new Array(longest.length + 1).fill(0);
    for (let index = longest.length - 1; index >= 0; index--) {
      const { graph, size, maxRows } = longest[index]!;
      const batches = launchBatches(this.#options.batches, maxRows, pin);
      const cost = (batch: number) => costs.estimate(graph, size, batch);
      if (cost(batches[0]!) === null) return null;
      left[index] = left[index + 1]! + cheapestSplit(count, batches, (batch) => cost(batch)!).milliseconds;
    }
    return left;
  }

  /**
   * The next submission for a device; null if every launch that is for it has been assigned, or a preemptible submission is in
   * flight there.
   */
  assign(now: number, device = 0): Submission | null {
    if (!this.#devices[device]!.isThere || this.#preemptibleOn(device)) return null;
    const { preemption } = this.#options;
    const isOnly = this.#jobs.size === 1;
    const least = submissionMilliseconds[isOnly ? (preemption ? "preemptible" : "alone") : "shared"];
    const ahead = this.#on(device).flatMap(({ launches }) => launches);
    const start = now + ahead.reduce((sum, launch) => sum + (this.#cost(launch, device) ?? 0), 0);
    const view: DeviceView = { device, now, own: this.#placedOn(device, now) };
    const launches: AssignedLaunch[] = [];
    let alone: JobState | null = null;
    let milliseconds = 0;
    let lookedAt = 0;
    while (milliseconds < least && lookedAt < rowsLookedAt) {
      for (const { rows } of this.#jobs.values()) lookedAt += rows.length;
      const rows = this.#choose(view, alone);
      if (!rows) break;
      const { state } = rows[0]!;
      // A job that runs alone has submissions of its own, from the first launch to the last.
      if (state.isolated && launches.length > 0 && alone !== state) break;
      if (state.isolated) alone = state;
      const launch = this.#launch(rows, view, start + milliseconds);
      launches.push(launch);
      milliseconds += this.#cost(launch, device) ?? Number.POSITIVE_INFINITY;
    }
    if (launches.length === 0) return null;
    // Less than the least time: it is all that is left, or as much as one submission takes.
    // A launch of unknown cost is by itself, or the last of others.
    const preemptible = isOnly && preemption && (milliseconds < least || launches.length > 1);
    const submission = { id: this.#submissions++, device, launches, preemptible };
    if (ahead.length === 0) this.#devices[device]!.since = now;
    this.#inFlight.set(submission.id, submission);
    return submission;
  }

  /** The rows that are bound to a device or would best be, among those with launches left. */
  #placedOn(device: number, now: number): ReadonlySet<Row> {
    const rows = [...this.#jobs.values()].flatMap((state) => state.rows);
    const left = rows.filter(({ next, launches }) => next < launches.length);
    if (left.every((row) => row.device !== null)) return new Set(left.filter((row) => row.device === device));
    // Of rows of one job those that have begun are ahead, and the others come to lie behind them.
    left.sort(
      (a, b) =>
        comparePriorities(a.state.job.priority, b.state.job.priority, now) ||
        Number(a.device === null) - Number(b.device === null) ||
        byPriority(a, b, now),
    );
    const placed = placeRows(
      left.map((row) => ({ device: row.device, work: workOf(row) })),
      this.#devices.map(({ isThere, costs }, at) => {
        return isThere ? { busy: this.#busy(at, now), cost: (...launch) => costs.estimate(...launch) } : null;
      }),
      this.#options.batches,
    );
    return new Set(left.filter((_, index) => placed[index] === device));
  }

  /** Milliseconds until a device has done what is in flight there, by what launches take. */
  #busy(device: number, now: number): number {
    const [first, ...others] = this.#on(device).map(({ launches }) =>
      launches.reduce((sum, { graph, size, batch }) => sum + this.#comparable[device]!(graph, size, batch), 0),
    );
    if (first === undefined) return 0;
    const passed = now - this.#devices[device]!.since;
    return others.reduce((sum, each) => sum + each, Math.max(0, first - passed));
  }

  /**
   * A submission has run, or was preempted: then its other launches are to be assigned again.
   * @param made launches that have run; default: all
   * @returns the jobs that it has completed
   */
  finished(id: number, now: number, made = Number.POSITIVE_INFINITY): number[] {
    const over: number[] = [];
    for (const { row, at, launch } of this.#current(this.#take(id, now)))
      if (at < made) {
        row.done++;
        row.state.blameless = 0;
        if (!row.state.rows.every(({ done, launches }) => done === launches.length)) continue;
        this.#jobs.delete(row.state.job.id);
        over.push(row.state.job.id);
      } else {
        row.next = Math.min(row.next, launch);
        row.since = now;
        // It has left nothing on the device.
        if (row.next === 0) row.device = this.#unbound;
      }
    return over;
  }

  /**
   * A submission has failed.
   * @param lost whether all registers on its device are gone with it: every job that has a row there starts again, and no
   *   submission in flight there counts
   * @param blameless whether its launches cannot be the cause
   * @param permanent whether the device is lost for good, while there are others: jobs start again there. A job that was alone in
   *   the submission may be the cause: the second device that it loses so is the last
   * @returns the jobs that caused it, which are over, and those that start again from their first launch
   */
  failed(
    id: number,
    {
      lost,
      blameless = false,
      permanent = false,
    }: { readonly lost: boolean; readonly blameless?: boolean; readonly permanent?: boolean },
    now: number,
  ): { rejected: number[]; restarted: number[] } {
    const submission = this.#take(id, now);
    const { device } = submission;
    const involved = [...this.#jobsOf(submission)];
    let isExcused = blameless;
    if (permanent) {
      this.#devices[device]!.isThere = false;
      if (!blameless) {
        isExcused = involved.every(({ hasLostDevice }) => !hasLostDevice);
        for (const state of involved) Object.assign(state, { hasLostDevice: true, isolated: true });
      }
    } else if (blameless) for (const state of involved) if (++state.blameless > blamelessRestarts) isExcused = false;
    const rejected = involved.length === 1 && !isExcused ? [involved[0]!.job.id] : [];
    const again = new Set(rejected.length > 0 ? [] : involved);
    for (const job of rejected) this.#jobs.delete(job);
    if (!isExcused) for (const state of again) state.isolated = true;
    // Jobs with later submissions that read what this one, or another of those, should have written. They start again at
    // once, before anything else is assigned: otherwise each of them could fail later submissions, again and again.
    const missing = new Set(membersOf(submission));
    for (const later of this.#inFlight.values()) {
      const members = membersOf(later);
      if (later.id < id || !members.some((member) => missing.has(member))) continue;
      for (const member of members) missing.add(member);
      for (const state of this.#jobsOf(later)) again.add(state);
    }
    if (lost) {
      for (const { id } of this.#on(device)) this.#inFlight.delete(id);
      for (const state of this.#jobs.values()) if (state.rows.some((row) => row.device === device)) again.add(state);
    }
    return { rejected, restarted: this.#restart(again, now) };
  }

  /**
   * All registers on a device are gone while no submission is in flight there.
   * @returns the jobs that start again: those that had begun there
   */
  lost(now: number, device = 0): number[] {
    const begun = [...this.#jobs.values()].filter(({ rows }) =>
      rows.some((row) => row.device === device && row.next > 0),
    );
    return this.#restart(begun, now);
  }

  /**
   * A device is lost for good while no submission is in flight there.
   * @returns the jobs that start again elsewhere: those that had begun there
   */
  gone(device: number, now: number): number[] {
    this.#devices[device]!.isThere = false;
    return this.lost(now, device);
  }

  /** @returns their ids */
  #restart(states: Iterable<JobState>, now: number): number[] {
    return Array.from(states, (state) => {
      state.attempt++;
      for (const row of state.rows) Object.assign(row, { device: this.#unbound, next: 0, done: 0, since: now });
      return state.job.id;
    });
  }

  #take(id: number, now: number): Submission {
    const submission = this.#inFlight.get(id);
    if (!submission) throw new RangeError(`There is no submission ${id} in flight.`);
    this.#inFlight.delete(id);
    this.#devices[submission.device]!.since = now;
    return submission;
  }

  /** The assigned rows of a submission whose job is neither over nor has been started again since. */
  *#current({ launches }: Submission): Generator<{ row: Row; at: number; launch: number }> {
    for (const [at, { rows }] of launches.entries())
      for (const { job, attempt, row, launch } of rows) {
        const state = this.#jobs.get(job);
        if (state?.attempt === attempt) yield { row: state.rows[row]!, at, launch };
      }
  }

  /** The jobs of those rows. */
  #jobsOf(submission: Submission): Set<JobState> {
    return new Set(Array.from(this.#current(submission), ({ row }) => row.state));
  }

  #cost({ graph, size, batch }: Omit<AssignedLaunch, "rows">, device: number): number | null {
    return this.#devices[device]!.costs.estimate(graph, size, batch);
  }

  /** The rows that may share the next launch, by priority; null if there are none. */
  #choose(view: DeviceView, alone: JobState | null): Row[] | null {
    const { now, own } = view;
    const states = alone ? [alone] : [...this.#jobs.values()];
    const waiting = states.flatMap(({ rows }) => rows.filter((row) => row.next < row.launches.length && own.has(row)));
    waiting.sort((a, b) => byPriority(a, b, now));
    const byGroup = new Map<string, Row[]>();
    for (const row of waiting) {
      const group = byGroup.get(groupOf(row));
      if (group) group.push(row);
      else byGroup.set(groupOf(row), [row]);
    }
    const groups = [...byGroup.values()];
    return groups.find((group) => !this.#isHeld(group, waiting, view)) ?? groups[0] ?? null;
  }

  /** Whether a group is held back for another row that will make the same launch soon enough, on the same device. */
  #isHeld(group: readonly Row[], waiting: readonly Row[], view: DeviceView): boolean {
    const [first] = group as [Row];
    const { device, now } = view;
    const launch = first.launches[first.next]!;
    if (!launch.deferrable || first.state.isolated || group.length >= Math.max(...this.#batchesOf(first))) return false;
    // With a time limit only while more than twice the time of its remaining work is left.
    const { priority } = first.state.job;
    const left = this.#leftOn(first.state, device, rowsOn(first.state, view).length);
    if (priority.due !== null && priority.due - now < 2 * (left?.[first.next] ?? 0)) return false;
    // The row that has waited longest decides.
    const leftMs = this.#options.maxWaitMs - (now - Math.min(...group.map(({ since }) => since)));
    if (leftMs <= 0) return false;
    const key = groupOf(first);
    return waiting.some((row) => !group.includes(row) && this.#timeUntil(row, key, leftMs, device) <= leftMs);
  }

  /** Milliseconds until a row makes a launch of this group, if it runs alone; infinite where costs are not known. */
  #timeUntil(row: Row, key: string, limit: number, device: number): number {
    let milliseconds = 0;
    for (let index = row.next; index < row.launches.length && milliseconds <= limit; index++) {
      const launch = row.launches[index]!;
      if (groupOf(row, index) === key) return milliseconds;
      const { graph, size } = launch;
      milliseconds += this.#cost({ graph, size, batch: 1 }, device) ?? Number.POSITIVE_INFINITY;
    }
    return Number.POSITIVE_INFINITY;
  }

  /** Batches that a launch of this row's group may have. */
  #batchesOf({ state, launches, next }: Row): readonly number[] {
    return launchBatches(this.#options.batches, launches[next]!.maxRows, state.job.pin);
  }

  /**
   * Assigns the launch of the first rows of a group, as many as pay.
   * @param start when it will begin
   */
  #launch(group: readonly Row[], view: DeviceView, start: number): AssignedLaunch {
    const [first] = group as [Row];
    const { device, now } = view;
    const { graph, size } = first.launches[first.next]!;
    let batches = this.#batchesOf(first);
    let batch = this.#batch(group, batches, device);
    for (;;) {
      // Sharing delays the job that goes first: no more rows than every time limit allows.
      batches = batches.filter((smaller) => smaller < batch);
      if (batches.length === 0 || !this.#makesLate(group.slice(0, batch), batch, view, start)) break;
      batch = this.#batch(group.slice(0, batch - 1), batches, device);
    }
    const rows = group.slice(0, batch).map((row): AssignedRow => {
      const launch = row.next++;
      row.since = now;
      row.device = device;
      const { job, attempt } = row.state;
      return { job: job.id, attempt, row: row.index, launch, last: row.next === row.launches.length };
    });
    return { graph, size, batch, rows };
  }

  /**
   * Whether some job would be late if these rows shared the next launch, and would not be if the first job had it to itself.
   * The rest of what is for the device is assumed to run by priority, job after job.
   */
  #makesLate(rows: readonly Row[], batch: number, view: DeviceView, start: number): boolean {
    const { device, now } = view;
    const [first] = rows as [Row];
    const { graph, size } = first.launches[first.next]!;
    const own = rows.filter(({ state }) => state === first.state).length;
    if (own === rows.length && batch === own) return false;
    const shared = this.#cost({ graph, size, batch }, device);
    if (shared === null) return false;
    const waiting = [...this.#jobs.values()].sort((a, b) => comparePriorities(a.job.priority, b.job.priority, now));
    // Milliseconds until the jobs so far are done, with the shared launch and without it.
    let withIt = shared;
    let without = 0;
    for (const state of waiting) {
      const on = rowsOn(state, view);
      const left = this.#leftOf(state, on, device);
      const inIt = rows.filter((row) => row.state === state).length;
      const part = inIt === 0 ? 0 : ((left[0] - left[1]) * inIt) / on.length;
      without += left[0];
      withIt += left[0] - part;
      const { due, arrival } = state.job.priority;
      if (due === null || withIt <= without) continue;
      // A job that will be late by more than that in any case does not slow down others.
      const latest = due + latePart * (due - arrival);
      // Time is left for one more such launch: one that has begun is not interrupted for a new job.
      if (start + withIt + shared > due && start + without <= latest) return true;
    }
    return false;
  }

  /** Milliseconds that rows of a job still need of a device, now and after their next launches. */
  #leftOf(state: JobState, rows: readonly Row[], device: number): readonly [number, number] {
    const left = rows.length === 0 ? null : this.#leftOn(state, device, rows.length);
    if (left === null) return [0, 0];
    const next = Math.min(...rows.map((row) => row.next));
    return [left[next]!, left[next + 1] ?? 0];
  }

  /** The batch of the next launch of these rows: the first of their cheapest split. */
  #batch(group: readonly Row[], batches: readonly number[], device: number): number {
    const [first] = group as [Row];
    const { graph, size, deferrable } = first.launches[first.next]!;
    const rows = Math.min(group.length, Math.max(rowsAhead.least, rowsAhead.batches * Math.max(...batches)));
    const cost = (batch: number) => this.#devices[device]!.costs.relative(graph, size, batch);
    const cheapest = () => cheapestSplit(rows, batches, cost).batches[0]!;
    if (group.every(({ state }) => state === first.state)) return cheapest();
    const gain = gainNeeded[deferrable ? "deferrable" : "usual"];
    const shared = cheapestSplit(rows, batches, (batch) => cost(batch) * (1 + gain * (1 - 1 / batch))).batches[0]!;
    // Sharing is worth a loss, padding is not.
    return shared > rows ? cheapest() : shared;
  }
}

/** The rows of a job that are for a device, those that are done included. */
function rowsOn({ rows }: JobState, { device, own }: DeviceView): Row[] {
  return rows.filter((row) => row.device === device || own.has(row));
}

function byPriority(a: Row, b: Row, now: number): number {
  return comparePriorities(a.state.job.priority, b.state.job.priority, now) || a.next - b.next || a.index - b.index;
}

const knownRuns = new WeakMap<readonly RowLaunch[], readonly (WorkPart & { readonly key: string })[]>();

/** The launches of a row in order, those that follow each other with one key together. */
function runsOf(launches: readonly RowLaunch[]) {
  const known = knownRuns.get(launches);
  if (known) return known;
  const runs: (WorkPart & { key: string; times: number })[] = [];
  for (const { key, graph, size, maxRows } of launches) {
    const last = runs.at(-1);
    if (last?.key === key) last.times++;
    else runs.push({ key, graph, size, maxRows, times: 1 });
  }
  knownRuns.set(launches, runs);
  return runs;
}

/** What a row has still to do. */
function workOf({ state, launches, next }: Row): RowWork {
  const { id, pin } = state.job;
  let passed = next;
  const parts = runsOf(launches).flatMap(({ times, ...run }) => {
    const left = times - Math.min(times, passed);
    passed -= times - left;
    return left === 0 ? [] : [{ ...run, times: left }];
  });
  const keys = parts.map(({ key, times }) => `${key} x ${times}`);
  return { key: [...keys, pin ?? "", state.isolated ? id : ""].join("|"), parts, pin };
}

/** Rows in a submission, those of jobs that are over included; each attempt of each has registers of its own. */
function membersOf({ launches }: Submission): string[] {
  const rows = launches.flatMap(({ rows }) => rows);
  return [...new Set(rows.map(({ job, attempt, row }) => `${job}.${attempt}.${row}`))];
}

/** Rows of one group may share a launch. */
function groupOf({ state, launches, next }: Row, index = next): string {
  const { id, pin } = state.job;
  return `${launches[index]!.key}|${pin ?? ""}|${state.isolated ? id : ""}`;
}
