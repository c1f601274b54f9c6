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
  guidedKeysOf,
  networks,
  type UpscaleName,
  upscaleConstants,
  upscaleJump,
  upscaleScale,
  upscales,
  type Variants,
} from "../networks/index.js";
import { DoubleBuffer, ProgramBuilder } from "../program/builder.js";
import type { Constant, Launch, LaunchLabel, Program, Sharing } from "../program/program.js";
import { type Combination, moveBy, type Schedule, type StepLaunch, type StepType } from "../schedule/index.js";
import { type Additions, additionsAt, noAdditions, type StepPlace } from "./additions.js";
import type { LoraValues } from "./lora-inputs.js";

/** [B, C, h, w] */
export type LatentShape = readonly [rows: number, channels: number, height: number, width: number];

/** One size of a run. B pictures, C latent channels. */
export interface SamplingStage {
  readonly schedule: Schedule;
  /** Which steps of the whole run its blocks are. Default: all of them. */
  readonly place?: StepPlace | undefined;
  /** Of the noise and of the latents, [B, C, h, w]. */
  readonly latentShape: LatentShape;
  /** How it starts from the stage before; unused for the first. Default: pixels. */
  readonly upscale?: UpscaleName | undefined;
  /** Positions, [1, patches, width], for each step type that the schedule uses: the two networks differ in width. */
  readonly positions: Readonly<Partial<Record<StepType, Constant>>>;
  /** Of each of the kind's ControlNets that has positions of its own: those for the stage, [1, patches, width]. */
  readonly controlPositions?: readonly (Constant | null)[] | undefined;
  /** Whether there are init latents, those of an original: to start from (first stage), and to keep where there is a mask. */
  readonly hasInit: boolean;
  readonly hasMask: boolean;
}

/** What pictures of a kind have in common. */
export interface SamplingKind {
  readonly stages: readonly SamplingStage[];
  /** Shapes of a row of the text condition: [T, joint] and [pooled]. */
  readonly contextShape: readonly [tokens: number, width: number];
  readonly pooledShape: readonly [width: number];
  /** How guided steps are guided. Default: `cfg`. */
  readonly guidanceMode?: "cfg" | "cfg_zero";
  /** What the transformer is run with besides. Default: nothing. */
  readonly additions?: Additions | undefined;
  /** Pixels of a latent's side, and channels of a picture. */
  readonly vaeFactor: number;
  readonly imageChannels: number;
  /** Added to the sizes of steps, where the text is not as long as usual: for a table of costs. */
  readonly textSize?: string | undefined;
  /** After blocks, the picture as it would end from there: by a linear map to colours, or decoded. */
  readonly preview?: "fast" | "decoded" | undefined;
  /** After how many blocks, over all stages, at most; default: after each. */
  readonly previewCount?: number | undefined;
  /** The network that decodes previews. Default: the one that decodes pictures. */
  readonly previewDecoder?: string | undefined;
  /** The network that enlarges in pixels. Default: the one of `upscales`. */
  readonly pixelsUpscale?: string | undefined;
  /** Whether the final latents are a result: every result is copied on its way here. */
  readonly keepsLatents: boolean;
  /** Whether the decoder ends it. Default: true. */
  readonly decodes?: boolean | undefined;
  /** Whether the latents after each block go with the reports. Default: false. */
  readonly reportsLatents?: boolean | undefined;
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
    /** For each ControlNet of the kind that some step of the stage has what it reads of its picture, [B, its channels, h, w]; see `controlledStages`. */
    readonly controls?: readonly (Tensor | undefined)[] | undefined;
  }[];
  /** Matrices of LoRAs and what they are scaled by: see `LowRankLayout`. */
  readonly lora?: LoraValues | null | undefined;
  /** For guided steps, [2B, T, joint] and [2B, pooled], unconditional rows first. */
  readonly guided?: TextValues | undefined;
  /** For steps without guidance, [B, T, joint] and [B, pooled]. */
  readonly alone?: TextValues | undefined;
  /** The linear map from latents to colours, [3, C] and [3, 1], for previews. */
  readonly colours?: { readonly map: Tensor; readonly bias: Tensor } | undefined;
}

/** A text condition. */
interface TextValues {
  readonly context: Tensor;
  readonly pooled: Tensor;
}

export interface SamplingTemplate {
  readonly program: Program;
  /** Final latents [B, C, h, w], a result only if the kind keeps them. */
  readonly latents: string;
  /** Decoded picture [B, 3, H, W], a result; null where nothing is decoded. */
  readonly image: string | null;
  /** Indices of the blocks, over all stages, that previews follow. */
  readonly previewed: ReadonlySet<number>;
  /** Rows of the network besides those of guidance: of skip-layer guidance. */
  readonly thirdRows: number;
}

/**
 * The blocks that previews follow: all of them, or `count` evenly over the schedule, of n blocks the ⌈i·n/(count + 1)⌉-th for i = 1 to `count`.
 * Those are never the last one, where the picture itself follows.
 * @returns indices from 0
 */
export function previewedBlocks(blocks: number, count: number | undefined): ReadonlySet<number> {
  if (count === undefined) return new Set(Array.from({ length: blocks }, (_, index) => index));
  const most = Math.max(0, Math.min(count, blocks - 1));
  return new Set(Array.from({ length: most }, (_, index) => Math.ceil(((index + 1) * blocks) / (most + 1)) - 1));
}

/** A picture's values by the names of their slots. */
export function slotValues({ stages, guided, alone, colours, lora }: SamplingValues): Record<string, Tensor> {
  const values: Record<string, Tensor> = {};
  if (guided) Object.assign(values, { "guided.context": guided.context, "guided.pooled": guided.pooled });
  if (alone) Object.assign(values, { context: alone.context, pooled: alone.pooled });
  if (colours) Object.assign(values, { "colours.map": colours.map, "colours.bias": colours.bias });
  for (const [name, tensor] of Object.entries(lora ?? {})) values[`lora.${name}`] = tensor;
  for (const [index, { controls = [], ...stage }] of stages.entries()) {
    for (const [name, tensor] of Object.entries(stage)) if (tensor) values[`${stageName(index)}.${name}`] = tensor;
    for (const [at, tensor] of controls.entries()) if (tensor) values[controlSlot(stageName(index), at)] = tensor;
  }
  return values;
}

/** Whether schedules have steps with guidance, and steps without. */
export function guidanceOf(stages: readonly { readonly schedule: Schedule }[]): {
  readonly guided: boolean;
  readonly alone: boolean;
} {
  const steps = stages.flatMap(({ schedule }) => schedule.launches.filter(({ type }) => type !== "combine"));
  return {
    guided: steps.some(({ guidance }) => guidance !== null),
    alone: steps.some(({ guidance }) => guidance === null),
  };
}

export function samplingTemplate(kind: SamplingKind): SamplingTemplate {
  const writer = new TemplateWriter(kind);
  let latents = "";
  for (const index of kind.stages.keys()) latents = writer.stage(index, latents);
  const { keepsLatents, decodes = true } = kind;
  const decoder = { kind: "decode", name: "decoder" } as const;
  const image = decodes ? writer.decode(latents, kind.stages.length - 1, "image", decoder) : null;
  const program = writer.builder.build([...(keepsLatents ? [latents] : []), ...(image === null ? [] : [image])]);
  return { program, latents, image, previewed: writer.previewed, thirdRows: writer.thirdRows };
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

/** The slot of a ControlNet's picture. */
function controlSlot(stage: string, index: number): string {
  return `${stage}.control_${index + 1}`;
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

/** Whether a velocity is a pair, which guidance makes one of, or alone. */
type VelocityRows = "pair" | "alone";

interface EvaluatedVelocity {
  readonly register: string;
  readonly rows: VelocityRows;
  readonly guidance: number | null;
}

/**
 * The velocity that was evaluated last, and where steps extrapolate the one before it, in registers of which there is always
 * one to write.
 */
class VelocityBuffer {
  readonly #builder: ProgramBuilder;
  readonly #name: string;
  readonly #shape: LatentShape;
  readonly #keepsBefore: boolean;
  #at: EvaluatedVelocity | null = null;
  #before: EvaluatedVelocity | null = null;

  constructor(builder: ProgramBuilder, name: string, { latentShape, schedule }: SamplingStage) {
    this.#builder = builder;
    this.#name = name;
    this.#shape = latentShape;
    this.#keepsBefore = schedule.launches.some(({ extrapolation }) => extrapolation !== undefined);
  }

  /** Null where none exists yet. */
  get at(): EvaluatedVelocity | null {
    return this.#at;
  }

  /** The one before it; null where none is kept. */
  get before(): EvaluatedVelocity | null {
    return this.#before;
  }

  /** A velocity that was evaluated. */
  push(velocity: EvaluatedVelocity): void {
    if (this.#keepsBefore) this.#before = this.#at;
    this.#at = velocity;
  }

  /** The same velocity, changed, in another register. */
  replace(register: string): void {
    if (this.#at) this.#at = { ...this.#at, register };
  }

  /** The register to write next: one that holds no velocity which is still wanted. */
  next(rows: VelocityRows): string {
    const held = [this.#at?.register, this.#before?.register];
    const names = ["a", "b", "c"].map((which) => `${this.#nameOf(rows)}_${which}`);
    return this.#builder.register(names.find((name) => !held.includes(name))!, this.#shapeOf(rows));
  }

  /** The register of a velocity that is extrapolated for one launch. */
  extrapolated(rows: VelocityRows): string {
    return this.#builder.register(`${this.#nameOf(rows)}.extrapolated`, this.#shapeOf(rows));
  }

  #nameOf(rows: VelocityRows): string {
    return `${this.#name}.velocity${rows === "pair" ? "" : ".alone"}`;
  }

  /** Zeros stand in for a velocity whose coefficients are 0. */
  none(rows: VelocityRows): string {
    return this.#builder.value(`${this.#name}.zeros.${rows}`, zeros(this.#shapeOf(rows)));
  }

  #shapeOf(rows: VelocityRows): readonly number[] {
    const [batch, ...area] = this.#shape;
    return [rows === "pair" ? 2 * batch : batch, ...area];
  }
}

/** What a stage holds between its launches. */
class StageState {
  readonly x: DoubleBuffer;
  readonly velocity: VelocityBuffer;
  readonly #builder: ProgramBuilder;
  readonly #name: string;
  readonly #memory: Partial<Record<"first" | "second", DoubleBuffer>> = {};

  constructor(builder: ProgramBuilder, name: string, stage: SamplingStage, noise: string) {
    this.#builder = builder;
    this.#name = name;
    this.x = new DoubleBuffer(builder, `${name}.x`, stage.latentShape, noise);
    this.velocity = new VelocityBuffer(builder, name, stage);
  }

  /** m₁ of combinations; zeros at first. */
  get first(): DoubleBuffer {
    return this.#memoryOf("first");
  }

  /** m₂ of combinations; zeros at first. */
  get second(): DoubleBuffer {
    return this.#memoryOf("second");
  }

  #memoryOf(which: "first" | "second"): DoubleBuffer {
    this.#memory[which] ??= new DoubleBuffer(
      this.#builder,
      `${this.#name}.${which}`,
      this.x.shape,
      this.velocity.none("alone"),
    );
    return this.#memory[which];
  }
}

class TemplateWriter {
  readonly builder = new ProgramBuilder();
  /** Blocks, over all stages, that previews follow. */
  readonly previewed: ReadonlySet<number>;
  /** See `SamplingTemplate`. */
  thirdRows = 0;
  readonly #kind: SamplingKind;
  readonly #rows: number;
  /** Blocks of the stages before the present one, and of all. */
  #blocksBefore = 0;
  readonly #blocks: number;

  constructor(kind: SamplingKind) {
    this.#kind = kind;
    this.#rows = kind.stages[0]!.latentShape[0];
    this.#blocks = kind.stages.reduce((sum, { schedule }) => sum + schedule.blocks.length, 0);
    this.previewed = previewedBlocks(kind.preview ? this.#blocks : 0, kind.previewCount);
    const { guided, alone } = guidanceOf(kind.stages);
    const slots = (prefix: string, rows: number) => {
      this.builder.slot(`${prefix}context`, [rows, ...kind.contextShape]);
      this.builder.slot(`${prefix}pooled`, [rows, ...kind.pooledShape]);
    };
    if (guided) slots("guided.", 2 * this.#rows);
    if (alone) slots("", this.#rows);
    const { lora } = this.#additions;
    if (lora) {
      this.builder.slot("lora.down", [this.#rows, lora.down], true);
      this.builder.slot("lora.up", [this.#rows, lora.up], true);
      this.builder.slot("lora.scale", [this.#rows, lora.rank]);
    }
  }

  get #additions(): Additions {
    return this.#kind.additions ?? noAdditions;
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
    const { blocks, sigmas, start, launches } = stage.schedule;
    const [, ...area] = stage.latentShape;
    const noise = builder.slot(`${name}.noise`, stage.latentShape);
    if (stage.hasInit) builder.slot(`${name}.init`, [1, ...area]);
    if (stage.hasMask) builder.slot(`${name}.mask`, [1, 1, area[1], area[2]]);
    const state = new StageState(builder, name, stage, noise);
    const { x } = state;

    // 1. Where the stage starts: what the stage before has drawn, upscaled, init latents with noise, or noise.
    if (index > 0) x.at = this.#upscale(index, before, noise, x.next(), sigmas[0]!);
    else if (stage.hasInit) x.at = this.#scaleNoise(stage, name, noise, x.next(), start);
    // Of those only init latents have the known region at the level where the blocks begin.
    if (stage.hasMask && (index > 0 || start !== sigmas[0])) this.#blend(stage, name, noise, state, sigmas[0]!);

    // 2. Its blocks.
    for (const step of launches) {
      this.#step(index, name, step, state);
      if (!step.last) continue;
      const reached = sigmas[step.block + 1]!;
      const block = this.#blocksBefore + step.block;
      if (stage.hasMask) this.#blend(stage, name, noise, state, reached, block);
      if (this.previewed.has(block)) this.#preview(index, name, block, state, reached);
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
    const network = (isPreview && this.#kind.previewDecoder) || "vae_decoder";
    this.builder.launch({
      graph: this.#graph(network),
      inputs: { latents },
      outputs: { image },
      mustBeFinite: [image],
      ...(isPreview && { reported: [image] }),
      sharing: {
        ...{ size: this.#size(stage), ...sharingOf(network, [height, width]) },
        ...(isPreview && { deferrable: true }),
      },
      label: { ...label, last: true },
    });
    return image;
  }

  /**
   * The launches of a step: the fused step, and what is combined before and after it. A velocity that was computed with another
   * number of rows (with guidance, where this step has none, or the reverse) cannot be an operand of the fused step: then it is
   * added by combinations, as it was guided where it was computed.
   */
  #step(index: number, name: string, step: StepLaunch, state: StageState): void {
    const { builder } = this;
    const { velocity } = state;
    const { type, sigma, aNew, guidance, extrapolation, combination } = step;
    const writer = this.#stepWriter(index, step);
    if (type === "combine") {
      writer.combine(state, combination!, true);
      return;
    }
    const rows = guidance === null ? "alone" : "pair";
    const isOther = velocity.at !== null && velocity.at.rows !== rows;
    let { aIn, aOld } = step;
    if (isOther) {
      // x + aIn·w is the point; what the update adds of w is then less by as much.
      if (aIn !== 0) writer.combine(state, moveBy(aIn), false);
      [aIn, aOld] = [0, aOld - aIn];
    }
    const old = isOther ? null : extrapolation ? writer.extrapolated(state, extrapolation) : velocity.at?.register;
    const positions = `${name}.position_embedding.${type}`;
    builder.constants[positions] ??= this.#kind.stages[index]!.positions[type]!;
    const perRow = (value: number) => builder.perRow(value, this.#rows);
    const nextX = state.x.next();
    const nextVelocity = velocity.next(rows);
    const prefix = guidance === null ? "" : "guided.";
    const after = isOther && aOld !== 0;
    const added = type === "predict" ? this.#added(index, step) : null;
    writer.launch(type, {
      ...{ variants: added?.variants ?? {} },
      inputs: {
        ...added?.inputs,
        ...{ x: state.x.at, velocity: old ?? velocity.none(rows) },
        ...{ context: `${prefix}context`, pooled: `${prefix}pooled`, position_embedding: positions },
        ...{ sigma: perRow(sigma), a_in: perRow(aIn), a_old: perRow(after ? 0 : aOld), a_new: perRow(aNew) },
        ...(guidance !== null && { guidance: perRow(guidance) }),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      mustBeFinite: [nextX],
      last: step.last && !after && !combination,
    });
    state.x.at = nextX;
    if (after) writer.combine(state, moveBy(aOld), step.last && !combination);
    const evaluated = { register: nextVelocity, rows, guidance } as const;
    if (step.keepsVelocity) velocity.push(evaluated);
    if (combination) writer.combine(state, combination, step.last);
  }

  /** What the transformer is run with in a step: variants of the graph, and their inputs. */
  #added(index: number, step: StepLaunch): { readonly variants: Variants; readonly inputs: Record<string, string> } {
    const { builder } = this;
    const stage = this.#kind.stages[index]!;
    const name = stageName(index);
    const { lora, controls, skipLayers, variants } = additionsAt(this.#additions, stage, step);
    const perRow = (value: number) => builder.perRow(value, this.#rows);
    if (skipLayers) this.thirdRows += this.#rows;
    const inputs: Record<string, string> = {
      ...(lora && { lora_down: "lora.down", lora_up: "lora.up", lora_scale: "lora.scale" }),
      ...(skipLayers && { skip_scale: perRow(skipLayers.scale) }),
    };
    const [, , height, width] = stage.latentShape;
    for (const [place, [which, { scale, channels }]] of controls.entries()) {
      const input = `control_${place + 1}`;
      inputs[input] = builder.slot(controlSlot(name, which), [this.#rows, channels, height, width]);
      inputs[`${input}_scale`] = perRow(scale);
      const positions = stage.controlPositions?.[which];
      if (!positions) continue;
      const constant = `${controlSlot(name, which)}.positions`;
      builder.constants[constant] ??= positions;
      inputs[`${input}_positions`] = constant;
    }
    return { variants, inputs };
  }

  /** What is reported with the launch that ends the blocks' own work on x. */
  #reportOf(x: string | undefined): Pick<Launch, "reported"> {
    return this.#kind.reportsLatents ? { reported: [x!] } : {};
  }

  /** Writes launches of one step: what they have in common. */
  #stepWriter(index: number, step: StepLaunch) {
    const { builder } = this;
    const { stages, textSize } = this.#kind;
    const stage = stages[index]!;
    const { blocks, sigmas } = stage.schedule;
    const [from, to] = [sigmas[step.block]!, sigmas[step.block + 1]!];
    const block = this.#blocksBefore + step.block;
    const isFollowed = stage.hasMask || this.previewed.has(block);
    const name = `block ${block + 1} of ${this.#blocks} (${blocks[step.block]}, sigma ${from.toFixed(4)} to ${to.toFixed(4)})`;
    const launch = (
      network: string,
      {
        last,
        variants,
        ...launch
      }: Pick<Launch, "inputs" | "outputs" | "mustBeFinite"> & { last: boolean; variants?: Variants },
      guided = "guidance" in launch.inputs,
    ) =>
      builder.launch({
        graph: this.#graph(network, guided, variants),
        ...launch,
        // Those of an edit are what the known region was put into.
        ...(last && !stage.hasMask && this.#reportOf(launch.outputs.x_next)),
        sharing: {
          size: `${this.#size(stage)}${networks[network]!.role === "step" ? (textSize ?? "") : ""}`,
          ...sharingOf(network, this.#pixels(stage)),
          ...(index < stages.length - 1 && { deferrable: true }),
        },
        label: { kind: "step", name, block, last: last && !isFollowed },
      });
    const combine = ({ x, velocity, first, second }: StageState, weights: Combination, last: boolean) => {
      const { register, guidance } = velocity.at!;
      const perRow = (value: number) => builder.perRow(value, this.#rows);
      const weightsOf = (output: keyof Combination) => {
        const [w, m1, m2] = weights[output];
        return { [`${output}_velocity`]: perRow(w), [`${output}_first`]: perRow(m1), [`${output}_second`]: perRow(m2) };
      };
      const next = { x_next: x.next(), first_next: first.next(), second_next: second.next() };
      launch("combine", {
        inputs: {
          ...{ x: x.at, velocity: register, first: first.at, second: second.at },
          ...{ ...weightsOf("x"), ...weightsOf("first"), ...weightsOf("second") },
          ...(guidance !== null && { guidance: perRow(guidance) }),
        },
        outputs: next,
        mustBeFinite: [next.x_next],
        last,
      });
      [x.at, first.at, second.at] = [next.x_next, next.first_next, next.second_next];
    };
    const extrapolated = ({ velocity }: StageState, weight: number): string => {
      const { register, rows } = velocity.at!;
      const next = velocity.extrapolated(rows);
      const inputs = {
        velocity: register,
        before: velocity.before!.register,
        weight: builder.perRow(weight, this.#rows),
      };
      launch("extrapolate", { inputs, outputs: { velocity_next: next }, last: false }, rows === "pair");
      return next;
    };
    return { launch, combine, extrapolated };
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
    const network = (upscale === "pixels" && this.#kind.pixelsUpscale) || upscales[upscale];
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

  /** @param block that it is a part of; absent where a stage starts */
  #blend(
    stage: SamplingStage,
    name: string,
    noise: string,
    { x, velocity }: StageState,
    sigma: number,
    block?: number,
  ): void {
    const rows = velocity.at?.rows ?? (stage.schedule.launches[0]?.guidance == null ? "alone" : "pair");
    const [nextX, nextVelocity] = [x.next(), velocity.next(rows)];
    this.builder.launch({
      graph: this.#graph("inpaint_blend", rows === "pair"),
      inputs: {
        ...{ x: x.at, velocity: velocity.at?.register ?? velocity.none(rows) },
        ...{ latents: `${name}.init`, noise, mask: `${name}.mask` },
        sigma: this.builder.perRow(sigma, this.#rows),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      ...(block !== undefined && this.#reportOf(nextX)),
      sharing: { size: this.#size(stage), ...sharingOf("inpaint_blend", this.#pixels(stage)) },
      label: {
        ...{ kind: "edit", name: `the known region at sigma ${sigma.toFixed(4)}` },
        ...(block !== undefined && { block, last: !this.previewed.has(block) }),
      },
    });
    x.at = nextX;
    velocity.replace(nextVelocity);
  }

  #preview(index: number, name: string, block: number, { x, velocity }: StageState, sigma: number): void {
    const { builder } = this;
    const { preview, stages } = this.#kind;
    const isDecoded = preview === "decoded";
    const [, channels, height, width] = x.shape as LatentShape;
    const latents = builder.register(`${name}.preview.latents`, x.shape);
    const image = builder.register(`${name}.preview.colours`, [this.#rows, 3, height, width]);
    const { register, guidance } = velocity.at!;
    builder.launch({
      graph: this.#graph("preview", guidance !== null),
      inputs: {
        ...{ x: x.at, velocity: register, sigma: builder.perRow(sigma, this.#rows) },
        ...(guidance !== null && { guidance: builder.perRow(guidance, this.#rows) }),
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

  /** The network's graph, in the variant for guided pictures or for others. @param variants others */
  #graph(network: string, guided = false, variants: Variants = {}): string {
    return graphName({ ...guidedKeysOf(network, [guided], this.#kind.guidanceMode)[0]!, ...variants });
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
