/**
 * The JSON form of requests and results, for servers, queues and remote models: everything but signals and callbacks can
 * be written and read back without loss. Bytes are base64; tensors are { dtype, shape, data }; pictures go by their bytes,
 * never by a path.
 */

import { readFile } from "node:fs/promises";
import { z } from "zod";
import { elementCount } from "./common/tensor.js";
import { OptionError } from "./errors.js";
import { Image } from "./generation/image.js";
import type { GenerateOptions, GenerateResult, Picture, PictureSource, RgbPicture } from "./model.js";
import { checkOptions, generateSchema, refusePaths, tensor } from "./options.js";

/** A value that JSON can hold. */
export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

const bytes = z.codec(
  z.base64(),
  z.custom<Uint8Array>((value) => value instanceof Uint8Array),
  {
    decode: (text) => new Uint8Array(Buffer.from(text, "base64")),
    encode: (data) => Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64"),
  },
);
const side = z.int().positive();
/** Float32 values in little-endian order, as in .safetensors files. */
const notShaped = "the data does not have the shape's values";
const tensorJson = z.codec(
  z
    .strictObject({ dtype: z.literal("float32"), shape: z.array(z.int().nonnegative()), data: bytes })
    .refine(({ shape, data }) => data.length === 4 * elementCount(shape), notShaped),
  tensor.refine(({ shape, data }) => data.length === elementCount(shape), notShaped),
  {
    decode: ({ dtype, shape, data }) => ({ dtype, shape, data: new Float32Array(data.buffer) }),
    encode: ({ dtype, shape, data }) => ({
      ...{ dtype, shape: [...shape] },
      data: new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
    }),
  },
);
const rgb = { width: side, height: side, data: bytes };
const isRgb = ({ width, height, data }: RgbPicture) => data.length === 3 * width * height;
const notRgb = "the data does not have 3 bytes for each pixel";
const source = z.union([z.strictObject({ file: bytes }), z.strictObject(rgb).refine(isRgb, notRgb)]);
const picture = z.codec(
  z.strictObject({ ...rgb, parameters: z.record(z.string(), z.json()) }).refine(isRgb, notRgb),
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

const { signal: _, onStep: __, allowPaths: ___, ...plain } = generateSchema.shape;
const requestSchema = z.strictObject({
  ...plain,
  image: source.optional(),
  mask: source.optional(),
  noise: z.union([tensorJson, z.array(tensorJson)]).optional(),
});

const numbers = z.array(z.number());
const resultSchema = z.strictObject({
  images: z.array(picture),
  latents: tensorJson,
  pixels: tensorJson,
  seeds: numbers,
  width: side,
  height: side,
  blocks: z.string(),
  sigmas: numbers,
  stages: z.array(z.strictObject({ width: side, height: side, blocks: z.string(), sigmas: numbers })),
  evaluations: z.strictObject({ predictor: z.number(), refiner: z.number() }),
  timings: z.strictObject({
    ...{ load: z.number(), queue: z.number(), encode: z.number(), steps: numbers },
    ...{ upscale: z.number(), edit: z.number(), decode: z.number(), total: z.number() },
  }),
  deadline: z
    .strictObject({
      ...{ deadlineMs: z.number(), blocks: z.string(), reason: z.string() },
      ...{ predictedMs: z.number(), actualMs: z.number() },
    })
    .nullable(),
  warnings: z.array(z.string()),
});

/**
 * A request as JSON, with defaults filled in. Pictures that are given by a path are read, unless `allowPaths` is false.
 * @throws OptionError for options that are wrong, or a picture that cannot be read
 */
export async function requestToJson(options: GenerateOptions): Promise<Json> {
  const checked = checkOptions(generateSchema, options, "requestToJson()");
  refusePaths(checked);
  const { signal, onStep, allowPaths, image, mask, ...rest } = checked;
  const pictures = {
    ...(image !== undefined && { image: await sourceOf("image", image) }),
    ...(mask !== undefined && { mask: await sourceOf("mask", mask) }),
  };
  return encoded(requestSchema, { ...rest, ...pictures }, "request");
}

/** The options of a request from its JSON, which names no file. @throws OptionError that names the option which is wrong */
export function requestFromJson(json: unknown): GenerateOptions {
  const { image, mask, ...options } = decoded(requestSchema, json, "request");
  const given = (value: z.output<typeof source>): PictureSource => ("file" in value ? value.file : value);
  return { ...options, ...(image && { image: given(image) }), ...(mask && { mask: given(mask) }) };
}

/** A result as JSON. @throws OptionError that names the field which is wrong */
export function resultToJson(result: GenerateResult): Json {
  return encoded(resultSchema, result, "result");
}

/** A result from its JSON; its pictures can be encoded. @throws OptionError that names the field which is wrong */
export function resultFromJson(json: unknown): GenerateResult {
  return decoded(resultSchema, json, "result");
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
  return new OptionError(String(path[0] ?? what), `${why}${field && ` at ${field}`}: ${message}.`);
}
