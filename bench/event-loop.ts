/**
 * How free the event loop stays while pictures are drawn: delays at 10 ms resolution, idle, during a generation, and with
 * inputs that were chosen to block it. Beside the delay, which grows with whatever else runs on the machine, the processor
 * time of the longest stretches between two turns of the loop, which does not.
 * Bar: the 99th percentile under 25 ms.
 *
 *   npx tsx bench/event-loop.ts
 */

import { monitorEventLoopDelay } from "node:perf_hooks";
import { setTimeout as sleep } from "node:timers/promises";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { machineLine, report, table } from "./support.js";

await using model = await FlowTurbo.load(undefined, { measureCosts: false });
const measure = async (work: () => Promise<unknown>) => {
  const delay = monitorEventLoopDelay({ resolution: 10 });
  const stretches: number[] = [];
  let last = process.cpuUsage();
  const timer = setInterval(() => {
    const { user, system } = process.cpuUsage(last);
    last = process.cpuUsage();
    stretches.push((user + system) / 1000);
  }, 2);
  delay.enable();
  const start = performance.now();
  await work();
  const seconds = (performance.now() - start) / 1000;
  delay.disable();
  clearInterval(timer);
  stretches.sort((a, b) => a - b);
  const longest = Math.max(0, ...stretches.slice(-1));
  return {
    ...{ p50: delay.percentile(50) / 1e6, p99: delay.percentile(99) / 1e6, max: delay.max / 1e6 },
    ...{ work99: stretches[Math.floor(stretches.length * 0.99)] ?? 0, workMax: longest, seconds },
  };
};
const draw = (options: Partial<GenerateOptions>) => () =>
  model.generate({ prompt: "a large red square", width: 64, height: 64, seed: 1, ...options });
await draw({ width: 256, height: 256, steps: 1 })();
await draw({ count: 8, steps: 4 })();

const words = "a large red circle above the small blue square ".repeat(22_000);
const texts: Record<string, string> = {
  "a prompt of a megabyte": words,
  "a word of a megabyte": "a".repeat(1e6),
  "a million spaces": `${" ".repeat(1e6)}a circle`,
  "100,000 commas": ",".repeat(1e5),
  "a megabyte of Chinese": "山水画中的小船".repeat(1e5),
  "emoji in words": `${"😀".repeat(400)} `.repeat(1000),
  "combining marks": `a${"\u0301\u0316".repeat(5e5)}`,
};
const side = 256;
const cases: Record<string, () => Promise<unknown>> = {
  idle: () => sleep(3000),
  "64 x 64": draw({ steps: 400 }),
  "256 x 256": draw({ width: 256, height: 256, steps: 30 }),
  ...Object.fromEntries(
    Object.entries(texts).map(([name, text]) => [
      name,
      draw({ prompt: text, negativePrompt: `${text} not`, steps: 40 }),
    ]),
  ),
  "300 prompts of 10 KB": draw({
    prompt: Array.from({ length: 300 }, (_, index) => `${index} ${words.slice(0, 10_000)}`),
    guidanceScale: 1,
    sampler: "euler",
    steps: 1,
  }),
  "40 calls at once, 100 KB each": () =>
    Promise.all(
      Array.from({ length: 40 }, (_, index) => draw({ prompt: `${index} ${words.slice(0, 1e5)}`, steps: 1 })()),
    ),
  "300 pictures": draw({ count: 300, steps: 1, sampler: "euler", guidanceScale: 1 }),
  "an original of 20 megapixels": draw({
    ...{ width: side, height: side, steps: 4 },
    image: { width: 5000, height: 4000, data: new Uint8Array(6e7) },
    mask: { width: 5000, height: 4000, data: new Uint8Array(6e7).fill(255, 0, 3e7) },
  }),
};
const results: Record<string, Awaited<ReturnType<typeof measure>>> = {};
for (const [name, work] of Object.entries(cases)) {
  results[name] = await measure(work);
  const { p50, p99, max, work99, workMax } = results[name];
  console.log(
    `${name.padEnd(30)} p50 ${p50.toFixed(1)} ms, p99 ${p99.toFixed(1)} ms, max ${max.toFixed(1)} ms; work p99 ${work99.toFixed(1)} ms, max ${workMax.toFixed(1)} ms`,
  );
}
const rows = Object.entries(results).map(([name, values]) => [
  name,
  ...[values.p50, values.p99, values.max, values.work99, values.workMax].map((value) => value.toFixed(1)),
]);
const page = [
  "# Delay of the event loop during a generation",
  "",
  "`perf_hooks.monitorEventLoopDelay` at a resolution of 10 ms, which is also what it reads when nothing delays it. Bar: 99th percentile under 25 ms. The last two columns are processor time between two turns of the loop, which other programs on the machine do not lengthen. `npm run bench:event-loop`.",
  "",
  table([["while", "p50, ms", "p99, ms", "max, ms", "work, p99, ms", "work, max, ms"], ...rows]),
  "",
  machineLine(),
];
await report("event-loop", { bar: { p99: 25 }, milliseconds: results }, page.join("\n"));
