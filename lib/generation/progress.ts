/**
 * Progress of a request: each picture is a program of one row, and its launches may be shared with others; what the rows
 * report is put together to times, previews, latents and step events.
 */

import { elementCount, type FloatTensor, float32 } from "../common/tensor.js";
import type { StepEvent } from "../model.js";
import type { LaunchLabel } from "../program/program.js";
import type { LaunchReport } from "../runtimes/runtime.js";
import type { Block, Schedule } from "../schedule/index.js";
import { Image, toRgb } from "./image.js";

/** Turns reports of rows into times, previews, latents and step events. A step is done when all rows have done it. */
export class ProgressReporter {
  /** Milliseconds of each block. */
  readonly steps: number[] = [];
  /** Milliseconds by kind of launch. */
  readonly milliseconds: Record<LaunchLabel["kind"], number> = {
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
  readonly #onStep: (event: StepEvent) => void;
  /** For each block: rows that have done it, their previews, and their latents. */
  readonly #done = new Map<number, { rows: number; readonly previews: Image[][]; latents: FloatTensor | null }>();

  constructor(stages: readonly { readonly schedule: Schedule }[], rows: number, onStep: (event: StepEvent) => void) {
    this.#blocks = stages.flatMap(({ schedule: { blocks, sigmas } }, stage) =>
      blocks.map((block, index) => ({ stage, block, sigma: sigmas[index + 1]! })),
    );
    this.#stages = stages.length;
    this.#rows = rows;
    this.#onStep = onStep;
  }

  /** @param first whether no other row of this request has reported the same launch */
  observe(row: number, { launch: { label }, milliseconds, values }: LaunchReport, first: boolean): void {
    const step = label.block;
    if (first) {
      this.milliseconds[label.kind] += milliseconds;
      if (label.kind === "step") this.steps[step!] = (this.steps[step!] ?? 0) + milliseconds;
    }
    if (step === undefined) return;
    const done = this.#done.get(step) ?? { rows: 0, previews: [], latents: null };
    this.#done.set(step, done);
    for (const value of Object.values(values) as FloatTensor[])
      if (label.kind === "preview") done.previews[row] = [new Image(value.shape[3]!, value.shape[2]!, toRgb(value, 0))];
      else {
        done.latents ??= this.#emptyLatents(value);
        done.latents.data.set(value.data, row * value.data.length);
      }
    if (!label.last) return;
    if (++done.rows < this.#rows) return;
    this.#done.delete(step);
    this.#onStep({
      step,
      steps: this.#blocks.length,
      ...this.#blocks[step]!,
      stages: this.#stages,
      milliseconds: this.steps[step]!,
      previews: done.previews.flat(),
      latents: done.latents,
    });
  }

  /** Of all rows, which come one by one. */
  #emptyLatents({ shape: [, ...area] }: FloatTensor): FloatTensor {
    const shape = [this.#rows, ...area];
    return float32(shape, new Float32Array(elementCount(shape)));
  }
}
