// A new network, a block letter, a sampler and a runtime are a row each: this test adds one of each to the tables, before
// anything else of the package is loaded, and touches no file of lib/. What is drawn with all four is compared with
// diffusers' result for the same noise.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { FlowTurbo, StepEvent } from "../lib/index.js";
import type { Network } from "../lib/networks/index.js";
import type { Program } from "../lib/program/program.js";
import type { CompilableGraph, RunOptions, Runtime, RuntimeRow, Workspace } from "../lib/runtimes/runtime.js";
import type { Block, BlockRow, SamplerRow } from "../lib/schedule/index.js";
import { fixture, readAll, relativeError, root } from "./support/fixtures.js";
import { withValues } from "./support/with-values.js";

const { GraphBuilder, cpuEmitOptions } = await import("../lib/onnx/index.js");
const { networks } = await import("../lib/networks/index.js");
const { Layers } = await import("../lib/networks/layers.js");
const { blockTable, samplers, planSteps } = await import("../lib/schedule/index.js");
const { runtimes } = await import("../lib/runtimes/index.js");
const { OnnxRuntime } = await import("../lib/runtimes/onnxruntime/onnxruntime.js");

/**
 * A text encoder of its own emit, with weights of a part: sums of the tokens' embeddings times 0, since the checkpoint
 * without T5 has zeros in that place.
 */
networks.toy_text = {
  ...{ part: "textEncoder2", role: "text", variants: [] },
  text: { tokenizer: "tokenizer2", joins: "tokens" },
  emit: (name, { transformer, textEncoder2 }, options) => {
    const { weights, config } = textEncoder2!;
    const g = new GraphBuilder(name);
    const ids = g.input("ids", "int64", ["rows", "tokens"]);
    const layers = new Layers(g, weights, options, g.shapeOf(ids, 0, 1));
    const table = "text_model.embeddings.token_embedding.weight";
    const tokens = layers.rowsOf(table, [config.vocabSize, config.hiddenSize], ids);
    const width = transformer.config.jointAttentionDim;
    const zeros = g.tensor([config.hiddenSize, width], new Float32Array(config.hiddenSize * width), "float32");
    g.output("hidden", g.op("MatMul", [tokens, zeros]), ["rows", "tokens", width]);
    return g.build();
  },
} satisfies Network;

/** A letter: Adams and Bashforth's method of second order for steps of any length; Euler's where there is no step before. */
blockTable.Q = {
  name: "toy Adams–Bashforth",
  needs: 0,
  evaluations: ({ from, h, sigmas, index }) => {
    const ratio = index === 0 ? 0 : h / (2 * (from - sigmas[index - 1]!));
    return [{ type: "predict", sigma: from, aIn: 0, aOld: -h * ratio, aNew: h * (1 + ratio), keepsVelocity: true }];
  },
} satisfies BlockRow;
/** And Euler's under another name. */
blockTable.Z = { ...blockTable.E!, name: "toy" };

samplers.toy = {
  ...{ steps: 6, grid: "diffusers", takesBlocks: false },
  blocks: (steps) => new Array<Block>(steps).fill("Z" as Block),
} satisfies SamplerRow;

/** A runtime: one that has another one do the work, and watches it. */
const launched: string[] = [];
const capabilities = { preemption: false, capture: false, anyShape: true };
class ToyRuntime implements Runtime {
  readonly name = "toy";
  readonly capabilities = capabilities;
  readonly inner = new OnnxRuntime({ weights: "folded", host: new URL(`file://${root}/dist/onnxruntime-host.js`) });
  add(graph: CompilableGraph) {
    this.inner.add(graph);
  }
  has(name: string) {
    return this.inner.has(name);
  }
  run(program: Program, options?: RunOptions) {
    return this.inner.run(program, options);
  }
  open(): Workspace {
    const workspace = this.inner.open();
    return {
      get lost() {
        return workspace.lost;
      },
      submit: (program, options) => {
        launched.push(...program.instructions.flatMap((each) => (each.op === "launch" ? [each.graph] : [])));
        return workspace.submit(program, options);
      },
      free: (names) => workspace.free(names),
      close: () => workspace.close(),
    };
  }
  dispose() {
    return this.inner.dispose();
  }
}
const toy = {
  ...{ name: "toy", runsOn: "a test", capabilities },
  open: async () => {
    const runtime = new ToyRuntime();
    await runtime.inner.start();
    return { runtime, settings: { version: "1" }, device: null, emitOptions: () => cpuEmitOptions };
  },
  find: async () => ({ name: "toy", available: true, version: "1", reason: null, remedy: null }),
} satisfies RuntimeRow;
runtimes.toy = toy;

describe("rows that a test has added", () => {
  let model: FlowTurbo;
  beforeAll(async () => {
    const { FlowTurbo } = await import("../lib/index.js");
    model = await FlowTurbo.load(fixture("sd3", "model"), { runtime: "toy" as never, measureCosts: false });
  });
  afterAll(() => model?.dispose());

  it("draw together what diffusers draws", async () => {
    const reference = await readAll(fixture("sd3", "euler_64.safetensors"));
    const blocks: string[] = [];
    const result = await withValues(model, {
      ...{ prompt: "a red circle above a small blue square", negativePrompt: "blurry, low quality" },
      ...{ sampler: "toy" as never, width: 64, height: 64, maxSequenceLength: 32, noise: reference.noise! },
      onStep: ({ block }: StepEvent) => blocks.push(block),
    });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
    expect([model.runtime.name, result.blocks, result.images[0]!.parameters.sampler]).toEqual(["toy", "Z6", "toy"]);
    expect(blocks).toEqual([..."ZZZZZZ"]);
    expect(new Set(launched)).toEqual(new Set(["clip_l", "clip_g", "toy_text", "predict.guidance", "vae_decoder"]));
  });

  it("draw with a letter in a schedule, alone and beside others", async () => {
    const draw = async (blocks: string) =>
      (await withValues(model, { prompt: "x", seed: 1, width: 64, height: 64, blocks, guidanceScale: 1 })).latents;
    expect(relativeError(await draw("Z3"), await draw("E3"))).toBe(0);
    expect(relativeError(await draw("Q3"), await draw("E3"))).toBeGreaterThan(1e-3);
    await expect(draw("X3")).rejects.toThrow(/Q toy Adams–Bashforth, Z toy, each with an optional count/);
  });

  it("a letter's launches integrate at the order of its method", () => {
    // v = dx/dσ = x, from σ = 1 to 0: x is divided by e.
    const error = (n: number) => {
      let [x, velocity] = [1, 0];
      const sigmas = Array.from({ length: n + 1 }, (_, i) => (1 - i / n) ** 1.5);
      for (const { aIn, aOld, aNew, keepsVelocity } of planSteps(new Array<Block>(n).fill("Q" as Block), sigmas)) {
        const next = x + aIn * velocity;
        x += aOld * velocity + aNew * next;
        if (keepsVelocity) velocity = next;
      }
      return Math.abs(x - Math.exp(-1));
    };
    expect(Math.log2(error(100) / error(200))).toBeGreaterThan(1.8);
    expect(Math.log2(error(100) / error(200))).toBeLessThan(2.2);
  });

  it("are in option values, flags, lists of runtimes, required engines and memory", async () => {
    const { generateSchema, loadSchema, optionMeta } = await import("../lib/options.js");
    expect(optionMeta(generateSchema.shape.sampler).description).toBe(
      "flowturbo, euler, dpmpp_2m, unipc, heun, toy (default: flowturbo, or euler for a distilled model)",
    );
    expect(optionMeta(generateSchema.shape.steps).description).toContain("6 for toy");
    expect(generateSchema.shape.sampler.safeParse("toy").success).toBe(true);
    expect(optionMeta(loadSchema.shape.runtime).description).toContain("toy (a test)");
    expect(optionMeta(loadSchema.shape.runtime).expects).toBe(
      '"auto", "tensorrt", "tensorrt-rtx", "cuda", "webgpu", "onnxruntime" or "toy"',
    );

    const { GraphLibrary } = await import("../lib/networks/library.js");
    const { openCheckpoint } = await import("../lib/checkpoint/index.js");
    const { requiredEngines } = await import("../lib/generation/engines.js");
    const { deviceMemoryNeeded } = await import("../lib/generation/device-memory.js");
    const graphs = new GraphLibrary(await openCheckpoint(fixture("sd3", "model")));
    const engines = requiredEngines(graphs, { batches: [2], guidance: "on", maxSequenceLength: 32 });
    expect(engines.find(({ graph }) => graph === "toy_text")!.profiles.map(({ inputs }) => inputs)).toEqual([
      { ids: [1, 32] },
      { ids: [2, 32] },
    ]);
    // One that joins along the channels always has as many tokens as its tokenizer.
    networks.toy_words = { ...networks.toy_text!, text: { tokenizer: "tokenizer", joins: "channels" } };
    const [words] = requiredEngines(graphs, { batches: [1], guidance: "on", maxSequenceLength: 32 }).filter(
      ({ graph }) => graph === "toy_words",
    );
    delete networks.toy_words;
    expect(words!.profiles.map(({ inputs }) => inputs)).toEqual([{ ids: [1, 77] }]);
    expect(graphs.essential.map(({ graph }) => graph.name)).toContain("toy_text");
    expect(deviceMemoryNeeded(graphs).encode).toBeGreaterThan(0);

    const { Command } = await import("commander");
    const { addModelFlags } = await import("../lib/cli/flags.js");
    const command = new Command();
    addModelFlags(command, loadSchema, generateSchema);
    // Lines of any width.
    const help = command.helpInformation().replace(/\s+/g, " ");
    expect(help).toContain(
      "--sampler <name> flowturbo, euler, dpmpp_2m, unipc, heun, toy (default: flowturbo, or euler for a distilled model)",
    );
    expect(help).toMatch(/--runtime <name> .*toy \(a test\)/);

    const { runtimeNames } = await import("../lib/runtimes/index.js");
    expect(runtimeNames()).toContain("toy");
  });
});
