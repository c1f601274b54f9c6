/**
 * A model of a fleet: an `ImageModel` whose calls are drawn by whichever worker has it. It promises what a model of this process does: time limits,
 * priorities, events, cancellation.
 */

import { randomUUID } from "node:crypto";
import type { EventEmitter } from "node:events";
import * as z from "zod";
import { tensorJson } from "../codecs.js";
import { untilAborted } from "../common/abort.js";
import { Calls } from "../common/calls.js";
import { type Seed, seedOf, seedsFrom } from "../common/seed.js";
import { currentTraceparent } from "../common/tracing.js";
import { DeadlineError, DisposedError, DrainingError, OptionError, QueueFullError, TimeoutError } from "../errors.js";
import { RequestEvents } from "../generation/events.js";
import { generateStream } from "../generation/stream.js";
import { traced } from "../generation/traces.js";
import { type Json, requestToJson } from "../json.js";
import type {
  AcceptEvent,
  AdapterNames,
  Costs,
  DeadlineResult,
  EncodeOptions,
  GenerateOptions,
  GenerateResult,
  GenerateStream,
  ImageModel,
  PromptEmbeds,
} from "../model.js";
import { checkOptions, embedsSchema, encodeSchema, generateSchema } from "../options.js";
import type { CostEntry } from "../serving/costs.js";
import { type Health, HealthMonitor, type ModelEvents } from "../serving/health.js";
import { type Ending, type Stats, StatsRecorder } from "../serving/stats.js";
import { FleetAdmission, type JobView, type Verdict } from "./admission.js";
import type { Price } from "./classes.js";
import type { Fleet } from "./fleet.js";
import { factsOf, followedAs, hashOf, type JobData, jobFormat, kindOf, namesItsNoise, withSeed } from "./job.js";
import type { Message } from "./messages.js";
import { epochOf, queuePriority, sinceEpoch } from "./order.js";
import { aboutResult, unpackResult } from "./packed.js";
import type { LiveWorker, ModelRecord } from "./registry.js";
import { JobCancelled, Waiter } from "./waiter.js";

type JsonObject = { readonly [key: string]: Json };

type Checked = z.output<typeof generateSchema>;

/** What is known of the fleet may be so old when a request is admitted, in milliseconds. */
const viewMs = 50;
const longestWaitMs = 3_600_000;
/** A job that came so many milliseconds ago is in the queue, if it ever will be. So many at most are looked for at a time. */
const settledMs = 5000;
const mostCompared = 256;
/** While no worker has been seen yet. */
const usualSize = { width: 1024, height: 1024 };

/** What runs for a request on its way through the fleet. */
interface Call {
  readonly op: JobData["op"];
  readonly request: JsonObject;
  /** Moment of the call, by `performance.now()`. */
  readonly start: number;
  readonly level: number;
  readonly deadlineMs: number | null;
  readonly ticket: string | undefined;
  readonly pictures: number;
  readonly size: string;
  readonly seeds: readonly Seed[];
  /** Whether the caller may ask for the same again. */
  readonly repeatable: boolean;
  readonly signal: AbortSignal | undefined;
  readonly events: RequestEvents | null;
}

/** The result of a call as it is kept, and when it was predicted to come. */
interface Answered {
  readonly bytes: Buffer;
  /** From the call; null if that was not known. */
  readonly predictedMs: number | null;
}

/** A model of a fleet. Make one with `connectFleet`. */
export class FleetModel implements ImageModel {
  /** Id of the model in the fleet. */
  readonly id: string;
  /** The fleet that it is of: its other models, and who is in it. */
  readonly fleet: Fleet;
  readonly #stats = new StatsRecorder();
  readonly #monitor = new HealthMonitor();
  readonly #admission: FleetAdmission;
  readonly #prices = new WeakMap<ModelRecord, ReadonlyMap<string, Price>>();
  readonly #calls = new Calls();
  readonly #running = { requests: 0, pictures: 0 };
  #ledger: readonly JobView[] = [];
  /** Entries of the ledger whose jobs were not there when they were looked for last. */
  #absent: ReadonlySet<string> = new Set();
  #seenAt = Number.NEGATIVE_INFINITY;
  #seeing: Promise<void> | null = null;
  #epoch: number | null = null;
  #known: LiveWorker | null = null;
  #drained: Promise<void> | null = null;
  #disposed: Promise<void> | null = null;
  /** Whether closing this model closes the fleet. */
  #ownsFleet = false;

  constructor(fleet: Fleet, id: string) {
    this.fleet = fleet;
    this.id = id;
    this.#admission = new FleetAdmission({ maxQueue: () => this.#maxQueue });
  }

  /** For `connectFleet`, which gives a model alone. */
  own(): this {
    this.#ownsFleet = true;
    return this;
  }

  get name(): string {
    return this.#about?.name ?? this.id;
  }

  get nativeSize(): { readonly width: number; readonly height: number } {
    return this.#about?.nativeSize ?? usualSize;
  }

  get hasRefiner(): boolean {
    return this.#about?.hasRefiner ?? false;
  }

  get adapters(): AdapterNames | undefined {
    return this.#about?.adapters ?? undefined;
  }

  /** Those of the workers, the cheapest of each launch. They are the workers' own: nothing here resets them. */
  get costs(): Costs {
    const entries = new Map<string, CostEntry>();
    for (const worker of this.fleet.workersOf(this.id))
      for (const entry of (worker.record?.models[this.id]?.costs ?? []) as unknown as CostEntry[]) {
        const key = `${entry.graph}@${entry.size}x${entry.batch}`;
        const known = entries.get(key);
        if (!known || entry.milliseconds < known.milliseconds) entries.set(key, entry);
      }
    const drifts = this.fleet.workersOf(this.id).flatMap(({ record }) => record?.models[this.id]?.drift ?? []);
    return {
      entries: [...entries.values()],
      folder: "",
      drift: drifts.length === 0 ? 1 : drifts.reduce((a, b) => a + b, 0) / drifts.length,
      estimate: (graph, size, batch) => entries.get(`${graph}@${size}x${batch}`)?.milliseconds ?? null,
      reset: () =>
        Promise.reject(new OptionError("reset", "The costs of a fleet are its workers' own: reset them there.")),
    };
  }

  /**
   * Draws `count` pictures for each prompt, as `ImageModel.generate`, on a worker of the fleet.
   * @throws as `ImageModel.generate`; besides FleetEmptyError at once if no worker has the model, RedisError at once while Redis cannot be reached,
   *   PoisonousJobError if two workers ended while they drew it
   */
  async generate(options: GenerateOptions): Promise<GenerateResult> {
    return traced({ model: this.name, runtime: "fleet" }, options, () => this.#generate(options));
  }

  /** As `generate`, to be iterated over: see `ImageModel.generateStream`. */
  generateStream(options: GenerateOptions): GenerateStream {
    return generateStream((each) => this.generate(each), options);
  }

  /** What the text encoders make of prompts: see `ImageModel.encode`. @throws as `generate` */
  async encode(options: EncodeOptions): Promise<PromptEmbeds> {
    const start = performance.now();
    this.#checkOpen();
    const { signal, ...rest } = checkOptions(encodeSchema, options, "encode()");
    signal?.throwIfAborted();
    const request = JSON.parse(JSON.stringify(rest)) as JsonObject;
    const pictures = Array.isArray(rest.prompt) ? rest.prompt.length : 1;
    const call: Call = {
      ...{ op: "encode", request, start, level: 0, deadlineMs: null, ticket: undefined },
      ...{ pictures, size: "text", seeds: [], repeatable: true, signal, events: null },
    };
    const { bytes } = await untilAborted(
      this.#calls.track(() => this.#serve(call)),
      signal,
    );
    return z.decode(embedsJson, JSON.parse(bytes.toString("utf8"))) as PromptEmbeds;
  }

  /** Counters and histograms of the calls that were made here. Launches are the workers' to count. */
  stats(): Stats {
    return this.#stats.snapshot({
      queue: { waiting: this.waiting, limit: this.#maxQueue },
      running: { ...this.#running },
      runtime: this.#monitor.counters,
    });
  }

  /** Whether calls are answered: Redis is there, and a worker has the model. */
  health(): Health {
    const { redis } = this.fleet;
    const health = this.#monitor.report(null, this.#disposed ? "disposed" : this.#drained ? "draining" : null);
    const reasons = [...health.reasons];
    if (!redis.isReady) reasons.push("Redis cannot be reached.");
    else if (!this.fleet.workersOf(this.id).some(({ beat }) => beat.state === "ready"))
      reasons.push("No worker of the fleet has this model.");
    return { ...health, ready: reasons.length === 0, degraded: reasons.length > 0, reasons };
  }

  /** Listens as `ImageModel.on`. What befalls a worker's runtime is told by that worker; nothing is told here. */
  on<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this {
    (this.#monitor.events as EventEmitter).on(name, listener);
    return this;
  }

  /** Undoes one `on` with the same name and listener. */
  off<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this {
    (this.#monitor.events as EventEmitter).off(name, listener);
    return this;
  }

  /** Takes no new calls: see `ImageModel.drain`. The fleet goes on. */
  drain(): Promise<void> {
    this.#drained ??= this.#calls.idle();
    return this.#drained;
  }

  /** Waits for the calls that were made here, and leaves the fleet, which goes on. Safe to call twice. */
  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      await this.drain();
      if (this.#ownsFleet) await this.fleet.close();
    })();
    return this.#disposed;
  }

  /** As `dispose`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  /** Requests that wait for a worker, of all gateways, as it was seen last. */
  get waiting(): number {
    return this.#ledger.length;
  }

  /** Seconds until everything that was accepted is done, over all workers, as it was seen last: what workers are added by. */
  backlogSeconds(): number {
    return this.#admission.backlogSeconds(this.fleet.redis.now());
  }

  /** Reads the workers and what waits, unless that was done just before. @throws what Redis says */
  async look(ageMs = viewMs): Promise<void> {
    if (performance.now() - this.#seenAt <= ageMs) return;
    this.#seeing ??= this.#see().finally(() => {
      this.#seeing = null;
    });
    await this.#seeing;
  }

  /**
   * Removes entries of the ledger whose jobs are nowhere: their gateway ended before it had added them, or Redis has lost them. They are looked for twice,
   * since a job is added just after its entry.
   */
  async compareLedger(): Promise<void> {
    const { redis } = this.fleet;
    const queue = redis.queue(this.id);
    const ledger = redis.ledger(queue.name);
    const entries = await redis.client.hgetall(ledger);
    const settled = redis.now() - settledMs;
    const old = Object.keys(entries).filter((id) => {
      const facts = factsOf({ facts: jsonOf(entries[id]!) });
      return !facts || facts.arrival < settled;
    });
    // Where there are many, others of them each time, beside those that were absent.
    const from = Math.floor(Math.random() * old.length);
    const some = [...old.slice(from), ...old.slice(0, from)].slice(0, mostCompared);
    const asked = [...new Set([...old.filter((id) => this.#absent.has(id)), ...some])];
    if (asked.length === 0) {
      this.#absent = new Set();
      return;
    }
    const found = await redis.together<number[]>((commands) => {
      for (const id of asked) commands.exists(queue.toKey(id));
      return commands;
    });
    const absent = asked.filter((_, index) => found[index] === 0);
    const gone = absent.filter((id) => this.#absent.has(id));
    if (gone.length > 0) await redis.client.hdel(ledger, ...gone);
    this.#absent = new Set(absent);
  }

  get #maxQueue(): number {
    return this.fleet.options.maxQueue ?? 64 * Math.max(1, this.fleet.workersOf(this.id).length);
  }

  get #about() {
    const worker = this.fleet.workersOf(this.id).find(({ record }) => record?.models[this.id]) ?? this.#known;
    this.#known = worker;
    return worker?.record?.models[this.id] ?? null;
  }

  /** @throws DisposedError or DrainingError where no calls are taken any more */
  #checkOpen(): void {
    if (this.#disposed) throw new DisposedError("This model");
    if (this.#drained) throw new DrainingError("This model");
  }

  async #generate(options: GenerateOptions): Promise<GenerateResult> {
    const start = performance.now();
    this.#checkOpen();
    const checked = checkOptions(generateSchema, options, "generate()");
    checked.signal?.throwIfAborted();
    const events = new RequestEvents(checked);
    const { timeoutMs } = checked;
    const timer =
      timeoutMs === undefined ? undefined : setTimeout(() => events.abort(new TimeoutError(timeoutMs)), timeoutMs);
    try {
      return await events.around(this.#calls.track(() => this.#draw(checked, options, start, events)));
    } finally {
      clearTimeout(timer);
    }
  }

  async #draw(
    checked: Checked,
    options: GenerateOptions,
    start: number,
    events: RequestEvents,
  ): Promise<GenerateResult> {
    const allowPaths = this.fleet.options.allowPaths && checked.allowPaths;
    const given = (await requestToJson({ ...options, allowPaths })) as JsonObject;
    const request = withSeed(given);
    const prompts = Array.isArray(checked.prompt)
      ? checked.prompt.length
      : (checked.promptEmbeds?.promptEmbeds.shape[0] ?? 1);
    const pictures = prompts * checked.count;
    const last = checked.stages?.at(-1);
    const { width = last?.width ?? this.nativeSize.width, height = last?.height ?? this.nativeSize.height } = checked;
    const { seed, seeds } = request as { seed?: string | number; seeds?: (string | number)[] };
    const call: Call = {
      ...{ op: "draw", request, start, level: checked.priority, ticket: checked.ticket, pictures, events },
      repeatable: namesItsNoise(given),
      deadlineMs: checked.deadlineMs ?? null,
      ...{ size: `${width}x${height}`, signal: events.signal },
      seeds: seeds ? seeds.map(seedOf) : seed === undefined ? [] : seedsFrom(seed, pictures),
    };
    const { bytes, predictedMs } = await this.#serve(call);
    const result = unpackResult(bytes);
    const totalMs = performance.now() - start;
    const waitedMs = Math.max(0, totalMs - result.timings.total);
    return {
      ...result,
      timings: { ...result.timings, queue: result.timings.queue + waitedMs, total: totalMs },
      ...(call.deadlineMs !== null && { deadline: deadlineOf(result, call.deadlineMs, predictedMs, totalMs) }),
    };
  }

  /** A call from its admission to its result. */
  async #serve(call: Call): Promise<Answered> {
    const { op, request, signal } = call;
    this.fleet.checkReady();
    const hash = hashOf(this.id, op, request);
    // On the way at the same time: it is needed where there is no result.
    this.look().catch(() => {});
    const stored = call.repeatable
      ? await untilAborted(this.fleet.redis.answer(this.fleet.results.get(hash)), signal)
      : null;
    if (stored) {
      this.#repeat(call, stored);
      return { bytes: stored, predictedMs: 0 };
    }
    return this.#ask(call, hash);
  }

  /** The same was asked for before, and its result is there. */
  #repeat({ start, events, seeds }: Call, stored: Buffer): void {
    this.#stats.requests.accepted++;
    this.#stats.ended("completed", performance.now() - start, false);
    const blocks = events ? aboutResult(stored).blocks : "";
    events?.send("onAccept", { predictedMs: 0, place: 0, blocks, seeds, aloneMs: 0, leastMs: 0 });
    events?.send("onStart", { queuedMs: performance.now() - start, blocks });
  }

  async #ask(call: Call, hash: string): Promise<Answered> {
    const { op, request, start, signal, deadlineMs, pictures, level, size } = call;
    const kind = kindOf(op, request, pictures);
    const { redis } = this.fleet;
    await untilAborted(redis.answer(this.look()), signal);
    const now = redis.now();
    const arrival = now - (performance.now() - start);
    const id = randomUUID();
    const verdict = this.#admit({ id, kind, pictures, level, arrival, deadlineMs, ticket: call.ticket }, now);
    // What a worker takes is only promised where it is known.
    const promised = deadlineMs !== null && verdict.predictedMs !== null;
    const due = promised ? arrival + deadlineMs : null;
    const data: JobData = {
      ...{ format: jobFormat, op, request, hash, promised },
      ...{ repeatable: call.repeatable, traceparent: currentTraceparent() },
      facts: { kind, size, pictures, level, arrival, due },
    };
    const limit = deadlineMs === null ? null : arrival + deadlineMs;
    const priority = queuePriority(level, arrival, limit);
    this.#stats.requests.accepted++;
    let ending: Ending = "failed";
    let hasStarted = false;
    let isDisturbed = false;
    const follow = this.#follower(call, verdict, () => {
      if (hasStarted) return;
      hasStarted = true;
      this.#running.requests++;
      this.#running.pictures += pictures;
      this.#stats.queued.add(performance.now() - start);
    });
    let waiter: Waiter | null = null;
    try {
      await this.#beginEpoch(arrival);
      const job = { model: this.id, data, priority, sameAs: followedAs(hash, request) };
      let bytes: Buffer | null = null;
      for (let jobId = id; !bytes; jobId = randomUUID()) {
        const adding = Waiter.add(this.fleet, { ...job, id: jobId }, follow.message);
        // Its entry in the ledger is on its way: what is read later on this connection shows it, or who has taken it.
        this.#admission.queued(id, redis.now() + 1);
        waiter = await redis.answer(adding).catch((error) => {
          // Redis may take it after all.
          adding.then(
            (late) => late.leave(),
            () => {},
          );
          throw error;
        });
        follow.added();
        bytes = await untilAborted(waiter.outcome, signal).catch((error) => {
          // Its other callers left, and it was stopped before this one was known: it is put there again.
          if (error instanceof JobCancelled) return null;
          throw error;
        });
      }
      // It may have been over before this call heard of it.
      if (op === "draw") {
        const about = aboutResult(bytes);
        isDisturbed = about.isDisturbed;
        follow.begin(about.blocks);
      }
      ending = "completed";
      return { bytes, predictedMs: verdict.predictedMs };
    } catch (error) {
      if (signal?.aborted && error === signal.reason) ending = error instanceof TimeoutError ? "timedOut" : "aborted";
      else if (!(error instanceof OptionError)) this.#monitor.failed(error);
      throw error;
    } finally {
      if (hasStarted) {
        this.#running.requests--;
        this.#running.pictures -= pictures;
      }
      const totalMs = performance.now() - start;
      const late = promised && totalMs > deadlineMs!;
      // A slow first launch says nothing of those that follow.
      this.#admission.ended(
        id,
        { late: promised && !isDisturbed && ending === "completed" ? late : null },
        redis.now(),
      );
      this.#stats.ended(ending, totalMs, late);
      await waiter?.leave();
    }
  }

  /** @throws DeadlineError, QueueFullError, FleetEmptyError */
  #admit(request: Parameters<FleetAdmission["admit"]>[0], now: number): Verdict {
    try {
      return this.#admission.admit(request, now);
    } catch (error) {
      const { refused } = this.#stats.requests;
      if (error instanceof DeadlineError) refused[error.retryAfterMs === null ? "impossible" : "deadline"]++;
      else if (error instanceof QueueFullError) refused.queueFull++;
      throw error;
    }
  }

  /** What becomes of a worker's messages. Steps that are drawn a second time, since their worker is gone, are told once. */
  #follower({ start, events, seeds }: Call, verdict: Verdict, onStart: () => void) {
    let isAccepted = false;
    let isStarted = false;
    let told = -1;
    const accept = (event: Omit<AcceptEvent, "seeds">) => {
      if (isAccepted) return;
      isAccepted = true;
      events?.send("onAccept", { ...event, seeds });
    };
    const begin = (blocks: string) => {
      accept({ predictedMs: null, place: 0, blocks, aloneMs: null, leastMs: null });
      onStart();
      if (isStarted) return;
      isStarted = true;
      events?.send("onStart", { queuedMs: performance.now() - start, blocks });
    };
    return {
      begin,
      /** A kind that a worker has drawn is accepted at once; of another a worker has to say whether it can be drawn. */
      added: () => {
        const { predictedMs, place, price } = verdict;
        if (price) accept({ predictedMs, place, blocks: price.blocks, aloneMs: price.ms, leastMs: price.leastMs });
      },
      message: (message: Message) => {
        if (message.type === "accept") {
          const { predictedMs, place, blocks, aloneMs, leastMs } = message;
          const sinceMs = performance.now() - start;
          accept({ predictedMs: predictedMs === null ? null : predictedMs + sinceMs, place, blocks, aloneMs, leastMs });
        } else if (message.type === "start") begin(message.blocks);
        else if (message.type === "steps") {
          // Of a job that had begun before this call.
          begin(verdict.price?.blocks ?? "");
          for (const step of message.steps) {
            if (step.step <= told) continue;
            told = step.step;
            events?.send("onStep", step as Parameters<NonNullable<GenerateOptions["onStep"]>>[0]);
          }
        }
      },
    };
  }

  async #see(): Promise<void> {
    const { fleet } = this;
    const { redis } = fleet;
    // Of before it is read: what had been written by then is in it.
    const at = redis.now();
    const ledger = await fleet.view.readWith(redis.ledger(redis.queue(this.id).name));
    // What waits seldom changes: each is read once.
    const known = new Map(this.#ledger.map((job) => [job.id, job]));
    this.#ledger = Object.entries(ledger).flatMap(([id, text]) => {
      const facts = known.get(id) ?? factsOf({ facts: jsonOf(text) });
      return facts ? [{ ...facts, id }] : [];
    });
    // Devices of one worker draw beside each other.
    const workers = fleet.workersOf(this.id).flatMap(({ beat, record }) => {
      const { backlogMs, room, devices } = beat.models[this.id]!;
      const takes = beat.state === "ready" && beat.format >= jobFormat;
      const prices = this.#pricesOf(record?.models[this.id]);
      const device = { takes, backlogMs, room: Math.ceil(room / devices), at: beat.at, prices };
      return Array.from({ length: devices }, () => device);
    });
    this.#admission.see({ at, workers, jobs: this.#ledger });
    this.#seenAt = performance.now();
  }

  /** The same map for the same record. */
  #pricesOf(record: ModelRecord | undefined): ReadonlyMap<string, Price> {
    if (!record) return noPrices;
    const known = this.#prices.get(record) ?? new Map(Object.entries(record.prices));
    this.#prices.set(record, known);
    return known;
  }

  /** Numbers of BullMQ's priorities begin again with each epoch: those who wait from before go first. Their numbers are the highest. */
  async #beginEpoch(arrival: number): Promise<void> {
    const epoch = epochOf(arrival);
    if (this.#epoch === epoch) return;
    const hasChanged = this.#epoch !== null;
    this.#epoch = epoch;
    // A process that has just begun: nobody waits for longer than that.
    if (!hasChanged && sinceEpoch(arrival) > longestWaitMs) return;
    const queue = this.fleet.redis.queue(this.id);
    for (let moved = 1; moved > 0; ) {
      moved = 0;
      for (const job of await queue.getJobs(["prioritized"], 0, 49, false)) {
        const facts = factsOf(job?.data);
        if (!facts || job.priority === 1 || epochOf(facts.arrival) >= epoch) continue;
        // One that is gone need not be moved.
        await job.changePriority({ priority: 1 }).then(
          () => moved++,
          () => {},
        );
      }
    }
  }
}

/**
 * How a limit was kept, counted from the call here.
 * @param predictedMs what the gateway predicted; a worker that drew with a limit knows better
 */
function deadlineOf(
  { deadline, blocks }: GenerateResult,
  deadlineMs: number,
  predictedMs: number | null,
  actualMs: number,
): DeadlineResult {
  if (deadline) {
    const waitedMs = deadlineMs - deadline.deadlineMs;
    return { ...deadline, deadlineMs, predictedMs: deadline.predictedMs + waitedMs, actualMs };
  }
  const reason = `${blocks}, the shortest there is, since its turn came later than predicted.`;
  return { deadlineMs, blocks, reason, predictedMs: predictedMs ?? actualMs, actualMs };
}

const noPrices: ReadonlyMap<string, Price> = new Map();

function jsonOf(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const embedsJson = embedsSchema(tensorJson);
