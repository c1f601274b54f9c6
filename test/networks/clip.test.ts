// The pooled token of CLIP: the first end of text, by scores of which one is the largest.
import { describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { int64 } from "../../lib/common/tensor.js";
import { emitClip } from "../../lib/networks/clip.js";
import { cpuEmitOptions } from "../../lib/onnx/index.js";
import { fixture } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const length = 77;
/** The largest id, as in the public checkpoints; and the id that their configs name. */
const [end, legacy] = [49407, 2];

const runtime = cpuRuntime();

async function pooled(rows: readonly (readonly number[])[], eosTokenId: number) {
  const { weights, config } = (await openCheckpoint(fixture("sd3", "model"))).textEncoder!;
  const { vocabSize } = config;
  const name = `clip-${eosTokenId}`;
  runtime().add(emitClip(name, { weights, config: { ...config, eosTokenId } }, length, cpuEmitOptions));
  const ids = rows.flatMap((row) => [...row, ...new Array(length - row.length).fill(row.at(-1)!)]);
  expect(Math.max(...ids)).toBeLessThan(vocabSize);
  const shape = [rows.length, length];
  const { p } = await runtime().run({
    constants: { ids: { kind: "value", tensor: int64(shape, BigInt64Array.from(ids, BigInt)) } },
    registers: {
      h: { dtype: "float32", shape: [...shape, config.hiddenSize] },
      p: { dtype: "float32", shape: [rows.length, config.projectionDim] },
    },
    instructions: [
      {
        op: "launch",
        graph: name,
        inputs: { ids: "ids" },
        outputs: { hidden: "h", pooled: "p" },
        label: { kind: "encode", name },
      },
    ],
    results: ["p"],
  });
  const data = p!.data as Float32Array;
  return rows.map((_, row) => [...data.subarray(row * config.projectionDim, (row + 1) * config.projectionDim)]);
}

const distance = (a: readonly number[], b: readonly number[]) =>
  Math.max(...a.map((value, index) => Math.abs(value - b[index]!)));

describe("the pooled token of CLIP", () => {
  const start = 0;
  // The mask is causal: what follows the end of text must not matter, unless another token is pooled.
  const rows = (mark: number) => [
    [start, 5, 7, mark],
    [start, 5, 7, mark, 1, mark, 1],
    [start, 5, 7, mark, 1],
    [start, 5, 9, mark],
  ];

  it.each([
    ["the largest id, which also pads", legacy],
    ["the id that the config names", 11],
  ])("is the first of several: %s", async (_name, eosTokenId) => {
    const { config } = (await openCheckpoint(fixture("sd3", "model"))).textEncoder!;
    const mark = eosTokenId === legacy ? Math.min(end, config.vocabSize - 1) : eosTokenId;
    const first = await pooled(rows(mark), eosTokenId);
    expect(distance(first[0]!, first[1]!)).toBeLessThan(1e-5);
    expect(distance(first[0]!, first[2]!)).toBeLessThan(1e-5);
    expect(distance(first[0]!, first[3]!)).toBeGreaterThan(1e-3);
  });

  it("is the first token where there is no end of text, as in transformers", async () => {
    const [a, b, c] = await pooled(
      [
        [3, 5, 7, 9],
        [3, 8, 6, 4],
        [4, 5, 7, 9],
      ],
      11,
    );
    expect(distance(a!, b!)).toBeLessThan(1e-5);
    expect(distance(a!, c!)).toBeGreaterThan(1e-3);
  });
});
