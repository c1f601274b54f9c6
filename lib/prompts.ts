/**
 * Prompts to the condition that the transformer reads. Each prompt is encoded once and kept in a bounded cache, alone:
 * whether it was a prompt or a negative prompt, and in whose company, does not matter.
 *
 *   context [T_clip + T_t5, joint]  CLIP-L ⊕ CLIP-G along the channels, zero-padded to `joint`, then T5 along the tokens
 *   pooled  [pooled]                CLIP-L ⊕ CLIP-G projections
 */

import type { Checkpoint, Tokenizer } from "./checkpoint/index.js";
import { type ClipConfig, relativeBuckets } from "./networks/index.js";
import type { Constant, Instruction, Program, Register } from "./program.js";
import { type FloatTensor, float32, int64, type Tensor } from "./tensor.js";

export interface EncodedPrompt {
  /** [tokens, joint], row-major. */
  readonly context: Float32Array;
  /** [pooled] */
  readonly pooled: Float32Array;
  /** One message for each tokenizer that had to cut the prompt. */
  readonly warnings: readonly string[];
}

/** Runs a program over the text encoders' graphs. */
export type RunEncoders = (program: Program) => Promise<Record<string, Tensor>>;

/** Memory that cached conditions may take: a dozen prompts of SD3.5, thousands of the embedded model's. */
const cacheBytes = 128 * 2 ** 20;

export class PromptEncoder {
  readonly #checkpoint: Checkpoint;
  readonly #rowsAtOnce: number;
  readonly #cache = new Map<string, EncodedPrompt>();
  #cachedBytes = 0;

  /** @param rowsAtOnce texts in one launch of an encoder; default: all */
  constructor(checkpoint: Checkpoint, rowsAtOnce = Number.POSITIVE_INFINITY) {
    this.#checkpoint = checkpoint;
    this.#rowsAtOnce = rowsAtOnce;
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

  /** Encodes the texts that the cache does not hold, in one program, and returns all, in order. */
  async encode(texts: readonly string[], sequenceLength: number, run: RunEncoders): Promise<EncodedPrompt[]> {
    const key = (text: string) => `${sequenceLength}:${text}`;
    const found = new Map<string, EncodedPrompt>();
    const missing: string[] = [];
    for (const text of new Set(texts)) {
      const known = this.#cache.get(key(text));
      if (known) {
        // Moves to the young end of the cache.
        this.#cache.delete(key(text));
        this.#cache.set(key(text), known);
        found.set(text, known);
      } else missing.push(text);
    }
    if (missing.length > 0) {
      const encoded = await this.#encodeMissing(missing, sequenceLength, run);
      for (const [index, text] of missing.entries()) {
        found.set(text, encoded[index]!);
        this.#keep(key(text), encoded[index]!);
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

  async #encodeMissing(texts: readonly string[], sequenceLength: number, run: RunEncoders): Promise<EncodedPrompt[]> {
    const { tokenizer3, textEncoder3, transformer } = this.#checkpoint;
    const warnings: string[][] = texts.map(() => []);
    const constants: Record<string, Constant> = {};
    const registers: Record<string, Register> = {};
    const instructions: Instruction[] = [];
    const rowsAtOnce = Math.min(this.#rowsAtOnce, texts.length);

    /** An encoder over all texts, `rowsAtOnce` at a time; outputs by the shape of one row. */
    const encode = (
      graph: string,
      tokenizer: Tokenizer,
      length: number,
      more: Record<string, string>,
      outputs: Record<string, readonly number[]>,
    ) => {
      for (let first = 0; first < texts.length; first += rowsAtOnce) {
        const part = texts.slice(first, first + rowsAtOnce);
        const ids = new BigInt64Array(part.length * length);
        for (const [row, text] of part.entries()) {
          const encoded = tokenizer.encode(text, length);
          ids.set(encoded.ids, row * length);
          if (encoded.truncated)
            warnings[first + row]!.push(
              `The prompt "${abridge(text)}" is longer than the ${length} tokens that ${graph} takes; it ignores the end: "${abridge(encoded.dropped)}".`,
            );
        }
        constants[`${graph}.ids ${first}`] = { kind: "value", tensor: int64([part.length, length], ids) };
        const names: Record<string, string> = {};
        for (const [output, rowShape] of Object.entries(outputs)) {
          names[output] = `${graph}.${output} ${first}`;
          registers[names[output]] = { dtype: "float32", shape: [part.length, ...rowShape] };
        }
        instructions.push({
          op: "launch",
          graph,
          inputs: { ids: `${graph}.ids ${first}`, ...more },
          outputs: names,
          mustBeFinite: Object.values(names),
          label: { kind: "encode", name: `text encoder ${graph}` },
        });
      }
    };

    const clips = this.#clips;
    const clipTokens = this.#clipTokens;
    for (const { graph, tokenizer, config } of clips)
      encode(
        graph,
        tokenizer,
        clipTokens,
        {},
        { hidden: [clipTokens, config.hiddenSize], pooled: [config.projectionDim] },
      );
    if (tokenizer3 && textEncoder3) {
      constants.relative_buckets = {
        kind: "value",
        tensor: int64([sequenceLength, sequenceLength], relativeBuckets(textEncoder3.config, sequenceLength)),
      };
      const { dModel } = textEncoder3.config;
      const more = { relative_buckets: "relative_buckets" };
      encode("t5", tokenizer3, sequenceLength, more, { hidden: [sequenceLength, dModel] });
    }

    const results = await run({ registers, constants, instructions, results: Object.keys(registers) });
    /** A text's part of an output. */
    const rowOf = (name: string, row: number): Float32Array => {
      const first = Math.floor(row / rowsAtOnce) * rowsAtOnce;
      const { data, shape } = results[`${name} ${first}`] as FloatTensor;
      const size = data.length / shape[0]!;
      return data.subarray((row - first) * size, (row - first + 1) * size);
    };
    const joint = transformer.config.jointAttentionDim;
    return texts.map((_, row) => {
      const context = new Float32Array(this.contextTokens(sequenceLength) * joint);
      const pooled: Float32Array[] = [];
      let channel = 0;
      for (const { graph, config } of clips) {
        const { hiddenSize } = config;
        const hidden = rowOf(`${graph}.hidden`, row);
        for (let token = 0; token < clipTokens; token++)
          context.set(hidden.subarray(token * hiddenSize, (token + 1) * hiddenSize), token * joint + channel);
        channel += hiddenSize;
        pooled.push(rowOf(`${graph}.pooled`, row));
      }
      if (textEncoder3) context.set(rowOf("t5.hidden", row), clipTokens * joint);
      return { context, pooled: concatenate(pooled), warnings: warnings[row]! };
    });
  }

  #keep(key: string, prompt: EncodedPrompt): void {
    const size = (entry: EncodedPrompt) => entry.context.byteLength + entry.pooled.byteLength;
    this.#cache.set(key, prompt);
    this.#cachedBytes += size(prompt);
    for (const [oldest, entry] of this.#cache) {
      if (this.#cachedBytes <= cacheBytes || oldest === key) break;
      this.#cache.delete(oldest);
      this.#cachedBytes -= size(entry);
    }
  }
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
