/**
 * Who is in the fleet. A worker says each second that it lives and how much it has to do (its beat, some hundred bytes), and what it is, costs
 * included, when that changes (its record). Whoever does not say so for five seconds counts as gone.
 */

import { randomUUID } from "node:crypto";
import os from "node:os";
import type { ChainableCommander } from "ioredis";
import * as z from "zod";
import { packageVersion } from "../common/package.js";
import { jobFormat } from "./job.js";
import type { FleetRedis } from "./redis.js";

/** Milliseconds between two beats where nothing changes, the least between two, and after how many a worker counts as gone. */
export const beatMs = 1000;
export const leastBeatMs = 50;
export const goneMs = 5000;
/** Records are large, and read by all: no more often than this, in milliseconds. */
const leastRecordMs = 1000;
/** Records and beats that nobody renews are forgotten by Redis. */
const keepMs = 60_000;

const milliseconds = z.number().nonnegative();
const count = z.int().nonnegative();

const modelBeat = z.object({
  /** In how many milliseconds the work that it has taken is done. */
  backlogMs: milliseconds,
  /** Devices that draw at the same time. */
  devices: z.int().positive(),
  jobs: count,
  /** Pictures of these jobs. */
  pictures: count,
  /** Pictures that it would still take. */
  room: count,
  /** Sizes that it has drawn, the latest first. */
  warm: z.array(z.string().max(32)).max(64),
  /** Jobs that were drawn, and that failed, since it joined. */
  drawn: count,
  failed: count,
});
const beatSchema = z.object({
  format: z.int().positive(),
  state: z.enum(["ready", "draining"]),
  /** Number of its record: another one is read anew. */
  revision: count,
  /** By the fleet's clock. */
  at: milliseconds,
  models: z.record(z.string(), modelBeat),
});
const price = z.object({ ms: milliseconds, leastMs: milliseconds, blocks: z.string() });
const modelRecord = z.object({
  /** As `ImageModel.name`. */
  name: z.string(),
  nativeSize: z.object({ width: z.number(), height: z.number() }),
  hasRefiner: z.boolean(),
  adapters: z.object({ loras: z.array(z.string()), controlNets: z.array(z.string()) }).nullable(),
  /** The runtime that it runs on, and its devices, for people. */
  runtime: z.string(),
  devices: z.array(z.string()),
  /** Pictures that it takes at a time. */
  capacity: z.int().positive(),
  /** What kinds of requests take of it alone. */
  prices: z.record(z.string(), price),
  /** Its table of costs. */
  costs: z.array(z.looseObject({})),
  drift: z.number(),
});
const recordSchema = z.object({
  id: z.string(),
  host: z.string(),
  pid: z.int(),
  /** Of the package. */
  version: z.string(),
  /** By the fleet's clock. */
  since: milliseconds,
  models: z.record(z.string(), modelRecord),
});

export type ModelBeat = z.output<typeof modelBeat>;
export type Beat = z.output<typeof beatSchema>;
export type ModelRecord = z.output<typeof modelRecord>;
export type WorkerRecord = z.output<typeof recordSchema>;

/** A worker that lives. */
export interface LiveWorker {
  readonly id: string;
  readonly beat: Beat;
  /** Null until it has been read. */
  readonly record: WorkerRecord | null;
}

/** What a worker says of itself. */
export class Announcer {
  readonly id = randomUUID();
  readonly #redis: FleetRedis;
  readonly #describe: () => Pick<WorkerRecord, "models">;
  readonly #state: () => Pick<Beat, "state" | "models">;
  readonly #since: number;
  #revision = 0;
  /** The record as it was said last, and when. */
  #said = "";
  #saidAt = Number.NEGATIVE_INFINITY;
  #beatAt = Number.NEGATIVE_INFINITY;
  #timer: NodeJS.Timeout | null = null;
  #beating: Promise<void> = Promise.resolve();
  #hasNews = false;
  #isOver = false;

  constructor(
    redis: FleetRedis,
    describe: () => Pick<WorkerRecord, "models">,
    state: () => Pick<Beat, "state" | "models">,
  ) {
    this.#redis = redis;
    this.#describe = describe;
    this.#state = state;
    this.#since = redis.now();
    redis.client.on("ready", () => {
      this.#unsay();
      this.changed();
    });
  }

  /** Something of the beat has changed: it is said soon. @param isNews whether something of the record is new, which gateways wait for */
  changed(isNews = false): void {
    if (this.#isOver) return;
    this.#hasNews ||= isNews;
    const wait = Math.max(0, this.#beatAt + leastBeatMs - performance.now());
    this.#plan(wait);
  }

  /** @throws what Redis says */
  async beat(): Promise<void> {
    try {
      await this.#redis.together((commands) => this.addBeat(commands));
    } catch (error) {
      this.#unsay();
      throw error;
    }
  }

  /** Says how it is now together with other commands: whoever reads what they change reads this too. */
  addBeat(commands: ChainableCommander): ChainableCommander {
    if (this.#isOver) return commands;
    const now = performance.now();
    this.#beatAt = now;
    this.#plan(beatMs);
    const isDue = this.#hasNews || now - this.#saidAt >= leastRecordMs;
    this.#hasNews = false;
    const record = isDue ? JSON.stringify(this.#describe()) : this.#said;
    if (record !== this.#said || now - this.#saidAt > keepMs / 4) {
      if (record !== this.#said) this.#revision++;
      this.#said = record;
      this.#saidAt = now;
      const about = JSON.stringify(this.#about);
      // Two objects as one.
      commands.set(this.#redis.key("worker", this.id), `${about.slice(0, -1)},${record.slice(1)}`, "PX", keepMs);
    }
    const beat: Beat = { format: jobFormat, ...this.#state(), revision: this.#revision, at: this.#redis.now() };
    const beats = this.#redis.key("beats");
    return commands.hset(beats, this.id, JSON.stringify(beat)).pexpire(beats, keepMs);
  }

  /** Leaves the fleet: at once, and not only after some silence. */
  async leave(): Promise<void> {
    this.#isOver = true;
    if (this.#timer) clearTimeout(this.#timer);
    await this.#beating.catch(() => {});
    await this.#redis.client
      .pipeline()
      .hdel(this.#redis.key("beats"), this.id)
      .del(this.#redis.key("worker", this.id))
      .exec();
  }

  /** The record that was said last may not have come there: it is said again, as another one. */
  #unsay(): void {
    this.#said = "";
    this.#saidAt = Number.NEGATIVE_INFINITY;
  }

  get #about(): Omit<WorkerRecord, "models"> {
    return { id: this.id, host: os.hostname(), pid: process.pid, version: packageVersion(), since: this.#since };
  }

  #plan(wait: number): void {
    if (this.#isOver) return;
    if (this.#timer) clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      // While Redis is away beats would only pile up.
      if (!this.#redis.isReady) this.#plan(beatMs);
      else this.#beating = this.beat().catch(() => {});
    }, wait);
  }
}

/** The fleet as a process sees it. */
export class FleetView {
  readonly #redis: FleetRedis;
  readonly #records = new Map<string, { revision: number; record: WorkerRecord }>();
  /** Beats as they were read last: most have not changed when they are read again. */
  #beats = new Map<string, { readonly text: string; readonly beat: Beat | null }>();
  #workers: readonly LiveWorker[] = [];
  #refreshing: Promise<unknown> | null = null;
  #at = Number.NEGATIVE_INFINITY;
  /** Readings are counted: one that is overtaken by a later one is older. */
  #readings = 0;
  #shown = 0;

  constructor(redis: FleetRedis) {
    this.#redis = redis;
  }

  /** Those that lived when it was read last. */
  get workers(): readonly LiveWorker[] {
    return this.#workers;
  }

  /** Reads who is there, unless that was done within so many milliseconds. @throws what Redis says */
  async refresh(ageMs = 0): Promise<void> {
    if (performance.now() - this.#at <= ageMs) return;
    this.#refreshing ??= this.readWith().finally(() => {
      this.#refreshing = null;
    });
    await this.#refreshing;
  }

  /** Reads the entries of a hash, if one is given, and then who is there. @throws what Redis says */
  async readWith(hash?: string): Promise<Record<string, string>> {
    const { client } = this.#redis;
    const reading = ++this.#readings;
    // What is in both by then counts twice, and not never.
    const answers = await this.#redis.together<Record<string, string>[]>((commands) =>
      (hash === undefined ? commands : commands.hgetall(hash)).hgetall(this.#redis.key("beats")),
    );
    const [entries, fields] = [answers[0]!, answers.at(-1)!];
    const { readyForMs, awayMs } = this.#redis;
    // Just after Redis was away nobody has said so yet.
    const mostSilent = goneMs + (readyForMs < goneMs ? awayMs : 0);
    const now = this.#redis.now();
    const gone: string[] = [];
    const live: { id: string; beat: Beat }[] = [];
    const beats = new Map<string, { readonly text: string; readonly beat: Beat | null }>();
    for (const [id, text] of Object.entries(fields)) {
      const known = this.#beats.get(id);
      const read = known?.text === text ? known : { text, beat: parsed(beatSchema, text) };
      beats.set(id, read);
      const { beat } = read;
      if (!beat || now - beat.at > mostSilent) gone.push(id);
      else live.push({ id, beat });
    }
    this.#beats = beats;
    const stale = live.filter(({ id, beat }) => this.#records.get(id)?.revision !== beat.revision);
    if (stale.length > 0) {
      const texts = await client.mget(stale.map(({ id }) => this.#redis.key("worker", id)));
      for (const [index, { id, beat }] of stale.entries()) {
        const record = parsed(recordSchema, texts[index] ?? "");
        if (record) this.#records.set(id, { revision: beat.revision, record });
      }
    }
    // Those that have said nothing for long are nobody's business any more.
    const forgotten = gone.filter((id) => {
      const beat = beats.get(id)?.beat;
      return !beat || now - beat.at > keepMs;
    });
    if (forgotten.length > 0) await client.hdel(this.#redis.key("beats"), ...forgotten);
    if (reading < this.#shown) return entries;
    this.#shown = reading;
    for (const id of this.#records.keys()) if (!(id in fields)) this.#records.delete(id);
    this.#workers = live.map(({ id, beat }) => ({ id, beat, record: this.#records.get(id)?.record ?? null }));
    this.#at = performance.now();
    return entries;
  }
}

function parsed<T extends z.ZodType>(schema: T, text: string): z.output<T> | null {
  try {
    const { success, data } = schema.safeParse(JSON.parse(text));
    return success ? data : null;
  } catch {
    return null;
  }
}
