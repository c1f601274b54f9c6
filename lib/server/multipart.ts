/** Reads multipart/form-data into memory, within limits. */

import type { IncomingHttpHeaders } from "node:http";
import type { Readable } from "node:stream";
import type { Form } from "./bodies.js";
import { Failure } from "./failure.js";
import { longestPrompt } from "./fields.js";
import { busboy } from "./packages.js";

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
          fields: 64,
          files: 4,
          parts: 68,
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
    let bytes = 0;
    stream.on("data", (chunk: Buffer) => {
      bytes += chunk.length;
      if (bytes > maxBytes) fail(tooLarge());
    });
    stream.once("error", (cause) => fail(malformed(cause)));
    stream.once("aborted", () => fail(malformed()));
    parser.on("field", (name, text, isNameCut, isCut) => {
      const known = texts.get(name);
      const isRepeated = known !== undefined && !name.endsWith("[]");
      if (isNameCut || isCut || isRepeated) {
        const reason = isRepeated ? "is given more than once" : "is too long";
        fail(new Failure(400, `The field ${JSON.stringify(name)} ${reason}.`, { param: name, code: "invalid_value" }));
      } else texts.set(name, [...(known ?? []), text]);
    });
    parser.on("file", (name, file) => {
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
