/**
 * JSON Schemas (draft 2020-12) of requests and results, for other people's servers, clients and documents: `flowturbo/schema`. They
 * are made of the same schemas that requestFromJson checks with. The build runs this file and publishes plain values, so that
 * who imports them loads nothing else.
 */

import * as z from "zod";
import { pictureJson, requestCodec, resultCodec } from "./codecs.js";

/** A JSON Schema: a plain object, which JSON can hold. */
export interface JsonSchema {
  /** Its keywords. */
  readonly [keyword: string]: unknown;
}

/**
 * What `requestFromJson` takes: every option of `generate` but `signal`, `onAccept`, `onStart`, `onStep` and `allowPaths`, with descriptions, ranges and defaults;
 * pictures and noise as base64. What no JSON Schema can say is left to `requestFromJson`: that pixels and tensors have as
 * many bytes as their size asks for, and that digits of a seed are a number of 64 bits. What depends on a model is left to `generate`.
 */
export const requestJsonSchema: JsonSchema = {
  ...jsonSchema("A request of flowturbo", requestCodec),
  anyOf: ["prompt", "promptEmbeds"].map((name) => ({ required: [name], properties: { [name]: {} } })),
};

/** What `resultToJson` gives. */
export const resultJsonSchema: JsonSchema = jsonSchema("A result of flowturbo", resultCodec(pictureJson));

function jsonSchema(title: string, codec: z.ZodType): JsonSchema {
  const { $schema, ...schema } = z.toJSONSchema(codec, {
    target: "draft-2020-12",
    // The side of the wire.
    io: "input",
    override({ jsonSchema }) {
      // A format that no draft has: contentEncoding and the pattern say the same.
      if (jsonSchema.format === "base64") delete jsonSchema.format;
    },
  });
  return { $schema, title, ...schema };
}
