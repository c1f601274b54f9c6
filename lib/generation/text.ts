/**
 * Prompts to the condition that the transformer reads. Each text encoder reads a text of its own; what it makes of a text is kept in a
 * bounded cache, so that it reads a text once: whether it was a prompt or a negative prompt, and beside which others, does not matter.
 * Launches that are pinned to a batch have entries of their own: their bits must not depend on what came before.
 *
 *   context [T_clip + T_t5, joint]  CLIP-L ⊕ CLIP-G along the channels, zero-padded to `joint`, then T5 along the tokens
 *   pooled  [pooled]                CLIP-L ⊕ CLIP-G projections
 */

import { LruCache } from "../common/lru-cache.js";
import { type FloatTensor, float32, int64, type Tensor } from "../common/tensor.js";
import { clipped } from "../common/text.js";
import { isDue, rest } from "../common/turns.js";
import {
  graphName,
  type PromptName,
  promptNames,
  type TextEncoder,
  type TextRole,
  textEncodersOf,
  tokensOf,
} from "../networks/index.js";
import type { GraphLibrary } from "../networks/library.js";
import { shapeWith } from "../onnx/index.js";
import { ProgramBuilder } from "../program/builder.js";
import type { Program } from "../program/program.js";
import { type AppliedLora, LoraInputs } from "./lora-inputs.js";
import { type Fragment, type TokenWeights, tokenWeights, unweighted, weightedStates } from "./weighting.js";

/** A prompt as the text encoders read it. */
export interface Prompt {
  /** What each encoder reads, in parts with their weights. */
  readonly texts: Readonly<Record<PromptName, readonly Fragment[]>>;
  /** Layers before the last but one that the hidden states of CLIP are taken from; 0 for that one. */
  readonly clipSkip: number;
  /** Dynamic LoRAs that it is read with; those that change no text encoder do not matter. Default: none. */
  readonly loras?: readonly AppliedLora[] | undefined;
}

/** A prompt of one text for all encoders. */
export function promptOf(text: string): Prompt {
  const fragments = unweighted(text);
  return { texts: { prompt: fragments, prompt2: fragments, prompt3: fragments }, clipSkip: 0 };
}

export interface EncodedPrompt {
  /** [tokens, joint], row-major. */
  readonly context: Float32Array;
  /** [pooled] */
  readonly pooled: Float32Array;
  /** Tokens that the encoder which reads most of the prompt reads, without padding. */
  readonly tokens: number;
  /** One message for each tokenizer that had to cut its text. */
  readonly warnings: readonly string[];
}

/** A text that one encoder is to read. */
interface Reading {
  /** Two with the same key result in the same. */
  readonly key: string;
  readonly encoder: TextEncoder;
  /** Tokens of a launch. */
  readonly tokens: number;
  readonly fragments: readonly Fragment[];
  /** As `Prompt.clipSkip`; 0 for encoders that have no such variant. */
  readonly skip: number;
  /** Dynamic LoRAs that change the encoder. */
  readonly loras: readonly AppliedLora[];
  /** Key of the empty text, where this one has weights; null without. */
  readonly empty: string | null;
}

/** The program that reads a text with one encoder. */
export interface EncoderProgram {
  readonly program: Program;
  /** Name of the graph. */
  readonly graph: string;
  /** What it was made for. */
  readonly text: string;
  /** Tokens that are read, without padding. */
  readonly tokens: number;
  readonly warnings: readonly string[];
  /** Null for a text without weights. */
  readonly weights: TokenWeights | null;
}

/** What an encoder makes of a text. */
interface EncodedText extends Pick<EncoderProgram, "tokens" | "warnings"> {
  /** [tokens, width] */
  readonly hidden: Float32Array;
  /** [width], of encoders that have a projection. */
  readonly pooled: Float32Array | null;
}

/** Prompts of a request, with programs for the texts that the cache lacks. */
export interface PreparedPrompts {
  readonly prompts: readonly Prompt[];
  readonly sequenceLength: number;
  readonly pin: number | null;
  /** By the keys of what is read. */
  readonly programs: ReadonlyMap<string, EncoderProgram>;
}

/** What a request takes from the cache, and the programs of the rest: one for each text of each encoder, they may share launches. */
export interface PendingPrompts {
  readonly known: ReadonlyMap<string, EncodedText>;
  readonly missing: ReadonlyMap<string, EncoderProgram>;
}

/** A text condition: [R, T, joint] and [R, pooled]. */
export interface Condition {
  readonly context: FloatTensor;
  readonly pooled: FloatTensor;
}

/** Memory that cached texts may take: a dozen prompts of SD3.5, thousands of the embedded model's. */
const cacheBytes = 128 * 2 ** 20;

export class PromptEncoder {
  readonly #graphs: GraphLibrary;
  readonly #encoders: readonly TextEncoder[];
  readonly #cache = new LruCache<EncodedText>(
    cacheBytes,
    // A text, which is in the key, may be longer than what it is encoded to; two bytes a character at most.
    ({ hidden, pooled }, key) => hidden.byteLength + (pooled?.byteLength ?? 0) + 2 * key.length,
  );
  /** Inputs by graph and sequence length: the same arrays for all texts, so that they may share launches. */
  readonly #constants = new Map<string, Readonly<Record<string, Tensor>>>();
  /** Names of the graphs that programs were made for. */
  readonly #used = new Set<string>();

  readonly #loras: LoraInputs;

  /** @param loras dynamic ones; default: none */
  constructor(graphs: GraphLibrary, loras = new LoraInputs(graphs)) {
    this.#graphs = graphs;
    this.#loras = loras;
    this.#encoders = textEncodersOf(graphs.checkpoint);
  }

  /** Names of the graphs of text encoders that may have been launched. */
  get graphs(): string[] {
    return [...this.#used];
  }

  /** The longest T5 part that the tokenizer allows; 512 without T5, whose part is then zeros. */
  get maxSequenceLength(): number {
    return Math.min(512, ...this.#joining("tokens").map(({ tokenizer }) => tokenizer.maxLength));
  }

  /** As diffusers: 256, or what the tokenizer takes if that is less. */
  get defaultSequenceLength(): number {
    return Math.min(256, this.maxSequenceLength);
  }

  /** The largest `clipSkip` that all encoders with such a variant have layers for. */
  get maxClipSkip(): number {
    const { checkpoint } = this.#graphs;
    return Math.min(...this.#encoders.flatMap(({ text }) => text.mostSkipped?.(checkpoint) ?? []));
  }

  /** Whether some encoder reads the text of that option. */
  reads(name: PromptName): boolean {
    return this.#encoders.some(({ text }) => promptNames[text.tokenizer] === name);
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
   * Tokenises the texts that the cache lacks, and makes the programs that encode them.
   * @param pin batch that all launches are padded to
   */
  async prepare(
    prompts: readonly Prompt[],
    sequenceLength: number,
    pin: number | null = null,
    signal?: AbortSignal,
  ): Promise<PreparedPrompts> {
    const programs = new Map<string, EncoderProgram>();
    for (const prompt of prompts)
      for (const reading of this.#readings(prompt, sequenceLength, pin)) {
        if (programs.has(reading.key) || this.#cache.has(reading.key)) continue;
        programs.set(reading.key, await this.#program(reading));
        signal?.throwIfAborted();
      }
    return { prompts, sequenceLength, pin, programs };
  }

  /** Which of the texts the cache holds by now, and which are to be encoded: other requests may have encoded some. */
  async pending({ prompts, sequenceLength, pin, programs }: PreparedPrompts): Promise<PendingPrompts> {
    const known = new Map<string, EncodedText>();
    const missing = new Map<string, EncoderProgram>();
    for (const prompt of prompts)
      for (const reading of this.#readings(prompt, sequenceLength, pin)) {
        const { key } = reading;
        if (known.has(key) || missing.has(key)) continue;
        const encoded = this.#cache.get(key);
        if (encoded) known.set(key, encoded);
        // One that was in the cache when the request was prepared may have left it since.
        else missing.set(key, programs.get(key) ?? (await this.#program(reading)));
        if (isDue()) await rest();
      }
    return { known, missing };
  }

  /** All prompts of a request, in order; equal ones are one. @param results of the missing texts' programs */
  async encoded(
    { prompts, sequenceLength, pin }: PreparedPrompts,
    { known, missing }: PendingPrompts,
    results: readonly Record<string, Tensor>[],
  ): Promise<EncodedPrompt[]> {
    const resultOf = new Map([...missing.keys()].map((key, index) => [key, results[index]!]));
    const texts = new Map(known);
    const numbers = new Map<string, number>();
    const assembled = new Map<string, EncodedPrompt>();
    const all: EncodedPrompt[] = [];
    for (const prompt of prompts) {
      const readings = this.#readings(prompt, sequenceLength, pin);
      for (const { key, empty } of readings) {
        if (texts.has(key)) continue;
        // The empty text comes before those that it is compared with.
        texts.set(key, finished(resultOf.get(key)!, missing.get(key)!, empty === null ? null : texts.get(empty)!));
        this.#cache.set(key, texts.get(key)!);
        if (isDue()) await rest();
      }
      // By their numbers: keys hold texts of any length.
      const numberOf = (key: string) => numbers.get(key) ?? numbers.set(key, numbers.size).get(key)!;
      const key = readings.map((reading) => numberOf(reading.key)).join();
      const encoded = assembled.get(key) ?? this.#assemble(readings, texts, sequenceLength);
      assembled.set(key, encoded);
      all.push(encoded);
      if (isDue()) await rest();
    }
    return all;
  }

  /** Encodes what the cache lacks. @param run gives the results of programs, in order */
  async encode(
    prepared: PreparedPrompts,
    run: (programs: readonly EncoderProgram[]) => Promise<readonly Record<string, Tensor>[]>,
  ): Promise<EncodedPrompt[]> {
    const pending = await this.pending(prepared);
    const programs = [...pending.missing.values()];
    return this.encoded(prepared, pending, programs.length > 0 ? await run(programs) : []);
  }

  /** The conditions of several prompts as one, row after row. */
  stack(prompts: readonly Pick<EncodedPrompt, "context" | "pooled">[]): Condition {
    const { jointAttentionDim: joint } = this.#graphs.checkpoint.transformer.config;
    const pooled = concatenate(prompts.map((prompt) => prompt.pooled));
    const context = concatenate(prompts.map((prompt) => prompt.context));
    const rows = prompts.length;
    return {
      context: float32([rows, context.length / rows / joint, joint], context),
      pooled: float32([rows, pooled.length / rows], pooled),
    };
  }

  /** Names of the graphs that read prompts, but for those that read weighted texts a second time; none for texts that the cache holds. */
  graphsOf(prompts: readonly Prompt[], sequenceLength: number): string[] {
    const readings = prompts.flatMap((prompt) => this.#readings(prompt, sequenceLength, null));
    const unread = readings.filter(({ key }) => !this.#cache.has(key));
    return unread.map((reading) => graphName({ network: reading.encoder.name, ...this.#variantOf(reading) }));
  }

  /** The programs that encode a prompt, whatever the cache holds. */
  async programs(prompt: Prompt, sequenceLength: number): Promise<Program[]> {
    const programs: Program[] = [];
    for (const reading of this.#readings(prompt, sequenceLength, null))
      programs.push((await this.#program(reading)).program);
    return programs;
  }

  /** What the encoders read for a prompt, in their order; before a text with weights the empty one, which it is compared with. */
  #readings(prompt: Prompt, sequenceLength: number, pin: number | null): Reading[] {
    return this.#encoders.flatMap((encoder) => {
      const fragments = prompt.texts[promptNames[encoder.text.tokenizer]];
      const tokens = tokensOf(encoder, sequenceLength);
      const skip = encoder.text.mostSkipped ? prompt.clipSkip : 0;
      const loras = this.#loras.touching(encoder.name, prompt.loras ?? []);
      const adapted = loras.length > 0 ? JSON.stringify(loras.map(({ name, scale }) => [name, scale])) : "";
      const reading = (fragments: readonly Fragment[], empty: string | null): Reading => {
        const [first] = fragments;
        const text = fragments.length === 1 && first!.weight === 1 ? `=${first!.text}` : JSON.stringify(fragments);
        return {
          key: `${encoder.name}:${skip}:${tokens}:${pin ?? ""}:${adapted}:${text}`,
          encoder,
          tokens,
          fragments,
          skip,
          loras,
          empty,
        };
      };
      if (fragments.every(({ weight }) => weight === 1)) return [reading(fragments, null)];
      const empty = reading(unweighted(""), null);
      return [empty, reading(fragments, empty.key)];
    });
  }

  /**
   * The program that reads a text with one encoder. Its results are named `hidden`, `pooled`, and `hidden_1`, … for each part with a
   * weight below 1.
   */
  async #program({ encoder, tokens, fragments, skip, loras }: Reading): Promise<EncoderProgram> {
    const { name, text: role, tokenizer } = encoder;
    const texts = fragments.map(({ text }) => text);
    const text = texts.join(" ");
    const { ids, count, truncated, dropped, unread, spans } = await tokenizer.encode(texts, tokens);
    const warnings: string[] = [];
    if (truncated)
      warnings.push(
        `The prompt "${clipped(text, 60)}" is longer than the ${tokens} tokens that ${name} takes; it ignores the end${dropped && `: "${clipped(dropped, 60)}"`}.`,
      );
    if (unread) warnings.push(`The prompt "${clipped(text, 60)}" has ${unread}; ${name} ignores the rest of it.`);

    const builder = new ProgramBuilder();
    const weights = tokenWeights(fragments, spans, tokens);
    const inputs: Record<string, string> = { ids: builder.value("ids", int64([1, tokens], ids)) };
    for (const [input, tensor] of Object.entries(this.#constantsOf(name, role, tokens)))
      inputs[input] = builder.value(input, tensor);
    const results: string[] = [];
    const launch = (graph: string, more: Record<string, string>, wanted: (output: string) => string | null) => {
      this.#used.add(graph);
      const outputs: Record<string, string> = {};
      for (const [output, dimensions] of this.#graphs.get(graph).outputs) {
        const result = wanted(output);
        outputs[output] = builder.register(result ?? `unused_${output}`, shapeWith(dimensions, { rows: 1, tokens }));
        if (result !== null) results.push(result);
      }
      builder.launch({
        ...{ graph, inputs: { ...inputs, ...more }, outputs, mustBeFinite: Object.values(outputs) },
        sharing: { size: `${tokens} tokens` },
        label: { kind: "encode", name: `text encoder ${name}` },
      });
    };
    const lora = await this.#loras.values(name, loras);
    const variant = this.#variantOf({ encoder, skip, loras });
    if (variant.skip) inputs.skip = builder.perRow(skip, 1);
    if (lora) {
      inputs.lora_down = builder.value("lora_down", lora.down, true);
      inputs.lora_up = builder.value("lora_up", lora.up, true);
      inputs.lora_scale = builder.value("lora_scale", lora.scale);
    }
    const graph = graphName({ network: name, ...variant });
    launch(graph, {}, (output) => output);
    for (const [index, { mask }] of (weights?.masked ?? []).entries()) {
      const more = { mask: builder.value(`mask_${index + 1}`, float32([1, tokens], mask)) };
      const masked = graphName({ network: name, ...variant, masked: true });
      launch(masked, more, (output) => (output === "hidden" ? `hidden_${index + 1}` : null));
    }
    return { program: builder.build(results), graph, text, tokens: count, warnings, weights };
  }

  /** The variant of its encoder's graph that reads a text. */
  #variantOf({ encoder, skip, loras }: Pick<Reading, "encoder" | "skip" | "loras">) {
    const rank = this.#loras.rank(encoder.name, loras);
    return { skip: skip > 0, ...(rank && { lora: rank }) };
  }

  /** Tokens of the encoders that stand beside each other along the channels; all have the same number (77). */
  get #channelTokens(): number {
    return this.#joining("channels")[0]!.tokenizer.maxLength;
  }

  #joining(joins: "channels" | "tokens") {
    return this.#encoders.filter(({ text }) => text.joins === joins);
  }

  #constantsOf(name: string, { constants }: TextRole, tokens: number): Readonly<Record<string, Tensor>> {
    const key = `${name} ${tokens}`;
    const known = this.#constants.get(key) ?? constants?.(this.#graphs.checkpoint, tokens) ?? {};
    this.#constants.set(key, known);
    return known;
  }

  #assemble(
    readings: readonly Reading[],
    texts: ReadonlyMap<string, EncodedText>,
    sequenceLength: number,
  ): EncodedPrompt {
    const [length, joint] = this.shapes(sequenceLength).contextShape;
    const context = new Float32Array(length * joint);
    const pooled: Float32Array[] = [];
    const warnings: string[] = [];
    let [channel, token, most] = [0, this.#channelTokens, 0];
    const compared = new Set(readings.map(({ empty }) => empty));
    for (const { key, encoder, tokens } of readings) {
      // The empty text before one with weights is no part of the condition.
      if (compared.has(key)) continue;
      const encoded = texts.get(key)!;
      const { hidden } = encoded;
      if (encoder.text.joins === "tokens") {
        context.set(hidden, token * joint);
        token += tokens;
      } else {
        const width = hidden.length / tokens;
        for (let row = 0; row < tokens; row++)
          context.set(hidden.subarray(row * width, (row + 1) * width), row * joint + channel);
        channel += width;
      }
      if (encoded.pooled) pooled.push(encoded.pooled);
      warnings.push(...encoded.warnings);
      most = Math.max(most, encoded.tokens);
    }
    return { context, pooled: concatenate(pooled), tokens: most, warnings };
  }
}

/** Tokens that are read of prompts, all together. */
export function tokensOfPrompts(prompts: readonly EncodedPrompt[]): number {
  return prompts.reduce((sum, { tokens }) => sum + tokens, 0);
}

/** What the caller should know of prompts, each once. */
export function warningsOf(prompts: readonly EncodedPrompt[]): string[] {
  return [...new Set(prompts.flatMap(({ warnings }) => warnings))];
}

/** @param empty what the encoder makes of the empty text; null for a text without weights */
function finished(
  { hidden, pooled, ...others }: Record<string, Tensor>,
  { tokens, warnings, weights }: EncoderProgram,
  empty: EncodedText | null,
): EncodedText {
  const masked = (weights?.masked ?? []).map((_, index) => others[`hidden_${index + 1}`]!.data as Float32Array);
  const plain = hidden!.data as Float32Array;
  return {
    hidden: weights && empty ? weightedStates([plain, ...masked], empty.hidden, weights) : owned(plain),
    pooled: pooled ? owned(pooled.data as Float32Array) : null,
    ...{ tokens, warnings },
  };
}

/** Values that keep no memory but their own: what a process sends is one buffer for all values of a message. */
function owned(values: Float32Array): Float32Array {
  return values.byteLength === values.buffer.byteLength ? values : values.slice();
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
