/**
 * Prompts to the condition that the transformer reads. Each prompt is encoded once and kept in a bounded cache, alone:
 * whether it was a prompt or a negative prompt, and beside which others, does not matter. Launches that are pinned to a
 * batch have entries of their own: their bits must not depend on what came before.
 *
 *   context [T_clip + T_t5, joint]  CLIP-L ⊕ CLIP-G along the channels, zero-padded to `joint`, then T5 along the tokens
 *   pooled  [pooled]                CLIP-L ⊕ CLIP-G projections
 */

import { LruCache } from "../common/lru-cache.js";
import { type FloatTensor, float32, int64, type Tensor } from "../common/tensor.js";
import { clipped } from "../common/text.js";
import { isDue, rest } from "../common/turns.js";
import { type TextEncoder, type TextRole, textEncodersOf, tokensOf } from "../networks/index.js";
import type { GraphLibrary } from "../networks/library.js";
import { shapeWith } from "../onnx/index.js";
import { ProgramBuilder } from "../program/builder.js";
import type { Program } from "../program/program.js";

export interface EncodedPrompt {
  /** [tokens, joint], row-major. */
  readonly context: Float32Array;
  /** [pooled] */
  readonly pooled: Float32Array;
  /** Tokens that the encoder which reads most of the prompt reads, without padding. */
  readonly tokens: number;
  /** One message for each tokenizer that had to cut the prompt. */
  readonly warnings: readonly string[];
}

/** The program that encodes a prompt, with a message for each tokenizer that had to cut it. */
export interface EncoderProgram {
  readonly program: Program;
  /** As `EncodedPrompt.tokens`. */
  readonly tokens: number;
  readonly warnings: readonly string[];
}

/** Prompts of a request, with programs for those that the cache lacks. */
export interface PreparedPrompts {
  readonly prompts: readonly string[];
  readonly sequenceLength: number;
  readonly pin: number | null;
  readonly programs: ReadonlyMap<string, EncoderProgram>;
}

/** What a request takes from the cache, and the programs of the rest: one for each prompt, they may share launches. */
export interface PendingPrompts {
  readonly known: ReadonlyMap<string, EncodedPrompt>;
  readonly missing: ReadonlyMap<string, EncoderProgram>;
}

/** A text condition: [R, T, joint] and [R, pooled]. */
export interface Condition {
  readonly context: FloatTensor;
  readonly pooled: FloatTensor;
}

/** Memory that cached conditions may take: a dozen prompts of SD3.5, thousands of the embedded model's. */
const cacheBytes = 128 * 2 ** 20;

export class PromptEncoder {
  readonly #graphs: GraphLibrary;
  readonly #encoders: readonly TextEncoder[];
  readonly #cache = new LruCache<EncodedPrompt>(
    cacheBytes,
    // A prompt, which is the key, may be longer than what it is encoded to; two bytes a character at most.
    ({ context, pooled }, key) => context.byteLength + pooled.byteLength + 2 * key.length,
  );
  /** Inputs by graph and sequence length: the same arrays for all texts, so that they may share launches. */
  readonly #constants = new Map<string, Readonly<Record<string, Tensor>>>();

  constructor(graphs: GraphLibrary) {
    this.#graphs = graphs;
    this.#encoders = textEncodersOf(graphs.checkpoint);
  }

  /** Names of the text encoders' graphs. */
  get graphs(): string[] {
    return this.#encoders.map(({ name }) => name);
  }

  /** The longest T5 part that the tokenizer allows; 512 without T5, whose part is then zeros. */
  get maxSequenceLength(): number {
    return Math.min(512, ...this.#joining("tokens").map(({ tokenizer }) => tokenizer.maxLength));
  }

  /** As diffusers: 256, or what the tokenizer takes if that is less. */
  get defaultSequenceLength(): number {
    return Math.min(256, this.maxSequenceLength);
  }

  /** Shapes of the condition of one text, for a T5 part of that length. */
  shapes(sequenceLength: number): {
    readonly contextShape: readonly [tokens: number, width: number];
    readonly pooledShape: readonly [width: number];
  } {
    const { jointAttentionDim, pooledProjectionDim } = this.#graphs.checkpoint.transformer.config;
    return {
      // Without an encoder that joins along the tokens its part is zeros.
      contextShape: [
        this.#channelTokens + sequenceLength * Math.max(1, this.#joining("tokens").length),
        jointAttentionDim,
      ],
      pooledShape: [pooledProjectionDim],
    };
  }

  /**
   * Tokenises the prompts that the cache lacks, and makes the programs that encode them.
   * @param pin batch that all launches are padded to
   */
  async prepare(
    prompts: readonly string[],
    sequenceLength: number,
    pin: number | null = null,
    signal?: AbortSignal,
  ): Promise<PreparedPrompts> {
    const programs = new Map<string, EncoderProgram>();
    for (const prompt of prompts) {
      if (programs.has(prompt) || this.#cache.has(keyOf(prompt, sequenceLength, pin))) continue;
      programs.set(prompt, await this.program(prompt, sequenceLength));
      signal?.throwIfAborted();
    }
    return { prompts, sequenceLength, pin, programs };
  }

  /** Which of the prompts the cache holds by now, and which are to be encoded: other requests may have encoded some. */
  async pending({ prompts, sequenceLength, pin, programs }: PreparedPrompts): Promise<PendingPrompts> {
    const known = new Map<string, EncodedPrompt>();
    const missing = new Map<string, EncoderProgram>();
    for (const prompt of prompts) {
      const encoded = this.#cache.get(keyOf(prompt, sequenceLength, pin));
      if (encoded) known.set(prompt, encoded);
      // One that was in the cache when the request was prepared may have left it since.
      else missing.set(prompt, programs.get(prompt) ?? (await this.program(prompt, sequenceLength)));
      if (isDue()) await rest();
    }
    return { known, missing };
  }

  /** All prompts of a request, in order. @param results of the missing prompts' programs */
  async encoded(
    { prompts, sequenceLength, pin }: PreparedPrompts,
    { known, missing }: PendingPrompts,
    results: readonly Record<string, Tensor>[],
  ): Promise<EncodedPrompt[]> {
    const all = new Map(known);
    for (const [index, [prompt, { tokens, warnings }]] of [...missing].entries()) {
      const encoded = { ...this.#assemble(results[index]!, sequenceLength), tokens, warnings };
      all.set(prompt, encoded);
      this.#cache.set(keyOf(prompt, sequenceLength, pin), encoded);
      if (isDue()) await rest();
    }
    return prompts.map((prompt) => all.get(prompt)!);
  }

  /** The conditions of several prompts as one, row after row. */
  stack(prompts: readonly EncodedPrompt[]): Condition {
    const { jointAttentionDim: joint } = this.#graphs.checkpoint.transformer.config;
    const pooled = concatenate(prompts.map((prompt) => prompt.pooled));
    const context = concatenate(prompts.map((prompt) => prompt.context));
    const rows = prompts.length;
    return {
      context: float32([rows, context.length / rows / joint, joint], context),
      pooled: float32([rows, pooled.length / rows], pooled),
    };
  }

  /** The program that encodes one prompt. Its results are named `<graph>.<output>`. */
  async program(prompt: string, sequenceLength: number): Promise<EncoderProgram> {
    const builder = new ProgramBuilder();
    const warnings: string[] = [];
    const results: string[] = [];
    let most = 0;
    for (const encoder of this.#encoders) {
      const { name: graph, text, tokenizer } = encoder;
      const tokens = tokensOf(encoder, sequenceLength);
      const { ids, count, truncated, dropped, unread } = await tokenizer.encode(prompt, tokens);
      most = Math.max(most, count);
      if (truncated)
        warnings.push(
          `The prompt "${clipped(prompt, 60)}" is longer than the ${tokens} tokens that ${graph} takes; it ignores the end: "${clipped(dropped, 60)}".`,
        );
      if (unread) warnings.push(`The prompt "${clipped(prompt, 60)}" has ${unread}; ${graph} ignores the rest of it.`);
      const inputs: Record<string, string> = { ids: builder.value(`${graph}.ids`, int64([1, tokens], ids)) };
      for (const [input, tensor] of Object.entries(this.#constantsOf(graph, text, tokens)))
        inputs[input] = builder.value(`${graph}.${input}`, tensor);
      const outputs: Record<string, string> = {};
      for (const [output, dimensions] of this.#graphs.get(graph).outputs)
        outputs[output] = builder.register(`${graph}.${output}`, shapeWith(dimensions, { rows: 1, tokens }));
      builder.launch({
        ...{ graph, inputs, outputs, mustBeFinite: Object.values(outputs) },
        sharing: { size: `${tokens} tokens` },
        label: { kind: "encode", name: `text encoder ${graph}` },
      });
      results.push(...Object.values(outputs));
    }
    return { program: builder.build(results), tokens: most, warnings };
  }

  /** Tokens of the encoders that stand beside each other along the channels; all have the same number (77). */
  get #channelTokens(): number {
    return this.#joining("channels")[0]!.tokenizer.maxLength;
  }

  #joining(joins: "channels" | "tokens") {
    return this.#encoders.filter(({ text }) => text.joins === joins);
  }

  #constantsOf(graph: string, { constants }: TextRole, tokens: number): Readonly<Record<string, Tensor>> {
    const key = `${graph} ${tokens}`;
    const known = this.#constants.get(key) ?? constants?.(this.#graphs.checkpoint, tokens) ?? {};
    this.#constants.set(key, known);
    return known;
  }

  #assemble(results: Record<string, Tensor>, sequenceLength: number): Pick<EncodedPrompt, "context" | "pooled"> {
    const [tokens, joint] = this.shapes(sequenceLength).contextShape;
    const context = new Float32Array(tokens * joint);
    const pooled: Float32Array[] = [];
    let channel = 0;
    let token = this.#channelTokens;
    for (const { name, text } of this.#encoders) {
      const { data, shape } = results[`${name}.hidden`] as FloatTensor;
      const [, length, width] = shape as [number, number, number];
      if (text.joins === "tokens") {
        context.set(data, token * joint);
        token += length;
      } else {
        for (let row = 0; row < length; row++)
          context.set(data.subarray(row * width, (row + 1) * width), row * joint + channel);
        channel += width;
      }
      const projection = results[`${name}.pooled`] as FloatTensor | undefined;
      if (projection) pooled.push(projection.data);
    }
    return { context, pooled: concatenate(pooled) };
  }
}

function keyOf(prompt: string, sequenceLength: number, pin: number | null): string {
  return `${sequenceLength}:${pin ?? ""}:${prompt}`;
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
