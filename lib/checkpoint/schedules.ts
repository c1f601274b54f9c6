/**
 * schedules.json: the schedules that were found for a checkpoint, in its folder, or in the cache where that cannot be written. The
 * format, version 1:
 *
 *   { "version": 1, "model": fingerprint, "variant": "fp16", "samples": [0.0123, …], "ladder": ["H1P7", …],
 *     "calibrated": [{ width, height, guidanceScale, guided, scales, sigmas, weights, psnr, refined }, …] }
 *
 * `ladder` lists schedules for time limits, the richest first. `calibrated` holds noise levels, weights and guidance of each step (the
 * fields of CalibratedSchedule): `scales` may be absent where all are 1, `refined` for false, and `psnr`, which is of what was fitted and
 * of the usual schedule on the same pictures. `variant` names the weight files that they were made with, where those have a name;
 * `samples` are some of the weights, by which the same model is known in files of another precision. Either list may be absent; `version`
 * and `model` may be where there is only a ladder. Other fields say where the numbers come from.
 */

import { createHash } from "node:crypto";
import { open } from "node:fs/promises";
import * as z from "zod";
import type { FileVersion } from "../common/files.js";
import { elementCount } from "../common/tensor.js";
import { CheckpointError } from "../errors.js";
import { readOptionalJson } from "./files.js";
import { isBesideWeights, readElements } from "./quantised.js";
import type { Weights } from "./weights.js";

/** Of the file's format. */
export const schedulesVersion = 1;

/** Of guidance scales, as multiples of the whole. */
const [leastScale, largestScale] = [1e-5, 1000];

/** Levels that are nearer to each other than this, and weights beyond this, are no schedule of float32 numbers. */
const [leastGap, largestWeight] = [1e-5, 100];

const weight = z.number().min(-largestWeight).max(largestWeight);
/** A calibrated schedule; what else an entry says is kept. */
export const calibratedSchema = z
  .looseObject({
    width: z.int().positive(),
    height: z.int().positive(),
    guidanceScale: z.number().min(1).max(1000),
    guided: z.array(z.boolean()).min(1).max(1000),
    scales: z.array(z.number().min(leastScale).max(largestScale)).optional(),
    sigmas: z.array(z.number().min(0).max(1)),
    weights: z.array(z.tuple([weight, weight, weight])),
    psnr: z.looseObject({ held: z.number(), uncalibrated: z.number() }).optional(),
    refined: z.boolean().optional(),
  })
  .refine(({ weights, guided }) => weights.length === guided.length, "has another number of weights than of guided")
  .refine(
    ({ scales, guided }) => scales === undefined || scales.length === guided.length,
    "has another number of scales than of guided",
  )
  .refine(({ weights, sigmas }) => sigmas.length === weights.length + 1, "needs one more of sigmas than of weights")
  .refine(({ sigmas }) => sigmas[0] === 1 && sigmas.at(-1) === 0, "has sigmas that do not go from 1 to 0")
  .refine(
    ({ sigmas }) => sigmas.every((sigma, i) => i === 0 || sigma <= sigmas[i - 1]! - leastGap),
    "has sigmas that do not fall",
  );

/** What is read of the file. */
export interface StoredSchedules {
  readonly ladder: readonly string[] | null;
  readonly calibrated: readonly Readonly<z.output<typeof calibratedSchema>>[];
}

/** Of a checkpoint without the file. */
export const noSchedules: StoredSchedules = { ladder: null, calibrated: [] };

/** What tells a model's transformer from others. */
export interface ModelIdentity {
  /** Of its weight files, null for the plain ones. */
  readonly variant: string | null;
  /** Of these very files: see `modelFingerprint`. */
  fingerprint(): Promise<string>;
  /** Some of its weights: see `sampledWeights`. */
  samples(): Promise<readonly number[]>;
}

/** What a file of schedules says of the model that they are for. */
export interface NamedModel {
  readonly model?: string | undefined;
  readonly variant?: string | null | undefined;
  readonly samples?: readonly number[] | undefined;
}

/** Whether schedules are those of a model: of these very files, or of the same weights in files of another precision. */
export async function isModelOf({ model, variant, samples }: NamedModel, identity: ModelIdentity): Promise<boolean> {
  if ((variant ?? null) === identity.variant) return model === (await identity.fingerprint());
  const own = await identity.samples();
  return samples?.length === own.length && own.every((value, i) => isRounded(value, samples[i]!));
}

/** Whether two numbers are one, each rounded to bfloat16 or finer. */
const isRounded = (a: number, b: number) => Math.abs(a - b) <= 2 ** -7 * Math.max(Math.abs(a), Math.abs(b)) + 1e-6;

/**
 * @param identity of the model that the file lies with
 * @returns null without the file
 * @throws CheckpointError for a file that is of another version or model, or is not whole. Whether its schedules can be run is known
 *   where schedules are.
 */
export async function readSchedules(file: string, identity: ModelIdentity): Promise<StoredSchedules | null> {
  const remedy =
    "Correct it, or remove the file: the usual schedules are then taken, and `flowturbo calibrate` finds others.";
  const json = await readOptionalJson(file, remedy);
  if (!json) return null;
  const refuse = (message: string): never => {
    throw new CheckpointError(file, `${file}: ${message} ${remedy}`);
  };
  const { version = schedulesVersion, ladder } = json;
  if (version !== schedulesVersion)
    refuse(
      `expected version ${schedulesVersion} but found ${JSON.stringify(version)}. It was written by another version of flowturbo.`,
    );
  const isLadder = Array.isArray(ladder) && ladder.length > 0 && ladder.every((blocks) => typeof blocks === "string");
  if (!isLadder && (ladder !== undefined || json.calibrated === undefined))
    refuse(
      `expected "ladder" to be a list of schedules such as "H1P7R2", the richest first, but found ${JSON.stringify(ladder) ?? "nothing"}.`,
    );
  const parsed = z.array(calibratedSchema).safeParse(json.calibrated ?? []);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    refuse(`"calibrated" is not whole: ${["calibrated", ...issue!.path].join(".")}: ${issue!.message}.`);
  }
  const calibrated = parsed.data!;
  const named = namedModelSchema.safeParse(json);
  if (calibrated.length > 0 && !(named.success && (await isModelOf(named.data, identity))))
    refuse("its schedules were calibrated for another model than the one in this folder.");
  return { ladder: (ladder as string[] | undefined) ?? null, calibrated };
}

/** The fields of a `NamedModel`. */
export const namedModelSchema = z.looseObject({
  model: z.string().optional(),
  variant: z.string().nullish(),
  samples: z.array(z.number()).optional(),
});

/** Weights that are sampled. */
const sampled = 48;

/** Single weights from all over a network, of tensors in the order of their names. */
export async function sampledWeights({ names, find }: Pick<Weights, "names" | "find">): Promise<number[]> {
  const sorted = names.filter((name) => !isBesideWeights(name)).sort();
  const values: number[] = [];
  for (let place = 0; place < sampled; place++) {
    const tensor = find(sorted[Math.floor((sorted.length * place) / sampled)]!)!;
    // Another place in each: neighbouring tensors of equal shape have something in common.
    const index = Math.floor((elementCount(tensor.shape) * (2 * place + 1)) / (2 * sampled));
    const data = await readElements(tensor, index, 1);
    values.push(Number(data[0]!.toPrecision(6)));
  }
  return values;
}

/** Bytes of a file that are read at each of so many places. */
const [sample, places] = [4096, 32];

/** A digest that tells models apart without reading all of their weights: configs, sizes of files, and samples of their bytes. */
export async function modelFingerprint(config: unknown, files: readonly FileVersion[]): Promise<string> {
  const hash = createHash("sha256").update(JSON.stringify(config));
  const buffer = Buffer.alloc(sample);
  for (const { file } of files) {
    const handle = await open(file);
    try {
      const { size } = await handle.stat();
      hash.update(`${size};`);
      for (let place = 0; place < places; place++) {
        const position = Math.floor((Math.max(0, size - sample) * place) / (places - 1));
        const { bytesRead } = await handle.read(buffer, 0, sample, position);
        hash.update(buffer.subarray(0, bytesRead));
      }
    } finally {
      await handle.close();
    }
  }
  return hash.digest("hex");
}
