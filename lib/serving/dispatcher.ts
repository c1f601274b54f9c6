/**
 * Runs jobs on the runtimes of one device or several, several at a time, as the scheduler decides. One submission runs while the
 * next one waits in the runtime, so that the device never waits for JavaScript; a third would only make new jobs wait longer. The
 * only job may be one submission on each device, which is preempted when another job starts. What is lost with a device is made
 * again on the others, as long as there is one.
 */

import { following, onAbort } from "../common/abort.js";
import type { Tensor } from "../common/tensor.js";
import { type DeviceLostError, MemoryError } from "../errors.js";
import type { Program } from "../program/program.js";
import {
  isBlameless,
  type LaunchReport,
  Preempted,
  type RunOptions,
  type Runtime,
  type Workspace,
} from "../runtimes/runtime.js";
import { ahead } from "./captured.js";
import type { CostTable } from "./costs.js";
import { type Gathered, type Lane, resultsOf } from "./gather.js";
import { comparableCosts } from "./placement.js";
import type { Priority } from "./priority.js";
import { type GraphShapes, type RowProgram, rowProgram } from "./rows.js";
import { Scheduler, type SchedulerOptions, type Submission } from "./scheduler.js";
import { isLostForGood, Station } from "./station.js";
import type { StatsRecorder } from "./stats.js";
import type { SlowLaunch } from "./watch.js";

/** One finished launch, as the jobs are told that have a row in it. */
export interface JobLaunch extends LaunchReport {
  /** Rows in it of all jobs. */
  readonly rows: number;
  /** Rows that were computed: those, and padding. */
  readonly batch: number;
  /** Index of the device that made it. */
  readonly device: number;
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
  /** Called for each row when a device has been chosen for it, again after it has begun again. Must not throw. */
  readonly onPlaced?: ((row: number, device: number) => void) | undefined;
  /** Called for each row that begins again, since what it had made is gone. Must not throw. */
  readonly onRestart?: ((row: number) => void) | undefined;
}

export interface DispatcherOptions extends Omit<SchedulerOptions, "preemption"> {
  /** Whether each row runs as one captured program of its own. */
  readonly captured: boolean;
  /** Shapes of a graph, which is added to the runtime when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  /** Of each device, in their order. */
  readonly costs: CostTable | readonly CostTable[];
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
  readonly station: Station;
  readonly controller: AbortController;
  /** Preempts it; null where that cannot be. */
  readonly preempt: AbortController | null;
  /** Identities of the constants that it uploads. */
  readonly uploads: readonly string[];
}

export class Dispatcher {
  readonly #options: DispatcherOptions;
  readonly #scheduler: Scheduler;
  readonly #stations: readonly Station[];
  readonly #active = new Map<number, Active>();
  readonly #submitted = new Map<number, Submitted>();
  #jobs = 0;
  /** Whether submissions will be assigned in this turn of the event loop. */
  #willAssign = false;
  #idle: (() => void)[] = [];

  /** @param runtimes that of each device, all of one kind */
  constructor(runtimes: Runtime | readonly Runtime[], options: DispatcherOptions) {
    const all = "open" in runtimes ? [runtimes] : runtimes;
    const tables = "estimate" in options.costs ? [options.costs] : options.costs;
    this.#options = options;
    const { preemption } = all[0]!.capabilities;
    this.#scheduler = new Scheduler({ ...options, costs: tables, preemption });
    this.#stations = all.map((runtime, index) => new Station(index, runtime, tables[index]!, options));
  }

  /** The launch that runs now, of several the one that has run longest; null if none does. */
  get running(): SlowLaunch | null {
    const running = this.#stations.flatMap(({ watch }) => watch.running ?? []);
    return running.reduce<SlowLaunch | null>((a, b) => (a && a.milliseconds >= b.milliseconds ? a : b), null);
  }

  /** The devices that are not lost for good; all if the last one is. */
  get there(): readonly number[] {
    return this.#there.map(({ index }) => index);
  }

  /** Stations of those devices. */
  get #there(): readonly Station[] {
    return this.#stations.filter(({ isGone }) => !isGone);
  }

  /** The runtimes have freed what these graphs were compiled to: their next launches are slower. */
  forget(graphs: readonly string[]): void {
    for (const station of this.#stations) station.forget(graphs);
  }

  /** Jobs, submissions and constants that are held for jobs under way: 0 when there are none. */
  get held(): number {
    const onDevices = this.#stations.reduce((sum, { gatherer, captured }) => sum + gatherer.uploads + captured.size, 0);
    return this.#active.size + this.#submitted.size + onDevices;
  }

  /**
   * A device has been found to be lost for good while nothing needed it: what has registers there begins again elsewhere. Of no
   * effect on the last one.
   */
  lose(device: number): void {
    const station = this.#stations[device]!;
    // Submissions in flight fail by themselves, and with them it is known whose they were.
    if (station.isGone || this.#there.length === 1 || this.#scheduler.inFlightOn(device) > 0) return;
    this.#leave(station, this.#scheduler.gone(device, performance.now()));
    this.#submit();
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
  async #runCaptured(job: Job, rows: readonly RowProgram[]) {
    const { controller, unfollow } = following(job.signal);
    const runs = rows.map((_, row) => this.#runRow(job, rows, row, controller.signal));
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

  /** One row on the device that will be done with it first; on another one if it was lost with the device. */
  async #runRow(
    { priority, onLaunch, onPlaced, onRestart }: Job,
    rows: readonly RowProgram[],
    row: number,
    signal: AbortSignal,
  ): Promise<Record<string, Tensor>> {
    const { program, specs } = rows[row]!;
    let reported = 0;
    for (let losses = 0; ; losses++) {
      const { station, milliseconds } = this.#stationFor(specs);
      const { index: device } = station;
      station.pendingMs += milliseconds;
      onPlaced?.(row, device);
      try {
        return await station.captured.run(priority, signal, () =>
          station.runtime.run(program, {
            signal,
            onLaunch: (report) => {
              this.#launched(station, specs[report.index]!, 1, 1, report.milliseconds);
              // What begins again repeats launches that have been reported.
              if (report.index < reported) return;
              reported = report.index + 1;
              onLaunch?.(row, { ...report, rows: 1, batch: 1, device }, true);
            },
          }),
        );
      } catch (error) {
        if (!isLostForGood(error) || signal.aborted) throw error;
        if (!station.isGone && this.#there.length > 1) this.#leave(station, []);
        // What loses a second device may be the cause.
        if (!station.isGone || losses > 0) throw error;
        this.#options.stats.launches.restarted++;
        onRestart?.(row);
      } finally {
        station.pendingMs -= milliseconds;
      }
    }
  }

  /** The station that will be done first with a captured program, and what it takes there. */
  #stationFor(specs: RowProgram["specs"]): { readonly station: Station; readonly milliseconds: number } {
    const there = this.#there;
    const costs = comparableCosts(
      there.map(
        ({ costs }) =>
          (...launch) =>
            costs.estimate(...launch),
      ),
    );
    const choices = there.map((station, index) => {
      const milliseconds = specs.reduce((sum, { graph, size }) => sum + costs[index]!(graph, size, 1), 0);
      return { station, milliseconds };
    });
    return choices.reduce((a, b) =>
      b.station.pendingMs + b.milliseconds < a.station.pendingMs + a.milliseconds ? b : a,
    );
  }

  /** Resolves when no job is under way. */
  async idle(): Promise<void> {
    for (const { captured } of this.#stations) await captured.idle();
    if (this.#active.size + this.#submitted.size === 0) return;
    await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  /** Frees what the runtimes hold. To be called when idle. */
  close(): void {
    for (const station of this.#stations) station.close();
  }

  /** Assigns and submits until every runtime has enough. */
  #submit(): void {
    for (const station of this.#stations) if (!station.isGone) this.#submitTo(station);
    if (this.#active.size + this.#submitted.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }

  #submitTo(station: Station): void {
    const { index } = station;
    if (station.workspace?.lost) {
      // Submissions in flight fail by themselves, and with them it is known whose they were.
      if ([...this.#submitted.values()].some((submitted) => submitted.station === station)) return;
      station.forgetWorkspace();
      this.#restart(this.#scheduler.lost(performance.now(), index));
    }
    const toPreempt = this.#scheduler.toPreemptOn(index);
    if (toPreempt !== null) this.#submitted.get(toPreempt)!.preempt!.abort();
    while (this.#scheduler.inFlightOn(index) < ahead) {
      const submission = this.#scheduler.assign(performance.now(), index);
      if (!submission) break;
      void this.#carryOut(submission, station);
    }
  }

  /** Runs one submission. Never rejects. */
  async #carryOut(submission: Submission, station: Station): Promise<void> {
    const { gatherer, watch } = station;
    let workspace: Workspace | null = null;
    let uploads: readonly string[] = [];
    try {
      workspace = station.workspace ??= station.runtime.open();
      this.#tellPlaces(submission);
      const gathered = gatherer.gather(submission, ({ job, row }) => this.#active.get(job)!.lanes[row]!);
      uploads = gathered.uploads;
      const controller = new AbortController();
      const preempt = submission.preemptible ? new AbortController() : null;
      this.#submitted.set(submission.id, { station, controller, preempt, uploads });
      watch.submitted(submission.id, submission.launches);
      const run = workspace.submit(gathered.program, {
        reports: this.#isWatched(submission) ? "each" : "bunched",
        signal: controller.signal,
        preempt: preempt?.signal,
        onBegin: () => watch.begun(submission.id),
        onProgress: (launch) => watch.at(submission.id, launch),
        onLaunch: (report) => this.#report(station, submission, gathered, report),
      });
      workspace.free(gathered.temporaries);
      const { results: values, launches } = await run.then(
        (results) => ({ results, launches: submission.launches.length }),
        (error: unknown) => (error instanceof Preempted ? error : Promise.reject(error)),
      );
      this.#over(submission, station);
      // Its workspace has been lost and replaced meanwhile.
      if (workspace !== station.workspace) return;
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
      this.#over(submission, station);
      this.#fail(station, submission, workspace, uploads, error);
    } finally {
      this.#submit();
    }
  }

  /** Whether a job in it asks for reports as soon as there are any. */
  #isWatched({ launches }: Submission): boolean {
    return launches.some(({ rows }) => rows.some(({ job }) => this.#active.get(job)?.job.reports === "each"));
  }

  /** Tells jobs where their rows are, as they begin. */
  #tellPlaces({ device, launches }: Submission): void {
    for (const { rows } of launches)
      for (const { job, row, launch } of rows) if (launch === 0) this.#active.get(job)?.job.onPlaced?.(row, device);
  }

  #fail(
    station: Station,
    submission: Submission,
    workspace: Workspace | null,
    uploads: readonly string[],
    error: unknown,
  ): void {
    // Its workspace has been lost and replaced before: its jobs have been started again.
    if (workspace !== station.workspace) return;
    if (isLostForGood(error)) {
      this.#failForGood(station, submission, workspace === null, error);
      return;
    }
    const lost = workspace === null || workspace.lost;
    const failure = { lost, blameless: lost && isBlameless(error) };
    const { rejected, restarted } = this.#scheduler.failed(submission.id, failure, performance.now());
    if (lost) station.forgetWorkspace();
    else this.#free(station, station.gatherer.forget(uploads));
    // What is kept for later must not take the memory that is needed now.
    if (error instanceof MemoryError) this.#free(station, station.gatherer.dropKept());
    for (const id of rejected) this.#end(id)?.reject(error);
    this.#restart(restarted);
  }

  /** @param blameless whether the device was lost before the submission */
  #failForGood(station: Station, { id }: Submission, blameless: boolean, error: DeviceLostError): void {
    const now = performance.now();
    if (this.#there.length === 1) {
      // The last one: nothing can be started again.
      this.#scheduler.failed(id, { lost: true }, now);
      station.forgetWorkspace();
      for (const id of [...this.#active.keys()]) {
        this.#scheduler.abort(id);
        this.#end(id)?.reject(error);
      }
      return;
    }
    const { rejected, restarted } = this.#scheduler.failed(id, { lost: true, blameless, permanent: true }, now);
    for (const id of rejected) this.#end(id)?.reject(error);
    this.#leave(station, restarted);
  }

  /** Works without a device from now on. @param restarted jobs that had rows there */
  #leave(station: Station, restarted: readonly number[]): void {
    station.isGone = true;
    station.forgetWorkspace();
    this.#restart(restarted);
  }

  #over({ id }: Submission, { watch }: Station): void {
    this.#submitted.delete(id);
    watch.over(id);
  }

  /** Gives jobs that start again new registers. */
  #restart(ids: readonly number[]): void {
    for (const id of ids) {
      const active = this.#active.get(id)!;
      this.#release(active.lanes);
      active.attempt++;
      active.lanes = lanesOf(id, active.attempt, active.rows);
      active.results.fill(null);
      this.#options.stats.launches.restarted += active.rows.length;
      for (const row of active.rows.keys()) active.job.onRestart?.(row);
    }
  }

  #report(station: Station, submission: Submission, gathered: Gathered, report: LaunchReport): void {
    const { milliseconds } = report;
    const { index: device } = station;
    station.watch.at(submission.id, report.index + 1);
    const { batch, rows, ...kind } = submission.launches[report.index]!;
    this.#launched(station, kind, rows.length, batch, milliseconds);
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
        active.job.onLaunch?.(row, { launch, index, milliseconds, values, rows: rows.length, batch, device }, first);
      } catch (error) {
        this.#stop(job, error);
      }
    }
  }

  /** Counts a launch that has been made, and observes its cost. */
  #launched(
    station: Station,
    { graph, size }: { graph: string; size: string },
    rows: number,
    batch: number,
    milliseconds: number,
  ): void {
    station.launched(graph, size, batch, milliseconds);
    this.#options.stats.launched(graph, rows, batch, milliseconds, station.index);
  }

  /** Ends a job before its time. */
  #stop(id: number, reason: unknown): void {
    const unwanted = this.#scheduler.abort(id);
    this.#end(id)?.reject(reason);
    for (const submission of unwanted) {
      const { station, controller, uploads } = this.#submitted.get(submission)!;
      // Other jobs may rely on what it uploads: then it has to run.
      if (uploads.some((identity) => station.gatherer.isUsed(identity))) continue;
      controller.abort();
      // What is kept may not be there: who needs it next must not rely on it.
      this.#free(station, station.gatherer.forget(uploads));
    }
    this.#submit();
  }

  #end(id: number): Active | undefined {
    const active = this.#active.get(id);
    if (!active) return undefined;
    this.#active.delete(id);
    active.unfollow();
    this.#release(active.lanes);
    return active;
  }

  /** Rows are over: frees what they have on the devices. */
  #release(lanes: readonly Lane[]): void {
    for (const station of this.#stations) this.#free(station, station.gatherer.release(lanes));
  }

  #free({ workspace }: Station, names: readonly string[]): void {
    if (names.length > 0) workspace?.free(names);
  }
}

function lanesOf(id: number, attempt: number, rows: readonly RowProgram[]): Lane[] {
  return rows.map((row, index) => ({ name: `job ${id}.${attempt}.${index}`, row }));
}
