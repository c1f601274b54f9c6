/**
 * The graphs of editing: small, without weights. They start from a picture, keep the known part of one, and show
 * the present estimate of the result. z: latents of the original, ε: the noise that the run started from.
 */

import { GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { applyGuidance, perRow, scaleNoise } from "./layers.js";

/**
 * x = (1 − σ)·z + σ·ε: latents of a picture with noise of a level.
 * Inputs (float32): latents [1, C, h, w], noise [B, C, h, w], sigma [B]. Output: x [B, C, h, w].
 */
export function emitScaleNoise(name: string, channels: number): OnnxGraph {
  const g = new GraphBuilder(name);
  const latents = g.input("latents", "float32", [1, channels, "height", "width"]);
  const noise = g.input("noise", "float32", ["rows", channels, "height", "width"]);
  const sigma = g.input("sigma", "float32", ["rows"]);
  g.output("x", scaleNoise(g, latents, noise, sigma), ["rows", channels, "height", "width"]);
  return g.build();
}

/**
 * Inpainting: after each block the known region is put back, x ← m·x + (1 − m)·((1 − σ)·z + σ·ε), and so is its
 * velocity, which is known exactly, v ← m·v + (1 − m)·(ε − z): otherwise P and R would reuse one that no longer belongs to x.
 * Inputs (float32): x [B, C, h, w], velocity [R, C, h, w], latents [1, C, h, w], noise [B, C, h, w], mask [1, 1, h, w] (1
 * where new content is wanted), sigma [B] (the point reached). R = 2B with guidance, else B.
 * Outputs: x_next [B, C, h, w], velocity_next [R, C, h, w].
 */
export function emitInpaintBlend(name: string, channels: number, guided: boolean): OnnxGraph {
  const g = new GraphBuilder(name);
  const networkRows = guided ? "network_rows" : "rows";
  const x = g.input("x", "float32", ["rows", channels, "height", "width"]);
  const velocity = g.input("velocity", "float32", [networkRows, channels, "height", "width"]);
  const latents = g.input("latents", "float32", [1, channels, "height", "width"]);
  const noise = g.input("noise", "float32", ["rows", channels, "height", "width"]);
  const mask = g.input("mask", "float32", [1, 1, "height", "width"]);
  const sigma = g.input("sigma", "float32", ["rows"]);
  const kept = g.op("Sub", [g.scalar(1, "float32"), mask]);
  const blend = (fresh: Value, known: Value) => g.op("Add", [g.op("Mul", [mask, fresh]), g.op("Mul", [kept, known])]);
  const direction = g.op("Sub", [noise, latents]);
  const both = guided ? g.concat([direction, direction], 0) : direction;
  g.output("x_next", blend(x, scaleNoise(g, latents, noise, sigma)), ["rows", channels, "height", "width"]);
  g.output("velocity_next", blend(velocity, both), [networkRows, channels, "height", "width"]);
  return g.build();
}

/**
 * The present estimate of the final latents, x − σ·guide(v), through a linear map to colours.
 * Inputs (float32): x [B, C, h, w], velocity [R, C, h, w], sigma [B], guidance [B] (guided only), map [3, C], bias [3, 1].
 * Outputs: latents [B, C, h, w], image [B, 3, h, w] in [-1, 1], not clamped.
 */
export function emitPreview(name: string, channels: number, guided: boolean): OnnxGraph {
  const g = new GraphBuilder(name);
  const x = g.input("x", "float32", ["rows", channels, "height", "width"]);
  let velocity = g.input("velocity", "float32", [guided ? "network_rows" : "rows", channels, "height", "width"]);
  const sigma = perRow(g, g.input("sigma", "float32", ["rows"]));
  if (guided) velocity = applyGuidance(g, velocity, perRow(g, g.input("guidance", "float32", ["rows"])));
  const map = g.input("map", "float32", [3, channels]);
  const bias = g.input("bias", "float32", [3, 1]);
  const estimate = g.op("Sub", [x, g.op("Mul", [sigma, velocity])]);
  const pixels = g.op("Add", [g.op("MatMul", [map, g.op("Reshape", [estimate, g.ints([0, channels, -1])])]), bias]);
  const shape = g.concat([g.shapeOf(x, 0, 1), g.ints([3]), g.shapeOf(x, 2, 4)], 0);
  g.output("latents", estimate, ["rows", channels, "height", "width"]);
  g.output("image", g.op("Reshape", [pixels, shape]), ["rows", 3, "height", "width"]);
  return g.build();
}
