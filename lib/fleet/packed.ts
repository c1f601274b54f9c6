/**
 * A result as bytes: what is said of it as JSON, and its pictures and tensors as they are in memory (little-endian). As JSON alone they would be text, a third
 * larger, and would hold up the event loop for some ten milliseconds a megapixel on both sides.
 */

import * as z from "zod";
import { resultCodec } from "../codecs.js";
import { elementCount, type FloatTensor } from "../common/tensor.js";
import { RuntimeError } from "../errors.js";
import { Image } from "../generation/image.js";
import { resultFromJson, resultToJson } from "../json.js";
import type { GenerateResult } from "../model.js";

const side = z.int().positive();
const shape = z.array(z.int().nonnegative()).nullable();
// What a later version adds is left aside: workers are updated before gateways.
const headerSchema = z.object({
  pictures: z.array(z.object({ width: side, height: side, parameters: z.record(z.string(), z.json()) })),
  latents: shape,
  pixels: shape,
  /** Whether the first launch of a size, which may take long, was in its way: its own, or that of a request beside it. */
  isDisturbed: z.boolean().default(false),
  /** The rest, as `resultToJson` has it. */
  result: z.looseObject({ blocks: z.string() }),
});

const fields = new Set(Object.keys(resultCodec(z.unknown()).shape));

/** @param isDisturbed whether the first launch of a size was in its way */
export function packResult(result: GenerateResult, isDisturbed = false): Buffer {
  const { images, latents, pixels } = result;
  const header = {
    pictures: images.map(({ width, height, parameters }) => ({ width, height, parameters })),
    ...{ latents: latents?.shape ?? null, pixels: pixels?.shape ?? null, isDisturbed },
    result: resultToJson({ ...result, images: [], latents: null, pixels: null }),
  };
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  const tensors = [latents, pixels].flatMap((tensor) => (tensor ? [tensor.data] : []));
  const parts = [...images.map(({ data }) => data), ...tensors];
  return Buffer.concat([
    length,
    text,
    ...parts.map((part) => new Uint8Array(part.buffer, part.byteOffset, part.byteLength)),
  ]);
}

/** The schedule that a packed result was drawn with, and whether the first launch of a size was in its way. @throws RuntimeError for other bytes */
export function aboutResult(bytes: Buffer): { readonly blocks: string; readonly isDisturbed: boolean } {
  const { result, isDisturbed } = headerOf(bytes).header;
  return { blocks: result.blocks, isDisturbed };
}

/** Its pictures share their memory with the bytes. @throws RuntimeError for other bytes */
export function unpackResult(bytes: Buffer): GenerateResult {
  const { header, end } = headerOf(bytes);
  let at = end;
  const take = (length: number) => {
    if (at + length > bytes.length) throw notPacked();
    at += length;
    return new Uint8Array(bytes.buffer, bytes.byteOffset + at - length, length);
  };
  const tensor = (shape: readonly number[] | null): FloatTensor | null => {
    if (!shape) return null;
    const part = take(4 * elementCount(shape));
    // Copied: it may begin anywhere.
    const data = new Float32Array(part.buffer.slice(part.byteOffset, part.byteOffset + part.byteLength));
    return { dtype: "float32", shape, data };
  };
  const images = header.pictures.map(
    ({ width, height, parameters }) => new Image(width, height, take(3 * width * height), parameters),
  );
  const [latents, pixels] = [tensor(header.latents), tensor(header.pixels)];
  if (at !== bytes.length) throw notPacked();
  const known = Object.fromEntries(Object.entries(header.result).filter(([name]) => fields.has(name)));
  return { ...resultFromJson(known), images, latents, pixels };
}

function headerOf(bytes: Buffer) {
  const end = bytes.length < 4 ? Number.POSITIVE_INFINITY : 4 + bytes.readUInt32LE();
  if (end > bytes.length) throw notPacked();
  let json: unknown;
  try {
    json = JSON.parse(bytes.toString("utf8", 4, end));
  } catch (cause) {
    throw notPacked(cause);
  }
  const { success, data: header, error } = headerSchema.safeParse(json);
  if (!success) throw notPacked(error);
  return { header, end };
}

function notPacked(cause?: unknown): RuntimeError {
  return new RuntimeError(
    "The result of a job is not in the form that this version reads. Use the same version of flowturbo in the whole fleet.",
    { cause },
  );
}
