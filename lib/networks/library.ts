/** The graphs of one checkpoint, by name: emitted on first use and kept. */

import type { Checkpoint, Part } from "../checkpoint/index.js";
import type { FileVersion } from "../common/files.js";
import type { StoredDType } from "../common/tensor.js";
import { cpuEmitOptions, type EmitOptions, type EmittedNetwork, type OnnxGraph } from "../onnx/index.js";
import { graphKey, graphName, type Network, networks, networksOf, weightedParts } from "./index.js";

export class GraphLibrary {
  readonly checkpoint: Checkpoint;
  readonly #options: (network: EmittedNetwork) => EmitOptions;
  readonly #graphs = new Map<string, OnnxGraph>();

  /** @param options how to emit each network; default: as ONNX Runtime on the CPU wants them */
  constructor(checkpoint: Checkpoint, options: (network: EmittedNetwork) => EmitOptions = () => cpuEmitOptions) {
    this.checkpoint = checkpoint;
    this.#options = options;
  }

  /** The weights' files, as they were when the checkpoint was opened. */
  get files(): FileVersion[] {
    return weightedParts(this.checkpoint).flatMap(({ weights }) => weights.files);
  }

  /** The graphs that every guided picture may need, with what they are for. */
  get essential(): { readonly graph: OnnxGraph; readonly role: Network["role"] }[] {
    return networksOf(this.checkpoint)
      .filter(({ row }) => !row.features)
      .map(({ name, row: { variants, role } }) => {
        const guidance = variants.includes("guidance");
        return { graph: this.get(graphName({ network: name, guidance })), role };
      });
  }

  /**
   * @throws CheckpointError if weights are absent or do not have the shapes that the configs imply; RangeError for a name
   *   of no network, or of one that the checkpoint has no weights for
   */
  get(name: string): OnnxGraph {
    let graph = this.#graphs.get(name);
    if (!graph) {
      graph = this.#emit(name);
      this.#graphs.set(name, graph);
    }
    return graph;
  }

  /** How a graph is emitted. @throws as `get`, and what the runtime's rules throw */
  optionsOf(name: string): EmitOptions {
    const { network } = graphKey(name);
    const { part, overflowsInFloat16 = false } = networks[network]!;
    const weights = part && this.checkpoint[part]?.weights;
    if (part && !weights) throw new RangeError(`This checkpoint has no weights for ${network}.`);
    return this.#options({ name: network, dtype: weights && prevailingDType(weights), overflowsInFloat16 });
  }

  #emit(name: string): OnnxGraph {
    const options = this.optionsOf(name);
    const { network, ...variants } = graphKey(name);
    return networks[network]!.emit(name, this.checkpoint, options, variants);
  }
}

/** The type that most of a part's values are stored in. */
function prevailingDType(weights: Part<unknown>["weights"]): StoredDType {
  const bytes = (dtype: StoredDType) => weights.bytesByDType[dtype] ?? 0;
  return (["BF16", "F16", "F32"] as const).reduce((most, dtype) => (bytes(dtype) > bytes(most) ? dtype : most));
}
