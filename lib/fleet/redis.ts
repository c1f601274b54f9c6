/**
 * A process's connection to the fleet's Redis: commands, messages, BullMQ's queues and workers over it, and the fleet's clock. It comes back by
 * itself: commands wait while it is away, and are sent again.
 */

import type { Queue, Worker } from "bullmq";
import type { ChainableCommander, Redis as Client, RedisOptions as ClientOptions } from "ioredis";
import type { Logger } from "../common/logger.js";
import { messageOf } from "../common/text.js";
import { OptionError, RedisError } from "../errors.js";
import { type BullMq, bullmq, ioredis, loadPackages } from "./packages.js";

export interface RedisSettings {
  /** `redis://` or `rediss://`, with user and password where they are needed. */
  readonly redis: string;
  /** What all keys begin with. */
  readonly prefix: string;
  /** Names the connection in `CLIENT LIST`. */
  readonly name: string;
  readonly logger?: Logger | undefined;
}

/** How BullMQ finds jobs whose worker is gone, in milliseconds. */
export interface StallTimes {
  /** A job's lock lasts so long; it is renewed after a third of it. */
  readonly lockMs: number;
  /** Locks are looked at so often. */
  readonly checkMs: number;
}

export const usualStallTimes: StallTimes = { lockMs: 15_000, checkMs: 5_000 };

/** A first connection may take so long: Redis may be started with this process. */
const patience = 10_000;
/** The clocks are compared again after so many milliseconds. */
const clockAge = 60_000;
/** What a lost connection cut in two is sent again so often. */
const mostCut = 10;
/** What no second try makes better. */
const hopeless = /NOAUTH|WRONGPASS|invalid username|NOPERM|certificate|self.signed|ERR_TLS|EPROTO|ENOTFOUND/i;

type Listener = (message: string) => void;

export class FleetRedis {
  readonly client: Client;
  readonly settings: RedisSettings;
  readonly #subscriber: Client;
  readonly #packages: { readonly bullmq: BullMq };
  readonly #listeners = new Map<string, Set<Listener>>();
  readonly #queues = new Map<string, Queue>();
  readonly #clock: NodeJS.Timeout;
  #offset = 0;
  #readySince: number | null = null;
  #awaySince: number | null = null;
  #awayMs = 0;
  #isClosed = false;
  /** What was said last of a connection that is lost: once, not at each try. */
  #said: string | null = null;

  /**
   * Connects.
   * @throws OptionError for a URL that is none; InstallationError if a package is missing; RedisError if Redis does not answer
   */
  static async connect(settings: RedisSettings): Promise<FleetRedis> {
    checkUrl(settings.redis);
    await loadPackages();
    const { Redis } = await ioredis.load();
    const options: ClientOptions = {
      // BullMQ asks for it: a command waits until Redis is back.
      maxRetriesPerRequest: null,
      connectionName: settings.name,
      retryStrategy: (times) => Math.min(50 * 2 ** Math.min(times, 6), 2000),
      // A replica that was promoted, and the one that was not.
      reconnectOnError: (error) => (error.message.startsWith("READONLY") ? 2 : false),
      lazyConnect: true,
    };
    const client = new Redis(settings.redis, options);
    const subscriber = client.duplicate({ connectionName: `${settings.name}-messages` });
    const redis = new FleetRedis(settings, client, subscriber, { bullmq: await bullmq.load() });
    try {
      await redis.#start();
      return redis;
    } catch (error) {
      await redis.close();
      throw error;
    }
  }

  private constructor(
    settings: RedisSettings,
    client: Client,
    subscriber: Client,
    packages: { readonly bullmq: BullMq },
  ) {
    this.settings = settings;
    this.client = client;
    this.#subscriber = subscriber;
    this.#packages = packages;
    for (const each of [client, subscriber]) each.on("error", (error: Error) => this.#failed(error));
    client.on("ready", () => {
      const now = performance.now();
      this.#readySince = now;
      this.#awayMs = this.#awaySince === null ? 0 : now - this.#awaySince;
      this.#awaySince = null;
      if (this.#said !== null) settings.logger?.info?.("Redis is back.");
      this.#said = null;
    });
    client.on("close", () => {
      // It was not away before it was there.
      if (this.#readySince !== null) this.#awaySince ??= performance.now();
      this.#readySince = null;
    });
    subscriber.on("message", (channel: string, message: string) => {
      for (const listener of [...(this.#listeners.get(channel) ?? [])]) listener(message);
    });
    this.#clock = setInterval(() => void this.#compareClocks().catch(() => {}), clockAge);
    this.#clock.unref();
  }

  /** Whether commands are answered now. */
  get isReady(): boolean {
    return this.client.status === "ready";
  }

  /**
   * An answer that somebody waits for who can be told that there is none.
   * @throws RedisError where Redis does not answer though connections stand, or refuses
   */
  async answer<T>(asked: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined;
    const silent = new Promise<never>((_, reject) => {
      timer = setTimeout(
        () => reject(new RedisError("Redis, which the fleet works with, does not answer.")),
        patience / 2,
      );
    });
    try {
      return await Promise.race([asked, silent]);
    } catch (error) {
      // Its memory is full, for one.
      if ((error as Error).name === "ReplyError")
        throw new RedisError(`Redis refuses: ${said(error)}.`, { cause: error });
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  /** For how many milliseconds they have been; 0 while they are not. */
  get readyForMs(): number {
    return this.#readySince === null ? 0 : performance.now() - this.#readySince;
  }

  /** For how many milliseconds Redis has been there for all, as far as it is known: since it was started, or since this process lost it last. */
  async upForMs(): Promise<number> {
    const uptime = /uptime_in_seconds:(\d+)/.exec(await this.client.info("server").catch(() => ""))?.[1];
    // Without the right to ask there is what was seen here.
    const upMs = uptime === undefined ? this.readyForMs : 1000 * Number(uptime);
    return this.#awayMs > 0 ? Math.min(upMs, this.readyForMs) : upMs;
  }

  /** For how many milliseconds they had not been, before. */
  get awayMs(): number {
    return this.#awayMs;
  }

  /**
   * Commands on their way together.
   * @returns their answers
   * @throws the first of their errors
   */
  together<T extends readonly unknown[]>(add: (commands: ChainableCommander) => ChainableCommander): Promise<T> {
    return answersOf<T>(() => add(this.client.pipeline()));
  }

  /** As `together`, with no command of others between them. */
  atOnce<T extends readonly unknown[]>(add: (commands: ChainableCommander) => ChainableCommander): Promise<T> {
    return answersOf<T>(() => add(this.client.multi()));
  }

  /** Milliseconds since 1970 by the clock of Redis, which all processes of the fleet share. */
  now(): number {
    return Date.now() + this.#offset;
  }

  key(...parts: readonly string[]): string {
    return [this.settings.prefix, ...parts].join(":");
  }

  /** What admission has to know of the jobs that wait in a queue, by their ids. @param queue its name */
  ledger(queue: string): string {
    return this.key("ledger", queue);
  }

  /** Models that there are or were workers for lately, by when they were seen. */
  get modelsKey(): string {
    return this.key("models");
  }

  /** The queue of a model. */
  queue(model: string): Queue {
    let queue = this.#queues.get(model);
    if (!queue) {
      queue = new this.#packages.bullmq.Queue(queueName(model), {
        ...{ connection: this.client, prefix: this.key("queue"), skipVersionCheck: true },
        // Names of events take room for each queue, and are read by people alone.
        streams: { events: { maxLen: 1000 } },
      });
      queue.on("error", (error) => this.#failed(error));
      this.#queues.set(model, queue);
    }
    return queue;
  }

  /** What fetches jobs of a model by hand. */
  fetcher(model: string, { lockMs, checkMs }: StallTimes): Worker {
    const worker = new this.#packages.bullmq.Worker(queueName(model), null, {
      ...{ connection: this.client, prefix: this.key("queue"), skipVersionCheck: true },
      ...{ autorun: false, lockDuration: lockMs, stalledInterval: checkMs, drainDelay: 2 },
      // A job that ends its workers is known by who has worked on it: locks run out while Redis is away, too.
      maxStalledCount: 1_000_000,
      name: this.settings.name,
    });
    worker.on("error", (error) => this.#failed(error));
    return worker;
  }

  /** An error that is not tried again. */
  get UnrecoverableError(): BullMq["UnrecoverableError"] {
    return this.#packages.bullmq.UnrecoverableError;
  }

  /** Listens to a channel from when it resolves. @returns stops it */
  async listen(channel: string, listener: Listener): Promise<() => void> {
    let listeners = this.#listeners.get(channel);
    if (!listeners) {
      listeners = new Set();
      this.#listeners.set(channel, listeners);
    }
    listeners.add(listener);
    if (listeners.size === 1) await this.#subscriber.subscribe(channel);
    return () => {
      if (!listeners.delete(listener) || listeners.size > 0) return;
      if (this.#listeners.get(channel) === listeners) this.#listeners.delete(channel);
      if (!this.#isClosed) this.#subscriber.unsubscribe(channel).catch(() => {});
    };
  }

  /** Ends all connections. Safe to call twice. */
  async close(): Promise<void> {
    if (this.#isClosed) return;
    this.#isClosed = true;
    clearInterval(this.#clock);
    await Promise.allSettled([...this.#queues.values()].map((queue) => queue.close()));
    this.#subscriber.disconnect();
    this.client.disconnect();
  }

  async #start(): Promise<void> {
    const { client } = this;
    let last: Error | null = null;
    let fail: (error: Error) => void = () => {};
    const failing = new Promise<never>((_, reject) => {
      fail = reject;
    });
    const onError = (error: Error) => {
      last = error;
      if (hopeless.test(error.message)) fail(error);
    };
    const timer = setTimeout(() => fail(last ?? new Error("it does not answer")), patience);
    client.on("error", onError);
    try {
      const connecting = (async () => {
        await Promise.all([connected(client), connected(this.#subscriber)]);
        await this.#compareClocks();
        await this.#warnOfEviction();
      })();
      connecting.catch(fail);
      await Promise.race([connecting, failing]);
    } catch (cause) {
      throw new RedisError(
        `Redis at ${hostOf(this.settings.redis)} cannot be used: ${said(cause)}. Check the address, the password and TLS (rediss://), and that it runs.`,
        { cause },
      );
    } finally {
      clearTimeout(timer);
      client.off("error", onError);
    }
  }

  async #compareClocks(): Promise<void> {
    const before = Date.now();
    const [seconds, microseconds] = (await this.client.time()).map(Number) as [number, number];
    const after = Date.now();
    // One that took long says little.
    if (after - before > 1000 && this.#offset !== 0) return;
    this.#offset = seconds * 1000 + microseconds / 1000 - (before + after) / 2;
  }

  /** Of a Redis that may drop keys, which would be jobs. */
  async #warnOfEviction(): Promise<void> {
    const info = await this.client.info("memory").catch(() => "");
    const policy = /maxmemory_policy:(\S+)/.exec(info)?.[1];
    if (policy !== undefined && policy !== "noeviction")
      this.settings.logger?.warn?.(
        `Redis may drop jobs when its memory is full: its maxmemory-policy is ${policy}. Set it to noeviction.`,
      );
  }

  #failed(error: Error): void {
    if (this.#isClosed || this.#said === error.message || /Connection is closed/.test(error.message)) return;
    this.#said = error.message;
    this.settings.logger?.warn?.(`Redis: ${said(error)}. Trying again.`);
  }
}

/** What an error says, to go on after it: some of Redis's own end as sentences do. */
function said(error: unknown): string {
  return messageOf(error).replace(/\.+$/, "");
}

/** Whether a Redis can be used, before anything slow is done for it. @throws as `FleetRedis.connect` */
export async function checkRedis(redis: string): Promise<void> {
  const connection = await FleetRedis.connect({ redis, prefix: "", name: "flowturbo-check" });
  await connection.close();
}

/** Of what a lost connection cut in two no rest is sent again: all of it is, here, so that it has to be such as may be done twice. */
async function answersOf<T extends readonly unknown[]>(make: () => ChainableCommander): Promise<T> {
  for (let again = 0; ; again++)
    try {
      return ((await make().exec()) ?? []).map(([error, answer]) => {
        if (error) throw error;
        return answer;
      }) as unknown as T;
    } catch (error) {
      if (again >= mostCut || !/connection close/i.test(messageOf(error))) throw error;
    }
}

async function connected(client: Client): Promise<void> {
  if (client.status === "ready") return;
  const ready = new Promise<void>((resolve) => client.once("ready", resolve));
  // A first try that fails is followed by others.
  client.connect().catch(() => {});
  await ready;
}

/** BullMQ has colons between the parts of its keys. */
function queueName(model: string): string {
  return encodeURIComponent(model).replaceAll("*", "%2A");
}

/** @throws OptionError for what is no address of a Redis */
export function checkUrl(text: string): void {
  let url: URL | null = null;
  try {
    url = new URL(text);
  } catch {}
  if (url && (url.protocol === "redis:" || url.protocol === "rediss:") && url.hostname !== "") return;
  throw new OptionError(
    "redis",
    "Expected the address of a Redis such as redis://127.0.0.1:6379 or rediss://user:password@host:6380 for redis.",
  );
}

/** The address without user and password. */
export function hostOf(text: string): string {
  const { protocol, host, pathname } = new URL(text);
  return `${protocol}//${host}${pathname === "/" ? "" : pathname}`;
}
