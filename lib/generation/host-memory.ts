/**
 * What a checkpoint and its pictures take of this machine's memory on the CPU, estimated from the headers of its weights and from its
 * graphs, before anything is loaded. All graphs of a guided picture are counted together: each keeps its weights and the memory that its
 * launches took. The factors are those that `npm run bench:memory` measures.
 */

import type { Checkpoint } from "../checkpoint/index.js";
import { elementCount, type StoredTensor } from "../common/tensor.js";
import type { Size } from "../model.js";
import { mmditWidth, mostTokens } from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import { largestMap, stepTokens } from "./device-memory.js";
import { quantisableParts } from "./int8.js";
import { latentShapeOf } from "./sizes.js";
import { PromptEncoder } from "./text.js";

/** How weights are held: see the option `weights`. */
export const heldWeights = ["lazy", "folded", "int8"] as const;
export type HeldWeights = (typeof heldWeights)[number];

/** Bytes. */
export interface HostMemory {
  readonly weights: number;
  /** Of a guided picture, drawn alone. */
  readonly activations: number;
  /** Both, with the processes themselves. */
  readonly total: number;
}

/** Two processes with Node and their libraries. */
const processes = 0.24e9;
/** Of a weight in 8 bits: the kernel's copy, and what stays of the mapped file. */
const bytesInInt8 = 1.5;
/** Values of a token that are there at the same time, in widths of the network: eight are the MLP's, before and after its activation. */
const widthsOfToken = 13;
/** Maps of the decoder that are there at the same time: what is added at a block's end, and three around a normalisation or convolution. */
const mapsOfDecoder = 3.5;
/** Of a guided picture. */
const rows = 2;
const float32 = 4;

/** @param size of a picture that the checkpoint can draw */
export function hostMemoryNeeded(checkpoint: Checkpoint, held: HeldWeights, size: Size): HostMemory {
  const graphs = new GraphLibrary(checkpoint);
  const weights = weightBytes(graphs, held);
  const activations = stepBytes(graphs, size) + mapsOfDecoder * float32 * largestMap(checkpoint, size);
  return { weights, activations, total: processes + weights + activations };
}

function stepBytes(graphs: GraphLibrary, size: Size): number {
  const { checkpoint } = graphs;
  const { config } = checkpoint.transformer;
  const { defaultSequenceLength } = new PromptEncoder(graphs);
  const { tokens } = stepTokens(checkpoint, latentShapeOf(checkpoint, 1, size), defaultSequenceLength);
  // Joint attention, the first of the network, decides: it is among the text's tokens, too.
  const scores = tokens <= mostTokens(config.numAttentionHeads) ? config.numAttentionHeads * tokens ** 2 : 0;
  return rows * float32 * (widthsOfToken * tokens * mmditWidth(config) + scores);
}

function weightBytes(graphs: GraphLibrary, held: HeldWeights): number {
  const quantised = new Set(
    held !== "int8"
      ? []
      : quantisableParts(graphs.checkpoint).flatMap(({ part, layers }) =>
          layers.map((layer) => placeOf(part.weights.find(`${layer}.weight`)!)),
        ),
  );
  // The same weight in two graphs is mapped once.
  const counted = new Map<string, number>();
  let widest = 0;
  for (const { graph, role } of graphs.essential)
    for (const tensor of graph.externals.values()) {
      const place = placeOf(tensor);
      const inFloat32 = float32 * elementCount(tensor.shape);
      const asStored = held === "lazy" || tensor.dtype === "F32";
      const bytes = quantised.has(place) ? (bytesInInt8 * inFloat32) / float32 : asStored ? tensor.length : inFloat32;
      counted.set(place, bytes);
      // Of the embeddings of text encoders only rows are widened.
      if (tensor.dtype !== "F32" && role !== "text") widest = Math.max(widest, inFloat32);
    }
  const all = [...counted.values()].reduce((sum, bytes) => sum + bytes, 0);
  // One weight at a time is widened, and packed for the kernel.
  return held === "lazy" ? all + 2 * widest : all;
}

const placeOf = ({ file, offset }: StoredTensor) => `${file}:${offset}`;
