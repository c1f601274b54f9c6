/**
 * Scales of LoRAs whose files have no tensors for alpha: diffusers' metadata (`lora_adapter_metadata`), or PEFT's adapter_config.json beside
 * its file. Both have the fields of PEFT's LoraConfig, whose patterns name layers by regular expressions. Without either alpha is the rank.
 */

import path from "node:path";
import { CheckpointError } from "../../errors.js";
import { isRecord, type JsonObject, readOptionalJson } from "../files.js";
import type { HeaderEntry } from "../safetensors.js";
import type { LoraPart } from "./layers.js";

export interface Alphas {
  /**
   * alpha / r of a layer, or alpha / √r where it was trained so.
   * @param pair the tensors, for messages
   * @param layer by the name of diffusers or transformers
   * @param rank of the file's matrices
   * @throws CheckpointError if the settings say another rank
   */
  scaleOf(pair: { readonly down: HeaderEntry }, part: LoraPart, layer: string, rank: number): number;
}

/** diffusers' key of metadata: JSON of settings, each behind the name of its part. */
const metadataKey = "lora_adapter_metadata";
/** PEFT's file, with the name of the weights beside it. */
const [configFile, configuredFile] = ["adapter_config.json", "adapter_model.safetensors"];

/** What the parts are called before the settings. */
const partNames: Readonly<Record<LoraPart, string>> = {
  transformer: "transformer",
  textEncoder: "text_encoder",
  textEncoder2: "text_encoder_2",
  textEncoder3: "text_encoder_3",
};

/** @throws CheckpointError for settings that are no JSON, or that name what is no LoRA of two matrices */
export async function readAlphas(file: string, metadata: Readonly<Record<string, string>>): Promise<Alphas> {
  const beside = path.join(path.dirname(file), configFile);
  const config = path.basename(file) === configuredFile ? await readOptionalJson(beside) : undefined;
  const text = metadata[metadataKey];
  const described = text === undefined ? undefined : parsed(file, text);
  const known = new Map<LoraPart, Settings>();
  for (const [part, name] of Object.entries(partNames) as [LoraPart, string][]) {
    const fields = described && behind(described, `${name}.`);
    if (fields && Object.keys(fields).length > 0)
      known.set(part, settingsOf(file, `${metadataKey} of its metadata`, fields));
    else if (config && part === "transformer") known.set(part, settingsOf(beside, "it", config));
  }
  return {
    scaleOf(pair, part, layer, rank) {
      const settings = known.get(part);
      if (!settings) return 1;
      const said = patternOf(settings.ranks, layer) ?? settings.rank ?? rank;
      if (said !== rank)
        throw new CheckpointError(
          settings.file,
          `${settings.file}: ${settings.where} says rank ${said} for ${layer}, but the tensor "${pair.down.name}" has the shape [${pair.down.shape.join(", ")}]. They are not of one LoRA: download or save it again.`,
        );
      const alpha = patternOf(settings.alphas, layer) ?? settings.alpha ?? rank;
      return settings.isRankStabilised ? alpha / Math.sqrt(rank) : alpha / rank;
    },
  };
}

function parsed(file: string, text: string): JsonObject {
  try {
    const json: unknown = JSON.parse(text);
    if (isRecord(json)) return json;
  } catch {
    // Said below, as of other values.
  }
  throw new CheckpointError(
    file,
    `${file}: its metadata's ${metadataKey} is not a JSON object. The file is damaged: download or save it again.`,
  );
}

const behind = (fields: JsonObject, prefix: string): JsonObject =>
  Object.fromEntries(
    Object.entries(fields).flatMap(([key, value]) =>
      key.startsWith(prefix) ? [[key.slice(prefix.length), value]] : [],
    ),
  );

type Patterns = readonly (readonly [pattern: RegExp, value: number])[];

interface Settings {
  readonly file: string;
  readonly where: string;
  readonly rank: number | undefined;
  readonly alpha: number | undefined;
  readonly ranks: Patterns;
  readonly alphas: Patterns;
  readonly isRankStabilised: boolean;
}

function settingsOf(file: string, where: string, fields: JsonObject): Settings {
  const fail = (what: string): never => {
    throw new CheckpointError(
      file,
      `${file}: ${where} ${what}. The LoRA was saved wrongly: download or save it again.`,
    );
  };
  const number = (key: string, value: unknown): number =>
    typeof value === "number" && Number.isFinite(value)
      ? value
      : fail(`has ${JSON.stringify(value)} as ${key}; expected a number`);
  const optional = (key: string) => {
    const value = fields[key];
    return value === undefined || value === null ? undefined : number(key, value);
  };
  const patterns = (key: string): Patterns => {
    const value = fields[key] ?? {};
    if (!isRecord(value)) return fail(`has ${JSON.stringify(value)} as ${key}; expected an object`);
    return Object.entries(value).map(([pattern, each]) => {
      const expression =
        layerPattern(pattern) ?? fail(`has the pattern "${pattern}" in ${key}, which is not understood`);
      return [expression, number(`${key} of "${pattern}"`, each)] as const;
    });
  };
  const { peft_type: type = "LORA" } = fields;
  if (fields.use_dora === true || (typeof type === "string" && type !== "LORA"))
    throw new CheckpointError(
      file,
      `${file}: ${where} says that it is ${fields.use_dora === true ? "DoRA" : type}, which is not read; LoRAs of two matrices for a layer are. ` +
        "Merge it into its checkpoint with PEFT (merge_and_unload), and pass that checkpoint as the model.",
    );
  return {
    ...{ file, where, rank: optional("r"), alpha: optional("lora_alpha") },
    ...{ ranks: patterns("rank_pattern"), alphas: patterns("alpha_pattern") },
    isRankStabilised: fields.use_rslora === true,
  };
}

/** The longest pattern, and the most repetitions in one: a file's expression must not take long on any name. */
const [longestPattern, mostRepeats] = [512, 4];

/** A pattern as PEFT takes it: a regular expression for the end of a layer's name, from a dot on. Null for what is none. */
function layerPattern(pattern: string): RegExp | null {
  const repeats = pattern.replace(/\\./g, "").match(/[*+{]/g)?.length ?? 0;
  if (pattern.length > longestPattern || repeats > mostRepeats || /\)[*+?{]/.test(pattern)) return null;
  try {
    return new RegExp(`^(.*\\.)?(${pattern})$`);
  } catch {
    return null;
  }
}

const patternOf = (patterns: Patterns, layer: string): number | undefined =>
  patterns.find(([pattern]) => pattern.test(layer))?.[1];
