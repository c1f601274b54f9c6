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
 * Whether folding the weights of a graph pays where it is launched only so often. It takes as long as `launchesForWeights`
 * launches gain by it, whatever the bytes; and a graph that is folded cannot be kept in its optimised form, which takes as
 * long as the launches of one of `bytesForGraph` gain.
 */
export function foldingPays(launches: number, bytesOf16BitWeights: number): boolean {
  return launches > launchesForWeights + bytesForGraph / bytesOf16BitWeights;
}
const launchesForWeights = 12;
const bytesForGraph = 250e6;

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
