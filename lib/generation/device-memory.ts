/**
 * What a checkpoint and its pictures take on a GPU, estimated before anything is compiled: the graphs of one program are
 * there together, each with its weights in the type that the device holds them in, and the largest values of one launch
 * besides. Estimates are low rather than high: what they let through and does not fit fails as the launch is made.
 */

import type { Checkpoint } from "../checkpoint/index.js";
import { gigabytes } from "../common/memory.js";
import { elementCount, is8Bit } from "../common/tensor.js";
import { MemoryError } from "../errors.js";
import type { Size } from "../model.js";
import { mmditWidth, textEncodersOf, tokensOf } from "../networks/index.js";
import type { GraphLibrary } from "../networks/library.js";
import type { EmitOptions, OnnxGraph } from "../onnx/index.js";
import type { Device } from "../runtimes/runtime.js";
import { type Additions, type PlacedStage, predictGraphs } from "./additions.js";
import type { LatentShape } from "./programs.js";

/** A picture as far as it matters to what its launches take. */
export interface DrawnPicture {
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  readonly latentShape: LatentShape;
  /** Rows of the network at most: two with guidance, three with skip-layer guidance. */
  readonly rows: number;
  /** Tokens of the text encoder that takes as many as are asked for. */
  readonly sequenceLength: number;
  /** Values of the matrices of dynamic LoRAs, down and up. Default: none. */
  readonly lora?: { readonly down: number; readonly up: number } | null | undefined;
}

/** Bytes of weights that a picture's two programs need on the device: encoding texts, drawing. */
export function deviceMemoryNeeded(
  graphs: GraphLibrary,
  widening: Device["widening"] = () => "lazy",
): { readonly encode: number; readonly draw: number } {
  const needed = { encode: 0, draw: 0 };
  for (const { graph, role } of graphs.essential)
    for (const bytes of weightsOf(graphs, graph, widening)) needed[role === "text" ? "encode" : "draw"] += bytes;
  return needed;
}

/**
 * Bytes of weights that a picture's steps need on the device besides those of one graph of the transformer, which `deviceMemoryNeeded` counts: a
 * graph has weights of its own, whatever others have the same.
 */
export function additionsMemoryNeeded(
  graphs: GraphLibrary,
  widening: Device["widening"] = () => "lazy",
  additions: Additions,
  mode: "cfg" | "cfg_zero",
  stages: readonly PlacedStage[],
): number {
  const bytes = (name: string) => weightsOf(graphs, graphs.get(name), widening).reduce((sum, each) => sum + each, 0);
  const names = predictGraphs(additions, mode, stages);
  const counted = "predict.guidance";
  const others = [...names].filter((name) => name !== counted).reduce((sum, name) => sum + bytes(name), 0);
  return others - (names.size === 0 || names.has(counted) ? 0 : bytes(counted));
}

/** Bytes of each weight of a graph on the device. */
function weightsOf(graphs: GraphLibrary, graph: OnnxGraph, widening: NonNullable<Device["widening"]>): number[] {
  const folded = widening(graph) === "folded";
  const computed = bytesOf(graphs.optionsOf(graph.name));
  return [...graph.externals.values()].map(({ dtype, shape, length }) => {
    if (!folded || dtype === "F32" || !graph.widened.has(dtype)) return length;
    return is8Bit(dtype) ? computed * elementCount(shape) : 2 * length;
  });
}

/** @throws MemoryError with both numbers if a program's graphs cannot be on the device together, or a weight in a buffer */
export function checkDeviceMemory(graphs: GraphLibrary, device: Device): void {
  const { name, memoryBytes: available, largestBuffer, widening } = device;
  const { encode, draw } = deviceMemoryNeeded(graphs, widening);
  const needed = Math.max(encode, draw);
  if (needed > available) {
    const what = encode > draw ? "text encoders" : "networks that draw";
    throw new MemoryError(
      `The ${what} of this model take ${gigabytes(needed)} GB of GPU memory for their weights alone, but ${name} has ${gigabytes(available)} GB. ` +
        "Use a smaller checkpoint, a larger GPU, or the CPU.",
      needed,
      available,
    );
  }
  if (largestBuffer === undefined) return;
  for (const { graph } of graphs.essential) {
    const largest = Math.max(0, ...weightsOf(graphs, graph, widening ?? (() => "lazy")));
    if (largest > largestBuffer)
      throw new MemoryError(
        `A weight of ${graph.name} takes ${gigabytes(largest)} GB, but buffers of ${name} hold at most ${gigabytes(largestBuffer)} GB. Use another GPU or runtime.`,
        largest,
        largestBuffer,
      );
  }
}

/**
 * @param draw bytes of the weights of the networks that draw: see `deviceMemoryNeeded`
 * @param added what its kinds of steps need besides: see `additionsMemoryNeeded`
 * @throws MemoryError with both numbers if one picture cannot be drawn on the device: its networks' weights and the
 *   values of the largest launch do not fit, or one value does not fit into a buffer
 */
export function checkPictureMemory(
  graphs: GraphLibrary,
  device: Device,
  draw: number,
  drawn: DrawnPicture,
  added = 0,
): void {
  const { name, memoryBytes, largestBuffer = Number.POSITIVE_INFINITY, holdsScores = false } = device;
  const { down = 0, up = 0 } = drawn.lora ?? {};
  const matrices = 4 * (down + up);
  const launches = [
    { largest: 4 * Math.max(down, up), together: 0 },
    stepValues(graphs, drawn, holdsScores),
    decoderValues(graphs, drawn),
  ];
  const picture = `A picture of ${drawn.width} x ${drawn.height}`;
  const remedy = "Draw smaller pictures (in stages, the last one counts), or use another GPU or runtime.";
  for (const { largest } of launches)
    if (largest > largestBuffer)
      throw new MemoryError(
        `${picture} has values of ${gigabytes(largest)} GB, but buffers of ${name} hold at most ${gigabytes(largestBuffer)} GB. ${remedy}`,
        largest,
        largestBuffer,
      );
  const needed = draw + added + matrices + Math.max(...launches.map(({ together }) => together));
  if (needed <= memoryBytes) return;
  const ofKinds = added > 0 ? `, with ${gigabytes(added)} GB for further kinds of steps and ControlNets` : "";
  // Where the kinds are what is too much, a smaller picture would be refused, too.
  const isOfKinds = added > 0 && needed - added <= memoryBytes;
  throw new MemoryError(
    `${picture} needs about ${gigabytes(needed)} GB of GPU memory, ${gigabytes(draw + added)} GB of that for weights${ofKinds}, but ${name} has ${gigabytes(memoryBytes)} GB. ${isOfKinds ? fewerKinds : remedy}`,
    needed,
    memoryBytes,
  );
}

const fewerKinds =
  "Use guidance and ControlNets in all steps or in none, leave out skip-layer guidance, or use another GPU or runtime.";

/** Bytes of the largest value of a launch, and of those that are there at the same time. */
interface Values {
  readonly largest: number;
  readonly together: number;
}

const bytesOf = ({ compute }: EmitOptions) => (compute === "float32" ? 4 : 2);

/** A step: its feed-forward networks, with four times the width, and the scores where attention holds all of them. */
function stepValues(
  graphs: GraphLibrary,
  { latentShape, rows, sequenceLength }: DrawnPicture,
  holdsScores: boolean,
): Values {
  const { config } = graphs.checkpoint.transformer;
  const options = graphs.optionsOf("predict");
  const { patches, tokens } = stepTokens(graphs.checkpoint, latentShape, sequenceLength);
  const inner = rows * patches * 4 * mmditWidth(config) * bytesOf(options);
  const scores = holdsScores ? rows * config.numAttentionHeads * tokens * tokens * bytesOf(options) : 0;
  return { largest: Math.max(inner, scores), together: 2 * Math.max(inner, scores) };
}

/** Tokens of a row of a step: those of the picture, and all. */
export function stepTokens(
  checkpoint: Checkpoint,
  [, , height, width]: LatentShape,
  sequenceLength: number,
): { readonly patches: number; readonly tokens: number } {
  const { patchSize } = checkpoint.transformer.config;
  const patches = (height / patchSize) * (width / patchSize);
  const texts = textEncodersOf(checkpoint);
  const tokensThat = (joins: "channels" | "tokens") =>
    Math.max(0, ...texts.filter(({ text }) => text.joins === joins).map((each) => tokensOf(each, sequenceLength)));
  return { patches, tokens: patches + tokensThat("channels") + tokensThat("tokens") };
}

/** The decoder: two of its largest maps at a time. */
function decoderValues(graphs: GraphLibrary, drawn: DrawnPicture): Values {
  const map = largestMap(graphs.checkpoint, drawn) * bytesOf(graphs.optionsOf("vae_decoder"));
  return { largest: map, together: 2 * map };
}

/** Values of the decoder's largest map: of the channels of its last block but one, at the picture's size. */
export function largestMap({ vae }: Checkpoint, { width, height }: Size): number {
  const { blockOutChannels } = vae.config;
  return (blockOutChannels[1] ?? blockOutChannels[0]!) * width * height;
}
