/**
 * Configurations of a checkpoint's parts as the shapes of its tensors say them. What no shape says is of the public SD3 and SD3.5 models
 * (`usual`), or of the folder that the caller names as the base.
 */

import { elementCount } from "../../common/tensor.js";
import { CheckpointError } from "../../errors.js";
import type { ClipConfig, T5Config, TransformerConfig, VaeConfig } from "../configs.js";
import type { HeaderEntry } from "../safetensors.js";
import type { FilePart, NamedTensors } from "./naming.js";

/** What is read of a configuration; together it is whole. */
export interface FoundConfig<Config> {
  /** What the shapes say. */
  readonly said: Partial<Config>;
  /** What the public models have for all that shapes may leave open. */
  readonly usual: Config;
  /** Why this cannot be a public model, where that is known. */
  readonly unusual?: string | null;
}

/** The configuration of each part that a file can hold. */
export interface FileConfigs {
  readonly transformer: TransformerConfig;
  readonly vae: VaeConfig;
  readonly textEncoder: ClipConfig;
  readonly textEncoder2: ClipConfig;
  readonly textEncoder3: T5Config;
}

/** Reads shapes of one part. */
interface Shapes {
  /** @throws CheckpointError if the tensor is absent or has another number of dimensions */
  of(name: string, rank: number): readonly number[];
  has(name: string): boolean;
  /** Whether a linear layer is left out since it is the identity. */
  isIdentity(layer: string): boolean;
  /** Numbers that stand behind a beginning, in order. */
  numbers(beginning: string): number[];
  some(pattern: RegExp): boolean;
  refuse(name: string, what: string): never;
}

const readers: { readonly [Name in FilePart]: (shapes: Shapes) => FoundConfig<FileConfigs[Name]> } = {
  transformer: transformerConfig,
  vae: vaeConfig,
  textEncoder: (shapes) => clipConfig(shapes, "quick_gelu"),
  textEncoder2: (shapes) => clipConfig(shapes, "gelu"),
  textEncoder3: t5Config,
};

/** The configuration of a part in the base, with the file that says it. */
export interface BaseConfig<Config> {
  readonly file: string;
  readonly config: Config;
}

/**
 * @param base what the shapes leave open is taken from it; null for the public models' values
 * @throws CheckpointError for a tensor that is absent or whose shape no such part has, and for a base that says something else
 */
export function configOf<Name extends FilePart>(
  part: Name,
  file: string,
  tensors: NamedTensors,
  base: BaseConfig<FileConfigs[Name]> | null,
): FileConfigs[Name] {
  const { said, usual, unusual = null } = readers[part](shapesOf(file, tensors));
  if (!base) {
    if (unusual !== null)
      throw new CheckpointError(
        file,
        `${file} does not say all of its configuration, and it is none of the public models: ${unusual}. ` +
          "Pass the folder of the model that it was made from as base (--base <folder>).",
      );
    return usual;
  }
  for (const [key, value] of Object.entries(said)) {
    const expected = base.config[key as keyof FileConfigs[Name]];
    if (JSON.stringify(value) !== JSON.stringify(expected))
      throw new CheckpointError(
        base.file,
        `${base.file}: ${snakeCase(key)} is ${JSON.stringify(expected)}, but the shapes in ${file} say ${JSON.stringify(value)}. ` +
          "The base is of another kind of model: pass the folder of the model that the file was made from.",
      );
  }
  return base.config;
}

const snakeCase = (key: string) => key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);

function shapesOf(file: string, { entries, identities, storedName }: NamedTensors): Shapes {
  const names = [...entries.keys()];
  const refuse = (name: string, what: string): never => {
    throw new CheckpointError(file, `${file}: the tensor "${storedName(name)}" ${what}.`);
  };
  return {
    refuse,
    of(name, rank) {
      const entry: HeaderEntry | undefined = entries.get(name);
      if (!entry) return refuse(name, "is missing; the download may be incomplete");
      if (entry.shape.length !== rank || elementCount(entry.shape) === 0)
        refuse(name, `has the shape [${entry.shape.join(", ")}]; expected ${rank} sizes above 0`);
      return entry.shape;
    },
    has: (name) => entries.has(name),
    isIdentity: (layer) => identities.has(layer),
    numbers(beginning) {
      const found = names.flatMap((name) =>
        name.startsWith(`${beginning}.`) ? Number(name.slice(beginning.length + 1).split(".")[0]) : [],
      );
      return [...new Set(found)].filter((number) => Number.isSafeInteger(number)).sort((a, b) => a - b);
    },
    some: (pattern) => names.some((name) => pattern.test(name)),
  };
}

/** Number of blocks, where the last one has the largest number. */
const blocks = (numbers: readonly number[]) => (numbers.at(-1) ?? 0) + 1;

function transformerConfig(shapes: Shapes): FoundConfig<TransformerConfig> {
  const norm = "transformer_blocks.0.attn.norm_q.weight";
  const [width, inChannels, patchSize] = shapes.of("pos_embed.proj.weight", 4) as [number, number, number];
  const positions = shapes.of("pos_embed.pos_embed", 3)[1]!;
  const posEmbedMaxSize = Math.round(Math.sqrt(positions));
  if (posEmbedMaxSize ** 2 !== positions)
    shapes.refuse("pos_embed.pos_embed", `has ${positions} positions, which are no square`);
  const outputs = shapes.of("proj_out.weight", 2)[0]!;
  const outChannels = outputs / patchSize ** 2;
  if (!Number.isInteger(outChannels))
    shapes.refuse(
      "proj_out.weight",
      `has ${outputs} rows, which are no multiple of the ${patchSize ** 2} values of a patch`,
    );
  const layers = shapes.numbers("transformer_blocks");
  const qkNorm = shapes.some(/\.attn2?\.norm_(added_)?[qk]\./) ? "rms_norm" : null;
  // Where queries are normalised, the norm is as long as a head is wide.
  const headDim = qkNorm && shapes.of(norm, 1)[0]!;
  if (headDim && width % headDim !== 0)
    shapes.refuse(norm, `has ${headDim} values, but the width ${width} is no multiple of that`);
  const said = {
    ...({ patchSize, inChannels, outChannels, posEmbedMaxSize, qkNorm } as const),
    ...{ numLayers: blocks(layers), captionProjectionDim: width },
    jointAttentionDim: shapes.of("context_embedder.weight", 2)[1]!,
    pooledProjectionDim: shapes.of("time_text_embed.text_embedder.linear_1.weight", 2)[1]!,
    dualAttentionLayers: layers.filter((layer) => shapes.some(new RegExp(`^transformer_blocks\\.${layer}\\.attn2\\.`))),
    ...(headDim && { attentionHeadDim: headDim, numAttentionHeads: width / headDim }),
  };
  return {
    ...{ said, unusual: headDim ? null : notOfHeads(width) },
    usual: { sampleSize: 128, attentionHeadDim: 64, numAttentionHeads: width / 64, ...said },
  };
}

/** Heads of the public models without a norm of their own are 64 wide. */
const notOfHeads = (width: number) => (width % 64 === 0 ? null : `the width ${width} is no multiple of 64`);

function clipConfig(shapes: Shapes, hiddenAct: ClipConfig["hiddenAct"]): FoundConfig<ClipConfig> {
  const embeddings = "text_model.embeddings";
  const [vocabSize, hiddenSize] = shapes.of(`${embeddings}.token_embedding.weight`, 2) as [number, number];
  const layers = "text_model.encoder.layers";
  const said = {
    ...{ vocabSize, hiddenSize },
    intermediateSize: shapes.of(`${layers}.0.mlp.fc1.weight`, 2)[0]!,
    projectionDim: shapes.isIdentity("text_projection") ? hiddenSize : shapes.of("text_projection.weight", 2)[0]!,
    numHiddenLayers: blocks(shapes.numbers(layers)),
    maxPositionEmbeddings: shapes.of(`${embeddings}.position_embedding.weight`, 2)[0]!,
  };
  // The public configs say 2 for eos_token_id, which means the largest id: see networks/clip.ts.
  const usual = { ...said, numAttentionHeads: hiddenSize / 64, hiddenAct, layerNormEps: 1e-5, eosTokenId: 2 };
  return { said, usual, unusual: notOfHeads(hiddenSize) };
}

function t5Config(shapes: Shapes): FoundConfig<T5Config> {
  const table = shapes.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight";
  const [vocabSize, dModel] = shapes.of(table, 2) as [number, number];
  const first = "encoder.block.0.layer.0.SelfAttention";
  const numHeads = shapes.of(`${first}.relative_attention_bias.weight`, 2)[1]!;
  const inner = shapes.of(`${first}.q.weight`, 2)[0]!;
  if (inner % numHeads !== 0) shapes.refuse(`${first}.q.weight`, `has ${inner} rows, but there are ${numHeads} heads`);
  const forward = "encoder.block.0.layer.1.DenseReluDense";
  const gated = shapes.some(/\.DenseReluDense\.wi_[01]\./);
  const said = {
    ...{ vocabSize, dModel, numHeads, gated },
    dKv: inner / numHeads,
    dFf: shapes.of(`${forward}.${gated ? "wi_0" : "wi"}.weight`, 2)[0]!,
    numLayers: blocks(shapes.numbers("encoder.block")),
  };
  const activation = gated ? "gelu_new" : "relu";
  const positions = { relativeAttentionNumBuckets: 32, relativeAttentionMaxDistance: 128 };
  return { said, usual: { ...said, ...positions, layerNormEpsilon: 1e-6, activation } };
}

function vaeConfig(shapes: Shapes): FoundConfig<VaeConfig> {
  const count = blocks(shapes.numbers("decoder.up_blocks"));
  const blockOutChannels: number[] = [];
  for (let index = count - 1; index >= 0; index--)
    blockOutChannels.push(shapes.of(`decoder.up_blocks.${index}.resnets.0.conv1.weight`, 4)[0]!);
  const said = {
    kind: "kl" as const,
    blockOutChannels,
    inChannels: shapes.of("encoder.conv_in.weight", 4)[1]!,
    outChannels: shapes.of("decoder.conv_out.weight", 4)[0]!,
    latentChannels: shapes.of("decoder.conv_in.weight", 4)[1]!,
    // A block of the decoder has one layer more.
    layersPerBlock: blocks(shapes.numbers("decoder.up_blocks.0.resnets")) - 1,
    useQuantConv: shapes.some(/^quant_conv\./),
    usePostQuantConv: shapes.some(/^post_quant_conv\./),
    midBlockAddAttention: shapes.some(/\.mid_block\.attentions\./),
    factor: 2 ** (count - 1),
  };
  const uneven = blockOutChannels.find((channels) => channels % 32 !== 0);
  return {
    ...{ said, unusual: uneven === undefined ? null : `a block of its VAE has ${uneven} channels, no multiple of 32` },
    usual: { ...said, normNumGroups: 32, sampleSize: 1024, scalingFactor: 1.5305, shiftFactor: 0.0609 },
  };
}
