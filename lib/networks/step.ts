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
 */

import type { TransformerConfig } from "../checkpoint/index.js";
import type { WeightSource } from "../common/tensor.js";
import { type EmitOptions, GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { applyGuidance, perRow, scaledPair } from "./layers.js";
import { mmdit, mmditWidth, positionTable } from "./mmdit.js";

export interface StepOptions extends EmitOptions {
  /**
   * Without guidance the network runs on B rows instead of 2B, and there is no `guidance` input. With `cfg_zero` the unconditional
   * half that it computes is scaled, see `scaledPair`.
   */
  readonly guidance: boolean | "cfg_zero";
  /** The network's timestep is σ times this (1000). */
  readonly numTrainTimesteps: number;
}

/**
 * Inputs (B rows, R = 2B with guidance, else B; C latent channels):
 * x [B, C, h, w], velocity [R, C, h, w], context [R, T, joint], pooled [R, pooled],
 * position_embedding [1, h/p·w/p, width]; sigma, a_in, a_old, a_new and (guided) guidance [B].
 * Outputs: x_next [B, C, h, w], velocity_next [R, C, h, w]. All float32.
 * @param config of the network to run; a refiner has inChannels = 2·outChannels
 * @throws CheckpointError if a weight is absent or has another shape than the config implies
 */
export function emitStep(
  name: string,
  type: "predict" | "refine",
  weights: WeightSource,
  config: TransformerConfig,
  options: StepOptions,
): OnnxGraph {
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

  const guide = (pair: Value) => (guidance ? applyGuidance(g, pair, guidance) : pair);
  const twice = (value: Value) => (guided ? g.concat([value, value], 0) : value);

  const old = guide(velocity);
  const point = twice(g.op("Add", [x, g.op("Mul", [aIn, old])]));
  const latent = type === "refine" ? g.concat([point, velocity], 1) : point;
  const computed = mmdit(g, weights, config, options, {
    latent: g.cast(latent, options.compute),
    timestep: g.op("Mul", [twice(sigma), g.scalar(options.numTrainTimesteps, "float32")]),
    ...{ context, pooled, positionEmbedding },
  });
  const output = g.cast(computed, "float32");
  const computedPair = type === "refine" ? g.op("Add", [output, velocity]) : output;
  const next = options.guidance === "cfg_zero" ? scaledPair(g, computedPair) : computedPair;
  const moved = g.op("Add", [x, g.op("Mul", [aOld, old])]);
  g.output("x_next", g.op("Add", [moved, g.op("Mul", [aNew, guide(next)])]), ["rows", channels, "height", "width"]);
  g.output("velocity_next", next, [rows, channels, "height", "width"]);
  return g.build();
}
