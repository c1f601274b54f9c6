/**
 * How free the event loop stays while pictures are drawn: delays at 10 ms resolution, idle and during a generation.
 * Bar: the 99th percentile under 25 ms.
 *
 *   npx tsx bench/event-loop.ts
 */

import { monitorEventLoopDelay } from "node:perf_hooks";
import { setTimeout as sleep } from "node:timers/promises";
import { FlowTurbo } from "flowturbo";
import { machineLine, report, table } from "./support.js";

await using model = await FlowTurbo.load(undefined, { measureCosts: false });
const measure = async (work: () => Promise<unknown>) => {
  const delay = monitorEventLoopDelay({ resolution: 10 });
  delay.enable();
  await work();
  delay.disable();
  return { p50: delay.percentile(50) / 1e6, p99: delay.percentile(99) / 1e6, max: delay.max / 1e6 };
};
const draw = (size: number, steps: number) => () =>
  model.generate({ prompt: "a large red square", width: size, height: size, steps, seed: 1 });
await draw(256, 1)();
const results = {
  idle: await measure(() => sleep(3000)),
  "64 x 64": await measure(draw(64, 400)),
  "256 x 256": await measure(draw(256, 30)),
};
for (const [name, { p50, p99, max }] of Object.entries(results))
  console.log(`${name.padEnd(10)} p50 ${p50.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms, max ${max.toFixed(1)} ms`);
const rows = Object.entries(results).map(([name, values]) => [
  name,
  ...[values.p50, values.p99, values.max].map((value) => value.toFixed(1)),
]);
const page = [
  "# Delay of the event loop during a generation",
  "",
  "`perf_hooks.monitorEventLoopDelay` at a resolution of 10 ms, which is also what it reads when nothing delays it. Bar: 99th percentile under 25 ms. `npm run bench:event-loop`.",
  "",
  table([["while", "p50, ms", "p99, ms", "max, ms"], ...rows]),
  "",
  machineLine(),
];
await report("event-loop", { bar: { p99: 25 }, milliseconds: results }, page.join("\n"));
