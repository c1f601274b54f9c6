/** Sizes that a model can draw, and what they are in latents. */

import type { Checkpoint } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import type { Size } from "../model.js";
import type { LatentShape } from "./programs.js";

/** The size that a model was trained for, in pixels. */
export function nativeSize({ transformer, vae }: Checkpoint): Size {
  const side = transformer.config.sampleSize * vae.config.factor;
  return { width: side, height: side };
}

export function latentShapeOf({ transformer, vae }: Checkpoint, rows: number, { width, height }: Size): LatentShape {
  return [rows, transformer.config.outChannels, height / vae.config.factor, width / vae.config.factor];
}

/** Where a size comes from, for messages. */
interface SizeName {
  /** The option that holds it; default: width or height. */
  readonly option?: string;
  /** What stands before "width" and "height". */
  readonly prefix?: string;
}

/**
 * @param usesRefiner whether blocks of the refiner are to run on it: the refiner has a table of positions of its own
 * @throws OptionError if the model cannot draw that size
 */
export function checkSize(checkpoint: Checkpoint, size: Size, usesRefiner: boolean, name: SizeName = {}): void {
  const { transformer, refiner, vae } = checkpoint;
  const multiple = vae.config.factor * transformer.config.patchSize;
  const tables = [{ owner: "model", side: transformer.config.posEmbedMaxSize }];
  if (refiner && usesRefiner) tables.push({ owner: "refiner", side: refiner.config.posEmbedMaxSize });
  const { owner, side } = tables.reduce((a, b) => (b.side < a.side ? b : a));
  const most = multiple * side;
  for (const axis of ["width", "height"] as const) {
    const pixels = size[axis];
    const { option = axis, prefix = "" } = name;
    if (pixels % multiple !== 0) {
      const nearest = Math.min(most, Math.max(multiple, multiple * Math.round(pixels / multiple)));
      throw new OptionError(
        option,
        `Expected a multiple of ${multiple} for ${prefix}${axis} but received ${pixels}. Nearest: ${nearest}.`,
      );
    }
    if (pixels > most)
      throw new OptionError(
        option,
        `Expected at most ${most} for ${prefix}${axis} but received ${pixels}: the ${owner}'s table of positions has ${side} × ${side} entries.`,
      );
  }
}

/** Whether a checkpoint has a part whose table of positions is large enough for a size which the model can draw. */
export function fitsPositions(checkpoint: Checkpoint, part: keyof Checkpoint | null, size: Size): boolean {
  const config = part && (checkpoint[part] as Partial<Checkpoint["transformer"]> | null)?.config;
  if (!config) return false;
  const [, , height, width] = latentShapeOf(checkpoint, 1, size);
  return Math.max(height, width) <= config.posEmbedMaxSize * config.patchSize;
}

/** @throws OptionError for `sizes` if the model cannot draw one of them */
export function checkSizes(checkpoint: Checkpoint, sizes: readonly Size[]): void {
  for (const size of sizes)
    try {
      checkSize(checkpoint, size, false);
    } catch (error) {
      const reason = (error as Error).message;
      throw new OptionError("sizes", `The size ${size.width}x${size.height} cannot be drawn. ${reason}`);
    }
}
