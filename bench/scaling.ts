/**
 * How time and memory grow: a model of SD3.5-medium's width with random weights, from one base point along one axis at a
 * time: steps, pictures a batch, size, layers. Every point is a process of its own, whose peak is the resident size of
 * all its processes. A line through the points of each axis gives the fixed cost and the cost of one unit more; size is
 * counted in image tokens.
 *
 *   npm run bench:scaling -- [--full]      (--full: up to 1024², and 8 pictures)
 */

import { spawn } from "node:child_process";
import { writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { svg } from "./plot.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import { line, machineLine, report, residentBytes, resultsFolder, root, table } from "./support.js";

const { values: flags } = parseArgs({ options: { full: { type: "boolean", default: false } } });

interface Point {
  readonly layers: number;
  readonly size: number;
  readonly batch: number;
  readonly steps: number;
}
const base: Point = { layers: 2, size: 256, batch: 1, steps: 2 };
const axes = {
  steps: [1, 2, 4, 8],
  batch: flags.full ? [1, 2, 4, 8] : [1, 2, 4],
  size: flags.full ? [256, 512, 768, 1024] : [256, 384, 512],
  layers: flags.full ? [2, 4, 6, 8] : [2, 4, 8],
} as const;
type Axis = keyof typeof axes;
const units: Record<Axis, string> = { steps: "step", batch: "picture", size: "1,000 image tokens", layers: "layer" };
/** Latents have a side of size / 8, patches are 2 × 2. */
const unit = (axis: Axis, value: number) => (axis === "size" ? (value / 16) ** 2 / 1000 : value);

interface Measured extends Point {
  readonly sampling: number;
  readonly total: number;
  readonly peak: number;
}
const known = new Map<string, Measured>();

async function measure(point: Point): Promise<Measured> {
  const key = JSON.stringify(point);
  const before = known.get(key);
  if (before) return before;
  const { folder } = await randomCheckpoint(point.layers, true);
  const size = String(point.size);
  const args = [
    "generate",
    "x",
    "--model",
    folder,
    "--sampler",
    "euler",
    "--steps",
    String(point.steps),
    "--seed",
    "1",
  ];
  const more = ["--width", size, "--height", size, "--count", String(point.batch), "--json"];
  const out = ["--out", path.join(root, "bench/.work/scaling-{index}.png")];
  const child = spawn(process.execPath, [path.join(root, "dist/cli.js"), ...args, ...more, ...out], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let stdout = "";
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  let peak = 0;
  const poll = setInterval(() => {
    peak = Math.max(peak, residentBytes(child.pid!));
  }, 20);
  const code = await new Promise<number | null>((resolve) => child.on("close", resolve));
  clearInterval(poll);
  if (code !== 0) throw new Error(`flowturbo generate ended with code ${code} at ${key}`);
  const { milliseconds } = JSON.parse(stdout) as { milliseconds: { steps: number[]; total: number } };
  const sampling = milliseconds.steps.reduce((a, b) => a + b, 0);
  const measured = { ...point, sampling, total: milliseconds.total, peak };
  known.set(key, measured);
  console.log(
    `${point.layers} layers, ${point.size}², ${point.batch} pictures, ${point.steps} steps: sampling ${(sampling / 1000).toFixed(2)} s, peak ${(peak / 1e9).toFixed(2)} GB`,
  );
  return measured;
}

const results: Record<string, unknown> = {};
const page = [
  "# Scaling on the CPU",
  "",
  `From ${base.layers} layers of SD3.5-medium's width, ${base.size} × ${base.size}, one picture, ${base.steps} Euler steps with guidance; one axis at a time, every point in a process of its own.`,
  "",
];
for (const axis of Object.keys(axes) as Axis[]) {
  const points: Measured[] = [];
  for (const value of axes[axis]) points.push(await measure({ ...base, [axis]: value }));
  const time = line(points.map((point) => [unit(axis, point[axis]), point.sampling]));
  const memory = line(points.map((point) => [unit(axis, point[axis]), point.peak]));
  results[axis] = { points, time, memory, unit: units[axis] };
  page.push(
    `## ${axis}`,
    "",
    table([
      [axis, "sampling, s", "a step, s", "peak, GB"],
      ...points.map((point) => [
        ...[point[axis], (point.sampling / 1000).toFixed(2), (point.sampling / 1000 / point.steps).toFixed(2)],
        (point.peak / 1e9).toFixed(2),
      ]),
    ]),
    "",
    `Fitted: sampling ${(time.fixed / 1000).toFixed(2)} s + ${(time.slope / 1000).toFixed(2)} s a ${units[axis]}; peak ${(memory.fixed / 1e9).toFixed(2)} GB + ${(memory.slope / 1e9).toFixed(3)} GB a ${units[axis]}.`,
    "",
  );
  writeFileSync(
    path.join(resultsFolder, `scaling-${axis}.svg`),
    svg({
      title: `Sampling time against ${axis}`,
      x: { label: axis === "size" ? "image tokens, thousands" : axis },
      y: { label: "seconds", from: 0 },
      series: [
        { name: "measured", points: points.map((point) => ({ x: unit(axis, point[axis]), y: point.sampling / 1000 })) },
        {
          name: "fitted line",
          line: true,
          points: [points[0]!, points.at(-1)!].map((point) => {
            const x = unit(axis, point[axis]);
            return { x, y: (time.fixed + time.slope * x) / 1000 };
          }),
        },
      ],
    }),
  );
  page.push(`![](scaling-${axis}.svg)`, "");
}
page.push(machineLine());
await report("scaling", { base, axes: results }, page.join("\n"));
