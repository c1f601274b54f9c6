/**
 * What `verify:gpu` compares: programs with everything they need as values, so that they mean the same on this machine
 * and in a bundle on another. Every engine of a checkpoint in every profile, one launch each, on inputs of the size that
 * it sees in use; then whole schedules.
 */

import type { Checkpoint } from "../lib/checkpoint/index.js";
import { elementCount, type FloatTensor, float32, int64, type Tensor } from "../lib/common/tensor.js";
import type { Additions } from "../lib/generation/additions.js";
import { type RequiredEngine, requiredEngines } from "../lib/generation/engines.js";
import { NoiseGenerator } from "../lib/generation/noise.js";
import {
  type LatentShape,
  type SamplingStage,
  type SamplingValues,
  samplingTemplate,
  slotValues,
} from "../lib/generation/programs.js";
import { latentShapeOf } from "../lib/generation/sizes.js";
import { positionCrop, positionsOf } from "../lib/generation/templates.js";
import { type Condition, PromptEncoder, promptOf } from "../lib/generation/text.js";
import {
  type GraphKey,
  graphKey,
  graphName,
  keysOf,
  listed,
  networksOf,
  sigmaBeforeUpscale,
  textEncodersOf,
  type UpscaleName,
  upscaleConstants,
  upscaleJump,
  type VariantValues,
} from "../lib/networks/index.js";
import type { GraphLibrary } from "../lib/networks/library.js";
import { shapeWith } from "../lib/onnx/index.js";
import { bind, type Constant, type Program, type StoredConstant } from "../lib/program/program.js";
import { ConstantReader } from "../lib/program/stored.js";
import { parseBlocks, scheduleOf, upscaleSigmas } from "../lib/schedule/index.js";

export interface Case {
  readonly name: string;
  readonly kind: "engine" | "texts" | "sampler";
  /** Whether it belongs to the small set (--quick), which has every graph once and every kind of program. */
  readonly quick: boolean;
  /** Its constants are values. */
  readonly program: Program;
}

export interface Size {
  readonly width: number;
  readonly height: number;
}

export interface CaseOptions {
  readonly sizes: readonly Size[];
  readonly batches: readonly number[];
}

/** Runs a program for its results: the reference. */
export type Run = (program: Program) => Promise<Record<string, Tensor>>;

const prompts = [
  "a red circle on a white background",
  "a photograph of a lighthouse at dusk, waves breaking on the rocks",
  "two blue squares and a small green triangle",
  "an oil painting of a harbour in the morning fog",
];

/** Seeds count up, so that no two inputs are alike. */
class Inputs {
  #seed = 1;

  normal(shape: readonly number[], scale = 1): FloatTensor {
    const data = new NoiseGenerator(this.#seed++).draw(elementCount(shape));
    if (scale !== 1) for (let index = 0; index < data.length; index++) data[index]! *= scale;
    return float32(shape, data);
  }

  /** Values from `from` to `to`, evenly. */
  ramp(shape: readonly number[], from: number, to: number): FloatTensor {
    const length = elementCount(shape);
    return float32(
      shape,
      Float32Array.from({ length }, (_, index) => from + ((to - from) * index) / Math.max(1, length - 1)),
    );
  }

  mask(shape: readonly number[]): FloatTensor {
    return float32(
      shape,
      Float32Array.from({ length: elementCount(shape) }, (_, index) => (index % 5 < 3 ? 1 : 0)),
    );
  }
}

/** @param run the reference, which encodes the texts that the schedules are drawn for */
export async function casesOf(graphs: GraphLibrary, options: CaseOptions, run: Run): Promise<Case[]> {
  const { checkpoint } = graphs;
  const inputs = new Inputs();
  const cases: Case[] = [];
  for (const engine of enginesOf(graphs, options))
    for (const [index, profile] of engine.profiles.entries()) {
      const size = profile.width === undefined ? "" : `, ${profile.width} × ${profile.height}`;
      const program = await engineProgram(graphs, engine.graph, profile.inputs, inputs);
      cases.push({
        name: `${engine.graph}, batch ${profile.batch}${size}`,
        kind: "engine",
        quick: index === 0,
        program,
      });
    }

  const encoder = new PromptEncoder(graphs);
  const texts = [...new Set(["", ...prompts])].slice(0, 1 + Math.max(...options.batches));
  const prepared = await encoder.prepare(texts.map(promptOf), encoder.defaultSequenceLength);
  const pending = await encoder.pending(prepared);
  const results: Record<string, Tensor>[] = [];
  for (const { text, graph, program } of pending.missing.values()) {
    cases.push({ name: `text "${text}", ${graph}`, kind: "texts", quick: text === "", program });
    results.push(await run(program));
  }
  const encoded = await encoder.encoded(prepared, pending, results);
  const schedules = schedulesOf(graphs, options);
  for (const example of schedules) {
    const { name, batch, guided, sizes, quick } = example;
    const rows = Array.from({ length: batch }, (_, row) => encoded[1 + (row % (encoded.length - 1))]!);
    const condition = encoder.stack(guided ? [...rows.map(() => encoded[0]!), ...rows] : rows);
    const stages = await Promise.all(sizes.map((_, index) => stageOf(checkpoint, example, index, inputs)));
    const lora = example.additions?.lora && loraOf(example.additions.lora, batch, inputs);
    cases.push({ name, kind: "sampler", quick, program: schedule(checkpoint, stages, { condition, lora }, example) });
  }
  return cases;
}

/**
 * All that a picture may need: both kinds of guidance, dynamic LoRAs, skip-layer guidance, the ControlNets that are open, editing, previews,
 * and stages where there are two sizes.
 */
export function enginesOf(graphs: GraphLibrary, { sizes, batches }: CaseOptions): RequiredEngine[] {
  const skipLayers = leftOut(graphs.checkpoint);
  const controlIds = [...graphs.checkpoint.controlNets.keys()];
  const features = sizes.length > 1 ? (["editing", "previews", "stages"] as const) : (["editing", "previews"] as const);
  return requiredEngines(graphs, { sizes, batches, guidance: "both", features, skipLayers, lorasRank, controlIds });
}

/** The graphs of a checkpoint for each kind of guidance, and of each network that comes with more, one with all of it. */
export function graphsWithAndWithout(checkpoint: Checkpoint): GraphKey[] {
  const controls = [...checkpoint.controlNets.keys()];
  const all: VariantValues = {
    ...{ guidance: [true], lora: [lorasRank], skipped: [listed(leftOut(checkpoint))] },
    ...(controls.length > 0 && { controls: [listed(controls)] }),
  };
  return networksOf(checkpoint).flatMap(({ name, row: { variants } }) => [
    ...keysOf(name, { guidance: [true, false] }),
    ...(variants.includes("lora") ? keysOf(name, all) : []),
  ]);
}

interface Example {
  readonly name: string;
  readonly batch: number;
  readonly guided: boolean;
  readonly sizes: readonly Size[];
  readonly blocks: readonly string[];
  readonly inpainted: boolean;
  /** Of the second stage. */
  readonly upscale: UpscaleName;
  /** What the transformer is run with besides. */
  readonly additions: Additions | undefined;
  readonly quick: boolean;
}

function schedulesOf(graphs: GraphLibrary, { sizes, batches }: CaseOptions): Example[] {
  const { checkpoint } = graphs;
  const refined = checkpoint.refiner !== null;
  const [size] = sizes as [Size, ...Size[]];
  const most = Math.max(...batches);
  const one = Math.min(...batches);
  const schedules: Example[] = [];
  const add = (name: string, batch: number, blocks: string[], more: Partial<Example> = {}) => {
    const usual = { guided: true, sizes: [size], inpainted: false, upscale: "pixels", additions: undefined } as const;
    const chosen = { ...usual, quick: false, ...more } as const;
    const where = chosen.sizes.map(({ width, height }) => `${width} × ${height}`).join(" to ");
    schedules.push({ ...chosen, name: `${name} (${blocks.join(" ")}), batch ${batch}, ${where}`, batch, blocks });
  };
  for (const batch of new Set([one, most])) {
    add("Euler", batch, ["E4"]);
    add("Heun", batch, ["H3"]);
    add("pseudo corrector", batch, ["H1P4"]);
    if (refined) add("FlowTurbo", batch, ["H1P5R3"]);
  }
  // What remembers more than one velocity: skipping, and a method with memory of its own.
  add("multistep", one, ["A2S1U3"], { quick: true });
  // The predictor and the refiner in one block.
  if (refined) add("refined midpoint", one, ["A2C2"], { quick: true });
  add("without guidance", one, [refined ? "H1P2R1" : "H1P2"], { guided: false, quick: true });
  add("inpainting", one, [refined ? "H1P2R1" : "H1P2"], { inpainted: true, quick: true });
  const skipLayers = { layers: leftOut(checkpoint), scale: 2.8, start: 0.1, stop: 0.7 };
  add("skip-layer guidance", one, ["H2P2"], { additions: { lora: null, controls: [], skipLayers }, quick: true });
  const { rank, down, up } = graphs.get(graphName({ network: "predict", lora: lorasRank })).lowRank!;
  const lora = { rank, down, up };
  add("LoRAs of each picture", most, ["H1P1"], { additions: { lora, controls: [], skipLayers: null }, quick: true });
  const larger = sizes.find(
    ({ width, height }) => width >= size.width && height >= size.height && width * height > size.width * size.height,
  );
  const two = ["H1P2", refined ? "H1P1R1" : "H1P1"];
  if (larger) add("two stages", one, two, { sizes: [size, larger] });
  if (larger) add("two stages in latents", one, two, { sizes: [size, larger], upscale: "latents" });
  return schedules;
}

/** Rank of the low-rank branch that is checked. */
const lorasRank = 8;

/** Matrices of adapters, other ones for each picture. */
function loraOf(
  { rank, down, up }: NonNullable<Additions["lora"]>,
  batch: number,
  inputs: Inputs,
): SamplingValues["lora"] {
  return {
    ...{ down: inputs.normal([batch, down]), up: inputs.normal([batch, up]) },
    scale: loraScale([batch, rank]),
  };
}

/** Small, since the matrices are normal. */
const loraScale = (shape: readonly number[]) => float32(shape, new Float32Array(elementCount(shape)).fill(0.001));

/** Blocks that skip-layer guidance leaves out: one of each kind, the last among them. */
const leftOut = ({ transformer: { config } }: Checkpoint): number[] => [
  ...new Set([0, Math.trunc(config.numLayers / 2), config.numLayers - 1]),
];

/** Where the second stage starts. */
const upscaleSigma = 0.6;

const areaOf = ([, , height, width]: LatentShape) => [height, width] as const;

async function stageOf(
  checkpoint: Checkpoint,
  { sizes, blocks, batch, guided, inpainted, upscale }: Example,
  index: number,
  inputs: Inputs,
): Promise<{ readonly stage: SamplingStage; readonly values: SamplingValues["stages"][number] }> {
  const { scheduler } = checkpoint;
  const latentShape = latentShapeOf(checkpoint, batch, sizes[index]!);
  const [, ...area] = latentShape;
  const parsed = parseBlocks(blocks[index]!);
  const next = sizes[index + 1];
  const end =
    next && upscale === "latents"
      ? sigmaBeforeUpscale(upscaleSigma, upscaleJump(areaOf(latentShape), areaOf(latentShapeOf(checkpoint, 1, next))))
      : 0;
  const sigmas = upscaleSigmas(parsed.length, scheduler, index === 0 ? 1 : upscaleSigma, end);
  const positions: Record<string, Constant> = {};
  for (const [type, constant] of Object.entries(positionsOf(checkpoint, latentShape)))
    positions[type] = { kind: "value", tensor: await stored(constant as StoredConstant) };
  return {
    stage: {
      ...{ schedule: scheduleOf(parsed, sigmas, { guidance: guided ? 4 : null }), latentShape, upscale, positions },
      ...{ hasInit: inpainted, hasMask: inpainted },
    },
    values: {
      noise: inputs.normal(latentShape),
      ...(inpainted && { init: inputs.normal([1, ...area]), mask: inputs.mask([1, 1, area[1], area[2]]) }),
    },
  };
}

function schedule(
  { vae }: Checkpoint,
  stages: readonly Awaited<ReturnType<typeof stageOf>>[],
  { condition, lora }: { readonly condition: Condition; readonly lora: SamplingValues["lora"] | null | undefined },
  { guided, additions }: Example,
): Program {
  const { program } = samplingTemplate({
    stages: stages.map(({ stage }) => stage),
    contextShape: condition.context.shape.slice(1) as [number, number],
    pooledShape: condition.pooled.shape.slice(1) as [number],
    vaeFactor: vae.config.factor,
    imageChannels: vae.config.outChannels,
    additions,
    // Compared, as the pictures are.
    keepsLatents: true,
  });
  return bind(
    program,
    slotValues({
      ...{ stages: stages.map(({ values }) => values), lora: lora ?? undefined },
      [guided ? "guided" : "alone"]: condition,
    }),
  );
}

const constants = new ConstantReader();

async function stored(constant: StoredConstant): Promise<FloatTensor> {
  return float32(constant.shape, await constants.read(constant));
}

/** One launch of a graph on inputs of the given shapes. */
async function engineProgram(
  graphs: GraphLibrary,
  graph: string,
  shapes: Readonly<Record<string, readonly number[]>>,
  inputs: Inputs,
): Promise<Program> {
  const values: Record<string, Tensor> = {};
  for (const [input, shape] of Object.entries(shapes))
    values[input] = await inputOf(graphs.checkpoint, graph, input, shape, shapes, inputs);
  const outputs = outputsOf(graphs, graph, shapes);
  const named = (names: readonly string[], prefix: string) =>
    Object.fromEntries(names.map((name) => [name, `${prefix}.${name}`]));
  const registers = Object.entries(outputs).map(
    ([name, shape]) => [`out.${name}`, { dtype: "float32", shape }] as const,
  );
  return {
    constants: Object.fromEntries(
      Object.entries(values).map(([name, tensor]) => [`in.${name}`, { kind: "value", tensor }] as const),
    ),
    registers: Object.fromEntries(registers),
    instructions: [
      {
        op: "launch",
        graph,
        inputs: named(Object.keys(shapes), "in"),
        outputs: named(Object.keys(outputs), "out"),
        mustBeFinite: registers.map(([name]) => name),
        label: { kind: "step", name: `engine ${graph}` },
      },
    ],
    results: registers.map(([name]) => name),
  };
}

async function inputOf(
  checkpoint: Checkpoint,
  graph: string,
  input: string,
  shape: readonly number[],
  shapes: Readonly<Record<string, readonly number[]>>,
  inputs: Inputs,
): Promise<Tensor> {
  const { network } = graphKey(graph);
  const encoder = textEncodersOf(checkpoint).find(({ name }) => name === network);
  const constant = encoder?.text.constants?.(checkpoint, shape[0]!)[input];
  if (constant) return constant;
  switch (input) {
    case "ids": {
      const [rows, length] = shape as [number, number];
      const ids = new BigInt64Array(rows * length);
      for (let row = 0; row < rows; row++)
        ids.set((await encoder!.tokenizer.encode(prompts[row % prompts.length]!, length)).ids, row * length);
      return int64(shape, ids);
    }
    case "position_embedding":
      return stored(
        positionCrop(network === "refine" ? checkpoint.refiner! : checkpoint.transformer, shapes.x as LatentShape),
      );
    case "sigma":
    case "scale":
      return inputs.ramp(shape, 0.8, 0.3);
    case "a_in":
    case "a_old":
    case "a_new":
      return inputs.ramp(shape, -0.08, -0.12);
    case "guidance":
      return inputs.ramp(shape, 4, 5);
    case "skip_scale":
      return inputs.ramp(shape, 2, 3);
    case "lora_scale":
      return loraScale(shape);
    case "vertical":
    case "horizontal":
    case "weights":
      return upscaleConstants(areaOf(shapes.latents as LatentShape), areaOf(shapes.noise as LatentShape))[input];
    case "mask":
      return inputs.mask(shape);
    case "image":
      return inputs.normal(shape, 0.3);
    default:
      return inputs.normal(shape);
  }
}

/** The shapes of a graph's outputs for those of its inputs. */
function outputsOf(
  graphs: GraphLibrary,
  name: string,
  shapes: Readonly<Record<string, readonly number[]>>,
): Record<string, readonly number[]> {
  const graph = graphs.get(name);
  const { factor } = graphs.checkpoint.vae.config;
  const sizes: Record<string, number> = {};
  for (const [input, dimensions] of graph.inputs)
    for (const [axis, dimension] of dimensions.entries())
      if (typeof dimension === "string") sizes[dimension] = shapes[input]![axis]!;
  for (const side of ["height", "width"]) {
    const [latent, image] = [sizes[side], sizes[`image_${side}`]];
    if (latent !== undefined) sizes[`image_${side}`] = latent * factor;
    else if (image !== undefined) sizes[side] = image / factor;
  }
  return Object.fromEntries([...graph.outputs].map(([output, dimensions]) => [output, shapeWith(dimensions, sizes)]));
}
