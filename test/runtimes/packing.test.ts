import { deserialize, serialize } from "node:v8";
import fc from "fast-check";
import { expect, it } from "vitest";
import { float32, int64 } from "../../lib/common/tensor.js";
import type { Constant, Program } from "../../lib/program/program.js";
import { JoinedParts, pack, partsOf, unpack } from "../../lib/runtimes/onnxruntime/packing.js";

const value = (tensor: Extract<Constant, { kind: "value" }>["tensor"]): Constant => ({ kind: "value", tensor });
const program = (constants: Record<string, Constant>): Program => ({
  registers: { x: { dtype: "float32", shape: [1, 2] } },
  constants,
  instructions: [{ op: "copy", from: "a", fromRow: 0, to: "x", toRow: 0, rows: 1 }],
  results: ["x"],
});

it("what is packed, sent and unpacked is the same program", () => {
  const floats = fc
    .array(fc.float({ noNaN: true }), { maxLength: 200 })
    .map((data) => value(float32([1, data.length], Float32Array.from(data))));
  const integers = fc
    .array(fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }), { maxLength: 3 })
    .map((data) => value(int64([data.length], BigInt64Array.from(data))));
  const stored = fc.constant<Constant>({
    kind: "stored",
    source: { name: "w", dtype: "BF16", shape: [4, 4], file: "/w.safetensors", offset: 64, length: 32 },
    ...{ shape: [2, 2], firstElement: 0, rowElements: 2, strideElements: 4, rows: 2 },
  });
  const constants = fc.dictionary(fc.stringMatching(/^[a-z ()0-9.]+$/), fc.oneof(floats, integers, stored));
  fc.assert(
    fc.property(constants, (constants) => {
      const sent = program(constants);
      expect(unpack(deserialize(serialize(pack(sent))))).toEqual({ ...sent, constants: { ...constants } });
    }),
  );
});

it("a scalar keeps its shape, and a short part of a long array takes only its own values along", () => {
  const long = new Float32Array(1000).fill(7);
  const constants = { scalar: value(float32([], Float32Array.of(3))), part: value(float32([2], long.subarray(5, 7))) };
  const { short, constants: others } = pack(program(constants));
  expect(short).toEqual([
    ["scalar", [], 3],
    ["part", [2], 7, 7],
  ]);
  expect(others).toEqual({});
  expect(unpack(pack(program(constants))).constants).toEqual(constants);
});

it("a long constant goes in parts ahead of the program, each with its own values only, and is whole again", () => {
  const data = Float32Array.from({ length: 1000 }, (_, index) => index);
  const constants = {
    long: value(float32([1, 1000], data)),
    all: value(float32([300], data.subarray(0, 300))),
    less: value(float32([299], data.subarray(1, 300))),
  };
  const parts = [...partsOf(program(constants), 299)];
  expect(parts.map(({ name, at, values }) => [name, at, values.length])).toEqual([
    ["long", 0, 299],
    ["long", 299, 299],
    ["long", 598, 299],
    ["long", 897, 103],
    ["all", 0, 299],
    ["all", 299, 1],
  ]);
  const joined = new JoinedParts();
  for (const part of parts) {
    const bytes = serialize(part);
    expect(bytes.length).toBeLessThan(4 * part.values.length + 200);
    joined.add(deserialize(bytes));
  }
  const packed = pack(program(constants), 299);
  expect(Object.keys(packed.constants)).toEqual(["less"]);
  expect(unpack(deserialize(serialize(packed)), joined)).toEqual(program(constants));
});
