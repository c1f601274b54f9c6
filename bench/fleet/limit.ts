/**
 * Where Redis is the limit: how many operations it answers on this machine at most, and how much of its processor a picture takes, from which follows
 * how many pictures a second one Redis carries. And as many pictures as this machine draws where workers take no time.
 */

import { spawn } from "node:child_process";
import { type Findings, log, table } from "../support.js";
import { asked, difference, Fleet, type Setting, usageOf } from "./setting.js";

/** Launches that take nearly nothing: what is left is the fleet's own work. */
const model = { msPerLaunch: 0.01, msPerRow: 0, maxBatch: 8 };

/** Operations a second by redis-benchmark; null where it is not installed. */
async function mostOperations({ redis }: Setting, pipeline: number, quick: boolean): Promise<number | null> {
  const args = ["-p", String(redis.port), "-c", "50", "-n", quick ? "50000" : "400000", "-P", String(pipeline), "-t", "set", "--csv", "-d", "200"]; // biome-ignore format: one line
  return new Promise((resolve) => {
    const child = spawn("redis-benchmark", args, { stdio: ["ignore", "pipe", "ignore"] });
    let text = "";
    child.stdout.on("data", (chunk) => {
      text += chunk;
    });
    child.once("error", () => resolve(null));
    child.once("close", () => resolve(Number(/"SET","([\d.]+)"/.exec(text)?.[1] ?? Number.NaN) || null));
  });
}

export async function limit(setting: Setting): Promise<Findings> {
  const [single, piped] = [await mostOperations(setting, 1, setting.quick), await mostOperations(setting, 16, setting.quick)]; // biome-ignore format: one line
  log(`redis-benchmark: ${single} operations a second, ${piped} in pipelines of 16`);
  const fleet = await Fleet.start(setting, model, { workers: 8, perProcess: 8, gateways: 2 });
  const pictures = setting.quick ? 400 : 4000;
  try {
    const load = (jobs: number) => Promise.all(fleet.gateways.map((gateway) => gateway.load(64, jobs / 2, asked)));
    await load(200);
    const before = await usageOf(setting, fleet);
    const start = performance.now();
    await load(pictures);
    const seconds = (performance.now() - start) / 1000;
    const { redisMs, gatewayMs, workerMs, commands } = difference(await usageOf(setting, fleet), before);
    const operations = [...commands.values()].reduce((sum, calls) => sum + calls, 0);
    const perSecond = pictures / seconds;
    const core = (ms: number) => ms / 1000 / seconds;
    const carried = (1000 * pictures) / redisMs;
    log(`saturated: ${perSecond.toFixed(0)} pictures a second, Redis ${core(redisMs).toFixed(2)} cores`);
    const rows = [
      ["pictures a second, 8 workers in one process, 2 gateways", perSecond.toFixed(0)],
      ["Redis operations a second", (operations / seconds).toFixed(0)],
      ["operations a picture", (operations / pictures).toFixed(1)],
      ["cores: Redis", core(redisMs).toFixed(2)],
      ["cores: gateways", core(gatewayMs).toFixed(2)],
      ["cores: workers", core(workerMs).toFixed(2)],
      ["µs of Redis a picture", ((1000 * redisMs) / pictures).toFixed(0)],
      ["pictures a second of one core of Redis, from that", carried.toFixed(0)],
      ["redis-benchmark, SET of 200 bytes, operations a second", single === null ? "not measured" : single.toFixed(0)],
      ["the same in pipelines of 16", piped === null ? "not measured" : piped.toFixed(0)],
    ];
    return {
      bars: [],
      results: { pictures, perSecond, operations: operations / pictures, redisMs: redisMs / pictures, carried, single, piped }, // biome-ignore format: one line
      page: `## Where Redis is the limit

Workers whose launches take no time, so that all that is measured is the fleet's own work; pictures of 64 px, whose results are kept in Redis. Redis runs commands on one core: what a picture takes of it says how many pictures a
second one Redis carries, whatever the workers do. Larger pictures take more of it.

${table([["", ""], ...rows])}`,
    };
  } finally {
    await fleet.stop();
  }
}
