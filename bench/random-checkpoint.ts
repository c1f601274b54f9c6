/**
 * Makes a checkpoint of SD3.5-medium's width with random bfloat16 weights in any number of layers, for measuring time
 * and memory where no real checkpoint can be had. Text encoders, tokenizers and VAE are the tiny ones of a fixture, so
 * that nearly all of the checkpoint is the transformer.
 */

import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import path from "node:path";
import { root } from "./support.js";

export interface RandomCheckpoint {
  readonly folder: string;
  /** Bytes of the transformer's file. */
  readonly bytes: number;
}

const heads = 24;
const headDim = 64;
const mediumWidth = heads * headDim;

/**
 * @param layers 6 layers are 0.99 GB
 * @param dual how many of them, from the first, have a second attention, as 13 of SD3.5-medium's 24 do; true: every one
 */
export async function randomCheckpoint(layers: number, dual: boolean | number = false): Promise<RandomCheckpoint> {
  const second = dual === true ? layers : Math.min(Number(dual), layers);
  const kind = dual === true ? "-dual" : second > 0 ? `-dual${second}` : "";
  const folder = path.join(root, "bench/.work", `medium-width-${layers}${kind}`);
  const fixture = path.join(root, "test/fixtures/medium/model");
  const config = JSON.parse(readFileSync(path.join(fixture, "transformer/config.json"), "utf8"));
  Object.assign(config, {
    num_layers: layers,
    num_attention_heads: heads,
    attention_head_dim: headDim,
    caption_projection_dim: mediumWidth,
    dual_attention_layers: Array.from({ length: second }, (_, layer) => layer),
    pos_embed_max_size: 96,
  });
  return writeOnce(folder, config, () => {
    cpSync(fixture, folder, { recursive: true });
    rmSync(path.join(folder, "refiner"), { recursive: true });
  });
}

/** The transformer of SD3.5-medium as it is published, with random weights: 4.9 GB. No other part. */
export function randomMedium(): Promise<RandomCheckpoint> {
  return writeOnce(path.join(root, "bench/.work/sd35-medium"), {
    _class_name: "SD3Transformer2DModel",
    sample_size: 128,
    patch_size: 2,
    in_channels: 16,
    out_channels: 16,
    num_layers: 24,
    attention_head_dim: headDim,
    num_attention_heads: heads,
    joint_attention_dim: 4096,
    caption_projection_dim: mediumWidth,
    pooled_projection_dim: 2048,
    pos_embed_max_size: 384,
    dual_attention_layers: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    qk_norm: "rms_norm",
  });
}

/** Shapes of tensors by name. */
export type Shapes = Record<string, readonly number[]>;

type Config = Record<string, unknown> & {
  num_layers: number;
  num_attention_heads: number;
  attention_head_dim: number;
  qk_norm: string | null;
  pos_embed_max_size: number;
  joint_attention_dim: number;
  pooled_projection_dim: number;
  dual_attention_layers: number[];
};

/** Writes transformer/ into `folder`, unless it was written before. @param others writes the other parts */
async function writeOnce(folder: string, config: Config, others?: () => void): Promise<RandomCheckpoint> {
  const file = path.join(folder, "transformer/diffusion_pytorch_model.safetensors");
  const tensors = tensorShapes(config);
  const { start, bytes } = headerOf(tensors);
  const stamp = createHash("sha256").update(start).digest("hex");
  const stampFile = path.join(folder, "stamp");
  if (existsSync(stampFile) && readFileSync(stampFile, "utf8") === stamp) return { folder, bytes };

  rmSync(folder, { recursive: true, force: true });
  mkdirSync(path.join(folder, "transformer"), { recursive: true });
  others?.();
  writeFileSync(path.join(folder, "transformer/config.json"), JSON.stringify(config, null, 2));
  await writeRandom(file, tensors);
  writeFileSync(stampFile, stamp);
  return { folder, bytes };
}

/**
 * The header of a .safetensors file of bfloat16 tensors, one behind the other.
 * @param dtypes of tensors that are of another type of 16 bits
 * @returns what stands before the tensors, and the bytes of the whole file
 */
export function headerOf(tensors: Shapes, dtypes: Record<string, string> = {}): { start: Buffer; bytes: number } {
  const header: Record<string, unknown> = {};
  let offset = 0;
  for (const [name, shape] of Object.entries(tensors)) {
    const end = offset + 2 * shape.reduce((a, b) => a * b, 1);
    header[name] = { dtype: dtypes[name] ?? "BF16", shape, data_offsets: [offset, end] };
    offset = end;
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return { start: Buffer.concat([length, json]), bytes: 8 + json.length + offset };
}

/** Writes a .safetensors file with random bfloat16 weights. @returns its bytes */
export async function writeRandom(file: string, tensors: Shapes): Promise<number> {
  const { start, bytes } = headerOf(tensors);
  const handle = await open(file, "w");
  try {
    await handle.write(start);
    // One block of small values again and again: their order does not matter, their size keeps the network finite.
    const block = randomBlock(2 ** 22);
    for (let left = bytes - start.length; left > 0; left -= block.length)
      await handle.write(block.subarray(0, Math.min(left, block.length)));
  } finally {
    await handle.close();
  }
  return bytes;
}

/** bfloat16 values, uniform in ±0.02, from a fixed linear congruential generator. */
function randomBlock(bytes: number): Buffer {
  const values = new Float32Array(bytes / 2);
  let state = 1;
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    values[i] = (state / 2 ** 32 - 0.5) * 0.04;
  }
  const words = new Uint16Array(values.buffer);
  const block = Buffer.alloc(bytes);
  for (let i = 0; i < values.length; i++) block.writeUInt16LE(words[2 * i + 1]!, 2 * i);
  return block;
}

/** The transformer's tensors, under diffusers' names. */
export function tensorShapes(config: Config): Shapes {
  const layers = config.num_layers;
  const width = config.num_attention_heads * config.attention_head_dim;
  const shapes: Shapes = {
    "pos_embed.pos_embed": [1, config.pos_embed_max_size ** 2, width],
    "pos_embed.proj.weight": [width, 16, 2, 2],
    "pos_embed.proj.bias": [width],
  };
  const linear = (name: string, from: number, to: number) => {
    shapes[`${name}.weight`] = [to, from];
    shapes[`${name}.bias`] = [to];
  };
  linear("context_embedder", config.joint_attention_dim, width);
  linear("time_text_embed.timestep_embedder.linear_1", 256, width);
  linear("time_text_embed.timestep_embedder.linear_2", width, width);
  linear("time_text_embed.text_embedder.linear_1", config.pooled_projection_dim, width);
  linear("time_text_embed.text_embedder.linear_2", width, width);
  linear("norm_out.linear", width, 2 * width);
  linear("proj_out", width, 64);
  for (let layer = 0; layer < layers; layer++) {
    const block = `transformer_blocks.${layer}`;
    const last = layer === layers - 1;
    const dual = config.dual_attention_layers.includes(layer);
    linear(`${block}.norm1.linear`, width, (dual ? 9 : 6) * width);
    linear(`${block}.norm1_context.linear`, width, (last ? 2 : 6) * width);
    for (const part of ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"])
      linear(`${block}.attn.${part}`, width, width);
    if (!last) linear(`${block}.attn.to_add_out`, width, width);
    const norms = config.qk_norm === null ? [] : ["norm_q", "norm_k", "norm_added_q", "norm_added_k"];
    for (const norm of norms) shapes[`${block}.attn.${norm}.weight`] = [config.attention_head_dim];
    if (dual) for (const part of ["to_q", "to_k", "to_v", "to_out.0"]) linear(`${block}.attn2.${part}`, width, width);
    if (dual)
      for (const norm of ["norm_q", "norm_k"]) shapes[`${block}.attn2.${norm}.weight`] = [config.attention_head_dim];
    for (const part of last ? ["ff"] : ["ff", "ff_context"]) {
      linear(`${block}.${part}.net.0.proj`, width, 4 * width);
      linear(`${block}.${part}.net.2`, 4 * width, width);
    }
  }
  return shapes;
}
