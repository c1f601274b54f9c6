// ControlNets alone against diffusers' (test/fixtures/generate/controlnets.py).
import { describe, expect, it } from "vitest";
import { openCheckpoint, openControlNet } from "../../lib/checkpoint/index.js";
import { positionCrop } from "../../lib/generation/templates.js";
import { controlPositionTable, controlResiduals, residualOf } from "../../lib/networks/controlnet.js";
import { mmditWidth } from "../../lib/networks/index.js";
import { cpuEmitOptions, type EmitOptions, GraphBuilder } from "../../lib/onnx/index.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { cpuRuntime } from "./cpu.js";

const runtime = cpuRuntime();

const ways: Record<string, EmitOptions> = {
  "as for the CPU": cpuEmitOptions,
  "with attention block by block": { ...cpuEmitOptions, attention: "contrib" },
  "as for TensorRT": { ...cpuEmitOptions, linear: "matmul", attention: "matmul", patches: "linear" },
};

describe.each(fixtureNames)("the ControlNet of %s", (name) => {
  it.each(Object.entries(ways))("has diffusers' residuals, emitted %s", async (way, options) => {
    const { transformer } = await openCheckpoint(fixture(name, "model"));
    const controlNet = await openControlNet(fixture(name, "controlnet"));
    const { config } = controlNet;
    const tensors = await readAll(fixture(name, "control_residuals.safetensors"));
    const width = mmditWidth(config);
    const graph = `${name} ${way}`;
    const g = new GraphBuilder(graph);
    const image = (input: string) => g.input(input, "float32", ["rows", 16, "height", "width"]);
    const residuals = controlResiduals(g, controlNet, options, {
      ...{ latent: image("latent"), control: image("control") },
      tokens: g.input("tokens", "float32", ["rows", "patches", width]),
      timestep: g.input("timestep", "float32", ["rows"]),
      context: g.input("context", "float32", ["rows", "text", transformer.config.jointAttentionDim]),
      pooled: g.input("pooled", "float32", ["rows", config.pooledProjectionDim]),
      positionEmbedding: controlPositionTable(controlNet) && g.input("positions", "float32", [1, "patches", width]),
    });
    expect(residuals).toHaveLength(config.numLayers);
    for (const [index, value] of residuals.entries()) g.output(`residual_${index}`, value, ["rows", "patches", width]);
    runtime().add(g.build());
    const shape = tensors.residual_0!.shape;
    const names = residuals.map((_, index) => `residual_${index}`);
    const own = {
      weights: controlNet.weights,
      config: { ...transformer.config, posEmbedMaxSize: config.posEmbedMaxSize! },
    };
    const inputs = ["latent", "control", "tokens", "timestep", "context", "pooled"];
    const results = await runtime().run({
      constants: {
        ...Object.fromEntries(inputs.map((each) => [each, { kind: "value", tensor: tensors[each]! }])),
        ...(config.positions === "own" && { positions: positionCrop(own, [2, 16, 8, 12]) }),
      },
      registers: Object.fromEntries(names.map((each) => [each, { dtype: "float32", shape }])),
      instructions: [
        {
          op: "launch",
          graph,
          inputs: Object.fromEntries(
            [...inputs, ...(config.positions === "own" ? ["positions"] : [])].map((each) => [each, each]),
          ),
          outputs: Object.fromEntries(names.map((each) => [each, each])),
          label: { kind: "step", name: graph },
        },
      ],
      results: names,
    });
    for (const each of names) expect(relativeError(results[each] as never, tensors[each]!), each).toBeLessThan(5e-6);
  });
});

it("divides the residuals among the blocks as diffusers does", () => {
  // Python: [int(j / (L / n)) for j in range(L - 1)]
  const shares = (blocks: number, residuals: number) =>
    Array.from({ length: blocks - 1 }, (_, index) => residualOf(index, blocks, residuals));
  expect(shares(3, 2)).toEqual([0, 0]);
  expect(shares(24, 6)).toEqual([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5]);
  expect(shares(7, 3)).toEqual([0, 0, 0, 1, 1, 2]);
  expect(shares(3, 5)).toEqual([0, 1]);
  expect(shares(24, 23)).toEqual([0, ...Array.from({ length: 22 }, (_, index) => index)]);
  expect(shares(24, 19)).toEqual([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 15, 16, 17]);
});
