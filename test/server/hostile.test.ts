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
    ["JSON, announced", head(generations, json, announced), megabyte, 413],
    ["JSON of an edit, announced", head(edits, json, announced), megabyte, 413],
    ["a form, announced", head(edits, form, announced) + part, megabyte, 413],
    ["JSON, in chunks", head(generations, json, chunked), chunk(megabyte), 413],
    ["JSON of an edit, in chunks", head(edits, json, chunked), chunk(megabyte), 413],
    ["JSON of a job, in chunks", head("/v1/jobs", json, chunked), chunk(megabyte), 413],
    ["a form, in chunks", head(edits, form, chunked) + chunk(part), chunk(megabyte), 413],
    ["a form with a text, in chunks", head(edits, form, chunked) + chunk('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'), chunk(megabyte), 413], // biome-ignore format: one line
    ["a form where none is taken", head(generations, form, chunked) + chunk(part), chunk(megabyte), 413],
    ["another type", head(generations, "Content-Type: application/octet-stream", chunked), chunk(megabyte), 415],
    ["to no address", head("/v1/nothing", json, chunked), chunk(megabyte), 413],
    ["with a method that is not taken", head("/v1/models", json, chunked), chunk(megabyte), 413],
  ])("is refused, and the connection closed: %s", async (_, text, piece, status) => {
    const before = hasProc ? server.memory().now : 0;
    const { answer, bytes, isClosed } = await flood(text, piece, 100);
    expect([answer.status, answer.body]).toEqual([
      status,
      { error: { message: expect.any(String), type: "invalid_request_error", ...params } },
    ]);
    expect(bytes / mebibyte).toBeLessThan(99);
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
    // Each that were kept would add the 32 MiB that a body may have; what is collected late adds some of that for a while.
    for (let index = 0; index < 12; index++) await flood(text, chunk(megabyte), 100);
    expect((server.memory().most - before) / mebibyte).toBeLessThan(200);
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
    ["chunks of no size", `${head(generations, json, chunked)}ZZZ\r\n{}\r\n0\r\n\r\n`, 400],
    [
      "chunks with an endless extension",
      `${head(generations, json, chunked)}1;${"x".repeat(100_000)}\r\n{\r\n0\r\n\r\n`,
      413,
    ],
    ["two lengths", `${head(generations, json, "Content-Length: 2", "Content-Length: 3")}{}`, 400],
    ["a length and chunks", `${head(generations, json, "Content-Length: 2", chunked)}0\r\n\r\n`, 400],
    ["a length that is no number", `${head(generations, json, "Content-Length: 2x")}{}`, 400],
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
    ["closed objects in objects", `${'{"a":'.repeat(deep)}1${"}".repeat(deep)}`, [400]],
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
describe("a picture", () => {
  /** Polynomial of PNG's checksums. */
  const table = Uint32Array.from({ length: 256 }, (_, byte) => {
    let value = byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
    return value;
  });
  const crc = (data: Uint8Array) =>
    ~data.reduce((value, byte) => table[(value ^ byte) & 0xff]! ^ (value >>> 8), 0xffffffff) >>> 0;
  const pngChunk = (type: string, data: Uint8Array) => {
    const named = Buffer.concat([Buffer.from(type), data]);
    const [length, check] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(data.length);
    check.writeUInt32BE(crc(named));
    return Buffer.concat([length, named, check]);
  };
  const png = (width: number, height: number, ...chunks: [string, Uint8Array][]) => {
    const header = Buffer.alloc(13);
    header.writeUInt32BE(width, 0);
    header.writeUInt32BE(height, 4);
    header.set([8, 2], 8);
    const all: [string, Uint8Array][] = [["IHDR", header], ...chunks, ["IEND", Buffer.alloc(0)]];
    return Buffer.concat([
      Buffer.from("\x89PNG\r\n\x1a\n", "latin1"),
      ...all.map(([type, data]) => pngChunk(type, data)),
    ]);
  };
  const pixels = (width: number, height: number): [string, Uint8Array] => [
    "IDAT",
    deflateSync(Buffer.alloc(height * (3 * width + 1)), { level: 9 }),
  ];
  const lossless = (side: number) => {
    const bits = (side - 1) | ((side - 1) << 14);
    const data = Buffer.concat([Buffer.from([0x2f]), Buffer.alloc(4), Buffer.alloc(64)]);
    data.writeInt32LE(bits, 1);
    const [size, riff] = [Buffer.alloc(4), Buffer.alloc(4)];
    size.writeUInt32LE(data.length + 1);
    riff.writeUInt32LE(data.length + 13);
    return Buffer.concat([Buffer.from("RIFF"), riff, Buffer.from("WEBPVP8L"), size, data, Buffer.alloc(1)]);
  };
  /** Of a screen and one frame, of which hardly anything is there. */
  const gif = (screen: number, frame: number) => {
    const word = (value: number) => [value & 0xff, value >> 8];
    const head = [...word(screen), ...word(screen), 0x80, 0, 0, 0, 0, 0, 255, 255, 255];
    const image = [0x2c, 0, 0, 0, 0, ...word(frame), ...word(frame), 0, 2, 2, 0x4c, 0x01, 0, 0x3b];
    return Buffer.concat([Buffer.from("GIF89a"), Buffer.from([...head, ...image])]);
  };
  const svg = (body: string, before = "") =>
    Buffer.from(
      `<?xml version="1.0"?>${before}<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" height="64">${body}</svg>`,
    );
  const entities = `<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa">${"bcdefghij".replace(/./g, (name) => `<!ENTITY ${name} "${`&${String.fromCharCode(name.charCodeAt(0) - 1)};`.repeat(10)}">`)}]>`; // biome-ignore format: one line
  const plain = () => sharp({ create: { width: 64, height: 32, channels: 3, background: "#c04020" } });
  const damaged = (file: Buffer, at: number) => {
    const copy = Buffer.from(file);
    for (let index = 0; index < 8; index++) copy[Math.floor(copy.length * at) + index]! ^= 0x5a;
    return copy;
  };
  const noisy = async (format: "png" | "jpeg" | "webp") =>
    sharp({ create: { width: 256, height: 256, channels: 3, noise: { type: "gaussian", mean: 128, sigma: 40 }, background: "#000" } })[format]().toBuffer(); // biome-ignore format: one line
  const cut = (file: Buffer) => file.subarray(0, file.length / 2);

  async function edit(image: Uint8Array, mask?: Uint8Array) {
    const body = new FormData();
    for (const [name, value] of Object.entries({ ...quick, strength: 1 })) body.append(name, String(value));
    body.append("image", new Blob([image as Uint8Array<ArrayBuffer>]), "image");
    if (mask) body.append("mask", new Blob([mask as Uint8Array<ArrayBuffer>]), "mask");
    const response = await fetch(`${server.url}${edits}`, { method: "POST", body });
    // biome-ignore lint/suspicious/noExplicitAny: whatever the server sends
    return { status: response.status, body: (await response.json()) as any };
  }
  // 200 ms, and what a machine adds that is busy with other things.
  let longestProbe = 0;
  beforeAll(async () => {
    longestProbe = 200 + 4 * (await probed(() => sleep(1000)));
  });
  /** The longest that a probe took while something was done, in milliseconds. */
  async function probed(work: () => Promise<unknown>): Promise<number> {
    let [isOver, longest] = [false, 0];
    const done = work().finally(() => {
      isOver = true;
    });
    while (!isOver) {
      const from = performance.now();
      expect((await fetch(`${server.url}/livez`)).status).toBe(200);
      longest = Math.max(longest, performance.now() - from);
      await sleep(10);
    }
    await done;
    return longest;
  }

  const bombs: [string, () => Uint8Array | Promise<Uint8Array>][] = [
    ["a PNG that claims 30000 x 30000 pixels", () => png(30_000, 30_000, pixels(30, 30))],
    ["a PNG that claims 2147483647 x 1 pixels", () => png(2 ** 31 - 1, 1, pixels(30, 30))],
    ["a PNG of 9000 x 9000 equal pixels", () => png(9000, 9000, pixels(9000, 9000))],
    ["a PNG of no pixels", () => png(0, 0, pixels(1, 1))],
    ["a WebP that claims 16383 x 16383 pixels", () => lossless(16_383)],
    ["a GIF that claims 40000 x 40000 pixels", () => gif(40_000, 40_000)],
    ["a GIF with a frame of 65535 x 65535 pixels", () => gif(1, 65_535)],
    ["an SVG with a file in it", () => svg('<image xlink:href="file:///etc/passwd" width="64" height="64"/>')],
    ["an SVG with an address in it", () => svg('<image href="http://127.0.0.1:9/x.png" width="64" height="64"/>')],
    ["an SVG with ten billion characters", () => svg("<text>&j;</text>", entities)],
    ["an SVG of 100000 levels", () => svg(`${"<g>".repeat(100_000)}${"</g>".repeat(100_000)}`)],
    ["a PNG whose pixels are damaged", async () => damaged(await noisy("png"), 0.5)],
    ["a PNG whose header is damaged", async () => damaged(await noisy("png"), 0)],
    ["half a PNG", async () => cut(await noisy("png"))],
    ["half a JPEG", async () => cut(await noisy("jpeg"))],
    ["half a WebP", async () => cut(await noisy("webp"))],
    ["a PNG without pixels", () => png(64, 64)],
    ["a PNG with a pixel of 64 x 64", () => png(64, 64, pixels(1, 1))],
    ["nothing", () => Buffer.alloc(0)],
    ["a text", () => Buffer.from("a picture of a red circle")],
    ["a page", () => Buffer.from("<html><img src=x></html>")],
    ["a million NUL bytes", () => Buffer.alloc(1_000_000)],
  ];
  it.each(bombs)("that cannot be taken is refused with its field, as picture and as mask: %s", async (_, make) => {
    const file = await make();
    const before = hasProc ? server.memory().now : 0;
    const good = await plain().png().toBuffer();
    let answers: Awaited<ReturnType<typeof edit>>[] = [];
    const longest = await probed(async () => {
      answers = [await edit(file), await edit(good, file)];
    });
    for (const [index, param] of ["image", "mask"].entries()) {
      const { status, body } = answers[index]!;
      expect([status, body]).toEqual([400, { error: { message: expect.any(String), type: "invalid_request_error", param, code: "invalid_value" } }]); // biome-ignore format: one line
      expect(body.error.message).not.toMatch(/\/(work|tmp|etc)|pngload|vips/i);
    }
    if (file.length > 0 && file.length < mebibyte) {
      const body = { ...quick, image: Buffer.from(file).toString("base64") };
      expect(await post(`${server.url}${edits}`, body)).toMatchObject({
        status: 400,
        body: { error: { param: "image" } },
      });
    }
    if (hasProc) expect((server.memory().now - before) / mebibyte).toBeLessThan(150);
    expect(longest).toBeLessThan(longestProbe);
    await expectService();
  });

  it("of as many pixels as may be is drawn with, in bounded memory and while others are served", async () => {
    const file = png(8000, 8000, pixels(8000, 8000));
    expect(file.length).toBeLessThan(mebibyte);
    const before = hasProc ? server.memory().most : 0;
    let answer: Awaited<ReturnType<typeof edit>> | undefined;
    const longest = await probed(async () => {
      const drawn = edit(file).then((result) => {
        answer = result;
      });
      expect((await post(`${server.url}${generations}`, quick)).status).toBe(200);
      expect(answer).toBe(undefined);
      await drawn;
    });
    expect([answer!.status, answer!.body.size]).toEqual([200, "64x64"]);
    if (hasProc) expect((server.memory().most - before) / mebibyte).toBeLessThan(700);
    expect(longest).toBeLessThan(longestProbe);
    await expectService();
  });

  it.each([
    ["a text", "zTXt"],
    ["a colour profile", "iCCP"],
  ])("with 256 MiB of compressed zeros as %s takes no memory", async (_, type) => {
    const piece = deflateSync(Buffer.alloc(256 * mebibyte), { level: 9 });
    const file = png(64, 64, [type, Buffer.concat([Buffer.from("Comment\0\0"), piece])], pixels(64, 64));
    const before = hasProc ? server.memory().most : 0;
    const longest = await probed(async () => {
      // Both are right: it is a picture beside that.
      expect([200, 400]).toContain((await edit(file)).status);
    });
    if (hasProc) expect((server.memory().most - before) / mebibyte).toBeLessThan(200);
    expect(longest).toBeLessThan(longestProbe);
    await expectService();
  });

  it.each<[string, () => Promise<Buffer>, string]>([
    ["a GIF that claims more than its frame has", () => Promise.resolve(gif(65_535, 1)), "64x64"],
    ["a JPEG that its EXIF turns", () => plain().withMetadata({ orientation: 6 }).jpeg().toBuffer(), "48x96"],
    ["a JPEG in CMYK", () => plain().toColourspace("cmyk").jpeg().toBuffer(), "96x48"],
    ["a PNG of 16 bits", () => plain().toColourspace("rgb16").png().toBuffer(), "96x48"],
    ["a PNG with a palette", () => plain().png({ palette: true, colours: 2 }).toBuffer(), "96x48"],
    ["a grey PNG with transparency", () => plain().ensureAlpha(0.5).toColourspace("b-w").png().toBuffer(), "96x48"],
    ["an interlaced PNG", () => plain().png({ progressive: true }).toBuffer(), "96x48"],
    ["an AVIF", () => plain().avif().toBuffer(), "96x48"],
    ["a TIFF", () => plain().tiff().toBuffer(), "96x48"],
    [
      "a picture of one pixel",
      () =>
        sharp({ create: { width: 1, height: 1, channels: 3, background: "#fff" } })
          .png()
          .toBuffer(),
      "64x64",
    ],
  ])("of an unusual kind is drawn with: %s", async (_, make, size) => {
    const { status, body } = await edit(await make());
    expect([status, body.size ?? body]).toEqual([200, size]);
  });

  it("whose shape the model does not draw is refused with size", async () => {
    const row = sharp({ create: { width: 10_000, height: 1, channels: 3, background: "#fff" } });
    const { status, body } = await edit(await row.png().toBuffer());
    expect([status, body.error.param]).toEqual([400, "size"]);
  });

  it("that moves is refused", async () => {
    const frames = await Promise.all(["#f00", "#0f0"].map((background) => sharp({ create: { width: 64, height: 32, channels: 3, background } }).png().toBuffer())); // biome-ignore format: one line
    for (const format of ["gif", "webp"] as const) {
      const file = await sharp(frames, { join: { animated: true } })
        [format]()
        .toBuffer();
      const { status, body } = await edit(file);
      expect([status, body.error.param]).toEqual([400, "image"]);
      expect(body.error.message).toMatch(/2 frames/);
    }
  });
});
