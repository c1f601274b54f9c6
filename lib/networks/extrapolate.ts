/**
 * A velocity ahead of where it was evaluated: on the line through it and the one before. Small and without weights.
 */

import { GraphBuilder, type OnnxGraph } from "../onnx/index.js";
import { perRow } from "./layers.js";

/**
 * velocity_next = velocity + weight·(velocity − before), for each half of a pair alike.
 *
 * Inputs (float32): velocity and before [R, C, h, w], weight [B]. R = 2B with guidance, unconditional rows first, else B.
 * Output: velocity_next [R, C, h, w].
 */
export function emitExtrapolate(name: string, channels: number, guided: boolean): OnnxGraph {
  const g = new GraphBuilder(name);
  const shape = [guided ? "network_rows" : "rows", channels, "height", "width"];
  const velocity = g.input("velocity", "float32", shape);
  const before = g.input("before", "float32", shape);
  const own = g.input("weight", "float32", ["rows"]);
  const weight = perRow(g, guided ? g.concat([own, own], 0) : own);
  const change = g.op("Mul", [weight, g.op("Sub", [velocity, before])]);
  g.output("velocity_next", g.op("Add", [velocity, change]), shape);
  return g.build();
}
