/**
 * Measures how near the calibrated schedules of the embedded model come, on captions and noises that neither calibration nor the quality
 * benchmark has seen, and writes `psnr.held` and `psnr.uncalibrated` of each into the file. Calibration measures that on as many pictures
 * as it fits to; these are more, so that what decides between patterns of guided steps is firmer. Against 100 evaluations.
 *
 *   npx tsx --tsconfig bench/tsconfig.json bench/measure-schedules.ts [--captions 96 --size 64 --guidance 2 --file models/shapes/schedules.json --threads 1]
 */

import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { formatted } from "../lib/generation/calibrate.js";
import { type CalibratedEntry, shapesFolder, shapesVariant } from "./shapes/variants.js";
import { caption, drawScenes } from "./shapes/world.js";
import { mean, root } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    captions: { type: "string", default: "96" },
    size: { type: "string", default: "64" },
    guidance: { type: "string", default: "2,4.5" },
    file: { type: "string", default: path.join(shapesFolder, "schedules.json") },
    threads: { type: "string" },
  },
});
const size = Number(flags.size);
const scales = flags.guidance.split(",").map(Number);
const captions = drawScenes(7_600_007, Number(flags.captions)).map(caption);
/** Pictures of a launch. */
const batch = 8;

interface SchedulesFile {
  readonly calibrated: (CalibratedEntry & { readonly height: number })[];
}
const read = () => JSON.parse(readFileSync(flags.file, "utf8")) as SchedulesFile;
const isMeasured = ({ width, guidanceScale }: CalibratedEntry) => width === size && scales.includes(guidanceScale);

// Without figures every schedule may be drawn with.
const folder = shapesVariant("measured", { without: ["schedules.json", "refiner"] });
const content = read();
const bare = content.calibrated.filter(isMeasured).map(({ psnr, ...entry }) => entry);
writeFileSync(path.join(folder, "schedules.json"), JSON.stringify({ ...content, calibrated: bare }));
const cache = path.join(root, "bench/.work/measured-cache");
const settings = { measureCosts: false, cache, ...(flags.threads && { threads: Number(flags.threads) }) };
const model = await FlowTurbo.load(folder, settings);

/** Pixels of every caption, in [-1, 1]. */
async function drawn(options: Omit<GenerateOptions, "prompt">): Promise<Float32Array[]> {
  const pictures: Float32Array[] = [];
  for (let start = 0; start < captions.length; start += batch) {
    const prompt = captions.slice(start, start + batch);
    const place = { width: size, height: size, seed: 70_000 + start, include: ["pixels" as const] };
    const { pixels } = await model.generate({ ...place, ...options, prompt });
    const each = 3 * size * size;
    for (const row of prompt.keys()) pictures.push(pixels!.data.slice(row * each, (row + 1) * each) as Float32Array);
  }
  return pictures;
}

/** As calibration counts it. */
function psnr(picture: Float32Array, reference: Float32Array): number {
  const error = mean(Array.from(picture, (value, i) => (value - reference[i]!) ** 2)) / 4;
  return -10 * Math.log10(Math.max(error, 1e-7));
}

const round = (value: number) => Number(value.toPrecision(7));
for (const guidanceScale of scales) {
  const reference = await drawn({ blocks: "H50", guidanceScale });
  const nearness = async (options: Omit<GenerateOptions, "prompt">) => {
    const pictures = await drawn(options);
    return round(mean(pictures.map((picture, i) => psnr(picture, reference[i]!))));
  };
  for (const { guided, width } of bare.filter((entry) => entry.guidanceScale === guidanceScale)) {
    const steps = guided.length;
    const list = guided.map((each) => (each ? guidanceScale : 1));
    const interval = {
      guidanceStart: (guided.indexOf(true) + 0.1) / steps,
      guidanceStop: Math.min(1, (guided.lastIndexOf(true) + 1.1) / steps),
    };
    const held = await nearness({ steps, guidanceScale: list, grid: "calibrated" });
    const uncalibrated = await nearness({ steps, guidanceScale, ...interval, grid: "eased" });
    console.log(
      `${size} px, ${guidanceScale}: ${list.map((each) => (each > 1 ? 2 : 1)).join("")} ${held} ${uncalibrated}`,
    );
    // Others may write meanwhile.
    const now = read();
    const calibrated = now.calibrated.map((entry) =>
      entry.width === width && entry.guidanceScale === guidanceScale && entry.guided.join() === guided.join()
        ? { ...entry, psnr: { ...entry.psnr, held, uncalibrated } }
        : entry,
    );
    writeFileSync(flags.file, formatted({ ...now, calibrated }));
  }
}
await model.dispose();
