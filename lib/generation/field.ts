/**
 * The velocity of a model as a function of state, noise level and prompt, and its decoder, for work that looks into a run instead of
 * drawing a picture: finding schedules. Points of any number of runs share launches. The networks are the graphs that pictures are
 * drawn with, on any runtime; what is between their launches is the caller's.
 */

import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { graphName } from "../networks/index.js";
import { ProgramBuilder } from "../program/builder.js";
import type { Constant, Program } from "../program/program.js";
import type { LatentShape } from "./programs.js";
import { type EncodedPrompt, type PromptEncoder, promptOf } from "./text.js";

/** Where a velocity is asked for. */
export interface FieldPoint {
  /** Latents, [C, h, w]. */
  readonly x: Float32Array;
  readonly sigma: number;
  /** Index of its prompt. */
  readonly prompt: number;
  /** Guidance scale; null for the conditional velocity alone. */
  readonly scale: number | null;
}

/** A velocity as it was asked for. */
export interface GuidedVelocity {
  /** [C, h, w] */
  readonly value: Float32Array;
  /** The conditional velocity less the unconditional one; null without guidance. */
  readonly difference: Float32Array | null;
  /** Guidance scale; null for none. */
  readonly scale: number | null;
}

export interface FieldOptions {
  readonly run: (program: Program) => Promise<Record<string, Tensor>>;
  readonly text: PromptEncoder;
  readonly sequenceLength: number;
  readonly prompts: readonly string[];
  /** Of one picture, [1, C, h, w]. */
  readonly latentShape: LatentShape;
  readonly positions: Constant;
  /** Pixels of a latent's side, and channels of a picture. */
  readonly factor: number;
  readonly imageChannels: number;
  /** Pictures of a launch. */
  readonly batch: number;
}

export class VelocityField {
  readonly #options: FieldOptions;
  /** Of each prompt, and at the end of the empty one. */
  readonly #encoded: readonly EncodedPrompt[];

  private constructor(options: FieldOptions, encoded: readonly EncodedPrompt[]) {
    this.#options = options;
    this.#encoded = encoded;
  }

  static async open(options: FieldOptions): Promise<VelocityField> {
    const { text, sequenceLength, prompts, run } = options;
    const prepared = await text.prepare([...prompts, ""].map(promptOf), sequenceLength);
    const encoded = await text.encode(prepared, async (programs) => {
      const results: Record<string, Tensor>[] = [];
      for (const { program } of programs) results.push(await run(program));
      return results;
    });
    return new VelocityField(options, encoded);
  }

  async velocities(points: readonly FieldPoint[]): Promise<GuidedVelocity[]> {
    const velocities: GuidedVelocity[] = new Array(points.length);
    for (const guided of [true, false]) {
      const indices = points.flatMap(({ scale }, index) => ((scale !== null) === guided ? [index] : []));
      for (let start = 0; start < indices.length; start += this.#options.batch) {
        const some = indices.slice(start, start + this.#options.batch);
        const computed = await this.#launch(
          some.map((index) => points[index]!),
          guided,
        );
        for (const [row, index] of some.entries()) velocities[index] = computed[row]!;
        if (isDue()) await rest();
      }
    }
    return velocities;
  }

  /** Decoded pictures, [3, H, W] each, in [-1, 1], not clamped. @param reduced what is kept of each, since they are large */
  async decoded(
    latents: readonly Float32Array[],
    reduced: (pixels: Float32Array, index: number) => Float32Array,
  ): Promise<Float32Array[]> {
    const { latentShape, factor, imageChannels, run } = this.#options;
    const [, ...area] = latentShape;
    const kept: Float32Array[] = [];
    for (const [index, each] of latents.entries()) {
      const builder = new ProgramBuilder();
      const image = builder.register("image", [1, imageChannels, area[1] * factor, area[2] * factor]);
      builder.launch({
        graph: graphName({ network: "vae_decoder" }),
        inputs: { latents: builder.value("latents", float32([1, ...area], each)) },
        outputs: { image },
        mustBeFinite: [image],
        label: { kind: "decode", name: "decoder" },
      });
      kept.push(reduced((await run(builder.build([image])))[image]!.data as Float32Array, index));
      if (isDue()) await rest();
    }
    return kept;
  }

  async #launch(points: readonly FieldPoint[], guided: boolean): Promise<GuidedVelocity[]> {
    const { latentShape, positions, text, run } = this.#options;
    const [, ...area] = latentShape;
    const size = elementCount(area);
    const rows = points.length;
    const pairs = guided ? 2 * rows : rows;
    const of = (indices: readonly number[]) => text.stack(indices.map((index) => this.#encoded[index]!));
    const own = points.map(({ prompt }) => prompt);
    const condition = of(guided ? [...own.map(() => this.#encoded.length - 1), ...own] : own);
    const x = new Float32Array(rows * size);
    for (const [row, point] of points.entries()) x.set(point.x, row * size);
    const builder = new ProgramBuilder();
    const zero = builder.perRow(0, rows);
    builder.constants.positions = positions;
    builder.launch({
      graph: graphName({ network: "predict", guidance: guided }),
      inputs: {
        x: builder.value("x", float32([rows, ...area], x)),
        velocity: builder.value("velocity", float32([pairs, ...area], new Float32Array(pairs * size))),
        context: builder.value("context", condition.context),
        pooled: builder.value("pooled", condition.pooled),
        position_embedding: "positions",
        sigma: builder.value(
          "sigma",
          float32(
            [rows],
            Float32Array.from(points, ({ sigma }) => sigma),
          ),
        ),
        ...{ a_in: zero, a_old: zero, a_new: zero },
        ...(guided && { guidance: builder.perRow(1, rows) }),
      },
      outputs: {
        x_next: builder.register("x_next", [rows, ...area]),
        velocity_next: builder.register("velocity_next", [pairs, ...area]),
      },
      mustBeFinite: ["velocity_next"],
      label: { kind: "step", name: `velocity at sigma ${points[0]!.sigma.toFixed(4)}` },
    });
    const { data } = (await run(builder.build(["velocity_next"]))).velocity_next as FloatTensor;
    return points.map(({ scale }, row) => {
      const conditional = data.subarray((pairs - rows + row) * size, (pairs - rows + row + 1) * size);
      if (scale === null) return { value: conditional.slice(), difference: null, scale };
      const [value, difference] = [new Float32Array(size), new Float32Array(size)];
      for (let i = 0; i < size; i++) {
        const u = data[row * size + i]!;
        difference[i] = conditional[i]! - u;
        value[i] = u + scale * difference[i]!;
      }
      return { value, difference, scale };
    });
  }
}
