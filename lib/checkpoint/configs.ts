/**
 * The config.json of each part, validated and in the names of this package. Defaults for absent keys are those of
 * diffusers 0.42 and transformers 5.23, since a config holds only what its author's version knew: SD3-medium's, for
 * one, has neither qk_norm nor dual_attention_layers. Unknown keys are ignored, as the originals ignore them; a known
 * key with a value that this package does not compute is an error, since the picture would silently be wrong.
 */

import { readFile } from "node:fs/promises";
import { z } from "zod";
import { CheckpointError } from "../errors.js";

/** The MMDiT, predictor or refiner (SD3Transformer2DModel). */
export interface TransformerConfig {
  /** Native size in latent pixels. */
  readonly sampleSize: number;
  readonly patchSize: number;
  readonly inChannels: number;
  readonly outChannels: number;
  readonly numLayers: number;
  readonly attentionHeadDim: number;
  readonly numAttentionHeads: number;
  /** Width of the context (text) that enters. */
  readonly jointAttentionDim: number;
  /** Width of the context inside; equals heads x head dim. */
  readonly captionProjectionDim: number;
  readonly pooledProjectionDim: number;
  /** Rows and columns of the position table, in patches. */
  readonly posEmbedMaxSize: number;
  /** Indices of the blocks with a second attention over the picture alone. */
  readonly dualAttentionLayers: readonly number[];
  readonly qkNorm: "rms_norm" | null;
}

/** A CLIP text encoder (CLIPTextModelWithProjection). */
export interface ClipConfig {
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly projectionDim: number;
  readonly numHiddenLayers: number;
  readonly numAttentionHeads: number;
  readonly maxPositionEmbeddings: number;
  readonly hiddenAct: "quick_gelu" | "gelu";
  readonly layerNormEps: number;
  /** 2 is the legacy value: the pooled position is then argmax(ids) instead of the first end token. */
  readonly eosTokenId: number;
}

export type T5Activation = "relu" | "gelu" | "gelu_new" | "silu";

/** The T5 encoder (T5EncoderModel). */
export interface T5Config {
  readonly vocabSize: number;
  readonly dModel: number;
  readonly dKv: number;
  readonly dFf: number;
  readonly numLayers: number;
  readonly numHeads: number;
  readonly relativeAttentionNumBuckets: number;
  readonly relativeAttentionMaxDistance: number;
  readonly layerNormEpsilon: number;
  readonly activation: T5Activation;
  /** Whether the feed-forward is activation(wi_0 x) * (wi_1 x). */
  readonly gated: boolean;
}

/** The VAE (AutoencoderKL). */
export interface VaeConfig {
  readonly inChannels: number;
  readonly outChannels: number;
  readonly latentChannels: number;
  readonly blockOutChannels: readonly number[];
  readonly layersPerBlock: number;
  readonly normNumGroups: number;
  /** Latents for the transformer are (z - shiftFactor) * scalingFactor. */
  readonly scalingFactor: number;
  /** 0 where the config says null. */
  readonly shiftFactor: number;
  readonly useQuantConv: boolean;
  readonly usePostQuantConv: boolean;
  readonly midBlockAddAttention: boolean;
  /** Native size in pixels, as the config says; diffusers uses the transformer's sample_size instead. */
  readonly sampleSize: number;
  /** Pixels per latent pixel, 2^(blocks - 1). */
  readonly factor: number;
}

/** What is used of the scheduler: its grid. The sampler is the caller's choice. */
export interface SchedulerConfig {
  readonly shift: number;
  readonly numTrainTimesteps: number;
}

/** Classes for each part, as model_index.json and config.json name them. */
export const knownClasses = {
  transformer: ["SD3Transformer2DModel"],
  clip: ["CLIPTextModelWithProjection"],
  t5: ["T5EncoderModel"],
  vae: ["AutoencoderKL"],
  scheduler: ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"],
} as const;

const size = z.int().positive();
const epsilon = z.number().positive();
const factor = z.number().refine((value) => value > 0, "expected a positive number");
const className = (known: readonly string[]) => z.enum(known as [string, ...string[]]).optional();
/** A switch of the original that this package does not implement: it may be present, but not on. */
const off = z
  .union([z.literal(false), z.null()], { error: "is set, which is not supported; only false or null are" })
  .optional();

const transformerSchema = z
  .object({
    _class_name: className(knownClasses.transformer),
    sample_size: size.default(128),
    patch_size: size.default(2),
    in_channels: size.default(16),
    num_layers: size.default(18),
    attention_head_dim: size.default(64),
    num_attention_heads: size.default(18),
    joint_attention_dim: size.default(4096),
    caption_projection_dim: size.default(1152),
    pooled_projection_dim: size.default(2048),
    out_channels: size.nullable().default(16),
    pos_embed_max_size: size.default(96),
    dual_attention_layers: z.array(z.int().nonnegative()).nullable().default([]),
    qk_norm: z.literal("rms_norm").nullable().default(null),
  })
  .superRefine((config, context) => {
    const beyond = config.dual_attention_layers?.find((layer) => layer >= config.num_layers);
    if (beyond !== undefined)
      context.addIssue({
        code: "custom",
        path: ["dual_attention_layers"],
        message: `names layer ${beyond}, but num_layers is ${config.num_layers}`,
      });
    const width = config.num_attention_heads * config.attention_head_dim;
    if (config.caption_projection_dim !== width)
      context.addIssue({
        code: "custom",
        path: ["caption_projection_dim"],
        message: `is ${config.caption_projection_dim}, but must equal num_attention_heads x attention_head_dim = ${width}`,
      });
  })
  .transform(
    (config): TransformerConfig => ({
      sampleSize: config.sample_size,
      patchSize: config.patch_size,
      inChannels: config.in_channels,
      outChannels: config.out_channels ?? config.in_channels,
      numLayers: config.num_layers,
      attentionHeadDim: config.attention_head_dim,
      numAttentionHeads: config.num_attention_heads,
      jointAttentionDim: config.joint_attention_dim,
      captionProjectionDim: config.caption_projection_dim,
      pooledProjectionDim: config.pooled_projection_dim,
      posEmbedMaxSize: config.pos_embed_max_size,
      dualAttentionLayers: config.dual_attention_layers ?? [],
      qkNorm: config.qk_norm,
    }),
  );

const clipSchema = z
  .object({
    vocab_size: size.default(49408),
    hidden_size: size.default(512),
    intermediate_size: size.default(2048),
    projection_dim: size.default(512),
    num_hidden_layers: size.default(12),
    num_attention_heads: size.default(8),
    max_position_embeddings: size.default(77),
    hidden_act: z.enum(["quick_gelu", "gelu"]).default("quick_gelu"),
    layer_norm_eps: epsilon.default(1e-5),
    eos_token_id: z.int().nonnegative().default(49407),
  })
  .superRefine((config, context) => {
    if (config.hidden_size % config.num_attention_heads !== 0)
      context.addIssue({
        code: "custom",
        path: ["hidden_size"],
        message: `is ${config.hidden_size}, not a multiple of num_attention_heads = ${config.num_attention_heads}`,
      });
  })
  .transform(
    (config): ClipConfig => ({
      vocabSize: config.vocab_size,
      hiddenSize: config.hidden_size,
      intermediateSize: config.intermediate_size,
      projectionDim: config.projection_dim,
      numHiddenLayers: config.num_hidden_layers,
      numAttentionHeads: config.num_attention_heads,
      maxPositionEmbeddings: config.max_position_embeddings,
      hiddenAct: config.hidden_act,
      layerNormEps: config.layer_norm_eps,
      eosTokenId: config.eos_token_id,
    }),
  );

/** transformers derives both values from this one key, and ignores dense_act_fn and is_gated_act beside it. */
const feedForward: Readonly<Record<string, { activation: T5Activation; gated: boolean }>> = {
  relu: { activation: "relu", gated: false },
  gelu: { activation: "gelu", gated: false },
  gelu_new: { activation: "gelu_new", gated: false },
  silu: { activation: "silu", gated: false },
  "gated-relu": { activation: "relu", gated: true },
  // Not a mistake: T5 v1.1 says gelu and means its tanh form.
  "gated-gelu": { activation: "gelu_new", gated: true },
  "gated-gelu_new": { activation: "gelu_new", gated: true },
  "gated-silu": { activation: "silu", gated: true },
};

const t5Schema = z
  .object({
    vocab_size: size.default(32128),
    d_model: size.default(512),
    d_kv: size.default(64),
    d_ff: size.default(2048),
    num_layers: size.default(6),
    num_heads: size.default(8),
    relative_attention_num_buckets: size.default(32),
    relative_attention_max_distance: size.default(128),
    layer_norm_epsilon: epsilon.default(1e-6),
    feed_forward_proj: z.enum(Object.keys(feedForward) as [string, ...string[]]).default("relu"),
  })
  .transform(
    (config): T5Config => ({
      vocabSize: config.vocab_size,
      dModel: config.d_model,
      dKv: config.d_kv,
      dFf: config.d_ff,
      numLayers: config.num_layers,
      numHeads: config.num_heads,
      relativeAttentionNumBuckets: config.relative_attention_num_buckets,
      relativeAttentionMaxDistance: config.relative_attention_max_distance,
      layerNormEpsilon: config.layer_norm_epsilon,
      ...feedForward[config.feed_forward_proj]!,
    }),
  );

const vaeSchema = z
  .object({
    _class_name: className(knownClasses.vae),
    in_channels: size.default(3),
    out_channels: size.default(3),
    down_block_types: z.array(z.literal("DownEncoderBlock2D")).default(["DownEncoderBlock2D"]),
    up_block_types: z.array(z.literal("UpDecoderBlock2D")).default(["UpDecoderBlock2D"]),
    block_out_channels: z.array(size).min(1).default([64]),
    layers_per_block: size.default(1),
    act_fn: z.enum(["silu", "swish"]).default("silu"),
    latent_channels: size.default(4),
    norm_num_groups: size.default(32),
    sample_size: size.default(32),
    scaling_factor: factor.default(0.18215),
    shift_factor: z.number().nullable().default(null),
    latents_mean: z.null({ error: "is set, which is not supported; only null is" }).optional(),
    latents_std: z.null({ error: "is set, which is not supported; only null is" }).optional(),
    use_quant_conv: z.boolean().default(true),
    use_post_quant_conv: z.boolean().default(true),
    mid_block_add_attention: z.boolean().default(true),
  })
  .superRefine((config, context) => {
    const blocks = config.block_out_channels.length;
    for (const key of ["down_block_types", "up_block_types"] as const)
      if (config[key].length !== blocks)
        context.addIssue({
          code: "custom",
          path: [key],
          message: `has ${config[key].length} entries, but block_out_channels has ${blocks}`,
        });
    const uneven = config.block_out_channels.find((channels) => channels % config.norm_num_groups !== 0);
    if (uneven !== undefined)
      context.addIssue({
        code: "custom",
        path: ["block_out_channels"],
        message: `holds ${uneven}, not a multiple of norm_num_groups = ${config.norm_num_groups}`,
      });
  })
  .transform(
    (config): VaeConfig => ({
      inChannels: config.in_channels,
      outChannels: config.out_channels,
      latentChannels: config.latent_channels,
      blockOutChannels: config.block_out_channels,
      layersPerBlock: config.layers_per_block,
      normNumGroups: config.norm_num_groups,
      scalingFactor: config.scaling_factor,
      shiftFactor: config.shift_factor ?? 0,
      useQuantConv: config.use_quant_conv,
      usePostQuantConv: config.use_post_quant_conv,
      midBlockAddAttention: config.mid_block_add_attention,
      sampleSize: config.sample_size,
      factor: 2 ** (config.block_out_channels.length - 1),
    }),
  );

const schedulerSchema = z
  .object({
    _class_name: className(knownClasses.scheduler),
    num_train_timesteps: size.default(1000),
    shift: factor.default(1),
    use_dynamic_shifting: off,
    use_karras_sigmas: off,
    use_exponential_sigmas: off,
    use_beta_sigmas: off,
    invert_sigmas: off,
    shift_terminal: off,
    stochastic_sampling: off,
  })
  .transform((config): SchedulerConfig => ({ shift: config.shift, numTrainTimesteps: config.num_train_timesteps }));

/** Each reads one JSON file. @throws CheckpointError that names the file and the key. */
export const readTransformerConfig = (file: string): Promise<TransformerConfig> => read(file, transformerSchema);
export const readClipConfig = (file: string): Promise<ClipConfig> => read(file, clipSchema, unwrapText);
export const readT5Config = (file: string): Promise<T5Config> => read(file, t5Schema, unwrapText);
export const readVaeConfig = (file: string): Promise<VaeConfig> => read(file, vaeSchema);
export const readSchedulerConfig = (file: string): Promise<SchedulerConfig> => read(file, schedulerSchema);

/**
 * @returns the object that a JSON file holds.
 * @throws CheckpointError if the file is missing, is not JSON or holds something else than an object.
 */
export async function readJsonObject(file: string): Promise<Record<string, unknown>> {
  let json: unknown;
  try {
    json = JSON.parse(await readFile(file, "utf8"));
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === "ENOENT")
      throw new CheckpointError(file, `${file} is missing. Download the checkpoint's remaining files.`, { cause });
    if (cause instanceof SyntaxError)
      throw new CheckpointError(file, `${file} is not JSON (${cause.message}). Download the file again.`, { cause });
    throw new CheckpointError(file, `Cannot read ${file}: ${(cause as Error).message}`, { cause });
  }
  if (typeof json !== "object" || json === null || Array.isArray(json))
    throw new CheckpointError(file, `${file} does not hold a JSON object. Download the file again.`);
  return json as Record<string, unknown>;
}

type Json = Record<string, unknown>;

async function read<T>(file: string, schema: z.ZodType<T>, prepare: (json: Json) => Json = (json) => json): Promise<T> {
  const json = prepare(await readJsonObject(file));
  const parsed = schema.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  const key = issue.path.join(".");
  const value = issue.path.reduce<unknown>((at, step) => (at as Json | undefined)?.[step as string], json);
  throw new CheckpointError(
    file,
    `${file}: the key "${key}" (${JSON.stringify(value) ?? "absent"}) cannot be used: ${issue.message}. ` +
      "This package reads Stable Diffusion 3 and 3.5 checkpoints in the diffusers layout.",
  );
}

/** The text model of a whole CLIP or T5 model is nested in its config. */
function unwrapText(json: Json): Json {
  const text = json.text_config;
  return typeof text === "object" && text !== null && !Array.isArray(text) ? (text as Json) : json;
}
