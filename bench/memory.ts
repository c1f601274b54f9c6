/**
 * Peak memory on the CPU by size and by how weights are held: one guided Euler step of a model of SD3.5-medium's width, with a tiny decoder
 * and with the decoder as it is published. Resident sizes are summed over all processes (this one's child, which only holds the library, and
 * the one that runs the graphs), and compared with what `flowturbo doctor` estimates. A line is fitted to the sizes: what is there
 * whatever the size, and what each pixel takes. Bar for lazy with 6 layers at 256 px: under 2.2 times the transformer's file.
 *
 *   npm run bench:memory -- [--layers 6] [--sizes 256,512,768,1024] [--weights lazy,folded,int8] [--no-decoder]
 */

import { cpSync, existsSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { gigabytes } from "../lib/common/memory.js";
import { type HeldWeights, hostMemoryNeeded } from "../lib/generation/host-memory.js";
import { randomCheckpoint, writeRandom } from "./random-checkpoint.js";
import { machineLine, measureProcess, report, root, table } from "./support.js";
import { partsOf } from "./whole-checkpoints.js";

const { values: flags } = parseArgs({
  options: {
    layers: { type: "string", default: "6" },
    sizes: { type: "string", default: "256,512,768,1024" },
    weights: { type: "string", default: "lazy,folded,int8" },
    "no-decoder": { type: "boolean", default: false },
  },
});
const sizes = flags.sizes.split(",").map(Number);
const modes = flags.weights.split(",") as HeldWeights[];
const bar = 2.2;

interface Measurement {
  readonly size: number;
  readonly peakBytes: number;
  readonly estimatedBytes: number;
}
interface Subject {
  readonly name: string;
  readonly weights: HeldWeights;
  readonly measured: readonly Measurement[];
  /** Bytes whatever the size, bytes for each pixel; absent for one size. */
  readonly line: { readonly fixed: number; readonly perPixel: number } | null;
}

/** The same checkpoint with SD3.5's decoder in place of a fixture's. */
async function withPublishedDecoder(folder: string): Promise<string> {
  const copy = `${folder}-decoder`;
  const { config, shapes, file } = partsOf("sd3.5-medium").vae!;
  if (existsSync(path.join(copy, "complete"))) return copy;
  cpSync(folder, copy, { recursive: true });
  writeFileSync(path.join(copy, "vae/config.json"), JSON.stringify(config));
  await writeRandom(path.join(copy, "vae", file), shapes);
  writeFileSync(path.join(copy, "complete"), "");
  return copy;
}

/** The largest resident size of a process that draws one picture. */
async function peakOf(folder: string, weights: HeldWeights, size: number): Promise<number> {
  const args = ["generate", "x", "--model", folder, "--weights", weights, "--sampler", "euler", "--steps", "1"];
  const sides = ["--width", String(size), "--height", String(size)];
  const out = ["--seed", "1", "--json", "--out", path.join(folder, "out.png")];
  const { peak } = await measureProcess(process.execPath, [path.join(root, "dist/cli.js"), ...args, ...sides, ...out]);
  return peak;
}

async function measure(name: string, folder: string, weights: HeldWeights): Promise<Subject> {
  const checkpoint = await openCheckpoint(folder);
  // Weights in int8 are made by the first run, and kept.
  if (weights === "int8") await peakOf(folder, weights, Math.min(...sizes));
  const measured: Measurement[] = [];
  for (const size of sizes) {
    const peakBytes = await peakOf(folder, weights, size);
    const estimatedBytes = hostMemoryNeeded(checkpoint, weights, { width: size, height: size }).total;
    console.log(`${name}, ${weights}, ${size} px: ${gigabytes(peakBytes)} GB, estimated ${gigabytes(estimatedBytes)}`);
    measured.push({ size, peakBytes, estimatedBytes });
  }
  return { name, weights, measured, line: measured.length > 1 ? lineThrough(measured) : null };
}

/** Least squares. */
function lineThrough(measured: readonly Measurement[]): { fixed: number; perPixel: number } {
  const points = measured.map(({ size, peakBytes }) => [size ** 2, peakBytes] as const);
  const mean = (of: (point: readonly [number, number]) => number) =>
    points.reduce((sum, point) => sum + of(point), 0) / points.length;
  const [x, y] = [mean((point) => point[0]), mean((point) => point[1])];
  const perPixel = mean((point) => (point[0] - x) * (point[1] - y)) / mean((point) => (point[0] - x) ** 2);
  return { fixed: y - perPixel * x, perPixel };
}

const { folder, bytes } = await randomCheckpoint(Number(flags.layers));
const tiny = `${flags.layers} layers (${gigabytes(bytes)} GB of bfloat16), tiny decoder`;
const published = `${flags.layers} layers, SD3.5's decoder`;
const subjects: Subject[] = [];
for (const weights of modes) subjects.push(await measure(tiny, folder, weights));
if (!flags["no-decoder"]) subjects.push(await measure(published, await withPublishedDecoder(folder), modes[0]!));

const page = [
  "# Peak memory on the CPU",
  "",
  `One guided Euler step and its picture, of a model of SD3.5-medium's width; resident sizes of all processes together, in GB, and in brackets what \`flowturbo doctor --model\` estimates. Bar: with 6 layers, \`lazy\` takes at most ${bar} × the transformer's file at 256 px. \`npm run bench:memory\`.`,
  "",
  table([
    ["model", "weights", ...sizes.map((size) => `${size} px`), "whatever the size", "bytes a pixel"],
    ...subjects.map(({ name, weights, measured, line }) => [
      ...[name, weights],
      ...measured.map(({ peakBytes, estimatedBytes }) => `${gigabytes(peakBytes)} (${gigabytes(estimatedBytes)})`),
      ...(line ? [gigabytes(line.fixed), line.perPixel.toFixed(0)] : ["", ""]),
    ]),
  ]),
  "",
  "Memory grows with the pixels, not with their square: attention with many scores goes block by block. A pixel is 1/256 of a token, of two rows (guidance); each token holds about 13 values for each",
  "of the network's 1,536, eight of which are the MLP's inner values before and after the activation. Of the published decoder a pixel of the largest map has 256 values, and three and a half such maps are there at the same time.",
  "Whatever the size: weights, two processes with Node and its libraries (0.24 GB), and with `lazy` the weight that is being widened. What a session took for a launch it keeps for the next.",
  "",
  machineLine(),
];
await report("memory", { fileBytes: bytes, bar: { lazy: bar }, subjects }, page.join("\n"));
