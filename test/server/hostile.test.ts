// What clients of no good will send: bodies of a hundred megabytes, forms and JSON that are broken, pictures that are bombs. Every one is
// answered with what is wrong, in bounded memory, while others are served.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { deflateSync } from "node:zlib";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { answerIn, connect, killAll, type ServerProcess, startProcess } from "./process.js";
import { quick as few, post } from "./support.js";

const hasProc = process.platform === "linux";
const mebibyte = 2 ** 20;
const generations = "/v1/images/generations";
const edits = "/v1/images/edits";
const quick = { ...few, num_inference_steps: 2, guidance_scale: 1 };
let server: ServerProcess;
const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-hostile-"));
beforeAll(async () => {
  server = await startProcess(["--cache", cache, "--log-level", "info"]);
});
afterAll(async () => {
  await killAll();
  rmSync(cache, { recursive: true, force: true });
});

async function expectService(): Promise<void> {
  expect((await post(`${server.url}${generations}`, quick)).status).toBe(200);
  expect(server.child.exitCode).toBe(null);
  expect(server.stderr()).toBe("");
}
const head = (address: string, ...lines: string[]) =>
  `POST ${address} HTTP/1.1\r\nHost: x\r\n${lines.map((line) => `${line}\r\n`).join("")}\r\n`;
const json = "Content-Type: application/json";
const form = "Content-Type: multipart/form-data; boundary=x";
const chunked = "Transfer-Encoding: chunked";
const chunk = (text: string) => `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`;

/** Sends a head, and pieces until there is an answer or the connection is closed. @returns once it is closed */
async function flood(text: string, piece: string, count: number) {
  const connection = connect(server);
  connection.send(text);
  let sent = 0;
  while (!connection.socket.destroyed && connection.received() === "" && sent < count) {
    await new Promise((resolve) => connection.socket.write(piece, resolve));
    sent++;
  }
  const isClosed = await Promise.race([connection.closed.then(() => true), sleep(10_000).then(() => false)]);
  connection.socket.destroy();
  return { answer: answerIn(connection.received()), bytes: sent * piece.length, isClosed };
}
/** All that is answered to some bytes, on a connection that the server closes. */
async function raw(text: string | Uint8Array) {
  const connection = connect(server);
  connection.send(text);
  const isClosed = await Promise.race([connection.closed.then(() => true), sleep(10_000).then(() => false)]);
  connection.socket.destroy();
  return { answer: answerIn(connection.received()), isClosed };
}

describe("a body of a hundred megabytes", () => {
  const megabyte = "x".repeat(mebibyte);
  const part = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n';
  const announced = `Content-Length: ${100 * mebibyte}`;
  it.each([
    // What is announced is refused before it comes.
    ["JSON, announced", head(generations, json, announced), megabyte, 413, 8],
    ["JSON of an edit, announced", head(edits, json, announced), megabyte, 413, 8],
    ["a form, announced", head(edits, form, announced) + part, megabyte, 413, 8],
    ["JSON, in chunks", head(generations, json, chunked), chunk(megabyte), 413, 12],
    ["JSON of an edit, in chunks", head(edits, json, chunked), chunk(megabyte), 413, 60],
    ["JSON of a job, in chunks", head("/v1/jobs", json, chunked), chunk(megabyte), 413, 60],
    ["a form, in chunks", head(edits, form, chunked) + chunk(part), chunk(megabyte), 413, 60],
    ["a form with a text, in chunks", head(edits, form, chunked) + chunk('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'), chunk(megabyte), 413, 60], // biome-ignore format: one line
    ["a form where none is taken", head(generations, form, chunked) + chunk(part), chunk(megabyte), 413, 60],
    ["another type", head(generations, "Content-Type: application/octet-stream", chunked), chunk(megabyte), 415, 12],
    ["to no address", head("/v1/nothing", json, chunked), chunk(megabyte), 413, 12],
    ["with a method that is not taken", head("/v1/models", json, chunked), chunk(megabyte), 413, 12],
  ])("is refused, and the connection closed: %s", async (_, text, piece, status, most) => {
    const before = hasProc ? server.memory().now : 0;
    const { answer, bytes, isClosed } = await flood(text, piece, 100);
    expect([answer.status, answer.body]).toEqual([
      status,
      { error: { message: expect.any(String), type: "invalid_request_error", ...params } },
    ]);
    expect(bytes / mebibyte).toBeLessThan(most);
    expect(isClosed).toBe(true);
    // What was kept until it was too much, and once more as a string or in one piece; never the hundred.
    if (hasProc) expect((server.memory().now - before) / mebibyte).toBeLessThan(90);
    await expectService();
  });
  const params = { param: expect.toSatisfy(isText), code: expect.toSatisfy(isText) };

  it("takes no memory, however often it comes", async () => {
    if (!hasProc) return;
    const text = head(edits, form, chunked) + chunk(part);
    for (let index = 0; index < 3; index++) await flood(text, chunk(megabyte), 100);
    const before = server.memory().most;
    for (let index = 0; index < 6; index++) await flood(text, chunk(megabyte), 100);
    expect((server.memory().most - before) / mebibyte).toBeLessThan(100);
    await expectService();
  });
});
function isText(value: unknown): boolean {
  return value === null || typeof value === "string";
}

describe("a body that is broken", () => {
  const field = (name: string, text: string) =>
    `--x\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n${text}\r\n`;
  const whole = (address: string, type: string, body: string) =>
    `${head(address, type, `Content-Length: ${Buffer.byteLength(body)}`, "Connection: close")}${body}`;
  const bare = "Content-Type: multipart/form-data";
  it.each([
    ["chunks of no size", head(generations, json, chunked) + "ZZZ\r\n{}\r\n0\r\n\r\n", 400],
    [
      "chunks with an endless extension",
      head(generations, json, chunked) + `1;${"x".repeat(100_000)}\r\n{\r\n0\r\n\r\n`,
      413,
    ],
    ["two lengths", head(generations, json, "Content-Length: 2", "Content-Length: 3") + "{}", 400],
    ["a length and chunks", head(generations, json, "Content-Length: 2", chunked) + "0\r\n\r\n", 400],
    ["a length that is no number", head(generations, json, "Content-Length: 2x") + "{}", 400],
    ["a form without a boundary", whole(edits, bare, field("prompt", "x")), 400],
    ["a form with another boundary", whole(edits, `${bare}; boundary=y`, field("prompt", "x")), 400],
    [
      "a form that ends in the middle",
      whole(edits, form, `${field("prompt", "x")}--x\r\nContent-Disposition: form-da`),
      400,
    ],
    ["a form without an end", whole(edits, form, field("prompt", "x")), 400],
    ["a form of nothing", whole(edits, form, ""), 400],
    [
      "a form of 5000 parts",
      whole(edits, form, `${Array.from({ length: 5000 }, (_, index) => field(`f${index}`, "x")).join("")}--x--\r\n`),
      400,
    ],
    ["a form of 5000 equal parts", whole(edits, form, `${field("prompt", "x").repeat(5000)}--x--\r\n`), 400],
    [
      "a form of 1000 pictures",
      whole(edits, form, `${field("image", "x").replace('"image"', '"image"; filename="a"').repeat(1000)}--x--\r\n`),
      400,
    ],
    ["a field of a long name", whole(edits, form, `${field("n".repeat(100_000), "x")}--x--\r\n`), 400],
    ["a field called __proto__", whole(edits, form, `${field("prompt", "x")}${field("__proto__", "x")}--x--\r\n`), 400],
    [
      "a field called constructor",
      whole(edits, form, `${field("prompt", "x")}${field("constructor", "x")}--x--\r\n`),
      400,
    ],
    [
      "a file called __proto__",
      whole(edits, form, `${field("__proto__", "x").replace('__proto__"', '__proto__"; filename="a"')}--x--\r\n`),
      400,
    ],
    ["a field without a name", whole(edits, form, `${field("", "x")}--x--\r\n`), 400],
    ["a part without a disposition", whole(edits, form, "--x\r\n\r\nx\r\n--x--\r\n"), 400],
    ["a part with 1000 headers", whole(edits, form, `--x\r\n${"a: b\r\n".repeat(1000)}\r\nx\r\n--x--\r\n`), 400],
    ["a part with a long header", whole(edits, form, `--x\r\na: ${"b".repeat(1_000_000)}\r\n\r\nx\r\n--x--\r\n`), 400],
    ["a head of a hundred kilobytes", head("/livez", `x: ${"x".repeat(100_000)}`), 431],
    [
      "a head of ten thousand lines",
      head("/livez", ...Array.from({ length: 10_000 }, (_, index) => `x${index}: x`)),
      431,
    ],
    ["an address of a hundred kilobytes", `GET /${"x".repeat(100_000)} HTTP/1.1\r\nHost: x\r\n\r\n`, 431],
    ["an address that is none", "GET /% HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400],
    [
      "an id that is too long",
      `GET /v1/jobs/${"x".repeat(1000)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n`,
      404,
    ],
    ["a method that there is not", "BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 400],
    ["no HTTP", "nonsense\r\n\r\n", 400],
    ["TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400],
  ])("is refused in the envelope: %s", async (_, text, status) => {
    const { answer, isClosed } = await raw(text);
    expect(answer).toMatchObject({
      status,
      body: { error: { message: expect.any(String), type: "invalid_request_error" } },
    });
    expect(answer.head).toMatch(/^x-request-id: \S+/im);
    expect(answer.head).toMatch(/^x-should-retry: false/im);
    expect(isClosed).toBe(true);
    await expectService();
  });

  it("names fields of forms that there are not, whatever they are called", async () => {
    for (const name of ["__proto__", "constructor", "toString", "prompd"]) {
      const { answer } = await raw(whole(edits, form, `${field("prompt", "x")}${field(name, "x")}--x--\r\n`));
      expect(answer).toMatchObject({ status: 400, body: { error: { param: name, code: "unknown_parameter" } } });
    }
    const { answer } = await raw(whole(edits, form, `${field("prompt", "x")}${field("prompt[]", "x")}--x--\r\n`));
    expect(answer).toMatchObject({ status: 400, body: { error: { param: "prompt", code: "invalid_value" } } });
  });

  const deep = 100_000;
  const lone = String.raw`"\ud800 a \udfff"`;
  const bytes = (...parts: (string | number[])[]) =>
    Buffer.concat(parts.map((part) => (typeof part === "string" ? Buffer.from(part) : Buffer.from(part))));
  const withQuick = (text: string) => JSON.stringify(quick).replace(/}$/, `,${text}}`);
  it.each<[string, string | Buffer, readonly number[]]>([
    ["nothing", "", [400]],
    ["null", "null", [400]],
    ["a list", "[]", [400]],
    ["a list of a body", JSON.stringify([quick]), [400]],
    ["a number", "1", [400]],
    ["a text", '"x"', [400]],
    ["white space", " \n\t", [400]],
    ["half an object", '{"prompt":', [400]],
    ["a comma too many", '{"prompt":"x",}', [400]],
    ["no JSON", "prompt=x", [400]],
    ["NaN", '{"prompt":"x","seed":NaN}', [400]],
    ["NUL bytes", "\0".repeat(1000), [400]],
    ["lists in lists", "[".repeat(deep), [400]],
    ["closed lists in lists", "[".repeat(deep) + "]".repeat(deep), [400]],
    ["objects in objects", '{"a":'.repeat(deep), [400]],
    ["closed objects in objects", '{"a":'.repeat(deep) + "1" + "}".repeat(deep), [400]],
    ["a prompt of lists in lists", `{"prompt":${"[".repeat(deep)}${"]".repeat(deep)}}`, [400]],
    ["stages of lists in lists", withQuick(`"stages":${"[".repeat(deep)}${"]".repeat(deep)}`), [400]],
    ["a list of a hundred thousand stages", withQuick(`"stages":[${"0,".repeat(deep)}0]`), [400]],
    ["a hundred thousand fields", `{${Array.from({ length: 50_000 }, (_, index) => `"f${index}":1`).join()}}`, [400]],
    ["a field of a long name", `{"prompt":"x","${"n".repeat(900_000)}":1}`, [400]],
    ["a number without a size", withQuick('"guidance_scale":1e999'), [400]],
    ["a seed without a size", withQuick('"seed":-1e999'), [400]],
    ["a seed of many digits", withQuick(`"seed":${"9".repeat(100_000)}`), [400]],
    ["a fraction of nothing", withQuick('"guidance_scale":1e-999'), [200]],
    ["a field twice: the last one counts", withQuick('"n":0,"n":1'), [200]],
    ["null for what is left out", withQuick('"quality":null,"mask":null'), [200]],
    ["__proto__", withQuick('"__proto__":{"n":2}'), [400]],
    ["an escaped __proto__", withQuick(String.raw`"\u005f_proto__":{"n":2}`), [400]],
    ["constructor.prototype", withQuick('"constructor":{"prototype":{"n":2}}'), [400]],
    ["constructor", withQuick('"constructor":1'), [400]],
    ["toString", withQuick('"toString":1'), [400]],
    ["bytes that are not UTF-8", bytes('{"prompt":"', [0xff, 0xfe, 0x80], '","num_inference_steps":2}'), [200, 400]],
    ["a mark of byte order", `\ufeff${JSON.stringify(quick)}`, [200, 400]],
    ["halves of characters", withQuick(`"prompt":${lone}`), [200]],
    ["halves of characters as user and negative prompt", withQuick(`"user":${lone},"negative_prompt":${lone}`), [200]],
    ["NUL in a prompt", withQuick(String.raw`"prompt":"a\u0000b","user":"\u0000\r\n"`), [200]],
    ["a prompt of spaces", withQuick('"prompt":"   "'), [200]],
    ["a prompt of 32000 characters of four bytes", withQuick(`"prompt":"${"😀".repeat(16_000)}"`), [200]],
    ["a prompt that is too long", withQuick(`"prompt":"${"x".repeat(32_001)}"`), [400]],
    ["blocks without an end", withQuick(`"blocks":"${"H".repeat(500_000)}"`), [400]],
    ["blocks of a huge count", '{"prompt":"x","blocks":"H999999999999"}', [400]],
    ["a size of huge sides", withQuick('"size":"99999x99999"'), [400]],
    ["a size of one pixel", withQuick('"size":"1x1"'), [400]],
    ["a model of another kind", withQuick('"model":"../../etc/passwd"'), [404]],
  ])("JSON is understood or refused, and never a fault of the server: %s", async (_, body, statuses) => {
    const response = await fetch(`${server.url}${generations}`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body,
    });
    const answer = (await response.json()) as { error: { message: string } };
    expect(statuses, JSON.stringify(answer).slice(0, 500)).toContain(response.status);
    if (response.status !== 200) {
      expect(answer).toEqual({
        error: {
          message: expect.any(String),
          type: "invalid_request_error",
          param: expect.toSatisfy(isText),
          code: expect.any(String),
        },
      });
      expect(answer.error.message.length).toBeLessThan(1000);
      expect(answer.error.message).not.toMatch(/native code|node_modules|\/work|file:/);
    }
    await expectService();
  });

  it("whatever its type is called", async () => {
    const statuses: number[] = [];
    const types = ["application/json; charset=utf-16", "application/json;", "text/plain", "multipart/form-data", "multipart/mixed; boundary=x", "", "x", "application/json, text/html", "application/x-www-form-urlencoded"]; // biome-ignore format: one line
    for (const type of types) {
      const { answer } = await raw(whole(generations, `Content-Type: ${type}`, JSON.stringify(quick)));
      statuses.push(answer.status);
      if (answer.status !== 200) expect(answer.body).toMatchObject({ error: { type: "invalid_request_error" } });
    }
    for (const status of statuses) expect([200, 400, 415]).toContain(status);
    await expectService();
  });
});
