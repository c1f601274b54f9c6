/**
 * The graphs of one checkpoint, by name: emitted on first use and kept. The names are those that programs launch.
 */

import type { Checkpoint, Tokenizer } from "../checkpoint/index.js";
import type { StoredDType } from "../common/tensor.js";
import { OptionError } from "../errors.js";
import { cpuEmitOptions, type EmitOptions, type OnnxGraph } from "../onnx/index.js";
import {
  emitClip,
  emitInpaintBlend,
  emitPreview,
  emitScaleNoise,
  emitStep,
  emitT5,
  emitUpscale,
  emitVaeDecoder,
  emitVaeEncoder,
  positionTable,
} from "./index.js";

export type GraphName =
  | "clip_l"
  | "clip_g"
  | "t5"
  | "predict"
  | "predict_unguided"
  | "refine"
  | "refine_unguided"
  | "vae_decoder"
  | "vae_encoder"
  | "join"
  | "noised"
  | "merge"
  | "merge_unguided"
  | "preview"
  | "preview_unguided";

export class GraphLibrary {
  readonly #checkpoint: Checkpoint;
  readonly #options: (name: GraphName) => EmitOptions;
  readonly #graphs = new Map<GraphName, OnnxGraph>();

  /** @param options how to emit each graph; default: as ONNX Runtime on the CPU wants them */
  constructor(checkpoint: Checkpoint, options: (name: GraphName) => EmitOptions = () => cpuEmitOptions) {
    this.#checkpoint = checkpoint;
    this.#options = options;
  }

  /** Names of the graphs that every guided picture needs. */
  get essential(): GraphName[] {
    const { textEncoder, textEncoder2, textEncoder3, refiner } = this.#checkpoint;
    return [
      ...(textEncoder ? ["clip_l" as const] : []),
      ...(textEncoder2 ? ["clip_g" as const] : []),
      ...(textEncoder3 ? ["t5" as const] : []),
      "predict",
      ...(refiner ? ["refine" as const] : []),
      "vae_decoder",
    ];
  }

  /** @throws CheckpointError if weights are absent or do not have the shapes that the configs imply */
  get(name: GraphName): OnnxGraph {
    let graph = this.#graphs.get(name);
    if (!graph) {
      graph = this.#emit(name);
      this.#graphs.set(name, graph);
    }
    return graph;
  }

  /** The weights' files, as they were when the checkpoint was opened. */
  get files() {
    const { transformer, refiner, vae, textEncoder, textEncoder2, textEncoder3 } = this.#checkpoint;
    return [transformer, refiner, vae, textEncoder, textEncoder2, textEncoder3].flatMap(
      (part) => part?.weights.files ?? [],
    );
  }

  /** Bytes of 16-bit weights among the essential graphs: what widening them once would double. */
  get bytesOf16BitWeights(): number {
    let bytes = 0;
    for (const name of this.essential)
      for (const tensor of this.get(name).externals.values()) if (tensor.dtype !== "F32") bytes += tensor.length;
    return bytes;
  }

  #emit(name: GraphName): OnnxGraph {
    const { transformer, refiner, textEncoder3, vae, scheduler } = this.#checkpoint;
    const options = this.#options(name);
    const clip = (part: Checkpoint["textEncoder"], tokenizer: Tokenizer | null) => {
      if (!part || !tokenizer) throw new RangeError(`This checkpoint has no ${name}.`);
      return emitClip(name, part.weights, part.config, tokenizer.maxLength, options);
    };
    const step = (type: "predict" | "refine", guided: boolean) => {
      const network = type === "predict" ? transformer : refiner;
      if (!network) throw new RangeError("This checkpoint has no refiner.");
      positionTable(network.weights, network.config);
      return emitStep(name, type, network.weights, network.config, {
        ...options,
        guided,
        numTrainTimesteps: scheduler.numTrainTimesteps,
      });
    };
    switch (name) {
      case "clip_l":
        return clip(this.#checkpoint.textEncoder, this.#checkpoint.tokenizer);
      case "clip_g":
        return clip(this.#checkpoint.textEncoder2, this.#checkpoint.tokenizer2);
      case "t5":
        if (!textEncoder3) throw new RangeError("This checkpoint has no T5 encoder.");
        return emitT5(name, textEncoder3.weights, textEncoder3.config, options);
      case "predict":
        return step("predict", true);
      case "predict_unguided":
        return step("predict", false);
      case "refine":
        return step("refine", true);
      case "refine_unguided":
        return step("refine", false);
      case "vae_decoder":
        return emitVaeDecoder(name, vae.weights, vae.config, options);
      case "vae_encoder":
        return emitVaeEncoder(name, vae.weights, vae.config, options);
      case "join":
        return emitUpscale(name, vae.weights, vae.config, options);
      case "noised":
        return emitScaleNoise(name, vae.config.latentChannels);
      case "merge":
      case "merge_unguided":
        return emitInpaintBlend(name, vae.config.latentChannels, name === "merge");
      case "preview":
      case "preview_unguided":
        return emitPreview(name, vae.config.latentChannels, name === "preview");
    }
  }
}

/**
 * How graphs are emitted for TensorRT: each network in the element type of its own weights. T5 overflows in float16,
 * which it was not trained in, and computes in bfloat16 then, or in float32 where a target (SM 7.5) has none.
 * @throws OptionError where a target has no bfloat16 and other weights are stored in it
 */
export function tensorRtEmitOptions(
  checkpoint: Checkpoint,
  targets: readonly number[] = [],
): (name: GraphName) => EmitOptions {
  const { transformer, refiner, vae, textEncoder, textEncoder2, textEncoder3 } = checkpoint;
  // The graphs without weights are float32 throughout.
  const parts: Partial<Record<GraphName, Pick<typeof vae, "weights"> | null>> = {
    ...{ clip_l: textEncoder, clip_g: textEncoder2, t5: textEncoder3 },
    ...{ predict: transformer, predict_unguided: transformer, refine: refiner, refine_unguided: refiner },
    ...{ vae_decoder: vae, vae_encoder: vae, join: vae },
  };
  return (name) => {
    const part = parts[name];
    let compute = part ? computeTypes[prevailingDType(part.weights)] : "float32";
    const old = targets.find((sm) => sm < 80);
    if (name === "t5" && compute !== "float32") compute = old ? "float32" : "bfloat16";
    if (compute === "bfloat16" && old)
      throw new OptionError(
        "targets",
        `The weights of ${name} are bfloat16, which compute capability ${old / 10} does not have (8.0 and later do). Use a float16 checkpoint for it.`,
      );
    return { compute, linear: "matmul", groupNorm: "operator", attention: "matmul" };
  };
}

const computeTypes = { F32: "float32", F16: "float16", BF16: "bfloat16" } as const;

/** The type that most of a part's values are stored in. */
function prevailingDType(weights: Checkpoint["vae"]["weights"]): StoredDType {
  const bytes = (dtype: StoredDType) => weights.bytesByDType[dtype] ?? 0;
  return (["BF16", "F16", "F32"] as const).reduce((most, dtype) => (bytes(dtype) > bytes(most) ? dtype : most));
}
