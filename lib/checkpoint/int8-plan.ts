/**
 * Which linear layers of a part are multiplied in 8 bits, and how: decided by what each would be off by on its own inputs, and kept in the
 * cache, since that takes a run of the network. Layers of ordinary inputs are off by 1 to 2 %. A few channels of an input that are far larger
 * than the others take the 8 bits for themselves: then the channels are scaled (SmoothQuant, arXiv 2211.10438), or the layer stays in float.
 */

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import path from "node:path";
import * as z from "zod";
import { makeFolders, writeFileAtomic } from "../common/files.js";
import { packageVersion } from "../common/package.js";
import { OutputError } from "../errors.js";
import type { Part } from "./checkpoint.js";
import { modelFingerprint } from "./schedules.js";
import { weightsFolder } from "./weight-cache.js";

/** How a layer is computed, and what it was found to be off by: root mean square of the difference, as a part of the results'. */
export interface LayerPlan {
  /** `smooth`: in int8, with channels that are scaled. */
  readonly as: "int8" | "smooth" | "float";
  /** What inputs are multiplied by before they are quantised, [in]; of `smooth` alone. */
  readonly smooth?: Float32Array;
  readonly error: number;
}

/** By the names of layers, without ".weight". */
export type Int8Plan = ReadonlyMap<string, LayerPlan>;

/** A plan that was checked. */
export interface CheckedPlan {
  readonly layers: Int8Plan;
  /** What the part's results are off by, where they are off most, as a part of the results'. */
  readonly error: number;
}

/** What a layer was measured to be off by. */
export interface LayerComparison {
  readonly plain: number;
  readonly smoothed: number;
  /** As `LayerPlan.smooth`. */
  readonly smooth: Float32Array;
}

/** Changes when plans of an older form, or of other limits, must not be taken. */
const format = 1;
/** Which layers are scaled. */
interface Smoothing {
  /** Those that are off by more than this, */
  readonly above: number;
  /** where scaling brings that below this part of it. */
  readonly below: number;
}

/** Scaling takes a product for each value of the input, and layers that are scaled share no codes: it has to be worth that. */
const whereNeeded: Smoothing = { above: 0.02, below: 0.8 };
const whereBetter: Smoothing = { above: 0, below: 1 };
/** Layers that are off by more stay in float. */
const floatAbove = 0.08;

/**
 * The form of each layer by itself.
 * @param scaled `needed`: as few layers are scaled as do without it; `better`: all that are nearer so
 */
export function plannedForms(
  comparisons: ReadonlyMap<string, LayerComparison>,
  scaled: "needed" | "better" = "needed",
): Int8Plan {
  const smoothing = scaled === "needed" ? whereNeeded : whereBetter;
  return new Map([...comparisons].map(([layer, comparison]) => [layer, formOf(comparison, smoothing)]));
}

function formOf({ plain, smoothed, smooth }: LayerComparison, { above, below }: Smoothing): LayerPlan {
  const isSmooth = plain > above && smoothed < below * plain;
  const error = isSmooth ? smoothed : plain;
  if (error > floatAbove) return { as: "float", error };
  return isSmooth ? { as: "smooth", smooth, error } : { as: "int8", error };
}

/** The plan with so many more layers in float: those that are off most by themselves. */
export function withoutWorst(plan: Int8Plan, count: number): Int8Plan {
  const result = new Map(plan);
  for (const [name, { error }] of worstFirst(plan).slice(0, count)) result.set(name, { as: "float", error });
  return result;
}

/**
 * How many layers it takes, where the square of the whole error is a sum of the layers' own.
 * @param error what the plan's results are off by
 * @param most what they may be
 */
export function worstToLeave(plan: Int8Plan, error: number, most: number): number {
  const squares = worstFirst(plan).map(([, layer]) => layer.error ** 2);
  const all = squares.reduce((sum, square) => sum + square, 0);
  let left = all;
  const count = squares.findIndex((square) => {
    left -= square;
    return error * Math.sqrt(Math.max(0, left) / all) <= most;
  });
  return count + 1;
}

const worstFirst = (plan: Int8Plan) =>
  [...plan].filter(([, { as }]) => as !== "float").sort(([, a], [, b]) => b.error - a.error);

/** Layers that are quantised, as `quantisedWeights` takes them. */
export function quantisedLayers(plan: Int8Plan): Map<string, Float32Array | null> {
  return new Map([...plan].flatMap(([name, { as, smooth }]) => (as === "float" ? [] : [[name, smooth ?? null]])));
}

/**
 * Where the plan of a part is kept: by what it follows from.
 * @param beside parts whose results it was measured with
 * @param layers that are planned
 */
export async function planFile(
  cache: string,
  part: Part<unknown>,
  beside: readonly Part<unknown>[],
  layers: readonly string[],
): Promise<string> {
  const prints = [part, ...beside].map(({ config, weights }) => modelFingerprint(config, weights.files));
  // Kernels of one processor round sums of float32 in another order than those of another.
  const subject = [format, packageVersion(), process.arch, await Promise.all(prints), layers];
  const key = createHash("sha256").update(JSON.stringify(subject)).digest("hex");
  return path.join(weightsFolder(cache), `${key.slice(0, 32)}.plan.json`);
}

const planSchema = z.object({
  error: z.number(),
  layers: z.record(
    z.string(),
    z.object({ as: z.enum(["int8", "smooth", "float"]), error: z.number(), smooth: z.string().optional() }),
  ),
});

/** Null where there is none, or it is damaged. @param inputs of the layers that it may name */
export async function readPlan(file: string, inputs: ReadonlyMap<string, number>): Promise<CheckedPlan | null> {
  const text = await readFile(file, "utf8").catch(() => null);
  if (text === null) return null;
  const parsed = planSchema.safeParse(jsonOf(text));
  if (!parsed.success) return null;
  const found = new Map<string, LayerPlan>();
  for (const [layer, { smooth: text, ...plan }] of Object.entries(parsed.data.layers)) {
    const smooth = text === undefined ? undefined : floatsOf(text);
    const isDamaged = smooth === null || (plan.as === "smooth" ? smooth?.length !== inputs.get(layer) : smooth);
    if (!inputs.has(layer) || isDamaged) return null;
    found.set(layer, { ...plan, ...(smooth && { smooth }) });
  }
  return { layers: found, error: parsed.data.error };
}

/** @throws OutputError if it cannot be written */
export async function writePlan(file: string, { layers, error }: CheckedPlan): Promise<void> {
  const stored = [...layers].map(([name, { smooth, ...plan }]) => {
    return [name, { ...plan, ...(smooth && { smooth: Buffer.from(bytesOf(smooth)).toString("base64") }) }] as const;
  });
  try {
    await makeFolders(path.dirname(file));
    await writeFileAtomic(file, JSON.stringify({ error, layers: Object.fromEntries(stored) }));
  } catch (cause) {
    const message = `Cannot write ${file}: ${(cause as Error).message}. Name another folder (cache), or load the model without weights: "int8".`;
    throw new OutputError(file, message, { cause });
  }
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array) => new Uint8Array(buffer, byteOffset, byteLength);

/** Null where they are not positive numbers. */
function floatsOf(base64: string): Float32Array | null {
  const bytes = Uint8Array.from(Buffer.from(base64, "base64"));
  if (bytes.length === 0 || bytes.length % 4 !== 0) return null;
  const values = new Float32Array(bytes.buffer);
  return values.every((value) => value > 0 && Number.isFinite(value)) ? values : null;
}

function jsonOf(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
