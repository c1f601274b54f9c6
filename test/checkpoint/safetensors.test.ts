/**
 * The header's parser: every fixture parses to what its file holds, and every kind of damage is a CheckpointError that
 * says what is wrong; random damage never gives anything else, nor offsets outside the file.
 */

import { readdir, readFile, stat, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import {
  type HeaderEntry,
  readSafetensorsHeader,
  readTensor,
  supportedDType,
  writeSafetensors,
} from "../../lib/checkpoint/safetensors.js";
import { float32 } from "../../lib/common/tensor.js";
import { CheckpointError, OutputError } from "../../lib/errors.js";
import { fixture, shapes, temporaryFolder } from "./folders.js";

/** A file of a JSON header, as text or object, and so many zero bytes of data. */
async function write(header: unknown, dataBytes: number, declared?: bigint): Promise<string> {
  const file = join(await temporaryFolder(), "x.safetensors");
  const text = Buffer.from(typeof header === "string" ? header : JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(declared ?? BigInt(text.length));
  await writeFile(file, Buffer.concat([start, text, Buffer.alloc(dataBytes)]));
  return file;
}

const f32 = (shape: number[], begin: number, end: number) => ({ dtype: "F32", shape, data_offsets: [begin, end] });

async function expectDamage(file: string, message: RegExp): Promise<void> {
  const error = await readSafetensorsHeader(file).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.path).toBe(file);
  expect(error.message).toContain(file);
  expect(error.message).toMatch(message);
}

describe("readSafetensorsHeader", () => {
  test("every .safetensors file of the fixtures and of the embedded model", async () => {
    const dtypes = new Set<string>();
    let files = 0;
    for (const root of [fixture("large"), fixture("medium"), fixture("sd3"), shapes])
      for (const name of await readdir(root, { recursive: true })) {
        if (!name.endsWith(".safetensors")) continue;
        files++;
        const header = await readSafetensorsHeader(join(root, name));
        const total = [...header.values()].reduce((sum, entry) => sum + entry.length, 0);
        const first = Math.min(...[...header.values()].map((entry) => entry.offset));
        expect(first + total).toBe((await stat(join(root, name))).size);
        for (const entry of header.values()) dtypes.add(entry.dtype);
      }
    expect(files).toBeGreaterThan(40);
    expect([...dtypes].sort()).toEqual(["BF16", "F16", "F32", "F8_E4M3", "I8", "U8"]);
  });

  test("an entry of a fixture, as its bytes say", async () => {
    const file = fixture("large", "model/transformer/diffusion_pytorch_model.safetensors");
    const bytes = await readFile(file);
    const length = Number(bytes.readBigUInt64LE());
    const name = "pos_embed.pos_embed";
    const raw = JSON.parse(bytes.toString("utf8", 8, 8 + length))[name];
    const entry = (await readSafetensorsHeader(file)).get(name)!;
    // pos_embed_max_size 24, width 64 (README of the fixtures).
    expect(entry).toEqual({
      name,
      dtype: "F32",
      shape: [1, 24 * 24, 64],
      offset: 8 + length + raw.data_offsets[0],
      length: 4 * 24 * 24 * 64,
    });
    const tensor = await readTensor(file, entry);
    expect(tensor.data[5]).toBe(bytes.readFloatLE(entry.offset + 20));
  });

  test("empty tensors, scalars and no tensors at all", async () => {
    const header = await readSafetensorsHeader(
      await write({ a: f32([0, 3], 0, 0), b: f32([], 0, 4), c: f32([2], 4, 12) }, 12),
    );
    expect([...header.values()].map((entry) => entry.length)).toEqual([0, 4, 8]);
    expect((await readSafetensorsHeader(await write("{}", 0))).size).toBe(0);
  });

  test("an unsupported dtype is an error only where it is used", async () => {
    const file = await write({ ids: { dtype: "I64", shape: [2], data_offsets: [0, 16] } }, 16);
    const entry = (await readSafetensorsHeader(file)).get("ids")!;
    expect(() => supportedDType(file, entry)).toThrow(/"ids" has dtype I64; supported are F32, F16, BF16/);
    await expect(readTensor(file, entry)).rejects.toThrow(CheckpointError);
    const future = await write({ x: { dtype: "F3_E1M1", shape: [5], data_offsets: [0, 2] } }, 2);
    expect((await readSafetensorsHeader(future)).get("x")!.dtype).toBe("F3_E1M1");
  });

  const damaged: [string, unknown, number, RegExp][] = [
    ["not an object", "[1]", 0, /does not begin with "\{"/],
    ["JSON cut off", '{"a":', 0, /not JSON/],
    ["entry not an object", { a: 1 }, 0, /"a".*not an object/],
    ["dtype a number", { a: { dtype: 1, shape: [], data_offsets: [0, 4] } }, 4, /"a".*dtype/],
    ["negative shape", { a: f32([-1], 0, 4) }, 4, /"a".*shape/],
    ["fractional shape", { a: f32([0.5], 0, 2) }, 2, /"a".*shape/],
    ["absurd shape", { a: f32([2 ** 40, 2 ** 40], 0, 4) }, 4, /"a".*absurd/],
    ["one offset", { a: { dtype: "F32", shape: [1], data_offsets: [0] } }, 4, /"a".*data_offsets/],
    ["end before begin", { a: f32([1], 4, 0) }, 4, /"a".*behind their end/],
    ["offsets outside the file", { a: f32([2], 0, 8) }, 4, /"a".*outside the file/],
    ["length against shape", { a: f32([2], 0, 4) }, 4, /"a".*takes 8 bytes/],
    ["overlap", { a: f32([2], 0, 8), b: f32([2], 4, 12) }, 12, /"b" overlap/],
    ["the same bytes twice", { a: f32([1], 0, 4), b: f32([1], 0, 4) }, 4, /overlap/],
    ["hole", { a: f32([1], 0, 4), b: f32([1], 8, 12) }, 12, /"b" leave a hole/],
    ["hole at the start", { a: f32([1], 4, 8) }, 8, /"a" leave a hole/],
    ["bytes behind the last tensor", { a: f32([1], 0, 4) }, 6, /2 bytes behind/],
    ["metadata not text", { __metadata__: { a: 1 } }, 0, /__metadata__/],
  ];
  for (const [what, header, dataBytes, message] of damaged)
    test(what, async () => expectDamage(await write(header, dataBytes), message));

  test("header length absurd, or beyond the file", async () => {
    await expectDamage(await write("{}", 0, 100_000_001n), /limit is 100000000/);
    await expectDamage(await write("{}", 0, 2n ** 64n - 1n), /not a \.safetensors file/);
    await expectDamage(await write("{}", 0, 1000n), /truncated/);
  });

  test("a header that is not UTF-8", async () => {
    const file = await write('{"??":1}', 0);
    const bytes = await readFile(file);
    bytes.writeUInt16LE(0xc3c3, 10);
    await writeFile(file, bytes);
    await expectDamage(file, /not UTF-8/);
  });

  test("files of other kinds", async () => {
    const folder = await temporaryFolder();
    const file = join(folder, "x.safetensors");
    await expectDamage(file, /does not exist/);
    await expectDamage(folder, /not a file/);
    for (const [content, message] of [
      ["", /too short/],
      ["abc", /too short/],
      ["version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", /Git LFS.*git lfs pull/],
      ["PK\u0003\u0004 and so on, a zip file as torch writes it", /not a \.safetensors file/],
      ["<!DOCTYPE html><title>Sign in</title>", /not a \.safetensors file/],
    ] as const) {
      await writeFile(file, content);
      await expectDamage(file, message);
    }
  });

  test("random truncations and byte flips give a CheckpointError or a header inside the file", async () => {
    const file = await write({ a: f32([2], 0, 8), b: { dtype: "BF16", shape: [2, 3], data_offsets: [8, 20] } }, 20);
    const whole = await readFile(file);
    let seed = 1;
    // A linear congruence (Numerical Recipes): the same damage in each run.
    const random = (n: number) => {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      return Math.floor((seed / 2 ** 32) * n);
    };
    let survived = 0;
    for (let round = 0; round < 1500; round++) {
      const bytes = Buffer.from(whole);
      for (let flips = random(3) + (round % 4 === 0 ? 0 : 1); flips > 0; flips--)
        bytes[random(bytes.length)] = random(256);
      const size = round % 4 === 0 ? random(bytes.length + 1) : bytes.length;
      await writeFile(file, bytes.subarray(0, size));
      try {
        for (const entry of (await readSafetensorsHeader(file)).values())
          expect(entry.offset + entry.length).toBeLessThanOrEqual(size);
        survived++;
      } catch (error) {
        expect(error).toBeInstanceOf(CheckpointError);
      }
    }
    expect(survived).toBeLessThan(700);
  });

  test("an abort rejects with its reason", async () => {
    const reason = new Error("enough");
    const file = await write("{}", 0);
    await expect(readSafetensorsHeader(file, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });
});

describe("values", () => {
  test("F16 and BF16 are widened exactly", async () => {
    const halves = [0x0000, 0x8000, 0x3c00, 0xc000, 0x7bff, 0x0001, 0x03ff, 0x0400, 0x3555, 0x7c00, 0xfc00, 0x7e00];
    const asHalf = [
      0,
      -0,
      1,
      -2,
      65504,
      2 ** -24,
      1023 * 2 ** -24,
      2 ** -14,
      0.333251953125,
      Infinity,
      -Infinity,
      Number.NaN,
    ];
    const brains = [0x0000, 0x8000, 0x3f80, 0xc000, 0x7f7f, 0x0001, 0x3eab, 0x7f80, 0xff80, 0x7fc0];
    const asBrain = [0, -0, 1, -2, 3.3895313892515355e38, 2 ** -133, 0.333984375, Infinity, -Infinity, Number.NaN];
    for (const [dtype, bits, values] of [
      ["F16", halves, asHalf],
      ["BF16", brains, asBrain],
    ] as const) {
      const file = await write(
        { x: { dtype, shape: [bits.length], data_offsets: [0, 2 * bits.length] } },
        2 * bits.length,
      );
      const entry: HeaderEntry = (await readSafetensorsHeader(file)).get("x")!;
      const bytes = await readFile(file);
      for (const [i, value] of bits.entries()) bytes.writeUInt16LE(value, entry.offset + 2 * i);
      await writeFile(file, bytes);
      expect([...(await readTensor(file, entry)).data]).toEqual(values);
    }
  });

  test("what is written is read again, and the header ends on 8 bytes", async () => {
    const folder = await temporaryFolder();
    const file = join(folder, "out.safetensors");
    const a = float32([2, 3], new Float32Array([1, -2.5, 1e-30, 3e38, Number.NaN, -0]));
    const b = float32([], new Float32Array([7]));
    await writeSafetensors(file, { latents: a, image: b, é: float32([0], new Float32Array()) });
    const bytes = await readFile(file);
    expect(Number(bytes.readBigUInt64LE()) % 8).toBe(0);
    const header = await readSafetensorsHeader(file);
    expect([...header.keys()]).toEqual(["latents", "image", "é"]);
    for (const [name, tensor] of Object.entries({ latents: a, image: b }))
      expect(await readTensor(file, header.get(name)!)).toEqual(tensor);
    expect(await readdir(folder)).toEqual(["out.safetensors"]);
  });

  test("a file that cannot be written is an OutputError, and nothing is left", async () => {
    const folder = await temporaryFolder();
    const tensor = float32([1], new Float32Array([1]));
    await expect(writeSafetensors(join(folder, "missing", "x"), { tensor })).rejects.toThrow(OutputError);
    await expect(writeSafetensors(folder, { tensor })).rejects.toThrow(OutputError);
    expect(await readdir(folder)).toEqual([]);
  });

  test("a file that shrank since its header was read", async () => {
    const file = await write({ a: f32([2], 0, 8) }, 8);
    const entry = (await readSafetensorsHeader(file)).get("a")!;
    await truncate(file, (await stat(file)).size - 1);
    await expect(readTensor(file, entry)).rejects.toThrow(/ends inside the tensor "a"/);
  });
});
