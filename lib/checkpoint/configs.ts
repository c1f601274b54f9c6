/**
 * The config.json of each part, validated and in the names of this package, which are the file's in camel case: a schema
 * says all that is known of a key, and the types follow from the schemas. Defaults for absent keys are those of
 * diffusers 0.42 and transformers 5.23, since a config holds only what its author's version knew: SD3-medium's, for
 * one, has neither qk_norm nor dual_attention_layers. Unknown keys are ignored, as diffusers and transformers ignore them; a known
 * key with a value that this package does not compute is an error, since the picture would silently be wrong.
 */

import * as z from "zod";
import { CheckpointError } from "../errors.js";
import { isRecord, type JsonObject, readJsonObject } from "./files.js";
import { type SchedulerConfig, schedulerClasses, schedulerClassOf, schedulerSchema } from "./schedulers.js";

/** Classes for each part, as model_index.json and config.json name them. */
export const knownClasses = {
  transformer: ["SD3Transformer2DModel"],
  clip: ["CLIPTextModelWithProjection"],
  t5: ["T5EncoderModel"],
  vae: ["AutoencoderKL", "AutoencoderTiny"],
  scheduler: schedulerClasses,
  controlNet: ["SD3ControlNetModel"],
} as const;

const size = z.int().positive();
const epsilon = z.number().positive();
const factor = z.number().refine((value) => value > 0, "expected a positive number");
const className = (known: readonly string[]) => z.enum(known as [string, ...string[]]).optional();
const onlyNull = z.null({ error: "is set, which is not supported; only null is" }).optional();
/** A file that transformers reads in place of the usual ones. */
const otherWeights = onlyNull;

/** snake_case → camelCase */
type Camel<Key extends string> = Key extends `${infer Head}_${infer Tail}` ? `${Head}${Capitalize<Camel<Tail>>}` : Key;
type CamelKeys<Config> = { readonly [Key in keyof Config & string as Camel<Key>]: Config[Key] };

function camelKeys<Config extends object>(config: Config): CamelKeys<Config> {
  const camel = (key: string) => key.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
  return Object.fromEntries(Object.entries(config).map(([key, value]) => [camel(key), value])) as CamelKeys<Config>;
}

/** Refuses a config for a key that does not agree with others. */
function refuse(context: z.RefinementCtx, key: string, message: string): void {
  context.addIssue({ code: "custom", path: [key], message });
}

const transformerSchema = z
  .object({
    _class_name: className(knownClasses.transformer),
    /** Native size in latent pixels. */
    sample_size: size.default(128),
    patch_size: size.default(2),
    in_channels: size.default(16),
    /** Null for as many as in_channels. */
    out_channels: size.nullable().default(16),
    num_layers: size.default(18),
    attention_head_dim: size.default(64),
    num_attention_heads: size.default(18),
    /** Width of the context (text) that enters. */
    joint_attention_dim: size.default(4096),
    /** Width of the context inside; equals heads x head dim. */
    caption_projection_dim: size.default(1152),
    pooled_projection_dim: size.default(2048),
    /** Rows and columns of the position table, in patches. */
    pos_embed_max_size: size.default(96),
    /** Indices of the blocks with a second attention over the picture alone. */
    dual_attention_layers: z
      .array(z.int().nonnegative())
      .nullable()
      .default([])
      .transform((layers): readonly number[] => layers ?? []),
    qk_norm: z.literal("rms_norm").nullable().default(null),
  })
  .superRefine((config, context) => {
    const { dual_attention_layers: dual, num_layers: layers, caption_projection_dim: caption } = config;
    const beyond = dual.find((layer) => layer >= layers);
    if (beyond !== undefined)
      refuse(context, "dual_attention_layers", `names layer ${beyond}, but num_layers is ${layers}`);
    const width = config.num_attention_heads * config.attention_head_dim;
    if (caption !== width) {
      const expected = `must equal num_attention_heads x attention_head_dim = ${width}`;
      refuse(context, "caption_projection_dim", `is ${caption}, but ${expected}`);
    }
  })
  .transform(({ _class_name, ...config }) => ({
    ...camelKeys(config),
    outChannels: config.out_channels ?? config.in_channels,
  }));

const controlNetSchema = z
  .object({
    _class_name: className(knownClasses.controlNet),
    sample_size: size.default(128),
    patch_size: size.default(2),
    /** Channels of the latents, beside which the control has `extra_conditioning_channels`. */
    in_channels: size.default(16),
    /** Without an effect: what comes out are tokens. */
    out_channels: size.nullable().default(16),
    num_layers: size.default(18),
    attention_head_dim: size.default(64),
    num_attention_heads: size.default(18),
    /** Null for one without text: its blocks have image tokens alone. */
    joint_attention_dim: size.nullable().default(4096),
    caption_projection_dim: size.default(1152),
    pooled_projection_dim: size.default(2048),
    pos_embed_max_size: size.nullable().default(96),
    /** 1: a mask, as of alimama's inpainting ControlNet. */
    extra_conditioning_channels: z
      .int()
      .nonnegative()
      .max(1, "more than 1 is not supported: no pipeline of diffusers says what they hold")
      .default(0),
    dual_attention_layers: z
      .array(z.int().nonnegative())
      .nullable()
      .default([])
      .transform((layers): readonly number[] => layers ?? []),
    qk_norm: z.literal("rms_norm").nullable().default(null),
    pos_embed_type: z.literal("sincos").nullable().default("sincos"),
    /** False: it takes the transformer's own tokens. */
    use_pos_embed: z.boolean().default(true),
    force_zeros_for_pooled_projection: z.boolean().default(true),
  })
  .superRefine((config, context) => {
    const { joint_attention_dim: joint, caption_projection_dim: caption } = config;
    const width = config.num_attention_heads * config.attention_head_dim;
    if (joint !== null && caption !== width) {
      const expected = `must equal num_attention_heads x attention_head_dim = ${width}`;
      refuse(context, "caption_projection_dim", `is ${caption}, but ${expected}`);
    }
    // Such a table is not among the weights: diffusers computes it for each size.
    if (config.use_pos_embed && config.pos_embed_type !== null && config.pos_embed_max_size === null)
      refuse(
        context,
        "pos_embed_max_size",
        "null is supported only where use_pos_embed is false or pos_embed_type null",
      );
  })
  .transform(({ _class_name, out_channels, ...config }) => {
    const { extra_conditioning_channels: extra, force_zeros_for_pooled_projection: zeros } = config;
    return {
      ...camelKeys(config),
      // Blocks of image tokens alone have neither; from_transformer keeps the layers of a deeper transformer.
      qkNorm: config.joint_attention_dim === null ? null : config.qk_norm,
      dualAttentionLayers: config.joint_attention_dim === null ? [] : config.dual_attention_layers,
      /** Whether the control has a mask: the known region's picture, and a channel that is 1 there. */
      takesMask: extra === 1,
      /** Whether the pooled text is zeros for it. diffusers' pipeline for inpainting has them so whatever the config says. */
      zeroPooled: zeros || extra === 1,
      /** Whether the shift is subtracted from the control's latents, as it is from the picture's. */
      shiftsControl: !zeros || extra === 1,
      /** Where its tokens get positions: from a table of its own, not at all, or with the transformer's tokens. */
      positions: config.use_pos_embed ? (config.pos_embed_type === null ? "none" : "own") : "transformer",
    } as const;
  });

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
    /** 2 is the legacy value: the pooled position is then argmax(ids) instead of the first end token. */
    eos_token_id: z.int().nonnegative().default(49407),
    transformers_weights: otherWeights,
  })
  .superRefine(({ hidden_size: width, num_attention_heads: heads }, context) => {
    if (width % heads !== 0)
      refuse(context, "hidden_size", `is ${width}, not a multiple of num_attention_heads = ${heads}`);
  })
  .transform(({ transformers_weights, ...config }) => camelKeys(config));

type Activation = "relu" | "gelu" | "gelu_new" | "silu";

/**
 * `gated`: whether the feed-forward is activation(wi_0 x) * (wi_1 x). transformers derives both values from this one key,
 * and ignores dense_act_fn and is_gated_act beside it.
 */
const feedForward: Readonly<Record<string, { readonly activation: Activation; readonly gated: boolean }>> = {
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
    transformers_weights: otherWeights,
  })
  .transform(({ feed_forward_proj, transformers_weights, ...config }) => ({
    ...camelKeys(config),
    ...feedForward[feed_forward_proj]!,
  }));

const vaeSchema = z
  .object({
    _class_name: className(knownClasses.vae),
    in_channels: size.default(3),
    out_channels: size.default(3),
    down_block_types: z.array(z.literal("DownEncoderBlock2D")).default(["DownEncoderBlock2D"]),
    up_block_types: z.array(z.literal("UpDecoderBlock2D")).default(["UpDecoderBlock2D"]),
    block_out_channels: z.array(size).min(1).readonly().default([64]),
    layers_per_block: size.default(1),
    act_fn: z.enum(["silu", "swish"]).default("silu"),
    latent_channels: size.default(4),
    norm_num_groups: size.default(32),
    /** Native size in pixels, as the config says; diffusers uses the transformer's sample_size instead. */
    sample_size: size.default(32),
    /** Latents for the transformer are (z - shift_factor) * scaling_factor. */
    scaling_factor: factor.default(0.18215),
    /** 0 where the config says null. */
    shift_factor: z
      .number()
      .nullable()
      .default(null)
      .transform((shift) => shift ?? 0),
    latents_mean: onlyNull,
    latents_std: onlyNull,
    use_quant_conv: z.boolean().default(true),
    use_post_quant_conv: z.boolean().default(true),
    mid_block_add_attention: z.boolean().default(true),
  })
  .superRefine((config, context) => {
    const { block_out_channels: blocks, norm_num_groups: groups } = config;
    for (const key of ["down_block_types", "up_block_types"] as const)
      if (config[key].length !== blocks.length)
        refuse(context, key, `has ${config[key].length} entries, but block_out_channels has ${blocks.length}`);
    const uneven = blocks.find((channels) => channels % groups !== 0);
    if (uneven !== undefined)
      refuse(context, "block_out_channels", `holds ${uneven}, not a multiple of norm_num_groups = ${groups}`);
  })
  .transform(({ _class_name, down_block_types, up_block_types, act_fn, latents_mean, latents_std, ...config }) => ({
    ...camelKeys(config),
    kind: "kl" as const,
    /** Pixels per latent pixel. */
    factor: 2 ** (config.block_out_channels.length - 1),
  }));

const tinyBlocks = z.array(size).min(1).readonly();
const tinyVaeSchema = z
  .object({
    _class_name: className(knownClasses.vae),
    in_channels: size.default(3),
    out_channels: size.default(3),
    encoder_block_out_channels: tinyBlocks.default([64, 64, 64, 64]),
    decoder_block_out_channels: tinyBlocks.default([64, 64, 64, 64]),
    num_encoder_blocks: z.array(z.int().nonnegative()).readonly().default([1, 3, 3, 3]),
    num_decoder_blocks: z.array(z.int().nonnegative()).readonly().default([3, 3, 3, 1]),
    act_fn: z.literal("relu").default("relu"),
    upsample_fn: z.literal("nearest").default("nearest"),
    upsampling_scaling_factor: z.literal(2).default(2),
    latent_channels: size.default(4),
    /** Latents for the transformer are (z - shift_factor) * scaling_factor. */
    scaling_factor: factor.default(1),
    shift_factor: z
      .number()
      .nullish()
      .transform((shift) => shift ?? 0),
  })
  .superRefine((config, context) => {
    for (const half of ["encoder", "decoder"] as const) {
      const [channels, blocks] = [config[`${half}_block_out_channels`], config[`num_${half}_blocks`]];
      if (blocks.length !== channels.length)
        refuse(
          context,
          `num_${half}_blocks`,
          `has ${blocks.length} entries, but ${half}_block_out_channels has ${channels.length}`,
        );
      const other = channels.find((each) => each !== channels[0]);
      if (other !== undefined)
        refuse(
          context,
          `${half}_block_out_channels`,
          `holds ${channels[0]} and ${other}, but its layers need one number`,
        );
    }
    const [encoder, decoder] = [config.encoder_block_out_channels.length, config.decoder_block_out_channels.length];
    if (encoder !== decoder)
      refuse(
        context,
        "decoder_block_out_channels",
        `has ${decoder} entries, but encoder_block_out_channels has ${encoder}`,
      );
  })
  .transform(({ _class_name, act_fn, upsample_fn, upsampling_scaling_factor, ...config }) => ({
    ...camelKeys(config),
    kind: "tiny" as const,
    /** Of the decoder. */
    blockOutChannels: config.decoder_block_out_channels,
    /** Pixels per latent pixel. */
    factor: 2 ** (config.decoder_block_out_channels.length - 1),
  }));

/** The MMDiT, predictor or refiner (SD3Transformer2DModel). */
export type TransformerConfig = z.output<typeof transformerSchema>;
/** A ControlNet (SD3ControlNetModel). */
export type ControlNetConfig = z.output<typeof controlNetSchema>;
/** A CLIP text encoder (CLIPTextModelWithProjection). */
export type ClipConfig = z.output<typeof clipSchema>;
/** The T5 encoder (T5EncoderModel). */
export type T5Config = z.output<typeof t5Schema>;
/** A VAE (AutoencoderKL). */
export type KlVaeConfig = z.output<typeof vaeSchema>;
/** A tiny autoencoder (AutoencoderTiny), such as TAESD3. */
export type TinyVaeConfig = z.output<typeof tinyVaeSchema>;
/** The autoencoder, of either kind. */
export type VaeConfig = KlVaeConfig | TinyVaeConfig;
export type { SchedulerConfig };

/**
 * Reads one JSON file.
 * @param json what it holds, where that was read before
 * @throws CheckpointError that names the file and the key
 */
export type ReadConfig<Config> = (file: string, json?: JsonObject) => Promise<Config>;

/** @param prepare picks what counts of the file, and the schema for it */
const reader =
  <Config>(prepare: (json: JsonObject) => readonly [JsonObject, z.ZodType<Config>]): ReadConfig<Config> =>
  async (file, json) =>
    checked(file, ...prepare(json ?? (await readJsonObject(file))));

export const readTransformerConfig = reader<TransformerConfig>((json) => [json, transformerSchema]);
export const readControlNetConfig = reader<ControlNetConfig>((json) => [json, controlNetSchema]);
// The text model of a whole CLIP model is nested in its config, and counts there.
export const readClipConfig = reader<ClipConfig>((json) => [
  isRecord(json.text_config) ? json.text_config : json,
  clipSchema,
]);
export const readT5Config = reader<T5Config>((json) => [json, t5Schema]);
export const readVaeConfig = reader<VaeConfig>((json) => [
  json,
  json._class_name === "AutoencoderTiny" ? tinyVaeSchema : vaeSchema,
]);
export const readSchedulerConfig = async (file: string): Promise<SchedulerConfig> =>
  checked(file, await readJsonObject(file), schedulerSchema(await schedulerClassOf(file)));

/** The scheduler of SD3 and SD3.5, for a checkpoint that does not say its own. */
export const usualScheduler: SchedulerConfig = schedulerSchema(null).parse({ shift: 3 });

function checked<T>(file: string, json: JsonObject, schema: z.ZodType<T>): T {
  const parsed = schema.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  const key = issue.path.join(".");
  const value = issue.path.reduce<unknown>((at, step) => (at as JsonObject | undefined)?.[step as string], json);
  throw new CheckpointError(
    file,
    `${file}: the key "${key}" (${JSON.stringify(value) ?? "absent"}) cannot be used: ${issue.message}. ` +
      "This package reads Stable Diffusion 3 and 3.5 checkpoints in the diffusers layout.",
  );
}
