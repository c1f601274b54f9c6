/**
 * Calibrated schedules where they were not calibrated for: at guidance scales and sizes of which schedules.json holds nothing (entries of
 * its own are left out of the file that is drawn with), on captions and noises that calibration has not seen. Mean PSNR in dB to 100
 * evaluations from the same noise; differences are taken picture by picture. Writes bench/results/transfer.{json,md}.
 *
 *   npm run bench:transfer [-- --captions 48 --steps 4,6,8,10 --threads 1]
 */

import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { psnr } from "./shapes/pictures.js";
import { calibratedEntries, shapesVariant } from "./shapes/variants.js";
import { caption, drawScenes, type Pixels } from "./shapes/world.js";
import { machineLine, mean, meanInterval, report, root, table } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    captions: { type: "string", default: "48" },
    steps: { type: "string", default: "4,6,8,10" },
    threads: { type: "string" },
  },
});
const captions = drawScenes(7_700_001, Number(flags.captions)).map(caption);
const counts = flags.steps.split(",").map(Number);

interface Case {
  readonly size: number;
  readonly guidance: number;
}
const cases: readonly Case[] = [
  { size: 64, guidance: 3 },
  { size: 96, guidance: 2 },
  { size: 96, guidance: 4.5 },
  { size: 128, guidance: 2 },
  { size: 128, guidance: 4.5 },
];

/** Whether something was calibrated for this very size and scale. */
const isOwn = ({ size, guidance }: Case) =>
  calibratedEntries.some(({ width, guidanceScale }) => width === size && guidanceScale === guidance);

/** The embedded model without what was calibrated for a size, or all of it where that size or scale has none of its own. */
async function strangerTo({ size, guidance }: Case): Promise<FlowTurbo> {
  const isOwnSize = isOwn({ size, guidance });
  const folder = shapesVariant(`transfer/${size}-${guidance}`, { isKept: ({ width }) => width !== size || !isOwnSize });
  return FlowTurbo.load(folder, settings);
}
const settings = {
  measureCosts: false,
  ...(flags.threads && { threads: Number(flags.threads) }),
  cache: path.join(root, "bench/.work/transfer/cache"),
};

interface Row extends Case {
  readonly steps: number;
  /** Rows of the predictor for a picture. */
  readonly rows: number;
  /** Mean PSNR, dB. */
  readonly calibrated: number;
  readonly uncalibrated: number;
  readonly dpmpp: number;
  /** Where schedules were calibrated for this very size and scale. */
  readonly own: number | null;
  /** Of calibrated over uncalibrated, dB, and its 95 % interval. */
  readonly gain: number;
  readonly gainInterval: readonly [number, number];
}

const embedded = await FlowTurbo.load(undefined, settings);
const rows: Row[] = [];
for (const each of cases) {
  const stranger = await strangerTo(each);
  const drawn = async (model: FlowTurbo, options: Omit<GenerateOptions, "prompt">) => {
    const pictures: Pixels[] = [];
    let evaluated = 0;
    for (let start = 0; start < captions.length; start += 16) {
      const prompt = captions.slice(start, start + 16);
      const place = { width: each.size, height: each.size, guidanceScale: each.guidance, seed: 40_000 + start };
      const { images, evaluations } = await model.generate({ ...place, ...options, prompt });
      pictures.push(...images);
      evaluated = evaluations.rows;
    }
    return { pictures, rows: evaluated };
  };
  const reference = await drawn(embedded, { blocks: "H50" });
  const decibels = async (model: FlowTurbo, options: Omit<GenerateOptions, "prompt">) => {
    const { pictures, rows } = await drawn(model, options);
    return { values: pictures.map((picture, i) => psnr(picture, reference.pictures[i]!.data)), rows };
  };
  for (const steps of counts) {
    const calibrated = await decibels(stranger, { steps, grid: "calibrated" });
    const usual = await decibels(stranger, { steps, grid: "eased" });
    const rival = await decibels(stranger, { steps, sampler: "dpmpp_2m" });
    const own = isOwn(each) ? await decibels(embedded, { steps, grid: "calibrated" }) : null;
    const { mean: gain, margin } = meanInterval(calibrated.values.map((value, i) => value - usual.values[i]!));
    rows.push({
      ...{ ...each, steps, rows: calibrated.rows, gain, gainInterval: [gain - margin, gain + margin] },
      ...{ calibrated: mean(calibrated.values), uncalibrated: mean(usual.values), dpmpp: mean(rival.values) },
      own: own && mean(own.values),
    });
    console.log(JSON.stringify(rows.at(-1)));
  }
  await stranger.dispose();
}
await embedded.dispose();

const scales = [...new Set(calibratedEntries.map((each) => each.guidanceScale))];
const sizes = [...new Set(calibratedEntries.map((each) => each.width))];
const worse = rows.filter(({ gainInterval: [, high] }) => high < 0);
const better = rows.filter(({ gainInterval: [low] }) => low > 0);
await report(
  "transfer",
  { captions: captions.length, calibratedFor: { sizes, scales }, rows },
  [
    "# Calibrated schedules where they were not calibrated for",
    "",
    `\`npm run bench:transfer -- --captions ${captions.length}\` on ${machineLine()}`,
    "",
    `The embedded model is calibrated at ${sizes.join(" and ")} px and guidance ${scales.join(" and ")}. Here each size and scale is drawn with what was calibrated for others: scale 3 at 64 px with the scales beside it, a size with the other sizes alone. PSNR in dB to 100 evaluations, means of ${captions.length} captions and noises that calibration has not seen; the gain is over the uncalibrated schedule, picture by picture, with its 95 % interval.`,
    "",
    `Calibrated schedules of other sizes and scales are better than uncalibrated ones in ${better.length} of ${rows.length} cases, worse in ${worse.length}, and within the interval in the others.`,
    "",
    table([
      [
        "size",
        "guidance",
        "steps",
        "rows",
        "calibrated elsewhere",
        "calibrated here",
        "uncalibrated",
        "DPM++(2M)",
        "gain",
      ],
      ...rows.map((row) => [
        ...[row.size, row.guidance, row.steps, row.rows, row.calibrated.toFixed(2), row.own?.toFixed(2) ?? ""],
        ...[row.uncalibrated.toFixed(2), row.dpmpp.toFixed(2)],
        `${row.gain >= 0 ? "+" : ""}${row.gain.toFixed(2)} (${row.gainInterval.map((v) => v.toFixed(2)).join(" to ")})`,
      ]),
    ]),
  ].join("\n"),
);
