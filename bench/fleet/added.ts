/** What queue and gateway add to the time of one request while nothing else is asked for: in the caller's process, by a FleetModel, over HTTP, in turn. */

import { FleetProcess } from "../../test/support/fleet/processes.js";
import { type Findings, log, quantile, table } from "../support.js";
import { asked, Fleet, processorMsOf, type Setting } from "./setting.js";

const model = { msPerLaunch: 5, msPerRow: 0.5, maxBatch: 8 };

export async function added(setting: Setting): Promise<Findings> {
  const requests = setting.quick ? 40 : 300;
  const library = await FleetProcess.start({ role: "library", model, cache: setting.cache });
  const fleet = await Fleet.start(setting, model, { workers: 1, http: true });
  const [gateway] = fleet.gateways as [FleetProcess];
  let seed = 1;
  /** Each measures from the call to the pictures, within the process that calls. */
  const ways: Record<string, () => Promise<number>> = {
    library: async () => (await library.load(1, 1, asked)).latencies[0]!,
    fleet: async () => (await gateway.load(1, 1, asked)).latencies[0]!,
    http: async () => {
      const { prompt, steps, guidanceScale } = asked.request;
      const start = performance.now();
      const answer = await fetch(`http://127.0.0.1:${gateway.port}/v1/images/generations`, {
        ...{ method: "POST", headers: { "content-type": "application/json" } },
        body: JSON.stringify({ prompt, num_inference_steps: steps, guidance_scale: guidanceScale, seed: seed++ }),
      });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      return performance.now() - start;
    },
  };
  const names = Object.keys(ways);
  const times: Record<string, number[]> = Object.fromEntries(names.map((name) => [name, []]));
  const processor: Record<string, number> = Object.fromEntries(names.map((name) => [name, 0]));
  const all = [library, ...fleet.gateways, ...fleet.workers].map(({ process }) => process.pid);
  const processorMs = () => [...all, setting.redis.pid].reduce((sum, pid) => sum + processorMsOf(pid), 0);
  try {
    for (let turn = -20; turn < requests; turn++) {
      const order = turn % 2 ? [...names].reverse() : names;
      for (const name of order) {
        const milliseconds = await ways[name]!();
        if (turn >= 0) times[name]!.push(milliseconds);
      }
    }
    // Of the same length one after another, since the clock of processor time is coarse.
    for (const name of names) {
      const before = processorMs();
      for (let turn = 0; turn < requests; turn++) await ways[name]!();
      processor[name] = (processorMs() - before) / requests;
    }
  } finally {
    await library.stop();
    await fleet.stop();
  }
  const more = (name: string, than: string) => times[name]!.map((value, turn) => value - times[than]![turn]!);
  const rows = [
    { name: "in the caller's process", values: times.library! },
    { name: "by a FleetModel", values: times.fleet! },
    { name: "over HTTP", values: times.http! },
    { name: "a FleetModel adds", values: more("fleet", "library") },
    { name: "HTTP adds to that", values: more("http", "fleet") },
  ].map(({ name, values }) => ({ name, p50: quantile(values, 0.5), p95: quantile(values, 0.95) }));
  log(`processor time of a request: ${names.map((name) => `${name} ${processor[name]!.toFixed(1)} ms`).join(", ")}`);
  for (const { name, p50, p95 } of rows) log(`${name}: p50 ${p50.toFixed(2)} ms, p95 ${p95.toFixed(2)} ms`);
  const byFleet = rows[3]!;
  return {
    bars: [
      {
        bar: "Queue and gateway add less than 10 ms to one request at idle (median)",
        value: `${byFleet.p50.toFixed(1)} ms`,
        met: byFleet.p50 < 10,
      },
    ],
    results: { requests, model, rows, processorMs: processor },
    page: `## Time added to one request

${requests} requests of each kind in turn, one at a time: the model in its caller's process, a FleetModel with one worker, and the same over HTTP, with a PNG in base64. Differences are of requests that follow each other.

${table([["", "p50 ms", "p95 ms"], ...rows.map(({ name, p50, p95 }) => [name, p50.toFixed(2), p95.toFixed(2)])])}

Processor time of a request, all processes but the HTTP client together, beats and polls of the worker included: ${processor.library!.toFixed(1)} ms in the caller's process, ${processor.fleet!.toFixed(1)} ms by a FleetModel, ${processor.http!.toFixed(1)} ms over HTTP.`,
  };
}
