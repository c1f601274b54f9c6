/**
 * What the packages and programs that draw for others need of a model, whether it is loaded in this process (local.ts) or
 * served by `flowturbo serve` on some machine (remote.ts): one request in, encoded pictures out.
 */

import type { Control, DeadlineResult, GenerateOptions, ImageFormat, Timings } from "../model.js";
import type { Evaluations } from "../schedule/index.js";

/** Texts beside the prompt. They mean what they mean in `GenerateOptions`, of one prompt. */
export const textOptions = [
  "prompt2",
  "prompt3",
  "negativePrompt",
  "negativePrompt2",
  "negativePrompt3",
] as const satisfies readonly (keyof GenerateOptions)[];

/** Options that mean the same in this process and over HTTP, and mean what they mean in `GenerateOptions`. */
export const sharedOptions = [
  "clipSkip",
  "promptWeighting",
  "maxSequenceLength",
  "width",
  "height",
  "seed",
  "seeds",
  "steps",
  "quality",
  "guidanceScale",
  "skipLayers",
  "loras",
  "blocks",
  "sampler",
  "strength",
  "paddingMaskCrop",
  "deadlineMs",
  "stages",
] as const satisfies readonly (keyof GenerateOptions)[];

type TextOptions = { [Name in (typeof textOptions)[number]]?: string | undefined };

/** A ControlNet with its encoded control picture. */
export interface NamedControl extends Omit<Control, "folder" | "image" | "mask"> {
  /** What the model was loaded with it as: never a path. */
  name: string;
  image: Uint8Array;
  /** As `DrawRequest.mask`. */
  mask?: Uint8Array | undefined;
}

/** What is to be drawn. Width and height are given together or not at all. */
export interface DrawRequest extends Pick<GenerateOptions, (typeof sharedOptions)[number]>, TextOptions {
  prompt: string;
  /** Number of pictures. */
  count: number;
  /** An encoded picture to start from. */
  image?: Uint8Array | undefined;
  /** Where to paint, as masks.ts reads it: transparent, or white where nothing is transparent. Only with `image`. */
  mask?: Uint8Array | undefined;
  controls?: readonly NamedControl[] | undefined;
  /** Of the pictures' files. */
  format: ImageFormat;
  /** 0 to 100, for jpeg and webp: higher is better and larger. */
  compression?: number | undefined;
}

/** What was drawn. */
export interface Drawn {
  /** The encoded pictures: all as bytes, or all in base64, whichever the drawer has. */
  readonly pictures: readonly Uint8Array[] | readonly string[];
  readonly width: number;
  readonly height: number;
  /** Seed of each picture; text of digits where a number would not be exact. */
  readonly seeds: readonly (number | string)[];
  readonly blocks: string;
  readonly evaluations: Evaluations;
  readonly timings: Omit<Timings, "load">;
  readonly deadline: DeadlineResult | null;
  readonly warnings: readonly string[];
  /** Name of the model. */
  readonly model: string;
  /** Tokens that were read and drawn. */
  readonly usage: Usage;
  /** Of the answer, in lower case; null in this process. */
  readonly headers: Readonly<Record<string, string>> | null;
}

/** Tokens of a request. */
export interface Usage {
  /** Of the prompts, and of the picture that an edit starts from. */
  readonly input: number;
  /** Of the pictures. */
  readonly output: number;
}

/** How a request is followed and ended. */
export interface DrawControls {
  /** Ends the work: the call rejects with its reason. */
  readonly signal?: AbortSignal | undefined;
  /** Called after each step with how many are done, and how many there are. */
  readonly onStep?: ((done: number, steps: number) => unknown) | undefined;
  /** Further headers of requests over HTTP. */
  readonly headers?: Readonly<Record<string, string | undefined>> | undefined;
}

/** What is known of a model before anything is drawn. */
export interface DrawerInfo {
  readonly name: string;
  readonly nativeSize: { readonly width: number; readonly height: number };
  /** Pictures of one request at most. */
  readonly maxImages: number;
}

export interface Drawer {
  /** Where requests go, for messages. */
  readonly address: string;
  /** @throws as `draw` */
  info(controls?: DrawControls): Promise<DrawerInfo>;
  /** @throws FlowTurboError in this process; RemoteError over HTTP; the signal's reason after an abort */
  draw(request: DrawRequest, controls?: DrawControls): Promise<Drawn>;
}
