/** Sizes that a model can draw, and what they are in latents. */

import type { Checkpoint, ControlNet } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import type { Size } from "../model.js";
import { networks } from "../networks/index.js";
import type { StepType } from "../schedule/index.js";
import type { LatentShape } from "./programs.js";

/** The size that a model was trained for, in pixels. */
export function nativeSize({ transformer, vae }: Checkpoint): Size {
  const side = transformer.config.sampleSize * vae.config.factor;
  return { width: side, height: side };
}

/** About as many pixels as the model was trained for, in the proportions of a picture; sides are multiples of 16. */
export function sizeLike(picture: Readonly<Size>, native: Readonly<Size>): Size {
  const scale = Math.sqrt((native.width * native.height) / (picture.width * picture.height));
  const side = (pixels: number) => Math.max(16, 16 * Math.round((pixels * scale) / 16));
  return { width: side(picture.width), height: side(picture.height) };
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
 * The longest side, in pixels, that a part of the checkpoint has positions for; null for one that is absent, or has no
 * positions.
 */
function longestSide({ vae, ...parts }: Checkpoint, part: keyof Checkpoint | null): number | null {
  const config = part && (parts as Partial<Record<string, Partial<Checkpoint["transformer"]> | null>>)[part]?.config;
  return config ? vae.config.factor * config.patchSize * config.posEmbedMaxSize : null;
}

/** @throws OptionError for a size that a ControlNet has no positions for. @param option that names it @param name of the ControlNet */
export function checkControlSizes(
  { folder, config: { positions, patchSize, posEmbedMaxSize } }: Pick<ControlNet, "folder" | "config">,
  { vae }: Checkpoint,
  sizes: readonly Size[],
  name = folder,
): void {
  if (positions !== "own") return;
  const most = vae.config.factor * patchSize * posEmbedMaxSize!;
  for (const { width, height } of sizes)
    if (Math.max(width, height) > most)
      throw new OptionError(
        "controls",
        `The ControlNet ${JSON.stringify(name)} guides pictures of at most ${most} pixels a side, for which it has positions, but received ${width} x ${height}. Draw a smaller picture, or use another ControlNet.`,
      );
}

/**
 * @param types the step networks that are to run on it: the refiner has a table of positions of its own
 * @throws OptionError if the model cannot draw that size
 */
export function checkSize(checkpoint: Checkpoint, size: Size, types: readonly StepType[], name: SizeName = {}): void {
  const { transformer, vae } = checkpoint;
  const multiple = vae.config.factor * transformer.config.patchSize;
  const parts = ["transformer" as const, ...types.map((type) => networks[type]!.part)];
  const limits = parts.map((part) => {
    return {
      owner: part === "transformer" ? "model" : part,
      most: longestSide(checkpoint, part) ?? Number.POSITIVE_INFINITY,
    };
  });
  const { owner, most } = limits.reduce((a, b) => (b.most < a.most ? b : a));
  const side = most / multiple;
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

/** Whether a checkpoint has a step network, with positions for a size which the model can draw. */
export function fitsPositions(checkpoint: Checkpoint, type: string, { width, height }: Size): boolean {
  const most = longestSide(checkpoint, networks[type]!.part);
  return most !== null && Math.max(width, height) <= most;
}

/** @throws OptionError for `sizes` if the model cannot draw one of them */
export function checkSizes(checkpoint: Checkpoint, sizes: readonly Size[]): void {
  for (const size of sizes)
    try {
      checkSize(checkpoint, size, []);
    } catch (error) {
      const reason = (error as Error).message;
      throw new OptionError("sizes", `The size ${size.width}x${size.height} cannot be drawn. ${reason}`);
    }
}
