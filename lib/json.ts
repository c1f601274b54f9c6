/**
 * The JSON form of requests and results, for servers, queues and remote models: everything but signals and callbacks can
 * be written and read back without loss. Bytes are base64; tensors are { dtype, shape, data }; pictures go by their bytes,
 * never by a path.
 */

import { readFile } from "node:fs/promises";
import * as z from "zod";
import { pictureJson, requestCodec, resultCodec, type source } from "./codecs.js";
import { clipped } from "./common/text.js";
import { OptionError } from "./errors.js";
import { Image } from "./generation/image.js";
import type { Control, GenerateOptions, GenerateResult, Picture, PictureSource } from "./model.js";
import { checkOptions, generateSchema, hasPrompt, refuseOversized, refusePaths } from "./options.js";

/** A value that JSON can hold. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

/** A picture of a result, or one that is shown on the way. */
export const picture = z.codec(
  pictureJson,
  z.custom<Picture>((value) => typeof value === "object" && value !== null),
  {
    decode: ({ width, height, data, parameters }) => new Image(width, height, data, parameters),
    encode: ({ width, height, data, parameters }) => ({
      width,
      height,
      data,
      parameters: defined(parameters) as never,
    }),
  },
);
const resultSchema = resultCodec(picture);

/**
 * A request as JSON, with defaults filled in. Pictures that are given by a path are read, unless `allowPaths` is false.
 * @throws OptionError for options that are wrong, or a picture that cannot be read
 */
export async function requestToJson(options: GenerateOptions): Promise<Json> {
  const checked = checkOptions(generateSchema, options, "requestToJson()");
  refusePaths(checked);
  const { signal, onAccept, onStart, onStep, allowPaths, image, mask, controls, ...rest } = checked;
  const pictures = {
    ...(image !== undefined && { image: await sourceOf("image", image) }),
    ...(mask !== undefined && { mask: await sourceOf("mask", mask) }),
    ...(controls && { controls: await Promise.all(controls.map(controlToJson)) }),
  };
  return encoded(requestCodec, { ...rest, ...pictures }, "request");
}

/** The options of a request from its JSON, which names no file. @throws OptionError that names the option which is wrong */
export function requestFromJson(json: unknown): GenerateOptions {
  refuseOversized(json);
  const { image, mask, controls, ...options } = decoded(requestCodec, json, "request");
  if (!hasPrompt(options))
    throw new OptionError("prompt", "The JSON of this request is wrong at prompt: it is required, or promptEmbeds.");
  const given = (value: z.output<typeof source>): PictureSource => ("file" in value ? value.file : value);
  return {
    ...options,
    ...(image && { image: given(image) }),
    ...(mask && { mask: given(mask) }),
    ...(controls && {
      controls: controls.map(({ image, mask, ...control }) => ({
        ...{ ...control, image: given(image) },
        ...(mask && { mask: given(mask) }),
      })),
    }),
  };
}

/** A result as JSON. @throws OptionError that names the field which is wrong */
export function resultToJson(result: GenerateResult): Json {
  return encoded(resultSchema, result, "result");
}

/** A result from its JSON; its pictures can be encoded. @throws OptionError that names the field which is wrong */
export function resultFromJson(json: unknown): GenerateResult {
  return decoded(resultSchema, json, "result");
}

async function controlToJson({ image, mask, ...control }: Control) {
  return {
    ...{ ...control, image: await sourceOf("controls", image) },
    ...(mask !== undefined && { mask: await sourceOf("controls", mask) }),
  };
}

async function sourceOf(option: string, picture: PictureSource): Promise<z.output<typeof source>> {
  if (picture instanceof Uint8Array) return { file: picture };
  if (typeof picture !== "string") {
    const { width, height, data } = picture;
    return { width, height, data };
  }
  const file = await readFile(picture).catch((cause: Error) => {
    throw new OptionError(option, `The picture for ${option} cannot be read: ${cause.message}`, {
      cause,
      publicMessage: `The picture for ${option} cannot be read. Give its bytes.`,
    });
  });
  return { file };
}

function encoded(schema: z.ZodType, value: unknown, what: string): Json {
  const { success, data, error } = z.safeEncode(schema, value);
  if (success) return defined(data) as Json;
  throw refused(error, what, `This ${what} has no JSON form`);
}

/** Without properties that are undefined: they have no JSON form, and mean the same as absent ones. */
function defined(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(defined);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).flatMap(([key, each]) => (each === undefined ? [] : [[key, defined(each)]])),
  );
}

function decoded<T extends z.ZodType>(schema: T, json: unknown, what: string): z.output<T> {
  const { success, data, error } = z.safeDecode(schema, json as z.input<T>);
  if (success) return data;
  throw refused(error, what, `The JSON of this ${what} is wrong`);
}

function refused(error: z.ZodError, what: string, why: string): OptionError {
  const { path, message } = error.issues[0]!;
  const field = path.join(".");
  // A message names every field that there is no place for.
  const reason = clipped(message, 200);
  return new OptionError(String(path[0] ?? what), `${why}${field && ` at ${field}`}: ${reason}.`);
}
