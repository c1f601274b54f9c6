/**
 * A Stable Diffusion 3 or 3.5 checkpoint folder in the diffusers layout, opened: every config read and checked, every
 * weight located, none read. Whatever would only crash later (a part of another model, widths that do not fit
 * together) is refused here, with the part and the remedy, before any work.
 */

import { readdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import { CheckpointError } from "../errors.js";
import {
  type ClipConfig,
  knownClasses,
  readClipConfig,
  readSchedulerConfig,
  readT5Config,
  readTransformerConfig,
  readVaeConfig,
  type SchedulerConfig,
  type T5Config,
  type TransformerConfig,
  type VaeConfig,
} from "./configs.js";
import { isFolder, type JsonObject, readJsonObject } from "./files.js";
import { checkQuantisation } from "./quantised.js";
import {
  type ModelIdentity,
  modelFingerprint,
  noSchedules,
  readSchedules,
  type StoredSchedules,
  sampledWeights,
} from "./schedules.js";
import { openClipTokenizer, openT5Tokenizer, type Tokenizer } from "./tokenizers.js";
import { openWeights, type Weights } from "./weights.js";

/** A network of the checkpoint: how large it is, and where its weights lie. */
export interface Part<Config> {
  readonly config: Config;
  readonly weights: Weights;
}

/** A text encoder is null exactly where its tokenizer is. */
export interface Checkpoint {
  /** Absolute path, as it was given (symbolic links kept). */
  readonly folder: string;
  /** The predictor. */
  readonly transformer: Part<TransformerConfig>;
  /** FlowTurbo's velocity refiner: takes latents and the last velocity, so twice the channels. */
  readonly refiner: Part<TransformerConfig> | null;
  readonly textEncoder: Part<ClipConfig> | null;
  readonly textEncoder2: Part<ClipConfig> | null;
  readonly textEncoder3: Part<T5Config> | null;
  readonly tokenizer: Tokenizer | null;
  readonly tokenizer2: Tokenizer | null;
  readonly tokenizer3: Tokenizer | null;
  readonly vae: Part<VaeConfig>;
  readonly scheduler: SchedulerConfig;
  /** What schedules.json holds: schedules that were ranked for this model, and schedules that were calibrated for it. */
  readonly schedules: StoredSchedules;
}

interface OpenCheckpointOptions {
  /** Variant of the weight files to read, for example "fp16". Parts without it are read without; some part must have it. */
  readonly variant?: string | undefined;
  /** Checked between reads. */
  readonly signal?: AbortSignal | undefined;
}

const pipelineClasses = [
  "StableDiffusion3Pipeline",
  "StableDiffusion3Img2ImgPipeline",
  "StableDiffusion3InpaintPipeline",
] as const;

const clipTokenizers = ["CLIPTokenizer", "CLIPTokenizerFast"] as const;
const t5Tokenizers = ["T5Tokenizer", "T5TokenizerFast"] as const;

type PartKey = Exclude<keyof Checkpoint, "folder" | "schedules">;

/** How a part is found and opened. */
interface PartRow<Opened> {
  /** Its entry in model_index.json and its folder. */
  readonly name: string;
  /** Classes that its entry may name; null for a part that has no entry, only a folder where there is one. */
  readonly classes: readonly string[] | null;
  /** Whether nothing can be drawn without it. */
  readonly required?: boolean;
  open(folder: string, options: OpenCheckpointOptions): Promise<Opened>;
}

/** Parts that are read; other entries of model_index.json (feature_extractor, image_encoder, ...) are ignored. */
const partRows: { readonly [Key in PartKey]: PartRow<NonNullable<Checkpoint[Key]>> } = {
  transformer: { ...network("transformer", knownClasses.transformer, readTransformerConfig), required: true },
  vae: { ...network("vae", knownClasses.vae, readVaeConfig), required: true },
  scheduler: {
    ...{ name: "scheduler", classes: knownClasses.scheduler, required: true },
    open: (folder) => readSchedulerConfig(join(folder, "scheduler_config.json")),
  },
  textEncoder: network("text_encoder", knownClasses.clip, readClipConfig),
  textEncoder2: network("text_encoder_2", knownClasses.clip, readClipConfig),
  textEncoder3: network("text_encoder_3", knownClasses.t5, readT5Config),
  tokenizer: { name: "tokenizer", classes: clipTokenizers, open: (folder) => openClipTokenizer(folder) },
  tokenizer2: { name: "tokenizer_2", classes: clipTokenizers, open: (folder) => openClipTokenizer(folder) },
  tokenizer3: { name: "tokenizer_3", classes: t5Tokenizers, open: (folder) => openT5Tokenizer(folder) },
  refiner: network("refiner", null, readTransformerConfig),
};

/** Each text encoder with its tokenizer. */
const textParts = [
  ["textEncoder", "tokenizer"],
  ["textEncoder2", "tokenizer2"],
  ["textEncoder3", "tokenizer3"],
] as const;

function network<Config>(
  name: string,
  classes: readonly string[] | null,
  readConfig: (file: string) => Promise<Config>,
): PartRow<Part<Config>> {
  // The text encoders are models of transformers, the others of diffusers, and each calls its files in its own way.
  const basename = name.startsWith("text_encoder") ? "model" : "diffusion_pytorch_model";
  const open = async (folder: string, options: OpenCheckpointOptions) => {
    const read = [readConfig(join(folder, "config.json")), openWeights(folder, basename, options)] as const;
    const [config, weights] = await Promise.all(read);
    const { quantization_config: quantization } = await readJsonObject(join(folder, "config.json"));
    await checkQuantisation(weights, quantization, options);
    return { config, weights };
  };
  return { name, classes, open };
}

const layout =
  "A diffusers folder holds model_index.json beside transformer/, vae/, scheduler/, text_encoder/, tokenizer/ and so on.";

/**
 * Opens a checkpoint folder. A Hugging Face cache's snapshots/<commit> is one, too.
 *
 * @throws CheckpointError that names the file or part and the remedy. `signal.reason` after an abort.
 */
export async function openCheckpoint(folder: string, options: OpenCheckpointOptions = {}): Promise<Checkpoint> {
  const { variant, signal } = options;
  const root = resolve(folder);
  signal?.throwIfAborted();
  const index = join(root, "model_index.json");
  await explainOtherLayouts(root);
  const present = readModelIndex(index, await readJsonObject(index));
  signal?.throwIfAborted();
  const openPart = async ([key, row]: [string, PartRow<unknown>]) => {
    const partFolder = join(root, row.name);
    const found = await isFolder(partFolder);
    if (row.classes ? !present.has(row.name) : !found) return [key, null] as const;
    if (!found)
      throw new CheckpointError(
        partFolder,
        `The folder ${partFolder} is missing, though model_index.json names this part. Download the checkpoint's remaining files.`,
      );
    signal?.throwIfAborted();
    return [key, await row.open(partFolder, options)] as const;
  };
  const parts = await Promise.all(Object.entries(partRows).map(openPart));
  signal?.throwIfAborted();
  // The rows are typed by the key that they open.
  const opened = { folder: root, ...Object.fromEntries(parts), schedules: noSchedules } as Checkpoint;
  checkVariant(opened, variant);
  checkThatPartsFit(opened);
  const schedules = await readSchedules(join(root, "schedules.json"), identityOf(opened));
  return schedules ? { ...opened, schedules } : opened;
}

/** Tells the checkpoint's transformer from others: see `modelFingerprint`. */
export function fingerprintOf({ transformer: { config, weights } }: Pick<Checkpoint, "transformer">): Promise<string> {
  return modelFingerprint(config, weights.files);
}

/** What tells the checkpoint's transformer from others, in whatever precision. */
export function identityOf(checkpoint: Pick<Checkpoint, "transformer">): ModelIdentity {
  const { weights } = checkpoint.transformer;
  return {
    variant: weights.variant,
    fingerprint: () => fingerprintOf(checkpoint),
    samples: () => sampledWeights(weights),
  };
}

/** The names of the parts that are not null. */
function readModelIndex(file: string, json: JsonObject): Set<string> {
  const refuse = (message: string): never => {
    throw new CheckpointError(file, message);
  };
  const pipeline = json._class_name;
  if (!(pipelineClasses as readonly unknown[]).includes(pipeline))
    refuse(
      `${file}: _class_name is ${JSON.stringify(pipeline) ?? "absent"}; known are ${pipelineClasses.join(", ")}. ` +
        "Only Stable Diffusion 3 and 3.5 checkpoints can be read.",
    );
  const present = new Set<string>();
  for (const { name: part, classes, required } of Object.values<PartRow<unknown>>(partRows)) {
    if (!classes) continue;
    const entry = json[part];
    if (entry === undefined)
      refuse(`${file} lacks the part "${part}". A part that a checkpoint does without is [null, null].`);
    const name = Array.isArray(entry) ? (entry[1] as unknown) : entry;
    if (name === null && required)
      refuse(`${file}: the part "${part}" is null, but no picture can be made without it.`);
    if (name === null) continue;
    if (typeof name !== "string" || !classes.includes(name))
      refuse(
        `${file}: the part "${part}" is of the unknown class ${JSON.stringify(name)}; known for it are ${classes.join(", ")}.`,
      );
    present.add(part);
  }
  for (const keys of textParts) {
    const pair = keys.map((key) => partRows[key].name);
    const has = pair.find((part) => present.has(part));
    const lacks = pair.find((part) => !present.has(part));
    if (has && lacks)
      refuse(
        `${file}: "${lacks}" is null but "${has}" is not; a text encoder needs its tokenizer. Make both null or neither.`,
      );
  }
  return present;
}

/** Folders and files that people have instead of a diffusers folder, each with what to do about it. */
async function explainOtherLayouts(root: string): Promise<void> {
  const names = await readdir(root).catch((cause: NodeJS.ErrnoException) => {
    throw new CheckpointError(root, unreadable(root, cause), { cause });
  });
  const transformer = await readdir(join(root, "transformer")).catch((): string[] => []);
  const refuse = (message: string): never => {
    throw new CheckpointError(root, message);
  };
  if (transformer.some((name) => name.endsWith(".onnx")) && !transformer.some((name) => name.includes(".safetensors")))
    refuse(
      `${root} is an ONNX folder (as optimum exports them): its networks are already exported, which cannot be read. Pass the ` +
        `diffusers folder that it was exported from. ${layout}`,
    );
  if (names.includes("model_index.json")) return;
  if (names.includes("snapshots")) {
    const commits = await readdir(join(root, "snapshots")).catch((): string[] => []);
    refuse(
      `${root} is a model's folder in a Hugging Face cache. Pass one of its snapshots: ` +
        `${commits.map((commit) => join(root, "snapshots", commit)).join(", ") || "there is none yet, download the model"}.`,
    );
  }
  const single = names.find((name) => name.endsWith(".safetensors"));
  if (single !== undefined) refuse(singleFile(join(root, single)));
  refuse(`${root} is not a checkpoint: it has no model_index.json. ${layout}`);
}

function unreadable(root: string, { code, message }: NodeJS.ErrnoException): string {
  if (code === "ENOENT") return `The folder ${root} does not exist. Pass a downloaded checkpoint's folder. ${layout}`;
  if (code !== "ENOTDIR") return `Cannot read the folder ${root}: ${message}`;
  return root.endsWith(".safetensors") ? singleFile(root) : `${root} is not a folder. ${layout}`;
}

function singleFile(file: string): string {
  return (
    `${file} is a single-file checkpoint, which cannot be read. Download the model's diffusers folder instead, or convert the ` +
    `file in Python: StableDiffusion3Pipeline.from_single_file(file).save_pretrained(folder). ${layout}`
  );
}

function checkVariant(checkpoint: Checkpoint, variant: string | undefined): void {
  const { folder } = checkpoint;
  const parts = Object.keys(partRows).map((key) => checkpoint[key as PartKey]);
  const weights = parts.flatMap((part) => (part && "weights" in part ? [part.weights] : []));
  if (variant === undefined || weights.some((part) => part.variant !== null)) return;
  const found = [...new Set(weights.flatMap((part) => part.variantsFound))].sort();
  throw new CheckpointError(
    folder,
    `No part of ${folder} has the variant "${variant}". ` +
      (found.length > 0
        ? `Variants found: ${found.map((name) => `"${name}"`).join(", ")}.`
        : "It has no variants: leave the option away."),
  );
}

function checkThatPartsFit(checkpoint: Checkpoint): void {
  const { folder, transformer, refiner, textEncoder, textEncoder2, textEncoder3, vae } = checkpoint;
  const predictor = transformer.config;
  const { inChannels, outChannels, latentChannels } = vae.config;
  const demand = (fits: boolean, part: string, what: string): void => {
    const file = join(folder, part, "config.json");
    if (!fits)
      throw new CheckpointError(file, `${file}: ${what}. These parts are not of one checkpoint: download it again.`);
  };
  /** @param subject the key, @param other the key of another part that has the value `expected` */
  const demandEqual = (part: string, subject: string, value: number, other: string, expected: number) =>
    demand(value === expected, part, `${subject} is ${value}, but ${other} is ${expected}`);

  demand(inChannels === 3 && outChannels === 3, "vae", "in_channels and out_channels must be 3 (RGB)");
  const latents = "the VAE's latent_channels";
  demandEqual("transformer", "in_channels", predictor.inChannels, latents, latentChannels);
  demandEqual("transformer", "out_channels", predictor.outChannels, latents, latentChannels);

  const clips = [textEncoder, textEncoder2].flatMap((part) => (part ? [part.config] : []));
  const lacking = "text_encoder and text_encoder_2 are both null, so the pooled text is missing";
  demand(clips.length > 0, "transformer", lacking);
  const width = predictor.jointAttentionDim;
  const hidden = clips.reduce((sum, clip) => sum + clip.hiddenSize, 0);
  demand(
    hidden <= width,
    "transformer",
    `joint_attention_dim is ${width}, less than the CLIP encoders' hidden_size together (${hidden})`,
  );
  const pooled = clips.reduce((sum, clip) => sum + clip.projectionDim, 0);
  const together = "the CLIP encoders' projection_dim together";
  demandEqual("transformer", "pooled_projection_dim", predictor.pooledProjectionDim, together, pooled);
  if (textEncoder3)
    demandEqual(
      "text_encoder_3",
      "d_model",
      textEncoder3.config.dModel,
      "the transformer's joint_attention_dim",
      width,
    );

  // Ids and positions beyond the encoders' tables would otherwise stop a run in the middle.
  for (const [encoderKey, tokenizerKey] of textParts) {
    const { [encoderKey]: encoder, [tokenizerKey]: tokenizer } = checkpoint;
    const part = partRows[encoderKey].name;
    if (!tokenizer || !encoder) continue;
    const { vocabSize } = encoder.config;
    const largestId = tokenizer.vocabSize - 1;
    demand(largestId < vocabSize, part, `vocab_size is ${vocabSize}, but its tokenizer has ids up to ${largestId}`);
    if (!("maxPositionEmbeddings" in encoder.config)) continue;
    const { maxPositionEmbeddings: positions } = encoder.config;
    demand(
      tokenizer.maxLength <= positions,
      part,
      `max_position_embeddings is ${positions}, but its tokenizer's model_max_length is ${tokenizer.maxLength}`,
    );
  }

  if (!refiner) return;
  const { config } = refiner;
  demand(
    config.inChannels === 2 * latentChannels,
    "refiner",
    `in_channels is ${config.inChannels}, but a refiner takes latents and velocity, 2 x ${latentChannels}`,
  );
  demandEqual("refiner", "out_channels", config.outChannels, latents, latentChannels);
  for (const [key, name] of [
    ["patchSize", "patch_size"],
    ["jointAttentionDim", "joint_attention_dim"],
    ["pooledProjectionDim", "pooled_projection_dim"],
  ] as const)
    demandEqual("refiner", name, config[key], "the transformer's", predictor[key]);
}
