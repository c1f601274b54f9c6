/** What the parts of bench/fleet.ts share: a Redis of their own, processes of a fleet, and what they take of the processors and of Redis. */

import { readFileSync } from "node:fs";
import { Redis } from "ioredis";
import { FleetProcess } from "../../test/support/fleet/processes.js";
import type { AskedFor, WorkerSettings } from "../../test/support/fleet/protocol.js";
import type { TestRedis } from "../../test/support/redis.js";

export interface Setting {
  readonly redis: TestRedis;
  /** Folder of costs, which all processes share. */
  readonly cache: string;
  readonly quick: boolean;
  readonly rounds: number;
  readonly seed: number;
}

/** Of text encoding, steps and decoding, with the shares of test/support/waiting.ts: so many launches of a step take as long. */
export const steps = 8;
export const asked: AskedFor = {
  op: "draw",
  request: { prompt: "a red circle", steps, guidanceScale: 1, width: 64, height: 64 },
};
export const keepResultsMs = 10_000;

let fleets = 0;

/** Workers and gateways of one prefix. */
export class Fleet {
  readonly prefix = `bench${fleets++}`;
  readonly workers: FleetProcess[] = [];
  readonly gateways: FleetProcess[] = [];

  /** @param perProcess workers of a process */
  static async start(
    setting: Setting,
    model: WorkerSettings["model"],
    { workers, perProcess = 1, gateways = 1, http = false }: { workers: number; perProcess?: number; gateways?: number; http?: boolean }, // biome-ignore format: one line
  ): Promise<Fleet> {
    const fleet = new Fleet();
    const common = { redis: setting.redis.url, prefix: fleet.prefix, keepResultsMs };
    for (let left = workers; left > 0; left -= perProcess)
      fleet.workers.push(
        await FleetProcess.start({
          ...{ role: "worker", ...common, model, cache: setting.cache, tells: false },
          workers: Math.min(left, perProcess),
        }),
      );
    for (let index = 0; index < gateways; index++)
      fleet.gateways.push(await FleetProcess.start({ role: "gateway", ...common, maxQueue: 100_000, http }));
    return fleet;
  }

  async stop(): Promise<void> {
    for (const process of [...this.gateways, ...this.workers]) await process.stop();
  }
}

/** Milliseconds of processor time that a process has had. Linux. */
export function processorMsOf(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  // In hundredths of a second, whatever the kernel's own clock is.
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

export interface Usage {
  readonly redisMs: number;
  readonly gatewayMs: number;
  readonly workerMs: number;
  /** Calls of each command. */
  readonly commands: ReadonlyMap<string, number>;
}

/** What a fleet has taken so far; the difference of two is what was taken between. */
export async function usageOf({ redis }: Setting, fleet: Pick<Fleet, "workers" | "gateways">): Promise<Usage> {
  const client = new Redis(redis.url);
  const text = await client.info("commandstats");
  client.disconnect();
  const commands = new Map<string, number>();
  for (const [, name, calls] of text.matchAll(/^cmdstat_([^:]+):calls=(\d+)/gm)) commands.set(name!, Number(calls));
  const sum = (processes: readonly FleetProcess[]) =>
    processes.reduce((total, { process }) => total + processorMsOf(process.pid), 0);
  return { redisMs: processorMsOf(redis.pid), gatewayMs: sum(fleet.gateways), workerMs: sum(fleet.workers), commands };
}

export function difference(after: Usage, before: Usage): Usage {
  const commands = new Map<string, number>();
  for (const [name, calls] of after.commands) {
    const more = calls - (before.commands.get(name) ?? 0);
    if (more > 0) commands.set(name, more);
  }
  return {
    redisMs: after.redisMs - before.redisMs,
    gatewayMs: after.gatewayMs - before.gatewayMs,
    workerMs: after.workerMs - before.workerMs,
    commands,
  };
}
