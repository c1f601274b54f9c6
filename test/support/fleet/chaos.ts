/**
 * A fleet whose parts are ended at random while clients ask it for pictures: workers and gateways are killed and started again, or hang for a
 * while; Redis is restarted, is away, hangs, and forgets the last of what it was told. Clients do as clients with retries do. What comes out is
 * compared with what one model draws alone, and what is left on Redis with what may be. Everything random follows from one number.
 */

import { readdirSync, readFileSync, truncateSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { Redis } from "ioredis";
import { errorTable } from "../../../lib/errors.js";
import { requestFromJson } from "../../../lib/json.js";
import type { EncodeOptions } from "../../../lib/model.js";
import { TestRedis } from "../redis.js";
import { loadWaiting } from "../waiting.js";
import { FleetProcess } from "./processes.js";
import {
  type AskedFor,
  type Drawn,
  digestOf,
  digestOfEmbeds,
  type FromProcess,
  keyOf,
  modelId,
  type Settings,
  type WorkerSettings,
} from "./protocol.js";

/** What may happen, and how often. */
export interface Mishaps {
  readonly killWorker: number;
  readonly killGateway: number;
  /** A worker hangs for longer than its locks last. */
  readonly freezeWorker: number;
  /** A worker hangs for so long that it counts as gone. */
  readonly loseWorker: number;
  readonly restartRedis: number;
  /** Redis is killed, and has not kept the last of its log. */
  readonly forgetRedis: number;
  /** Redis is away for three to four seconds. */
  readonly pauseRedis: number;
  /** Redis hangs for a second. */
  readonly freezeRedis: number;
}

export interface ChaosOptions {
  /** What everything random follows from. */
  readonly seed: number;
  readonly jobs: number;
  readonly workers: number;
  readonly gateways: number;
  /** Milliseconds in which the jobs are asked for. */
  readonly spanMs: number;
  /** Milliseconds after the last one was asked for in which all have to end. */
  readonly patienceMs: number;
  readonly mishaps: Mishaps;
  readonly model: WorkerSettings["model"];
  readonly lockMs: number;
  /** At least 10000. */
  readonly keepResultsMs: number;
  readonly log?: (line: string) => void;
}

export interface ChaosReport {
  readonly seed: number;
  readonly counts: Readonly<Record<string, number>>;
  /** What must not be: empty where all is well. */
  readonly violations: readonly string[];
}

/** A request, and what its client does. */
interface Job {
  readonly asked: AskedFor;
  /** Milliseconds from the beginning. */
  readonly at: number;
  readonly kind: string;
  /** Milliseconds after which its client leaves; null if it does not. */
  readonly leavesMs: number | null;
  /** Whether nobody else asks for the same. */
  readonly isUnique: boolean;
}

/** A drawing by a worker. */
interface Drawing {
  readonly key: string;
  readonly worker: number;
  readonly begun: number;
  lastStep: number;
  /** Null while it is drawn, and for ever if its worker was killed. */
  ended: { readonly at: number; readonly drawn: boolean } | null;
}

interface Span {
  readonly what: keyof Mishaps;
  /** Of the worker that it befell; null for Redis. */
  readonly worker: number | null;
  readonly from: number;
  /** When it was over. */
  to: number;
}

const sizes = [
  { width: 64, height: 64 },
  { width: 32, height: 32 },
  { width: 96, height: 48 },
];
const prompts = ["a red circle", "a large blue square", "a small green triangle", "a yellow triangle"];
/** A worker that says nothing for so long counts as gone (lib/fleet/registry.ts). */
const goneMs = 5000;
/** What says that the same may be asked again, soon. */
const askAgain = new Set<string | null>([
  "ERR_FLOWTURBO_REDIS",
  "ERR_FLOWTURBO_FLEET_EMPTY",
  "ERR_FLOWTURBO_QUEUE_FULL",
  "ERR_FLOWTURBO_DRAINING",
]);
/** What a kind of job may end with besides a result. */
const endings: Record<string, readonly string[]> = {
  wrong: ["ERR_FLOWTURBO_OPTION"],
  limited: ["ERR_FLOWTURBO_DEADLINE", "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE"],
  impatient: ["ERR_FLOWTURBO_TIMEOUT"],
};
/** Keys of the queue that stay: what BullMQ knows of it, whatever is in it. */
const keysThatStay = ["meta", "id", "events", "marker", "pc", "stalled-check"];
/** Keys of the fleet that workers renew while they live, with the longest time that they are kept without. */
const keysOfWorkers = /^(beats|worker:[0-9a-f-]{36})$/;
const workerKeysMs = 60_000;
/** Keys of a job that one who was ended at the wrong moment leaves for as long. */
const keysOfMoments = /^(followers|cancelled):[0-9a-f-]{36}$/;

function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mix = Math.imul(state ^ (state >>> 15), state | 1);
    mix ^= mix + Math.imul(mix ^ (mix >>> 7), mix | 61);
    return ((mix ^ (mix >>> 14)) >>> 0) / 2 ** 32;
  };
}

class Chaos {
  readonly #options: ChaosOptions;
  readonly #random: () => number;
  readonly #violations: string[] = [];
  readonly #counts: Record<string, number> = {};
  readonly #spans: Span[] = [];
  readonly #drawings = new Map<string, Drawing>();
  readonly #workers: { process: FleetProcess; number: number; isHeld: boolean }[] = [];
  readonly #gateways: FleetProcess[] = [];
  readonly #results = new Map<string, { readonly job: Job; readonly ended: Drawn }>();
  readonly #left: { readonly job: Job; readonly at: number }[] = [];
  /** The last end of a job that may have put something. */
  #redis!: TestRedis;
  #cache!: string;
  #started = 0;
  #isOver = false;

  constructor(options: ChaosOptions) {
    this.#options = options;
    this.#random = randomOf(options.seed);
  }

  async run(): Promise<ChaosReport> {
    this.#cache = await mkdtemp(path.join(os.tmpdir(), "flowturbo-chaos-"));
    this.#redis = await TestRedis.start();
    try {
      const { workers, gateways } = this.#options;
      // The first one measures, for all.
      for (let index = 0; index < workers; index++) await this.#startWorker();
      await Promise.all(Array.from({ length: gateways }, () => this.#startGateway()));
      const jobs = this.#jobs();
      const mishaps = this.#happen();
      await this.#ask(jobs);
      await mishaps;
      await this.#checkQueue();
      await this.#checkResults();
      this.#checkDrawings();
      await this.#checkKeys();
      for (const process of [...this.#gateways, ...this.#workers.map(({ process }) => process)])
        this.#violations.push(...process.faults);
    } finally {
      this.#isOver = true;
      const all = [...this.#gateways, ...this.#workers.map(({ process }) => process)];
      await Promise.all(all.map((process) => process.stop()));
      await this.#redis.stop();
      await rm(this.#cache, { recursive: true, force: true });
    }
    const drawn = [...this.#drawings.values()].filter(({ ended }) => ended?.drawn).length;
    this.#counts.drawings = this.#drawings.size;
    this.#counts.drawn = drawn;
    return { seed: this.#options.seed, counts: this.#counts, violations: this.#violations };
  }

  #count(name: string, by = 1): void {
    this.#counts[name] = (this.#counts[name] ?? 0) + by;
  }

  #say(line: string): void {
    this.#options.log?.(line);
  }

  #pick<T>(list: readonly T[]): T {
    return list[Math.floor(this.#random() * list.length)]!;
  }

  // ── What is asked ──────────────────────────────────────────────────────────────────────────────────────────────────

  #jobs(): Job[] {
    const { jobs, spanMs } = this.#options;
    const made: { -readonly [Name in keyof Job]: Job[Name] }[] = [];
    for (let index = 0; index < jobs; index++) {
      const chance = this.#random();
      const base = {
        prompt: this.#pick(prompts),
        seed: 1_000_000 + index,
        ...this.#pick(sizes),
        steps: 3 + Math.floor(10 * this.#random()),
        priority: this.#pick([-2, 0, 0, 0, 1, 5]),
        guidanceScale: this.#pick([1, 2, 4.5]),
        ...(this.#random() < 0.2 && { count: 2 + Math.floor(3 * this.#random()) }),
        ...(this.#random() < 0.2 && { negativePrompt: "a line" }),
        ...(this.#random() < 0.1 && { include: ["latents"] }),
      };
      const { seed: _, ...unseeded } = base;
      const { steps: __, ...unscheduled } = base;
      const [kind, asked]: [string, AskedFor] =
        chance < 0.45
          ? ["plain", { op: "draw", request: base }]
          : chance < 0.6
            ? ["shown", { op: "draw", request: { ...base, preview: this.#pick(["fast", "decoded"]) } }]
            : chance < 0.66
              ? ["encoded", { op: "encode", request: { prompt: `${base.prompt} ${index}` } }]
              : chance < 0.76
                ? [
                    "limited",
                    {
                      op: "draw",
                      request: {
                        ...unscheduled,
                        ladder: ["E12", "E6", "E3"],
                        deadlineMs: this.#pick([500, 3000, 20_000]),
                      },
                    },
                  ]
                : chance < 0.81
                  ? ["impatient", { op: "draw", request: { ...base, timeoutMs: this.#pick([300, 1500, 10_000]) } }]
                  : chance < 0.83
                    ? ["wrong", { op: "draw", request: { ...unscheduled, blocks: "Z9" } }]
                    : chance < 0.88
                      ? ["unseeded", { op: "draw", request: unseeded }]
                      : ["again", { op: "draw", request: base }];
      const leavesMs = this.#random() < 0.12 ? Math.floor(1500 * this.#random()) : null;
      const job = { asked, at: (index / jobs) * spanMs, kind, leavesMs, isUnique: true };
      made.push(job);
      // The same as somebody lately, perhaps more urgent, or shown.
      const other = made[Math.max(0, index - 1 - Math.floor(12 * this.#random()))]!;
      if (kind !== "again" || other.kind !== "plain") continue;
      const more = this.#random();
      const request = { ...other.asked.request, ...(more < 0.3 && { priority: 9 }), ...(more > 0.8 && { preview: "fast" }) }; // biome-ignore format: one line
      job.asked = { op: "draw", request };
      job.isUnique = false;
      other.isUnique = false;
    }
    return made;
  }

  async #ask(jobs: readonly Job[]): Promise<void> {
    const { spanMs, patienceMs } = this.#options;
    const start = performance.now();
    let open = jobs.length;
    const end = start + spanMs + patienceMs;
    const waiting = new Set(jobs);
    await Promise.all(
      jobs.map(async (job) => {
        await sleep(Math.max(0, start + job.at - performance.now()));
        await this.#client(job, end);
        waiting.delete(job);
        open--;
        if (open % 50 === 0) this.#say(`${open} jobs are left`);
      }),
    );
  }

  /** A caller with retries, until its request has ended. */
  async #client(job: Job, end: number): Promise<void> {
    const wanted = this.#pickLater();
    const since = Date.now();
    let accepted = false;
    for (let turn = 0; performance.now() < end; turn++) {
      const gateway = this.#gateways.filter(({ isRunning }) => isRunning)[(wanted + turn) % this.#options.gateways];
      if (!gateway) {
        await sleep(50);
        continue;
      }
      const { cancel, answer } = gateway.ask(job.asked, () => {
        accepted = true;
      });
      const leaving = job.leavesMs === null ? undefined : setTimeout(cancel, job.leavesMs);
      const late = Symbol();
      const found = await Promise.race([answer, sleep(Math.max(0, end - performance.now()), late, { ref: false })]);
      clearTimeout(leaving);
      if (found === late) break;
      if (found === null) {
        this.#count("asked again, since the gateway was killed");
        continue;
      }
      const { ended, steps } = found as Exclude<typeof found, symbol>;
      for (let index = 1; index < steps.length; index++)
        if (steps[index]! <= steps[index - 1]!) this.#violations.push(`steps were told twice: ${steps.join()} of ${JSON.stringify(job.asked)}`); // biome-ignore format: one line
      if ("digest" in ended) {
        this.#count("results");
        this.#checkSame(job, ended);
        return;
      }
      if (askAgain.has(ended.code)) {
        this.#count(`asked again after ${ended.code}`);
        await sleep(ended.retryAfterMs ?? 250);
        continue;
      }
      if (job.leavesMs !== null && ended.name === "AbortError") {
        this.#count("cancelled");
        if (job.isUnique) this.#left.push({ job, at: Date.now() });
        return;
      }
      this.#count(ended.code ?? ended.name);
      if (ended.code === "ERR_FLOWTURBO_POISONOUS_JOB") this.#checkPoison(job, since);
      else if (
        ended.code === null ||
        !Object.hasOwn(errorTable, ended.code) ||
        !(endings[job.kind] ?? []).includes(ended.code)
      )
        // biome-ignore format: one line
        this.#violations.push(`a job ended with ${ended.code} ${ended.name} "${ended.message}": ${JSON.stringify(job)}`);
      return;
    }
    this.#violations.push(`a job did not end (${accepted ? "accepted" : "not accepted"}): ${JSON.stringify(job)}`);
  }

  /** Not of the seed's sequence: clients come in whatever order. */
  #pickLater(): number {
    return Math.floor(Math.random() * this.#options.gateways);
  }

  #checkSame(job: Job, ended: Drawn): void {
    const { request } = job.asked;
    const key = JSON.stringify([request, ended.seeds, ended.blocks]);
    const known = this.#results.get(key);
    if (known && known.ended.digest !== ended.digest) this.#violations.push(`two results of one request: ${key}`);
    this.#results.set(key, { job, ended });
  }

  /** Only workers that were killed, or hung for longer than their locks, may have been counted against it: also before they told of a drawing. */
  #checkPoison({ asked }: Job, since: number): void {
    const gone = new Set(
      this.#spans.flatMap(({ worker, what, from, to }) =>
        worker !== null && (what === "killWorker" ? from : to) >= since ? worker : [],
      ),
    );
    this.#say(`a poisonous job: workers ${[...gone].join()}`);
    if (gone.size < 2) this.#violations.push(`a job was given up after ${gone.size} workers: ${JSON.stringify(asked)}`);
  }

  #keyOf({ op, request }: AskedFor): string {
    return op === "encode" ? keyOf({ prompt: String(request.prompt) }) : keyOf(requestFromJson(request));
  }

  // ── What happens ───────────────────────────────────────────────────────────────────────────────────────────────────

  async #happen(): Promise<void> {
    const { mishaps, spanMs } = this.#options;
    const all = Object.entries(mishaps).flatMap(([name, count]) => Array<keyof Mishaps>(count).fill(name as never));
    const plan = all
      .map((what) => ({ what, order: this.#random() }))
      .sort((a, b) => a.order - b.order)
      .map(({ what }, index) => ({ what, at: ((index + this.#random()) / all.length) * spanMs }));
    const start = performance.now();
    const running: Promise<void>[] = [];
    for (const { what, at } of plan) {
      await sleep(Math.max(0, start + at - performance.now()));
      this.#say(`${((performance.now() - start) / 1000).toFixed(1)} s ${what}`);
      this.#count(what);
      const happening = this.#befall(what);
      happening.catch(() => {});
      running.push(happening);
      // One Redis cannot be killed twice at a time.
      if (what.endsWith("Redis")) await happening;
    }
    const failed = (await Promise.allSettled(running)).find(({ status }) => status === "rejected");
    if (failed) throw (failed as PromiseRejectedResult).reason;
  }

  async #befall(what: keyof Mishaps): Promise<void> {
    const span: Span = { what, worker: null, from: Date.now(), to: Number.POSITIVE_INFINITY };
    if (what === "killGateway") {
      while (this.#gateways.length === 0) await sleep(50);
      const gateway = this.#pick(this.#gateways);
      gateway.process.kill("SIGKILL");
      await gateway.process.ended;
      this.#violations.push(...gateway.faults);
      this.#gateways.splice(this.#gateways.indexOf(gateway), 1);
      await this.#startGateway();
      return;
    }
    if (what === "killWorker" || what === "freezeWorker" || what === "loseWorker") {
      const underWay = (worker: number) =>
        [...this.#drawings.values()].filter((drawing) => drawing.worker === worker && !drawing.ended);
      const free = this.#workers.filter(({ isHeld }) => !isHeld);
      const busy = free.filter(({ number }) => underWay(number).length > 0);
      if (free.length === 0) return;
      // Mostly one that has something to lose.
      const worker = this.#pick(busy.length > 0 && this.#random() < 0.8 ? busy : free);
      worker.isHeld = true;
      this.#spans.push({ ...span, worker: worker.number });
      const mine = this.#spans.at(-1)!;
      const drawing = underWay(worker.number);
      this.#say(`it is worker ${worker.number}, with ${drawing.length} drawings`);
      this.#count("drawings under way at a worker that was killed or hung", drawing.length);
      if (what === "killWorker") {
        worker.process.process.kill("SIGKILL");
        await worker.process.process.ended;
        this.#workers.splice(this.#workers.indexOf(worker), 1);
        await sleep(200);
        if (!this.#isOver) await this.#startWorker();
        return;
      }
      const { lockMs } = this.#options;
      worker.process.process.kill("SIGSTOP");
      await sleep(what === "loseWorker" ? goneMs + lockMs : 1.7 * lockMs);
      worker.process.process.kill("SIGCONT");
      mine.to = Date.now();
      worker.isHeld = false;
      return;
    }
    this.#spans.push(span);
    if (what === "restartRedis") await this.#redis.restart(this.#pick(["SIGTERM", "SIGKILL"]));
    else if (what === "pauseRedis") await this.#redis.pause(3000 + 1000 * this.#random());
    else if (what === "freezeRedis") await this.#redis.freeze(1000);
    else {
      await this.#redis.kill("SIGKILL");
      this.#count(
        "bytes of the log that were lost",
        forget(this.#redis.folder, 4000 + Math.floor(40_000 * this.#random())),
      );
      await this.#redis.start();
    }
    span.to = Date.now();
  }

  /** As whatever runs processes does: one that ended since Redis was away for too long is started again. */
  async #start(settings: Settings, onMessage?: (message: FromProcess) => void): Promise<FleetProcess> {
    for (let again = 0; ; again++)
      try {
        return await FleetProcess.start(settings, onMessage);
      } catch (error) {
        if (again >= 5 || !/ERR_FLOWTURBO_REDIS/.test(String(error))) throw error;
        this.#count("processes that were started again, since Redis was away");
      }
  }

  async #startWorker(): Promise<void> {
    const number = this.#started++;
    const { model, lockMs, keepResultsMs } = this.#options;
    const process = await this.#start(
      {
        ...{ role: "worker", redis: this.#redis.url, prefix: "chaos", keepResultsMs, lockMs, model },
        ...{ cache: this.#cache, tells: true },
      },
      (message) => {
        if (message.type !== "drawing") return;
        const id = `${number}:${message.drawing}`;
        const { what, key, at } = message;
        if (what === "begin") this.#drawings.set(id, { key, worker: number, begun: at, lastStep: at, ended: null });
        const drawing = this.#drawings.get(id)!;
        if (what === "step") drawing.lastStep = at;
        if (what === "drawn" || what === "failed") drawing.ended = { at, drawn: what === "drawn" };
      },
    );
    this.#workers.push({ process, number, isHeld: false });
  }

  async #startGateway(): Promise<void> {
    const { keepResultsMs, jobs } = this.#options;
    this.#gateways.push(
      await this.#start({
        ...{ role: "gateway", redis: this.#redis.url, prefix: "chaos", keepResultsMs },
        maxQueue: Math.max(100, jobs),
      }),
    );
  }

  // ── What is to be ──────────────────────────────────────────────────────────────────────────────────────────────────

  /** Every result is the one that a model draws alone. */
  async #checkResults(): Promise<void> {
    const { sizes: known, ...times } = this.#options.model;
    await using model = await loadWaiting({ ...times, msPerLaunch: 1e-3, msPerRow: 0, measureCosts: false });
    for (const { job, ended } of this.#results.values()) {
      const { op, request } = job.asked;
      let digest: string;
      if (op === "encode") digest = digestOfEmbeds(await model.encode(request as unknown as EncodeOptions));
      else {
        const { deadlineMs: limit, ladder: _, timeoutMs: __, ...rest } = requestFromJson(request);
        const options = limit === undefined ? rest : { ...rest, blocks: ended.blocks };
        digest = digestOf(await model.generate({ ...options, seed: undefined, seeds: ended.seeds.map(BigInt) }));
      }
      this.#count("results compared");
      if (digest !== ended.digest) this.#violations.push(`a result differs from the one drawn alone: ${JSON.stringify(job.asked)}`); // biome-ignore format: one line
    }
  }

  /** Nothing is drawn for nobody for long, and nothing is drawn again without a reason. */
  #checkDrawings(): void {
    const { lockMs, keepResultsMs } = this.#options;
    const all = [...this.#drawings.values()].sort((a, b) => a.begun - b.begun);
    /** Something that workers or Redis suffered in that time. */
    const disturbed = (from: number, to: number) => this.#spans.some((span) => span.from <= to && span.to >= from);
    for (const { job, at } of this.#left) {
      const key = this.#keyOf(job.asked);
      // A step takes less; messages take some milliseconds, and much more where the processor is busy.
      const graceMs = 1000;
      if (disturbed(at - 2000, at + graceMs)) continue;
      this.#count("cancelled, and looked at");
      for (const { key: drawn, lastStep, begun } of all)
        if (drawn === key && lastStep > at + graceMs)
          this.#violations.push(`drawn ${lastStep - at} ms after its caller had left (begun ${begun - at} ms after): ${JSON.stringify(job)}`); // biome-ignore format: one line
    }
    const before = new Map<string, Drawing[]>();
    for (const drawing of all) {
      const earlier = before.get(drawing.key) ?? [];
      before.set(drawing.key, [...earlier, drawing]);
      if (earlier.length === 0) continue;
      this.#count("drawn again");
      const last = earlier.at(-1)!;
      // Its worker did not end it, or may have lost its lock; or either had taken it before Redis was away, or before it hung itself, and
      // began with it some time after.
      const suffered = this.#spans.some(
        ({ worker, from, to }) =>
          (worker === null || worker === last.worker || worker === drawing.worker) &&
          to >= last.begun - (worker === last.worker ? 0 : 2 * lockMs) &&
          from <= drawing.begun,
      );
      const explained =
        suffered ||
        (last.ended !== null && !last.ended.drawn) ||
        (last.ended !== null && drawing.begun - last.ended.at > keepResultsMs - lockMs);
      if (!explained)
        this.#violations.push(
          `drawn again without a reason: ${JSON.stringify([...earlier, drawing])}, where there was ${JSON.stringify(this.#spans)}`,
        );
    }
  }

  async #checkQueue(): Promise<void> {
    const client = new Redis(this.#redis.url);
    const key = (name: string) => `chaos:queue:${modelId}:${name}`;
    try {
      const left = async () => {
        const answers = await client
          .pipeline()
          .llen(key("wait"))
          .llen(key("active"))
          .zcard(key("prioritized"))
          .zcard(key("delayed"))
          .zcard(key("completed"))
          .zcard(key("failed"))
          .hlen(`chaos:ledger:${modelId}`)
          .exec();
        const [wait, active, prioritized, delayed, completed, failed, ledger] = answers!.map(([, count]) =>
          Number(count),
        );
        return { wait, active, prioritized, delayed, completed, failed, ledger };
      };
      const start = performance.now();
      for (;;) {
        const found = await left();
        if (Object.values(found).every((count) => count === 0)) break;
        if (performance.now() - start > this.#options.patienceMs) {
          this.#violations.push(`the queue is not empty: ${JSON.stringify(found)}`);
          break;
        }
        await sleep(100);
      }
      this.#count("milliseconds until the queue was empty", Math.round(performance.now() - start));
    } finally {
      client.disconnect();
    }
  }

  async #checkKeys(): Promise<void> {
    await sleep(this.#options.keepResultsMs + 1000);
    const { mishaps } = this.#options;
    // What Redis forgets may be that they were removed.
    const most = mishaps.forgetRedis > 0 ? Number.POSITIVE_INFINITY : Object.values(mishaps).reduce((sum, count) => sum + count, 0); // biome-ignore format: one line
    let left = 0;
    const client = new Redis(this.#redis.url);
    try {
      for (const key of await client.keys("chaos:*")) {
        const name = key.slice("chaos:".length);
        if (keysThatStay.some((each) => name === `queue:${modelId}:${each}`)) continue;
        const ttl = await client.pttl(key);
        if (ttl === -2 || (keysOfWorkers.test(name) && ttl > 0 && ttl <= workerKeysMs)) continue;
        if (keysOfMoments.test(name) && ttl > 0 && ttl <= workerKeysMs && left++ < most) {
          this.#count("keys of a job that are left for a while");
          continue;
        }
        this.#violations.push(`the key ${name} is left, for ${ttl} ms`);
      }
    } finally {
      client.disconnect();
    }
  }
}

/**
 * Takes the end of a log of a Redis that does not run. It is cut behind a transaction: within one Redis (7.0) reads it as if it had been cut before, but
 * goes on writing within, so that the next start does half of it.
 * @returns how many bytes
 */
function forget(folder: string, bytes: number): number {
  const logs = path.join(folder, "appendonlydir");
  const file = path.join(logs, readdirSync(logs).find((name) => name.endsWith(".incr.aof"))!);
  const log = readFileSync(file);
  const last = Buffer.from("*1\r\n$4\r\nEXEC\r\n");
  const at = log.lastIndexOf(last, Math.max(0, log.length - bytes));
  const end = at < 0 ? log.length : at + last.length;
  truncateSync(file, end);
  return log.length - end;
}

export function chaos(options: ChaosOptions): Promise<ChaosReport> {
  return new Chaos(options).run();
}
