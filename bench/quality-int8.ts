/**
 * Quality with the weights in int8 against float32, on the embedded model: the same captions and the same noise, drawn by both in turn with the
 * default schedule and with 28 Euler steps, judged by rule (bench/shapes/detector.ts), by a Fréchet distance to exact renders, and by PSNR of one
 * to the other.
 *
 *   npm run bench:quality-int8 -- [--captions 1000] [--guidance 2] [--threads 1]
 */

import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import type { Verdict } from "./shapes/detector.js";
import { Features, frechetDistance } from "./shapes/frechet.js";
import { draw, judged, psnr } from "./shapes/pictures.js";
import { drawScenes, randomNumbers, render } from "./shapes/world.js";
import { machineLine, meanInterval, ratios, report, table } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    captions: { type: "string", default: "1000" },
    guidance: { type: "string", default: "2" },
    threads: { type: "string" },
  },
});
const count = Number(flags.captions);
const guidanceScale = Number(flags.guidance);
const atOnce = 25;
/** What is asked of int8: points of accuracy, and the distance as a part of float32's. */
const bars = { points: 0.5, distance: 0.02 };

const schedules: Record<string, Omit<GenerateOptions, "prompt" | "seed">> = {
  "default (10 steps)": {},
  "Euler, 28 steps": { sampler: "euler", steps: 28, grid: "shifted" },
};

const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-quality-int8-"));
const settings = {
  runtime: "onnxruntime",
  measureCosts: false,
  cache,
  threads: flags.threads ? Number(flags.threads) : undefined,
} as const;
const models = {
  float: await FlowTurbo.load(undefined, settings),
  int8: await FlowTurbo.load(undefined, { ...settings, weights: "int8" }),
};
const features = await Features.open();
const scenes = drawScenes(7_000_003, count);

/** What one of the two made of all captions with a schedule. */
interface Drawn {
  readonly verdicts: Verdict[];
  readonly features: number[][];
  /** Sampling, for each launch of captions. */
  readonly milliseconds: number[];
}

async function compared(options: Omit<GenerateOptions, "prompt" | "seed">) {
  const newDrawn = (): Drawn => ({ verdicts: [], features: [], milliseconds: [] });
  const drawn = { float: newDrawn(), int8: newDrawn() };
  const decibels: number[] = [];
  for (let start = 0; start < count; start += atOnce) {
    const own = scenes.slice(start, start + atOnce);
    const order = (start / atOnce) % 2 ? (["int8", "float"] as const) : (["float", "int8"] as const);
    const results = new Map<string, Awaited<ReturnType<typeof draw>>>();
    for (const kind of order) {
      const result = await draw(models[kind], own, start, { guidanceScale, ...options });
      results.set(kind, result);
      drawn[kind].verdicts.push(...judged(result, own));
      drawn[kind].features.push(...(await features.of(result.images)));
      drawn[kind].milliseconds.push(result.timings.steps.reduce((sum, step) => sum + step, 0));
    }
    const exact = results.get("float")!.images;
    decibels.push(...results.get("int8")!.images.map((image, row) => psnr(image, exact[row]!.data)));
    if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${start + own.length} of ${count}`);
  }
  return { ...drawn, decibels };
}

const isRight = ({ ground, colours, shapes, relation }: Verdict) => ground && colours && shapes && relation !== false;
const accuracyOf = ({ verdicts }: Drawn) => verdicts.filter(isRight).length / verdicts.length;
const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** 95 % interval of int8's distance over float32's: captions are drawn again, the same for both. */
function distanceInterval(float: Drawn, int8: Drawn, truth: number[][], times = 40): [number, number] {
  const random = randomNumbers(1);
  const found = Array.from({ length: times }, () => {
    const picked = Array.from({ length: count }, () => Math.floor(random() * count));
    const [a, b] = [int8, float].map((each) =>
      frechetDistance(
        picked.map((i) => each.features[i]!),
        truth,
      ),
    );
    return a! / b!;
  }).sort((a, b) => a - b);
  return [found[Math.floor(times * 0.025)]!, found[Math.ceil(times * 0.975) - 1]!];
}

const truth = await features.of(
  drawScenes(9_000_011, Math.max(count, 1000)).map((scene) => render(scene, models.float.nativeSize.width)),
);
const rows: Record<string, unknown>[] = [];
const lines: string[][] = [];
const findings: string[] = [];
for (const [name, options] of Object.entries(schedules)) {
  const { float, int8, decibels } = await compared(options);
  const accuracy = { float: accuracyOf(float), int8: accuracyOf(int8) };
  const changes = int8.verdicts.map((verdict, i) => Number(isRight(verdict)) - Number(isRight(float.verdicts[i]!)));
  const { margin } = meanInterval(changes);
  const distance = { float: frechetDistance(float.features, truth), int8: frechetDistance(int8.features, truth) };
  const interval = distanceInterval(float, int8, truth);
  const time = ratios(int8.milliseconds, float.milliseconds).median;
  const points = 100 * (accuracy.int8 - accuracy.float);
  const part = distance.int8 / distance.float - 1;
  rows.push({
    name,
    accuracy,
    points,
    pointsMargin: 100 * margin,
    distance,
    distanceInterval: interval,
    psnr: mean(decibels),
    time,
  });
  lines.push([
    ...[name, `${(100 * accuracy.float).toFixed(1)} %`, `${(100 * accuracy.int8).toFixed(1)} %`],
    `${points >= 0 ? "+" : ""}${points.toFixed(1)} (±${(100 * margin).toFixed(1)})`,
    ...[distance.float.toFixed(3), distance.int8.toFixed(3)],
    `${part >= 0 ? "+" : ""}${(100 * part).toFixed(1)} % (${interval.map((ratio) => (100 * (ratio - 1)).toFixed(1)).join(" to ")})`,
    ...[mean(decibels).toFixed(1), time.toFixed(2)],
  ]);
  const isWithin = Math.abs(points) <= bars.points && part <= bars.distance;
  findings.push(
    `${name}: ${isWithin ? "within" : "not within"} half a point of accuracy and 2 % of the Fréchet distance of float32 (${points.toFixed(1)} points, ${(100 * part).toFixed(1)} %).`,
  );
}
for (const model of Object.values(models)) await model.dispose();
rmSync(cache, { recursive: true });
const header = [
  ...[
    "schedule",
    "right, float32",
    "right, int8",
    "difference, points",
    "Fréchet distance, float32",
    "int8",
    "difference",
  ],
  ...["PSNR of int8 to float32, dB", "sampling time, int8 / float32"],
];
console.log(findings.join("\n"));
await report(
  "quality-int8",
  { captions: count, guidance: guidanceScale, findings, rows },
  [
    "# Quality with weights in int8",
    "",
    `\`npm run bench:quality-int8 -- --captions ${count} --guidance ${guidanceScale}\` on ${machineLine()}`,
    "",
    `${count} captions, one picture each, seeds 0 to ${count - 1}, at guidance ${guidanceScale}, drawn by the embedded model in float32 and in int8 in turn. Right is what is right in ground, colours, shapes and relation; differences are picture by picture, with their 95 % intervals (bootstrap for the distance). Times are of ${atOnce} captions at once, medians of the ratios; this model is far narrower than the public ones, so that they say nothing of those.`,
    "",
    ...findings.map((line) => `- ${line}`),
    "",
    table([header, ...lines]),
  ].join("\n"),
);
