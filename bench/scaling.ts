/**
 * How time and memory grow: a model of SD3.5-medium's width with random weights, from one base point along one axis at a
 * time: steps, pictures a batch, size, layers. Every point is a process of its own, whose peak is the resident size of
 * all its processes; rounds go through all points in turn. A line through the medians of each axis gives the fixed cost
 * and the cost of one unit more, of sampling and of the whole process; size is counted in image tokens. Threads under
 * quotas and beside busy neighbours are a part of its own, with a page of its own (contention.ts).
 *
 *   npm run bench:scaling -- [--rounds 3] [--only steps,batch,threads] [--small]   (--small: nothing that takes more than seconds)
 */

import { mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { gigabytes } from "../lib/common/memory.js";
import { measureContention } from "./contention.js";
import { svg } from "./plot.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import {
  format,
  line,
  machineLine,
  measureProcess,
  report,
  resultsFolder,
  root,
  type Spread,
  spread,
  table,
} from "./support.js";

const { values: flags } = parseArgs({
  options: {
    rounds: { type: "string", default: "3" },
    only: { type: "string" },
    small: { type: "boolean", default: false },
  },
});
const rounds = Number(flags.rounds);
const parts = flags.only?.split(",");
if (parts?.includes("threads") ?? true) await measureContention(rounds);
if (parts?.every((part) => part === "threads")) process.exit();

interface Point {
  readonly layers: number;
  readonly size: number;
  readonly batch: number;
  readonly steps: number;
}
const base: Point = { layers: 2, size: 256, batch: 1, steps: 2 };
const axes = {
  steps: flags.small ? [1, 2, 4] : [1, 2, 4, 8],
  batch: flags.small ? [1, 2] : [1, 2, 4, 8],
  size: flags.small ? [256, 320] : [256, 512, 768, 1024],
  layers: flags.small ? [2, 3] : [2, 4, 6, 8],
} as const;
type Axis = keyof typeof axes;
const units: Record<Axis, string> = { steps: "step", batch: "picture", size: "1,000 image tokens", layers: "layer" };
/** Latents have a side of size / 8, patches are 2 × 2. */
const unit = (axis: Axis, value: number) => (axis === "size" ? (value / 16) ** 2 / 1000 : value);
const chosen = (Object.keys(axes) as Axis[]).filter((axis) => parts?.includes(axis) ?? true);

/** What each round measured, by point. */
interface Measured {
  readonly point: Point;
  readonly sampling: number[];
  /** From process start to the end. */
  readonly process: number[];
  readonly peak: number[];
}
const known = new Map<string, Measured>();
for (const axis of chosen)
  for (const value of axes[axis]) {
    const point = { ...base, [axis]: value };
    known.set(JSON.stringify(point), { point, sampling: [], process: [], peak: [] });
  }
const at = (axis: Axis, value: number) => known.get(JSON.stringify({ ...base, [axis]: value }))!;

async function measure({ point, ...found }: Measured): Promise<void> {
  const { folder } = await randomCheckpoint(point.layers, true);
  const what = ["x", "--model", folder, "--sampler", "euler", "--steps", String(point.steps), "--seed", "1"];
  const size = ["--width", String(point.size), "--height", String(point.size), "--count", String(point.batch)];
  const out = ["--json", "--out", path.join(root, "bench/.work/scaling-{index}.png")];
  const { stdout, milliseconds, peak } = await measureProcess(process.execPath, [
    ...[path.join(root, "dist/cli.js"), "generate", ...what, ...size, ...out],
  ]);
  const { steps } = (JSON.parse(stdout) as { milliseconds: { steps: number[] } }).milliseconds;
  const sampling = steps.reduce((a, b) => a + b, 0);
  found.sampling.push(sampling);
  found.process.push(milliseconds);
  found.peak.push(peak);
  console.log(
    `${point.layers} layers, ${point.size}², ${point.batch} pictures, ${point.steps} steps: sampling ${(sampling / 1000).toFixed(2)} s, peak ${gigabytes(peak)} GB`,
  );
}

// The checkpoint of the first point is written, and the disk's cache is warm.
await measure({ point: base, sampling: [], process: [], peak: [] });
for (let round = 0; round < rounds; round++) {
  console.log(`\nround ${round + 1} of ${rounds}`);
  for (const measured of known.values()) await measure(measured);
}

interface Fit {
  readonly fixed: number;
  readonly slope: number;
  /** Largest distance of a median from the line, as a part of the median. */
  readonly deviation: number;
}
function fittedLine(points: readonly (readonly [x: number, y: number])[]): Fit {
  const { fixed, slope } = line(points);
  const deviation = Math.max(...points.map(([x, y]) => Math.abs(fixed + slope * x - y) / y));
  return { fixed, slope, deviation };
}

mkdirSync(resultsFolder, { recursive: true });
const results: Record<string, unknown> = {};
const page = [
  "# Scaling on the CPU",
  "",
  `\`npm run bench:scaling\`. From ${base.layers} layers of SD3.5-medium's width (random weights), ${base.size} × ${base.size}, one picture, ${base.steps} Euler steps with guidance; one axis at a time, every point in a`,
  `process of its own, median and range of ${rounds} rounds. Lines are fitted through the medians. The first step makes the session, which is part of the fixed cost.`,
  "",
];
for (const axis of chosen) {
  const points = axes[axis].map((value) => {
    const { point, ...found } = at(axis, value);
    const spreads = { sampling: spread(found.sampling), process: spread(found.process), peak: spread(found.peak) };
    return { ...point, ...spreads };
  });
  const fitted = (of: (point: (typeof points)[number]) => Spread) =>
    fittedLine(points.map((point) => [unit(axis, point[axis]), of(point).median]));
  const fits = {
    sampling: fitted(({ sampling }) => sampling),
    process: fitted(({ process }) => process),
    peak: fitted(({ peak }) => peak),
  };
  results[axis] = { unit: units[axis], points, fits };
  const scaled = ({ median, min, max, runs }: Spread, by: number) => ({
    ...{ median: median / by, min: min / by, max: max / by, runs },
  });
  const said = (name: string, { fixed, slope, deviation }: Fit, by: number, what: string) =>
    `| ${name} | ${(fixed / by).toFixed(2)} ${what} | ${(slope / by).toFixed(3)} ${what} a ${units[axis]} | ${(100 * deviation).toFixed(0)} % |`;
  page.push(
    `## ${axis}`,
    "",
    table([
      [axis, "sampling, s", "process start to PNG, s", "peak, GB"],
      ...points.map((point) => [
        point[axis],
        ...[point.sampling, point.process].map((value) => format(scaled(value, 1000))),
        format(scaled(point.peak, 1e9)),
      ]),
    ]),
    "",
    "| fitted | fixed | slope | farthest point |",
    "| --- | --- | --- | --- |",
    said("sampling", fits.sampling, 1000, "s"),
    said("process start to PNG", fits.process, 1000, "s"),
    said("peak memory", fits.peak, 1e9, "GB"),
    "",
  );
  const ends = [points[0]!, points.at(-1)!].map((point) => unit(axis, point[axis]));
  for (const [measure, label, by] of [
    ["sampling", "sampling, seconds", 1000],
    ["peak", "peak memory, GB", 1e9],
  ] as const) {
    const name = `scaling-${axis}${measure === "peak" ? "-memory" : ""}.svg`;
    const chart = svg({
      title: `${measure === "peak" ? "Peak memory" : "Sampling time"} against ${axis}`,
      x: { label: axis === "size" ? "image tokens, thousands" : axis },
      y: { label, from: 0 },
      series: [
        {
          name: "measured",
          points: points.map((point) => {
            const { median, min, max } = scaled(point[measure], by);
            return { x: unit(axis, point[axis]), y: median, low: min, high: max };
          }),
        },
        {
          name: "fitted line",
          line: true,
          points: ends.map((x) => ({ x, y: (fits[measure].fixed + fits[measure].slope * x) / by })),
        },
      ],
    });
    writeFileSync(path.join(resultsFolder, name), chart);
    page.push(`![](${name})`, "");
  }
}
page.push(
  "Size: attention grows with the square of the tokens, so that a line through sizes is a rough guide only; its farthest point says how rough.",
  "",
  machineLine(),
);
await report("scaling", { base, rounds, axes: results }, page.join("\n"));
