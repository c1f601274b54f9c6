/**
 * A Stable Diffusion 3 or 3.5 checkpoint, opened: a folder in the diffusers layout, or one file whose other parts may be
 * in such a folder, its base. Every config is read and checked, every weight located, none read. Whatever would only crash later (a part of another model, widths that do not fit
 * together) is refused here, with the part and the remedy, before any work.
 */

import { readdir } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
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
  usualScheduler,
  type VaeConfig,
} from "./configs.js";
import { exists, isFile, isFolder, isRecord, type JsonObject, readJsonObject } from "./files.js";
import { checkQuantisation } from "./quantised.js";
import {
  type ModelIdentity,
  modelFingerprint,
  noSchedules,
  readSchedules,
  type StoredSchedules,
  sampledWeights,
} from "./schedules.js";
import {
  type FileConfigs,
  type FilePart,
  fileParts,
  type PartInFile,
  readSingleFile,
  refuseFolderOf,
} from "./single-file/index.js";
import { openClipTokenizer, openPackedTokenizer, openT5Tokenizer, type Tokenizer } from "./tokenizers.js";
import { type Naming, namings, openWeights, type Weights } from "./weights.js";

/** A network of the checkpoint: how large it is, and where its weights lie. */
export interface Part<Config> {
  readonly config: Config;
  readonly weights: Weights;
}

/** A text encoder is null exactly where its tokenizer is. */
export interface Checkpoint {
  /** Absolute path of the folder, or of the file of a checkpoint in one file, as it was given (symbolic links kept). */
  readonly folder: string;
  /** Where its schedules.json is, or would be; null for a checkpoint in one file, which has none beside it. */
  readonly schedulesFile: string | null;
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
  /** Another autoencoder of the same latents, from a folder of its own: for previews, and between stages. */
  readonly previewVae: Part<VaeConfig> | null;
  readonly scheduler: SchedulerConfig;
  /** What schedules.json holds: schedules that were ranked for this model, and schedules that were calibrated for it. */
  readonly schedules: StoredSchedules;
  /** What is missing or there twice, and how the folder is read because of it. */
  readonly warnings: readonly string[];
}

interface OpenCheckpointOptions {
  /** Variant of the weight files to read, for example "fp16". Parts without it are read without; some part must have it. */
  readonly variant?: string | undefined;
  /** False leaves T5 out, whatever the folder has. Default: true. */
  readonly textEncoder3?: boolean | undefined;
  /** For a checkpoint in one file: the folder from which is taken what it does not hold or say. */
  readonly base?: string | undefined;
  /** Folder of `previewVae`: config.json and weights. */
  readonly previewVae?: string | undefined;
  /** Checked between reads. */
  readonly signal?: AbortSignal | undefined;
}

/** Pipelines of SD3 differ in parts that are added to the same ones: a ControlNet, an image encoder, guiders. */
const pipelineClass = /^StableDiffusion3\w*Pipeline$/;

/** Files that name the parts, the one that counts first: that of pipelines, and that of modular ones. */
const indexFiles = ["model_index.json", "modular_model_index.json"] as const;

const clipTokenizers = ["CLIPTokenizer", "CLIPTokenizerFast"] as const;
const t5Tokenizers = ["T5Tokenizer", "T5TokenizerFast"] as const;

type PartKey = Exclude<keyof Checkpoint, "folder" | "schedulesFile" | "schedules" | "warnings" | "previewVae">;

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

/** A part with weights, whose configuration can be read alone. */
interface NetworkRow<Config> extends PartRow<Part<Config>> {
  readConfig(file: string): Promise<Config>;
}

/** Parts that are read; other entries of model_index.json (feature_extractor, image_encoder, ...) are ignored. */
const partRows: {
  readonly [Key in PartKey]: NonNullable<Checkpoint[Key]> extends Part<infer Config>
    ? NetworkRow<Config>
    : PartRow<NonNullable<Checkpoint[Key]>>;
} = {
  transformer: { ...network("transformer", knownClasses.transformer, readTransformerConfig), required: true },
  vae: { ...network("vae", knownClasses.vae, readVaeConfig), required: true },
  scheduler: {
    ...{ name: "scheduler", classes: knownClasses.scheduler, required: true },
    open: (folder) => readSchedulerConfig(join(folder, "scheduler_config.json")),
  },
  textEncoder: network("text_encoder", knownClasses.clip, readClipConfig, namings.clip),
  textEncoder2: network("text_encoder_2", knownClasses.clip, readClipConfig, namings.clip),
  textEncoder3: network("text_encoder_3", knownClasses.t5, readT5Config, namings.t5),
  tokenizer: { name: "tokenizer", classes: clipTokenizers, open: (folder) => openClipTokenizer(folder) },
  tokenizer2: { name: "tokenizer_2", classes: clipTokenizers, open: (folder) => openClipTokenizer(folder) },
  tokenizer3: { name: "tokenizer_3", classes: t5Tokenizers, open: (folder) => openT5Tokenizer(folder) },
  refiner: network("refiner", null, readTransformerConfig),
};

/** Tokenizers of the public models, which come with the package. */
const packedTokenizers = { tokenizer: "tokenizer", tokenizer2: "tokenizer_2", tokenizer3: "tokenizer_3" } as const;

/** Each text encoder with its tokenizer. */
const textParts = [
  ["textEncoder", "tokenizer"],
  ["textEncoder2", "tokenizer2"],
  ["textEncoder3", "tokenizer3"],
] as const;

/** T5: the one text encoder that pictures can be drawn without while the folder has it. */
const t5Parts = [partRows.textEncoder3.name, partRows.tokenizer3.name];
const withoutT5 = "To draw without T5, load the model with textEncoder3: false (--no-t5).";

function network<Config>(
  name: string,
  classes: readonly string[] | null,
  readConfig: (file: string) => Promise<Config>,
  naming: Naming = namings.plain,
): NetworkRow<Config> {
  // The text encoders are models of transformers, the others of diffusers, and each calls its files in its own way.
  const basename = name.startsWith("text_encoder") ? "model" : "diffusion_pytorch_model";
  const open = async (folder: string, options: OpenCheckpointOptions) => {
    const opening = openWeights(folder, basename, { ...options, naming });
    const read = [readConfig(join(folder, "config.json")), opening] as const;
    const [config, weights] = await Promise.all(read);
    const { quantization_config: quantization } = await readJsonObject(join(folder, "config.json"));
    await checkQuantisation(weights, quantization, options);
    return { config, weights };
  };
  return { name, classes, open, readConfig };
}

const layout =
  "A diffusers folder holds model_index.json beside transformer/, vae/, scheduler/, text_encoder/, tokenizer/ and so on.";

/** What may be passed, of a model and of a base. */
const modelForms = "Pass a downloaded checkpoint's folder, its .safetensors file, or owner/name of a model on the hub.";
const baseForms = "A base is a folder: `flowturbo pull owner/name` downloads a model and prints its folder.";

/**
 * Opens a checkpoint: a folder (a Hugging Face cache's snapshots/<commit> is one, too), or one file.
 *
 * @throws CheckpointError that names the file or part and the remedy. `signal.reason` after an abort.
 */
export async function openCheckpoint(path: string, options: OpenCheckpointOptions = {}): Promise<Checkpoint> {
  const { variant, textEncoder3 = true, signal } = options;
  const root = resolve(path);
  signal?.throwIfAborted();
  if (await isFile(root)) return openFile(root, options);
  if (options.base !== undefined)
    throw new CheckpointError(
      root,
      `${root} is not one file, and only such a model has a base: a folder in the diffusers layout has all of its parts. Leave base away.`,
    );
  await explainOtherLayouts(root);
  const index = await indexOf(root);
  const places = readModelIndex(index, await readJsonObject(index), textEncoder3);
  const warnings: string[] = [];
  const lacking = await whatIsMissing(root, places.get(partRows.textEncoder3.name));
  if (lacking) {
    warnings.push(
      `${lacking}, though ${basename(index)} names it: pictures are drawn without T5, whose part of the text is zeros. ` +
        "Download the checkpoint's remaining files, or leave T5 out with textEncoder3: false (--no-t5).",
    );
    for (const part of t5Parts) places.delete(part);
  }
  signal?.throwIfAborted();
  const openPart = async ([key, row]: [string, PartRow<unknown>]) => {
    const place = row.classes ? places.get(row.name) : { folder: row.name };
    if (!place) return [key, null] as const;
    const partFolder = join(root, place.folder);
    const found = await isFolder(partFolder);
    if (!found && !row.classes) return [key, null] as const;
    if (!found)
      throw new CheckpointError(
        partFolder,
        `The folder ${partFolder} is missing, though ${basename(index)} names this part${place.origin ? ` (of ${place.origin})` : ""}. ` +
          "Download the checkpoint's remaining files.",
      );
    signal?.throwIfAborted();
    const variantOfPart = variant ?? place.variant;
    return [key, await row.open(partFolder, { ...options, variant: variantOfPart })] as const;
  };
  const openOrAdvise = async (row: [string, PartRow<unknown>]) =>
    openPart(row).catch((error) => {
      if (!(error instanceof CheckpointError) || !t5Parts.includes(row[1].name)) throw error;
      throw new CheckpointError(error.path, `${error.message} ${withoutT5}`, { cause: error });
    });
  const parts = await Promise.all(Object.entries(partRows).map(openOrAdvise));
  signal?.throwIfAborted();
  // The rows are typed by the key that they open.
  const openedParts = Object.fromEntries(parts) as unknown as Pick<Checkpoint, PartKey>;
  const schedulesFile = join(root, "schedules.json");
  const previewVae = await openPreviewVae(options);
  const opened: Checkpoint = {
    ...{ folder: root, schedulesFile, ...openedParts, previewVae, schedules: noSchedules, warnings },
  };
  checkVariant(opened, variant);
  checkThatPartsFit(opened, {
    configOf: (part) => join(root, part, "config.json"),
    remedy: "These parts are not of one checkpoint: download it again.",
  });
  checkPreviewVae(opened);
  warnings.push(...warningsOf(opened));
  const schedules = await readSchedules(schedulesFile, identityOf(opened));
  return schedules ? { ...opened, schedules } : opened;
}

/** What its parts have to say. */
function warningsOf(checkpoint: Checkpoint): string[] {
  const { className, notes } = checkpoint.scheduler;
  return [
    ...weightsOf(checkpoint).flatMap(({ warnings }) => warnings),
    ...(checkpoint.previewVae?.weights.warnings ?? []),
    ...notes.map((note) => `The model's scheduler, ${className}, ${note}.`),
  ];
}

/** The file that names a folder's parts: as `StableDiffusion3Pipeline.from_pretrained`, and else as `ModularPipeline` does. */
async function indexOf(root: string): Promise<string> {
  const [usual, modular] = indexFiles.map((name) => join(root, name)) as [string, string];
  return !(await exists(usual)) && (await exists(modular)) ? modular : usual;
}

/** What is missing of a network that the index names, in words; null for one that is there, and for one that is not named. */
async function whatIsMissing(root: string, place: Place | undefined): Promise<string | null> {
  if (!place) return null;
  const folder = join(root, place.folder);
  if (!(await isFolder(folder))) return `The folder ${folder} is missing`;
  const names = await readdir(folder).catch((): string[] => []);
  const isWeights = (name: string) => /\.(safetensors|bin|pth?|ckpt|gguf|msgpack|h5)$/.test(name);
  return names.some(isWeights) ? null : `The folder ${folder} holds no weights`;
}

/** Opens a checkpoint in one file, with what it does not hold or say from the base or of the public models. */
async function openFile(file: string, options: OpenCheckpointOptions): Promise<Checkpoint> {
  const { signal, variant, textEncoder3: hasT5 = true } = options;
  const base = options.base === undefined ? null : resolve(options.base);
  if (variant !== undefined && base === null)
    throw new CheckpointError(file, `${file} is one file, which has no variants: leave the option away.`);
  const { parts: found, warnings } = await readSingleFile(file, signal);
  if (base !== null) await explainOtherLayouts(base, baseForms);
  const index = base === null ? null : await indexOf(base);
  const ofBase = index === null ? null : readModelIndex(index, await readJsonObject(index), hasT5);
  signal?.throwIfAborted();

  /** The folder of a part in the base, or null. */
  const baseFolder = ({ name }: PartRow<unknown>) => {
    const place = ofBase?.get(name);
    return place ? join(base!, place.folder) : null;
  };
  const fromFile = async <Name extends FilePart>(key: Name) => {
    const part: PartInFile<Name> | null = found[key];
    const row = partRows[key] as NetworkRow<FileConfigs[Name]>;
    const folder = baseFolder(row);
    if (part) await checkQuantisation(part.weights, undefined, { signal });
    if (part && folder === null) return { weights: part.weights, config: part.config(null) };
    if (folder === null) return null;
    if (!part) return row.open(folder, options);
    const config = join(folder, "config.json");
    return { weights: part.weights, config: part.config({ file: config, config: await row.readConfig(config) }) };
  };
  const [transformer, vae, textEncoder, textEncoder2, textEncoder3] = await Promise.all([
    fromFile("transformer"),
    fromFile("vae"),
    fromFile("textEncoder"),
    fromFile("textEncoder2"),
    hasT5 ? fromFile("textEncoder3") : null,
  ]);
  const missing = [vae ? [] : "a VAE", textEncoder || textEncoder2 ? [] : "text encoders"].flat();
  if (!transformer || !vae || missing.length > 0)
    throw new CheckpointError(
      file,
      `${file} holds a transformer without ${missing.join(" and ")}, and no picture can be made without them. Pass a diffusers folder that has ` +
        `them as base (--base <folder>)${base === null ? "" : `; ${base} has none`}. Or download the file that includes them, such as sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors.`,
    );
  const scheduler = baseFolder(partRows.scheduler);
  const tokenizerOf = async (key: keyof typeof packedTokenizers, encoder: object | null) => {
    if (!encoder) return null;
    const folder = baseFolder(partRows[key]);
    return folder === null ? openPackedTokenizer(packedTokenizers[key]) : partRows[key].open(folder, options);
  };
  const opened: Checkpoint = {
    ...{ folder: file, schedulesFile: null, schedules: noSchedules, warnings: [] },
    ...{ transformer, vae, textEncoder, textEncoder2, textEncoder3 },
    // A refiner was trained for the velocities of one transformer.
    refiner: null,
    previewVae: await openPreviewVae(options),
    scheduler: scheduler === null ? usualScheduler : await partRows.scheduler.open(scheduler, options),
    tokenizer: await tokenizerOf("tokenizer", textEncoder),
    tokenizer2: await tokenizerOf("tokenizer2", textEncoder2),
    tokenizer3: await tokenizerOf("tokenizer3", textEncoder3),
  };
  signal?.throwIfAborted();
  checkThatPartsFit(opened, {
    configOf: (part) => {
      const key = fileParts.find((each) => partRows[each].name === part);
      return key && found[key] ? file : join(base ?? file, part);
    },
    remedy:
      base === null
        ? "Pass the folder of the model that it was made from as base (--base <folder>)."
        : `The file and its base, ${base}, are not of one model.`,
  });
  checkPreviewVae(opened);
  return { ...opened, warnings: [...warnings, ...warningsOf(opened)] };
}

/** @throws CheckpointError for a folder without an autoencoder's config.json and weights */
async function openPreviewVae(options: OpenCheckpointOptions): Promise<Part<VaeConfig> | null> {
  if (options.previewVae === undefined) return null;
  const folder = resolve(options.previewVae);
  if (!(await isFolder(folder)))
    throw new CheckpointError(
      folder,
      `The folder ${folder} for previewVae does not exist. Pass a folder with config.json and diffusion_pytorch_model.safetensors, such as a downloaded taesd3.`,
    );
  return partRows.vae.open(folder, options);
}

/** @throws CheckpointError for a preview autoencoder of other latents */
function checkPreviewVae({ vae, previewVae }: Checkpoint): void {
  if (!previewVae) return;
  for (const [key, name] of [
    ["latentChannels", "latent_channels"],
    ["factor", "pixels for each latent"],
    ["inChannels", "in_channels"],
    ["outChannels", "out_channels"],
  ] as const) {
    const [own, other] = [vae.config[key], previewVae.config[key]];
    if (own !== other)
      throw new CheckpointError(
        previewVae.weights.origin,
        `The autoencoder ${previewVae.weights.origin} for previewVae does not fit: its ${name} is ${other}, but the model's is ${own}. It needs to be one for the same latents; for Stable Diffusion 3 that is taesd3.`,
      );
  }
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

/** @throws CheckpointError if a model_index.json is of a model that cannot be read: for what is about to be downloaded */
export async function checkModelIndex(file: string): Promise<void> {
  readModelIndex(file, await readJsonObject(file), true);
}

/** Where the index says that a part is. */
interface Place {
  /** In the checkpoint's folder. */
  readonly folder: string;
  /** The variant that a modular index names for this part. */
  readonly variant?: string | undefined;
  /** The repository that a modular index names for this part. */
  readonly origin?: string | undefined;
}

/** The parts that are not null, by their names. @param hasT5 whether T5 is wanted */
function readModelIndex(file: string, json: JsonObject, hasT5: boolean): Map<string, Place> {
  const refuse = (message: string): never => {
    throw new CheckpointError(file, message);
  };
  const isModular = basename(file) === indexFiles[1];
  const pipeline = json._class_name;
  if (typeof pipeline !== "string" || !pipelineClass.test(pipeline))
    refuse(
      `${file}: _class_name is ${JSON.stringify(pipeline) ?? "absent"}; known are StableDiffusion3Pipeline and others ` +
        "whose names begin and end like it. Only Stable Diffusion 3 and 3.5 checkpoints can be read.",
    );
  const places = new Map<string, Place>();
  for (const { name: part, classes, required } of Object.values<PartRow<unknown>>(partRows)) {
    if (!classes || (!hasT5 && t5Parts.includes(part))) continue;
    // A modular pipeline does not list what it was saved without.
    const entry = json[part] ?? (json[part] === null || isModular ? null : undefined);
    if (entry === undefined)
      refuse(`${file} lacks the part "${part}". A part that a checkpoint does without is [null, null].`);
    const name = classIn(entry);
    if (name === null && required)
      refuse(`${file}: the part "${part}" is null, but no picture can be made without it.`);
    if (name === null) continue;
    if (typeof name !== "string" || !classes.includes(name))
      refuse(
        `${file}: the part "${part}" is of the unknown class ${JSON.stringify(name)}; known for it are ${classes.join(", ")}.`,
      );
    places.set(part, placeOf(file, part, entry));
  }
  // diffusers keeps the tokenizer of a T5 that is left out.
  if (!places.has(partRows.textEncoder3.name)) places.delete(partRows.tokenizer3.name);
  for (const keys of textParts) {
    const pair = keys.map((key) => partRows[key].name);
    const has = pair.find((part) => places.has(part));
    const lacks = pair.find((part) => !places.has(part));
    if (has && lacks)
      refuse(
        `${file}: "${lacks}" is null but "${has}" is not; a text encoder needs its tokenizer. Make both null or neither.`,
      );
  }
  return places;
}

/** The class of an entry: [library, class], [library, class, loading] of a modular pipeline, or the class alone. */
function classIn(entry: unknown): unknown {
  if (!Array.isArray(entry)) return entry;
  const [, name = null, loading] = entry as readonly unknown[];
  const hint = isRecord(loading) && Array.isArray(loading.type_hint) ? loading.type_hint[1] : undefined;
  return hint ?? name;
}

/** Where a part's entry says that it is: a folder of its own name, unless it is one of a modular pipeline. */
function placeOf(file: string, part: string, entry: unknown): Place {
  const loading: unknown = Array.isArray(entry) ? entry[2] : undefined;
  if (!isRecord(loading)) return { folder: part };
  const text = (key: string) => (typeof loading[key] === "string" && loading[key] !== "" ? loading[key] : undefined);
  const folder = text("subfolder") ?? ".";
  if (/^[/\\]|[:\0]/.test(folder) || folder.split(/[/\\]/).includes(".."))
    throw new CheckpointError(
      file,
      `${file}: the part "${part}" has the subfolder "${folder}", which leaves the folder.`,
    );
  return { folder, variant: text("variant"), origin: text("pretrained_model_name_or_path") ?? text("repo") };
}

/** Folders and files that people have instead of a diffusers folder, each with what to do about it. */
async function explainOtherLayouts(root: string, forms = modelForms): Promise<void> {
  const names = await readdir(root).catch((cause: NodeJS.ErrnoException) => {
    throw new CheckpointError(root, unreadable(root, forms, cause), { cause });
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
  if (indexFiles.some((name) => names.includes(name))) return;
  if (names.includes("snapshots")) {
    const commits = await readdir(join(root, "snapshots")).catch((): string[] => []);
    refuse(
      `${root} is a model's folder in a Hugging Face cache. Pass one of its snapshots: ` +
        `${commits.map((commit) => join(root, "snapshots", commit)).join(", ") || "there is none yet, download the model"}.`,
    );
  }
  const single = names.filter((name) => name.endsWith(".safetensors"));
  if (single.length > 0)
    await refuseFolderOf(
      root,
      single.map((name) => join(root, name)),
    );
  refuse(`${root} is not a checkpoint: it has no model_index.json. ${layout}`);
}

function unreadable(root: string, forms: string, { code, message }: NodeJS.ErrnoException): string {
  if (code === "ENOENT") return `The folder or file ${root} does not exist. ${forms} ${layout}`;
  if (code !== "ENOTDIR") return `Cannot read the folder ${root}: ${message}`;
  return `${root} is not a folder. ${forms} ${layout}`;
}

function weightsOf(checkpoint: Checkpoint): readonly Weights[] {
  const parts = Object.keys(partRows).map((key) => checkpoint[key as PartKey]);
  return parts.flatMap((part) => (part && "weights" in part ? [part.weights] : []));
}

function checkVariant(checkpoint: Checkpoint, variant: string | undefined): void {
  const { folder } = checkpoint;
  const weights = weightsOf(checkpoint);
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

/** @param about where the configuration of a part is, and what is said where two do not fit */
function checkThatPartsFit(
  checkpoint: Checkpoint,
  { configOf, remedy }: { configOf: (part: string) => string; remedy: string },
): void {
  const { transformer, refiner, textEncoder, textEncoder2, textEncoder3, vae } = checkpoint;
  const predictor = transformer.config;
  const { inChannels, outChannels, latentChannels } = vae.config;
  const demand = (fits: boolean, part: string, what: string): void => {
    const file = configOf(part);
    if (!fits) throw new CheckpointError(file, `${file}: ${what}. ${remedy}`);
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
