/** Many requests of all kinds to one server: what stays of them. Linux. */

import { setTimeout as pause } from "node:timers/promises";
import { type Findings, log, percent, quantile, residentBytes, table } from "../support.js";
import { body, openService, type Service, type Setting } from "./setting.js";

const requests = 1000;
/** Between two samples. */
const batch = 25;
const callers = 8;
/** Ended jobs that the server keeps: what it keeps on purpose is at its bound early. */
const keepJobs = 20;

interface Sample {
  readonly requests: number;
  readonly megabytes: number;
  /** Before garbage is collected. */
  readonly before: number;
}

export async function memory(setting: Setting): Promise<Findings> {
  const service = await openService(setting, { keepJobs });
  const { client, server } = service;
  const samples: Sample[] = [];
  const counts: Record<string, number> = {};
  for (let from = 0; from < requests; from += batch) {
    const load = { body, callers, from, requests: batch };
    for (const [outcome, count] of Object.entries(await client.call<Record<string, number>>("mixed", load)))
      counts[outcome] = (counts[outcome] ?? 0) + count;
    await waitForRuns(service, 5000);
    // While there is memory enough V8 puts off collecting: what it keeps then is no growth.
    const before = residentBytes(server.pid) / 1e6;
    await server.call("collect");
    samples.push({ requests: from + batch, megabytes: residentBytes(server.pid) / 1e6, before });
  }
  const open = await waitForRuns(service, 5000);
  await service.stop();

  const sizes = samples.map(({ megabytes }) => megabytes);
  const quarter = samples.length / 4;
  const medians = [0, 1, 2, 3].map((index) =>
    quantile(sizes.slice(Math.round(index * quarter), Math.round((index + 1) * quarter)), 0.5),
  );
  const [, second, , last] = medians as [number, number, number, number];
  const most = Math.max(...samples.map(({ before }) => before));
  log(`memory: ${medians.map((median) => median.toFixed(0)).join(", ")} MB by quarters`);
  return {
    bars: [
      {
        bar: `${requests.toLocaleString("en")} requests of all kinds: resident memory in the last quarter at most 5 % above that in the second`,
        value: `${second.toFixed(0)} MB to ${last.toFixed(0)} MB, ${percent(last / second - 1, 1)} (before collecting at most ${most.toFixed(0)} MB)`,
        met: last <= 1.05 * second,
      },
      { bar: "Afterwards the server works on nothing", value: `${open} runs open`, met: open === 0 },
    ],
    results: { requests, batch, callers, keepJobs, counts, open, medians, most, samples },
    page: `## Memory

${callers} callers, requests of all kinds in turn. After every ${batch} garbage is collected, and the memory of the server and of the process that runs its graphs is read; medians by quarters. The server keeps ${keepJobs} jobs.

${table([["first quarter, MB", "second", "third", "last"], medians.map((median) => median.toFixed(1))])}

${table([["what became of a request", "how many"], ...Object.entries(counts).sort(([, a], [, b]) => b - a)])}`,
  };
}

/** Runs open as the server's metrics say, once there are none or the time is over. */
async function waitForRuns({ client }: Service, milliseconds: number): Promise<number> {
  const end = performance.now() + milliseconds;
  for (;;) {
    const open = Number((await client.call<string>("metrics")).match(/^flowturbo_runs_open (\d+)$/m)![1]);
    if (open === 0 || performance.now() > end) return open;
    await pause(20);
  }
}
