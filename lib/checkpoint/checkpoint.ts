/**
 * A Stable Diffusion 3 or 3.5 checkpoint, opened: a folder in the diffusers layout, or one file whose other parts may be
 * in such a folder, its base. Every config is read and checked, every weight located, none read. Whatever would only crash later (a part of another model, widths that do not fit
 * together) is refused here, with the part and the remedy, before any work.
 */

import { readdir } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { isElsewhere, remedyForParts } from "../common/model-index.js";
import { CheckpointError } from "../errors.js";
import {
  type ClipConfig,
  knownClasses,
  type ReadConfig,
  readClipConfig,
  readControlNetConfig,
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
import type { ControlNet } from "./controlnet.js";
import { exists, isFile, isFolder, readJsonObject } from "./files.js";
import { checkPreviewVae, checkThatPartsFit } from "./fit.js";
import { baseForms, explainOtherLayouts } from "./layouts.js";
import { type IndexedPart, indexOf, type Place, readModelIndex } from "./model-index.js";
import { checkQuantisation } from "./quantised.js";
import {
  type ModelIdentity,
  modelFingerprint,
  noSchedules,
  readSchedules,
  type StoredSchedules,
  sampledWeights,
} from "./schedules.js";
import { type FileConfigs, type FilePart, fileParts, type PartInFile, readSingleFile } from "./single-file/index.js";
import { readTaesd } from "./single-file/taesd.js";
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
  /** Another autoencoder of the same latents, or its decoder alone, from a place of its own: for previews. */
  readonly previewVae: Part<VaeConfig> | null;
  /** The same where it encodes, too: between stages. */
  readonly joiningVae: Part<VaeConfig> | null;
  /** ControlNets that were opened for it, by their ids. */
  readonly controlNets: ReadonlyMap<string, ControlNet>;
  readonly scheduler: SchedulerConfig;
  /** What schedules.json holds: schedules that were ranked for this model, and schedules that were calibrated for it. */
  readonly schedules: StoredSchedules;
  /** LoRAs that are in its weights, in the order in which they were named. */
  readonly loras: readonly MergedLora[];
  /** What is missing or there twice, and how the folder is read because of it. */
  readonly warnings: readonly string[];
}

/** A LoRA that was merged into weights. */
export interface MergedLora {
  readonly name: string;
  /** That it was read from. */
  readonly file: string;
  readonly scale: number;
}

interface OpenCheckpointOptions {
  /** Variant of the weight files to read, for example "fp16". Parts without it are read without; some part must have it. */
  readonly variant?: string | undefined;
  /** False leaves T5 out, whatever the folder has. Default: true. */
  readonly textEncoder3?: boolean | undefined;
  /** For a checkpoint in one file: the folder from which is taken what it does not hold or say. */
  readonly base?: string | undefined;
  /** Folder of `previewVae`, with config.json and weights, or the file of TAESD's decoder. */
  readonly previewVae?: string | undefined;
  /** Checked between reads. */
  readonly signal?: AbortSignal | undefined;
}

const clipTokenizers = ["CLIPTokenizer", "CLIPTokenizerFast"] as const;
const t5Tokenizers = ["T5Tokenizer", "T5TokenizerFast"] as const;

type PartKey = Exclude<
  keyof Checkpoint,
  "folder" | "schedulesFile" | "schedules" | "loras" | "warnings" | "previewVae" | "joiningVae" | "controlNets"
>;

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
  readonly readConfig: ReadConfig<Config>;
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

/** T5: the one text encoder that pictures can be drawn without while the folder has it. */
const t5Parts = [partRows.textEncoder3.name, partRows.tokenizer3.name];
/** What an index may name. */
const indexedParts = (hasT5: boolean): readonly IndexedPart[] =>
  Object.values<PartRow<unknown>>(partRows).flatMap(({ name, classes, required = false }) =>
    classes && (hasT5 || !t5Parts.includes(name)) ? { name, classes, required } : [],
  );
const withoutT5 = "To draw without T5, load the model with textEncoder3: false (--no-t5).";

function network<Config>(
  name: string,
  classes: readonly string[] | null,
  readConfig: ReadConfig<Config>,
  naming: Naming = namings.plain,
): NetworkRow<Config> {
  // The text encoders are models of transformers, the others of diffusers, and each calls its files in its own way.
  const basename = name.startsWith("text_encoder") ? "model" : "diffusion_pytorch_model";
  const open = async (folder: string, options: OpenCheckpointOptions) => {
    const file = join(folder, "config.json");
    const reading = readJsonObject(file).then(async (json) => [json, await readConfig(file, json)] as const);
    const opening = openWeights(folder, basename, { ...options, naming });
    const [[json, config], weights] = await Promise.all([reading, opening]);
    await checkQuantisation(weights, json.quantization_config, options);
    return { config, weights };
  };
  return { name, classes, open, readConfig };
}

/**
 * Opens a checkpoint: a folder (a Hugging Face cache's snapshots/<commit> is one, too), or one file.
 *
 * @throws CheckpointError that names the file or part and the remedy. `signal.reason` after an abort.
 */
export async function openCheckpoint(path: string, options: OpenCheckpointOptions = {}): Promise<Checkpoint> {
  const { variant, textEncoder3 = true, signal } = options;
  const root = resolve(path);
  signal?.throwIfAborted();
  if (await isFile(root)) {
    if (root.endsWith(".json"))
      throw new CheckpointError(root, `${root} is a file beside a model's weights. Pass the model's folder.`);
    return openFile(root, options);
  }
  if (options.base !== undefined && (await exists(root))) throw baseOfFolder(root);
  await explainOtherLayouts(root);
  const index = await indexOf(root);
  const places = readModelIndex(index, await readJsonObject(index), indexedParts(textEncoder3));
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
    const found = !isElsewhere(place) && (await isFolder(partFolder));
    if (!found && !row.classes) return [key, null] as const;
    if (!found) throw new CheckpointError(partFolder, missingPart(row.name, partFolder, index, place));
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
  const previews = await openPreviewVae(options);
  const opened: Checkpoint = {
    ...{ folder: root, schedulesFile, ...openedParts, ...previews, schedules: noSchedules, loras: [], warnings },
    controlNets: new Map(),
  };
  checkVariant(opened, root, variant);
  checkThatPartsFit(opened, {
    configOf: (part) => join(root, part, "config.json"),
    remedy: "These parts are not of one checkpoint: download it again.",
  });
  checkPreviewVae(opened);
  warnings.push(...warningsOf(opened));
  const schedules = await readSchedules(schedulesFile, identityOf(opened));
  return schedules ? { ...opened, schedules } : opened;
}

/** What is said of a model that is a folder, `model`, and has a base. */
export function baseOfFolder(model: string): CheckpointError {
  return new CheckpointError(
    model,
    `${model} is not one file, and only such a model has a base: a folder in the diffusers layout has all of its parts. Leave base away.`,
  );
}

/** What is said of a part whose folder is missing. */
function missingPart(part: string, folder: string, index: string, place: Place): string {
  const { origin } = place;
  const what = isElsewhere(place) ? `The part ${part} is missing` : `The folder ${folder} is missing`;
  const remedy = origin === undefined ? "" : ` ${remedyForParts(origin)}.`;
  return (
    `${what}, though ${basename(index)} names this part${origin === undefined ? "" : ` (of ${origin})`}. ` +
    `Download the checkpoint's remaining files.${remedy}`
  );
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

/** What is missing of a network that the index names, in words; null for one that is there, and for one that is not named. */
async function whatIsMissing(root: string, place: Place | undefined): Promise<string | null> {
  if (!place) return null;
  if (isElsewhere(place)) return `The part T5 is not in ${root}`;
  const folder = join(root, place.folder);
  if (!(await isFolder(folder))) return `The folder ${folder} is missing`;
  // What cannot be looked at is no folder without weights: the part is opened, which says why.
  const names = await readdir(folder).catch(() => null);
  const isWeights = (name: string) => /\.(safetensors|bin|pth?|ckpt|gguf|msgpack|h5)$/.test(name);
  return !names || names.some(isWeights) ? null : `The folder ${folder} holds no weights`;
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
  const ofBase = index === null ? null : readModelIndex(index, await readJsonObject(index), indexedParts(hasT5));
  signal?.throwIfAborted();

  /** The folder of a part in the base, or null. */
  const baseFolder = ({ name }: PartRow<unknown>) => {
    const place = ofBase?.get(name);
    return place && !isElsewhere(place) ? join(base!, place.folder) : null;
  };
  const fromFile = async <Name extends FilePart>(key: Name) => {
    const part: PartInFile<Name> | null = found[key];
    const row = partRows[key] as NetworkRow<FileConfigs[Name]>;
    const folder = baseFolder(row);
    if (part) await checkQuantisation(part.weights, undefined, { signal });
    if (part && folder === null) return { weights: part.weights, config: part.config(null) };
    if (folder === null) return null;
    if (!part) return row.open(folder, { ...options, variant: variant ?? ofBase?.get(row.name)?.variant });
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
      [
        `${file} holds a transformer without ${missing.join(" and ")}, and no picture can be made without them.`,
        ...warnings,
        `Pass a diffusers folder that has them as base (--base <folder>)${base === null ? "" : `; ${base} has none`}.`,
        "Or download the file that includes them, such as sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors.",
      ].join(" "),
    );
  const scheduler = baseFolder(partRows.scheduler);
  const tokenizerOf = async (key: keyof typeof packedTokenizers, encoder: object | null) => {
    if (!encoder) return null;
    const folder = baseFolder(partRows[key]);
    return folder === null ? openPackedTokenizer(packedTokenizers[key]) : partRows[key].open(folder, options);
  };
  const opened: Checkpoint = {
    ...{ folder: file, schedulesFile: null, schedules: noSchedules, loras: [], warnings: [], controlNets: new Map() },
    ...{ transformer, vae, textEncoder, textEncoder2, textEncoder3 },
    // A refiner was trained for the velocities of one transformer.
    refiner: null,
    ...(await openPreviewVae(options)),
    scheduler: scheduler === null ? usualScheduler : await partRows.scheduler.open(scheduler, options),
    tokenizer: await tokenizerOf("tokenizer", textEncoder),
    tokenizer2: await tokenizerOf("tokenizer2", textEncoder2),
    tokenizer3: await tokenizerOf("tokenizer3", textEncoder3),
  };
  signal?.throwIfAborted();
  if (base !== null) checkVariant(opened, base, variant);
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

/**
 * Opens what `previewVae` names.
 * @throws CheckpointError for what is neither a folder with an autoencoder's config.json and weights nor the file of TAESD's decoder
 */
export async function openPreviewVae(
  options: OpenCheckpointOptions,
): Promise<Pick<Checkpoint, "previewVae" | "joiningVae">> {
  if (options.previewVae === undefined) return { previewVae: null, joiningVae: null };
  const place = resolve(options.previewVae);
  if (await isFile(place)) {
    const { canEncode, ...previewVae } = await readTaesd(place, options.signal);
    return { previewVae, joiningVae: canEncode ? previewVae : null };
  }
  if (!(await isFolder(place)))
    throw new CheckpointError(
      place,
      `The folder or file ${place} for previewVae does not exist. Pass a folder with config.json and diffusion_pytorch_model.safetensors, such as a ` +
        "downloaded taesd3, TAESD's taesd3_decoder.safetensors, or owner/name of such a model on the hub.",
    );
  const previewVae = await partRows.vae.open(place, options);
  return { previewVae, joiningVae: previewVae };
}

/** @throws CheckpointError for a folder that is no base */
export async function checkBase(folder: string): Promise<void> {
  await explainOtherLayouts(resolve(folder), baseForms);
}

/** What is said of a name on the hub with a file in it that is given as a base. */
export function baseOfFile(name: string): CheckpointError {
  return new CheckpointError(name, `${name} is one file. ${baseForms}`);
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

/**
 * For what is about to be downloaded.
 * @param file an index of parts, or the config.json of an autoencoder or a ControlNet
 * @throws CheckpointError if it is of something that cannot be read
 */
export async function checkModelIndex(file: string): Promise<void> {
  const json = await readJsonObject(file);
  if (basename(file) !== "config.json") readModelIndex(file, json, indexedParts(true));
  else if (json._class_name === knownClasses.controlNet[0]) await readControlNetConfig(file, json);
  else await readVaeConfig(file, json);
}

/** The parts that a checkpoint in one file, which has a base, holds: by the names that an index gives them. @throws CheckpointError for what is none */
export async function partsOfFile(file: string, signal?: AbortSignal): Promise<string[]> {
  if (await isFolder(file)) throw baseOfFolder(resolve(file));
  const { parts } = await readSingleFile(file, signal);
  return fileParts.filter((key) => parts[key]).map((key) => partRows[key].name);
}

function weightsOf(checkpoint: Checkpoint): readonly Weights[] {
  const parts = Object.keys(partRows).map((key) => checkpoint[key as PartKey]);
  return parts.flatMap((part) => (part && "weights" in part ? [part.weights] : []));
}

/** @param folder that the parts are of, as far as they have variants */
function checkVariant(checkpoint: Checkpoint, folder: string, variant: string | undefined): void {
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
