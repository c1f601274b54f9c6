/**
 * A fleet as those see it who ask it for pictures: its connection, who is in it, and a model for each id that workers draw with. Gateways, and
 * services that draw with a fleet in place of a model of their own, hold one.
 */

import { randomUUID } from "node:crypto";
import { RedisError } from "../errors.js";
import { checkOptions } from "../options.js";
import { failureFromJson } from "./failure.js";
import { FleetModel } from "./model.js";
import { type ConnectFleetOptions, connectSchema } from "./options.js";
import { FleetRedis } from "./redis.js";
import { FleetView, type LiveWorker } from "./registry.js";
import { openResults, type ResultStore } from "./results.js";
import { type FleetStatus, statusOf } from "./status.js";

/** The fleet is looked at so often while nobody asks, in milliseconds: health and metrics are no older. */
const lookMs = 1000;
const sweepMs = 60_000;
/** The ledgers are compared with their queues so often, in milliseconds. */
const compareMs = 5000;

export class Fleet implements AsyncDisposable {
  readonly redis: FleetRedis;
  readonly view: FleetView;
  readonly results: ResultStore;
  readonly options: ReturnType<typeof checkConnect>;
  /** Names this process to those of the fleet. */
  readonly id = randomUUID();
  /** Called when Redis is back. */
  readonly onBack = new Set<() => void>();
  readonly #models = new Map<string, FleetModel>();
  readonly #timers: NodeJS.Timeout[];
  #closing: Promise<void> | null = null;

  /**
   * @throws OptionError for a wrong option; InstallationError if a package is missing; RedisError if Redis does not answer; OutputError for a folder of
   *   results that cannot be written
   */
  static async connect(given: ConnectFleetOptions): Promise<Fleet> {
    const options = checkConnect(given);
    const { redis: url, prefix, results, keepResultsMs, logger } = options;
    const redis = await FleetRedis.connect({ redis: url, prefix, name: "flowturbo-gateway", logger });
    try {
      const store = await openResults(redis, results, keepResultsMs);
      const fleet = new Fleet(redis, store, options);
      await fleet.view.refresh();
      return fleet;
    } catch (error) {
      await redis.close();
      throw error;
    }
  }

  private constructor(redis: FleetRedis, results: ResultStore, options: ReturnType<typeof checkConnect>) {
    this.redis = redis;
    this.results = results;
    this.options = options;
    this.view = new FleetView(redis);
    const look = () => {
      if (redis.isReady) this.view.refresh(lookMs / 2).catch(() => {});
    };
    redis.client.on("ready", () => {
      look();
      for (const act of [...this.onBack]) act();
    });
    const compare = () => {
      if (redis.isReady) for (const model of this.#models.values()) model.compareLedger().catch(() => {});
    };
    this.#timers = [
      setInterval(look, lookMs),
      setInterval(compare, compareMs),
      setInterval(() => void results.sweep().catch(() => {}), sweepMs),
    ];
    // They keep no process alive that waits for nothing.
    for (const timer of this.#timers) timer.unref();
  }

  /** Ids of the models that live workers draw with; those of most workers first. */
  get ids(): string[] {
    const counts = new Map<string, number>();
    for (const { beat } of this.view.workers)
      for (const id of Object.keys(beat.models)) counts.set(id, (counts.get(id) ?? 0) + 1);
    return [...counts].sort(([a, x], [b, y]) => y - x || (a < b ? -1 : 1)).map(([id]) => id);
  }

  /** A model by its id, whether or not there is a worker for it now. */
  model(id: string): FleetModel {
    let model = this.#models.get(id);
    if (!model) {
      model = new FleetModel(this, id);
      this.#models.set(id, model);
    }
    return model;
  }

  /** Workers that draw with a model. */
  workersOf(model: string): LiveWorker[] {
    return this.view.workers.filter(({ beat }) => model in beat.models);
  }

  /** Who is in the fleet and how much there is to do, as it is now. @throws RedisError while Redis is away */
  async status(): Promise<FleetStatus> {
    this.checkReady();
    await this.view.refresh();
    return statusOf(this);
  }

  /** How a job ended, if it failed. */
  async failureOf(jobId: string): Promise<Error | null> {
    const text = await this.redis.client.get(this.redis.key("failure", jobId));
    return text === null ? null : failureFromJson(JSON.parse(text));
  }

  /** @throws RedisError while Redis is away: whoever asks is told so at once */
  checkReady(): void {
    if (!this.redis.isReady)
      throw new RedisError(
        "Redis, which the fleet works with, cannot be reached now. What was accepted goes on when it is back.",
      );
  }

  /** Leaves the fleet when the calls of its models are over. Safe to call twice. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      await Promise.all([...this.#models.values()].map((model) => model.drain()));
      for (const timer of this.#timers) clearInterval(timer);
      await this.redis.close();
    })();
    return this.#closing;
  }

  /** As `close`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function checkConnect(given: ConnectFleetOptions) {
  return checkOptions(connectSchema, given, "connectFleet()");
}
