/**
 * The table of networks, one row each: which part of the checkpoint owns its weights, what it is for, the variants that
 * it comes in, and how it is emitted. What programs launch, which engines are built with which shapes, and what a model
 * takes in memory follow from this table: a new network is one file that emits it, and one row here.
 */

import type { Checkpoint, ControlNet, Part, Tokenizer } from "../checkpoint/index.js";
import { table } from "../common/table.js";
import { int64, type Tensor } from "../common/tensor.js";
import type { EmitOptions } from "../onnx/index.js";
import { emitClip } from "./clip.js";
import { emitCombine } from "./combine.js";
import { emitInpaintBlend, emitPreview, emitScaleNoise } from "./edit.js";
import { emitExtrapolate } from "./extrapolate.js";
import { type LoraRank, loraRanks, type NetworkGraph } from "./low-rank.js";
import { emitStep } from "./step.js";
import { emitT5, relativeBuckets } from "./t5.js";
import { emitUpscale } from "./upscale.js";
import { emitUpscaleLatents } from "./upscale-latents.js";
import { emitVaeDecoder, emitVaeEncoder } from "./vae.js";

export { controlChannels, controlPositionTable } from "./controlnet.js";
export { mostTokens } from "./layers.js";
export { type LoraRank, type LowRankLayer, type LowRankLayout, loraRanks, type NetworkGraph } from "./low-rank.js";
export { mmditWidth, positionTable } from "./mmdit.js";
export { comparisonOutput } from "./rounding.js";
export { sigmaBeforeUpscale, upscaleConstants, upscaleJump, upscaleScale } from "./upscale-latents.js";

/** Parts of a checkpoint that have weights. */
export type WeightedPart = {
  [Name in keyof Checkpoint]: Checkpoint[Name] extends Part<unknown> | null ? Name : never;
}[keyof Checkpoint];

/** What only some pictures need. */
export type Feature = "stages" | "editing" | "previews";

/** Variants of a network, by name; one that is absent or false is not part of a graph's name. */
export interface Variants {
  /** Classifier-free guidance: twice the rows, unconditional ones first. `cfg_zero`: with the scale of CFG-Zero*. */
  readonly guidance?: boolean | "cfg_zero";
  /** Of CLIP: with an input that says which layer's hidden states are wanted. */
  readonly skip?: boolean;
  /** Of a text encoder: with a mask of tokens that none attends to. */
  readonly masked?: boolean;
  /** With a branch of this rank beside each linear layer, whose matrices are inputs: see `loraRanks`. */
  readonly lora?: LoraRank;
  /** Of the transformer: with ControlNets, by their ids in the order of the graph's inputs, joined by "+". */
  readonly controls?: string;
  /** Of the transformer with guidance: with a third row for each picture, which these blocks are left out of, joined by "+". */
  readonly skipped?: string;
}

/** A variant that is a list, as a part of a graph's name. */
export const listed = (each: readonly (string | number)[]): string => each.join("+");

/** What identifies a graph of a checkpoint. */
export interface GraphKey extends Variants {
  readonly network: string;
}

/** How a text encoder takes part in the condition. */
export interface TextRole {
  readonly tokenizer: "tokenizer" | "tokenizer2" | "tokenizer3";
  /**
   * Where its hidden states go: beside those of the others along the channels, with as many tokens as the tokenizer has;
   * or behind them along the tokens, with as many as are asked for.
   */
  readonly joins: "channels" | "tokens";
  /** Inputs besides the ids that depend on the number of tokens only. */
  readonly constants?: (checkpoint: Checkpoint, tokens: number) => Readonly<Record<string, Tensor>>;
  /** Most layers that the variant `skip` leaves out; absent where there is no such variant. */
  readonly mostSkipped?: (checkpoint: Checkpoint) => number;
}

/** The option that gives the text of an encoder with this tokenizer. */
export const promptNames = { tokenizer: "prompt", tokenizer2: "prompt2", tokenizer3: "prompt3" } as const;

/** Options that give texts to encoders. */
export type PromptName = (typeof promptNames)[TextRole["tokenizer"]];

export interface Network {
  /** The part that owns its weights; null for arithmetic without weights. */
  readonly part: WeightedPart | null;
  /** `text`: encodes prompts; `step`: a fused sampling step; `image`: goes through the autoencoder; `edit`: other arithmetic. */
  readonly role: "text" | "step" | "image" | "edit";
  readonly text?: TextRole;
  readonly variants: readonly (keyof Variants)[];
  /** Features that need it; absent where every picture does. `side`: they need it at that size only, in latents. */
  readonly features?: Readonly<Partial<Record<Feature, { readonly side?: number }>>>;
  /** Whether steps with ControlNets need it, too, which `features` do not name. */
  readonly forControls?: boolean;
  /** The network that is launched in its place by checkpoints that have that one's part. */
  readonly replacedBy?: string;
  /** Whether it must not be computed in float16, which it was not trained in. */
  readonly overflowsInFloat16?: boolean;
  /** Whether launches may be held back for others to share them: alone they do not fill a device. */
  readonly deferrable?: boolean;
  /** Rows of one launch at most, for pictures of a size in pixels; absent for any number. Not for text encoders. */
  readonly maxRows?: (width: number, height: number) => number;
  readonly emit: (name: string, checkpoint: Checkpoint, options: EmitOptions, variants: Variants) => NetworkGraph;
}

/** Pixels that go through the autoencoder at once, since its activations take the most memory by far: one picture of 1024 × 1024. */
const pixelsAtOnce = 2 ** 20;
const autoencoderRows = (width: number, height: number) => Math.max(1, Math.floor(pixelsAtOnce / (width * height)));

/** Side, in latents, of the pictures that the preview's colours are fitted on. */
export const previewFitSide = 16;

function clip(part: "textEncoder" | "textEncoder2", tokenizer: "tokenizer" | "tokenizer2"): Network {
  return {
    ...{ part, role: "text", variants: ["skip", "masked", "lora"] },
    text: {
      ...{ tokenizer, joins: "channels" },
      mostSkipped: (checkpoint) => checkpoint[part]!.config.numHiddenLayers - 1,
    },
    emit: (name, checkpoint, options, { skip, masked, lora }) =>
      emitClip(name, checkpoint[part]!, checkpoint[tokenizer]!.maxLength, { ...options, skip, masked, lora }),
  };
}

function step(
  part: "transformer" | "refiner",
  type: "predict" | "refine",
  variants: readonly (keyof Variants)[] = ["guidance"],
): Network {
  return {
    ...{ part, role: "step", variants },
    emit: (name, checkpoint, options, { guidance = false, lora, controls, skipped }) => {
      const { weights, config } = checkpoint[part]!;
      const { numTrainTimesteps } = checkpoint.scheduler;
      const { shiftFactor, scalingFactor } = checkpoint.vae.config;
      return emitStep(name, type, weights, config, {
        ...{ ...options, guidance, lora, numTrainTimesteps, controlShift: shiftFactor * scalingFactor },
        controls: (controls?.split("+") ?? []).map((id) => controlNetOf(checkpoint, id)),
        skipped: (skipped?.split("+") ?? []).map(Number),
      });
    },
  };
}

/** @throws RangeError for an id of none that was opened */
function controlNetOf({ controlNets }: Checkpoint, id: string): ControlNet {
  const controlNet = controlNets.get(id);
  if (!controlNet) throw new RangeError(`There is no ControlNet "${id}".`);
  return controlNet;
}

/** The table of networks by name. */
export const networks: Record<string, Network> = {
  clip_l: clip("textEncoder", "tokenizer"),
  clip_g: clip("textEncoder2", "tokenizer2"),
  t5: {
    ...{ part: "textEncoder3", role: "text", variants: ["masked", "lora"], overflowsInFloat16: true },
    text: {
      ...{ tokenizer: "tokenizer3", joins: "tokens" },
      constants: ({ textEncoder3 }, tokens) => ({
        relative_buckets: int64([tokens, tokens], relativeBuckets(textEncoder3!.config, tokens)),
      }),
    },
    emit: (name, { textEncoder3 }, options, { masked, lora }) =>
      emitT5(name, textEncoder3!, { ...options, masked, lora }),
  },
  predict: step("transformer", "predict", ["guidance", "lora", "controls", "skipped"]),
  refine: { ...step("refiner", "refine"), deferrable: true },
  combine: {
    ...{ part: null, role: "edit", variants: ["guidance"] },
    emit: (name, { vae }, _, { guidance = false }) => emitCombine(name, vae.config.latentChannels, guidance !== false),
  },
  extrapolate: {
    // It has no weights, but is of use beside the refiner only.
    ...{ part: "refiner", role: "edit", variants: ["guidance"] },
    emit: (name, { vae }, _, { guidance = false }) =>
      emitExtrapolate(name, vae.config.latentChannels, guidance !== false),
  },
  vae_decoder: {
    ...{ part: "vae", role: "image", variants: [], maxRows: autoencoderRows },
    emit: (name, { vae }, options) => emitVaeDecoder(name, vae, options),
  },
  vae_encoder: {
    ...{ part: "vae", role: "image", variants: [], features: { editing: {}, previews: { side: previewFitSide } } },
    // A request has one original, and control pictures are encoded one by one.
    ...{ maxRows: () => 1, forControls: true },
    emit: (name, { vae }, options) => emitVaeEncoder(name, vae, options),
  },
  upscale: {
    ...{ part: "vae", role: "image", variants: [], features: { stages: {} }, maxRows: autoencoderRows },
    ...{ deferrable: true, replacedBy: "preview_upscale" },
    emit: (name, { vae }, options) => emitUpscale(name, vae, options),
  },
  preview_upscale: {
    ...{ part: "joiningVae", role: "image", variants: [], features: { stages: {} }, maxRows: autoencoderRows },
    deferrable: true,
    emit: (name, { joiningVae }, options) => emitUpscale(name, joiningVae!, options),
  },
  preview_decoder: {
    ...{ part: "previewVae", role: "image", variants: [], features: { previews: {} }, maxRows: autoencoderRows },
    emit: (name, { previewVae }, options) => emitVaeDecoder(name, previewVae!, options),
  },
  upscale_latents: {
    ...{ part: null, role: "edit", variants: [], features: { stages: {} } },
    deferrable: true,
    emit: (name, { vae }) => emitUpscaleLatents(name, vae.config.latentChannels),
  },
  scale_noise: {
    ...{ part: null, role: "edit", variants: [], features: { editing: {} } },
    emit: (name, { vae }) => emitScaleNoise(name, vae.config.latentChannels),
  },
  inpaint_blend: {
    ...{ part: null, role: "edit", variants: ["guidance"], features: { editing: {} } },
    emit: (name, { vae }, _, { guidance = false }) =>
      emitInpaintBlend(name, vae.config.latentChannels, guidance !== false),
  },
  preview: {
    ...{ part: null, role: "edit", variants: ["guidance"], features: { previews: {} } },
    emit: (name, { vae }, _, { guidance = false }) => emitPreview(name, vae.config.latentChannels, guidance !== false),
  },
};

/** The network of each way from one stage to the next, by the values of a stage's option `upscale`. */
export const upscales = table<string>()({ pixels: "upscale", latents: "upscale_latents" });

/** What is enlarged between two stages: see the option `upscale` of a stage. */
export type UpscaleName = keyof typeof upscales;

/** The features that some network names. */
export function featureNames(): Feature[] {
  return [...new Set(Object.values(networks).flatMap(({ features }) => Object.keys(features ?? {}) as Feature[]))];
}

/** For each variant its values that are wanted, undefined for graphs without it; one that is absent is not wanted. */
export type VariantValues = { readonly [Name in keyof Variants]?: readonly Variants[Name][] };

/**
 * The keys of a network for the kinds of guidance that are wanted; only steps differ by its mode.
 * @param added values of other variants, in all combinations that occur: blocks are left out of guided steps only
 */
export function guidedKeysOf(
  network: string,
  guided: readonly boolean[],
  mode: "cfg" | "cfg_zero" = "cfg",
  added: VariantValues = {},
): GraphKey[] {
  const on = networks[network]!.role === "step" && mode !== "cfg" ? mode : true;
  const keys = keysOf(network, { ...added, guidance: guided.map((each) => each && on) });
  return keys.filter(({ guidance, skipped }) => guidance || skipped === undefined);
}

/** The keys of a network for every combination of the variants that it comes in. */
export function keysOf(network: string, values: VariantValues): GraphKey[] {
  return networks[network]!.variants.reduce<GraphKey[]>(
    (keys, name) => keys.flatMap((key) => values[name]?.map((value) => ({ ...key, [name]: value })) ?? key),
    [{ network }],
  );
}

/**
 * A key as a name: "predict.guidance", or "predict" without. Programs, costs, engines and reports name graphs so.
 * @throws RangeError for a network that is not in the table, or a variant that it does not come in
 */
export function graphName({ network, ...variants }: GraphKey): string {
  const row = Object.hasOwn(networks, network) ? networks[network] : undefined;
  if (!row) throw new RangeError(`There is no network "${network}".`);
  const present = Object.entries(variants).filter(([, value]) => value !== undefined && value !== false);
  for (const [name] of present)
    if (!(row.variants as readonly string[]).includes(name))
      throw new RangeError(`The network ${network} has no variant "${name}".`);
  const { lora } = variants;
  if (lora !== undefined && !loraRanks.includes(lora)) throw new RangeError(`No graph is emitted for rank ${lora}.`);
  return [network, ...present.map(([name, value]) => (value === true ? name : `${name}-${value}`)).sort()].join(".");
}

/** The key of a name. @throws RangeError for a name that `graphName` does not give */
export function graphKey(name: string): GraphKey {
  const [network, ...present] = name.split(".") as [string, ...string[]];
  const variants = present.map((each): [string, boolean | string | number] => {
    const dash = each.indexOf("-");
    if (dash < 0) return [each, true];
    const [variant, value] = [each.slice(0, dash), each.slice(dash + 1)];
    return [variant, variant === "lora" ? Number(value) : value];
  });
  const key = { network, ...Object.fromEntries(variants) };
  if (graphName(key) !== name) throw new RangeError(`"${name}" is no name of a graph.`);
  return key;
}

/** The networks that a checkpoint has weights for, in the order of the table. */
export function networksOf(checkpoint: Checkpoint): { readonly name: string; readonly row: Network }[] {
  return Object.entries(networks)
    .filter(
      ([name, { part }]) => (part === null || checkpoint[part] !== null) && launchedFor(checkpoint, name) === name,
    )
    .map(([name, row]) => ({ name, row }));
}

/** The network that a checkpoint launches for `name`: itself, or the one that replaces it. */
export function launchedFor(checkpoint: Checkpoint, name: string): string {
  const { replacedBy } = networks[name]!;
  return replacedBy !== undefined && checkpoint[networks[replacedBy]!.part!] !== null ? replacedBy : name;
}

/** A text encoder that a checkpoint has, with its tokenizer. */
export interface TextEncoder {
  readonly name: string;
  readonly text: TextRole;
  readonly tokenizer: Tokenizer;
}

/** The text encoders of a checkpoint. */
export function textEncodersOf(checkpoint: Checkpoint): TextEncoder[] {
  return networksOf(checkpoint).flatMap(({ name, row: { text } }) => {
    const tokenizer = text && checkpoint[text.tokenizer];
    return text && tokenizer ? [{ name, text, tokenizer }] : [];
  });
}

/** Tokens of a text encoder's launches, where `sequenceLength` are asked for. */
export function tokensOf({ text, tokenizer }: TextEncoder, sequenceLength: number): number {
  return text.joins === "tokens" ? sequenceLength : tokenizer.maxLength;
}

/** The parts of a checkpoint that have weights, each once. */
export function weightedParts(checkpoint: Checkpoint): Part<unknown>[] {
  const parts = new Set(Object.values(networks).map(({ part }) => part));
  // Two names may stand for one part.
  return [...new Set([...parts].flatMap((part) => (part && checkpoint[part]) ?? []))];
}
