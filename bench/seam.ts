/**
 * The seam of inpainting: the middle of pictures of the embedded model is painted anew for the caption that they show, by
 * Euler and by flowturbo at equal evaluations of the predictor. Measures the mean step between pixels on both sides of the
 * mask's edge, beside that of the untouched originals and as differences from Euler on the same noise, and draws docs/images/inpainting.png.
 *
 *   npm run bench:seam [-- --originals 24 --seeds 4]
 */

import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions, type RgbPicture } from "flowturbo";
import sharp from "sharp";
import { format, machineLine, mean, meanInterval, report, root, spread, table } from "./support.js";

const { values } = parseArgs({
  options: { originals: { type: "string", default: "24" }, seeds: { type: "string", default: "4" } },
});
const [count, seeds] = [values.originals, values.seeds].map(Number) as [number, number];
const captions = [
  "a large red square",
  "a large blue circle on a yellow background",
  "a large green triangle",
  "a red circle above a blue square",
];
const shown = 3;
const ways: Record<string, Omit<GenerateOptions, "prompt">> = {
  Euler: { blocks: "E10" },
  "Euler on diffusers' grid": { sampler: "euler", steps: 10 },
  H1P8: { blocks: "H1P8" },
  H1P8R2: { blocks: "H1P8R2" },
};

await using model = await FlowTurbo.load(undefined, { measureCosts: false });
const side = model.nativeSize.width;
const [left, right] = [side / 4, (3 * side) / 4];
/** White where x is in [left, right): the middle half of the picture. */
const mask = {
  width: side,
  height: side,
  data: new Uint8Array(side * side * 3).map((_, i) => {
    const x = Math.floor(i / 3) % side;
    return x >= left && x < right ? 255 : 0;
  }),
};

/** Mean absolute difference across both edges of the mask, in grey levels. */
function seam({ data }: RgbPicture): number {
  let sum = 0;
  for (const x of [left - 1, right - 1])
    for (let y = 0; y < side; y++)
      for (let c = 0; c < 3; c++) {
        const at = (y * side + x) * 3 + c;
        sum += Math.abs(data[at]! - data[at + 3]!);
      }
  return sum / (2 * side * 3);
}

const seams: Record<string, number[]> = {
  original: [],
  ...Object.fromEntries(Object.keys(ways).map((way) => [way, []])),
};
const gallery: RgbPicture[][] = [];
for (let k = 0; k < count; k++) {
  const prompt = captions[k % captions.length]!;
  const original = (await model.generate({ prompt, seed: k, blocks: "H1P9", guidanceScale: 2 })).images[0]!;
  seams.original!.push(seam(original));
  const row: RgbPicture[] = [original, mask];
  for (const [way, schedule] of Object.entries(ways)) {
    const edit = { image: original, mask, strength: 1, keepOriginal: false, guidanceScale: 2 };
    const { images } = await model.generate({ prompt, seed: 500 + seeds * k, count: seeds, ...edit, ...schedule });
    seams[way]!.push(...images.map(seam));
    row.push(images[0]!);
  }
  if (k < shown) gallery.push(row);
}

const [scale, gap] = [2, 8];
const cell = side * scale + gap;
const tiles = await Promise.all(
  gallery.flatMap((row, y) =>
    row.map(async ({ width, height, data }, x) => ({
      input: await sharp(data, { raw: { width, height, channels: 3 } })
        .resize(side * scale, side * scale, { kernel: "nearest" })
        .png()
        .toBuffer(),
      left: gap + x * cell,
      top: gap + y * cell,
    })),
  ),
);
await sharp({
  create: { width: gap + gallery[0]!.length * cell, height: gap + shown * cell, channels: 3, background: "#c8ccd4" },
})
  .composite(tiles)
  .png({ compressionLevel: 9 })
  .toFile(path.join(root, "docs/images/inpainting.png"));

const means = Object.fromEntries(Object.entries(seams).map(([name, values]) => [name, mean(values)]));

/** Mean difference from Euler on the same originals and noise, and half the width of its 95 % interval (by originals). */
function difference(name: string): { mean: number; margin: number } | null {
  if (name === "original" || name === "Euler") return null;
  const each = seams[name]!.map((value, i) => value - seams.Euler![i]!);
  const groups = Array.from({ length: count }, (_, k) => mean(each.slice(k * seeds, (k + 1) * seeds)));
  return meanInterval(groups);
}
const differences = Object.fromEntries(Object.keys(seams).map((name) => [name, difference(name)]));
const shownDifference = (name: string) => {
  const found = differences[name];
  return found ? `${found.mean >= 0 ? "+" : ""}${found.mean.toFixed(2)} ± ${found.margin.toFixed(2)}` : "";
};
for (const [name, value] of Object.entries(means))
  console.log(`${name}: ${value.toFixed(2)} grey levels across the edge`);
const spreads = Object.fromEntries(Object.entries(seams).map(([name, values]) => [name, spread(values)]));
const page = [
  "# Seams of inpainting",
  "",
  `Mean step of grey level across the mask's edge over ${count} originals, painted ${seeds} times each, at ten predictor evaluations, \`keepOriginal: false\`; smaller is smoother. \`npm run bench:seam\`.`,
  "",
  table([
    ["sampling", "mean", "against Euler (95 %)", "median and range"],
    ...Object.entries(spreads).map(([name, value]) => [
      name,
      means[name]!.toFixed(2),
      shownDifference(name),
      format(value),
    ]),
  ]),
  "",
  "![](../../docs/images/inpainting.png)",
  "",
  machineLine(),
];
await report("seam", { originals: count, seeds, evaluations: 10, means, differences, spreads }, page.join("\n"));
