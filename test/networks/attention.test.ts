// Attention on the CPU: few tokens by one operator, many block by block, the same arithmetic in one graph.
import { describe, expect, it } from "vitest";
import { type FloatTensor, float32, type WeightSource } from "../../lib/common/tensor.js";
import { forTokens, Layers } from "../../lib/networks/layers.js";
import { cpuEmitOptions, type EmitOptions, GraphBuilder } from "../../lib/onnx/index.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();
const none: WeightSource = { origin: "none", find: () => undefined };
const heads = 2;
const headDim = 8;
const width = heads * headDim;
/** With two heads 2896 tokens have 2^24 scores or fewer. */
const fewAndMany = [300, 2896, 2897];

const filled = (rows: number, tokens: number, seed: number) =>
  float32(
    [rows, tokens, width],
    Float32Array.from({ length: rows * tokens * width }, (_, i) => 2 * Math.sin(i * 12.9898 + seed)),
  );
type Operands = readonly [q: FloatTensor, k: FloatTensor, v: FloatTensor];
const operands = (rows: number, tokens: number): Operands => [
  filled(rows, tokens, 1),
  filled(rows, tokens, 2),
  filled(rows, tokens, 3),
];

let graphs = 0;
async function attended([q, k, v]: Operands, attention: EmitOptions["attention"]): Promise<Float32Array> {
  const g = new GraphBuilder(`attention ${graphs++}`);
  const inputs = ["q", "k", "v"].map((name) => g.input(name, "float32", ["rows", "tokens", width]));
  const l = new Layers(g, none, { ...cpuEmitOptions, attention }, g.shapeOf(inputs[0]!, 0, 1));
  const mixed = l.attention(inputs[0]!, inputs[1]!, inputs[2]!, heads, headDim, { scale: headDim ** -0.5 });
  g.output("mixed", mixed, ["rows", "tokens", width]);
  runtime().add(g.build());
  const results = await runtime().run({
    constants: Object.fromEntries(
      [q, k, v].map((tensor, i) => ["qkv"[i]!, { kind: "value" as const, tensor }] as const),
    ),
    registers: { mixed: { dtype: "float32", shape: q.shape } },
    instructions: [
      {
        op: "launch",
        graph: g.name,
        ...{ inputs: { q: "q", k: "k", v: "v" }, outputs: { mixed: "mixed" } },
        label: { kind: "step", name: g.name },
      },
    ],
    results: ["mixed"],
  });
  return results.mixed!.data as Float32Array;
}

/** What attention is by definition, for one query, in float64. */
function reference([q, k, v]: Operands, row: number, head: number, query: number): number[] {
  const tokens = q.shape[1]!;
  const at = (tensor: FloatTensor, token: number, i: number) =>
    tensor.data[(row * tokens + token) * width + head * headDim + i]!;
  const range = Array.from({ length: headDim }, (_, i) => i);
  const scores = Array.from({ length: tokens }, (_, token) =>
    range.reduce((sum, i) => sum + at(q, query, i) * at(k, token, i), 0),
  );
  const most = Math.max(...scores);
  const weights = scores.map((score) => Math.exp((score - most) / Math.sqrt(headDim)));
  const sum = weights.reduce((a, b) => a + b);
  return range.map((i) => weights.reduce((mixed, weight, token) => mixed + (weight / sum) * at(v, token, i), 0));
}

describe.each(fewAndMany)("attention among %i tokens", (tokens) => {
  it("is what the definition says", async () => {
    const inputs = operands(1, tokens);
    const mixed = await attended(inputs, "sized");
    for (const [head, query] of [
      [0, 0],
      [1, tokens >> 1],
      [1, tokens - 1],
    ] as const) {
      const start = query * width + head * headDim;
      for (const [i, value] of reference(inputs, 0, head, query).entries())
        expect(Math.abs(mixed[start + i]! - value)).toBeLessThan(1e-5);
    }
  });

  it("is one operator for few tokens and block by block for many, bit for bit", async () => {
    const inputs = operands(1, tokens);
    const mixed = await attended(inputs, "sized");
    expect(mixed).toEqual(await attended(inputs, tokens > 2896 ? "contrib" : "operator"));
  });

  it("gives a row the same bits whatever is beside it", async () => {
    const pair = operands(2, tokens);
    const second = pair.map(({ data }) =>
      float32([1, tokens, width], (data as Float32Array).slice(tokens * width)),
    ) as unknown as Operands;
    const both = await attended(pair, "sized");
    expect(both.subarray(tokens * width)).toEqual(await attended(second, "sized"));
  });
});

it("has no branch where tokens are always few, and leaves other ways as they are", () => {
  expect(forTokens(cpuEmitOptions, 2896, heads).attention).toBe("operator");
  expect(forTokens(cpuEmitOptions, 2897, heads)).toBe(cpuEmitOptions);
  const products = { ...cpuEmitOptions, attention: "matmul" } as const;
  expect(forTokens(products, 16, heads)).toBe(products);
});
