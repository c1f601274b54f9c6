// LoRAs as tests make them: matrices by layer, and files of them in the names of each trainer. Stability's names are written out here, apart from
// the package's own table.
import { f32, type RawTensor } from "./quantised.js";

/** Of one layer of the transformer. */
export interface Adapter {
  /** [rank, in] */
  readonly down: Float32Array;
  /** [out, rank] */
  readonly up: Float32Array;
  readonly rank: number;
  readonly alpha: number;
}

/** Layers by diffusers' names. */
export type Adapters = ReadonlyMap<string, Adapter>;

/** Shapes of the layer's matrices. A kernel of [out, channels, side, side] has its first matrix in that form. */
function shapesOf({ down, up, rank }: Adapter, kernel: readonly number[] | null) {
  return {
    down: kernel ? [rank, ...kernel] : [rank, down.length / rank],
    up: kernel ? [up.length / rank, rank, 1, 1] : [up.length / rank, rank],
  };
}

/** diffusers' layer → Stability's; of q, k and v the one that holds them, with their place. */
export function stabilityName(layer: string): { readonly name: string; readonly place: number | null } {
  const outside: Record<string, string> = {
    "pos_embed.proj": "x_embedder.proj",
    context_embedder: "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    proj_out: "final_layer.linear",
  };
  const inside: Record<string, string> = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
  };
  if (outside[layer]) return { name: outside[layer], place: null };
  const [, block, rest] = /^transformer_blocks\.(\d+)\.(.+)$/.exec(layer)!;
  const head = `joint_blocks.${block}.`;
  if (inside[rest!]) return { name: head + inside[rest!], place: null };
  const [, attention, own, added] = /^(attn2?)\.(?:to_([qkv])|add_([qkv])_proj)$/.exec(rest!)!;
  const stream = own ? "x_block" : "context_block";
  return { name: `${head}${stream}.${attention}.qkv`, place: "qkv".indexOf((own ?? added)!) };
}

/** How a trainer's file is written. */
export interface Dialect {
  readonly title: string;
  /** Whether layers have Stability's names, with q, k and v in one. */
  readonly isStability: boolean;
  /** The beginning of a name, of the layer's. */
  readonly layer: (name: string) => string;
  readonly down: string;
  readonly up: string;
  /** Whether alphas are tensors; otherwise they are in diffusers' metadata. */
  readonly hasAlphas: boolean;
}

const underscored = (name: string) => name.replaceAll(".", "_");
const peft = { down: "lora_A.weight", up: "lora_B.weight" };
const kohya = { down: "lora_down.weight", up: "lora_up.weight", hasAlphas: true };

export const dialects: readonly Dialect[] = [
  { title: "diffusers", isStability: false, layer: (name) => `transformer.${name}.`, ...peft, hasAlphas: false },
  { title: "PEFT", isStability: false, layer: (name) => `base_model.model.${name}.`, ...peft, hasAlphas: true },
  {
    ...{ title: "PEFT with the adapter's name", isStability: false, layer: (name: string) => `${name}.` },
    ...{ down: "lora_A.default.weight", up: "lora_B.default.weight", hasAlphas: true },
  },
  {
    ...{ title: "older diffusers", isStability: false, layer: (name: string) => `transformer.${name}.` },
    ...{ down: "lora.down.weight", up: "lora.up.weight", hasAlphas: true },
  },
  { title: "OneTrainer", isStability: false, layer: (name) => `lora_transformer_${underscored(name)}.`, ...kohya },
  { title: "SimpleTuner's LyCORIS", isStability: false, layer: (name) => `lycoris_${underscored(name)}.`, ...kohya },
  { title: "sd-scripts", isStability: true, layer: (name) => `lora_unet_${underscored(name)}.`, ...kohya },
  {
    ...{ title: "ComfyUI, ai-toolkit", isStability: true, layer: (name: string) => `diffusion_model.${name}.` },
    ...{ ...peft, hasAlphas: true },
  },
];

/** Layers that Stability has with halves (shift, scale) where diffusers has (scale, shift). */
const isReversed = (layer: string, blocks: number) =>
  layer === "norm_out.linear" || layer === `transformer_blocks.${blocks - 1}.norm1_context.linear`;

function swapped(up: Float32Array): Float32Array {
  const half = up.length / 2;
  return Float32Array.from([...up.subarray(half), ...up.subarray(0, half)]);
}

/**
 * Tensors and metadata of adapters in a dialect. q, k and v in one are stacked, with zeros beside each part; those without an adapter take no rank.
 * @param kernels shapes behind the first size of weights that are no matrices
 */
export function inDialect(
  adapters: Adapters,
  dialect: Dialect,
  { blocks, kernels }: { readonly blocks: number; readonly kernels: Readonly<Record<string, readonly number[]>> },
): { tensors: Record<string, RawTensor>; metadata: Record<string, string> | undefined } {
  const tensors: Record<string, RawTensor> = {};
  const put = (name: string, adapter: Adapter, kernel: readonly number[] | null) => {
    const shapes = shapesOf(adapter, kernel);
    tensors[dialect.layer(name) + dialect.down] = f32(shapes.down, adapter.down);
    tensors[dialect.layer(name) + dialect.up] = f32(shapes.up, adapter.up);
    if (dialect.hasAlphas) tensors[`${dialect.layer(name)}alpha`] = f32([], [adapter.alpha]);
  };
  if (!dialect.isStability) {
    for (const [layer, adapter] of adapters) put(layer, adapter, kernels[layer] ?? null);
    const alphas = Object.fromEntries([...adapters].map(([layer, { alpha }]) => [`^${layer}`, alpha]));
    const ranks = Object.fromEntries([...adapters].map(([layer, { rank }]) => [`^${layer}`, rank]));
    const settings = { r: 1, lora_alpha: 1, alpha_pattern: alphas, rank_pattern: ranks };
    const fields = Object.fromEntries(Object.entries(settings).map(([key, value]) => [`transformer.${key}`, value]));
    return { tensors, metadata: dialect.hasAlphas ? undefined : { lora_adapter_metadata: JSON.stringify(fields) } };
  }
  const fused = new Map<string, (Adapter | null)[]>();
  for (const [layer, adapter] of adapters) {
    const { name, place } = stabilityName(layer);
    if (place === null)
      put(name, isReversed(layer, blocks) ? { ...adapter, up: swapped(adapter.up) } : adapter, kernels[layer] ?? null);
    else {
      const parts = fused.get(name) ?? [null, null, null];
      parts[place] = adapter;
      fused.set(name, parts);
    }
  }
  for (const [name, parts] of fused) put(name, stacked(parts), null);
  return { tensors, metadata: undefined };
}

/** Three of equal width in one. Their alpha / r have to be the same. */
function stacked(parts: readonly (Adapter | null)[]): Adapter {
  const some = parts.find((part) => part !== null)!;
  const rank = parts.reduce((sum, part) => sum + (part?.rank ?? 0), 0);
  const rows = some.up.length / some.rank;
  const up = new Float32Array(3 * rows * rank);
  let column = 0;
  for (const [place, part] of parts.entries()) {
    if (!part) continue;
    for (let row = 0; row < rows; row++)
      up.set(part.up.subarray(row * part.rank, (row + 1) * part.rank), (place * rows + row) * rank + column);
    column += part.rank;
  }
  const down = Float32Array.from(parts.flatMap((part) => [...(part?.down ?? [])]));
  return { down, up, rank, alpha: (some.alpha / some.rank) * rank };
}
