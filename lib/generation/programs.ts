/**
 * A schedule → the program that draws pictures with it. A program has one or more stages of rising size; each runs the
 * fused steps of its blocks over double-buffered registers. Between stages a join lifts the picture, before the first
 * one an original may be encoded, after each block an original's known region may be put back; the decoder ends it.
 * Graphs are named by the caller; nothing here knows what computes them.
 */

import { LruCache } from "../common/lru-cache.js";
import { elementCount, float32, type Tensor } from "../common/tensor.js";
import { Pair, ProgramBuilder, rowsAtOnce } from "../program/builder.js";
import type { Constant, Program } from "../program/program.js";
import type { Block } from "../schedule/blocks.js";
import { planSteps, type StepLaunch } from "../schedule/steps.js";

/** What a stage works on. B pictures, C latent channels. */
export interface StageValues {
  /** [B, C, h, w], fresh noise of this stage. */
  readonly noise: Tensor;
  /** An original in pixels, [1, 3, H, W] in [-1, 1]: to start from (first stage), and to keep where there is a mask. */
  readonly original?: Tensor | undefined;
  /** The same in latents, [1, C, h, w], where it has been encoded already; in place of `original`. */
  readonly originalLatents?: Tensor | undefined;
  /** [1, 1, h, w], 1 where new content is wanted, 0 where the original stays. */
  readonly mask?: Tensor | undefined;
}

/** One size of a run. */
export interface SamplingStage extends StageValues {
  readonly blocks: readonly Block[];
  /** Noise levels, one more than blocks, falling; the first is where the stage starts. */
  readonly sigmas: readonly number[];
  /** Positions, [1, patches, width], for each step type that the blocks use: the two networks differ in width. */
  readonly positions: { readonly predict: Constant; readonly refine: Constant | null };
}

/** What differs between two runs of the same launches. */
export interface SamplingValues {
  readonly stages: readonly StageValues[];
  /** Text condition: [R, T, joint] and [R, pooled], R = 2B (unconditional first) with guidance, else B. */
  readonly context: Tensor;
  readonly pooled: Tensor;
  /** The linear map from latents to colours, [3, C] and [3, 1], for previews. */
  readonly colours?: { readonly map: Tensor; readonly bias: Tensor } | undefined;
}

export interface SamplingRequest extends SamplingValues {
  readonly stages: readonly SamplingStage[];
  /** Guidance scale, or null to run without guidance. */
  readonly guidanceScale: number | null;
  readonly graphs: Readonly<
    Record<"predict" | "refine" | "decode" | "encode" | "join" | "noised" | "merge" | "preview", string>
  >;
  /** Pixels of a latent's side, and channels of a picture. */
  readonly vaeFactor: number;
  readonly imageChannels: number;
  /** At most this many pixels go through the autoencoder at once: its activations dwarf everything else. */
  readonly pixelsAtOnce: number;
  /** Added to the sizes of steps, where the text is not as long as usual: for a table of costs. */
  readonly textSize?: string | undefined;
  /** After each block, the picture that the run is heading for: by the map to `colours`, or decoded. */
  readonly preview?: "fast" | "decoded" | undefined;
}

export interface SamplingProgram {
  readonly program: Program;
  /** Names of the results: final latents [B, C, h, w] and decoded picture [B, 3, H, W]. */
  readonly latents: string;
  readonly image: string;
}

export function samplingProgram(request: SamplingRequest): SamplingProgram {
  const planner = new SamplingPlanner(request);
  let latents = "";
  for (const index of request.stages.keys()) latents = planner.stage(index, latents);
  const image = planner.decode(latents, request.stages.length - 1, "image", { kind: "decode", name: "decoder" });
  return { program: planner.builder.build([latents, image]), latents, image };
}

/**
 * The same launches on other values.
 * @param values of the shapes that the program was made for
 */
export function withValues({ program, ...names }: SamplingProgram, values: SamplingValues): SamplingProgram {
  const constants = { ...program.constants };
  for (const [name, tensor] of namedValues(values)) constants[name] = { kind: "value", tensor };
  return { ...names, program: { ...program, constants } };
}

/** A request's values by the names of the constants that hold them. */
function* namedValues({ stages, context, pooled, colours }: SamplingValues): Iterable<readonly [string, Tensor]> {
  yield ["context", context];
  yield ["pooled", pooled];
  if (colours) {
    yield ["colours.map", colours.map];
    yield ["colours.bias", colours.bias];
  }
  for (const [index, { noise, original, originalLatents, mask }] of stages.entries()) {
    const name = stageName(index);
    yield [`${name}.noise`, noise];
    const kept = originalLatents ?? original;
    if (kept) yield [`${name}.original`, kept];
    if (mask) yield [`${name}.mask`, mask];
  }
}

function stageName(index: number): string {
  return `stage${index + 1}`;
}

/** Zeros of the latest few shapes: programs that hold the same array can share it on the device. */
const knownZeros = new LruCache<Tensor>(8);

function zeros(shape: readonly number[]): Tensor {
  const key = shape.join();
  return knownZeros.get(key) ?? knownZeros.set(key, float32(shape, new Float32Array(elementCount(shape))));
}

class SamplingPlanner {
  readonly builder = new ProgramBuilder();
  readonly #request: SamplingRequest;
  readonly #rows: number;
  readonly #networkRows: number;
  /** Blocks of the stages before the present one. */
  #blocksBefore = 0;

  constructor(request: SamplingRequest) {
    this.#request = request;
    this.#rows = request.stages[0]!.noise.shape[0]!;
    this.#networkRows = request.context.shape[0]!;
    for (const [name, tensor] of namedValues(request)) this.builder.value(name, tensor);
  }

  /**
   * Plans one stage.
   * @param before the finished latents of the stage before; unused for the first
   * @returns the operand that holds the finished latents
   */
  stage(index: number, before: string): string {
    const { builder } = this;
    const { graphs } = this.#request;
    const stage = this.#request.stages[index]!;
    const name = stageName(index);
    const [, channels, height, width] = stage.noise.shape as [number, number, number, number];
    const noise = `${name}.noise`;
    const latentShape = [this.#rows, channels, height, width];
    const velocityShape = [this.#networkRows, channels, height, width];
    const x = new Pair(builder, `${name}.x`, latentShape, noise);
    // Zeros stand in for the velocity where none exists yet; its coefficients are 0.
    const velocity = new Pair(
      builder,
      `${name}.velocity`,
      velocityShape,
      builder.value(`${name}.zeros`, zeros(velocityShape)),
    );
    const start = stage.sigmas[0]!;

    // 1. Where the stage starts: noise, a picture on the way to noise, or the picture of the stage before.
    const original = this.#encodeOriginal(stage, name, [1, channels, height, width]);
    if (index > 0) x.at = this.#join(index, before, noise, x.next(), start);
    else if (original) {
      const to = x.next();
      builder.instructions.push({
        op: "launch",
        graph: graphs.noised,
        inputs: { latents: original, noise, sigma: builder.perRow(start, this.#rows) },
        outputs: { x: to },
        sharing: { size: this.#size(stage) },
        label: { kind: "edit", name: "the original on its way to noise" },
      });
      x.at = to;
    }
    const merge = (sigma: number) => this.#merge(stage, name, original!, noise, x, velocity, sigma);
    if (stage.mask && index > 0) merge(start);

    // 2. Its blocks.
    const launches = planSteps(stage.blocks, stage.sigmas);
    for (const step of launches) {
      this.#step(stage, name, step, x, velocity);
      if (!step.last) continue;
      const reached = stage.sigmas[step.block + 1]!;
      if (stage.mask) merge(reached);
      if (this.#request.preview) this.#preview(index, name, step.block, x, velocity, reached);
    }
    this.#blocksBefore += stage.blocks.length;
    return x.at;
  }

  /** @returns the register of decoded pictures */
  decode(
    latents: string,
    index: number,
    register: string,
    label: { kind: "decode" | "preview"; name: string; block?: number },
  ): string {
    const { noise } = this.#request.stages[index]!;
    const rowShape = this.#imageShape(noise);
    return this.builder.byRows({
      graph: this.#request.graphs.decode,
      rows: this.#rows,
      limit: this.#limit(noise),
      size: this.#size(this.#request.stages[index]!),
      // What a stage leaves on the way, a preview, is as eager as the stage.
      deferrable: label.kind === "preview",
      inputs: { latents },
      output: { name: "image", register, rowShape },
      label,
      reported: label.kind === "preview",
    });
  }

  #step(stage: SamplingStage, name: string, step: StepLaunch, x: Pair, velocity: Pair): void {
    const { builder } = this;
    const { graphs, guidanceScale } = this.#request;
    const rows = this.#rows;
    const positions = `${name}.position_embedding.${step.type}`;
    builder.constants[positions] ??= stage.positions[step.type]!;
    const nextX = x.next();
    const nextVelocity = velocity.next();
    const [from, to] = [stage.sigmas[step.block]!, stage.sigmas[step.block + 1]!];
    const block = this.#blocksBefore + step.block;
    const blocks = this.#request.stages.reduce((sum, { blocks }) => sum + blocks.length, 0);
    builder.instructions.push({
      op: "launch",
      graph: graphs[step.type],
      inputs: {
        x: x.at,
        velocity: velocity.at,
        context: "context",
        pooled: "pooled",
        position_embedding: positions,
        sigma: builder.perRow(step.sigma, rows),
        a_in: builder.perRow(step.aIn, rows),
        a_old: builder.perRow(step.aOld, rows),
        a_new: builder.perRow(step.aNew, rows),
        ...(guidanceScale !== null && { guidance: builder.perRow(guidanceScale, rows) }),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      mustBeFinite: [nextX],
      sharing: {
        size: `${this.#size(stage)}${this.#request.textSize ?? ""}`,
        deferrable: step.type === "refine" || stage !== this.#request.stages.at(-1),
      },
      label: {
        kind: "step",
        name: `block ${block + 1} of ${blocks} (${stage.blocks[step.block]}, sigma ${from.toFixed(4)} to ${to.toFixed(4)})`,
        block,
        last: step.last,
      },
    });
    x.at = nextX;
    if (step.keepsVelocity) velocity.at = nextVelocity;
  }

  /** Latents of the stage's original, or null without one. */
  #encodeOriginal(stage: SamplingStage, name: string, shape: readonly number[]): string | null {
    if (stage.originalLatents) return `${name}.original`;
    if (!stage.original) return null;
    const latents = this.builder.register(`${name}.original.latents`, shape);
    this.builder.instructions.push({
      op: "launch",
      graph: this.#request.graphs.encode,
      inputs: { image: `${name}.original` },
      outputs: { latents },
      mustBeFinite: [latents],
      sharing: { size: this.#size(stage), maxRows: this.#limit(stage.noise) },
      label: { kind: "edit", name: "encoder of the original" },
    });
    return latents;
  }

  #join(index: number, before: string, noise: string, to: string, sigma: number): string {
    const stage = this.#request.stages[index]!;
    return this.builder.byRows({
      graph: this.#request.graphs.join,
      rows: this.#rows,
      limit: this.#limit(stage.noise),
      size: `${this.#size(this.#request.stages[index - 1]!)}-${this.#size(stage)}`,
      deferrable: true,
      inputs: { latents: before, noise },
      perRow: { sigma },
      output: { name: "x", register: to, rowShape: stage.noise.shape.slice(1) },
      label: { kind: "upscale", name: `join of stages ${index} and ${index + 1}` },
    });
  }

  #merge(
    stage: SamplingStage,
    name: string,
    original: string,
    noise: string,
    x: Pair,
    velocity: Pair,
    sigma: number,
  ): void {
    const { builder } = this;
    const nextX = x.next();
    const nextVelocity = velocity.next();
    builder.instructions.push({
      op: "launch",
      graph: this.#request.graphs.merge,
      inputs: {
        x: x.at,
        velocity: velocity.at,
        latents: original,
        noise,
        mask: `${name}.mask`,
        sigma: builder.perRow(sigma, this.#rows),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      sharing: { size: this.#size(stage) },
      label: { kind: "edit", name: `the known region at sigma ${sigma.toFixed(4)}` },
    });
    x.at = nextX;
    velocity.at = nextVelocity;
  }

  #preview(index: number, name: string, stepBlock: number, x: Pair, velocity: Pair, sigma: number): void {
    const { builder } = this;
    const { graphs, guidanceScale } = this.#request;
    const decoded = this.#request.preview === "decoded";
    const block = this.#blocksBefore + stepBlock;
    const latents = builder.register(`${name}.preview.latents`, x.shape);
    const image = builder.register(`${name}.preview.colours`, [this.#rows, 3, x.shape[2]!, x.shape[3]!]);
    builder.instructions.push({
      op: "launch",
      graph: graphs.preview,
      inputs: {
        x: x.at,
        velocity: velocity.at,
        sigma: builder.perRow(sigma, this.#rows),
        ...(guidanceScale !== null && { guidance: builder.perRow(guidanceScale, this.#rows) }),
        map: "colours.map",
        bias: "colours.bias",
      },
      outputs: { latents, image },
      ...(!decoded && { reported: [image] }),
      sharing: { size: this.#size(this.#request.stages[index]!) },
      label: { kind: "preview", name: `preview after block ${block + 1}`, block, last: !decoded },
    });
    if (decoded)
      this.decode(latents, index, `${name}.preview.image`, { kind: "preview", name: "decoder of a preview", block });
  }

  /** A stage's size in pixels. */
  #size({ noise }: SamplingStage): string {
    const [, height, width] = this.#imageShape(noise);
    return `${width}x${height}`;
  }

  #imageShape(noise: Tensor): readonly number[] {
    const { vaeFactor, imageChannels } = this.#request;
    return [imageChannels, noise.shape[2]! * vaeFactor, noise.shape[3]! * vaeFactor];
  }

  /** Pictures that go through the autoencoder at once. */
  #limit(noise: Tensor): number {
    const [, height, width] = this.#imageShape(noise) as [number, number, number];
    return rowsAtOnce(this.#request.pixelsAtOnce, width, height);
  }
}
