/** `flowturbo fleet status`: who is in a fleet, and how much there is to do. */

import type { Command } from "commander";
import { untilAborted } from "../common/abort.js";
import { openFleet } from "../fleet/index.js";
import { connectSchema } from "../fleet/options.js";
import { hostOf } from "../fleet/redis.js";
import type { FleetModelStatus, FleetStatus, FleetWorkerStatus } from "../fleet/status.js";
import { checkOptions } from "../options.js";
import { addFlags, addJsonFlag, readFlags } from "./flags.js";
import { print } from "./print.js";
import { addRedisFlag, type RedisFlag, redisOf } from "./redis.js";

const statusSchema = connectSchema.pick({ prefix: true });

interface Flags {
  redis?: RedisFlag;
  json?: boolean;
}

export function fleetCommand(command: Command, signal: AbortSignal): void {
  command.description("Look at a fleet of `flowturbo worker` and `flowturbo serve --redis`.");
  const status = command
    .command("status")
    .exitOverride()
    .description("Show the workers of a fleet with their devices and rates, and how much each model has to do.");
  addRedisFlag(status, "Redis of the fleet");
  addFlags(status, statusSchema);
  addJsonFlag(status)
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo fleet status --redis redis://127.0.0.1:6379
  $ flowturbo fleet status --json`,
    )
    .action((flags: Flags) => showStatus(flags, signal));
}

async function showStatus(flags: Flags, signal: AbortSignal): Promise<void> {
  const redis = redisOf(flags.redis);
  const { prefix } = checkOptions(statusSchema, readFlags(statusSchema, flags), "fleet status");
  const opening = openFleet({ redis, prefix });
  const fleet = await untilAborted(opening, signal).catch((error) => {
    // It may still come, and would keep the process.
    opening.then((late) => late.close()).catch(() => {});
    throw error;
  });
  try {
    const status = await untilAborted(fleet.status(), signal);
    print(flags.json, status, render(status, hostOf(redis)));
  } finally {
    await fleet.close();
  }
}

function render(status: FleetStatus, address: string): string {
  const { workers, models, at } = status;
  const lines = [`fleet at ${address}: ${counted(workers.length, "worker")}`];
  if (models.length > 0) lines.push("models:", ...models.map(modelText));
  if (workers.length > 0) lines.push("workers:", ...workers.flatMap((worker) => workerLines(worker, at)));
  else
    lines.push(
      "No worker is in it: nothing is drawn.",
      "      → start one, with the same Redis and prefix: flowturbo worker --redis <url>",
    );
  return lines.join("\n");
}

/** `  shapes: 2 workers, 3 jobs wait, 1 at work, done in about 4.2 s` */
function modelText({ id, workers, waiting, active, backlogSeconds }: FleetModelStatus): string {
  const jobs = waiting + active === 0 ? "no jobs" : `${waiting} waiting, ${active} at work`;
  const isKnown = workers > 0 && backlogSeconds > 0;
  return `  ${id}: ${counted(workers, "worker")}, ${jobs}${isKnown ? `, done in about ${duration(1000 * backlogSeconds)}` : ""}`;
}

function workerLines(
  { id, host, pid, version, state, since, silentMs, models }: FleetWorkerStatus,
  at: number,
): string[] {
  const silence = silentMs > 2000 ? `, silent for ${duration(silentMs)}` : "";
  return [
    `  ${state === "ready" ? "✔" : "✘"} ${host} (process ${pid}), flowturbo ${version}, ${state} for ${duration(at - since)}${silence}, ${id}`,
    ...models.map((model) => {
      const { runtime, devices, pictures, capacity, backlogSeconds, drawn, failed, perMinute, warm } = model;
      return `      ${[
        `${model.id} on ${[runtime, ...devices].filter((text) => text !== "").join(", ")}`,
        `${pictures} of ${counted(capacity, "picture")} at work`,
        ...(backlogSeconds > 0 ? [`${duration(1000 * backlogSeconds)} to do`] : []),
        `${drawn} drawn (${perMinute} a minute)${failed > 0 ? `, ${failed} failed` : ""}`,
        ...(warm.length > 0 ? [`warm: ${warm.join(" ")}`] : []),
      ].join("; ")}`;
    }),
  ];
}

const counted = (count: number, noun: string) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** `4.2 s`, `3 min`, `5 h` */
function duration(milliseconds: number): string {
  const seconds = milliseconds / 1000;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}
