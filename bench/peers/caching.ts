/**
 * What TaylorSeer costs in quality: captions drawn by openvino-genai with and without it and by ours, from the same noise,
 * judged by rule (bench/shapes/detector.ts); PSNR of a picture from that of the same pipeline with every step.
 */

import { mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { judge, type Verdict } from "../shapes/detector.js";
import { psnr } from "../shapes/pictures.js";
import { caption, drawScenes, type Pixels, randomNumbers } from "../shapes/world.js";
import { mean } from "../support.js";
import type { Contender, Place } from "./contender.js";
import { type OurSession, readFloats } from "./flowturbo.js";
import type { CachingResult } from "./result.js";

/** As bench/quality.ts has it. */
const right = ({ ground, colours, shapes, relation }: Verdict) => ground && colours && shapes && relation !== false;

/** @param pipelines those without caching come before those with it that they are compared with */
export async function measureCaching(
  place: Place,
  pipelines: readonly { contender: Contender; reference?: string }[],
  ours: OurSession,
  count: number,
): Promise<CachingResult> {
  const { size, steps, guidance, tokens } = place.subject;
  const scenes = drawScenes(7_000_003, count);
  const folder = path.join(place.work, "caching");
  mkdirSync(folder, { recursive: true });
  const values = (await ours.noiseShape()).reduce((a, b) => a * b, 1);
  scenes.forEach((_, index) => {
    writeFileSync(path.join(folder, `${index}.noise`), normals(index + 1, values));
  });
  const pictures: Record<string, Pixels[]> = {};
  const rows: CachingResult["rows"][number][] = [];
  for (const { contender, reference } of pipelines) {
    const { name } = contender;
    const session = await contender.open(place);
    const drawn: Pixels[] = [];
    let evaluations = 0;
    try {
      for (const [index, scene] of scenes.entries()) {
        const pixels = path.join(folder, "pixels.f32");
        const noise = path.join(folder, `${index}.noise`);
        const request = { prompt: caption(scene), steps, guidance, size, tokens, seed: index, noise, pixels };
        evaluations = (await session.draw(request)).evaluations;
        drawn.push(eightBits(readFloats(pixels), size));
      }
    } finally {
      await session.close();
    }
    pictures[name] = drawn;
    const exact = reference ? pictures[reference] : undefined;
    const verdicts = drawn.map((picture, index) => judge(picture, scenes[index]!));
    const near = exact ? mean(drawn.map((picture, index) => psnr(picture, exact[index]!.data))) : null;
    rows.push({ name, right: verdicts.filter(right).length / count, evaluations, psnr: near });
    console.log(`${name}: ${(100 * rows.at(-1)!.right).toFixed(1)} % right, PSNR ${near?.toFixed(1) ?? "-"}`);
  }
  return { captions: count, size, rows };
}

/** RGB of planes. */
function eightBits(planes: Float32Array, size: number): Pixels {
  const data = new Uint8Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size * size; i++) data[3 * i + c] = Math.round(255 * planes[c * size * size + i]!);
  return { width: size, height: size, data };
}

/** Normal values from a seed, so that a run can be repeated. */
function normals(seed: number, count: number): Float32Array {
  const random = randomNumbers(seed);
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()),
  );
}
