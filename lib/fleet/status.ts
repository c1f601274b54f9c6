/** The state of a fleet, for people and programs: `flowturbo fleet status` shows it. */

import type { Fleet } from "./fleet.js";

/** The state of a fleet. */
export interface FleetStatus {
  /** Moment of the state, in milliseconds since 1970 by the clock of Redis, as all moments here. */
  readonly at: number;
  /** Those that live, the oldest first. */
  readonly workers: readonly FleetWorkerStatus[];
  /** What is asked of each model that there are workers for, or that a gateway saw workers for within a week. */
  readonly models: readonly FleetModelStatus[];
}

/** A worker. */
export interface FleetWorkerStatus {
  /** Another one at each start. */
  readonly id: string;
  /** Name of its machine. */
  readonly host: string;
  readonly pid: number;
  /** Of the package. */
  readonly version: string;
  /** `draining` ones take no more jobs. */
  readonly state: "ready" | "draining";
  /** When it joined. */
  readonly since: number;
  /** Milliseconds since it last said that it lives. */
  readonly silentMs: number;
  readonly models: readonly {
    readonly id: string;
    readonly runtime: string;
    readonly devices: readonly string[];
    /** Jobs and pictures at work, and pictures that it takes at a time. */
    readonly jobs: number;
    readonly pictures: number;
    readonly capacity: number;
    /** Seconds of work that it has taken and still has to do. */
    readonly backlogSeconds: number;
    /** Sizes that it draws without a slow first launch. */
    readonly warm: readonly string[];
    /** Kinds of requests whose cost it knows. */
    readonly prices: number;
    /** Jobs that it has drawn, and that failed, since it joined; and jobs drawn a minute since then. */
    readonly drawn: number;
    readonly failed: number;
    readonly perMinute: number;
  }[];
}

/** A model of a fleet. */
export interface FleetModelStatus {
  readonly id: string;
  /** Workers that take jobs for it. */
  readonly workers: number;
  /** Jobs that wait for a worker, and that are at work. */
  readonly waiting: number;
  readonly active: number;
  /** Seconds until everything that was accepted is done; without workers, a minute for each job. */
  readonly backlogSeconds: number;
}

/** What is seen of it. @throws what Redis says */
export async function statusOf(fleet: Fleet): Promise<FleetStatus> {
  const at = fleet.redis.now();
  const workers = fleet.view.workers.map(({ id, beat, record }): FleetWorkerStatus => {
    const since = record?.since ?? beat.at;
    const minutes = Math.max(1 / 60, (at - since) / 60_000);
    return {
      ...{ id, host: record?.host ?? "", pid: record?.pid ?? 0, version: record?.version ?? "" },
      ...{ state: beat.state, since, silentMs: Math.max(0, Math.round(at - beat.at)) },
      models: Object.entries(beat.models).map(([model, { jobs, pictures, backlogMs, warm, drawn, failed }]) => {
        const about = record?.models[model];
        return {
          ...{ id: model, runtime: about?.runtime ?? "", devices: about?.devices ?? [], jobs, pictures, warm },
          ...{ capacity: about?.capacity ?? 0, backlogSeconds: backlogMs / 1000 },
          prices: Object.keys(about?.prices ?? {}).length,
          ...{ drawn, failed, perMinute: Math.round((10 * drawn) / minutes) / 10 },
        };
      }),
    };
  });
  workers.sort((a, b) => a.since - b.since);
  const ids = new Set([...fleet.ids, ...(await fleet.redis.client.zrevrange(fleet.redis.modelsKey, 0, -1))]);
  const models = await Promise.all(
    [...ids].map(async (id): Promise<FleetModelStatus> => {
      const model = fleet.model(id);
      await model.look(0);
      const counts = await fleet.redis.queue(id).getJobCounts("wait", "prioritized", "active");
      const takers = fleet.workersOf(id).filter(({ beat }) => beat.state === "ready");
      return {
        ...{ id, workers: takers.length, active: counts.active ?? 0 },
        waiting: (counts.wait ?? 0) + (counts.prioritized ?? 0),
        backlogSeconds: model.backlogSeconds(),
      };
    }),
  );
  return { at, workers, models };
}
