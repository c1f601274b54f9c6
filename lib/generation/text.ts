/**
 * Prompts to the condition that the transformer reads. Each prompt is encoded once and kept in a bounded cache, alone:
 * whether it was a prompt or a negative prompt, and in whose company, does not matter. Launches that are pinned to a batch
 * promise the same bits whatever came before, and so have entries of their own.
 *
 *   context [T_clip + T_t5, joint]  CLIP-L ⊕ CLIP-G along the channels, zero-padded to `joint`, then T5 along the tokens
 *   pooled  [pooled]                CLIP-L ⊕ CLIP-G projections
 */

import type { Checkpoint, Tokenizer } from "../checkpoint/index.js";
import { LruCache } from "../common/lru-cache.js";
import { type FloatTensor, float32, int64, type Tensor } from "../common/tensor.js";
import { type ClipConfig, relativeBuckets } from "../networks/index.js";
import type { Constant, Instruction, Program, Register } from "../program/program.js";

export interface EncodedPrompt {
  /** [tokens, joint], row-major. */
  readonly context: Float32Array;
  /** [pooled] */
  readonly pooled: Float32Array;
  /** One message for each tokenizer that had to cut the prompt. */
  readonly warnings: readonly string[];
}

/** Runs programs over the text encoders' graphs, one for each text; they may share launches. */
export type RunEncoders = (programs: readonly Program[]) => Promise<Record<string, Tensor>[]>;

/** Memory that cached conditions may take: a dozen prompts of SD3.5, thousands of the embedded model's. */
const cacheBytes = 128 * 2 ** 20;

export class PromptEncoder {
  readonly #checkpoint: Checkpoint;
  readonly #cache = new LruCache<EncodedPrompt>(
    cacheBytes,
    ({ context, pooled }) => context.byteLength + pooled.byteLength,
  );
  /** By sequence length: the same array for all texts, so that they may share launches. */
  readonly #buckets = new Map<number, Constant>();

  constructor(checkpoint: Checkpoint) {
    this.#checkpoint = checkpoint;
  }

  /** The longest T5 part that the tokenizer allows; 512 without T5, whose part is then zeros. */
  get maxSequenceLength(): number {
    return Math.min(512, this.#checkpoint.tokenizer3?.maxLength ?? 512);
  }

  /** As diffusers: 256, or what the tokenizer takes if that is less. */
  get defaultSequenceLength(): number {
    return Math.min(256, this.maxSequenceLength);
  }

  /** Rows of the context for a T5 part of `sequenceLength` tokens. */
  contextTokens(sequenceLength: number): number {
    return this.#clipTokens + sequenceLength;
  }

  get #clips(): { graph: string; tokenizer: Tokenizer; config: ClipConfig }[] {
    const { tokenizer, tokenizer2, textEncoder, textEncoder2 } = this.#checkpoint;
    return [
      ...(tokenizer && textEncoder ? [{ graph: "clip_l", tokenizer, config: textEncoder.config }] : []),
      ...(tokenizer2 && textEncoder2 ? [{ graph: "clip_g", tokenizer: tokenizer2, config: textEncoder2.config }] : []),
    ];
  }

  /** Both CLIP encoders see the same number of tokens (77). */
  get #clipTokens(): number {
    return this.#clips[0]!.tokenizer.maxLength;
  }

  /** How many of the texts are not in the cache. @param pin batch that all launches are padded to */
  missing(texts: readonly string[], sequenceLength: number, pin: number | null = null): number {
    return [...new Set(texts)].filter((text) => !this.#cache.has(keyOf(text, sequenceLength, pin))).length;
  }

  /**
   * Encodes the texts that the cache does not hold, each by a program of its own, and returns all, in order.
   * @param pin batch that all launches are padded to
   */
  async encode(
    texts: readonly string[],
    sequenceLength: number,
    run: RunEncoders,
    pin: number | null = null,
  ): Promise<EncodedPrompt[]> {
    const found = new Map<string, EncodedPrompt>();
    const missing: string[] = [];
    for (const text of new Set(texts)) {
      const known = this.#cache.get(keyOf(text, sequenceLength, pin));
      if (known) found.set(text, known);
      else missing.push(text);
    }
    if (missing.length > 0) {
      const planned = missing.map((text) => this.program(text, sequenceLength));
      const results = await run(planned.map(({ program }) => program));
      for (const [index, text] of missing.entries()) {
        const encoded = this.#assemble(results[index]!, planned[index]!.warnings, sequenceLength);
        found.set(text, encoded);
        this.#cache.set(keyOf(text, sequenceLength, pin), encoded);
      }
    }
    return texts.map((text) => found.get(text)!);
  }

  /** The conditions of several prompts as tensors [rows, tokens, joint] and [rows, pooled]. */
  stack(prompts: readonly EncodedPrompt[]): { context: FloatTensor; pooled: FloatTensor } {
    const { jointAttentionDim: joint } = this.#checkpoint.transformer.config;
    const pooled = concatenate(prompts.map((prompt) => prompt.pooled));
    const context = concatenate(prompts.map((prompt) => prompt.context));
    const rows = prompts.length;
    return {
      context: float32([rows, context.length / rows / joint, joint], context),
      pooled: float32([rows, pooled.length / rows], pooled),
    };
  }

  /** The program that encodes one text. */
  program(text: string, sequenceLength: number): { readonly program: Program; readonly warnings: readonly string[] } {
    const { tokenizer3, textEncoder3 } = this.#checkpoint;
    const warnings: string[] = [];
    const constants: Record<string, Constant> = {};
    const registers: Record<string, Register> = {};
    const instructions: Instruction[] = [];

    const tokenize = (name: string, use: Tokenizer, length: number) => {
      const encoded = use.encode(text, length);
      if (encoded.truncated)
        warnings.push(
          `The prompt "${abridge(text)}" is longer than the ${length} tokens that ${name} takes; it ignores the end: "${abridge(encoded.dropped)}".`,
        );
      constants[`${name}.ids`] = { kind: "value", tensor: int64([1, length], encoded.ids) };
    };
    const launch = (
      graph: string,
      tokens: number,
      inputs: Record<string, string>,
      outputs: Record<string, readonly number[]>,
    ) => {
      const names: Record<string, string> = {};
      for (const [output, shape] of Object.entries(outputs)) {
        names[output] = `${graph}.${output}`;
        registers[`${graph}.${output}`] = { dtype: "float32", shape };
      }
      instructions.push({
        op: "launch",
        graph,
        inputs,
        outputs: names,
        mustBeFinite: Object.values(names),
        sharing: { size: `${tokens} tokens` },
        label: { kind: "encode", name: `text encoder ${graph}` },
      });
    };

    const clipTokens = this.#clipTokens;
    for (const clip of this.#clips) {
      tokenize(clip.graph, clip.tokenizer, clipTokens);
      launch(
        clip.graph,
        clipTokens,
        { ids: `${clip.graph}.ids` },
        { hidden: [1, clipTokens, clip.config.hiddenSize], pooled: [1, clip.config.projectionDim] },
      );
    }
    if (tokenizer3 && textEncoder3) {
      tokenize("t5", tokenizer3, sequenceLength);
      let buckets = this.#buckets.get(sequenceLength);
      if (!buckets) {
        const values = relativeBuckets(textEncoder3.config, sequenceLength);
        buckets = { kind: "value", tensor: int64([sequenceLength, sequenceLength], values) };
        this.#buckets.set(sequenceLength, buckets);
      }
      constants.relative_buckets = buckets;
      launch(
        "t5",
        sequenceLength,
        { ids: "t5.ids", relative_buckets: "relative_buckets" },
        { hidden: [1, sequenceLength, textEncoder3.config.dModel] },
      );
    }
    return { program: { registers, constants, instructions, results: Object.keys(registers) }, warnings };
  }

  #assemble(results: Record<string, Tensor>, warnings: readonly string[], sequenceLength: number): EncodedPrompt {
    const { textEncoder3, transformer } = this.#checkpoint;
    const values = (name: string) => (results[name] as FloatTensor).data;
    const joint = transformer.config.jointAttentionDim;
    const clipTokens = this.#clipTokens;
    const context = new Float32Array(this.contextTokens(sequenceLength) * joint);
    const pooled: Float32Array[] = [];
    let channel = 0;
    for (const { graph, config } of this.#clips) {
      const hidden = values(`${graph}.hidden`);
      for (let token = 0; token < clipTokens; token++) {
        const from = token * config.hiddenSize;
        context.set(hidden.subarray(from, from + config.hiddenSize), token * joint + channel);
      }
      channel += config.hiddenSize;
      pooled.push(values(`${graph}.pooled`));
    }
    if (textEncoder3) context.set(values("t5.hidden"), clipTokens * joint);
    return { context, pooled: concatenate(pooled), warnings };
  }
}

function keyOf(text: string, sequenceLength: number, pin: number | null): string {
  return `${sequenceLength}:${pin ?? ""}:${text}`;
}

function concatenate(parts: readonly Float32Array[]): Float32Array {
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    all.set(part, offset);
    offset += part.length;
  }
  return all;
}

function abridge(text: string): string {
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}
