/**
 * A schedule → the program that draws pictures with it: the fused steps over double-buffered registers, then the
 * decoder. Graphs are named by the caller; nothing here knows what computes them.
 */

import type { Constant, Instruction, Program, Register } from "../program.js";
import { float32, type Tensor } from "../tensor.js";
import type { Block } from "./blocks.js";
import { planSteps } from "./steps.js";

export interface SamplingRequest {
  readonly blocks: readonly Block[];
  /** Noise levels, one more than blocks. */
  readonly sigmas: readonly number[];
  /** Starting noise, [B, C, h, w]. */
  readonly noise: Tensor;
  /** Text condition: [R, T, joint] and [R, pooled], R = 2B (unconditional first) with guidance, else B. */
  readonly context: Tensor;
  readonly pooled: Tensor;
  /** Guidance scale, or null to run without guidance. */
  readonly guidanceScale: number | null;
  /** Positions, [1, patches, width], for each step type that the blocks use: the two networks differ in width. */
  readonly positions: { readonly predict: Constant; readonly refine: Constant | null };
  readonly graphs: { readonly predict: string; readonly refine: string; readonly decode: string };
  /** Pixels of a latent's side, and channels of a picture. */
  readonly vaeFactor: number;
  readonly imageChannels: number;
  /** At most this many pictures go through the decoder at once: its activations dwarf everything else. */
  readonly decodeRows: number;
}

export interface SamplingProgram {
  readonly program: Program;
  /** Names of the results. */
  readonly latents: string;
  readonly image: string;
}

export function samplingProgram(request: SamplingRequest): SamplingProgram {
  const { blocks, sigmas, noise } = request;
  const [rows, channels, height, width] = noise.shape as [number, number, number, number];
  const networkRows = request.context.shape[0]!;
  const stateShape = [rows, channels, height, width];
  const velocityShape = [networkRows, channels, height, width];

  const constants: Record<string, Constant> = {
    noise: { kind: "value", tensor: noise },
    context: { kind: "value", tensor: request.context },
    pooled: { kind: "value", tensor: request.pooled },
    // Stands in for the velocity where none exists yet; its coefficients are 0.
    no_velocity: value(velocityShape, 0),
    "position_embedding.predict": request.positions.predict,
  };
  if (request.positions.refine) constants["position_embedding.refine"] = request.positions.refine;
  if (request.guidanceScale !== null) constants.guidance = value([rows], request.guidanceScale);
  // Coefficients are per row; equal ones share a constant.
  const perRow = (number: number): string => {
    const name = `rows(${number})`;
    constants[name] ??= value([rows], number);
    return name;
  };

  const registers: Record<string, Register> = {
    x_a: { dtype: "float32", shape: stateShape },
    x_b: { dtype: "float32", shape: stateShape },
    velocity_a: { dtype: "float32", shape: velocityShape },
    velocity_b: { dtype: "float32", shape: velocityShape },
  };
  const instructions: Instruction[] = [];
  let x = "noise";
  let velocity = "no_velocity";
  for (const step of planSteps(blocks, sigmas)) {
    const nextX = x === "x_a" ? "x_b" : "x_a";
    const nextVelocity = velocity === "velocity_a" ? "velocity_b" : "velocity_a";
    const from = sigmas[step.block]!;
    const to = sigmas[step.block + 1]!;
    instructions.push({
      op: "launch",
      graph: request.graphs[step.type],
      inputs: {
        x,
        velocity,
        context: "context",
        pooled: "pooled",
        position_embedding: `position_embedding.${step.type}`,
        sigma: perRow(step.sigma),
        a_in: perRow(step.aIn),
        a_old: perRow(step.aOld),
        a_new: perRow(step.aNew),
        ...(request.guidanceScale !== null && { guidance: "guidance" }),
      },
      outputs: { x_next: nextX, velocity_next: nextVelocity },
      mustBeFinite: [nextX],
      label: {
        kind: "step",
        name: `block ${step.block + 1} of ${blocks.length} (${blocks[step.block]}, sigma ${from.toFixed(4)} to ${to.toFixed(4)})`,
        block: step.block,
        completesBlock: step.completesBlock,
      },
    });
    x = nextX;
    if (step.keepsVelocity) velocity = nextVelocity;
  }
  const image = decodeInstructions(request, x, stateShape, registers, instructions);
  return { program: { registers, constants, instructions, results: [x, image] }, latents: x, image };
}

/** Decodes the rows of register `latents`, a few at a time, into a register of pictures whose name is returned. */
function decodeInstructions(
  request: SamplingRequest,
  latents: string,
  shape: readonly number[],
  registers: Record<string, Register>,
  instructions: Instruction[],
): string {
  const [rows, channels, height, width] = shape as [number, number, number, number];
  const register = (name: string, shape: readonly number[]): string => {
    registers[name] ??= { dtype: "float32", shape };
    return name;
  };
  const imageShape = (n: number) => [n, request.imageChannels, height * request.vaeFactor, width * request.vaeFactor];
  const image = register("image", imageShape(rows));
  for (let row = 0; row < rows; row += request.decodeRows) {
    const count = Math.min(request.decodeRows, rows - row);
    const whole = count === rows;
    const from = whole ? latents : register(`latents_${count}`, [count, channels, height, width]);
    const to = whole ? image : register(`image_${count}`, imageShape(count));
    if (!whole) instructions.push({ op: "copy", from: latents, fromRow: row, to: from, toRow: 0, rows: count });
    instructions.push({
      op: "launch",
      graph: request.graphs.decode,
      inputs: { latents: from },
      outputs: { image: to },
      mustBeFinite: [to],
      label: { kind: "decode", name: whole ? "decoder" : `decoder, picture ${row + 1} of ${rows}` },
    });
    if (!whole) instructions.push({ op: "copy", from: to, fromRow: 0, to: image, toRow: row, rows: count });
  }
  return image;
}

function value(shape: readonly number[], fill: number): Constant {
  const data = new Float32Array(shape.reduce((product, size) => product * size, 1)).fill(fill);
  return { kind: "value", tensor: float32(shape, data) };
}
