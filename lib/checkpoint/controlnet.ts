/**
 * A ControlNet of Stable Diffusion 3 or 3.5 on disk: a folder with the config.json and the weights of diffusers'
 * SD3ControlNetModel, as its authors publish it, or a pipeline's folder that has one in controlnet/. What is of another
 * model, or does not fit the checkpoint that it is to steer, is refused with what it is and the remedy.
 */

import { createHash } from "node:crypto";
import { readdir, realpath } from "node:fs/promises";
import { join, resolve } from "node:path";
import { type FileVersion, versionOf } from "../common/files.js";
import { indexFiles } from "../common/model-index.js";
import { bytesPerElement } from "../common/tensor.js";
import { variantsIn, weightSources } from "../common/weight-names.js";
import { indexOfNotFinite } from "../common/widen.js";
import { CheckpointError } from "../errors.js";
import type { Checkpoint, Part } from "./checkpoint.js";
import { type ControlNetConfig, knownClasses, readControlNetConfig } from "./configs.js";
import { exists, isFile, type JsonObject, readJsonObject } from "./files.js";
import { checkQuantisation } from "./quantised.js";
import { readBytes } from "./safetensors.js";
import { openWeights } from "./weights.js";

/** A ControlNet, opened: its configuration, and where its weights lie. */
export interface ControlNet extends Part<ControlNetConfig> {
  /** 8 hex digits that tell it, and each version of its files, from others on this machine: of a graph's name. */
  readonly id: string;
  /** Absolute path of the folder with its config.json. */
  readonly folder: string;
  /** Its config.json and its weights' files, without symbolic links, as they were when they were opened. */
  readonly files: readonly FileVersion[];
}

export interface OpenControlNetOptions {
  /** Variant of the weight files, for example "fp16", where it has that one and others. */
  readonly variant?: string | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Classes of diffusers that people take for a ControlNet of SD3, and what they are of. */
const otherClasses: Readonly<Record<string, string>> = {
  ControlNetModel: "Stable Diffusion 1, 2 or XL",
  ControlNetUnionModel: "Stable Diffusion XL",
  ControlNetXSAdapter: "Stable Diffusion 2 or XL (ControlNet-XS)",
  SparseControlNetModel: "AnimateDiff",
  T2IAdapter: "Stable Diffusion 1 or XL (a T2I-Adapter)",
  FluxControlNetModel: "FLUX",
  FluxMultiControlNetModel: "FLUX",
  HunyuanDiT2DControlNetModel: "HunyuanDiT",
  QwenImageControlNetModel: "Qwen-Image",
  SanaControlNetModel: "Sana",
  CosmosControlNetModel: "Cosmos",
  ZImageControlNetModel: "Z-Image",
};

const published =
  "Published ones are InstantX/SD3-Controlnet-Canny and others for Stable Diffusion 3, and those of Stability for 3.5 large.";
const expected = `Pass a folder with the config.json and the weights of diffusers' SD3ControlNetModel. ${published}`;

/**
 * Opens a ControlNet. Of a folder without a config.json of its own, such as a whole pipeline's, `controlnet/` is taken.
 * @throws CheckpointError that names the file and the remedy; `signal.reason` after an abort
 */
export async function openControlNet(folder: string, options: OpenControlNetOptions = {}): Promise<ControlNet> {
  const { signal } = options;
  signal?.throwIfAborted();
  const root = resolve(folder);
  if (await isFile(root)) throw new CheckpointError(root, `${root} is a file. ${whatAFileIs(root)}`);
  const own = await folderOf(root);
  const file = join(own, "config.json");
  // Before it is read: what is written meanwhile makes another version.
  const version = await realpath(file).then(versionOf, () => null);
  const json = await readJsonObject(file);
  checkClass(file, json);
  const config = await readControlNetConfig(file, json);
  const weights = await openWeights(own, basename, { signal, variant: await variantIn(own, options.variant) });
  await checkQuantisation(weights, json.quantization_config, { signal });
  checkBlocks(file, config, weights.names);
  const files = [...(version ? [version] : []), ...weights.files];
  return { id: await idOf(own, files), folder: own, files, config, weights };
}

const basename = "diffusion_pytorch_model";

/**
 * Blocks that are missing are found where the network is built; those that the configuration does not know would never be asked for.
 * @throws CheckpointError for weights with more blocks than the configuration says
 */
function checkBlocks(file: string, { numLayers }: ControlNetConfig, names: readonly string[]): void {
  const blocks = names.reduce((most, name) => {
    const block = /^(?:transformer_blocks|controlnet_blocks)\.(\d+)\./.exec(name)?.[1];
    return block === undefined ? most : Math.max(most, Number(block) + 1);
  }, 0);
  if (blocks <= numLayers) return;
  throw new CheckpointError(
    file,
    `${file} says num_layers ${numLayers}, but the weights beside it have ${blocks} blocks, so that they are of another ControlNet. Pass a folder whose configuration and weights belong together.`,
  );
}

/** The variant to open: where a folder has one alone, that one, since a ControlNet need not have the variants of the model that it is for. */
async function variantIn(folder: string, wanted: string | undefined): Promise<string | undefined> {
  const present = await readdir(folder).catch((): string[] => []);
  const isPlain = weightSources(basename, null).some((name) => present.includes(name));
  const [only, ...others] = variantsIn(present, basename);
  return isPlain || others.length > 0 ? wanted : (only ?? wanted);
}

function whatAFileIs(file: string): string {
  return file.endsWith(".json")
    ? "Pass the folder that it lies in."
    : "A ControlNet in one file, as Stability and ComfyUI name its tensors, is not read: take the folder of the same ControlNet " +
        "in diffusers' layout, or convert the file with diffusers' scripts/convert_sd3_controlnet_to_diffusers.py. " +
        published;
}

/** The folder with the ControlNet's config.json. */
async function folderOf(root: string): Promise<string> {
  const names = await readdir(root).catch((cause: NodeJS.ErrnoException) => {
    const what = cause.code === "ENOENT" ? "does not exist" : `cannot be read: ${cause.message}`;
    throw new CheckpointError(root, `The folder ${root} of a ControlNet ${what}. ${expected}`, { cause });
  });
  if (names.includes("config.json")) return root;
  const inner = join(root, "controlnet");
  if (await exists(join(inner, "config.json"))) {
    const others = names.filter((name) => /^controlnet_\d+$/.test(name)).sort();
    if (others.length === 0) return inner;
    throw new CheckpointError(
      root,
      `${root} holds ${others.length + 1} ControlNets, controlnet, ${others.join(", ")}. Pass the folder of each that is wanted, such as ${inner}.`,
    );
  }
  if (names.includes("snapshots")) {
    const commits = await readdir(join(root, "snapshots")).catch((): string[] => []);
    throw new CheckpointError(
      root,
      `${root} is a model's folder in a Hugging Face cache. Pass one of its snapshots: ` +
        `${commits.map((commit) => join(root, "snapshots", commit)).join(", ") || "there is none yet, download the model"}.`,
    );
  }
  const index = indexFiles.find((name) => names.includes(name));
  const what = index ? `is a whole pipeline without a folder controlnet/` : "has no config.json";
  throw new CheckpointError(root, `${root} ${what}, so that it is no ControlNet. ${expected}`);
}

/**
 * For what is about to be downloaded.
 * @param file config.json
 * @throws CheckpointError if it is of no ControlNet that can be read
 */
export async function checkControlNetConfig(file: string): Promise<void> {
  const json = await readJsonObject(file);
  checkClass(file, json);
  await readControlNetConfig(file, json);
}

/** @throws CheckpointError for a class of another model */
function checkClass(file: string, { _class_name: name }: JsonObject): void {
  if (name === knownClasses.controlNet[0]) return;
  if (name === undefined)
    throw new CheckpointError(
      file,
      `${file} does not say of which class it is ("_class_name"), so that it is no ControlNet of diffusers. ${expected}`,
    );
  const of = Object.hasOwn(otherClasses, String(name)) ? ` a ControlNet of ${otherClasses[String(name)]}` : "";
  throw new CheckpointError(
    file,
    `${file} is of the class ${JSON.stringify(name)},${of || " which is no ControlNet of Stable Diffusion 3"}. ${expected}`,
  );
}

async function idOf(folder: string, files: ControlNet["files"]): Promise<string> {
  const versions = files.map(({ file, size, mtimeMs }) => [file, size, mtimeMs]);
  const digest = createHash("sha256").update(JSON.stringify([await realpath(folder), versions]));
  return digest.digest("hex").slice(0, 8);
}

/**
 * Whether a ControlNet can steer a checkpoint's transformer: what it adds to has to have the same tokens, and it reads the same text.
 * @throws CheckpointError that names both values
 */
export function checkControlNetFits(
  { folder, config }: Pick<ControlNet, "folder" | "config">,
  { transformer, vae }: Pick<Checkpoint, "transformer" | "vae">,
): void {
  const of = transformer.config;
  const width = (each: Pick<ControlNetConfig, "numAttentionHeads" | "attentionHeadDim">) =>
    each.numAttentionHeads * each.attentionHeadDim;
  const pairs: readonly (readonly [name: string, own: number, expected: number, what: string])[] = [
    ["num_attention_heads x attention_head_dim", width(config), width(of), "the model's transformer"],
    ["in_channels", config.inChannels, vae.config.latentChannels, "the model's latents"],
    ["patch_size", config.patchSize, of.patchSize, "the model's transformer"],
    ["pooled_projection_dim", config.pooledProjectionDim, of.pooledProjectionDim, "the model's text"],
    ...(config.jointAttentionDim === null
      ? []
      : [["joint_attention_dim", config.jointAttentionDim, of.jointAttentionDim, "the model's text"] as const]),
  ];
  for (const [name, own, wanted, what] of pairs)
    if (own !== wanted)
      throw new CheckpointError(
        folder,
        `The ControlNet ${folder} does not fit the model: its ${name} is ${own}, but that of ${what} is ${wanted}. ` +
          "It was trained for another model: SD3-medium, SD3.5-medium and SD3.5-large have ControlNets of their own.",
      );
}

/** Names of the network's tensors; others may be in a file, of any type, and are never asked for. */
const ofNetwork =
  /^(transformer_blocks|controlnet_blocks|pos_embed|pos_embed_input|time_text_embed|context_embedder)\./;
/** Bytes of weights that are read at a time: some milliseconds' work. */
const piece = 1 << 21;

/**
 * Reads all weights, once: a training that failed leaves NaN, of which a picture would fail in its
 * first step, without a word on where it came from.
 * @throws CheckpointError that names the tensor with a value that is not finite; `signal.reason` after an abort
 */
export async function checkControlNetValues(
  { folder, weights }: Pick<ControlNet, "folder" | "weights">,
  signal?: AbortSignal,
): Promise<void> {
  for (const name of weights.names) {
    const tensor = ofNetwork.test(name) && weights.find(name);
    if (!tensor) continue;
    const { file, dtype, offset, length } = tensor;
    for (let start = 0; start < length; start += piece) {
      signal?.throwIfAborted();
      const index = indexOfNotFinite(await readBytes(file, offset + start, Math.min(piece, length - start)), dtype);
      if (index < 0) continue;
      throw new CheckpointError(
        file,
        `The ControlNet ${folder} cannot be used: in ${file} the tensor "${name}" holds NaN or an infinity at index ` +
          `${start / bytesPerElement[dtype] + index}: its training failed, or the file is damaged. Pass another version of the ControlNet.`,
      );
    }
  }
}
