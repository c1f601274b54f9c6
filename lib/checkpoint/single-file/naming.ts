/**
 * How checkpoints in one file name their tensors, as a table: for each part its prefixes, and the rules from a file's names to those of
 * diffusers and transformers, which the networks ask for. The names are Stability's (sd3-ref), which ComfyUI keeps; a transformer may also
 * have diffusers' own. In a rule "#" stands for a number, "~" for one that is counted from the other end, and what follows the
 * rule's text (".weight", ".bias", a scale) stays.
 */

import { CheckpointError } from "../../errors.js";
import type { HeaderEntry, SafetensorsHeader } from "../safetensors.js";

/** A part that a file can hold. */
export type FilePart = "transformer" | "vae" | "textEncoder" | "textEncoder2" | "textEncoder3";

interface Rule {
  readonly from: string;
  /** Several for a tensor whose rows are those of several, one after another. */
  readonly to: readonly string[];
  /** Convolutions of 1 × 1 that are linear layers for diffusers: [C, C, 1, 1] → [C, C]. */
  readonly isPointwise?: boolean;
}

interface Naming {
  /** How names begin that only this naming has. */
  readonly marker: string;
  readonly rules: readonly Rule[];
  /** What "~" counts: blocks numbered behind this beginning. */
  readonly counted?: string;
  /** Linear layers that give (shift, scale) where diffusers' give (scale, shift). @param last number of the last block */
  readonly reversedHalves?: (last: number) => readonly string[];
}

interface PartNaming {
  /** In the order in which they are tried. */
  readonly prefixes: readonly string[];
  readonly namings: readonly Naming[];
  /** Linear layers that files may leave out where they are the identity. */
  readonly identities?: readonly string[];
}

const rule = (from: string, ...to: string[]): Rule => ({ from, to });
const same = (...names: string[]): Rule[] => names.map((name) => rule(name, name));

/** In a part of any naming: ComfyUI's mark of scaled 8-bit weights. */
const marks = same("scaled_fp8");

/** The two streams of a block, as Stability and diffusers name their layers. */
const x = "joint_blocks.#.x_block";
const context = "joint_blocks.#.context_block";
const block = "transformer_blocks.#";

const stabilityTransformer: Naming = {
  ...{ marker: "joint_blocks.", counted: "joint_blocks" },
  reversedHalves: (last) => ["norm_out.linear", `transformer_blocks.${last}.norm1_context.linear`],
  rules: [
    rule("pos_embed", "pos_embed.pos_embed"),
    rule("x_embedder.proj", "pos_embed.proj"),
    rule("context_embedder", "context_embedder"),
    rule("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    rule("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    rule("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    rule("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    rule("final_layer.adaLN_modulation.1", "norm_out.linear"),
    rule("final_layer.linear", "proj_out"),
    rule(`${x}.adaLN_modulation.1`, `${block}.norm1.linear`),
    rule(`${context}.adaLN_modulation.1`, `${block}.norm1_context.linear`),
    rule(`${x}.attn.qkv`, ...["to_q", "to_k", "to_v"].map((name) => `${block}.attn.${name}`)),
    rule(`${x}.attn.proj`, `${block}.attn.to_out.0`),
    rule(`${x}.attn.ln_q`, `${block}.attn.norm_q`),
    rule(`${x}.attn.ln_k`, `${block}.attn.norm_k`),
    rule(`${x}.attn2.qkv`, ...["to_q", "to_k", "to_v"].map((name) => `${block}.attn2.${name}`)),
    rule(`${x}.attn2.proj`, `${block}.attn2.to_out.0`),
    rule(`${x}.attn2.ln_q`, `${block}.attn2.norm_q`),
    rule(`${x}.attn2.ln_k`, `${block}.attn2.norm_k`),
    rule(`${context}.attn.qkv`, ...["add_q_proj", "add_k_proj", "add_v_proj"].map((name) => `${block}.attn.${name}`)),
    rule(`${context}.attn.proj`, `${block}.attn.to_add_out`),
    rule(`${context}.attn.ln_q`, `${block}.attn.norm_added_q`),
    rule(`${context}.attn.ln_k`, `${block}.attn.norm_added_k`),
    rule(`${x}.mlp.fc1`, `${block}.ff.net.0.proj`),
    rule(`${x}.mlp.fc2`, `${block}.ff.net.2`),
    rule(`${context}.mlp.fc1`, `${block}.ff_context.net.0.proj`),
    rule(`${context}.mlp.fc2`, `${block}.ff_context.net.2`),
  ],
};

const diffusersTransformer: Naming = {
  marker: "transformer_blocks.",
  rules: same("pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out", "transformer_blocks"),
};

/** The layers of each half of an autoencoder that have a number nowhere. */
const middle = (half: string): Rule[] => [
  rule(`${half}.mid.block_1.nin_shortcut`, `${half}.mid_block.resnets.0.conv_shortcut`),
  rule(`${half}.mid.block_1`, `${half}.mid_block.resnets.0`),
  rule(`${half}.mid.block_2`, `${half}.mid_block.resnets.1`),
  rule(`${half}.mid.attn_1.norm`, `${half}.mid_block.attentions.0.group_norm`),
  ...["q", "k", "v", "proj_out"].map((name): Rule => {
    const to = name === "proj_out" ? "to_out.0" : `to_${name}`;
    return { ...rule(`${half}.mid.attn_1.${name}`, `${half}.mid_block.attentions.0.${to}`), isPointwise: true };
  }),
  rule(`${half}.norm_out`, `${half}.conv_norm_out`),
  ...same(`${half}.conv_in`, `${half}.conv_out`),
];

const stabilityVae: Naming = {
  ...{ marker: "decoder.up.", counted: "decoder.up" },
  rules: [
    ...middle("encoder"),
    ...middle("decoder"),
    rule("encoder.down.#.block.#.nin_shortcut", "encoder.down_blocks.#.resnets.#.conv_shortcut"),
    rule("encoder.down.#.block.#", "encoder.down_blocks.#.resnets.#"),
    rule("encoder.down.#.downsample.conv", "encoder.down_blocks.#.downsamplers.0.conv"),
    rule("decoder.up.#.block.#.nin_shortcut", "decoder.up_blocks.~.resnets.#.conv_shortcut"),
    rule("decoder.up.#.block.#", "decoder.up_blocks.~.resnets.#"),
    rule("decoder.up.#.upsample.conv", "decoder.up_blocks.~.upsamplers.0.conv"),
    ...same("quant_conv", "post_quant_conv"),
  ],
};

const diffusersVae: Naming = {
  marker: "decoder.up_blocks.",
  rules: same("encoder", "decoder", "quant_conv", "post_quant_conv"),
};

const clip: readonly Naming[] = [{ marker: "text_model.", rules: same("text_model", "text_projection") }];
const t5: readonly Naming[] = [{ marker: "encoder.", rules: same("shared", "encoder") }];

const namings: { readonly [Name in FilePart]: PartNaming } = {
  transformer: {
    prefixes: ["model.diffusion_model.", "diffusion_model.", ""],
    namings: [stabilityTransformer, diffusersTransformer],
  },
  vae: { prefixes: ["first_stage_model."], namings: [stabilityVae, diffusersVae] },
  // Some of Stability's files have no projection for CLIP-L, for which ComfyUI and diffusers take the identity.
  textEncoder: { prefixes: ["text_encoders.clip_l.transformer."], namings: clip, identities: ["text_projection"] },
  textEncoder2: { prefixes: ["text_encoders.clip_g.transformer."], namings: clip },
  textEncoder3: { prefixes: ["text_encoders.t5xxl.transformer."], namings: t5 },
};

export const fileParts = Object.keys(namings) as FilePart[];

/** The tensors of one part of a file. */
export interface NamedTensors {
  /** By the names that the networks ask for; each entry's own name is the file's, and its place is that of its rows. */
  readonly entries: ReadonlyMap<string, HeaderEntry>;
  readonly reversedHalves: ReadonlySet<string>;
  readonly identities: ReadonlySet<string>;
  /** Names in the file of those that are read. */
  readonly read: ReadonlySet<string>;
  /** What a tensor is called in the file, or would be. */
  storedName(name: string): string;
}

/** Tensors of no part that no picture needs. */
const unneeded = /(^|\.)(logit_scale|position_ids|scaled_fp8|spiece_model)$/;

/** Names of tensors that none of these parts has, and that something may be missing without. */
export function leftOver(header: SafetensorsHeader, parts: readonly (NamedTensors | null)[]): string[] {
  return [...header.keys()].filter((name) => !parts.some((part) => part?.read.has(name)) && !unneeded.test(name));
}

/** How a naming calls a layer of a network. */
export interface LayerSpelling {
  /** Without prefix, such as "joint_blocks.0.x_block.attn.qkv". */
  readonly stored: string;
  /** The layers whose rows it holds, one after another, by the names of diffusers and transformers. */
  readonly layers: readonly string[];
  /** Whether its halves of rows are the other way round. */
  readonly isReversed: boolean;
}

/**
 * What a layer of a part is called in each naming that has it.
 * @param layer by the name of diffusers or transformers, without ".weight"
 * @param last number of the part's last block
 */
export function spellingsOf(part: FilePart, layer: string, last: number): LayerSpelling[] {
  return namings[part].namings.flatMap(({ rules, reversedHalves }) => {
    const isReversed = reversedHalves?.(last).includes(layer) ?? false;
    for (const { from, to } of rules)
      for (const each of to) {
        const stored = renamed(layer, each, from, last);
        if (stored !== null)
          return { stored, isReversed, layers: to.map((other) => renamed(layer, each, other, last)!) };
      }
    return [];
  });
}

/** @returns null if the file has no such part. @throws CheckpointError for a tensor that cannot be divided as its name says */
export function namedTensors(file: string, header: SafetensorsHeader, part: FilePart): NamedTensors | null {
  const keys = [...header.keys()];
  const { prefixes, namings: known, identities = [] } = namings[part];
  for (const prefix of prefixes)
    for (const naming of known)
      if (keys.some((key) => key.startsWith(prefix + naming.marker))) {
        const tensors = translate(file, header, prefix, naming);
        const names = [...tensors.entries.keys()];
        const absent = identities.filter((layer) => !names.some((name) => name.startsWith(layer)));
        // A tensor of this part under a name that it does not have may be the layer: it is missing then, and no identity.
        const isWhole = keys.every((key) => !key.startsWith(prefix) || tensors.read.has(key) || unneeded.test(key));
        return { ...tensors, identities: new Set(isWhole ? absent : []) };
      }
  return null;
}

function translate(file: string, header: SafetensorsHeader, prefix: string, naming: Naming) {
  const own = [...header.values()].filter(({ name }) => name.startsWith(prefix));
  const last = lastBlock(
    own.map(({ name }) => name.slice(prefix.length)),
    naming.counted,
  );
  const entries = new Map<string, HeaderEntry>();
  for (const entry of own) {
    const name = entry.name.slice(prefix.length);
    for (const { from, to, isPointwise } of [...naming.rules, ...marks]) {
      const names = to.map((each) => renamed(name, from, each, last));
      if (names[0] === null) continue;
      const { shape } = entry;
      const whole = isPointwise && shape.length === 4 ? { ...entry, shape: linearShape(shape) } : entry;
      for (const [index, each] of names.entries()) entries.set(each!, rowsOf(file, whole, index, names.length));
      break;
    }
  }
  return {
    entries,
    read: new Set([...entries.values()].map(({ name }) => name)),
    reversedHalves: new Set(naming.reversedHalves?.(last)),
    storedName(name: string) {
      for (const { from, to } of naming.rules)
        for (const each of to) {
          const stored = renamed(name, each, from, last);
          if (stored !== null) return prefix + stored;
        }
      return prefix + name;
    },
  };
}

/** A shape without its two sizes of 1 at the end; another one as it is, which then does not fit where it is used. */
const linearShape = (shape: readonly number[]) => (shape[2] === 1 && shape[3] === 1 ? shape.slice(0, 2) : shape);

/** The largest number behind a beginning; 0 without one. */
function lastBlock(names: readonly string[], counted: string | undefined): number {
  if (counted === undefined) return 0;
  const numbers = names.map((name) => Number(expression(`${counted}.#`).exec(name)?.[1] ?? 0));
  return numbers.reduce((largest, number) => Math.max(largest, number), 0);
}

/** A name in the form of another template, or null where it does not have the form of the first. */
function renamed(name: string, from: string, to: string, last: number): string | null {
  const match = expression(from).exec(name);
  if (!match) return null;
  const numbers = match.slice(1, -1);
  // Counted from the other end twice is counted as before, so that rules can be read both ways.
  const isReversed = from.includes("~") !== to.includes("~");
  const counted = numbers.map((number, index) => (isReversed && index === 0 ? last - Number(number) : number));
  return to.replace(/[#~]/g, () => String(counted.shift())) + (match.at(-1) ?? "");
}

const expressions = new Map<string, RegExp>();

/** Numbers have no zeros before them, so that no two names become one. */
function expression(template: string): RegExp {
  let known = expressions.get(template);
  if (!known) {
    const pattern = template.replaceAll(".", "\\.").replace(/[#~]/g, "(0|[1-9]\\d{0,3})");
    known = new RegExp(`^${pattern}(\\..+)?$`);
    expressions.set(template, known);
  }
  return known;
}

/** Tensors with a row for each of a layer's outputs. What else stands beside a weight (how it is quantised) is about all of it. */
const hasRows = /\.(weight|bias|scale_weight|weight_scale|SCB)$/;

/** The rows of a tensor that are the `index`-th of `parts` equal ones. What is one value for all rows is the same for each part. */
function rowsOf(file: string, entry: HeaderEntry, index: number, parts: number): HeaderEntry {
  const { name, dtype, shape, offset, length } = entry;
  const [rows, ...rest] = shape;
  if (parts === 1 || rows === undefined || shape.every((size) => size === 1) || !hasRows.test(name)) return entry;
  // What is packed into bytes has no rows to divide; its quantisation is named where it is looked for.
  if (dtype === "U8") return entry;
  if (rows % parts !== 0)
    throw new CheckpointError(
      file,
      `${file}: the tensor "${name}" holds the rows of ${parts} layers, but its shape is [${shape.join(", ")}]: ${rows} is no multiple of ${parts}. ` +
        "The file is damaged: download or convert it again.",
    );
  return {
    ...entry,
    shape: [rows / parts, ...rest],
    offset: offset + (length / parts) * index,
    length: length / parts,
  };
}
