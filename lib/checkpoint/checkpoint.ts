/**
 * A Stable Diffusion 3 or 3.5 checkpoint folder in the diffusers layout, opened: every config read and checked, every
 * weight located, none read. Whatever would only crash later (a part of another model, widths that do not fit
 * together) is said here, with the part and the remedy, since here a person can still act on it.
 */

import { createHash } from "node:crypto";
import { readdir, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { CheckpointError } from "../errors.js";
import {
  type ClipConfig,
  knownClasses,
  readClipConfig,
  readJsonObject,
  readSchedulerConfig,
  readT5Config,
  readTransformerConfig,
  readVaeConfig,
  type SchedulerConfig,
  type T5Config,
  type TransformerConfig,
  type VaeConfig,
} from "./configs.js";
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
  /** Schedules from the richest to the poorest, from schedules.json: those that a benchmark has ranked for this model. */
  readonly ladder: readonly string[] | null;
  /**
   * Changes whenever a config or a weight file does (by path, size and time of change; contents are not read): a key
   * for whatever is derived from this checkpoint on this machine.
   */
  readonly identity: string;
}

export interface OpenCheckpointOptions {
  /** Precision twin to read, for example "fp16". Parts without it are read without; some part must have it. */
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

/** Parts of model_index.json that are read; others (feature_extractor, image_encoder, ...) are ignored. */
const partClasses = {
  transformer: knownClasses.transformer,
  vae: knownClasses.vae,
  scheduler: knownClasses.scheduler,
  text_encoder: knownClasses.clip,
  text_encoder_2: knownClasses.clip,
  text_encoder_3: knownClasses.t5,
  tokenizer: clipTokenizers,
  tokenizer_2: clipTokenizers,
  tokenizer_3: t5Tokenizers,
} as const satisfies Record<string, readonly string[]>;

type PartName = keyof typeof partClasses;

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

  const network = async <Config>(
    part: string,
    basename: string,
    readConfig: (file: string) => Promise<Config>,
  ): Promise<Part<Config>> => {
    const partFolder = join(root, part);
    await demandFolder(partFolder);
    signal?.throwIfAborted();
    const [config, weights] = await Promise.all([
      readConfig(join(partFolder, "config.json")),
      openWeights(partFolder, basename, { variant, signal }),
    ]);
    return { config, weights };
  };
  const tokenizerOf = async (part: string, open: (folder: string) => Promise<Tokenizer>) => {
    await demandFolder(join(root, part));
    signal?.throwIfAborted();
    return open(join(root, part));
  };
  const optional = <T>(part: PartName, open: () => Promise<T>): Promise<T | null> =>
    present.has(part) ? open() : Promise.resolve(null);

  const [
    transformer,
    refiner,
    textEncoder,
    textEncoder2,
    textEncoder3,
    tokenizer,
    tokenizer2,
    tokenizer3,
    vae,
    scheduler,
    ladder,
  ] = await Promise.all([
    network("transformer", "diffusion_pytorch_model", readTransformerConfig),
    isFolder(join(root, "refiner")).then((found) =>
      found ? network("refiner", "diffusion_pytorch_model", readTransformerConfig) : null,
    ),
    optional("text_encoder", () => network("text_encoder", "model", readClipConfig)),
    optional("text_encoder_2", () => network("text_encoder_2", "model", readClipConfig)),
    optional("text_encoder_3", () => network("text_encoder_3", "model", readT5Config)),
    optional("tokenizer", () => tokenizerOf("tokenizer", openClipTokenizer)),
    optional("tokenizer_2", () => tokenizerOf("tokenizer_2", openClipTokenizer)),
    optional("tokenizer_3", () => tokenizerOf("tokenizer_3", openT5Tokenizer)),
    network("vae", "diffusion_pytorch_model", readVaeConfig),
    demandFolder(join(root, "scheduler")).then(() =>
      readSchedulerConfig(join(root, "scheduler", "scheduler_config.json")),
    ),
    readLadder(join(root, "schedules.json")),
  ]);
  signal?.throwIfAborted();

  const parts: Record<string, Part<object> | null> = {
    transformer,
    refiner,
    text_encoder: textEncoder,
    text_encoder_2: textEncoder2,
    text_encoder_3: textEncoder3,
    vae,
  };
  checkVariant(root, variant, Object.values(parts));
  const checkpoint = {
    folder: root,
    transformer,
    refiner,
    textEncoder,
    textEncoder2,
    textEncoder3,
    tokenizer,
    tokenizer2,
    tokenizer3,
    vae,
    scheduler,
    ladder,
    identity: identityOf(parts, scheduler),
  };
  checkThatPartsFit(checkpoint);
  return checkpoint;
}

/** Whether these are schedules is known where schedules are. @returns null without such a file */
async function readLadder(file: string): Promise<readonly string[] | null> {
  let json: Record<string, unknown>;
  try {
    json = await readJsonObject(file);
  } catch (error) {
    if (((error as Error).cause as NodeJS.ErrnoException | undefined)?.code === "ENOENT") return null;
    throw error;
  }
  const { ladder } = json;
  if (Array.isArray(ladder) && ladder.length > 0 && ladder.every((blocks) => typeof blocks === "string")) return ladder;
  throw new CheckpointError(
    file,
    `${file}: expected "ladder" to be a list of schedules such as "H1P7R2", the richest first, but found ${JSON.stringify(ladder) ?? "nothing"}. Correct it, or remove the file: the usual schedules are then taken.`,
  );
}

/** The parts that are not null. */
function readModelIndex(file: string, json: Record<string, unknown>): Set<PartName> {
  const pipeline = json._class_name;
  if (!(pipelineClasses as readonly unknown[]).includes(pipeline))
    throw new CheckpointError(
      file,
      `${file}: _class_name is ${JSON.stringify(pipeline) ?? "absent"}; known are ${pipelineClasses.join(", ")}. ` +
        "Only Stable Diffusion 3 and 3.5 checkpoints can be read.",
    );
  const present = new Set<PartName>();
  for (const [part, classes] of Object.entries(partClasses) as [PartName, readonly string[]][]) {
    const entry = json[part];
    if (entry === undefined)
      throw new CheckpointError(
        file,
        `${file} lacks the part "${part}". A part that a checkpoint does without is [null, null].`,
      );
    const name = Array.isArray(entry) ? (entry[1] as unknown) : entry;
    if (name === null) continue;
    if (typeof name !== "string" || !classes.includes(name))
      throw new CheckpointError(
        file,
        `${file}: the part "${part}" is of the unknown class ${JSON.stringify(name)}; known for it are ${classes.join(", ")}.`,
      );
    present.add(part);
  }
  for (const part of ["transformer", "vae", "scheduler"] as const)
    if (!present.has(part))
      throw new CheckpointError(file, `${file}: the part "${part}" is null, but no picture can be made without it.`);
  for (const suffix of ["", "_2", "_3"] as const) {
    const encoder = `text_encoder${suffix}` as const;
    const tokenizer = `tokenizer${suffix}` as const;
    if (present.has(encoder) !== present.has(tokenizer)) {
      const [has, lacks] = present.has(encoder) ? [encoder, tokenizer] : [tokenizer, encoder];
      throw new CheckpointError(
        file,
        `${file}: "${lacks}" is null but "${has}" is not; a text encoder needs its tokenizer. Make both null or neither.`,
      );
    }
  }
  return present;
}

/** Folders and files that people have instead of a diffusers folder, each with what to do about it. */
async function explainOtherLayouts(root: string): Promise<void> {
  let names: string[];
  try {
    names = await readdir(root);
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === "ENOENT")
      throw new CheckpointError(
        root,
        `The folder ${root} does not exist. Pass a downloaded checkpoint's folder. ${layout}`,
        { cause },
      );
    if (code === "ENOTDIR" && root.endsWith(".safetensors"))
      throw new CheckpointError(root, singleFile(root), { cause });
    if (code === "ENOTDIR") throw new CheckpointError(root, `${root} is not a folder. ${layout}`, { cause });
    throw new CheckpointError(root, `Cannot read the folder ${root}: ${(cause as Error).message}`, { cause });
  }
  const transformer = await readdir(join(root, "transformer")).catch((): string[] => []);
  if (transformer.some((name) => name.endsWith(".onnx")) && !transformer.some((name) => name.includes(".safetensors")))
    throw new CheckpointError(
      root,
      `${root} is an ONNX folder (as optimum exports them): its networks are already exported, which cannot be read. Pass the ` +
        `diffusers folder that it was exported from. ${layout}`,
    );
  if (names.includes("model_index.json")) return;
  if (names.includes("snapshots")) {
    const commits = await readdir(join(root, "snapshots")).catch((): string[] => []);
    throw new CheckpointError(
      root,
      `${root} is a model's folder in a Hugging Face cache. Pass one of its snapshots: ` +
        `${commits.map((commit) => join(root, "snapshots", commit)).join(", ") || "there is none yet, download the model"}.`,
    );
  }
  const single = names.find((name) => name.endsWith(".safetensors"));
  if (single !== undefined) throw new CheckpointError(root, singleFile(join(root, single)));
  throw new CheckpointError(root, `${root} is not a checkpoint: it has no model_index.json. ${layout}`);
}

function singleFile(file: string): string {
  return (
    `${file} is a single-file checkpoint, which cannot be read. Download the model's diffusers folder instead, or convert the ` +
    `file in Python: StableDiffusion3Pipeline.from_single_file(file).save_pretrained(folder). ${layout}`
  );
}

function checkVariant(root: string, variant: string | undefined, parts: readonly (Part<object> | null)[]): void {
  const weights = parts.flatMap((part) => (part ? [part.weights] : []));
  if (variant === undefined || weights.some((part) => part.variant !== null)) return;
  const found = [...new Set(weights.flatMap((part) => part.variantsFound))].sort();
  throw new CheckpointError(
    root,
    `No part of ${root} has the variant "${variant}". ` +
      (found.length > 0
        ? `Variants found: ${found.map((name) => `"${name}"`).join(", ")}.`
        : "It has no variants: leave the option away."),
  );
}

function checkThatPartsFit(checkpoint: Omit<Checkpoint, "identity">): void {
  const { folder, transformer, refiner, textEncoder, textEncoder2, textEncoder3, vae } = checkpoint;
  const predictor = transformer.config;
  const latentChannels = vae.config.latentChannels;
  const configOf = (part: string) => join(folder, part, "config.json");
  const demand = (fits: boolean, part: string, what: string): void => {
    if (!fits)
      throw new CheckpointError(
        configOf(part),
        `${configOf(part)}: ${what}. These parts are not of one checkpoint: download it again.`,
      );
  };

  demand(
    vae.config.inChannels === 3 && vae.config.outChannels === 3,
    "vae",
    "in_channels and out_channels must be 3 (RGB)",
  );
  demand(
    predictor.inChannels === latentChannels,
    "transformer",
    `in_channels is ${predictor.inChannels}, but the VAE's latent_channels is ${latentChannels}`,
  );
  demand(
    predictor.outChannels === latentChannels,
    "transformer",
    `out_channels is ${predictor.outChannels}, but the VAE's latent_channels is ${latentChannels}`,
  );

  const clips = [textEncoder, textEncoder2].flatMap((part) => (part ? [part.config] : []));
  demand(
    clips.length > 0,
    "transformer",
    "text_encoder and text_encoder_2 are both null, so the pooled text is missing",
  );
  const hidden = clips.reduce((sum, clip) => sum + clip.hiddenSize, 0);
  demand(
    hidden <= predictor.jointAttentionDim,
    "transformer",
    `joint_attention_dim is ${predictor.jointAttentionDim}, less than the CLIP encoders' hidden_size together (${hidden})`,
  );
  const pooled = clips.reduce((sum, clip) => sum + clip.projectionDim, 0);
  demand(
    pooled === predictor.pooledProjectionDim,
    "transformer",
    `pooled_projection_dim is ${predictor.pooledProjectionDim}, but the CLIP encoders' projection_dim together is ${pooled}`,
  );
  if (textEncoder3)
    demand(
      textEncoder3.config.dModel === predictor.jointAttentionDim,
      "text_encoder_3",
      `d_model is ${textEncoder3.config.dModel}, but the transformer's joint_attention_dim is ${predictor.jointAttentionDim}`,
    );
  checkTokenizers(checkpoint, demand);

  if (!refiner) return;
  const { config } = refiner;
  demand(
    config.inChannels === 2 * latentChannels,
    "refiner",
    `in_channels is ${config.inChannels}, but a refiner takes latents and velocity, 2 x ${latentChannels}`,
  );
  demand(
    config.outChannels === latentChannels,
    "refiner",
    `out_channels is ${config.outChannels}, but the VAE's latent_channels is ${latentChannels}`,
  );
  for (const [key, name] of [
    ["patchSize", "patch_size"],
    ["jointAttentionDim", "joint_attention_dim"],
    ["pooledProjectionDim", "pooled_projection_dim"],
  ] as const)
    demand(
      config[key] === predictor[key],
      "refiner",
      `${name} is ${config[key]}, but the transformer's is ${predictor[key]}`,
    );
}

/** Ids and positions beyond the encoders' tables would otherwise stop a run in the middle. */
function checkTokenizers(
  checkpoint: Omit<Checkpoint, "identity">,
  demand: (fits: boolean, part: string, what: string) => void,
): void {
  for (const [part, tokenizer, encoder] of [
    ["text_encoder", checkpoint.tokenizer, checkpoint.textEncoder],
    ["text_encoder_2", checkpoint.tokenizer2, checkpoint.textEncoder2],
    ["text_encoder_3", checkpoint.tokenizer3, checkpoint.textEncoder3],
  ] as const) {
    if (!tokenizer || !encoder) continue;
    const { config } = encoder;
    demand(
      tokenizer.vocabSize <= config.vocabSize,
      part,
      `vocab_size is ${config.vocabSize}, but its tokenizer has ids up to ${tokenizer.vocabSize - 1}`,
    );
    if ("maxPositionEmbeddings" in config)
      demand(
        tokenizer.maxLength <= config.maxPositionEmbeddings,
        part,
        `max_position_embeddings is ${config.maxPositionEmbeddings}, but its tokenizer's model_max_length is ${tokenizer.maxLength}`,
      );
  }
}

function identityOf(parts: Readonly<Record<string, Part<object> | null>>, scheduler: SchedulerConfig): string {
  const described = Object.entries(parts).map(([name, part]) => [name, part && [part.config, part.weights.files]]);
  return createHash("sha256")
    .update(JSON.stringify([described, scheduler]))
    .digest("hex");
}

async function demandFolder(folder: string): Promise<void> {
  if (!(await isFolder(folder)))
    throw new CheckpointError(
      folder,
      `The folder ${folder} is missing, though model_index.json names this part. Download the checkpoint's remaining files.`,
    );
}

async function isFolder(path: string): Promise<boolean> {
  return stat(path).then(
    (found) => found.isDirectory(),
    () => false,
  );
}
