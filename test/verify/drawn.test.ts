// Latents and pixels of two runtimes: within the bar, beyond it in all values or in a single one, not finite, missing.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { writeSafetensors } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { barOf } from "../../verify/check.js";
import { compareDrawn } from "../../verify/drawn.js";

let folder: string;
beforeAll(async () => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-drawn-"));
  await write("reference", (value) => value);
});
afterAll(() => rmSync(folder, { recursive: true }));

const file = (name: string) => path.join(folder, `${name}.safetensors`);
const values = Float32Array.from({ length: 400 }, (_, index) => Math.sin(index));

async function write(name: string, change: (value: number, index: number) => number, others = true) {
  const latents = float32([1, 4, 10, 10], values.map(change));
  await writeSafetensors(file(name), { latents, ...(others && { image: float32([1, 4, 10, 10], values) }) });
}

const bar = barOf("sampler", ["float32"]);

it("pass within the bar", async () => {
  await write("near", (value) => value * (1 + bar.relative / 2));
  expect(await compareDrawn(file("near"), file("reference"), bar)).toEqual({
    ...{ passed: true, detail: "error 2.0e-4 (bar 4.0e-4)" },
  });
});

it.each([
  ["in all values", (value: number) => value * (1 + 2 * bar.relative), /^latents 8\.0e-4 \(bar 4\.0e-4\)$/],
  ["in one value", (value: number, index: number) => value + (index === 7 ? 0.004 : 0), /^latents worst value 4\.0e-3/],
  ["by a NaN", (value: number, index: number) => (index === 7 ? Number.NaN : value), /^latents NaN/],
])("fail beyond it %s", async (_, change, message) => {
  await write("far", change);
  const { passed, detail } = await compareDrawn(file("far"), file("reference"), bar);
  expect(detail).toMatch(message);
  expect(passed).toBe(false);
});

it("fail where a result is missing", async () => {
  await write("part", (value) => value, false);
  const { passed, detail } = await compareDrawn(file("part"), file("reference"), bar);
  expect(detail).toMatch(/^image Infinity/);
  expect(passed).toBe(false);
});
