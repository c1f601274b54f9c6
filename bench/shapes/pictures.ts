/** Pictures of captions by the public API, judged. */

import type { FlowTurbo, GenerateOptions, GenerateResult } from "flowturbo";
import { judge, type Verdict } from "./detector.js";
import { caption, type Pixels, type Scene } from "./world.js";

/** Draws the captions of `scenes` as one batch; picture k has the seed `seed + k`. */
export function draw(
  model: FlowTurbo,
  scenes: readonly Scene[],
  seed: number,
  options: Omit<GenerateOptions, "prompt" | "seed">,
): Promise<GenerateResult> {
  return model.generate({ ...options, prompt: scenes.map(caption), seed });
}

export function judged(result: GenerateResult, scenes: readonly Scene[]): Verdict[] {
  return result.images.map((image, row) => judge(image, scenes[row]!));
}

/** 95 % interval of a share (Wilson), where k of n were right. */
export function shareInterval(share: number, n: number): [low: number, high: number] {
  const z = 1.96;
  const centre = (share + z ** 2 / (2 * n)) / (1 + z ** 2 / n);
  const half = (z / (1 + z ** 2 / n)) * Math.sqrt((share * (1 - share)) / n + z ** 2 / (4 * n ** 2));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** Of 8-bit pixels, dB; at most 88, where no pixel differs. */
export function psnr(a: Pixels, b: Uint8Array): number {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += (a.data[i]! - b[i]!) ** 2;
  return 10 * Math.log10(255 ** 2 / Math.max(sum / b.length, 1e-4));
}
