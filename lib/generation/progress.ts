/**
 * What lies between a request for several pictures and the launches that draw them: each picture is a program of one row,
 * so that rows of any requests can share launches; what the rows report and result in is put together again.
 */

import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import type { ResolvedGenerateOptions } from "../options.js";
import type { LaunchLabel, Program } from "../program/program.js";
import type { LaunchReport } from "../runtimes/runtime.js";
import { type Block, ProgramBuilder } from "../schedule/index.js";
import { Image, toRgb } from "./image.js";

/** A tensor of which only the shape matters: for programs that only say what will be launched. */
export function placeholder(...shape: number[]): FloatTensor {
  return { dtype: "float32", shape, data: new Float32Array(0) };
}

/** Row `row` of a tensor as a tensor of one row. */
export function rowOf(tensor: FloatTensor, row: number): FloatTensor {
  const [, ...rest] = tensor.shape;
  const size = elementCount(rest);
  return float32([1, ...rest], tensor.data.subarray(row * size, (row + 1) * size));
}

/** Tensors of one row as one tensor. */
export function stacked(rows: readonly Tensor[]): FloatTensor {
  const [, ...rest] = rows[0]!.shape;
  if (rows.length === 1) return rows[0] as FloatTensor;
  const size = elementCount(rest);
  const data = new Float32Array(rows.length * size);
  for (const [row, tensor] of rows.entries()) data.set((tensor as FloatTensor).data, row * size);
  return float32([rows.length, ...rest], data);
}

/** The program that takes an original, [1, 3, H, W], to latents, [1, C, h, w]; its result is "latents". */
export function encodeProgram(image: Tensor, latentShape: readonly number[], graph: string): Program {
  const [, , height, width] = image.shape as [number, number, number, number];
  const builder = new ProgramBuilder();
  const latents = builder.byRows({
    graph,
    rows: 1,
    // A request has one, and engines are built for one.
    limit: 1,
    size: `${width}x${height}`,
    inputs: { image: builder.value("image", image) },
    output: { name: "latents", register: "latents", rowShape: latentShape.slice(1) },
    label: { kind: "edit", name: "encoder of the original" },
  });
  return builder.build([latents]);
}

/** Turns reports of rows into times, previews and step events. A step is done when all rows have done it. */
export class StepReporter {
  /** Milliseconds of each block. */
  readonly steps: number[] = [];
  /** Milliseconds by kind of launch. */
  readonly spent: Record<LaunchLabel["kind"], number> = {
    encode: 0,
    step: 0,
    preview: 0,
    upscale: 0,
    edit: 0,
    decode: 0,
  };
  readonly #blocks: readonly { stage: number; block: Block; sigma: number }[];
  readonly #stages: number;
  readonly #rows: number;
  readonly #options: Pick<ResolvedGenerateOptions, "preview" | "onStep">;
  /** For each block: rows that have done it, and their previews. */
  readonly #done = new Map<number, { rows: number; readonly previews: Image[][] }>();

  constructor(
    stages: readonly { readonly blocks: readonly Block[]; readonly sigmas: readonly number[] }[],
    rows: number,
    options: Pick<ResolvedGenerateOptions, "preview" | "onStep">,
  ) {
    this.#blocks = stages.flatMap(({ blocks, sigmas }, stage) =>
      blocks.map((block, index) => ({ stage, block, sigma: sigmas[index + 1]! })),
    );
    this.#stages = stages.length;
    this.#rows = rows;
    this.#options = options;
  }

  /** @param first whether no other row of this request has reported the same launch */
  heard(row: number, { launch: { label }, milliseconds, values }: LaunchReport, first: boolean): void {
    const step = label.block;
    if (first) {
      this.spent[label.kind] += milliseconds;
      if (label.kind === "step") this.steps[step!] = (this.steps[step!] ?? 0) + milliseconds;
    }
    if (step === undefined) return;
    const done = this.#done.get(step) ?? { rows: 0, previews: [] };
    this.#done.set(step, done);
    for (const value of Object.values(values) as FloatTensor[])
      done.previews[row] = [new Image(value.shape[3]!, value.shape[2]!, toRgb(value, 0))];
    if (!label.last || label.kind !== (this.#options.preview ? "preview" : "step")) return;
    if (++done.rows < this.#rows) return;
    this.#done.delete(step);
    this.#options.onStep?.({
      step,
      steps: this.#blocks.length,
      ...this.#blocks[step]!,
      stages: this.#stages,
      milliseconds: this.steps[step]!,
      previews: done.previews.flat(),
    });
  }
}
