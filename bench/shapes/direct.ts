/**
 * The embedded model's networks in this process, for samplers that the product does not have: the same graphs on the
 * same runtime as the public API, one launch at a time, with the state in JavaScript between launches.
 */

import "../telemetry.js";
import path from "node:path";
import * as ort from "onnxruntime-node";
import { type Checkpoint, openCheckpoint } from "../../lib/checkpoint/index.js";
import type { FloatTensor, Tensor } from "../../lib/common/tensor.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { toRgb } from "../../lib/generation/image.js";
import { NoiseGenerator } from "../../lib/generation/noise.js";
import { positionCrop } from "../../lib/generation/templates.js";
import { PromptEncoder, promptOf } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { Constant, Program } from "../../lib/program/program.js";
import { Executor } from "../../lib/runtimes/onnxruntime/executor.js";
import type { Values, Velocity } from "./baselines.js";
import type { Pixels } from "./world.js";

/** Text conditions of a batch, unconditional rows first. */
export interface Condition {
  readonly context: FloatTensor;
  readonly pooled: FloatTensor;
}

export class Direct {
  readonly checkpoint: Checkpoint;
  readonly #graphs: GraphLibrary;
  readonly #prompts: PromptEncoder;
  readonly #executor: Executor;
  readonly #known = new Set<string>();
  /** Milliseconds of all launches of the sampling step so far, and their number. */
  sampled = { milliseconds: 0, launches: 0 };

  private constructor(checkpoint: Checkpoint, options: { threads?: number }) {
    this.checkpoint = checkpoint;
    this.#executor = new Executor(ort, { weights: "folded", ...options });
    this.#graphs = new GraphLibrary(checkpoint);
    this.#prompts = new PromptEncoder(this.#graphs);
  }

  static async open(folder: string = embeddedModel, options: { threads?: number } = {}): Promise<Direct> {
    return new Direct(await openCheckpoint(folder), options);
  }

  /** Latents' shape [rows, C, h, w] of square pictures. */
  shape(rows: number, size: number): [number, number, number, number] {
    const side = size / this.checkpoint.vae.config.factor;
    return [rows, this.checkpoint.vae.config.latentChannels, side, side];
  }

  /** The noise that the public API gives pictures with these seeds. */
  noise(seed: number, rows: number, size: number): Values {
    const [, c, h, w] = this.shape(rows, size);
    const each = c * h * w;
    const noise = new Float32Array(rows * each);
    for (let row = 0; row < rows; row++) noise.set(new NoiseGenerator(seed + row).draw(each), row * each);
    return noise;
  }

  async condition(captions: readonly string[]): Promise<Condition> {
    const texts = [...captions.map(() => ""), ...captions];
    const prepared = await this.#prompts.prepare(texts.map(promptOf), this.#prompts.defaultSequenceLength);
    const encoded = await this.#prompts.encode(prepared, (programs) =>
      Promise.all(programs.map(({ program }) => this.#run(program))),
    );
    return this.#prompts.stack(encoded);
  }

  /** The guided velocity; x holds `rows` latents of `size` px. */
  velocity(condition: Condition, guidance: number, rows: number, size: number): Velocity {
    const pairOf = this.pair("predict", condition, rows, size);
    return async (x, sigma) => {
      const velocity = await pairOf(x, sigma, new Float32Array(2 * x.length));
      return x.map((_, i) => velocity[i]! + guidance * (velocity[x.length + i]! - velocity[i]!));
    };
  }

  /** Both halves of a velocity, unconditional rows first, from the transformer, or from the refiner, which corrects a given pair. */
  pair(
    type: "predict" | "refine",
    { context, pooled }: Condition,
    rows: number,
    size: number,
  ): (x: Values, sigma: number, given: Values) => Promise<Values> {
    const shape = this.shape(rows, size);
    const pair = [2 * rows, ...shape.slice(1)];
    const part = this.checkpoint[type === "predict" ? "transformer" : "refiner"];
    if (!part) throw new RangeError("The model has no refiner.");
    const positions = positionCrop(part, shape);
    return async (x, sigma, given) => {
      const row = (value: number) => tensor([rows], new Float32Array(rows).fill(value));
      const { velocity_next } = await this.#run({
        constants: {
          ...{ x: tensor(shape, x), velocity: tensor(pair, given) },
          ...{ context: value(context), pooled: value(pooled), positions },
          ...{ sigma: row(sigma), zero: row(0), guidance: row(1) },
        },
        registers: {
          x_next: { dtype: "float32", shape },
          velocity_next: { dtype: "float32", shape: pair },
        },
        instructions: [
          {
            op: "launch",
            graph: `${type}.guidance`,
            inputs: {
              ...{
                x: "x",
                velocity: "velocity",
                context: "context",
                pooled: "pooled",
                position_embedding: "positions",
              },
              ...{ sigma: "sigma", a_in: "zero", a_old: "zero", a_new: "zero", guidance: "guidance" },
            },
            outputs: { x_next: "x_next", velocity_next: "velocity_next" },
            label: { kind: "step", name: "velocity" },
          },
        ],
        results: ["velocity_next"],
      });
      return velocity_next!.data as Float32Array;
    };
  }

  async decode(latents: Values, rows: number, size: number): Promise<Pixels[]> {
    const image = { dtype: "float32" as const, shape: [rows, this.checkpoint.vae.config.outChannels, size, size] };
    const results = await this.#run({
      constants: { latents: tensor(this.shape(rows, size), latents) },
      registers: { image },
      instructions: [
        {
          op: "launch",
          graph: "vae_decoder",
          inputs: { latents: "latents" },
          outputs: { image: "image" },
          label: { kind: "decode", name: "decoder" },
        },
      ],
      results: ["image"],
    });
    const pixels = results.image as FloatTensor;
    return Array.from({ length: rows }, (_, row) => ({ width: size, height: size, data: toRgb(pixels, row) }));
  }

  #run(program: Program): Promise<Record<string, Tensor>> {
    for (const instruction of program.instructions) {
      if (instruction.op !== "launch" || this.#known.has(instruction.graph)) continue;
      const graph = this.#graphs.get(instruction.graph);
      this.#executor.add({ digest: graph.name, bytes: graph.bytes, root: path.parse(process.cwd()).root });
      this.#known.add(instruction.graph);
    }
    const digests = Object.fromEntries([...this.#known].map((name) => [name, name]));
    return this.#executor.run(program, digests, {
      asked: new Set(),
      launched: ({ milliseconds }) => {
        const [first] = program.instructions;
        if (first?.op !== "launch" || first.label.kind !== "step") return;
        this.sampled.milliseconds += milliseconds;
        this.sampled.launches++;
      },
    });
  }
}

const value = (tensor: FloatTensor): Constant => ({ kind: "value", tensor });
const tensor = (shape: readonly number[], data: Values): Constant => value({ dtype: "float32", shape, data });
