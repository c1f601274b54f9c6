/**
 * Runs jobs on a runtime, several at a time, as the scheduler decides. One submission runs while the next one waits in the
 * runtime, so that the device never waits for JavaScript; a third would only make new jobs wait longer. The only job may
 * be one submission, which is preempted when another job starts.
 */

import { following, onAbort } from "../common/abort.js";
import type { Tensor } from "../common/tensor.js";
import { DeviceLostError, MemoryError } from "../errors.js";
import type { Program } from "../program/program.js";
import {
  isBlameless,
  type LaunchReport,
  Preempted,
  type RunOptions,
  type Runtime,
  type Workspace,
} from "../runtimes/runtime.js";
import { ahead, CapturedQueue } from "./captured.js";
import type { CostTable } from "./costs.js";
import { type Gathered, Gatherer, type Lane, resultsOf } from "./gather.js";
import type { Priority } from "./priority.js";
import { type GraphShapes, type RowProgram, rowProgram } from "./rows.js";
import { type AssignedLaunch, Scheduler, type SchedulerOptions, type Submission } from "./scheduler.js";
import type { StatsRecorder } from "./stats.js";
import { LaunchWatch, type SlowLaunch } from "./watch.js";

/** One finished launch, as the jobs are told that have a row in it. */
export interface JobLaunch extends LaunchReport {
  /** Rows in it of all jobs. */
  readonly rows: number;
  /** Rows that were computed: those, and padding. */
  readonly batch: number;
}

export interface Job {
  /** A program for each row; see rows.ts. */
  readonly rows: readonly Program[];
  readonly priority: Priority;
  /** Every launch is padded to this batch, as far as the launch allows; default: null, for none. */
  readonly pin?: number | null;
  readonly signal?: AbortSignal | undefined;
  /** As `RunOptions.reports`, for every launch that has a row of the job. */
  readonly reports?: RunOptions["reports"];
  /**
   * Called for each row of each launch, once, in the order of a row's launches. `first` is true for one row of the job in
   * each launch; `milliseconds` are those of the launch, all rows together. An error it throws rejects the job.
   */
  readonly onLaunch?: ((row: number, report: JobLaunch, first: boolean) => void) | undefined;
  /** Called for each row that begins again, since what it had made is gone. Must not throw. */
  readonly onRestart?: ((row: number) => void) | undefined;
}

export interface DispatcherOptions extends Omit<SchedulerOptions, "preemption"> {
  /** Whether each row runs as one captured program of its own. */
  readonly captured: boolean;
  /** Shapes of a graph, which is added to the runtime when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  readonly costs: CostTable;
  readonly stats: StatsRecorder;
  /** A launch that takes longer than this, and than many times its cost, is slow; one that takes far longer has hung. */
  readonly watchdogMs: number;
  /** Told once of each launch that is slow. */
  readonly onSlow?: ((launch: SlowLaunch) => void) | undefined;
}

/** A job under way. */
interface Active {
  readonly job: Job;
  readonly rows: readonly RowProgram[];
  /** How often it was started again. */
  attempt: number;
  lanes: readonly Lane[];
  /** How many of a row's launches have been reported, over all attempts. */
  readonly reported: number[];
  readonly results: (Record<string, Tensor> | null)[];
  resolve(results: Record<string, Tensor>[]): void;
  reject(error: unknown): void;
  /** Stops following the job's signal. */
  unfollow(): void;
}

interface Submitted {
  readonly controller: AbortController;
  /** Preempts it; null where that cannot be. */
  readonly preempt: AbortController | null;
  /** Identities of the constants that it uploads. */
  readonly uploads: readonly string[];
}

export class Dispatcher {
  readonly #runtime: Runtime;
  readonly #options: DispatcherOptions;
  readonly #scheduler: Scheduler;
  readonly #gatherer: Gatherer;
  readonly #captured = new CapturedQueue();
  readonly #watch: LaunchWatch;
  readonly #active = new Map<number, Active>();
  readonly #submitted = new Map<number, Submitted>();
  /** Launches, as graph, size and batch, that this workspace has made: the first of each is slower. */
  readonly #warm = new Set<string>();
  #workspace: Workspace | null = null;
  #jobs = 0;
  /** Whether submissions will be assigned in this turn of the event loop. */
  #willAssign = false;
  #idle: (() => void)[] = [];

  constructor(runtime: Runtime, options: DispatcherOptions) {
    this.#runtime = runtime;
    this.#options = options;
    this.#scheduler = new Scheduler({ ...options, preemption: runtime.capabilities.preemption });
    this.#gatherer = new Gatherer(options.graph);
    this.#watch = new LaunchWatch({
      watchdogMs: options.watchdogMs,
      costOf: ({ graph, size, batch }) => options.costs.estimate(graph, size, batch),
      isWarm: (launch) => this.#warm.has(keyOf(launch)),
      onSlow: (launch) => options.onSlow?.(launch),
      onHung: ({ graph, milliseconds }) =>
        runtime.giveUp?.(`has worked on one launch of "${graph}" for ${Math.round(milliseconds / 1000)} s`),
    });
  }

  /** The launch that runs now; null if none does. */
  get running(): SlowLaunch | null {
    return this.#watch.running;
  }

  /** The runtime has freed what these graphs were compiled to: their next launches are slower. */
  forget(graphs: readonly string[]): void {
    for (const key of this.#warm) if (graphs.some((graph) => key.startsWith(`${graph}@`))) this.#warm.delete(key);
  }

  /** Jobs, submissions and constants that are held for jobs under way: 0 when there are none. */
  get held(): number {
    return this.#active.size + this.#submitted.size + this.#gatherer.uploads + this.#captured.size;
  }

  /**
   * Runs a job, at the same time as others.
   * @returns the results of each row's program
   * @throws what the runtime throws for a launch of this job, what `onLaunch` throws, or `signal.reason`
   */
  async run(job: Job): Promise<Record<string, Tensor>[]> {
    const { signal } = job;
    signal?.throwIfAborted();
    const rows = job.rows.map((program) => rowProgram(program, this.#options.graph));
    if (this.#options.captured) return this.#runCaptured(job, rows);
    const id = this.#jobs++;
    const { priority, pin = null } = job;
    this.#scheduler.start({ id, priority, pin, rows: rows.map(({ specs }) => specs) }, performance.now());
    return new Promise((resolve, reject) => {
      this.#active.set(id, {
        job,
        rows,
        attempt: 0,
        lanes: lanesOf(id, 0, rows),
        reported: rows.map(() => 0),
        results: rows.map(() => null),
        resolve,
        reject,
        unfollow: onAbort(signal, () => this.#stop(id, signal!.reason)),
      });
      // Jobs that arrive together are assigned together.
      if (this.#willAssign) return;
      this.#willAssign = true;
      setImmediate(() => {
        this.#willAssign = false;
        this.#submit();
      });
    });
  }

  /** Each row as a program of its own. One that fails ends the job's others. */
  async #runCaptured({ priority, signal, onLaunch }: Job, rows: readonly RowProgram[]) {
    const { controller, unfollow } = following(signal);
    const runs = rows.map(({ program, specs }, row) =>
      this.#captured.run(priority, controller.signal, () =>
        this.#runtime.run(program, {
          signal: controller.signal,
          onLaunch: (report) => {
            this.#launched(specs[report.index]!, 1, 1, report.milliseconds);
            onLaunch?.(row, { ...report, rows: 1, batch: 1 }, true);
          },
        }),
      ),
    );
    try {
      const results = await Promise.all(runs);
      controller.signal.throwIfAborted();
      return results;
    } catch (error) {
      controller.abort(error);
      // A row that has not stopped still takes time of the device.
      await Promise.allSettled(runs);
      throw controller.signal.reason;
    } finally {
      unfollow();
    }
  }

  /** Resolves when no job is under way. */
  async idle(): Promise<void> {
    await this.#captured.idle();
    if (this.#active.size + this.#submitted.size === 0) return;
    await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  /** Frees what the runtime holds. To be called when idle. */
  close(): void {
    this.#workspace?.close();
    this.#workspace = null;
    this.#gatherer.reset();
  }

  /** Assigns and submits until the runtime has enough. */
  #submit(): void {
    if (this.#workspace?.lost) {
      // Submissions in flight fail by themselves, and with them it is known whose they were.
      if (this.#submitted.size > 0) return;
      this.#forgetWorkspace();
      this.#restart(this.#scheduler.lost(performance.now()));
    }
    const { toPreempt } = this.#scheduler;
    if (toPreempt !== null) this.#submitted.get(toPreempt)!.preempt!.abort();
    while (this.#scheduler.inFlight < ahead) {
      const submission = this.#scheduler.assign(performance.now());
      if (!submission) break;
      void this.#carryOut(submission);
    }
    if (this.#active.size + this.#submitted.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }

  /** Runs one submission. Never rejects. */
  async #carryOut(submission: Submission): Promise<void> {
    let workspace: Workspace | null = null;
    let uploads: readonly string[] = [];
    try {
      workspace = this.#workspace ??= this.#runtime.open();
      const gathered = this.#gatherer.gather(submission, ({ job, row }) => this.#active.get(job)!.lanes[row]!);
      uploads = gathered.uploads;
      const controller = new AbortController();
      const preempt = submission.preemptible ? new AbortController() : null;
      this.#submitted.set(submission.id, { controller, preempt, uploads });
      this.#watch.submitted(submission.id, submission.launches);
      const run = workspace.submit(gathered.program, {
        reports: this.#isWatched(submission) ? "each" : "bunched",
        signal: controller.signal,
        preempt: preempt?.signal,
        onBegin: () => this.#watch.begun(submission.id),
        onProgress: (launch) => this.#watch.at(submission.id, launch),
        onLaunch: (report) => this.#report(submission, gathered, report),
      });
      workspace.free(gathered.temporaries);
      const { results: values, launches } = await run.then(
        (results) => ({ results, launches: submission.launches.length }),
        (error: unknown) => (error instanceof Preempted ? error : Promise.reject(error)),
      );
      this.#over(submission);
      // Its workspace has been lost and replaced meanwhile.
      if (workspace !== this.#workspace) return;
      for (const { rows } of submission.launches.slice(0, launches))
        for (const { job, attempt, row, last } of rows) {
          const active = this.#active.get(job);
          // The job may have been started again since.
          if (last && active?.attempt === attempt) active.results[row] = resultsOf(active.lanes[row]!, values);
        }
      for (const id of this.#scheduler.finished(submission.id, performance.now(), launches)) {
        const active = this.#end(id)!;
        active.resolve(active.results as Record<string, Tensor>[]);
      }
    } catch (error) {
      this.#over(submission);
      this.#fail(submission, workspace, uploads, error);
    } finally {
      this.#submit();
    }
  }

  /** Whether a job in it asks for reports as soon as there are any. */
  #isWatched({ launches }: Submission): boolean {
    return launches.some(({ rows }) => rows.some(({ job }) => this.#active.get(job)?.job.reports === "each"));
  }

  #fail(submission: Submission, workspace: Workspace | null, uploads: readonly string[], error: unknown): void {
    // Its workspace has been lost and replaced before: its jobs have been started again.
    if (workspace !== this.#workspace) return;
    // For good: nothing can be started again.
    if (error instanceof DeviceLostError && error.permanent) {
      this.#scheduler.failed(submission.id, { lost: true }, performance.now());
      this.#forgetWorkspace();
      for (const id of [...this.#active.keys()]) {
        this.#scheduler.abort(id);
        this.#end(id)?.reject(error);
      }
      return;
    }
    const lost = workspace === null || workspace.lost;
    const failure = { lost, blameless: lost && isBlameless(error) };
    const { rejected, restarted } = this.#scheduler.failed(submission.id, failure, performance.now());
    if (lost) this.#forgetWorkspace();
    else this.#free(this.#gatherer.forget(uploads));
    // What is kept for later must not take the memory that is needed now.
    if (error instanceof MemoryError) this.#free(this.#gatherer.dropKept());
    for (const id of rejected) this.#end(id)?.reject(error);
    this.#restart(restarted);
  }

  #over({ id }: Submission): void {
    this.#submitted.delete(id);
    this.#watch.over(id);
  }

  #forgetWorkspace(): void {
    this.#workspace = null;
    this.#gatherer.reset();
    this.#warm.clear();
  }

  /** Gives jobs that start again new registers. */
  #restart(ids: readonly number[]): void {
    for (const id of ids) {
      const active = this.#active.get(id)!;
      this.#free(this.#gatherer.release(active.lanes));
      active.attempt++;
      active.lanes = lanesOf(id, active.attempt, active.rows);
      active.results.fill(null);
      this.#options.stats.launches.restarted += active.rows.length;
      for (const row of active.rows.keys()) active.job.onRestart?.(row);
    }
  }

  #report(submission: Submission, gathered: Gathered, report: LaunchReport): void {
    const { milliseconds } = report;
    this.#watch.at(submission.id, report.index + 1);
    const { batch, rows, ...kind } = submission.launches[report.index]!;
    this.#launched(kind, rows.length, batch, milliseconds);
    const seen = new Set<number>();
    for (const [at, { job, attempt, row, launch: index }] of rows.entries()) {
      const active = this.#active.get(job);
      // A job that was started again repeats launches that have been reported.
      if (active?.attempt !== attempt || active.reported[row]! > index) continue;
      active.reported[row] = index + 1;
      const first = !seen.has(job);
      seen.add(job);
      const launch = active.rows[row]!.launches[index]!;
      const values = gathered.reported(report.index, at, report.values);
      try {
        active.job.onLaunch?.(row, { launch, index, milliseconds, values, rows: rows.length, batch }, first);
      } catch (error) {
        this.#stop(job, error);
      }
    }
  }

  /** Counts a launch that has been made, and observes its cost. */
  #launched({ graph, size }: { graph: string; size: string }, rows: number, batch: number, milliseconds: number): void {
    const { costs, stats } = this.#options;
    const key = keyOf({ graph, size, batch });
    if (this.#warm.has(key)) costs.observe(graph, size, batch, milliseconds);
    this.#warm.add(key);
    stats.launched(graph, rows, batch, milliseconds);
  }

  /** Ends a job before its time. */
  #stop(id: number, reason: unknown): void {
    const unwanted = this.#scheduler.abort(id);
    this.#end(id)?.reject(reason);
    for (const submission of unwanted) {
      const { controller, uploads } = this.#submitted.get(submission)!;
      // Other jobs may rely on what it uploads: then it has to run.
      if (uploads.some((identity) => this.#gatherer.isUsed(identity))) continue;
      controller.abort();
      // What is kept may not be there: who needs it next must not rely on it.
      this.#free(this.#gatherer.forget(uploads));
    }
    this.#submit();
  }

  #end(id: number): Active | undefined {
    const active = this.#active.get(id);
    if (!active) return undefined;
    this.#active.delete(id);
    active.unfollow();
    this.#free(this.#gatherer.release(active.lanes));
    return active;
  }

  #free(names: readonly string[]): void {
    if (names.length > 0) this.#workspace?.free(names);
  }
}

function keyOf({ graph, size, batch }: Pick<AssignedLaunch, "graph" | "size" | "batch">): string {
  return `${graph}@${size} x ${batch}`;
}

function lanesOf(id: number, attempt: number, rows: readonly RowProgram[]): Lane[] {
  return rows.map((row, index) => ({ name: `job ${id}.${attempt}.${index}`, row }));
}
