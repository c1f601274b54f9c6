/**
 * Chooses how 16-bit weights are widened where the caller does not. Folding makes steps about 5 % faster, but takes
 * memory, and running out of memory ends the process.
 */

import { availableMemory } from "../../common/memory.js";
import type { Widening } from "./protocol.js";

/**
 * Folding peaks at three times the stored bytes (the mapped file and its float32 copies); as much again must stay
 * free for activations, other programs and the page cache that the file itself needs.
 */
const factor = 6;

/**
 * Evaluations of a picture up to which "auto" does not fold where that picture is all that is drawn: folding the transformer's weights takes as
 * long as 13 evaluations gain by it (SD3.5 medium's width, 256 × 256).
 */
export const foldedAbove = 12;

/**
 * "auto" folds if the available memory is at least six times the 16-bit weights, and leaves them lazy otherwise; with "int8" those that are left in 16 bits are few, and
 * held as "auto" says.
 * @param bytesOf16BitWeights bytes that the F16 and BF16 tensors take in their files
 * @param freeMemory bytes that this process can still use; default: what the system and its control group leave
 */
export function resolveWeights(
  choice: Widening | "auto" | "int8",
  bytesOf16BitWeights: number,
  freeMemory: number = availableMemory(),
): Widening {
  if (choice === "lazy" || choice === "folded") return choice;
  return bytesOf16BitWeights * factor <= freeMemory ? "folded" : "lazy";
}
