/**
 * The public SD3 and SD3.5 checkpoints by the shapes of their parts, as they are published, and folders of that size with
 * random bfloat16 weights, for measuring disk and memory where no real checkpoint can be had. Only the tokenizers are a
 * fixture's, whose ids are within the real vocabularies.
 */

import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { type Shapes, tensorShapes, writeRandom } from "./random-checkpoint.js";
import { clipShapes, t5Shapes } from "./single-file-checkpoint.js";
import { root } from "./support.js";

const range = (count: number) => Array.from({ length: count }, (_, index) => index);

const transformer = (layers: number, table: number, dual: number, qkNorm: string | null) => ({
  _class_name: "SD3Transformer2DModel",
  ...{ sample_size: 128, patch_size: 2, in_channels: 16, out_channels: 16, num_layers: layers },
  ...{ attention_head_dim: 64, num_attention_heads: layers, caption_projection_dim: 64 * layers },
  ...{ joint_attention_dim: 4096, pooled_projection_dim: 2048, pos_embed_max_size: table },
  ...{ dual_attention_layers: range(dual), qk_norm: qkNorm },
});

/** Transformers by the name of their checkpoint. */
export const transformers = {
  "sd3-medium": transformer(24, 192, 0, null),
  "sd3.5-medium": transformer(24, 384, 13, "rms_norm"),
  "sd3.5-large": transformer(38, 192, 0, "rms_norm"),
} as const;

export type CheckpointName = keyof typeof transformers;

const clip = (width: number, layers: number, heads: number, activation: string) => ({
  architectures: ["CLIPTextModelWithProjection"],
  ...{ vocab_size: 49408, hidden_size: width, intermediate_size: 4 * width, projection_dim: width },
  ...{ num_hidden_layers: layers, num_attention_heads: heads, max_position_embeddings: 77 },
  ...{ hidden_act: activation, layer_norm_eps: 1e-5, eos_token_id: 2 },
});
const clipL = clip(768, 12, 12, "quick_gelu");
const clipG = clip(1280, 32, 20, "gelu");

const t5 = {
  architectures: ["T5EncoderModel"],
  ...{ vocab_size: 32128, d_model: 4096, d_kv: 64, d_ff: 10240, num_layers: 24, num_heads: 64 },
  ...{ relative_attention_num_buckets: 32, relative_attention_max_distance: 128, layer_norm_epsilon: 1e-6 },
  feed_forward_proj: "gated-gelu",
};

const blocks = [128, 256, 512, 512];
const vae = {
  _class_name: "AutoencoderKL",
  ...{ in_channels: 3, out_channels: 3, latent_channels: 16, block_out_channels: blocks, layers_per_block: 2 },
  down_block_types: blocks.map(() => "DownEncoderBlock2D"),
  up_block_types: blocks.map(() => "UpDecoderBlock2D"),
  ...{ act_fn: "silu", norm_num_groups: 32, sample_size: 1024, scaling_factor: 1.5305, shift_factor: 0.0609 },
  ...{ use_quant_conv: false, use_post_quant_conv: false, mid_block_add_attention: true },
};

/** Shapes as they are collected. */
function collector() {
  const shapes: Shapes = {};
  const norm = (name: string, size: number) => {
    shapes[`${name}.weight`] = [size];
    shapes[`${name}.bias`] = [size];
  };
  const linear = (name: string, from: number, to: number) => {
    shapes[`${name}.weight`] = [to, from];
    shapes[`${name}.bias`] = [to];
  };
  const conv = (name: string, from: number, to: number, kernel: number) => {
    shapes[`${name}.weight`] = [to, from, kernel, kernel];
    shapes[`${name}.bias`] = [to];
  };
  return { shapes, norm, linear, conv };
}

function vaeShapes({ latent_channels: latents, layers_per_block: layers }: typeof vae): Shapes {
  const { shapes, norm, linear, conv } = collector();
  const resnet = (name: string, from: number, to: number) => {
    norm(`${name}.norm1`, from);
    conv(`${name}.conv1`, from, to, 3);
    norm(`${name}.norm2`, to);
    conv(`${name}.conv2`, to, to, 3);
    if (from !== to) conv(`${name}.conv_shortcut`, from, to, 1);
  };
  const middle = (name: string, channels: number) => {
    resnet(`${name}.resnets.0`, channels, channels);
    resnet(`${name}.resnets.1`, channels, channels);
    norm(`${name}.attentions.0.group_norm`, channels);
    for (const part of ["to_q", "to_k", "to_v", "to_out.0"]) linear(`${name}.attentions.0.${part}`, channels, channels);
  };
  const half = (side: "encoder" | "decoder", channels: readonly number[], count: number, sampler: string) => {
    let from = channels[0]!;
    for (const [index, to] of channels.entries()) {
      const name = `${side}.${side === "encoder" ? "down" : "up"}_blocks.${index}`;
      for (const layer of range(count)) {
        resnet(`${name}.resnets.${layer}`, from, to);
        from = to;
      }
      if (index < channels.length - 1) conv(`${name}.${sampler}.0.conv`, to, to, 3);
    }
    norm(`${side}.conv_norm_out`, from);
    return from;
  };
  const deepest = blocks.at(-1)!;
  conv("encoder.conv_in", 3, blocks[0]!, 3);
  conv("encoder.conv_out", half("encoder", blocks, layers, "downsamplers"), 2 * latents, 3);
  middle("encoder.mid_block", deepest);
  conv("decoder.conv_in", latents, deepest, 3);
  middle("decoder.mid_block", deepest);
  conv("decoder.conv_out", half("decoder", [...blocks].reverse(), layers + 1, "upsamplers"), 3, 3);
  return shapes;
}

interface WholePart {
  readonly config: object;
  readonly shapes: Shapes;
  readonly file: string;
}

/** The parts with weights of a checkpoint, by their folders. */
export function partsOf(name: CheckpointName): Record<string, WholePart> {
  const config = transformers[name];
  return {
    transformer: { config, shapes: tensorShapes(config as never), file: "diffusion_pytorch_model.safetensors" },
    vae: { config: vae, shapes: vaeShapes(vae), file: "diffusion_pytorch_model.safetensors" },
    text_encoder: { config: clipL, shapes: clipShapes(768, 12), file: "model.safetensors" },
    text_encoder_2: { config: clipG, shapes: clipShapes(1280, 32), file: "model.safetensors" },
    text_encoder_3: { config: t5, shapes: t5Shapes(), file: "model.safetensors" },
  };
}

/** Values of a part's tensors. */
export function parametersOf({ shapes }: Pick<WholePart, "shapes">): number {
  return Object.values(shapes).reduce((sum, shape) => sum + shape.reduce((a, b) => a * b, 1), 0);
}

/** A whole folder with random weights, unless there is one. @returns its path */
export async function wholeCheckpoint(name: CheckpointName): Promise<string> {
  const folder = path.join(root, "bench/.work", `whole-${name}`);
  const stampFile = path.join(folder, "stamp");
  const parts = partsOf(name);
  const stamp = JSON.stringify(parts);
  if (existsSync(stampFile) && readFileSync(stampFile, "utf8") === stamp) return folder;
  rmSync(folder, { recursive: true, force: true });
  const fixture = path.join(root, "test/fixtures/medium/model");
  for (const part of ["model_index.json", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"])
    cpSync(path.join(fixture, part), path.join(folder, part), { recursive: true });
  for (const [part, { config, shapes, file }] of Object.entries(parts)) {
    mkdirSync(path.join(folder, part), { recursive: true });
    writeFileSync(path.join(folder, part, "config.json"), JSON.stringify(config, null, 2));
    await writeRandom(path.join(folder, part, file), shapes);
  }
  writeFileSync(stampFile, stamp);
  return folder;
}
