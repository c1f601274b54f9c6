/** A result → the answer that OpenAI's API has for it, with what this server knows beside it. */

import { seedToJson } from "../common/seed.js";
import { resized } from "../generation/image.js";
import type { GenerateResult, ImageFormat, Picture } from "../model.js";
import { qualities } from "../schedule/index.js";
import type { ApiQuality, Rendering, Settled } from "./settle.js";

/** Tokens as OpenAI's API counts them: of texts, and of pictures in the patches that the transformer sees. */
export interface Usage {
  readonly input_tokens: number;
  readonly input_tokens_details: { readonly text_tokens: number; readonly image_tokens: number };
  readonly output_tokens: number;
  readonly output_tokens_details: { readonly text_tokens: number; readonly image_tokens: number };
  readonly total_tokens: number;
}

/** What is said of pictures whatever their form. */
export interface PictureFacts {
  readonly background: "opaque";
  readonly output_format: ImageFormat;
  readonly quality: ApiQuality;
  /** Width x height. */
  readonly size: string;
}

/** How pictures were drawn. */
export interface Drawn extends Pick<GenerateResult, "blocks" | "evaluations" | "deadline" | "warnings"> {
  /** Seed of each picture; text of digits where a number would not be exact. */
  readonly seeds: readonly (number | string)[];
  /** Id of the model. */
  readonly model: string;
  readonly usage: Usage;
  /** Milliseconds. */
  readonly timings: Omit<GenerateResult["timings"], "load">;
}

/** The answer to a request. */
export interface Answer extends PictureFacts, Drawn {
  /** Seconds since 1970. */
  readonly created: number;
  readonly data: readonly { readonly b64_json: string }[];
}

export async function answerOf(
  result: GenerateResult,
  { rendering, inputPixels }: Pick<Settled, "rendering" | "inputPixels">,
  model: string,
): Promise<Answer> {
  const data: { b64_json: string }[] = [];
  for (const image of result.images) data.push({ b64_json: await encoded(image, rendering) });
  const { width, height, seeds, blocks, evaluations, deadline, warnings, tokens } = result;
  const { load: _, ...timings } = result.timings;
  // The picture that is edited is resized to the size that is drawn.
  const [images, edited] = [tokens.image * result.images.length, inputPixels > 0 ? tokens.image : 0];
  return {
    ...{ created: seconds(), data, background: "opaque", output_format: rendering.format },
    quality: rendering.asked ?? qualityOf(evaluations.predictor),
    size: `${width}x${height}`,
    usage: {
      input_tokens: tokens.text + edited,
      input_tokens_details: { text_tokens: tokens.text, image_tokens: edited },
      output_tokens: images,
      output_tokens_details: { text_tokens: 0, image_tokens: images },
      total_tokens: tokens.text + edited + images,
    },
    ...{ model, seeds: seeds.map(seedToJson), blocks, evaluations, timings, deadline, warnings },
  };
}

/** A partial picture as a file in base64. @param size scales it to that */
export async function partialOf(
  picture: Picture,
  rendering: Rendering,
  size: { readonly width: number; readonly height: number } | null,
): Promise<string> {
  const isSmall = size !== null && (picture.width !== size.width || picture.height !== size.height);
  return encoded(isSmall ? await resized(picture, size.width, size.height) : picture, rendering);
}

export function seconds(milliseconds = Date.now()): number {
  return Math.floor(milliseconds / 1000);
}

/** The quality whose number of steps an evaluation count reaches. */
export function qualityOf(evaluations: number): ApiQuality {
  if (evaluations >= qualities.best!.steps) return "high";
  return evaluations >= qualities.balanced!.steps ? "medium" : "low";
}

async function encoded(picture: Picture, { format, quality }: Rendering): Promise<string> {
  const file = await picture.encode(format, format === "png" || quality === undefined ? {} : { quality });
  return file.toString("base64");
}
