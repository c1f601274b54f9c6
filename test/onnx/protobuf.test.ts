// Messages against a reader that follows protobuf's description of its wire format.
import { expect, test } from "vitest";
import { MessageWriter } from "../../lib/onnx/protobuf.js";

type Field = readonly [number: number, value: bigint | Buffer];

/** Fields of a message: varints as unsigned 64-bit integers, others as their bytes. */
function read(bytes: Uint8Array): Field[] {
  const fields: Field[] = [];
  let at = 0;
  const varint = () => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++]!;
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asUintN(64, value);
    }
  };
  const take = (length: number) => {
    at += length;
    return Buffer.from(bytes.subarray(at - length, at));
  };
  while (at < bytes.length) {
    const key = varint();
    const wireType = key & 7n;
    const value = wireType === 0n ? varint() : wireType === 2n ? take(Number(varint())) : take(4);
    fields.push([Number(key >> 3n), value]);
  }
  return fields;
}

test("integers of every length, of both signs", () => {
  const powers = Array.from({ length: 63 }, (_, i) => 1n << BigInt(i));
  const big = [0n, ...powers.flatMap((power) => [power - 1n, power, -power, -power - 1n]), (1n << 63n) - 1n];
  const safe = big.filter((value) => BigInt(Number(value)) === value && Number.isSafeInteger(Number(value)));
  const writer = new MessageWriter();
  for (const value of big) writer.int(1, value);
  for (const value of safe) writer.int(2000, Number(value));
  const expected = (field: number, values: bigint[]) => values.map((value) => [field, BigInt.asUintN(64, value)]);
  expect(read(writer.finish())).toEqual([...expected(1, big), ...expected(2000, safe)]);
  expect(safe.length).toBeGreaterThan(200);

  const packed = new MessageWriter().packedInts(3, [0, 300, -1]).finish();
  expect(read(packed)).toEqual([[3, Buffer.from([0, 0xac, 2, ...new Array(9).fill(255), 1])]]);
});

test("texts, floats and messages in messages, beyond the memory that a writer begins with", () => {
  const texts = ["", "é", "x".repeat(127), "y".repeat(128), "☃".repeat(70_000)];
  const inner = new MessageWriter();
  for (const text of texts) inner.string(1, text);
  const outer = new MessageWriter().int(1, 7).message(2, inner).float(3, -0.1).merge(inner);
  // What is written to a message later is not in those that have it.
  inner.int(9, 9);
  const [number, message, float, ...merged] = read(outer.finish());
  expect(number).toEqual([1, 7n]);
  const strings = (fields: Field[]) => fields.map(([field, bytes]) => [field, (bytes as Buffer).toString("utf8")]);
  expect(strings(read(message![1] as Buffer))).toEqual(texts.map((text) => [1, text]));
  expect((float![1] as Buffer).readFloatLE()).toBe(Math.fround(-0.1));
  expect(strings(merged)).toEqual(texts.map((text) => [1, text]));
});
