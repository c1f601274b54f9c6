/**
 * A service under load, simulated: the product's service on a device that only takes time, and on a virtual clock, so that
 * minutes of arrivals pass in seconds and are the same in every run. Launches take what a function of the test says, times
 * seeded noise. The clock moves only when everything that can happen at the present moment has happened.
 */

import { setImmediate } from "node:timers/promises";
import { vi } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { type DeadlineError, type QueueFullError, RuntimeError } from "../../lib/errors.js";
import type { Launch, Program } from "../../lib/program/program.js";
import { Preempted, type RunOptions, type Runtime, type SubmissionOptions } from "../../lib/runtimes/runtime.js";
import type { CostEntry } from "../../lib/serving/costs.js";
import type { CandidateWork, Terms } from "../../lib/serving/prediction.js";
import { batchesUpTo, Service, type ServiceOptions } from "../../lib/serving/service.js";
import type { CostStore } from "../../lib/serving/store.js";
import { conditionOf, programOf } from "./programs.js";
import { shapesOf } from "./simulated.js";

/** Seeded numbers: even, exponential with mean 1, normal. */
export class Random {
  #state: number;
  constructor(seed: number) {
    this.#state = seed;
  }
  even(): number {
    this.#state = (Math.imul(this.#state, 1664525) + 1013904223) >>> 0;
    return (this.#state + 0.5) / 2 ** 32;
  }
  exponential(): number {
    return -Math.log(this.even());
  }
  normal(): number {
    return Math.sqrt(2 * this.exponential()) * Math.cos(2 * Math.PI * this.even());
  }
}

/** To be called before a test, and `vi.useRealTimers()` after it. Immediates stay real: they are how events are drained. */
export function virtualTime(): void {
  vi.useFakeTimers({
    toFake: ["setTimeout", "clearTimeout", "setInterval", "clearInterval", "performance", "Date"],
    now: Date.UTC(2026, 0, 1),
  });
}

export function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Lets the virtual clock run until a promise has settled. */
export async function elapse<T>(work: Promise<T>): Promise<T> {
  let isSettled = false;
  const settle = () => {
    isSettled = true;
  };
  work.then(settle, settle);
  for (;;) {
    // What a moment causes may take several turns of the event loop: the dispatcher waits for one, measuring for another.
    for (let turn = 0; turn < 4 && !isSettled; turn++) await setImmediate();
    if (isSettled) return work;
    if (vi.getTimerCount() === 0) throw new Error("Nothing will happen any more, and the work is not done.");
    vi.advanceTimersToNextTimer();
  }
}

/** A device that only takes time: one launch after another, results without values. */
export class TimedRuntime implements Runtime {
  readonly name = "onnxruntime";
  readonly capabilities = { preemption: true, capture: true, anyShape: true };
  /** Milliseconds of a launch. */
  cost: (graph: string, batch: number) => number;
  /** Batches of the launches for requests, by how often. */
  readonly batches = new Map<string, number>();
  /** Runs that only measured. */
  measured = 0;
  /** How the launch that runs will end, once; null: well. `lost`: with all that is held. */
  failure: { readonly error: Error; readonly lost: boolean } | null = null;
  #turn: Promise<unknown> = Promise.resolve();
  /** Timers have whole milliseconds: what is left of one launch is added to the next. */
  #rest = 0;

  constructor(cost: (graph: string, batch: number) => number) {
    this.cost = cost;
  }

  add(): void {}
  has(): boolean {
    return true;
  }
  async dispose(): Promise<void> {}

  run(program: Program, options: RunOptions = {}) {
    this.measured++;
    return this.#queued(() => this.#work(program, options));
  }

  open() {
    const workspace = {
      lost: false,
      free: () => {},
      close: () => {},
      submit: (program: Program, options: SubmissionOptions = {}) =>
        this.#queued(() => {
          if (workspace.lost) throw new RuntimeError("This workspace is gone.");
          return this.#work(program, options, (graph, batch) => {
            const { failure } = this;
            this.failure = null;
            if (failure?.lost) workspace.lost = true;
            if (failure) throw failure.error;
            const key = `${graph} x ${batch}`;
            this.batches.set(key, (this.batches.get(key) ?? 0) + 1);
          });
        }),
    };
    return workspace;
  }

  #queued<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#turn.then(work);
    this.#turn = done.catch(() => undefined);
    return done;
  }

  async #work(
    program: Program,
    { signal, preempt, onLaunch }: SubmissionOptions,
    count?: (graph: string, batch: number) => void,
  ) {
    signal?.throwIfAborted();
    let index = 0;
    for (const launch of program.instructions) {
      if (launch.op !== "launch") continue;
      signal?.throwIfAborted();
      if (preempt?.aborted) throw new Preempted(index, {});
      const batch = batchOf(launch, program);
      const milliseconds = this.cost(launch.graph, batch);
      this.#rest += milliseconds;
      const whole = Math.floor(this.#rest);
      this.#rest -= whole;
      await sleep(whole);
      count?.(launch.graph, batch);
      onLaunch?.({ launch, index: index++, milliseconds, values: {} });
    }
    return Object.fromEntries(program.results.map((name) => [name, float32([0], new Float32Array(0))]));
  }
}

function batchOf({ graph, outputs }: Launch, program: Program): number {
  const rows = Object.keys(outputs).find((output) => shapesOf(graph).outputs.get(output)![0] === "rows")!;
  return program.registers[outputs[rows]!]!.shape[0]!;
}

/** Milliseconds of the simulated graphs at a batch: sharing pays, most for small launches. */
export const milliseconds: Record<string, (batch: number) => number> = {
  "predict.guidance": (batch) => 6 + 4 * batch,
  "refine.guidance": (batch) => 3 + 1 * batch,
  vae_decoder: (batch) => 2 + 3 * batch,
};

/** A store without a disk, whose work would not wait for the virtual clock. */
export class MemoryStore implements Pick<CostStore, "read" | "write" | "reset" | "lastReset"> {
  entries: readonly CostEntry[] = [];
  resetAt = 0;
  async read() {
    return [...this.entries];
  }
  async write(entries: readonly CostEntry[]) {
    this.entries = entries;
  }
  async reset() {
    this.entries = [];
    this.resetAt = Date.now();
  }
  async lastReset() {
    return this.resetAt;
  }
}

export interface Asked {
  readonly deadlineMs?: number | null;
  /** Schedules, the richest first. */
  readonly ladder: readonly string[];

  readonly prefer?: Terms["prefer"];
  readonly priority?: number;
  readonly pictures?: number;
  readonly ticket?: string;
}

export interface Simulation {
  /** Of the first device. */
  readonly runtime: TimedRuntime;
  /** Of each device. */
  readonly runtimes: readonly TimedRuntime[];
  readonly service: Service;
  /** Asks for pictures. Resolves with the schedule and times, rejects as the service does. */
  ask(asked: Asked): Promise<{ blocks: string; reason: string | null; predictedMs: number | null; actualMs: number }>;
}

const condition = conditionOf(1, true);
const programs = new Map<string, Program>();
const size = "4x4";

/** A program for each schedule: what is drawn does not matter here, and rows may not share results. */
function rowOf(blocks: string): Program {
  const known = programs.get(blocks);
  if (known) return known;
  const program = programOf({ blocks, side: 2, seed: 0, guidanceScale: 4 }, condition);
  programs.set(blocks, program);
  return program;
}

/** The table of a device that is so many times as fast. */
function faster(entries: readonly CostEntry[], speed: number): CostEntry[] {
  return entries.map((entry) => {
    const { milliseconds, low, high } = entry;
    return { ...entry, milliseconds: milliseconds / speed, low: low / speed, high: high / speed };
  });
}

/**
 * @param entries the table that the service begins with, of a device of speed 1
 * @param noise standard deviation of the logarithm of a launch's time
 * @param speeds how fast each of several devices is; default: one, of speed 1
 */
export function simulate(
  entries: readonly CostEntry[],
  options: Partial<ServiceOptions> & { noise?: number; seed?: number; speeds?: readonly number[] } = {},
): Simulation {
  const { noise = 0.05, seed = 1, speeds = [1], ...rest } = options;
  const random = new Random(seed);
  const runtimes = speeds.map(
    (speed) =>
      new TimedRuntime((graph, batch) => (milliseconds[graph]!(batch) / speed) * Math.exp(noise * random.normal())),
  );
  const runtime = runtimes[0]!;
  const stored = () => ({ store: new MemoryStore() as unknown as CostStore, about: {} });
  const others = runtimes.slice(1).map((runtime, index) => {
    return { runtime, known: faster(entries, speeds[index + 1]!), ...stored() };
  });
  const settings: ServiceOptions = {
    ...{
      batches: batchesUpTo(8),
      maxWaitMs: 20,
      maxQueue: 64,
      background: false,
      captured: false,
      watchdogMs: 1e9,
      graph: shapesOf,
    },
    ...stored(),
    random: () => random.even(),
    ...(speeds.length > 1 && { devices: speeds.map((speed, number) => ({ number, name: `speed ${speed}` })) }),
    ...rest,
  };
  const service = new Service(runtime, speeds[0] === 1 ? entries : faster(entries, speeds[0]!), settings, others);
  const ask = async ({
    ladder,
    deadlineMs = null,
    prefer = "admission",
    priority = 0,
    pictures = 1,
    ticket,
  }: Asked) => {
    const arrival = performance.now();
    const terms: Terms = { arrival, deadlineMs, prefer, priority, ticket, pictures, size, pin: null };
    const candidates = ladder.map(
      (text): CandidateWork => ({ text, demands: [{ program: rowOf(text), rows: pictures }] }),
    );
    const admitted = await service.admit(terms, candidates);
    const blocks = ladder[admitted.candidate]!;
    const rows = Array.from({ length: pictures }, () => rowOf(blocks));
    await admitted.complete(admitted.run({ rows }));
    const { reason, predictedMs } = admitted;
    return { blocks, reason, predictedMs, actualMs: performance.now() - arrival };
  };
  return { runtime, runtimes, service, ask };
}

export interface Outcome {
  readonly arrivals: number;
  readonly accepted: readonly { blocks: string; actualMs: number; predictedMs: number | null }[];
  readonly refused: readonly (DeadlineError | QueueFullError)[];
  readonly late: number;
  /** Pictures a second, from the first arrival to the last ending. */
  readonly perSecond: number;
}

/** Poisson arrivals for some virtual seconds. */
export async function arrivals(
  { ask }: Simulation,
  { perSecond, seconds, seed = 7 }: { perSecond: number; seconds: number; seed?: number },
  asked: Asked,
): Promise<Outcome> {
  const random = new Random(seed);
  const accepted: { blocks: string; actualMs: number; predictedMs: number | null }[] = [];
  const refused: (DeadlineError | QueueFullError)[] = [];
  const calls: Promise<unknown>[] = [];
  const start = performance.now();
  const open = async () => {
    for (;;) {
      await sleep((1000 * random.exponential()) / perSecond);
      if (performance.now() - start > 1000 * seconds) break;
      calls.push(
        ask(asked).then(
          (result) => accepted.push(result),
          (error) => refused.push(error),
        ),
      );
    }
    await Promise.all(calls);
  };
  await elapse(open());
  const { deadlineMs } = asked;
  return {
    arrivals: calls.length,
    ...{ accepted, refused },
    late: accepted.filter(({ actualMs }) => deadlineMs != null && actualMs > deadlineMs).length,
    perSecond: (1000 * accepted.length) / (performance.now() - start),
  };
}

/** Pictures a second of callers that each ask again at once. */
export async function capacityOf(simulation: Simulation, asked: Asked, count = 400, callers = 24): Promise<number> {
  const start = performance.now();
  let left = count;
  const caller = async () => {
    while (left-- > 0) await simulation.ask(asked);
  };
  await elapse(Promise.all(Array.from({ length: callers }, caller)));
  return (1000 * count) / (performance.now() - start);
}
