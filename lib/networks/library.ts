/** The graphs of one checkpoint, by name: emitted on first use and kept. */

import type { Checkpoint, Part } from "../checkpoint/index.js";
import type { FileVersion } from "../common/files.js";
import { bytesPerElement, type ComputedDType, elementCount, type StoredDType } from "../common/tensor.js";
import { cpuEmitOptions, type EmitOptions, type EmittedNetwork } from "../onnx/index.js";
import {
  graphKey,
  graphName,
  keysOf,
  type Network,
  type NetworkGraph,
  networks,
  networksOf,
  weightedParts,
} from "./index.js";

export class GraphLibrary {
  readonly checkpoint: Checkpoint;
  readonly #options: (network: EmittedNetwork) => EmitOptions;
  /** By name and options: a graph that two runtimes want alike is emitted once. */
  readonly #graphs: Map<string, NetworkGraph>;

  /** @param options how to emit each network; default: as ONNX Runtime on the CPU wants them */
  constructor(
    checkpoint: Checkpoint,
    options: (network: EmittedNetwork) => EmitOptions = () => cpuEmitOptions,
    graphs = new Map<string, NetworkGraph>(),
  ) {
    this.checkpoint = checkpoint;
    this.#options = options;
    this.#graphs = graphs;
  }

  /** The graphs of the same checkpoint as another runtime wants them. */
  emittedAs(options: (network: EmittedNetwork) => EmitOptions): GraphLibrary {
    return new GraphLibrary(this.checkpoint, options, this.#graphs);
  }

  /**
   * Bytes of 16-bit weights of the networks that every picture may need, and of 8-bit ones as if they were 16-bit: what widening
   * them once would double. Known from the headers, before any graph is emitted.
   */
  get bytesOf16Bit(): number {
    const rows = networksOf(this.checkpoint).filter(({ row }) => !row.features);
    const parts = new Set(rows.flatMap(({ row: { part } }) => (part && this.checkpoint[part]) ?? []));
    return [...parts].reduce((sum, { weights }) => sum + widenedBytes(weights), 0);
  }

  /** The weights' files, as they were when the checkpoint was opened, and what was made of them. */
  get files(): FileVersion[] {
    const parts = [...weightedParts(this.checkpoint), ...this.checkpoint.controlNets.values()];
    const files = parts.flatMap(({ weights }) => [...weights.files, ...(weights.derived ?? [])]);
    // Parts in one file are one.
    return [...new Map(files.map((version) => [version.file, version])).values()];
  }

  /** The graphs that every guided picture may need, with what they are for. */
  get essential(): { readonly graph: NetworkGraph; readonly role: Network["role"] }[] {
    return networksOf(this.checkpoint)
      .filter(({ row }) => !row.features)
      .flatMap(({ name, row: { role } }) =>
        keysOf(name, { guidance: [true] }).map((key) => ({ graph: this.get(graphName(key)), role })),
      );
  }

  /**
   * @throws CheckpointError if weights are absent or do not have the shapes that the configs imply; RangeError for a name
   *   of no network, or of one that the checkpoint has no weights for
   */
  get(name: string): NetworkGraph {
    const options = this.optionsOf(name);
    const key = JSON.stringify([name, options]);
    let graph = this.#graphs.get(key);
    if (!graph) {
      const { network, ...variants } = graphKey(name);
      graph = networks[network]!.emit(name, this.checkpoint, options, variants);
      this.#graphs.set(key, graph);
    }
    return graph;
  }

  /** How a graph is emitted. @throws as `get`, and what the runtime's rules throw */
  optionsOf(name: string): EmitOptions {
    const { network } = graphKey(name);
    const { part, role, overflowsInFloat16 = false } = networks[network]!;
    const weights = part && this.checkpoint[part]?.weights;
    if (part && !weights) throw new RangeError(`This checkpoint has no weights for ${network}.`);
    const dtype = weights ? prevailingDType(weights) : null;
    const eightBit = eightBitDTypes.filter((each) => weights?.bytesByDType[each]);
    const { F16 = 0, BF16 = 0 } = weights?.bytesByDType ?? {};
    const roles = { isConvolutional: role === "image", isOfSteps: role === "step" };
    return this.#options({ name: network, dtype, eightBit, bytesOf16Bit: F16 + BF16, overflowsInFloat16, ...roles });
  }
}

const eightBitDTypes = ["F8_E4M3", "F8_E5M2", "I8"] as const;

/**
 * The type that most of a part's values are stored in, 8-bit ones apart. Where most are 8-bit and none is 16-bit it is BF16, which has
 * all values of both float8 types: what is F32 there are scales.
 */
function prevailingDType(weights: Part<unknown>["weights"]): ComputedDType {
  const bytes = (...dtypes: StoredDType[]) =>
    dtypes.reduce((sum, dtype) => sum + (weights.bytesByDType[dtype] ?? 0), 0);
  const in8Bit = bytes(...eightBitDTypes);
  const in16Bit = bytes("F16") > bytes("BF16") ? "F16" : "BF16";
  const rest = in8Bit > bytes("F32", "BF16", "F16") ? 0 : bytes("F32");
  return bytes(in16Bit) >= rest ? in16Bit : "F32";
}

/** Bytes of weights of 16 bits, and of 8 bits as if they had 16, without those that are multiplied in 8 bits. */
function widenedBytes({ bytesByDType, names, find, int8 }: Part<unknown>["weights"]): number {
  const as16Bit = (dtype: StoredDType, bytes: number) => (dtype === "F32" ? 0 : (2 * bytes) / bytesPerElement[dtype]);
  const dtypes = ["F16", "BF16", ...eightBitDTypes] as const;
  const all = dtypes.reduce((sum, dtype) => sum + as16Bit(dtype, bytesByDType[dtype] ?? 0), 0);
  if (!int8) return all;
  const multiplied = names.filter((name) => name.endsWith(".weight") && int8(name.slice(0, -".weight".length)));
  return multiplied.reduce((left, name) => {
    const { dtype, shape } = find(name)!;
    return left - as16Bit(dtype, bytesPerElement[dtype] * elementCount(shape));
  }, all);
}
