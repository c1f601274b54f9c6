/**
 * Sums of what a sampler remembers, without a network: what multistep methods need that reach further back than the fused step,
 * which reuses one velocity. Small and without weights.
 */

import { GraphBuilder, type OnnxGraph } from "../onnx/index.js";
import { applyGuidance, perRow } from "./layers.js";

/**
 * With w = guide(velocity), m₁ = first and m₂ = second, for each of the outputs x, first and second a weight of each, per row:
 *
 *   x_next = x + x_velocity·w + x_first·m₁ + x_second·m₂
 *   first_next = first_velocity·w + first_first·m₁ + first_second·m₂          and second_next likewise
 *
 * Inputs (float32): x, first, second [B, C, h, w], velocity [R, C, h, w], the nine weights [B], guidance [B] (guided only). R = 2B with
 * guidance, unconditional rows first, else B. Outputs: x_next, first_next, second_next [B, C, h, w].
 */
export function emitCombine(name: string, channels: number, guided: boolean): OnnxGraph {
  const g = new GraphBuilder(name);
  const rows = ["rows", channels, "height", "width"];
  const x = g.input("x", "float32", rows);
  const velocity = g.input("velocity", "float32", [guided ? "network_rows" : "rows", channels, "height", "width"]);
  const first = g.input("first", "float32", rows);
  const second = g.input("second", "float32", rows);
  const input = (name: string) => perRow(g, g.input(name, "float32", ["rows"]));
  const w = guided ? applyGuidance(g, velocity, input("guidance")) : velocity;
  const sum = (output: string) =>
    Object.entries({ velocity: w, first, second })
      .map(([term, value]) => g.op("Mul", [input(`${output}_${term}`), value]))
      .reduce((total, term) => g.op("Add", [total, term]));
  g.output("x_next", g.op("Add", [x, sum("x")]), rows);
  g.output("first_next", sum("first"), rows);
  g.output("second_next", sum("second"), rows);
  return g.build();
}
