/**
 * The texts of a request → prompts for the text encoders; or embeddings that were made before, in their place. Shared by `generate` and
 * `encode`. Pure.
 */

import { elementCount, type FloatTensor } from "../common/tensor.js";
import { OptionError } from "../errors.js";
import type { PromptEmbeds } from "../model.js";
import type { PromptName } from "../networks/index.js";
import type { ResolvedEncodeOptions, ResolvedGenerateOptions } from "../options.js";
import { allFinite } from "../program/validate.js";
import type { AppliedLora } from "./lora-inputs.js";
import type { EncodedPrompt, Prompt, PromptEncoder } from "./text.js";
import { type Fragment, parseWeights, unweighted } from "./weighting.js";

/** What texts have to know of a model. */
export type PromptFacts = Pick<
  PromptEncoder,
  "defaultSequenceLength" | "maxClipSkip" | "maxSequenceLength" | "reads" | "shapes"
>;

/** The options that give texts: for each encoder, and as negative prompts. */
const positive = ["prompt", "prompt2", "prompt3"] as const;
const negative = ["negativePrompt", "negativePrompt2", "negativePrompt3"] as const;
type TextOption = (typeof positive)[number] | (typeof negative)[number];

/** The texts of a request. */
export interface Texts {
  /** One for each row. */
  readonly prompts: readonly Prompt[];
  /** One for each row. */
  readonly negativePrompts: readonly Prompt[];
  /** The texts that were given, by the names of the options, one for each row. */
  readonly given: Readonly<Partial<Record<TextOption, readonly string[]>>>;
  readonly sequenceLength: number;
  /** What the caller should know. */
  readonly warnings: readonly string[];
}

/**
 * @param loras dynamic ones that the texts are read with
 * @throws OptionError that names the option and the remedy
 */
export function settleTexts(
  options: Pick<ResolvedEncodeOptions, TextOption | "clipSkip" | "promptWeighting" | "maxSequenceLength">,
  model: PromptFacts,
  loras: readonly AppliedLora[] = [],
): Texts {
  const { clipSkip, promptWeighting, maxSequenceLength: sequenceLength = model.defaultSequenceLength } = options;
  checkSequenceLength(sequenceLength, model.maxSequenceLength);
  if (clipSkip > model.maxClipSkip)
    throw new OptionError(
      "clipSkip",
      `Expected at most ${model.maxClipSkip} for clipSkip but received ${clipSkip}: the model's CLIP text encoders have no more layers to skip.`,
    );
  const rows = typeof options.prompt === "string" ? 1 : options.prompt.length;
  const given: Partial<Record<TextOption, readonly string[]>> = {};
  for (const option of [...positive, ...negative]) {
    const value = options[option];
    if (value !== undefined) given[option] = perRow(option, value, rows);
  }
  const fragmentsOf = (option: TextOption, text: string): readonly Fragment[] => {
    if (!promptWeighting) return unweighted(text);
    try {
      return parseWeights(text);
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
      throw new OptionError(option, `With promptWeighting the option ${option} has ${error.message}.`, {
        cause: error,
      });
    }
  };
  const promptsOf = (names: readonly [TextOption, TextOption, TextOption], clipSkip: number) => {
    const texts = names.map((option) => given[option]?.map((text) => fragmentsOf(option, text)));
    return Array.from({ length: rows }, (_, row): Prompt => {
      const [first = unweighted(""), second = first, third = first] = texts.map((each) => each?.[row]);
      return { texts: { prompt: first, prompt2: second, prompt3: third }, clipSkip, loras };
    });
  };
  const encoders: readonly PromptName[] = positive;
  const unread = encoders.flatMap((name, index) =>
    [positive[index]!, negative[index]!].filter((option) => given[option] !== undefined && !model.reads(name)),
  );
  return {
    prompts: promptsOf(positive, clipSkip),
    // As diffusers, of negative prompts no layers are skipped.
    negativePrompts: promptsOf(negative, 0),
    ...{ given, sequenceLength },
    warnings: unread.map(
      (option) => `The option ${option} has no effect: this model has no text encoder that reads it.`,
    ),
  };
}

/** The texts of a request without guidance, which has no use for negative prompts. */
export function unguided(texts: Texts): Texts {
  const [first] = negative.filter((option) => texts.given[option]?.some((text) => text !== ""));
  const warnings = first
    ? [`The option ${first} has no effect without guidance; give a guidanceScale above 1 for it.`]
    : [];
  return { ...texts, negativePrompts: [], warnings: [...texts.warnings, ...warnings] };
}

/** @throws OptionError for more tokens than the T5 tokenizer takes */
export function checkSequenceLength(length: number, most: number): void {
  if (length > most)
    throw new OptionError(
      "maxSequenceLength",
      `Expected at most ${most} for maxSequenceLength but received ${length}: the model's T5 tokenizer takes no more.`,
    );
}

/** Embeddings in place of texts. */
export interface Embeds {
  /** Rows: prompts. */
  readonly rows: number;
  readonly sequenceLength: number;
  readonly tokens: number;
  readonly prompts: readonly Pick<EncodedPrompt, "context" | "pooled">[];
  /** None where none were given. */
  readonly negativePrompts: readonly Pick<EncodedPrompt, "context" | "pooled">[];
  /** What the caller should know. */
  readonly warnings: readonly string[];
}

/**
 * The embeddings that a request has in place of texts; null where it has texts.
 * @param reading dynamic LoRAs of the request that change text encoders
 * @throws OptionError for both, for shapes and values that do not fit the model
 */
export function settleEmbeds(
  options: ResolvedGenerateOptions,
  model: PromptFacts,
  reading: readonly AppliedLora[] = [],
): Embeds | null {
  const { promptEmbeds } = options;
  if (promptEmbeds === undefined) return null;
  const { clipSkip, promptWeighting, maxSequenceLength } = options;
  const texts = Object.fromEntries([...positive, ...negative].map((option) => [option, options[option]]));
  const others = { ...texts, clipSkip: clipSkip || undefined, promptWeighting: promptWeighting || undefined };
  for (const [option, value] of Object.entries({ ...others, maxSequenceLength }))
    if (value !== undefined)
      throw new OptionError(
        option,
        `The option ${option} says how texts are encoded, and promptEmbeds are encoded already; leave out one. encode() takes ${option}.`,
      );
  const { contextShape, pooledShape } = model.shapes(0);
  const [least, width] = contextShape;
  const [rows = 0, tokens = 0] = promptEmbeds.promptEmbeds.shape;
  const most = model.shapes(model.maxSequenceLength).contextShape[0];
  if (tokens <= least || tokens > most || rows === 0)
    refuse(
      `Expected shape [prompts, ${least + 1} to ${most} tokens, ${width}] for promptEmbeds.promptEmbeds but received [${promptEmbeds.promptEmbeds.shape.join(", ")}].`,
    );
  const shapes = { promptEmbeds: [rows, tokens, width], pooledPromptEmbeds: [rows, ...pooledShape] } as const;
  check(promptEmbeds, "promptEmbeds", shapes.promptEmbeds);
  check(promptEmbeds, "pooledPromptEmbeds", shapes.pooledPromptEmbeds);
  const negatives = [promptEmbeds.negativePromptEmbeds, promptEmbeds.negativePooledPromptEmbeds] as const;
  if ((negatives[0] === undefined) !== (negatives[1] === undefined))
    refuse(
      "Expected both or neither of promptEmbeds.negativePromptEmbeds and promptEmbeds.negativePooledPromptEmbeds.",
    );
  if (negatives[0]) {
    check(promptEmbeds, "negativePromptEmbeds", shapes.promptEmbeds);
    check(promptEmbeds, "negativePooledPromptEmbeds", shapes.pooledPromptEmbeds);
  }
  return {
    ...{ rows, sequenceLength: tokens - least, tokens: promptEmbeds.tokens ?? 0 },
    prompts: rowsOf(promptEmbeds.promptEmbeds, promptEmbeds.pooledPromptEmbeds, rows),
    negativePrompts: negatives[0] && negatives[1] ? rowsOf(negatives[0], negatives[1], rows) : [],
    warnings: unreadLoras(reading, promptEmbeds.loras),
  };
}

/** What is to be said of LoRAs that change text encoders, where the texts were encoded before. */
function unreadLoras(reading: readonly AppliedLora[], encoded: PromptEmbeds["loras"] = []): string[] {
  const unread = reading.flatMap(({ name, scale }) => {
    const before = encoded.find((each) => each.name === name);
    if (before?.scale === scale) return [];
    const how = before?.scale === undefined ? "without it" : `with its scale ${before.scale} in place of ${scale}`;
    return `The LoRA "${name}" changes text encoders too, and promptEmbeds were encoded ${how}; give encode() the same loras.`;
  });
  const unnamed = encoded.filter(({ name, scale }) => scale !== 0 && reading.every((each) => each.name !== name));
  return [
    ...unread,
    ...unnamed.map(
      ({ name }) =>
        `promptEmbeds were encoded with the LoRA "${name}", and the picture is drawn without it; give generate() the same loras.`,
    ),
  ];
}

function check(
  embeds: PromptEmbeds,
  name: "promptEmbeds" | "negativePromptEmbeds" | "pooledPromptEmbeds" | "negativePooledPromptEmbeds",
  shape: readonly number[],
): void {
  const tensor = embeds[name]!;
  if (tensor.shape.join() !== shape.join())
    refuse(`Expected shape [${shape.join(", ")}] for promptEmbeds.${name} but received [${tensor.shape.join(", ")}].`);
  if (tensor.data.length !== elementCount(shape))
    refuse(`The tensor promptEmbeds.${name} has ${tensor.data.length} values, which its shape does not.`);
  if (!allFinite(tensor.data))
    refuse(`Expected finite values for promptEmbeds.${name} but it holds NaN or an infinity.`);
}

function refuse(message: string): never {
  throw new OptionError("promptEmbeds", message);
}

function rowsOf(context: FloatTensor, pooled: FloatTensor, rows: number) {
  const row = ({ data }: FloatTensor, index: number) => {
    const size = data.length / rows;
    return data.subarray(index * size, (index + 1) * size);
  };
  return Array.from({ length: rows }, (_, index) => ({ context: row(context, index), pooled: row(pooled, index) }));
}

function perRow(option: TextOption, value: string | readonly string[], rows: number): readonly string[] {
  if (typeof value === "string") return new Array<string>(rows).fill(value);
  if (value.length === rows) return value;
  const what = option.startsWith("negative") ? "negative prompt" : "text";
  throw new OptionError(
    option,
    `Expected one ${what}, or ${rows} (one for each prompt), for ${option} but received ${value.length}.`,
  );
}
