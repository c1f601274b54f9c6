/**
 * The JSON form of requests and results as zod codecs: what is on the wire, what it is in memory, and what is checked. json.ts
 * reads and writes by them; schema.ts publishes their side of the wire. Nothing here may load sharp or another native
 * library: schemas are for processes that draw nothing.
 */

import * as z from "zod";
import { type Seed, seedOf, seedToJson } from "./common/seed.js";
import { elementCount } from "./common/tensor.js";
import type { RgbPicture } from "./model.js";
import { controlSchema, embedsSchema, generateSchema, optionMeta, seedJson, tensor } from "./options.js";

const bytes = z.codec(
  z.base64(),
  z.custom<Uint8Array>((value) => value instanceof Uint8Array),
  {
    decode: (text) => new Uint8Array(Buffer.from(text, "base64")),
    encode: (data) => Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64"),
  },
);
const side = z.int().positive();
const notShaped = "the data does not have the shape's values";
/** Float32 values in little-endian order, as in .safetensors files. */
export const tensorJson = z.codec(
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
const seed = z.codec(
  seedJson,
  z.custom<Seed>(() => true),
  { decode: seedOf, encode: seedToJson },
);
const rgb = { width: side, height: side, data: bytes };
const isRgb = ({ width, height, data }: RgbPicture) => data.length === 3 * width * height;
const notRgb = "the data does not have 3 bytes for each pixel";
const rgbJson = z.strictObject(rgb).refine(isRgb, notRgb);
/** A picture to read: an encoded file, or its pixels. */
export const source = z.union([z.strictObject({ file: bytes }), rgbJson]);
const large = "above 2^53 - 1 as text of digits";
const encodings =
  "{ file }, an encoded file, or { width, height, data } with 3 bytes (RGB) for each pixel; bytes as base64";
/** A picture of a result. */
export const pictureJson = z.strictObject({ ...rgb, parameters: z.record(z.string(), z.json()) }).refine(isRgb, notRgb);

const { signal: _, onAccept: __, onStart: ___, onStep: ____, allowPaths: _____, ...plain } = generateSchema.shape;
/**
 * A request: all options but those that only code of the same process can give, and `allowPaths`, which is the server's. That it has a
 * prompt or embeddings is for others to check: zod writes nothing by a codec with checks of the whole.
 */
export const requestCodec = z.strictObject({
  ...plain,
  seed: seed.optional().describe(`${optionMeta(plain.seed).description}; ${large}`),
  seeds: z
    .array(seed)
    .min(1)
    .optional()
    .describe(`${optionMeta(plain.seeds).description}; ${large}`),
  promptEmbeds: embedsSchema(tensorJson)
    .optional()
    .describe(
      "embeddings of prompts, as encode() returns them, in place of prompt; float32 values, little-endian, as base64",
    ),
  image: source.optional().describe(`picture to start from: ${encodings}`),
  mask: source
    .optional()
    .describe(`where to paint: white (or opaque) parts are drawn anew, the rest of image is kept; ${encodings}`),
  controls: z
    // How many there may be is checked with the other options, for the reason above.
    .array(controlSchema(source))
    .optional()
    .describe(`${optionMeta(plain.controls).description}; pictures: ${encodings}`),
  noise: z
    .union([tensorJson, z.array(tensorJson).min(1)])
    .optional()
    .describe(
      "starting noise [B, C, h, w] in place of a seed, one for each stage; float32 values, little-endian, as base64",
    ),
});

const numbers = z.array(z.number());
/** A result whose pictures have the given form. */
export const resultCodec = <T extends z.ZodType>(picture: T) =>
  z.strictObject({
    images: z.array(picture),
    latents: tensorJson.nullable(),
    pixels: tensorJson.nullable(),
    seeds: z.array(seed),
    width: side,
    height: side,
    blocks: z.string(),
    sigmas: numbers,
    stages: z.array(z.strictObject({ width: side, height: side, blocks: z.string(), sigmas: numbers })),
    evaluations: z.strictObject({ predictor: z.number(), refiner: z.number(), rows: z.number() }),
    tokens: z.strictObject({ text: z.int().nonnegative(), image: z.int().nonnegative() }),
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
