/**
 * Control pictures in: read and brought to the size of each stage as diffusers' pipelines for ControlNets do (stretched, with Pillow's
 * Lanczos filter), as the autoencoder is to encode them; for an inpainting ControlNet with the mask beside. What the
 * encoder makes of one, with the channel of its mask, is what the fused step reads.
 */

import { type FloatTensor, float32 } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import type { Size } from "../model.js";
import { edgesOf } from "./canny.js";
import { type ControlRequest, pixelRanges } from "./control-request.js";
import { type Crop, cut, filled } from "./crop.js";
import { maskOf, readControlPicture, readMask, readOriginal } from "./edit.js";
import { type Raster, resampled } from "./resample.js";

/** A control at the size of a stage. */
export interface StageControl {
  /** [1, 3, H, W], as the autoencoder reads it. */
  readonly pixels: FloatTensor;
  /** [1, 1, h, w], 1 where the picture is known and 0 where the ControlNet paints; null for one without a mask. */
  readonly known: FloatTensor | null;
}

/**
 * @param sizes of the stages; null for one whose steps do not need this control
 * @param factor pixels of a latent's side
 * @param crop what is drawn of an edited picture, where that is a part of it: the control is taken for the whole
 * @returns for each size the control
 * @throws OptionError for a picture that cannot be read
 */
export async function readControl(
  { index, image, mask, preprocess, pixelRange }: ControlRequest,
  sizes: readonly (Size | null)[],
  factor: number,
  crop?: Crop,
): Promise<(StageControl | null)[]> {
  const named = (field: string) => ({ option: "controls", field: `controls[${index}].${field}` });
  const read = preprocess === "canny" ? readOriginal : readControlPicture;
  const picture = await partOf(await read(image, named("image")), crop);
  const painted = mask === null ? null : await partOf(await readMask(mask, named("mask")), crop);
  const stages: (StageControl | null)[] = [];
  for (const size of sizes) {
    if (size === null) {
      stages.push(null);
      continue;
    }
    const { width, height } = size;
    const at = async (raster: Raster): Promise<Raster> => ({
      ...{ width, height, channels: raster.channels },
      data: crop ? await filled(raster, width, height) : await stretched(raster, size),
    });
    const sized = await at(picture);
    const rgb = preprocess === "canny" ? await edgesOf(sized) : sized.data;
    const hidden = painted && (await maskOf(await at(painted), factor));
    stages.push({
      pixels: await pixelsOf(rgb, size, pixelRanges[pixelRange], hidden?.pixels),
      known:
        hidden &&
        float32(
          hidden.latents.shape,
          hidden.latents.data.map((value) => 1 - value),
        ),
    });
  }
  return stages;
}

/** The channels that the fused step reads: those of the latents, then that of the mask. */
export function controlOf(latents: FloatTensor, known: FloatTensor | null): FloatTensor {
  if (!known) return latents;
  const [, channels, height, width] = latents.shape as [number, number, number, number];
  const data = new Float32Array(latents.data.length + known.data.length);
  data.set(latents.data);
  data.set(known.data, latents.data.length);
  return float32([1, channels + 1, height, width], data);
}

/** All of a picture at another size, whatever its shape. */
function stretched(raster: Raster, { width, height }: Readonly<Size>): Promise<Uint8Array> {
  return resampled(raster, width, height, { left: 0, top: 0, width: raster.width, height: raster.height });
}

/** The part of a picture that is drawn; a picture of another size is stretched to the edited one's first. */
async function partOf(raster: Raster, crop: Crop | undefined): Promise<Raster> {
  if (!crop) return raster;
  const { width, height } = crop.picture;
  return cut(
    { width, height, channels: raster.channels, data: await stretched(raster, { width, height }) },
    crop.region,
  );
}

/** [1, 3, H, W], -1 where a mask is 1: there the pictures of an inpainting ControlNet's training were hidden. */
async function pixelsOf(
  rgb: Uint8Array,
  { width, height }: Readonly<Size>,
  value: (byte: number) => number,
  hidden: Uint8Array | undefined,
): Promise<FloatTensor> {
  const values = Float32Array.from({ length: 256 }, (_, byte) => value(byte));
  const plane = width * height;
  const data = new Float32Array(3 * plane);
  for (let start = 0; start < plane; start += width) {
    for (let i = start; i < start + width; i++)
      for (let c = 0; c < 3; c++) data[c * plane + i] = hidden?.[i] === 1 ? -1 : values[rgb[3 * i + c]!]!;
    if (isDue()) await rest();
  }
  return float32([1, 3, height, width], data);
}
