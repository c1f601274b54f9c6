/**
 * Headers of checkpoints in one file as Stability publishes them, with the shapes of the public models, and files that have such a header
 * and nothing but a hole behind it: for measuring how they are opened, and for tests of what is read of their shapes.
 */

import { open } from "node:fs/promises";
import { headerOf, type Shapes } from "./random-checkpoint.js";

export type { Shapes };

const linear = (shapes: Shapes, name: string, from: number, to: number, bias = true) => {
  shapes[`${name}.weight`] = [to, from];
  if (bias) shapes[`${name}.bias`] = [to];
};

export interface TransformerShape {
  readonly layers: number;
  readonly width: number;
  /** How many blocks, from the first, have a second attention. */
  readonly dual: number;
  readonly qkNorm: boolean;
  /** Side of the table of positions. */
  readonly positions: number;
}

export const sd3Medium: TransformerShape = { layers: 24, width: 1536, dual: 0, qkNorm: false, positions: 192 };
export const sd35Medium: TransformerShape = { layers: 24, width: 1536, dual: 13, qkNorm: true, positions: 384 };
export const sd35Large: TransformerShape = { layers: 38, width: 2432, dual: 0, qkNorm: true, positions: 192 };

/** The transformer in the names of Stability's mmditx.py. */
export function transformerShapes({ layers, width, dual, qkNorm, positions }: TransformerShape): Shapes {
  const shapes: Shapes = {
    pos_embed: [1, positions ** 2, width],
    "x_embedder.proj.weight": [width, 16, 2, 2],
    "x_embedder.proj.bias": [width],
  };
  linear(shapes, "context_embedder", 4096, width);
  linear(shapes, "t_embedder.mlp.0", 256, width);
  linear(shapes, "t_embedder.mlp.2", width, width);
  linear(shapes, "y_embedder.mlp.0", 2048, width);
  linear(shapes, "y_embedder.mlp.2", width, width);
  linear(shapes, "final_layer.linear", width, 64);
  linear(shapes, "final_layer.adaLN_modulation.1", width, 2 * width);
  for (let layer = 0; layer < layers; layer++) {
    const last = layer === layers - 1;
    const stream = (name: string, vectors: number, attentions: readonly string[], isLast: boolean) => {
      linear(shapes, `${name}.adaLN_modulation.1`, width, vectors * width);
      for (const attention of attentions) {
        linear(shapes, `${name}.${attention}.qkv`, width, 3 * width);
        if (!isLast) linear(shapes, `${name}.${attention}.proj`, width, width);
        if (qkNorm) for (const norm of ["ln_q", "ln_k"]) shapes[`${name}.${attention}.${norm}.weight`] = [64];
      }
      if (isLast) return;
      linear(shapes, `${name}.mlp.fc1`, width, 4 * width);
      linear(shapes, `${name}.mlp.fc2`, 4 * width, width);
    };
    const block = `joint_blocks.${layer}`;
    stream(`${block}.context_block`, last ? 2 : 6, ["attn"], last);
    stream(`${block}.x_block`, layer < dual ? 9 : 6, layer < dual ? ["attn", "attn2"] : ["attn"], false);
  }
  return shapes;
}

/** CLIP-L (width 768, 12 layers) or CLIP-G (width 1280, 32 layers). */
export function clipShapes(width: number, layers: number): Shapes {
  const shapes: Shapes = {
    "text_model.embeddings.token_embedding.weight": [49408, width],
    "text_model.embeddings.position_embedding.weight": [77, width],
    "text_projection.weight": [width, width],
  };
  const norm = (name: string) => Object.assign(shapes, { [`${name}.weight`]: [width], [`${name}.bias`]: [width] });
  for (let layer = 0; layer < layers; layer++) {
    const name = `text_model.encoder.layers.${layer}`;
    for (const each of ["layer_norm1", "layer_norm2"]) norm(`${name}.${each}`);
    for (const each of ["q_proj", "k_proj", "v_proj", "out_proj"])
      linear(shapes, `${name}.self_attn.${each}`, width, width);
    linear(shapes, `${name}.mlp.fc1`, width, 4 * width);
    linear(shapes, `${name}.mlp.fc2`, 4 * width, width);
  }
  norm("text_model.final_layer_norm");
  return shapes;
}

/** The encoder of T5 v1.1 XXL. */
export function t5Shapes(layers = 24): Shapes {
  const shapes: Shapes = { "shared.weight": [32128, 4096], "encoder.final_layer_norm.weight": [4096] };
  for (let layer = 0; layer < layers; layer++) {
    const name = `encoder.block.${layer}.layer`;
    for (const each of ["q", "k", "v", "o"]) linear(shapes, `${name}.0.SelfAttention.${each}`, 4096, 4096, false);
    if (layer === 0) shapes[`${name}.0.SelfAttention.relative_attention_bias.weight`] = [32, 64];
    for (const each of ["wi_0", "wi_1"]) linear(shapes, `${name}.1.DenseReluDense.${each}`, 4096, 10240, false);
    linear(shapes, `${name}.1.DenseReluDense.wo`, 10240, 4096, false);
    for (const each of [0, 1]) shapes[`${name}.${each}.layer_norm.weight`] = [4096];
  }
  return shapes;
}

/** The autoencoder of SD3 in the names of Stability's sd3_impls.py. */
export function vaeShapes(): Shapes {
  const channels = [128, 256, 512, 512];
  const shapes: Shapes = {};
  const conv = (name: string, from: number, to: number, kernel = 3) => {
    shapes[`${name}.weight`] = [to, from, kernel, kernel];
    shapes[`${name}.bias`] = [to];
  };
  const norm = (name: string, size: number) =>
    Object.assign(shapes, { [`${name}.weight`]: [size], [`${name}.bias`]: [size] });
  const resnet = (name: string, from: number, to: number) => {
    norm(`${name}.norm1`, from);
    conv(`${name}.conv1`, from, to);
    norm(`${name}.norm2`, to);
    conv(`${name}.conv2`, to, to);
    if (from !== to) conv(`${name}.nin_shortcut`, from, to, 1);
  };
  for (const half of ["encoder", "decoder"]) {
    for (const index of [1, 2]) resnet(`${half}.mid.block_${index}`, 512, 512);
    norm(`${half}.mid.attn_1.norm`, 512);
    for (const each of ["q", "k", "v", "proj_out"]) conv(`${half}.mid.attn_1.${each}`, 512, 512, 1);
  }
  conv("encoder.conv_in", 3, 128);
  for (const [level, to] of channels.entries()) {
    for (const block of [0, 1])
      resnet(`encoder.down.${level}.block.${block}`, block ? to : (channels[level - 1] ?? 128), to);
    if (level < 3) conv(`encoder.down.${level}.downsample.conv`, to, to);
  }
  norm("encoder.norm_out", 512);
  conv("encoder.conv_out", 512, 32);
  conv("decoder.conv_in", 16, 512);
  for (const [level, to] of channels.entries()) {
    for (const block of [0, 1, 2])
      resnet(`decoder.up.${level}.block.${block}`, block ? to : (channels[level + 1] ?? 512), to);
    if (level > 0) conv(`decoder.up.${level}.upsample.conv`, to, to);
  }
  norm("decoder.norm_out", 128);
  conv("decoder.conv_out", 128, 3);
  return shapes;
}

const prefixed = (prefix: string, shapes: Shapes): Shapes =>
  Object.fromEntries(Object.entries(shapes).map(([name, shape]) => [prefix + name, shape]));

/** As `sd3.5_medium_incl_clips` and its like; with T5 as `…_t5xxlfp16`. */
export function checkpointShapes(transformer: TransformerShape, { t5 = false } = {}): Shapes {
  return {
    ...prefixed("model.diffusion_model.", transformerShapes(transformer)),
    ...prefixed("text_encoders.clip_l.transformer.", clipShapes(768, 12)),
    ...prefixed("text_encoders.clip_g.transformer.", clipShapes(1280, 32)),
    ...(t5 ? prefixed("text_encoders.t5xxl.transformer.", t5Shapes()) : {}),
    ...prefixed("first_stage_model.", vaeShapes()),
  };
}

/**
 * Writes a file of bfloat16 tensors whose data are a hole, which reads as zeros and takes no space on the disk.
 * @param dtypes of tensors that are of another type of 16 bits
 * @returns its bytes
 */
export async function writeSparse(file: string, shapes: Shapes, dtypes: Record<string, string> = {}): Promise<number> {
  const { start, bytes } = headerOf(shapes, dtypes);
  const handle = await open(file, "w");
  try {
    await handle.write(start);
    await handle.truncate(bytes);
  } finally {
    await handle.close();
  }
  return bytes;
}
