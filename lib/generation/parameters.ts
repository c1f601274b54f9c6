/**
 * What a picture's file says of how it was drawn, back to options of `generate`: the other way of `parametersOf` in
 * result.ts. Fields have the names of the options, so that a new one needs nothing here.
 */

import { readFile } from "node:fs/promises";
import type * as z from "zod";
import { OptionError } from "../errors.js";
import type { GenerateOptions } from "../model.js";
import { generateSchema, refuseUrl } from "../options.js";
import { headLength, undecodable } from "./file-kinds.js";
import { textsOf } from "./metadata.js";
import { sharp } from "./sharp.js";

export type Parameters = Readonly<Record<string, unknown>>;

/** What a file says about itself. */
export interface Inspection {
  readonly format: string;
  readonly width: number;
  readonly height: number;
  /** What drew it, as far as its texts tell: "flowturbo", or another tool; null for neither. */
  readonly writer: string | null;
  /** Of flowturbo; null of other writers. */
  readonly parameters: Parameters | null;
  /** All texts of the file by their names. */
  readonly texts: Readonly<Record<string, string>>;
}

/** Other tools, by the texts that they write: the first that fits. */
const writers: readonly { readonly name: string; readonly is: (texts: ReadonlyMap<string, string>) => boolean }[] = [
  {
    name: "ComfyUI",
    is: (texts) =>
      [...texts].some(([name, text]) =>
        name === "Make" || name === "Model"
          ? /^(prompt|workflow):\{/.test(text)
          : /^(prompt|workflow)$/.test(name) && isRecord(parsed(text)),
      ),
  },
  { name: "InvokeAI", is: (texts) => texts.has("invokeai_metadata") },
  { name: "NovelAI", is: (texts) => texts.get("Software") === "NovelAI" },
  {
    name: "SwarmUI",
    is: (texts) => /"sui_image_params"/.test(texts.get("parameters") ?? texts.get("UserComment") ?? ""),
  },
  {
    name: "AUTOMATIC1111's web UI, or a tool that writes as it does",
    is: (texts) => /(^|\n)Steps: \d+, /.test(texts.get("parameters") ?? texts.get("UserComment") ?? ""),
  },
];

/**
 * Reads the texts of a picture's file.
 * @throws OptionError named `option` for what is no picture, is a URL, or cannot be read
 */
export async function inspect(file: string, option: string): Promise<Inspection> {
  refuseUrl(option, file);
  const open = await sharp.load();
  const bytes = await readFile(file).catch((cause: Error) => {
    throw new OptionError(option, `The picture "${file}" cannot be read: ${cause.message}.`, { cause });
  });
  // sharp throws at once for an empty file.
  const reading = async () => open(bytes).metadata();
  const { format, width, height, exif } = await reading().catch((cause: Error) => {
    const kind = undecodable(bytes.subarray(0, headLength));
    const reason = kind
      ? `it is ${kind.name}. ${kind.remedy}`
      : `${cause.message.split("\n")[0]!.replace(/[\s:.]+$/, "")}.`;
    throw new OptionError(option, `The picture "${file}" cannot be read: ${reason}`, { cause });
  });
  const texts = textsOf(bytes, exif);
  const parameters = [texts.get("parameters"), texts.get("ImageDescription")].map(ownParameters).find(Boolean) ?? null;
  const writer = parameters ? "flowturbo" : (writers.find(({ is }) => is(texts))?.name ?? null);
  return { ...{ format, width, height, writer, parameters }, texts: Object.fromEntries(texts) };
}

/** Whether a text is what `Image` writes: every picture has a prompt and a guidance scale. */
function ownParameters(text: string | undefined): Parameters | null {
  const value = text === undefined ? null : parsed(text);
  if (!isRecord(value)) return null;
  const { prompt, guidanceScale, truncated, software } = value;
  const isOwn = typeof software === "string" && software.startsWith("flowturbo ");
  return isOwn || (prompt !== undefined && (guidanceScale !== undefined || truncated !== undefined)) ? value : null;
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** Files are not taken by the names that another file has for them. */
const { image: _, mask: __, controls: ___, ...readable } = generateSchema.shape;
/** Fields that are no options. */
const facts = [
  ...["textEncoder3", "mergedLoras", "model", "software", "runtime", "inpainted", "truncated", "promptEmbeds"],
  "controls",
];

/** Parameters as options. */
export interface Redrawing {
  readonly options: Partial<GenerateOptions>;
  /** Fields that no option has the name of, or whose values it does not take. */
  readonly unknown: readonly string[];
  /** The option that has to be given with them, since it is in no file; null for none. */
  readonly needs: readonly ("prompt" | "image" | "mask" | "noise" | "controls")[];
}

/** The options that parameters stand for. */
export function optionsOf(parameters: Parameters): Redrawing {
  const options: Record<string, unknown> = {};
  const unknown: string[] = [];
  const isOfNoise = parameters.seed === null;
  for (const [name, value] of Object.entries(parameters)) {
    if (facts.includes(name) || (name === "seed" && isOfNoise)) continue;
    const field = Object.hasOwn(readable, name) ? (readable as Record<string, z.ZodType>)[name]! : null;
    if (field?.safeParse(value).success) options[name] = value;
    else unknown.push(name);
  }
  const isEdit = parameters.strength !== undefined || parameters.inpainted !== undefined;
  const needs = [
    ...(parameters.promptEmbeds === true ? (["prompt"] as const) : []),
    ...(isEdit ? (["image"] as const) : []),
    ...(parameters.inpainted === true ? (["mask"] as const) : []),
    ...(isOfNoise ? (["noise"] as const) : []),
    ...(parameters.controls !== undefined ? (["controls"] as const) : []),
  ];
  return { options, unknown, needs };
}

/** Of each option the others that say the same in other words, or that it does not go with. */
const displaced: Readonly<Partial<Record<keyof GenerateOptions | "seeds", readonly string[]>>> = {
  sampler: ["blocks", "grid", "sigmas", "stages"],
  steps: ["quality", "blocks", "sigmas", "stages"],
  quality: ["sampler", "steps", "blocks", "grid", "sigmas", "stages"],
  blocks: ["sampler", "steps", "quality", "grid", "sigmas", "stages"],
  grid: ["sigmas", "stages"],
  sigmas: ["steps", "quality", "blocks", "grid", "stages"],
  stages: ["width", "height", "sampler", "steps", "quality", "blocks", "grid", "sigmas"],
  width: ["stages"],
  height: ["stages"],
  shift: ["mu"],
  mu: ["shift"],
  seed: ["seeds"],
  seeds: ["seed"],
  noise: ["seed", "seeds"],
};

/** Options whose values decide how many steps there are. */
const stepWords = ["sampler", "steps", "quality", "blocks", "sigmas", "stages"];
/** Options that a calibrated schedule is found by: for others there may be none. */
const calibrationWords = [
  ...["width", "height", "shift", "mu", "image"],
  ...["guidanceScale", "guidanceStart", "guidanceStop", "guidanceMode"],
];

/**
 * Options of a file under those that are given, which win, also over what says the same in other words. A list of guidance
 * scales, one for each step, becomes its largest where the steps are others; a grid that was calibrated is left open where it may not fit; without
 * guidance there is no skip-layer guidance.
 */
export function overridden(
  options: Partial<GenerateOptions>,
  given: Readonly<Record<string, unknown>>,
): Record<string, unknown> {
  const dropped = new Set(Object.keys(given).flatMap((name) => displaced[name as keyof typeof displaced] ?? []));
  const kept = Object.fromEntries(Object.entries(options).filter(([name]) => !dropped.has(name)));
  const { guidanceScale } = options;
  const says = (names: readonly string[]) => names.some((name) => given[name] !== undefined);
  if (Array.isArray(guidanceScale) && says(stepWords)) kept.guidanceScale = Math.max(...(guidanceScale as number[]));
  const isUnguided = [given.guidanceScale ?? []].flat().every((scale) => Number(scale) <= 1);
  if (given.guidanceScale !== undefined && isUnguided) delete kept.skipLayers;
  if (kept.grid === "calibrated" && says([...stepWords, ...calibrationWords])) delete kept.grid;
  return { ...kept, ...given };
}
