/**
 * The seam of inpainting: the middle of pictures of the embedded model is painted anew for the caption that they show, by
 * Euler and by flowturbo at equal evaluations of the predictor. Measures the mean step between pixels on both sides of the
 * mask's edge, beside that of the untouched originals, and draws docs/images/inpainting.png.
 *
 *   npm run bench:seam [-- --pictures 24]
 */

import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type RgbPicture } from "flowturbo";
import sharp from "sharp";
import { format, machineLine, report, root, spread, table } from "./support.js";

const { values } = parseArgs({ options: { pictures: { type: "string", default: "24" } } });
const count = Number(values.pictures);
const captions = [
  "a large red square",
  "a large blue circle on a yellow background",
  "a large green triangle",
  "a red circle above a blue square",
];
const shown = 3;
const ways = { Euler: "E10", H1P8: "H1P8", H1P8R2: "H1P8R2" };

await using model = await FlowTurbo.load();
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
  for (const [way, blocks] of Object.entries(ways)) {
    const edit = { image: original, mask, strength: 1, keepOriginal: false, guidanceScale: 2 };
    const painted = (await model.generate({ prompt, blocks, seed: 500 + k, ...edit })).images[0]!;
    seams[way]!.push(seam(painted));
    row.push(painted);
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
await sharp({ create: { width: gap + 5 * cell, height: gap + shown * cell, channels: 3, background: "#ffffff" } })
  .composite(tiles)
  .png({ compressionLevel: 9 })
  .toFile(path.join(root, "docs/images/inpainting.png"));

const means = Object.fromEntries(
  Object.entries(seams).map(([name, values]) => [name, values.reduce((sum, value) => sum + value, 0) / values.length]),
);
for (const [name, value] of Object.entries(means))
  console.log(`${name}: ${value.toFixed(2)} grey levels across the edge`);
const spreads = Object.fromEntries(Object.entries(seams).map(([name, values]) => [name, spread(values)]));
const page = [
  "# Seams of inpainting",
  "",
  `Mean step of grey level across the mask's edge over ${count} pictures, at ten predictor evaluations each, \`keepOriginal: false\`; smaller is smoother. \`npm run bench:seam\`.`,
  "",
  table([
    ["sampling", "mean", "median and range"],
    ...Object.entries(spreads).map(([name, value]) => [name, means[name]!.toFixed(2), format(value)]),
  ]),
  "",
  "![](../../docs/images/inpainting.png)",
  "",
  machineLine(),
];
await report("seam", { pictures: count, evaluations: 10, means, spreads }, page.join("\n"));
