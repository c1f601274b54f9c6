/**
 * Runs jobs on a runtime, several at a time: the scheduler decides, this carries out. One piece runs while the next one
 * waits behind it, so that the device never waits for JavaScript; a third would only make newcomers wait longer. A lone
 * request may be one piece, which is cut short when somebody comes.
 */

import { setMaxListeners } from "node:events";
import type { Tensor } from "../common/tensor.js";
import type { Program } from "../program/program.js";
import { type LaunchReport, Preempted, type Runtime, type Workspace } from "../runtimes/runtime.js";
import type { CostTable } from "./costs.js";
import { Gatherer, type Lane } from "./gather.js";
import { Line } from "./line.js";
import type { Priority } from "./priority.js";
import { type GraphShapes, Identities, type RowProgram, rowProgram } from "./rows.js";
import { type PlannedRow, Scheduler, type Submission } from "./scheduler.js";
import type { StatsRecorder } from "./stats.js";

/** Pieces that the runtime has at a time: one that runs and one that is next. */
const ahead = 2;

export interface Job {
  /** A program for each row; see rows.ts. */
  readonly rows: readonly Program[];
  readonly claim: Priority;
  /** Pads every launch to this batch; default: that of the dispatcher. */
  readonly pin?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /**
   * Called for each row of each launch, once, in the order of a row's launches. `first` is true for one row of the job in
   * each launch, `milliseconds` are those of the whole launch. An error it throws rejects the job.
   */
  readonly onLaunch?: ((row: number, report: LaunchReport, first: boolean) => void) | undefined;
}

export interface DispatcherOptions {
  readonly batches: readonly number[];
  readonly maxBatch: number;
  readonly maxWait: number;
  readonly pin: number | null;
  /** Whether each row runs as one program of its own. */
  readonly whole?: boolean;
  /** Shapes of a graph, which the runtime is told of when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  readonly costs: CostTable;
  readonly stats: StatsRecorder;
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
  /** Stops listening for an abort. */
  release(): void;
}

interface Submitted {
  readonly controller: AbortController;
  /** Cuts a whole piece short. */
  readonly cut: AbortController | null;
  /** Identities of the constants that it uploads. */
  readonly uploads: readonly string[];
}

export class Dispatcher {
  readonly #runtime: Runtime;
  readonly #options: DispatcherOptions;
  readonly #scheduler: Scheduler;
  readonly #identities = new Identities();
  readonly #gatherer: Gatherer;
  readonly #line = new Line();
  readonly #active = new Map<number, Active>();
  readonly #submitted = new Map<number, Submitted>();
  /** Launches, as graph, size and batch, that this workspace has made: the first of each is slower. */
  readonly #warm = new Set<string>();
  #workspace: Workspace | null = null;
  #jobs = 0;
  #planned = false;
  #idle: (() => void)[] = [];

  constructor(runtime: Runtime, options: DispatcherOptions) {
    this.#runtime = runtime;
    this.#options = options;
    const { batches, maxBatch, maxWait, costs } = options;
    this.#scheduler = new Scheduler({
      batches,
      maxBatch,
      maxWait,
      cuts: runtime.capabilities.preemption,
      cost: (graph, size, batch) => costs.estimate(graph, size, batch),
      relativeCost: (graph, size, batch) => costs.relative(graph, size, batch),
    });
    this.#gatherer = new Gatherer(options.graph, this.#identities);
  }

  /** Constants, registers and pieces that are held for jobs under way: 0 when there are none. */
  get held(): number {
    return this.#active.size + this.#submitted.size + this.#gatherer.uploads + this.#line.length;
  }

  /** The job's rows as the scheduler sees them. */
  rowsOf(programs: readonly Program[]): RowProgram[] {
    return programs.map((program) => rowProgram(program, this.#options.graph, this.#identities));
  }

  /**
   * Runs a job beside the others.
   * @returns the results of each row's program
   * @throws what the runtime throws for a launch of this job, what `onLaunch` throws, or `signal.reason`
   */
  async run(job: Job): Promise<Record<string, Tensor>[]> {
    const { signal } = job;
    signal?.throwIfAborted();
    const rows = this.rowsOf(job.rows);
    if (this.#options.whole) return this.#runWhole(job, rows);
    const id = this.#jobs++;
    const pin = job.pin ?? this.#options.pin;
    this.#scheduler.start({ id, claim: job.claim, rows: rows.map(({ specs }) => specs), pin }, performance.now());
    return new Promise((resolve, reject) => {
      const abort = () => this.#stop(id, signal!.reason);
      signal?.addEventListener("abort", abort, { once: true });
      this.#active.set(id, {
        job,
        rows,
        attempt: 0,
        lanes: lanesOf(id, 0, rows),
        reported: rows.map(() => 0),
        results: rows.map(() => null),
        resolve,
        reject,
        release: () => signal?.removeEventListener("abort", abort),
      });
      // Jobs that arrive together are planned together.
      if (this.#planned) return;
      this.#planned = true;
      setImmediate(() => {
        this.#planned = false;
        this.#submit();
      });
    });
  }

  /** Each row as a program of its own. One that fails takes the job's others with it. */
  async #runWhole({ claim, signal, onLaunch }: Job, rows: readonly RowProgram[]): Promise<Record<string, Tensor>[]> {
    const controller = new AbortController();
    // One listener for each picture is no leak.
    setMaxListeners(0, controller.signal);
    const abort = () => controller.abort(signal!.reason);
    signal?.addEventListener("abort", abort, { once: true });
    const runRow = async ({ program, specs }: RowProgram, row: number) => {
      let attempts = 0;
      const work = () => {
        if (attempts++ > 0) this.#options.stats.restarted(1);
        return this.#runtime.run(program, {
          signal: controller.signal,
          onLaunch: (report) => {
            this.#launched(specs[report.index]!, 1, 1, report.milliseconds);
            onLaunch?.(row, report, true);
          },
        });
      };
      try {
        return await this.#line.run(claim, controller.signal, work);
      } catch (error) {
        controller.abort(error);
        throw error;
      }
    };
    try {
      // Until all have stopped: what they take of the device is this job's.
      const rowsDone = await Promise.allSettled(rows.map(runRow));
      controller.signal.throwIfAborted();
      return rowsDone.map((done) => (done as PromiseFulfilledResult<Record<string, Tensor>>).value);
    } finally {
      signal?.removeEventListener("abort", abort);
    }
  }

  /** Resolves when no job is under way. */
  async idle(): Promise<void> {
    await this.#line.idle();
    if (this.#active.size + this.#submitted.size === 0) return;
    await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  /** Frees what the runtime holds. To be called when idle. */
  close(): void {
    this.#workspace?.close();
    this.#workspace = null;
    this.#gatherer.reset();
  }

  /** Submits pieces until the runtime has enough. */
  #submit(): void {
    const { inTheWay } = this.#scheduler;
    if (inTheWay !== null) this.#submitted.get(inTheWay)!.cut!.abort();
    while (this.#scheduler.inFlight < ahead) {
      const piece = this.#scheduler.plan(performance.now());
      if (!piece) break;
      void this.#carryOut(piece);
    }
    if (this.#active.size + this.#submitted.size === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }

  /** Runs one piece. Never rejects. */
  async #carryOut(piece: Submission): Promise<void> {
    let workspace: Workspace | null = null;
    let uploads: readonly string[] = [];
    try {
      workspace = this.#workspace ??= this.#runtime.open();
      const gathered = this.#gatherer.gather(
        piece,
        ({ request, row }: PlannedRow) => this.#active.get(request)!.lanes[row]!,
      );
      uploads = gathered.uploads;
      const controller = new AbortController();
      const cut = piece.whole ? new AbortController() : null;
      this.#submitted.set(piece.id, { controller, cut, uploads });
      const run = workspace.submit(gathered.program, {
        signal: controller.signal,
        preempt: cut?.signal,
        onLaunch: (report) => this.#report(piece, gathered, report),
      });
      workspace.free(gathered.temporaries);
      const { results: values, launches } = await run.then(
        (results) => ({ results, launches: piece.launches.length }),
        (error: unknown) => (error instanceof Preempted ? error : Promise.reject(error)),
      );
      this.#submitted.delete(piece.id);
      // Of a workspace that was given up while the news was on its way.
      if (workspace !== this.#workspace) return;
      for (const { rows } of piece.launches.slice(0, launches))
        for (const planned of rows) {
          const active = this.#current(planned);
          if (active && planned.last)
            active.results[planned.row] = gathered.results(active.lanes[planned.row]!, values);
        }
      if (launches < piece.launches.length) this.#scheduler.cut(piece.id, launches, performance.now());
      else
        for (const id of this.#scheduler.finished(piece.id)) {
          const active = this.#end(id)!;
          active.resolve(active.results as Record<string, Tensor>[]);
        }
    } catch (error) {
      this.#submitted.delete(piece.id);
      this.#fail(piece, workspace, uploads, error);
    } finally {
      this.#submit();
    }
  }

  #fail(piece: Submission, workspace: Workspace | null, uploads: readonly string[], error: unknown): void {
    // A piece of a workspace that was given up earlier: its requests have been started again.
    if (workspace !== this.#workspace) return;
    const lost = workspace === null || workspace.lost;
    const { rejected, restarted } = this.#scheduler.failed(piece.id, lost, performance.now());
    if (lost) {
      this.#workspace = null;
      this.#gatherer.reset();
      this.#warm.clear();
    } else this.#free(this.#gatherer.forget(uploads));
    for (const id of rejected) this.#end(id)?.reject(error);
    for (const id of restarted) {
      const active = this.#active.get(id)!;
      this.#free(active.lanes.flatMap((lane) => this.#gatherer.release(lane)));
      active.attempt++;
      active.lanes = lanesOf(id, active.attempt, active.rows);
      active.results.fill(null);
      this.#options.stats.restarted(active.rows.length);
    }
  }

  #report(piece: Submission, gathered: ReturnType<Gatherer["gather"]>, report: LaunchReport): void {
    const { graph, size, batch, rows } = piece.launches[report.index]!;
    this.#launched({ graph, size }, rows.length, batch, report.milliseconds);
    const seen = new Set<number>();
    for (const [index, planned] of rows.entries()) {
      const active = this.#current(planned);
      // Who was started again makes launches that have been reported.
      if (!active || active.reported[planned.row]! > planned.launch) continue;
      active.reported[planned.row] = planned.launch + 1;
      const first = !seen.has(planned.request);
      seen.add(planned.request);
      const launch = active.rows[planned.row]!.launches[planned.launch]!;
      const values = launch.reported ? gathered.reported(report.index, index, report.values) : {};
      try {
        active.job.onLaunch?.(
          planned.row,
          { launch, index: planned.launch, milliseconds: report.milliseconds, values },
          first,
        );
      } catch (error) {
        this.#stop(planned.request, error);
      }
    }
  }

  /** A launch has been made: what it says about costs, and what is counted. */
  #launched({ graph, size }: { graph: string; size: string }, rows: number, batch: number, milliseconds: number): void {
    const { costs, stats } = this.#options;
    const key = warmKey(graph, size, batch);
    if (this.#warm.has(key)) costs.observe(graph, size, batch, milliseconds);
    this.#warm.add(key);
    stats.launched(graph, rows, batch, milliseconds);
  }

  /** Takes a job out, for a reason of its own. */
  #stop(id: number, reason: unknown): void {
    const unwanted = this.#scheduler.abort(id);
    this.#end(id)?.reject(reason);
    for (const piece of unwanted) {
      const { controller, uploads } = this.#submitted.get(piece)!;
      // Others may rely on what it uploads: then it has to run.
      if (!uploads.some((identity) => this.#gatherer.isUsed(identity))) controller.abort();
    }
    this.#submit();
  }

  #end(id: number): Active | undefined {
    const active = this.#active.get(id);
    if (!active) return undefined;
    this.#active.delete(id);
    active.release();
    this.#free(active.lanes.flatMap((lane) => this.#gatherer.release(lane)));
    return active;
  }

  #free(names: readonly string[]): void {
    if (names.length > 0) this.#workspace?.free(names);
  }

  /** The job of a planned row, unless it is over or has been started again since. */
  #current({ request, attempt }: PlannedRow): Active | null {
    const active = this.#active.get(request);
    return active?.attempt === attempt ? active : null;
  }
}

function lanesOf(id: number, attempt: number, rows: readonly RowProgram[]): Lane[] {
  return rows.map((row, index) => ({ name: `job ${id}.${attempt}.${index}`, row }));
}

function warmKey(graph: string, size: string, batch: number): string {
  return `${graph}@${size} x ${batch}`;
}
