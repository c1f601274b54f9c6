/**
 * The layers of a checkpoint that a LoRA can change, by all that files call them: the names of diffusers and transformers, Stability's, and
 * either with underscores for dots. Where the dots were cannot be told from a name with underscores, so that every name is looked up
 * among those of the checkpoint's own layers.
 */

import type { Checkpoint } from "../checkpoint.js";
import { type FilePart, spellingsOf } from "../single-file/naming.js";
import type { Weights } from "../weights.js";

/** Parts that LoRAs change. */
export const loraParts = ["transformer", "textEncoder", "textEncoder2", "textEncoder3"] as const;
export type LoraPart = (typeof loraParts)[number];

/** A layer of a part: its weight is a matrix, or the kernel of a convolution. */
export interface LoraLayer {
  /** By the name of diffusers or transformers, without ".weight". */
  readonly name: string;
  /** Of the weight. */
  readonly shape: readonly number[];
}

/** What a name in a file stands for. */
export interface LoraTarget {
  readonly part: LoraPart;
  /** Several where the file's layer holds the rows of several, one after another. */
  readonly layers: readonly LoraLayer[];
  /** Whether the file has the halves of the rows the other way round than the checkpoint. */
  readonly isReversed: boolean;
}

/** What may be before a layer's name: with dots, where several may follow each other, and with underscores. */
const prefixes: Readonly<Record<LoraPart, { readonly dotted: RegExp; readonly underscored: RegExp }>> = {
  transformer: {
    dotted: /^((base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet)\.)*/,
    underscored: /^(lora_unet_|lora_transformer_|lycoris_)/,
  },
  textEncoder: {
    dotted: /^(text_encoder|text_encoders\.clip_l\.transformer|clip_l\.transformer)\.(base_model\.model\.)?/,
    underscored: /^lora_te1?_/,
  },
  textEncoder2: {
    dotted: /^(text_encoder_2|text_encoders\.clip_g\.transformer|clip_g\.transformer)\.(base_model\.model\.)?/,
    underscored: /^lora_te2_/,
  },
  textEncoder3: {
    dotted: /^(text_encoder_3|text_encoders\.t5xxl\.transformer|t5xxl\.transformer)\.(base_model\.model\.)?/,
    underscored: /^lora_te3_/,
  },
};

/** What each part is called in messages. */
export const partTitles: Readonly<Record<LoraPart, string>> = {
  transformer: "transformer",
  textEncoder: "first text encoder (CLIP-L)",
  textEncoder2: "second text encoder (CLIP-G)",
  textEncoder3: "third text encoder (T5)",
};

/** Tables, whose rows are looked up: no product is computed with them. */
const tables = /(^|\.)(token_embedding|position_embedding|relative_attention_bias|shared|embed_tokens)$/;

/** Layers of CLIP as the oldest files of diffusers call them. */
const oldClip: readonly (readonly [RegExp, string])[] = [
  [/\.to_([qkv])$/, ".$1_proj"],
  [/\.to_out$/, ".out_proj"],
];

const underscored = (name: string) => name.replaceAll(".", "_");

/** Finds what names in files stand for. */
export class LoraLayers {
  readonly #byName: Readonly<Partial<Record<LoraPart, ReadonlyMap<string, LoraTarget>>>>;

  constructor(checkpoint: Checkpoint) {
    this.#byName = Object.fromEntries(
      loraParts.flatMap((part) => {
        const weights = checkpoint[part]?.weights;
        return weights ? [[part, targetsOf(part, weights)]] : [];
      }),
    );
  }

  /**
   * @param stored a layer's name in a file, with all that is before it
   * @returns the part that the name is of by what it begins with, and the layers, null where the part has none of that name or the
   *   checkpoint has no such part
   */
  find(stored: string): { readonly part: LoraPart; readonly target: LoraTarget | null } {
    for (const part of [...loraParts].reverse()) {
      const { dotted, underscored: start } = prefixes[part];
      const known = this.#byName[part];
      if (start.test(stored)) return { part, target: known?.get(stored.replace(start, "")) ?? null };
      // What has no prefix at all is the transformer's.
      if (!dotted.test(stored)) continue;
      const name = stored.replace(dotted, "");
      return {
        part,
        target:
          spelled(part, name)
            .map((each) => known?.get(each))
            .find(Boolean) ?? null,
      };
    }
    throw new RangeError("Every name is of some part.");
  }

  /** Whether the checkpoint has a part. */
  has(part: LoraPart): boolean {
    return this.#byName[part] !== undefined;
  }
}

/** The names that a layer may have been meant by. */
function spelled(part: LoraPart, name: string): string[] {
  if (part === "transformer") return [name, `${name}.0`];
  if (part === "textEncoder3") return [name];
  const renamed = oldClip.reduce((each, [from, to]) => each.replace(from, to), name);
  return [renamed, `text_model.${renamed}`];
}

function targetsOf(part: LoraPart & FilePart, weights: Weights): Map<string, LoraTarget> {
  const layers = new Map<string, LoraLayer>();
  for (const stored of weights.names) {
    const name = stored.replace(/\.weight$/, "");
    const shape = name === stored || tables.test(name) ? undefined : weights.find(stored)?.shape;
    if (shape && shape.length > 1) layers.set(name, { name, shape });
  }
  const blocks = [...layers.keys()].map((name) => Number(/^transformer_blocks\.(\d+)\./.exec(name)?.[1] ?? 0));
  const last = blocks.reduce((most, block) => Math.max(most, block), 0);
  const targets = new Map<string, LoraTarget>();
  for (const layer of layers.keys())
    for (const { stored, layers: names, isReversed } of spellingsOf(part, layer, last)) {
      const found = names.map((name) => layers.get(name));
      if (!found.every((each) => each !== undefined)) continue;
      // Both may be in Stability's order, which is then the order of both.
      const isOther = isReversed !== (weights.reversedHalves?.has(layer) ?? false);
      const target = { part, layers: found, isReversed: isOther };
      for (const name of [stored, underscored(stored)]) targets.set(name, target);
    }
  return targets;
}
