/** What `flowturbo generate --save-latents` has written on one runtime, compared with what it wrote on another. */

import { readSafetensorsHeader, readTensor } from "../lib/checkpoint/index.js";
import type { Tensor } from "../lib/common/tensor.js";
import { type Bar, compare } from "./check.js";
import { reasonsOf } from "./report.js";
import type { Verdict } from "./steps.js";

/** @throws the error of a file that cannot be read */
export async function compareDrawn(actual: string, expected: string, bar: Bar): Promise<Verdict> {
  const differences = compare(await tensorsOf(actual), await tensorsOf(expected));
  if (differences.length === 0) return { passed: false, detail: `${expected} holds no tensors` };
  const reasons = reasonsOf({ differences, bar, problems: [] });
  const largest = Math.max(...differences.map(({ relative }) => relative));
  return {
    passed: reasons === "",
    detail: reasons || `error ${largest.toExponential(1)} (bar ${bar.relative.toExponential(1)})`,
  };
}

async function tensorsOf(file: string): Promise<Record<string, Tensor>> {
  const tensors: Record<string, Tensor> = {};
  for (const [name, entry] of await readSafetensorsHeader(file)) tensors[name] = await readTensor(file, entry);
  return tensors;
}
