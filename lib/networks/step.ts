/**
 * One fused sampling step: guidance, the network and the update in one graph, so that a step is one launch and no
 * arithmetic is left to the caller. Two kinds serve every sampler (docs in ARCHITECTURE.md):
 *
 *   x_in = x + a_in·guide(v)            v' = network(x_in, 1000·σ, context, pooled)          predict
 *                                       v' = refiner(x_in ⊕ v, 1000·σ, context, pooled) + v   refine
 *   x'   = x + a_old·guide(v) + a_new·guide(v')
 *
 * guide(v) = u + g·(c − u) for the halves u (unconditional, first) and c (conditional) of v. σ and the coefficients
 * are per row, so that rows at different positions of different schedules can share a launch.
 *
 * Variants of `predict` add to the network: ControlNets, which run in the same launch; and skip-layer guidance, for which the network
 * runs on a third row for each picture, w, which some of its blocks leave as it is: v' = u + g·(c − u) + s·(c − w).
 */

import type { ControlNet, TransformerConfig } from "../checkpoint/index.js";
import type { WeightSource } from "../common/tensor.js";
import { type EmitOptions, GraphBuilder, type Value } from "../onnx/index.js";
import { controlChannels, controlLatents, controlPositionTable, controlResiduals, residualOf } from "./controlnet.js";
import { applyGuidance, forTokens, perRow, scaledPair } from "./layers.js";
import { type LoraRank, LowRankBranch, type NetworkGraph } from "./low-rank.js";
import { type MmditInputs, mmdit, mmditWidth, positionTable } from "./mmdit.js";

export interface StepOptions extends EmitOptions {
  /**
   * Without guidance the network runs on B rows instead of 2B, and there is no `guidance` input. With `cfg_zero` the unconditional
   * half that it computes is scaled, see `scaledPair`.
   */
  readonly guidance: boolean | "cfg_zero";
  /** The network's timestep is σ times this (1000). */
  readonly numTrainTimesteps: number;
  /** Rank of a branch beside the transformer's linear layers, whose matrices are inputs: see `LowRankLayout`. Default: none. */
  readonly lora?: LoraRank | undefined;
  /** ControlNets that run with it, in the order of the inputs. Default: none. */
  readonly controls?: readonly ControlNet[];
  /** Of the autoencoder's latents shift·factor, which is subtracted from those of a control, too. Default: 0. */
  readonly controlShift?: number;
  /** With guidance: blocks that are left out of a third row for each picture. Default: none, and no such row. */
  readonly skipped?: readonly number[];
}

/**
 * Inputs (B rows, R = 2B with guidance, else B; C latent channels):
 * x [B, C, h, w], velocity [R, C, h, w], context [R, T, joint], pooled [R, pooled],
 * position_embedding [1, h/p·w/p, width]; sigma, a_in, a_old, a_new and (guided) guidance [B]; with blocks left out skip_scale [B]; for
 * the ControlNet k = 1, 2, … control_k [B, its channels, h, w], control_k_scale [B] and, where it has positions of its own,
 * control_k_positions [1, h/p·w/p, width].
 * Outputs: x_next [B, C, h, w], velocity_next [R, C, h, w]. All float32. With blocks left out the conditional half of the latter is
 * c + (s/g)·(c − w), so that whatever reuses the pair reuses the same guided velocity.
 * @param config of the network to run; a refiner has inChannels = 2·outChannels
 * @throws CheckpointError if a weight is absent or has another shape than the config implies
 */
export function emitStep(
  name: string,
  type: "predict" | "refine",
  weights: WeightSource,
  config: TransformerConfig,
  stepOptions: StepOptions,
): NetworkGraph {
  const options = forTokens(stepOptions, config.posEmbedMaxSize ** 2, config.numAttentionHeads);
  // Rows of this table are an input, which the runtime reads from the file.
  positionTable(weights, config);
  const g = new GraphBuilder(name);
  const channels = config.outChannels;
  const guided = options.guidance !== false;
  const rows = guided ? "network_rows" : "rows";
  const x = g.input("x", "float32", ["rows", channels, "height", "width"]);
  const velocity = g.input("velocity", "float32", [rows, channels, "height", "width"]);
  const context = g.input("context", "float32", [rows, "tokens", config.jointAttentionDim]);
  const pooled = g.input("pooled", "float32", [rows, config.pooledProjectionDim]);
  const positionEmbedding = g.input("position_embedding", "float32", [1, "patches", mmditWidth(config)]);
  const sigma = g.input("sigma", "float32", ["rows"]);
  const coefficient = (input: string) => perRow(g, g.input(input, "float32", ["rows"]));
  const aIn = coefficient("a_in");
  const aOld = coefficient("a_old");
  const aNew = coefficient("a_new");
  const guidance = guided ? coefficient("guidance") : null;

  const { controls = [], skipped = [] } = options;
  const skipScale = skipped.length > 0 ? coefficient("skip_scale") : null;
  /** Rows that the network runs on: of each picture alone, a pair, or three. */
  const copies = skipScale ? 3 : guided ? 2 : 1;
  const repeated = (value: Value) => (copies === 1 ? value : g.concat(new Array<Value>(copies).fill(value), 0));
  /** The condition of the third row is that of the second. */
  const conditionOf = (pair: Value) => (skipScale ? g.concat([pair, halves(g, pair)[1]], 0) : pair);
  const guide = (pair: Value) => (guidance ? applyGuidance(g, pair, guidance) : pair);

  const old = guide(velocity);
  const point = repeated(g.op("Add", [x, g.op("Mul", [aIn, old])]));
  const latent = g.cast(type === "refine" ? g.concat([point, velocity], 1) : point, options.compute);
  const inputs: Omit<MmditInputs, "positionEmbedding"> = {
    latent,
    timestep: g.op("Mul", [repeated(sigma), g.scalar(options.numTrainTimesteps, "float32")]),
    ...{ context: conditionOf(context), pooled: conditionOf(pooled) },
  };
  const transformerInputs = { ...inputs, positionEmbedding };
  const branch = options.lora ? new LowRankBranch(g, options.lora, options.compute) : null;
  const computed = mmdit(g, weights, config, options, transformerInputs, {
    residuals: (tokens) => residualsOf(g, controls, config, options, { ...inputs, tokens }, repeated),
    skipped: { blocks: skipped, rows: skipScale && g.shapeOf(velocity, 0, 1) },
    lowRank: branch,
  });
  const output = g.cast(computed, "float32");
  const [pair, without] = skipScale ? thirds(g, output) : [output, null];
  const computedPair = type === "refine" ? g.op("Add", [pair, velocity]) : pair;
  const scaled = options.guidance === "cfg_zero" ? scaledPair(g, computedPair) : computedPair;
  const next = without ? furtherFrom(g, scaled, without, g.op("Div", [skipScale!, guidance!])) : scaled;
  const moved = g.op("Add", [x, g.op("Mul", [aOld, old])]);
  g.output("x_next", g.op("Add", [moved, g.op("Mul", [aNew, guide(next)])]), ["rows", channels, "height", "width"]);
  g.output("velocity_next", next, [rows, channels, "height", "width"]);
  const lowRank = branch?.close();
  return Object.assign(g.build(), { lowRank });
}

/** The two halves of a pair. */
function halves(g: GraphBuilder, pair: Value): [Value, Value] {
  return g.ops("Split", [pair], 2, { axis: 0, num_outputs: 2 }) as [Value, Value];
}

/** Three rows of each picture → the pair of the first two, and the third. */
function thirds(g: GraphBuilder, rows: Value): [pair: Value, third: Value] {
  const [u, c, third] = g.ops("Split", [rows], 3, { axis: 0, num_outputs: 3 }) as [Value, Value, Value];
  return [g.concat([u, c], 0), third];
}

/** (u, c) → (u, c + scale·(c − without)). */
function furtherFrom(g: GraphBuilder, pair: Value, without: Value, scale: Value): Value {
  const [u, c] = halves(g, pair);
  return g.concat([u, g.op("Add", [c, g.op("Mul", [scale, g.op("Sub", [c, without])])])], 0);
}

/**
 * What ControlNets add to the picture's tokens after a block: for each the residual of `residualOf`, and after the last block none.
 * @param repeated gives all rows of a picture what the picture has
 */
function residualsOf(
  g: GraphBuilder,
  controls: readonly ControlNet[],
  config: TransformerConfig,
  options: StepOptions,
  inputs: Omit<MmditInputs, "positionEmbedding"> & { readonly tokens: Value },
  repeated: (value: Value) => Value,
): (block: number) => Value | null {
  const all = controls.map((controlNet, index) => {
    const name = `control_${index + 1}`;
    const channels = controlChannels(controlNet.config);
    const latents = g.input(name, "float32", ["rows", channels, "height", "width"]);
    const scale = g.op("Unsqueeze", [repeated(g.input(`${name}_scale`, "float32", ["rows"])), g.ints([1, 2])]);
    // Rows of the table are an input, which the runtime reads from the file.
    const positions = controlPositionTable(controlNet)
      ? g.input(`${name}_positions`, "float32", [1, "patches", mmditWidth(config)])
      : null;
    const asTrained = controlLatents(g, controlNet, latents, options.controlShift ?? 0);
    const control = g.cast(repeated(asTrained), options.compute);
    const residuals = g.scoped(name, () =>
      controlResiduals(g, controlNet, options, { ...inputs, control, positionEmbedding: positions }),
    );
    const factor = g.cast(scale, options.compute);
    return residuals.map((residual) => g.op("Mul", [residual, factor]));
  });
  return (block) =>
    block === config.numLayers - 1
      ? null
      : all.reduce<Value | null>((sum, residuals) => {
          const residual = residuals[residualOf(block, config.numLayers, residuals.length)]!;
          return sum ? g.op("Add", [sum, residual]) : residual;
        }, null);
}
