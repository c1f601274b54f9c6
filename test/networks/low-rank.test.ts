// A low-rank branch beside linear layers, in both forms that runtimes want them in, against sums written out.
import { expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { Layers } from "../../lib/networks/layers.js";
import { LowRankBranch } from "../../lib/networks/low-rank.js";
import { cpuEmitOptions, GraphBuilder } from "../../lib/onnx/index.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();

const numbers = (seed: number, ...shape: number[]): FloatTensor =>
  float32(
    shape,
    Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => Math.sin(seed * 12.9898 + i * 78.233)),
  );

it.each((["gemm", "matmul"] as const).flatMap((linear) => [1, 2, 3].map((groups) => [linear, groups] as const)))(
  "%s, %i groups of rows",
  async (linear, groups) => {
    const [rank, rows, tokens] = [8, 3, 5] as const;
    const { transformer } = await openCheckpoint(fixture("sd3", "model"));
    const weights = await readAll(fixture("sd3", "model/transformer/diffusion_pytorch_model.safetensors"));
    const [out, norm] = ["proj_out", "norm_out.linear"].map((name) => {
      const [to, from] = weights[`${name}.weight`]!.shape as [number, number];
      return { name, to, from };
    }) as [{ name: string; to: number; from: number }, { name: string; to: number; from: number }];

    const graph = `${linear}-${groups}`;
    const g = new GraphBuilder(graph);
    const options = { ...cpuEmitOptions, linear };
    const x = g.input("x", "float32", ["network_rows", "tokens", out.from]);
    const vector = g.input("vector", "float32", ["network_rows", norm.from]);
    const branch = new LowRankBranch(g, rank, "float32");
    const l = new Layers(g, transformer.weights, options, g.shapeOf(x, 0, 1), branch);
    g.output("y", l.linear(x, out.name, out.from, out.to), ["network_rows", "tokens", out.to]);
    g.output("z", l.linear(vector, norm.name, norm.from, norm.to, { rank: 2 }), ["network_rows", norm.to]);
    // Computed twice, as blocks are that some rows leave out: one place.
    l.linear(x, out.name, out.from, out.to);
    const layout = branch.close();
    expect(layout).toEqual({
      ...{ rank, down: rank * (out.from + norm.from), up: rank * (out.to + norm.to) },
      layers: [
        { module: out.name, in: out.from, out: out.to, downOffset: 0, upOffset: 0 },
        { module: norm.name, in: norm.from, out: norm.to, downOffset: rank * out.from, upOffset: rank * out.to },
      ],
    });
    runtime().add(g.build());

    const inputs = {
      x: numbers(1, groups * rows, tokens, out.from),
      vector: numbers(2, groups * rows, norm.from),
      lora_down: numbers(3, rows, layout.down),
      lora_up: numbers(4, rows, layout.up),
      lora_scale: numbers(5, rows, rank),
    };
    const registers = {
      y: { dtype: "float32", shape: [groups * rows, tokens, out.to] },
      z: { dtype: "float32", shape: [groups * rows, norm.to] },
    } as const;
    const results = await runtime().run({
      constants: Object.fromEntries(
        Object.entries(inputs).map(([name, tensor]) => [name, { kind: "value", tensor } as const]),
      ),
      registers,
      instructions: [
        {
          ...{ op: "launch", graph, inputs: Object.fromEntries(Object.keys(inputs).map((name) => [name, name])) },
          ...{ outputs: { y: "y", z: "z" }, label: { kind: "step", name: graph } },
        },
      ],
      results: ["y", "z"],
    });

    for (const [name, operand, layer, each] of [
      ["y", inputs.x, out, tokens],
      ["z", inputs.vector, norm, 1],
    ] as const) {
      const { downOffset, upOffset } = layout.layers.find(({ module }) => module === layer.name)!;
      const expected = new Float32Array(groups * rows * each * layer.to);
      const { data: weight } = weights[`${layer.name}.weight`]!;
      const { data: bias } = weights[`${layer.name}.bias`]!;
      for (let position = 0; position < groups * rows * each; position++) {
        // Groups follow each other: row b of each has the matrices of row b.
        const row = Math.floor(position / each) % rows;
        const values = operand.data.subarray(position * layer.from, (position + 1) * layer.from);
        const down = inputs.lora_down.data.subarray(row * layout.down + downOffset);
        const up = inputs.lora_up.data.subarray(row * layout.up + upOffset);
        for (let o = 0; o < layer.to; o++) {
          let sum = bias[o]!;
          for (let i = 0; i < layer.from; i++) {
            sum += weight[o * layer.from + i]! * values[i]!;
            for (let r = 0; r < rank; r++)
              sum += values[i]! * down[i * rank + r]! * inputs.lora_scale.data[row * rank + r]! * up[r * layer.to + o]!;
          }
          expected[position * layer.to + o] = sum;
        }
      }
      expect(relativeError(results[name] as FloatTensor, float32(registers[name].shape, expected))).toBeLessThan(1e-5);
    }
  },
);
