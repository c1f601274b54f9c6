/**
 * The models of a fleet for a server, as its workers come and go: a directory in the sense of `flowturbo/server`, whose requests the gateway answers.
 * A model without workers is remembered, so that those who come for it are told to come again, and count as demand: what workers are added by.
 */

import { untilAborted } from "../common/abort.js";
import { FleetEmptyError } from "../errors.js";
import { unservedMs } from "./admission.js";
import type { Fleet } from "./fleet.js";
import type { FleetModel } from "./model.js";

/** A model is remembered for so long after its last worker, in milliseconds: a week end and more. */
const rememberMs = 7 * 86_400_000;
/** What is remembered is written and read so often. */
const noteMs = 10_000;
/** A request that was refused for want of a worker counts as demand for so long; of a model no more than so many count. */
const demandMs = 120_000;
const mostDemand = 1000;
/** What a look may take before metrics are told without it. */
const lookMs = 2000;

/** A metric of the fleet: its values for Prometheus are read when they are asked for. */
export interface FleetMetric {
  readonly name: string;
  readonly help: string;
  readonly type: "gauge" | "counter";
  values(): { readonly labels: Readonly<Record<string, string>>; readonly value: number }[];
}

export class FleetDirectory {
  readonly metrics: readonly FleetMetric[];
  readonly #fleet: Fleet;
  /** Models that there were workers for, those seen last first. */
  #known: readonly string[] = [];
  #notedAt = Number.NEGATIVE_INFINITY;
  /** Of each model, the moments at which requests came while it had no worker, and how many there were. */
  readonly #unserved = new Map<string, { total: number; lately: number[] }>();
  /** Whether the last look was a success. */
  #isFresh = false;

  constructor(fleet: Fleet) {
    this.#fleet = fleet;
    this.metrics = this.#describeMetrics();
  }

  /** Those that live workers draw with; that of most workers first. */
  get ids(): readonly string[] {
    return this.#fleet.ids;
  }

  /** Those that there are workers for, or were within a week. */
  get models(): ReadonlyMap<string, FleetModel> {
    return new Map([...new Set([...this.ids, ...this.#known])].map((id) => [id, this.#fleet.model(id)]));
  }

  get obstacles(): readonly string[] {
    if (!this.#fleet.redis.isReady) return ["Redis cannot be reached."];
    return this.ids.some((id) => this.#takersOf(id) > 0) ? [] : ["No worker of the fleet takes jobs."];
  }

  /**
   * A model for a request, without an id the one that most workers have. One that had workers is found too: what was drawn with it before is still there.
   * @throws RedisError while Redis cannot be reached; FleetEmptyError at once if there is no such model, nor any other
   */
  async find(id: string | undefined): Promise<{ readonly id: string; readonly model: FleetModel } | null> {
    const fleet = this.#fleet;
    fleet.checkReady();
    const isServed = () => (id === undefined ? this.ids.length > 0 : this.#takersOf(id) > 0);
    // A worker may have joined just now.
    if (!isServed()) await fleet.view.refresh();
    await this.#note();
    const wanted = id ?? this.ids[0] ?? this.#known[0];
    if (wanted !== undefined && (this.ids.includes(wanted) || this.#known.includes(wanted))) {
      if (this.#takersOf(wanted) === 0) this.#addDemand(wanted);
      return { id: wanted, model: fleet.model(wanted) };
    }
    if (this.ids.length > 0) return null;
    throw new FleetEmptyError("No worker of the fleet takes jobs now. Try again, or start one.");
  }

  /** Brings metrics up to date. @throws RedisError while Redis cannot be reached */
  async look(): Promise<void> {
    this.#isFresh = false;
    await untilAborted(this.#look(), AbortSignal.timeout(lookMs));
    this.#isFresh = true;
  }

  async #look(): Promise<void> {
    this.#fleet.checkReady();
    await this.#fleet.view.refresh();
    await this.#note();
    await Promise.all([...this.models.values()].map((model) => model.look(0)));
  }

  #takersOf(id: string): number {
    return this.#fleet.workersOf(id).filter(({ beat }) => beat.state === "ready").length;
  }

  /** Remembers the models that there are, with all gateways of the fleet, and reads which there were. */
  async #note(): Promise<void> {
    const { ids } = this;
    const isRecent = performance.now() - this.#notedAt < noteMs;
    if (isRecent && ids.every((id) => this.#known.includes(id))) return;
    this.#notedAt = performance.now();
    const { redis } = this.#fleet;
    const { modelsKey } = redis;
    const now = redis.now();
    if (ids.length > 0) await redis.client.zadd(modelsKey, ...ids.flatMap((id) => [now, id]));
    await redis.client.zremrangebyscore(modelsKey, 0, now - rememberMs);
    this.#known = await redis.client.zrevrange(modelsKey, 0, -1);
  }

  #addDemand(id: string): void {
    const demand = this.#unserved.get(id) ?? { total: 0, lately: [] };
    this.#unserved.set(id, demand);
    demand.total++;
    demand.lately.push(performance.now());
    if (demand.lately.length > mostDemand) demand.lately.shift();
  }

  #demandOf(id: string): number {
    const demand = this.#unserved.get(id);
    if (!demand) return 0;
    const since = performance.now() - demandMs;
    demand.lately = demand.lately.filter((at) => at >= since);
    return demand.lately.length;
  }

  /** Finite, so that scalers can calculate with it. */
  #backlogOf(id: string, model: FleetModel): number {
    const refused = this.#takersOf(id) > 0 ? 0 : this.#demandOf(id);
    return model.backlogSeconds() + (refused * unservedMs) / 1000;
  }

  #describeMetrics(): FleetMetric[] {
    const metric = (
      name: string,
      type: FleetMetric["type"],
      help: string,
      read: (id: string, model: FleetModel) => number,
    ): FleetMetric => ({
      ...{ name: `flowturbo_fleet_${name}`, type, help },
      // Old values would look like new ones.
      values: () =>
        this.#isFresh ? [...this.models].map(([id, model]) => ({ labels: { model: id }, value: read(id, model) })) : [],
    });
    const sum = (id: string, read: (worker: ReturnType<Fleet["workersOf"]>[number]) => number | undefined) =>
      this.#fleet.workersOf(id).reduce((total, worker) => total + (read(worker) ?? 0), 0);
    return [
      metric("workers", "gauge", "Workers that take jobs.", (id) => this.#takersOf(id)),
      metric(
        "backlog_seconds",
        "gauge",
        `Seconds until everything that was accepted is done. Without workers: ${unservedMs / 1000} for each request that waits, or that was refused for want of a worker within ${demandMs / 1000} seconds.`,
        (id, model) => this.#backlogOf(id, model),
      ),
      metric("pictures", "gauge", "Pictures that workers have taken and not yet drawn.", (id) =>
        sum(id, ({ beat }) => beat.models[id]?.pictures),
      ),
      metric("capacity_pictures", "gauge", "Pictures that workers take at a time.", (id) =>
        sum(id, ({ beat, record }) => (beat.state === "ready" ? record?.models[id]?.capacity : 0)),
      ),
      metric(
        "unserved_total",
        "counter",
        "Requests that came to this gateway while the model had no worker.",
        (id) => this.#unserved.get(id)?.total ?? 0,
      ),
    ];
  }
}
