import { readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { readSafetensorsHeader, readTensor } from "../../lib/checkpoint/index.js";
import { seedOf } from "../../lib/common/seed.js";
import { NoiseGenerator } from "../../lib/generation/noise.js";

const fixture = (name: string) => path.join(import.meta.dirname, "../fixtures", name);

describe("NoiseGenerator", () => {
  it.each(["large", "medium", "sd3"])("draws torch's noise for the seeds of %s", async (name) => {
    const file = fixture(`${name}/noise.safetensors`);
    const header = await readSafetensorsHeader(file);
    expect(header.size).toBeGreaterThanOrEqual(3);
    for (const [key, entry] of header) {
      const expected = (await readTensor(file, entry)).data;
      const seed = Number(key.match(/^seed(\d+)_/)![1]);
      const drawn = new NoiseGenerator(seed).draw(expected.length);
      let worst = 0;
      for (let i = 0; i < drawn.length; i++) worst = Math.max(worst, Math.abs(drawn[i]! - expected[i]!));
      expect(worst).toBeLessThan(1e-5);
    }
  });

  it("draws torch's noise for seeds of 64 bits", () => {
    const known = Object.entries(JSON.parse(readFileSync(fixture("seeds.json"), "utf8")) as Record<string, number[]>);
    expect(known.length).toBeGreaterThan(5);
    for (const [seed, expected] of known) {
      const drawn = new NoiseGenerator(seedOf(seed)).draw(expected.length);
      for (const [i, value] of expected.entries()) expect(Math.abs(drawn[i]! - value), seed).toBeLessThan(1e-5);
    }
  });

  it("draws torch's noise for lengths that are no multiple of 16, short ones, and again", async () => {
    const file = fixture("noise-lengths.safetensors");
    const header = await readSafetensorsHeader(file);
    // seed<S>: tensors drawn one after another from one generator.
    for (const seed of [0, 7, 2 ** 32 + 5]) {
      const generator = new NoiseGenerator(seed);
      for (const length of [5, 17, 40, 3, 16]) {
        const expected = (await readTensor(file, header.get(`seed${seed}_${length}`)!)).data;
        const drawn = generator.draw(length);
        for (let i = 0; i < length; i++) expect(Math.abs(drawn[i]! - expected[i]!)).toBeLessThan(1e-5);
      }
    }
  });
});
