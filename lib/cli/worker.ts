/**
 * `flowturbo worker`: models of this process that draw the jobs of a fleet. It joins when they have been loaded and have drawn once, so that no job waits
 * for a slow first launch.
 */

import type { Command } from "commander";
import { type FleetWorker, startWorker } from "../fleet/index.js";
import { workerSchema } from "../fleet/options.js";
import { checkRedis, hostOf } from "../fleet/redis.js";
import type { ImageModel } from "../model.js";
import { checkOptions, loadSchema } from "../options.js";
import { LoadedModels } from "../server/models.js";
import { serverSchema } from "../server/options.js";
import { type ProbeServer, startProbes } from "../server/probes.js";
import { addFlags, readFlags } from "./flags.js";
import { portError, untilEnd } from "./listening.js";
import { type LogFormat, logger, logLevels } from "./log.js";
import { number, whole } from "./numbers.js";
import { addRedisFlag, type RedisFlag, redisOf } from "./redis.js";
import { addServedModels, foldersOf, loadServed, servedLoadOptions } from "./served-models.js";

const warmSchema = serverSchema.pick({ warm: true });

interface Flags {
  redis?: RedisFlag;
  model?: string[];
  drain: string;
  metricsPort?: string;
  metricsHost: string;
  logLevel: string;
  logFormat?: LogFormat;
}

/** @param whenEnded called when the worker has ended as it should after a signal */
export function workerCommand(command: Command, signal: AbortSignal, whenEnded: () => void): void {
  command.description(
    "Draw the jobs of a fleet with models of this machine. Requests come from gateways: `flowturbo serve --redis`.",
  );
  addRedisFlag(command, "Redis of the fleet");
  addServedModels(command);
  addFlags(command, workerSchema, warmSchema, loadSchema);
  command
    .option(
      "--drain <seconds>",
      "time that jobs under way have after SIGTERM; what is not done then starts again elsewhere",
      "30",
    )
    .option("--metrics-port <n>", "port of /livez, /readyz and /metrics; 0 takes a free one (default: none)")
    .option(
      "--metrics-host <address>",
      "address of that port; 0.0.0.0 for probes and metrics from other machines",
      "127.0.0.1",
    )
    .option("--log-level <level>", `what is logged: ${logLevels.join(", ")}`, "info")
    .option("--log-format <format>", "json, or text for people (default: text on a terminal)")
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo worker --redis redis://127.0.0.1:6379
  $ flowturbo worker --redis redis://127.0.0.1:6379 --model ./stable-diffusion-3.5-medium --warm 1024x1024,832x1216
  $ flowturbo worker --model best=./sd3.5-large --metrics-port 9100 --metrics-host 0.0.0.0

The last one finds the address in FLOWTURBO_REDIS.`,
    )
    .action((flags: Flags) => work(flags, signal, whenEnded));
}

async function work(flags: Flags, signal: AbortSignal, whenEnded: () => void): Promise<void> {
  // 1. What can be checked without a model.
  const redis = redisOf(flags.redis);
  const drainMs = 1000 * number("drain", flags.drain, 3600);
  const port = flags.metricsPort === undefined ? null : whole("metricsPort", flags.metricsPort, 65_535);
  const loadOptions = servedLoadOptions(flags, "worker", { signal });
  const { warm } = checkOptions(warmSchema, readFlags(warmSchema, flags), "worker");
  const folders = foldersOf(flags.model);
  const log = logger(flags.logLevel, flags.logFormat);
  const options = { ...readFlags(workerSchema, flags), redis, logger: log.child };
  checkOptions(workerSchema.omit({ models: true }), options, "worker");
  await checkRedis(redis);
  if (signal.aborted) return whenEnded();

  // 2. Models load, draw once, and join.
  const ending = new AbortController();
  const end = (error: unknown) => ending.abort(error);
  const { loading, dispose } = loadServed(folders, loadOptions, log.child, end);
  const models = new LoadedModels(loading, warm ?? null);
  let worker: FleetWorker | null = null;
  let probes: ProbeServer | null = null;
  const obstacles = () => {
    if (models.obstacles.length > 0) return models.obstacles;
    if (!worker) return ["The worker is joining the fleet."];
    return worker.isAtWork ? [] : ["The worker fetches no jobs: it is ending, or Redis cannot be reached."];
  };
  try {
    if (port !== null) {
      const { metricsHost: host } = flags;
      probes = await startProbes({ host, port, models: () => models.models, obstacles }).catch((error) => {
        throw portError("--metrics-port", host, port, error);
      });
      log.note("metrics", { address: probes.address });
    }
    models.ready.catch(end);
    await Promise.race([models.ready.catch(() => {}), untilEnd(signal, ending.signal)]);
    if (!signal.aborted && !ending.signal.aborted) {
      const loaded: Record<string, ImageModel> = Object.fromEntries(models.models);
      worker = await startWorker({ ...options, models: loaded });
      log.note("joined the fleet", { worker: worker.id, models: models.ids, redis: hostOf(redis) });
      await untilEnd(signal, ending.signal);
    }
  } finally {
    if (worker) {
      const { id } = worker;
      log.note("leaving the fleet", { worker: id, jobs: worker.jobs });
      await worker.close({ drainMs });
      log.note("left the fleet", { worker: id });
    }
    await probes?.close();
    await dispose();
  }
  if (signal.aborted) whenEnded();
  else throw ending.signal.reason;
}
