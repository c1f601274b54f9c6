/**
 * A worker: models of this process that draw the jobs of a fleet. It fetches a job when it has room for one, whoever asked for it, so that jobs of
 * different callers share launches; the more it has to do, the longer it leaves a job to others.
 */

import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import type { Job, Worker } from "bullmq";
import * as z from "zod";
import { tensorJson } from "../codecs.js";
import { seedToJson } from "../common/seed.js";
import { messageOf } from "../common/text.js";
import { withTraceparent } from "../common/tracing.js";
import {
  DeadlineError,
  DeviceLostError,
  DisposedError,
  DrainingError,
  errorTable,
  FleetFormatError,
  FlowTurboError,
  PoisonousJobError,
  QueueFullError,
} from "../errors.js";
import { requestFromJson } from "../json.js";
import type { AcceptEvent, EncodeOptions, GenerateOptions, ImageModel, RuntimeChoice, StepEvent } from "../model.js";
import { checkOptions, embedsSchema, encodeSchema } from "../options.js";
import { deadlineMargin } from "../serving/deadline.js";
import { knownSizes, usefulBatch } from "./capacity.js";
import type { Price } from "./classes.js";
import { failureToJson } from "./failure.js";
import { factsOf, formatOf, type JobData, type JobFacts, jobFormat, readJob } from "./job.js";
import { encodeMessage, type Message, stepMessage } from "./messages.js";
import { type FleetWorkerOptions, workerSchema } from "./options.js";
import { packResult } from "./packed.js";
import { FleetRedis, type StallTimes } from "./redis.js";
import { Announcer, FleetView, goneMs, type ModelBeat, type ModelRecord } from "./registry.js";
import { openResults, type ResultStore } from "./results.js";

/** A job that a worker cannot draw warm is left to those who can so often, each time for so many milliseconds. */
const mostHandedBack = 3;
const handedBackMs = 100;
/** At the end of a worker handing back may take so long, in milliseconds. */
const handBackMs = 5000;
/** Kinds of requests whose price is kept, and sizes that count as drawn lately. */
const mostPrices = 256;
const mostWarm = 16;
/** A price that has changed by less than this part is the same: predictions leave more than that free. */
const news = 0.1;
/** A busy worker asks for another job after this part of what a request takes, within bounds in milliseconds. */
const asking = { part: 1 / 16, least: 10, most: 250 } as const;
/** A job that ends within so many milliseconds makes room for the next, so that launches stay full. */
const aheadMs = 100;
/** A worker that cannot draw looks again after so many milliseconds. */
const unreadyMs = 500;
/** BullMQ shows progress to people: no more often than this, in milliseconds. */
const progressMs = 1000;
const sweepMs = 60_000;
/** Costs are looked at so often, in milliseconds. */
const costsMs = 1000;
const lookAgainMs = 100;
/** Whoever lives says so each second: silence of less than this says nothing, in milliseconds. */
const leastSilenceMs = 2200;
/** What is known of a job beside BullMQ is forgotten after so long, in milliseconds: nobody waits that long. */
const factsMs = 3_600_000;

/** Why a job's work is stopped here. */
class Left extends Error {
  constructor(readonly why: "cancelled" | "handed back") {
    super(`The job was ${why}.`);
  }
}

/** A job at work. */
interface Active {
  readonly id: string;
  /** Another one, with another token, where it came back here after its lock was lost. */
  job: Job;
  token: string;
  readonly facts: JobFacts;
  readonly controller: AbortController;
  aloneMs: number | null;
  /** Part of it that is done. */
  done: number;
  hasStarted: boolean;
  /** Whether it was looked at, and is to be drawn. */
  isAtWork: boolean;
  /** Whether its size had not been drawn by this process before, and whether the first launch of a size was in its way: its own, or of one beside it. */
  isCold: boolean;
  isDisturbed: boolean;
  /** Whether it is drawn, or has failed, and only its end has to be written. */
  isOver: boolean;
}

/** A model that is served. */
interface Served {
  readonly id: string;
  readonly model: ImageModel;
  readonly fetcher: Worker;
  readonly active: Map<string, Active>;
  readonly prices: Map<string, Price>;
  /** What follows from its table of costs, and when it did: the table is put into order each time that it is asked for. */
  known: { readonly at: number; readonly devices: number; readonly full: number; readonly sizes: readonly string[] };
  /** Sizes that it has drawn, the latest last. */
  readonly drawnSizes: Set<string>;
  drawn: number;
  failed: number;
  /** Wakes the loop that fetches. */
  wake: () => void;
  loop: Promise<void>;
}

/** A worker of a fleet. */
export class FleetWorker implements AsyncDisposable {
  /** Its name in the fleet, another one at each start. */
  readonly id: string;
  readonly #redis: FleetRedis;
  readonly #results: ResultStore;
  readonly #announcer: Announcer;
  readonly #view: FleetView;
  readonly #served: Served[] = [];
  readonly #options: z.output<typeof workerSchema>;
  readonly #timers: NodeJS.Timeout[] = [];
  #stopListening: () => void = () => {};
  #isStopping = false;
  #ending: Promise<void> | null = null;

  static async start(given: FleetWorkerOptions): Promise<FleetWorker> {
    const options = checkOptions(workerSchema, given, "startWorker()");
    const { redis: url, prefix, results, keepResultsMs, logger } = options;
    const redis = await FleetRedis.connect({ redis: url, prefix, name: "flowturbo-worker", logger });
    try {
      const store = await openResults(redis, results, keepResultsMs);
      const worker = new FleetWorker(redis, store, options);
      await worker.#start();
      return worker;
    } catch (error) {
      await redis.close();
      throw error;
    }
  }

  private constructor(redis: FleetRedis, results: ResultStore, options: z.output<typeof workerSchema>) {
    this.#redis = redis;
    this.#results = results;
    this.#options = options;
    this.#view = new FleetView(redis);
    this.#announcer = new Announcer(
      redis,
      () => ({ models: Object.fromEntries(this.#served.map((each) => [each.id, this.#recordOf(each)])) }),
      () => ({
        state: this.#isStopping ? "draining" : "ready",
        models: Object.fromEntries(this.#served.map((each) => [each.id, this.#beatOf(each)])),
      }),
    );
    this.id = this.#announcer.id;
  }

  /** Whether Redis can be reached, and jobs are fetched. */
  get isAtWork(): boolean {
    return this.#redis.isReady && !this.#isStopping;
  }

  /** Jobs that it works on. */
  get jobs(): number {
    return this.#served.reduce((sum, { active }) => sum + active.size, 0);
  }

  /**
   * Fetches no more jobs, and hands back those that have not begun: others draw them. Resolves when those that have begun are done; then `close` it.
   * Every call gives the same promise.
   */
  async drain(): Promise<void> {
    this.#isStopping = true;
    this.#announcer.changed();
    for (const served of this.#served) {
      served.wake();
      for (const active of served.active.values()) if (!active.hasStarted) this.#stop(active, "handed back");
    }
    await this.#idle();
  }

  /**
   * Leaves the fleet: as `drain`, but what is not done after `drainMs` is handed back too, and begins again elsewhere.
   * @param drainMs default: no limit
   */
  async close({ drainMs = Number.POSITIVE_INFINITY }: { drainMs?: number } = {}): Promise<void> {
    this.#ending ??= this.#close(drainMs);
    return this.#ending;
  }

  /** As `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #start(): Promise<void> {
    const { models, lockMs } = this.#options;
    const times: StallTimes = { lockMs, checkMs: Math.max(500, Math.round(lockMs / 3)) };
    for (const [id, model] of Object.entries(models)) {
      this.#served.push({
        ...{ id, model, fetcher: this.#redis.fetcher(id, times) },
        ...{ active: new Map(), prices: new Map(), drawnSizes: new Set<string>(), drawn: 0, failed: 0 },
        ...{
          wake: () => {},
          loop: Promise.resolve(),
          known: { at: Number.NEGATIVE_INFINITY, devices: 1, full: 1, sizes: [] },
        },
      });
    }
    this.#stopListening = await this.#redis.listen(this.#redis.key("cancel"), (jobId) => {
      for (const { active } of this.#served) {
        const found = active.get(jobId);
        if (found) this.#stop(found, "cancelled");
      }
    });
    // What was cancelled while Redis was away.
    this.#redis.client.on("ready", () => void this.#findCancelled().catch(() => {}));
    this.#timers.push(
      setInterval(() => void this.#renewLocks(lockMs).catch(() => {}), Math.round(lockMs / 3)),
      setInterval(() => void this.#results.sweep().catch(() => {}), sweepMs).unref(),
    );
    // Where Redis refuses it now, another one follows within a second.
    await this.#announcer.beat().catch(() => {});
    for (const served of this.#served) {
      // It never rejects.
      void served.fetcher.startStalledCheckTimer();
      served.loop = this.#fetch(served);
    }
  }

  async #close(drainMs: number): Promise<void> {
    const drained = this.drain();
    if (Number.isFinite(drainMs)) {
      const timer = setTimeout(() => {
        for (const { active } of this.#served) for (const each of active.values()) this.#stop(each, "handed back");
      }, drainMs);
      // While Redis is away nothing can be handed back: its jobs are found by their locks.
      const leaving = new AbortController();
      const givenUp = sleep(drainMs + handBackMs, undefined, { signal: leaving.signal }).catch(() => {});
      await Promise.race([drained, givenUp]).finally(() => clearTimeout(timer));
      leaving.abort();
    } else await drained;
    for (const timer of this.#timers) clearInterval(timer);
    this.#stopListening();
    await Promise.all(
      this.#served.map(({ fetcher, loop }) => Promise.all([fetcher.close(true).catch(() => {}), loop])),
    );
    if (this.#redis.isReady) await this.#announcer.leave().catch(() => {});
    await this.#redis.close();
  }

  /** Resolves when no job is at work. */
  async #idle(): Promise<void> {
    while (this.jobs > 0) await sleep(10);
  }

  /** Pictures that it has at a time, at most. */
  #capacityOf(served: Served): number {
    return this.#options.take ?? 2 * knownOf(served).full;
  }

  /**
   * Pictures that it would take now: as many as fill a launch, and those that follow when one is about to end. More would wait here while another worker
   * may be free, and gateways could not say when they are done.
   */
  #roomOf(served: Served): number {
    if (this.#isStopping || !served.model.health().ready) return 0;
    // One that was found without its worker may be the cause: nothing is put beside it.
    for (const { job } of atWork(served)) if (job.stalledCounter > 0) return 0;
    const { take } = this.#options;
    const full = take ?? knownOf(served).full;
    const most = take === undefined && this.#endsInMs(served) <= aheadMs ? 2 * full : full;
    return Math.max(0, most - this.#picturesOf(served));
  }

  /** In how many milliseconds the next of its jobs ends; 0 where that is not known. */
  #endsInMs(served: Served): number {
    let least = Number.POSITIVE_INFINITY;
    for (const { aloneMs, done } of atWork(served)) least = Math.min(least, (aloneMs ?? 0) * (1 - done));
    return least;
  }

  #picturesOf(served: Served): number {
    let pictures = 0;
    for (const { facts } of atWork(served)) pictures += facts.pictures;
    return pictures;
  }

  #beatOf(served: Served): ModelBeat {
    const { drawnSizes } = served;
    const inside = atWork(served);
    let backlogMs = 0;
    // One that is not known takes as long as the longest.
    const dearest = Math.max(0, ...Array.from(served.prices.values(), ({ ms }) => ms));
    for (const { aloneMs, done } of inside) backlogMs += (aloneMs ?? dearest) * (1 - done);
    const pictures = this.#picturesOf(served);
    const room = this.#roomOf(served);
    const known = knownOf(served).sizes.filter((size) => !drawnSizes.has(size));
    const warm = [...[...drawnSizes].reverse(), ...known].slice(0, mostWarm);
    const { drawn, failed } = served;
    const jobs = inside.filter(({ isAtWork }) => isAtWork).length;
    const { devices } = knownOf(served);
    return {
      backlogMs: Math.round(backlogMs / devices),
      devices,
      jobs,
      pictures,
      room,
      warm,
      drawn,
      failed,
    };
  }

  #recordOf(served: Served): ModelRecord {
    const { model, prices } = served;
    const { name, nativeSize, hasRefiner, adapters, costs } = model;
    const { runtime } = model as { runtime?: Partial<RuntimeChoice> };
    return {
      ...{ name, nativeSize, hasRefiner },
      adapters: adapters ? { loras: [...adapters.loras], controlNets: [...adapters.controlNets] } : null,
      runtime: runtime?.name ?? "unknown",
      devices: (runtime?.devices ?? []).map(({ number, name }) => `${number}: ${name}`),
      capacity: this.#capacityOf(served),
      prices: Object.fromEntries(prices),
      costs: costs.entries.map((entry) => ({ ...entry })),
      drift: Math.round(costs.drift * 10) / 10,
    };
  }

  /** Fetches jobs of a model as long as this worker works. Never rejects. */
  async #fetch(served: Served): Promise<void> {
    const { fetcher, active } = served;
    let othersAreBusy = false;
    while (!this.#isStopping) {
      try {
        if (!served.model.health().ready) {
          await this.#rest(served, unreadyMs);
          continue;
        }
        if (this.#roomOf(served) === 0) {
          const { least, most } = asking;
          await this.#rest(served, Math.min(most, Math.max(least, this.#endsInMs(served) - aheadMs)));
          continue;
        }
        // One that is idle is told of a job at once. One at work asks now and then, so that others are quicker, unless all seem to be at work.
        const isBusy = atWork(served).length > 0;
        if (isBusy && !othersAreBusy) await this.#rest(served, this.#askAgainMs(served));
        if (this.#isStopping) break;
        const token = randomUUID();
        const job = await fetcher.getNextJob(token, { block: !isBusy });
        othersAreBusy = job !== undefined && this.#hasWaited(job);
        if (!job) continue;
        const mine = active.get(job.id!);
        if (mine && !mine.isOver) {
          // Its lock ran out while Redis or this process stood still. It is drawn already.
          Object.assign(mine, { job, token });
          continue;
        }
        const leaves = this.#isStopping || (await this.#leavesToOthers(served, job).catch(() => false));
        if (leaves) {
          await this.#handBack(job, token);
          if (!this.#isStopping) await sleep(handedBackMs);
          continue;
        }
        void this.#take(served, job, token);
      } catch (error) {
        if (this.#isStopping) return;
        this.#options.logger?.warn?.(`Fetching a job failed: ${messageOf(error)}.`);
        await sleep(unreadyMs);
      }
    }
  }

  /** Whether a job has waited longer than one does that somebody idle could have taken. */
  #hasWaited(job: Job): boolean {
    const facts = factsOf(job.data);
    return facts !== null && this.#redis.now() - facts.arrival > asking.most;
  }

  /** Until a job ends, or so many milliseconds. */
  async #rest(served: Served, ms: number): Promise<void> {
    if (this.#isStopping) return;
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, ms);
      served.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    served.wake = () => {};
  }

  #askAgainMs(served: Served): number {
    const known = atWork(served).flatMap(({ aloneMs }) => aloneMs ?? []);
    const usual = known.length === 0 ? 0 : known.reduce((a, b) => a + b, 0) / known.length;
    return Math.min(asking.most, Math.max(asking.least, usual * asking.part));
  }

  /** Whether others can draw it without a first launch of its size, and have room. */
  async #leavesToOthers(served: Served, job: Job): Promise<boolean> {
    const format = formatOf(job.data);
    if (format !== null && format > jobFormat) {
      this.#options.logger?.warn?.(
        `${new FleetFormatError(format, jobFormat).message} The job ${job.id} is left to others.`,
      );
      await this.#view.refresh(500);
      return this.#view.workers.some(({ beat }) => beat.state === "ready" && beat.format >= format);
    }
    const size = factsOf(job.data)?.size;
    if (size === undefined || job.attemptsStarted > mostHandedBack) return false;
    if (this.#beatOf(served).warm.includes(size)) return false;
    await this.#view.refresh(500);
    return this.#view.workers.some(({ id, beat }) => {
      const other = beat.models[served.id];
      return (
        id !== this.id && beat.state === "ready" && other !== undefined && other.room > 0 && other.warm.includes(size)
      );
    });
  }

  /** Puts a job back to where it was in the queue. */
  async #handBack(job: Job, token: string): Promise<void> {
    const facts = factsOf(job.data);
    if (facts) await this.#redis.client.hset(this.#redis.ledger(job.queueName), job.id!, JSON.stringify(facts));
    await job.moveToWait(token);
    // Only this wakes a worker that waits.
    await job.changePriority({ priority: job.priority });
  }

  /** A job from when it was fetched until it is over here. Never rejects. */
  async #take(served: Served, job: Job, token: string): Promise<void> {
    const id = job.id!;
    const facts = factsOf(job.data) ?? { kind: "", size: "", pictures: 1, level: 0, arrival: 0, due: null };
    const active: Active = {
      ...{ id, job, token, facts, controller: new AbortController() },
      ...{ aloneMs: served.prices.get(facts.kind)?.ms ?? null, done: 0, hasStarted: false, isAtWork: false },
      ...{ isCold: false, isDisturbed: false, isOver: false },
    };
    served.active.set(id, active);
    try {
      await this.#work(served, active);
    } catch (error) {
      this.#options.logger?.warn?.(`The job ${id} could not be ended: ${messageOf(error)}. It starts again elsewhere.`);
    } finally {
      if (served.active.get(id) === active) served.active.delete(id);
      if (!active.isOver) {
        served.wake();
        this.#announcer.changed();
      }
    }
  }

  async #work(served: Served, active: Active): Promise<void> {
    const { id, job, controller } = active;
    const { client } = this.#redis;
    const [starts, cancelled] = [this.#redis.key("starts", id), this.#redis.key("cancelled", id)];
    const isMine = (ended: Promise<unknown>) =>
      ended.then(
        () => true,
        (error) => this.#lostLock(id, error),
      );
    let isOver: boolean;
    try {
      // It is in the beat before it leaves the ledger: there is no moment at which gateways do not count it.
      const [before, isCancelled] = await this.#redis.together<[readonly string[], number]>((commands) =>
        this.#announcer
          .addBeat(commands.lrange(starts, 0, -1).exists(cancelled).rpush(starts, this.id).pexpire(starts, factsMs))
          .hdel(this.#redis.ledger(job.queueName), id),
      );
      if (isCancelled === 1) this.#stop(active, "cancelled");
      controller.signal.throwIfAborted();
      const format = formatOf(job.data);
      if (format !== null && format > jobFormat) throw new FleetFormatError(format, jobFormat);
      const data = readJob(served.id, job.data);
      await this.#refusePoison(id, before, controller.signal);
      if (!(await this.#results.has(data.hash))) {
        active.isAtWork = true;
        this.#announcer.changed();
        const bytes = await this.#draw(served, active, data);
        await this.#results.put(data.hash, bytes, !data.repeatable);
        served.drawn++;
      }
      this.#tell(id, { type: "done" });
      this.#forget(served, active);
      isOver = await isMine(active.job.moveToCompleted(null, active.token, false));
    } catch (error) {
      if (goesElsewhere(error)) {
        // Its entry may be there twice, where a connection was cut.
        await client.lrem(starts, 0, this.id);
        await this.#handBack(active.job, active.token).catch((lost) => this.#lostLock(id, lost));
        return;
      }
      if (error instanceof Left) this.#tell(id, { type: "cancelled" });
      else {
        // What is refused is no failure.
        if (!(error instanceof FlowTurboError) || errorTable[error.code].status >= 500) served.failed++;
        const failure = failureToJson(error);
        await client.set(this.#redis.key("failure", id), JSON.stringify(failure), "PX", this.#options.keepResultsMs);
        this.#tell(id, { type: "failed", failure: { ...failure } });
      }
      const unrecoverable = new this.#redis.UnrecoverableError(failureToJson(error).publicMessage);
      this.#forget(served, active);
      isOver = await isMine(active.job.moveToFailed(unrecoverable, active.token, false));
    }
    // Others have to know it where the job is not over.
    if (isOver && controller.signal.aborted) await client.del(cancelled);
  }

  /**
   * Just before a job is over: a worker that ends between the two leaves a job that is found done, and no keys that nobody removes. From here on it
   * takes no room, and gateways know that at once.
   */
  #forget(served: Served, active: Active): void {
    const { id } = active;
    active.isOver = true;
    served.wake();
    const keys = [this.#redis.key("starts", id), this.#redis.key("followers", id)];
    this.#redis.together((commands) => this.#announcer.addBeat(commands.del(...keys))).catch(() => {});
  }

  /**
   * @param before workers that have begun with it
   * @throws PoisonousJobError if two of them are gone without having left
   */
  async #refusePoison(id: string, before: readonly string[], signal: AbortSignal): Promise<void> {
    const others = [...new Set(before)].filter((worker) => worker !== this.id);
    if (others.length < 2) return;
    const asked = this.#redis.now();
    // By then whoever lives has said so. A job is found after its lock's time, so that mostly nobody has to be waited for.
    const silence = Math.min(goneMs, Math.max(leastSilenceMs, this.#options.lockMs));
    for (;;) {
      await this.#view.refresh();
      const now = this.#redis.now();
      // While Redis was away nobody could say it.
      const isSure = (await this.#redis.upForMs()) >= silence;
      const beats = new Map(this.#view.workers.map(({ id, beat }) => [id, beat.at]));
      const silent = others.filter((worker) => (beats.get(worker) ?? 0) <= asked);
      const gone = silent.filter((worker) => isSure && now - (beats.get(worker) ?? 0) >= silence);
      if (gone.length >= 2) throw new PoisonousJobError(id, gone.slice(0, 2));
      if (silent.length < 2) return;
      await sleep(lookAgainMs);
      signal.throwIfAborted();
    }
  }

  /** @returns the result as it is kept */
  async #draw(served: Served, active: Active, data: JobData): Promise<Buffer> {
    const { model } = served;
    const { controller } = active;
    controller.signal.throwIfAborted();
    return withTraceparent(data.traceparent, () =>
      data.op === "encode" ? encoded(model, data, controller.signal) : this.#generate(served, active, data),
    );
  }

  async #generate(served: Served, active: Active, data: JobData): Promise<Buffer> {
    const { id, controller, facts } = active;
    const { timeoutMs: _, priority: __, ...given } = requestFromJson(data.request);
    const steps = new StepSender((message) => this.#tell(id, message));
    let lastProgress = performance.now();
    const options: GenerateOptions = {
      ...given,
      // A path of this machine is no picture, and no ControlNet: those of requests are names that the model was loaded with.
      ...{ priority: facts.level, allowPaths: false, signal: controller.signal },
      onAccept: (event) => {
        this.#learn(served, active, event);
        this.#tell(id, { type: "accept", ...event, seeds: event.seeds.map(seedToJson) });
      },
      onStart: ({ blocks }) => {
        active.hasStarted = true;
        this.#tell(id, { type: "start", worker: this.id, blocks });
      },
      onStep: (event) => {
        active.done = (event.step + 1) / (event.steps + 1);
        steps.add(event);
        if (performance.now() - lastProgress < progressMs) return;
        lastProgress = performance.now();
        active.job.updateProgress({ step: event.step + 1, steps: event.steps }).catch(() => {});
      },
    };
    const limit = given.deadlineMs;
    const waitedMs = this.#redis.now() - facts.arrival;
    const left = limit === undefined ? undefined : Math.max(1, limit - waitedMs);
    active.isCold = !served.drawnSizes.has(facts.size);
    for (const other of served.active.values()) {
      other.isDisturbed ||= active.isCold;
      active.isDisturbed ||= other.isCold;
    }
    const result = await this.#keepPromise(served.model, { ...options, deadlineMs: left }, data.promised).catch(
      (error) => {
        if (!(error instanceof DeadlineError) || limit === undefined) throw error;
        throw this.#refusal(served, active, error, limit, waitedMs);
      },
    );
    steps.flush();
    served.drawnSizes.delete(facts.size);
    served.drawnSizes.add(facts.size);
    return packResult(result, active.isDisturbed);
  }

  /** A request whose limit was promised is drawn, late if need be, with the schedule that takes least. */
  async #keepPromise(model: ImageModel, options: GenerateOptions, isPromised: boolean) {
    try {
      return await model.generate(options);
    } catch (error) {
      if (!(error instanceof DeadlineError) || !isPromised) throw error;
      const { deadlineMs: _, ladder: __, prefer: ___, ...rest } = options;
      const { sampler, quality, steps, blocks, sigmas, stages } = rest;
      if ([sampler, quality, steps, blocks, sigmas, stages].some((each) => each !== undefined))
        return model.generate(rest);
      return model.generate({ ...rest, blocks: error.blocks });
    }
  }

  /** A refusal as the caller has to read it, who counts from the call; what it says of the price is learnt, so that gateways refuse the next one. */
  #refusal(served: Served, active: Active, error: DeadlineError, deadlineMs: number, waitedMs: number): DeadlineError {
    const { blocks, retryAfterMs } = error;
    if (retryAfterMs === null) {
      const ms = error.bestMs / deadlineMargin;
      this.#learn(served, active, { aloneMs: ms, leastMs: ms, blocks });
    }
    const bestMs = Math.ceil(error.bestMs + (retryAfterMs === null ? 0 : waitedMs));
    // Without the wait it would have fitted.
    const isPossible = retryAfterMs === null && bestMs <= deadlineMs;
    return new DeadlineError(
      `No schedule is done in ${Math.round(deadlineMs)} ms: the best possible time is ${bestMs} ms, with ${blocks}${isPossible ? `, and ${Math.round(waitedMs)} ms went into waiting` : ""}.`,
      { deadlineMs, bestMs, blocks, retryAfterMs: isPossible ? Math.ceil(waitedMs) : retryAfterMs },
    );
  }

  #learn(
    { prices }: Served,
    active: Active,
    { aloneMs, leastMs, blocks }: Pick<AcceptEvent, "aloneMs" | "leastMs" | "blocks">,
  ): void {
    active.aloneMs = aloneMs ?? active.aloneMs;
    if (aloneMs === null || leastMs === null) return;
    const { kind } = active.facts;
    const known = prices.get(kind);
    // Small changes are no news.
    const differs = (a: number, b: number) => Math.abs(a - b) > news * a;
    const isNews = !known || differs(known.ms, aloneMs) || differs(known.leastMs, leastMs) || known.blocks !== blocks;
    prices.delete(kind);
    prices.set(kind, isNews ? { ms: aloneMs, leastMs, blocks } : known);
    if (prices.size > mostPrices) prices.delete(prices.keys().next().value!);
    if (isNews) this.#announcer.changed(known === undefined);
  }

  #stop(active: Active, why: Left["why"]): void {
    active.controller.abort(new Left(why));
  }

  #tell(id: string, message: Message): void {
    // While Redis is away steps would only pile up; what matters is kept besides.
    if (!this.#redis.isReady) return;
    this.#redis.client.publish(this.#redis.key("events", id), encodeMessage(message)).catch(() => {});
  }

  /** Its lock was lost while Redis was away, or this process stood still: who has it now finds its result. */
  #lostLock(id: string, error: unknown): false {
    this.#options.logger?.debug?.(`The job ${id} is not this worker's any more: ${messageOf(error)}.`);
    return false;
  }

  async #renewLocks(lockMs: number): Promise<void> {
    if (!this.#redis.isReady) return;
    for (const { fetcher, active } of this.#served) {
      const jobs = [...active.values()];
      if (jobs.length === 0) continue;
      const ids = jobs.map(({ id }) => id);
      const tokens = jobs.map(({ token }) => token);
      const lost = await fetcher.extendJobLocks(ids, tokens, lockMs);
      for (const id of lost) this.#lostLock(id, new Error("its lock ran out"));
    }
  }

  async #findCancelled(): Promise<void> {
    const all = this.#served.flatMap(({ active }) => [...active.values()]);
    if (all.length === 0) return;
    const found = await this.#redis.together<number[]>((commands) => {
      for (const { id } of all) commands.exists(this.#redis.key("cancelled", id));
      return commands;
    });
    for (const [index, active] of all.entries()) if (found[index] === 1) this.#stop(active, "cancelled");
  }
}

/** Steps on their way: those of one turn of the event loop go together. */
class StepSender {
  readonly #send: (message: Message) => void;
  #waiting: StepEvent[] = [];
  #willSend = false;

  constructor(send: (message: Message) => void) {
    this.#send = send;
  }

  add(step: StepEvent): void {
    this.#waiting.push(step);
    if (this.#willSend) return;
    this.#willSend = true;
    setImmediate(() => this.flush());
  }

  flush(): void {
    this.#willSend = false;
    if (this.#waiting.length === 0) return;
    this.#send({ type: "steps", steps: this.#waiting.map(stepMessage) });
    this.#waiting = [];
  }
}

/** Whether others may still draw a job that could not be drawn here. */
function goesElsewhere(error: unknown): boolean {
  if (error instanceof Left) return error.why === "handed back";
  return (
    error instanceof DisposedError ||
    error instanceof DrainingError ||
    error instanceof QueueFullError ||
    (error instanceof DeviceLostError && error.permanent)
  );
}

/** Jobs that take room. */
function atWork({ active }: Served): Active[] {
  return [...active.values()].filter(({ isOver }) => !isOver);
}

/** Devices that draw, pictures that fill their launches, and sizes that the model knows the cost of. */
function knownOf(served: Served): Served["known"] {
  const now = performance.now();
  if (now - served.known.at > costsMs) {
    const { costs } = served.model;
    const { entries } = costs;
    const lost = served.model.stats().devices?.map((device) => device.lost) ?? [];
    const there = (costs.devices ?? [{ entries }]).filter((_, index) => !lost[index]);
    const full = there.reduce((sum, device) => sum + usefulBatch(device.entries), 0);
    served.known = { at: now, devices: Math.max(1, there.length), full: Math.max(1, full), sizes: knownSizes(entries) };
  }
  return served.known;
}

const embedsJson = embedsSchema(tensorJson);

async function encoded(model: ImageModel, { request }: JobData, signal: AbortSignal): Promise<Buffer> {
  const options = checkOptions(encodeSchema, request as unknown as EncodeOptions, "encode()");
  const embeds = await model.encode({ ...options, signal });
  return Buffer.from(JSON.stringify(z.encode(embedsJson, embeds as z.output<typeof embedsJson>)));
}

/**
 * Draws the jobs of a fleet with models of this process.
 * @returns when it has joined the fleet; `close` it at the end, before the models are disposed of
 * @throws OptionError for a wrong option; InstallationError if a package is missing; RedisError if Redis does not answer; OutputError for a folder of
 *   results that cannot be written
 */
export function startWorker(options: FleetWorkerOptions): Promise<FleetWorker> {
  return FleetWorker.start(options);
}
