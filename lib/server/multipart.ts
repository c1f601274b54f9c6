/** Reads multipart/form-data into memory, within limits. */

import type { IncomingHttpHeaders } from "node:http";
import type { Readable } from "node:stream";
import { mostControls } from "../options.js";
import type { Form } from "./bodies.js";
import { Failure } from "./failure.js";
import { longestPrompt } from "./fields.js";
import { busboy } from "./packages.js";

/** Parts of a form: `image`, `mask`, and the two pictures of each ControlNet are files. */
const mostTexts = 128;
const mostFiles = 2 + 2 * mostControls;

/** @throws Failure with 400 for a body that is malformed, 413 for one that is too large */
export async function readForm(stream: Readable, headers: IncomingHttpHeaders, maxBytes: number): Promise<Form> {
  const tooLarge = () => new Failure(413, `Expected a body of at most ${maxBytes} bytes.`, { code: "body_too_large" });
  if (Number(headers["content-length"]) > maxBytes) throw tooLarge();
  const { Busboy } = await busboy.load();
  const texts = new Map<string, string[]>();
  const files = new Map<string, Uint8Array[]>();
  return new Promise<Form>((resolve, reject) => {
    const malformed = (cause?: unknown) =>
      new Failure(400, "The body is not valid multipart/form-data.", { code: "invalid_request", cause });
    let parser: InstanceType<typeof Busboy>;
    try {
      parser = new Busboy({
        headers: { ...headers, "content-type": headers["content-type"]! },
        // Characters may have four bytes.
        limits: {
          fields: mostTexts,
          files: mostFiles,
          parts: mostTexts + mostFiles,
          fieldNameSize: 64,
          fieldSize: 4 * longestPrompt,
          fileSize: maxBytes,
          headerPairs: 32,
        },
      });
    } catch (cause) {
      reject(malformed(cause));
      return;
    }
    const fail = (failure: Failure) => {
      stream.unpipe(parser);
      reject(failure);
    };
    const placed = placing();
    let bytes = 0;
    stream.on("data", (chunk: Buffer) => {
      bytes += chunk.length;
      if (bytes > maxBytes) fail(tooLarge());
    });
    stream.once("error", (cause) => fail(malformed(cause)));
    stream.once("aborted", () => fail(malformed()));
    parser.on("field", (given, text, isNameCut, isCut) => {
      const name = placed(given);
      const known = texts.get(name);
      const isRepeated = known !== undefined && !name.endsWith("[]");
      if (isNameCut || isCut || isRepeated) {
        const reason = isRepeated ? "is given more than once" : "is too long";
        fail(new Failure(400, `The field ${JSON.stringify(name)} ${reason}.`, { param: name, code: "invalid_value" }));
      } else texts.set(name, [...(known ?? []), text]);
    });
    parser.on("file", (given, file) => {
      const name = placed(given);
      const chunks: Buffer[] = [];
      file.on("data", (chunk) => chunks.push(chunk));
      file.once("limit", () => fail(tooLarge()));
      file.once("error", (cause) => fail(malformed(cause)));
      file.once("end", () => files.set(name, [...(files.get(name) ?? []), Buffer.concat(chunks)]));
    });
    for (const limit of ["fieldsLimit", "filesLimit", "partsLimit"] as const)
      parser.on(limit, () => fail(new Failure(400, "The body has too many parts.", { code: "invalid_request" })));
    parser.once("error", (cause) => fail(malformed(cause)));
    parser.once("finish", () => resolve({ texts, files }));
    stream.pipe(parser);
  });
}

/**
 * Gives the objects of a list their places: OpenAI's clients write `controls[][name]`, and the next object begins with a key that the one
 * before has.
 */
function placing(): (name: string) => string {
  const lists = new Map<string, { place: number; keys: Set<string> }>();
  return (name) => {
    const [, list, key, rest] = /^([^[\]]+)\[\]\[([^[\]]+)\](.*)$/s.exec(name) ?? [];
    if (list === undefined) return name;
    const known = lists.get(list) ?? { place: 0, keys: new Set() };
    lists.set(list, known);
    // Of a list there may be several in one object.
    if (known.keys.has(key!) && rest !== "[]") {
      known.place++;
      known.keys.clear();
    }
    known.keys.add(key!);
    return `${list}[${known.place}][${key}]${rest}`;
  };
}
