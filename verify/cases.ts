/**
 * What `verify:gpu` compares: programs with everything they need as values, so that they mean the same on this machine
 * and in a bundle on another. Every engine of a checkpoint in every profile, one launch each, on inputs of the size that
 * it sees in use; then whole schedules.
 */

import type { Checkpoint } from "../lib/checkpoint/index.js";
import { elementCount, type FloatTensor, float32, int64, type Tensor } from "../lib/common/tensor.js";
import { pixelsAtOnce, positionCrop } from "../lib/flowturbo.js";
import { type PlannedEngine, plannedEngines } from "../lib/generation/engines.js";
import { NoiseGenerator } from "../lib/generation/noise.js";
import { PromptEncoder } from "../lib/generation/text.js";
import { relativeBuckets } from "../lib/networks/index.js";
import type { GraphName } from "../lib/networks/library.js";
import type { Program } from "../lib/program/program.js";
import { ConstantReader } from "../lib/program/stored.js";
import {
  parseBlocks,
  type SamplingRequest,
  type SamplingStage,
  samplingProgram,
  shiftedSigmas,
  upscaleSigmas,
} from "../lib/schedule/index.js";

export interface Case {
  readonly name: string;
  readonly kind: "engine" | "texts" | "sampler";
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
export async function planCases(checkpoint: Checkpoint, options: CaseOptions, run: Run): Promise<Case[]> {
  const inputs = new Inputs();
  const cases: Case[] = [];
  for (const engine of enginesOf(checkpoint, options))
    for (const profile of engine.profiles) {
      const size = profile.width === undefined ? "" : `, ${profile.width} × ${profile.height}`;
      const program = await engineProgram(checkpoint, engine.name, profile.inputs, inputs);
      cases.push({ name: `${engine.name}, batch ${profile.batch}${size}`, kind: "engine", program });
    }

  const encoder = new PromptEncoder(checkpoint);
  const texts = [...new Set(["", ...prompts])].slice(0, 1 + Math.max(...options.batches));
  const encoded = await encoder.encode(texts, encoder.defaultSequenceLength, async (programs) => {
    const results: Record<string, Tensor>[] = [];
    for (const [index, program] of programs.entries()) {
      cases.push({ name: `text "${texts[index]}", all encoders`, kind: "texts", program });
      results.push(await run(program));
    }
    return results;
  });
  const schedules = plannedSchedules(checkpoint, options);
  for (const { name, batch, guided, sizes, blocks, inpainted } of schedules) {
    const rows = Array.from({ length: batch }, (_, row) => encoded[1 + (row % (encoded.length - 1))]!);
    const condition = encoder.stack(guided ? [...rows.map(() => encoded[0]!), ...rows] : rows);
    const stages = await Promise.all(
      sizes.map((size, index) => stageOf(checkpoint, size, blocks[index]!, index, batch, inpainted, inputs)),
    );
    cases.push({ name, kind: "sampler", program: schedule(checkpoint, stages, condition, guided) });
  }
  return cases;
}

/** All that a picture may need: both kinds of guidance, editing, previews, and stages where there are two sizes. */
function enginesOf(checkpoint: Checkpoint, { sizes, batches }: CaseOptions): PlannedEngine[] {
  const features = sizes.length > 1 ? (["editing", "previews", "stages"] as const) : (["editing", "previews"] as const);
  return plannedEngines(checkpoint, { sizes, batches, guidance: "both", features });
}

interface Schedule {
  readonly name: string;
  readonly batch: number;
  readonly guided: boolean;
  readonly sizes: readonly Size[];
  readonly blocks: readonly string[];
  readonly inpainted: boolean;
}

function plannedSchedules(checkpoint: Checkpoint, { sizes, batches }: CaseOptions): Schedule[] {
  const refined = checkpoint.refiner !== null;
  const [size] = sizes as [Size, ...Size[]];
  const most = Math.max(...batches);
  const one = Math.min(...batches);
  const schedules: Schedule[] = [];
  const add = (name: string, batch: number, blocks: string[], more: Partial<Schedule> = {}) => {
    const chosen = { guided: true, sizes: [size], inpainted: false, ...more };
    const where = chosen.sizes.map(({ width, height }) => `${width} × ${height}`).join(" to ");
    schedules.push({ ...chosen, name: `${name} (${blocks.join(" ")}), batch ${batch}, ${where}`, batch, blocks });
  };
  for (const batch of new Set([one, most])) {
    add("Euler", batch, ["E4"]);
    add("Heun", batch, ["H3"]);
    add("pseudo corrector", batch, ["H1P4"]);
    if (refined) add("FlowTurbo", batch, ["H1P5R3"]);
  }
  add("without guidance", one, [refined ? "H1P2R1" : "H1P2"], { guided: false });
  add("inpainting", one, [refined ? "H1P2R1" : "H1P2"], { inpainted: true });
  const larger = sizes.find(
    ({ width, height }) => width >= size.width && height >= size.height && width * height > size.width * size.height,
  );
  if (larger) add("two stages", one, ["H1P2", refined ? "H1P1R1" : "H1P1"], { sizes: [size, larger] });
  return schedules;
}

async function stageOf(
  checkpoint: Checkpoint,
  { width, height }: Size,
  blocks: string,
  index: number,
  batch: number,
  inpainted: boolean,
  inputs: Inputs,
): Promise<SamplingStage> {
  const { transformer, refiner, vae, scheduler } = checkpoint;
  const { factor, latentChannels, inChannels } = vae.config;
  const shape = [batch, latentChannels, height / factor, width / factor] as const;
  const parsed = parseBlocks(blocks);
  const positions = async (network: Checkpoint["transformer"]) =>
    ({ kind: "value", tensor: await stored(positionCrop(network, shape)) }) as const;
  return {
    blocks: parsed,
    sigmas:
      index === 0 ? shiftedSigmas(parsed.length, scheduler.shift) : upscaleSigmas(parsed.length, scheduler.shift, 0.6),
    noise: inputs.normal(shape),
    positions: { predict: await positions(transformer), refine: refiner ? await positions(refiner) : null },
    ...(inpainted && {
      original: inputs.normal([1, inChannels, height, width], 0.3),
      mask: inputs.mask([1, 1, height / factor, width / factor]),
    }),
  };
}

function schedule(
  { vae }: Checkpoint,
  stages: readonly SamplingStage[],
  condition: Pick<SamplingRequest, "context" | "pooled">,
  guided: boolean,
): Program {
  const variant = (name: "predict" | "refine" | "merge" | "preview"): GraphName => (guided ? name : `${name}_unguided`);
  return samplingProgram({
    stages,
    ...condition,
    guidanceScale: guided ? 4 : null,
    graphs: {
      ...{ predict: variant("predict"), refine: variant("refine"), merge: variant("merge") },
      ...{ preview: variant("preview"), decode: "vae_decoder", encode: "vae_encoder", join: "join", noised: "noised" },
    },
    vaeFactor: vae.config.factor,
    imageChannels: vae.config.outChannels,
    pixelsAtOnce,
  }).program;
}

const constants = new ConstantReader();

async function stored(constant: ReturnType<typeof positionCrop>): Promise<FloatTensor> {
  return float32(constant.shape, await constants.read(constant));
}

/** One launch of a graph on inputs of the given shapes. */
async function engineProgram(
  checkpoint: Checkpoint,
  graph: GraphName,
  shapes: Readonly<Record<string, readonly number[]>>,
  inputs: Inputs,
): Promise<Program> {
  const values: Record<string, Tensor> = {};
  for (const [input, shape] of Object.entries(shapes))
    values[input] = await inputOf(checkpoint, graph, input, shape, shapes, inputs);
  const outputs = outputsOf(checkpoint, graph, shapes);
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
  graph: GraphName,
  input: string,
  shape: readonly number[],
  shapes: Readonly<Record<string, readonly number[]>>,
  inputs: Inputs,
): Promise<Tensor> {
  switch (input) {
    case "ids": {
      const [rows, length] = shape as [number, number];
      const tokenizer = { clip_l: checkpoint.tokenizer, clip_g: checkpoint.tokenizer2, t5: checkpoint.tokenizer3 }[
        graph as "clip_l" | "clip_g" | "t5"
      ]!;
      const ids = new BigInt64Array(rows * length);
      for (let row = 0; row < rows; row++)
        ids.set(tokenizer.encode(prompts[row % prompts.length]!, length).ids, row * length);
      return int64(shape, ids);
    }
    case "relative_buckets":
      return int64(shape, relativeBuckets(checkpoint.textEncoder3!.config, shape[0]!));
    case "position_embedding": {
      const network = graph.startsWith("refine") ? checkpoint.refiner! : checkpoint.transformer;
      return stored(positionCrop(network, shapes.x!));
    }
    case "sigma":
      return inputs.ramp(shape, 0.8, 0.3);
    case "a_in":
    case "a_old":
    case "a_new":
      return inputs.ramp(shape, -0.08, -0.12);
    case "guidance":
      return inputs.ramp(shape, 4, 5);
    case "mask":
      return inputs.mask(shape);
    case "image":
      return inputs.normal(shape, 0.3);
    default:
      return inputs.normal(shape);
  }
}

function outputsOf(
  { textEncoder, textEncoder2, textEncoder3, vae }: Checkpoint,
  graph: GraphName,
  shapes: Readonly<Record<string, readonly number[]>>,
): Record<string, readonly number[]> {
  const { factor, latentChannels, outChannels } = vae.config;
  const rows = Object.values(shapes)[0]![0]!;
  const area = (shape: readonly number[], scale: number) => [shape[2]! * scale, shape[3]! * scale];
  switch (graph) {
    case "clip_l":
    case "clip_g": {
      const { hiddenSize, projectionDim } = (graph === "clip_l" ? textEncoder : textEncoder2)!.config;
      return { hidden: [...shapes.ids!, hiddenSize], pooled: [rows, projectionDim] };
    }
    case "t5":
      return { hidden: [...shapes.ids!, textEncoder3!.config.dModel] };
    case "predict":
    case "predict_unguided":
    case "refine":
    case "refine_unguided":
    case "merge":
    case "merge_unguided":
      return { x_next: shapes.x!, velocity_next: shapes.velocity! };
    case "vae_decoder":
      return { image: [rows, outChannels, ...area(shapes.latents!, factor)] };
    case "vae_encoder":
      return { latents: [rows, latentChannels, ...area(shapes.image!, 1 / factor)] };
    case "join":
    case "noised":
      return { x: shapes.noise! };
    case "preview":
    case "preview_unguided":
      return { latents: shapes.x!, image: [rows, 3, ...area(shapes.x!, 1)] };
  }
}
