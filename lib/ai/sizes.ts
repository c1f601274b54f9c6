/** Sizes of pictures, as the AI SDK names them: `640x480`, or a ratio of sides such as `16:9`. */

import type { Size } from "../model.js";
import { ArgumentError } from "./errors.js";

/** Pixels that sides are multiples of: the autoencoder's factor of 8 and patches of 2, in all SD3 and SD3.5 models. */
const step = 16;

/** @throws ArgumentError for what is no size */
export function parseSize(text: string): Size {
  const match = text.match(/^(\d{1,6})x(\d{1,6})$/);
  if (!match) throw new ArgumentError("size", `Expected a size such as "1024x768" for size but received "${text}".`);
  return { width: Number(match[1]), height: Number(match[2]) };
}

/** @throws ArgumentError for what is no ratio */
export function parseRatio(text: string): number {
  const [width, height] = text.split(":").map(Number);
  const ratio = width! / height!;
  // From 1:64 to 64:1. NaN is neither.
  if (text.split(":").length === 2 && ratio >= 1 / 64 && ratio <= 64) return ratio;
  throw new ArgumentError(
    "aspectRatio",
    `Expected a ratio such as "16:9" (at most 64:1) for aspectRatio but received "${text}".`,
  );
}

/**
 * The size of about the native area, in whole steps, whose ratio is nearest: an error of the ratio weighs four times as much as
 * one of the area.
 */
export function sizeOfRatio(ratio: number, native: Readonly<Size>): Size {
  const area = native.width * native.height;
  let best = { width: native.width, height: native.height };
  let least = Number.POSITIVE_INFINITY;
  const widest = Math.ceil((2 * Math.sqrt(area * ratio)) / step);
  for (let columns = 1; columns <= widest; columns++)
    for (const rows of new Set([Math.floor, Math.ceil].map((round) => Math.max(1, round(columns / ratio))))) {
      const wrong =
        4 * Math.abs(Math.log(columns / rows / ratio)) + Math.abs(Math.log((columns * rows * step ** 2) / area));
      if (wrong < least) {
        least = wrong;
        best = { width: columns * step, height: rows * step };
      }
    }
  return best;
}
