/**
 * Keeps the table of costs complete, and stores it. What a promise needs is measured before it is given, the rest between
 * requests; what is not in launches is known from finished requests. Entries that are not to be believed any more are
 * measured again between requests, and stay in use until then.
 */

import { following, SharedTask } from "../common/abort.js";
import type { Program } from "../program/program.js";
import type { LaunchReport, Runtime } from "../runtimes/runtime.js";
import { type CostEntry, type CostTable, doubtOf, entryOf, hostGraph, spreadOf } from "./costs.js";
import { type MeasureOptions, measure, type Subject } from "./measure.js";
import type { CandidateWork, Terms } from "./prediction.js";
import { type GraphShapes, kindOf, type LaunchKind, launchKinds } from "./rows.js";
import { launchBatches } from "./split.js";
import type { CostStore } from "./store.js";

const hostObservationsKept = 15;
const hostObservationsNeeded = 3;

/** Launches are measured in the background where one takes at most this many milliseconds. */
const backgroundLimit = 2000;
/** Milliseconds without requests after which that begins. */
const backgroundDelay = 250;
const backgroundRounds = 7;
/** After which time an entry that was measured again, and is still in doubt, is tried once more; each time four times as long. */
const doubtDelay = { first: 600_000, last: 24 * 3600_000 } as const;
/** Timed runs of what a request with a time limit needs to know. */
const promiseRounds = 3;

export interface CalibrationOptions {
  /** Numbers of rows that a launch may have, at least one. */
  readonly batches: readonly number[];
  /** Whether costs that are not known are measured while there are no requests. */
  readonly background: boolean;
  /** Shapes of a graph, which is added to the runtime when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  readonly store: CostStore;
  /** For people who look into the stored table. */
  readonly about: Readonly<Record<string, unknown>>;
  readonly onError?: (error: unknown) => void;
}

export class Calibration {
  readonly #runtime: Runtime;
  readonly #costs: CostTable;
  readonly #options: CalibrationOptions;
  readonly #untilIdle: () => Promise<void>;
  readonly #hostTimes = new Map<string, number[]>();
  /** Launches that have been asked for and whose costs are not all known, or not to be believed. */
  readonly #unmeasured = new Map<string, LaunchKind>();
  /** When a kind of launch may be measured again, and how often it was, by graph and size. */
  readonly #again = new Map<string, { readonly from: number; readonly times: number }>();
  /** Milliseconds of a launch that has run here, by graph and size. */
  readonly #seen = new Map<string, number>();
  /** What has run since the runtime was started, by graph and size. Graphs that are missing have yet to be compiled. */
  readonly #warm = new Set<string>();
  /** What is being measured before promises, by graph, size and batch. */
  readonly #measuring = new Map<string, SharedTask<void>>();
  readonly #closing = new AbortController();
  #background: Promise<void> | null = null;
  /** The latest reset that has been followed. */
  #reset = 0;
  #timer: NodeJS.Timeout | undefined;
  #stored: number;

  /** @param untilIdle resolves when no request is under way */
  constructor(runtime: Runtime, costs: CostTable, options: CalibrationOptions, untilIdle: () => Promise<void>) {
    this.#runtime = runtime;
    this.#costs = costs;
    this.#options = options;
    this.#untilIdle = untilIdle;
    this.#stored = costs.version;
  }

  /** Whether all launches of a candidate have been made before. */
  isWarm(candidate: CandidateWork): boolean {
    return kindsOf(programsOf(candidate)).every(({ key }) => this.#warm.has(key));
  }

  /** A launch has been made for a request. */
  launched({ launch, milliseconds }: LaunchReport): void {
    this.#seen.set(kindOf(launch), milliseconds);
    this.#warm.add(kindOf(launch));
  }

  /** The runtime has lost what it had loaded and compiled: everything runs for the first time again. */
  lost(): void {
    this.#warm.clear();
  }

  /** Time of a finished request that was not in launches. */
  observeHost({ size, pictures }: Terms, milliseconds: number): void {
    if (milliseconds <= 0) return;
    const key = `${size} x ${pictures}`;
    const times = this.#hostTimes.get(key) ?? [];
    times.push(milliseconds);
    if (times.length > hostObservationsKept) times.shift();
    this.#hostTimes.set(key, times);
    // A single time is used if there is no entry; it does not replace an entry made of many.
    const isBetter = times.length >= hostObservationsNeeded || !this.#costs.get(hostGraph, size, pictures);
    if (isBetter) this.#costs.set(entryOf(hostGraph, pictures, size, times));
  }

  /**
   * Before a promise: measures what is not known, and runs once what has not run here, since the first run is slower.
   * @throws what the runtime throws, or `terms.signal.reason`
   */
  async learn(candidates: readonly CandidateWork[], terms: Terms): Promise<void> {
    // What is known may be forgotten meanwhile: by a reset, or with the process that has run it.
    for (;;) {
      const { cold, unknown } = this.#missing(candidates, terms);
      if (cold.size + unknown.size === 0) return;
      await this.#share(cold, 0, terms.signal);
      await this.#share(unknown, promiseRounds, terms.signal);
    }
  }

  /** What is to be measured before a promise, and what is to be run once. */
  #missing(candidates: readonly CandidateWork[], { pin }: Terms) {
    const unknown = new Map<string, Subject>();
    const cold = new Map<string, Subject>();
    for (const { program, rows } of candidates.flatMap(({ demands }) => demands))
      for (const kind of launchKinds(program)) {
        const { key, graph, size, maxRows } = kind;
        const batches = launchBatches(this.#options.batches, maxRows, pin);
        // One picture needs the smallest batch only; for several, two batches give a line.
        const largest = batches.findLast((batch) => batch <= rows) ?? batches[0]!;
        for (const batch of new Set([batches[0]!, largest]))
          if (!this.#costs.get(graph, size, batch)) unknown.set(`${key} x ${batch}`, { ...kind, batch });
          else if (!this.#warm.has(key)) cold.set(key, { ...kind, batch });
      }
    return { cold, unknown };
  }

  /** Remembers what is to be measured in the background. */
  remember(candidates: readonly CandidateWork[]): void {
    // Candidates differ in how often they make launches of the same few kinds.
    for (const kind of kindsOf(candidates.flatMap(programsOf)))
      if (this.#unknownOf(kind).length > 0 || this.#isDoubtful(kind)) this.#unmeasured.set(kind.key, kind);
  }

  /** Measures the launches of row programs at the batches given, puts them into the table and stores it. */
  async measure(
    programs: readonly Program[],
    batches: readonly number[],
    options: Pick<MeasureOptions, "rounds" | "signal" | "onProgress">,
  ): Promise<void> {
    const subjects = kindsOf(programs).flatMap((kind) => subjectsOf(kind, batches));
    for (const entry of await this.#measure(subjects, { ...options, turn: this.#untilIdle })) this.#costs.set(entry);
    await this.store();
  }

  /**
   * No request is under way: soon there may be time to measure.
   * @param options `isAfterWork`: whether one has just ended; callers who are refused again and again do not put it off
   */
  rest({ isAfterWork = true } = {}): void {
    if (!this.#options.background || this.#background || this.#closing.signal.aborted) return;
    if (this.#timer && !isAfterWork) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#background = this.#measureRest()
        .catch((error) => {
          if (!this.#closing.signal.aborted) this.#options.onError?.(error);
        })
        .finally(() => {
          this.#background = null;
        });
    }, backgroundDelay);
    this.#timer.unref();
  }

  /** Ends what is measured without a request, and waits for what is measured for one. */
  async stop(): Promise<void> {
    this.#closing.abort(new Error("The model is being disposed."));
    clearTimeout(this.#timer);
    await this.#background;
    await Promise.allSettled([...this.#measuring.values()].map((task) => task.join()));
  }

  /** Keeps the table for later, if it has changed. @throws the file system's error */
  async store(): Promise<void> {
    const { version, entries } = this.#costs;
    if (version === this.#stored) return;
    await this.#options.store.write(entries, this.#options.about);
    this.#stored = version;
    await this.#followReset();
  }

  /** Forgets all costs, here and on disk. @throws the file system's error */
  async reset(): Promise<void> {
    this.#costs.forget();
    this.#hostTimes.clear();
    this.#again.clear();
    await this.#options.store.reset(this.#options.about);
    this.#reset = await this.#options.store.lastReset();
  }

  /** Forgets what another process has reset. */
  async #followReset(): Promise<void> {
    const reset = await this.#options.store.lastReset();
    // Once: what has been measured since stays, even if this machine's clock went back.
    if (reset > this.#reset) this.#costs.forget(reset);
    this.#reset = reset;
  }

  /** Measures, together with other callers who need the same. */
  async #share(subjects: ReadonlyMap<string, Subject>, rounds: number, signal: AbortSignal | undefined): Promise<void> {
    const tasks = new Set<SharedTask<void>>();
    const missing = new Map(subjects);
    for (const key of subjects.keys()) {
      const task = this.#measuring.get(key);
      if (!task || task.abandoned) continue;
      tasks.add(task);
      missing.delete(key);
    }
    if (missing.size > 0) {
      const task = new SharedTask(async (signal) => {
        // `task` is assigned before the measuring begins.
        await null;
        try {
          for (const entry of await this.#measure([...missing.values()], { rounds, signal }))
            if (!this.#costs.get(entry.graph, entry.size, entry.batch)) this.#costs.set(entry);
        } finally {
          for (const key of missing.keys()) if (this.#measuring.get(key) === task) this.#measuring.delete(key);
        }
      });
      for (const key of missing.keys()) this.#measuring.set(key, task);
      tasks.add(task);
    }
    // After a failure the caller waits for none of the others.
    const { controller, unfollow } = following(signal);
    try {
      await Promise.all([...tasks].map((task) => task.join(controller.signal)));
    } catch (error) {
      controller.abort(error);
      throw error;
    } finally {
      unfollow();
    }
  }

  async #measure(subjects: readonly Subject[], options: MeasureOptions): Promise<CostEntry[]> {
    if (subjects.length === 0) return [];
    const entries = await measure(this.#runtime, subjects, this.#options.graph, options);
    for (const { key } of subjects) this.#warm.add(key);
    return entries;
  }

  /** Measures what has been asked for and is not in the table, between requests. */
  async #measureRest(): Promise<void> {
    const { signal } = this.#closing;
    await this.#followReset();
    for (const [key, kind] of this.#unmeasured) {
      const row = this.#seen.get(key) ?? 0;
      const unknown = this.#unknownOf(kind);
      const idle = unknown.filter(({ batch }) => !this.#measuring.has(`${key} x ${batch}`));
      const subjects = idle.filter(({ batch }) => row * batch <= backgroundLimit);
      // What is being measured for a caller may still be given up.
      if (idle.length === unknown.length) this.#unmeasured.delete(key);
      const options = { rounds: backgroundRounds, background: true, signal, turn: this.#untilIdle };
      for (const entry of await this.#measure(subjects, options)) this.#costs.set(entry);
      if (this.#isDoubtful(kind)) await this.#measureAgain(kind, options);
    }
    await this.store();
  }

  /** Measures a kind at all batches together, so that their ratios are right, and believes it unless the old runs differed less. */
  async #measureAgain(kind: LaunchKind, options: MeasureOptions): Promise<void> {
    const { key, graph, size } = kind;
    const known = this.#entriesOf(kind);
    const [smallest] = known as [CostEntry];
    const subjects = known
      .filter(
        ({ batch, milliseconds }) =>
          Math.min(milliseconds, (smallest.milliseconds / smallest.batch) * batch) <= backgroundLimit,
      )
      .map(({ batch }) => ({ ...kind, batch }));
    const { times } = this.#again.get(key) ?? { times: 0 };
    const delay = Math.min(doubtDelay.last, doubtDelay.first * 4 ** times);
    this.#again.set(key, { from: Date.now() + delay, times: times + 1 });
    const measured = await this.#measure(subjects, options);
    for (const entry of measured) {
      const before = this.#costs.get(graph, size, entry.batch);
      if (!before || doubtOf(before, known, Date.now()) !== "spread" || spreadOf(entry) < spreadOf(before))
        this.#costs.set(entry);
    }
  }

  /** Whether launches of a kind are to be measured again, now. */
  #isDoubtful(kind: LaunchKind): boolean {
    const now = Date.now();
    if (now < (this.#again.get(kind.key)?.from ?? 0)) return false;
    const entries = this.#entriesOf(kind);
    return entries.some((entry) => doubtOf(entry, entries, now) !== null);
  }

  /** The entries of a kind at the batches that are launched. */
  #entriesOf(kind: LaunchKind): CostEntry[] {
    return subjectsOf(kind, this.#options.batches).flatMap(
      ({ graph, size, batch }) => this.#costs.get(graph, size, batch) ?? [],
    );
  }

  /** Launches of a kind at those batches whose cost is not known. */
  #unknownOf(kind: LaunchKind): Subject[] {
    return subjectsOf(kind, this.#options.batches).filter(
      ({ graph, size, batch }) => !this.#costs.get(graph, size, batch),
    );
  }
}

function programsOf({ demands }: CandidateWork): Program[] {
  return demands.map(({ program }) => program);
}

/** The kinds of launches that programs make, each once. */
function kindsOf(programs: readonly Program[]): LaunchKind[] {
  return [...new Map(programs.flatMap(launchKinds).map((kind) => [kind.key, kind])).values()];
}

/** Launches of a kind at every batch that they may have. */
function subjectsOf(kind: LaunchKind, batches: readonly number[]): Subject[] {
  const { maxRows = Number.POSITIVE_INFINITY } = kind;
  return batches.filter((batch) => batch <= maxRows).map((batch) => ({ ...kind, batch }));
}
