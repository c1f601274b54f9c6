/**
 * A schedule → the program that draws a picture with it. A program has one or more stages of rising size; each runs the
 * fused steps of its blocks over double-buffered registers. Between stages the picture is upscaled, before the first one
 * it may start from init latents, after each block the known region of an edit may be put back; the decoder ends it.
 *
 * What differs between two pictures of a kind (noise, text, init latents) are slots: requests of a kind share
 * one template and bind their values to it.
 */

import { LruCache } from "../common/lru-cache.js";
import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import {
  graphName,
  keysOf,
  networks,
  type UpscaleName,
  upscaleConstants,
  upscaleJump,
  upscaleScale,
  upscales,
} from "../networks/index.js";
import { DoubleBuffer, ProgramBuilder } from "../program/builder.js";
import type { Constant, LaunchLabel, Program, Sharing } from "../program/program.js";
import type { Schedule, StepLaunch, StepType } from "../schedule/index.js";

/** [B, C, h, w] */
export type LatentShape = readonly [rows: number, channels: number, height: number, width: number];

/** One size of a run. B pictures, C latent channels. */
export interface SamplingStage {
  readonly schedule: Schedule;
  /** Of the noise and of the latents, [B, C, h, w]. */
  readonly latentShape: LatentShape;
  /** How it starts from the stage before; unused for the first. Default: pixels. */
  readonly upscale?: UpscaleName | undefined;
  /** Positions, [1, patches, width], for each step type that the schedule uses: the two networks differ in width. */
  readonly positions: Readonly<Partial<Record<StepType, Constant>>>;
  /** Whether there are init latents, those of an original: to start from (first stage), and to keep where there is a mask. */
  readonly hasInit: boolean;
  readonly hasMask: boolean;
}

/** What pictures of a kind have in common. */
export interface SamplingKind {
  readonly stages: readonly SamplingStage[];
  /** Shapes of the text condition: [R, T, joint] and [R, pooled], R = 2B (unconditional first) with guidance, else B. */
  readonly contextShape: readonly [rows: number, tokens: number, width: number];
  readonly pooledShape: readonly [rows: number, width: number];
  /** Guidance scale, or null to run without guidance. */
  readonly guidanceScale: number | null;
  /** Pixels of a latent's side, and channels of a picture. */
  readonly vaeFactor: number;
  readonly imageChannels: number;
  /** Added to the sizes of steps, where the text is not as long as usual: for a table of costs. */
  readonly textSize?: string | undefined;
  /** After each block, the picture as it would end from there: by a linear map to colours, or decoded. */
  readonly preview?: "fast" | "decoded" | undefined;
  /** Whether the final latents are a result besides the picture: every result is copied on its way here. */
  readonly keepsLatents: boolean;
}

/** What differs between them. */
export interface SamplingValues {
  readonly stages: readonly {
    /** [B, C, h, w], fresh noise of this stage. */
    readonly noise: Tensor;
    /** Init latents, [1, C, h, w]. */
    readonly init?: Tensor | undefined;
    /** [1, 1, h, w], 1 where new content is wanted, 0 where the original stays. */
    readonly mask?: Tensor | undefined;
  }[];
  readonly context: Tensor;
  readonly pooled: Tensor;
  /** The linear map from latents to colours, [3, C] and [3, 1], for previews. */
  readonly colours?: { readonly map: Tensor; readonly bias: Tensor } | undefined;
}

export interface SamplingTemplate {
  readonly program: Program;
  /** Final latents [B, C, h, w], a result only if the kind keeps them. */
  readonly latents: string;
  /** Decoded picture [B, 3, H, W], a result. */
  readonly image: string;
}

/** A picture's values by the names of their slots. */
export function slotValues({ stages, context, pooled, colours }: SamplingValues): Record<string, Tensor> {
  const values: Record<string, Tensor> = { context, pooled };
  if (colours) Object.assign(values, { "colours.map": colours.map, "colours.bias": colours.bias });
  for (const [index, stage] of stages.entries())
    for (const [name, tensor] of Object.entries(stage)) if (tensor) values[`${stageName(index)}.${name}`] = tensor;
  return values;
}

export function samplingTemplate(kind: SamplingKind): SamplingTemplate {
  const writer = new TemplateWriter(kind);
  let latents = "";
  for (const index of kind.stages.keys()) latents = writer.stage(index, latents);
  const image = writer.decode(latents, kind.stages.length - 1, "image", { kind: "decode", name: "decoder" });
  return { program: writer.builder.build([...(kind.keepsLatents ? [latents] : []), image]), latents, image };
}

/** The program that encodes a picture, [1, 3, H, W]; its result is "latents", [1, C, h, w]. */
export function encoderProgram(
  image: FloatTensor | "slot",
  [, channels, height, width]: LatentShape,
  factor: number,
): Program {
  const builder = new ProgramBuilder();
  const pixels = [height * factor, width * factor] as const;
  const shape = [1, 3, ...pixels];
  const latents = builder.register("latents", [1, channels, height, width]);
  builder.launch({
    graph: graphName({ network: "vae_encoder" }),
    inputs: { image: image === "slot" ? builder.slot("image", shape) : builder.value("image", image) },
    outputs: { latents },
    mustBeFinite: [latents],
    sharing: { size: sizeText(pixels), ...sharingOf("vae_encoder", pixels) },
    label: { kind: "edit", name: "encoder of a picture" },
  });
  return builder.build([latents]);
}

function stageName(index: number): string {
  return `stage${index + 1}`;
}

/** How launches of a network may be shared, by its row, for pictures of a size in pixels. */
function sharingOf(network: string, [height, width]: readonly [number, number]): Partial<Sharing> {
  const { maxRows, deferrable } = networks[network]!;
  return { ...(maxRows && { maxRows: maxRows(width, height) }), ...(deferrable && { deferrable }) };
}

/** A size as tables of costs name it. */
function sizeText([height, width]: readonly [number, number]): string {
  return `${width}x${height}`;
}

/** Zeros of the latest few shapes: programs that hold the same array can share it on the device. */
const knownZeros = new LruCache<Tensor>(8);

function zeros(shape: readonly number[]): Tensor {
  const key = shape.join();
  return knownZeros.get(key) ?? knownZeros.set(key, float32(shape, new Float32Array(elementCount(shape))));
}

class TemplateWriter {
  readonly builder = new ProgramBuilder();
  readonly #kind: SamplingKind;
  readonly #rows: number;
  /** Blocks of the stages before the present one, and of all. */
  #blocksBefore = 0;
  readonly #blocks: number;

  constructor(kind: SamplingKind) {
    this.#kind = kind;
    this.#rows = kind.stages[0]!.latentShape[0];
    this.#blocks = kind.stages.reduce((sum, { schedule }) => sum + schedule.blocks.length, 0);
    this.builder.slot("context", kind.contextShape);
    this.builder.slot("pooled", kind.pooledShape);
  }

  /**
   * Writes one stage.
   * @param before the latents that the stage before ended with; unused for the first
   * @returns the operand that holds those that it ends with
   */
  stage(index: number, before: string): string {
    const { builder } = this;
    const stage = this.#kind.stages[index]!;
    const name = stageName(index);
    const { blocks, sigmas, launches } = stage.schedule;
    const [, ...area] = stage.latentShape;
    const noise = builder.slot(`${name}.noise`, stage.latentShape);
    if (stage.hasInit) builder.slot(`${name}.init`, [1, ...area]);
    if (stage.hasMask) builder.slot(`${name}.mask`, [1, 1, area[1], area[2]]);
    const x = new DoubleBuffer(builder, `${name}.x`, stage.latentShape, noise);
    // Zeros stand in for the velocity where none exists yet; its coefficients are 0.
    const velocityShape = [this.#kind.contextShape[0], ...area];
    const none = builder.value(`${name}.zeros`, zeros(velocityShape));
    const velocity = new DoubleBuffer(builder, `${name}.velocity`, velocityShape, none);

    // 1. Where the stage starts: what the stage before has drawn, upscaled, init latents with noise, or noise.
    if (index > 0) x.at = this.#upscale(index, before, noise, x.next(), sigmas[0]!);
    else if (stage.hasInit) x.at = this.#scaleNoise(stage, name, noise, x.next(), sigmas[0]!);
    if (stage.hasMask && index > 0) this.#blend(stage, name, noise, x, velocity, sigmas[0]!);

    // 2. Its blocks.
    for (const step of launches) {
      this.#step(index, name, step, x, velocity);
      if (!step.last) continue;
      const reached = sigmas[step.block + 1]!;
      if (stage.hasMask) this.#blend(stage, name, noise, x, velocity, reached);
      if (this.#kind.preview) this.#preview(index, name, step.block, x, velocity, reached);
    }
    this.#blocksBefore += blocks.length;
    return x.at;
  }

  /** @returns the register of decoded pictures */
  decode(latents: string, index: number, register: string, label: LaunchLabel): string {
    const stage = this.#kind.stages[index]!;
    const [height, width] = this.#pixels(stage);
    const image = this.builder.register(register, [this.#rows, this.#kind.imageChannels, height, width]);
    const isPreview = label.kind === "preview";
    this.builder.launch({
      graph: this.#graph("vae_decoder"),
      inputs: { latents },
      outputs: { image },
      mustBeFinite: [image],
      ...(isPreview && { reported: [image] }),
      sharing: {
        ...{ size: this.#size(stage), ...sharingOf("vae_decoder", [height, width]) },
        ...(isPreview && { deferrable: true }),
      },
      label: { ...label, last: true },
    });
    return image;
  }

  #step(index: number, name: string, step: StepLaunch, x: DoubleBuffer, velocity: DoubleBuffer): void {
    const { builder } = this;
    const { stages, guidanceScale, textSize } = this.#kind;
    const stage = stages[index]!;
    const { blocks, sigmas } = stage.schedule;
    const positions = `${name}.position_embedding.${step.type}`;
    builder.constants[positions] ??= stage.positions[step.type]!;
    const perRow = (value: number) => builder.perRow(value, this.#rows);
    const [nextX, nextVelocity] = [x.next(), velocity.next()];
    const [from, to] = [sigmas[step.block]!, sigmas[step.block + 1]!];
    const block = this.#blocksBefore + step.block;
    builder.launch({
      graph: this.#graph(step.type),
      inputs: {
        ...{ x: x.at, velocity: velocity.at, context: "context", pooled: "pooled", position_embedding: positions },
        ...{ sigma: perRow(step.sigma), a_in: perRow(step.aIn), a_old: perRow(step.aOld), a_new: perRow(step.aNew) },
        ...(guidanceScale !== null && { guidance: perRow(guidanceScale) }),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      mustBeFinite: [nextX],
      sharing: {
        size: `${this.#size(stage)}${textSize ?? ""}`,
        ...sharingOf(step.type, this.#pixels(stage)),
        ...(index < stages.length - 1 && { deferrable: true }),
      },
      label: {
        kind: "step",
        name: `block ${block + 1} of ${this.#blocks} (${blocks[step.block]}, sigma ${from.toFixed(4)} to ${to.toFixed(4)})`,
        ...{ block, last: step.last },
      },
    });
    x.at = nextX;
    if (step.keepsVelocity) velocity.at = nextVelocity;
  }

  #scaleNoise(stage: SamplingStage, name: string, noise: string, x: string, sigma: number): string {
    this.builder.launch({
      graph: this.#graph("scale_noise"),
      inputs: { latents: `${name}.init`, noise, sigma: this.builder.perRow(sigma, this.#rows) },
      outputs: { x },
      sharing: { size: this.#size(stage), ...sharingOf("scale_noise", this.#pixels(stage)) },
      label: { kind: "edit", name: `init latents with noise of sigma ${sigma.toFixed(4)}` },
    });
    return x;
  }

  #upscale(index: number, latents: string, noise: string, x: string, sigma: number): string {
    const [before, stage] = [this.#kind.stages[index - 1]!, this.#kind.stages[index]!];
    const { upscale = "pixels" } = stage;
    const network = upscales[upscale];
    this.builder.launch({
      graph: this.#graph(network),
      inputs: {
        ...{ latents, noise, sigma: this.builder.perRow(sigma, this.#rows) },
        ...(upscale === "latents" && this.#repeats(index, sigma)),
      },
      outputs: { x },
      mustBeFinite: [x],
      sharing: {
        size: `${this.#size(before)}-${this.#size(stage)}`,
        ...sharingOf(network, this.#pixels(stage)),
      },
      label: { kind: "upscale", name: `upscaling from stage ${index} to stage ${index + 1}` },
    });
    return x;
  }

  /** What upscaling in latents needs besides. */
  #repeats(index: number, sigma: number): Record<string, string> {
    const [before, next] = [index - 1, index].map((each) => {
      const [, , height, width] = this.#kind.stages[each]!.latentShape;
      return [height, width] as const;
    }) as [readonly [number, number], readonly [number, number]];
    const constants = Object.entries(upscaleConstants(before, next)).map(([name, tensor]): [string, string] => [
      name,
      this.builder.value(`${stageName(index)}.upscale.${name}`, tensor),
    ]);
    const scale = this.builder.perRow(upscaleScale(sigma, upscaleJump(before, next)), this.#rows);
    return { ...Object.fromEntries(constants), scale };
  }

  #blend(
    stage: SamplingStage,
    name: string,
    noise: string,
    x: DoubleBuffer,
    velocity: DoubleBuffer,
    sigma: number,
  ): void {
    const [nextX, nextVelocity] = [x.next(), velocity.next()];
    this.builder.launch({
      graph: this.#graph("inpaint_blend"),
      inputs: {
        ...{ x: x.at, velocity: velocity.at, latents: `${name}.init`, noise, mask: `${name}.mask` },
        sigma: this.builder.perRow(sigma, this.#rows),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      sharing: { size: this.#size(stage), ...sharingOf("inpaint_blend", this.#pixels(stage)) },
      label: { kind: "edit", name: `the known region at sigma ${sigma.toFixed(4)}` },
    });
    x.at = nextX;
    velocity.at = nextVelocity;
  }

  #preview(
    index: number,
    name: string,
    stageBlock: number,
    x: DoubleBuffer,
    velocity: DoubleBuffer,
    sigma: number,
  ): void {
    const { builder } = this;
    const { guidanceScale, preview, stages } = this.#kind;
    const isDecoded = preview === "decoded";
    const block = this.#blocksBefore + stageBlock;
    const [, channels, height, width] = x.shape as LatentShape;
    const latents = builder.register(`${name}.preview.latents`, x.shape);
    const image = builder.register(`${name}.preview.colours`, [this.#rows, 3, height, width]);
    builder.launch({
      graph: this.#graph("preview"),
      inputs: {
        ...{ x: x.at, velocity: velocity.at, sigma: builder.perRow(sigma, this.#rows) },
        ...(guidanceScale !== null && { guidance: builder.perRow(guidanceScale, this.#rows) }),
        ...{ map: builder.slot("colours.map", [3, channels]), bias: builder.slot("colours.bias", [3, 1]) },
      },
      outputs: { latents, image },
      ...(!isDecoded && { reported: [image] }),
      sharing: { size: this.#size(stages[index]!), ...sharingOf("preview", this.#pixels(stages[index]!)) },
      label: { kind: "preview", name: `preview after block ${block + 1}`, block, last: !isDecoded },
    });
    if (isDecoded)
      this.decode(latents, index, `${name}.preview.image`, { kind: "preview", name: "decoder of a preview", block });
  }

  /** The network's graph, in the variants that the pictures ask for. */
  #graph(network: string): string {
    return graphName(keysOf(network, { guidance: [this.#kind.guidanceScale !== null] })[0]!);
  }

  /** Height and width of a stage in pixels. */
  #pixels({ latentShape }: SamplingStage): readonly [height: number, width: number] {
    const { vaeFactor } = this.#kind;
    return [latentShape[2] * vaeFactor, latentShape[3] * vaeFactor];
  }

  #size(stage: SamplingStage): string {
    return sizeText(this.#pixels(stage));
  }
}
