/** Ours. */

import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type LoadOptions } from "flowturbo";
import { loadSchema } from "../../lib/options.js";
import { root } from "../support.js";
import type { Contender, Place, Session } from "./contender.js";

export interface OurSession extends Session {
  /** [1, C, h, w] of the starting noise of a picture. */
  noiseShape(): Promise<readonly number[]>;
}

/** @param options of the pictures; default: the same Euler steps as the peers */
export async function openOurs(
  { model: folder, subject: { size, tokens } }: Place,
  load: LoadOptions,
  options?: Partial<GenerateOptions>,
): Promise<OurSession> {
  const model = await FlowTurbo.load(folder, { measureCosts: false, ...load });
  const picture = { width: size, height: size, maxSequenceLength: tokens };
  const noiseShape = async () => {
    const asked = { ...picture, prompt: "a", sampler: "euler", steps: 1, seed: 1, include: ["latents"] } as const;
    return (await model.generate(asked)).latents!.shape;
  };
  return {
    noiseShape,
    async draw({ prompt, steps, guidance, seed, out, noise, pixels }) {
      const start = performance.now();
      const result = await model.generate({
        ...{ ...picture, prompt, guidanceScale: guidance },
        ...(options ?? { sampler: "euler", steps }),
        ...(noise ? { noise: { dtype: "float32", shape: await noiseShape(), data: readFloats(noise) } } : { seed }),
        ...(pixels ? { include: ["pixels"] } : {}),
      } as GenerateOptions);
      const png = await result.images[0]!.toPNG();
      if (out) writeFileSync(out, png);
      const milliseconds = performance.now() - start;
      if (pixels)
        writeFileSync(
          pixels,
          result.pixels!.data.map((value) => Math.min(1, Math.max(0, value / 2 + 0.5))),
        );
      const denoise = result.timings.steps.reduce((a, b) => a + b, 0);
      return { denoise, milliseconds, evaluations: result.evaluations.predictor };
    },
    close: () => model.dispose(),
  };
}

export const readFloats = (file: string): Float32Array => {
  const bytes = readFileSync(file);
  return new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
};

function contender(
  name: string,
  load: LoadOptions,
  flags: readonly string[],
  rest: Pick<Contender, "precision" | "skips">,
  options?: Partial<GenerateOptions>,
): Contender {
  return {
    ...{ name, ours: true, ...rest },
    open: (place) => openOurs(place, load, options),
    async process({ model, subject: { steps } }) {
      const work = options ? [] : ["--sampler", "euler", "--steps", String(steps)];
      return {
        file: process.execPath,
        args: ({ prompt, size, guidance, tokens, seed, out }) => [
          ...[path.join(root, "dist/cli.js"), "generate", prompt, "--model", model, "--seed", String(seed)],
          ...["--width", String(size), "--height", String(size), "--guidance", String(guidance)],
          ...["--max-sequence-length", String(tokens), "--out", out!, ...work, ...flags],
        ],
      };
    },
  };
}

/** What every other contender has its turn with. */
export const baseline = contender("flowturbo, Euler", {}, [], { precision: "float32" });

export const schedule = (blocks: string): Contender =>
  contender(`flowturbo, ${blocks}`, {}, ["--blocks", blocks], { precision: "float32", skips: true }, { blocks });

/** Where this version has int8 weights. */
export const int8: readonly Contender[] = loadSchema.shape.weights.safeParse("int8").success
  ? [
      contender(
        "flowturbo, int8 weights, Euler",
        { weights: "int8" as LoadOptions["weights"] },
        ["--weights", "int8"],
        {
          precision: "int8",
        },
      ),
    ]
  : [];
