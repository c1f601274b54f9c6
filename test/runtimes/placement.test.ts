// Every graph of the three fixtures on ONNX Runtime's GPU providers: which nodes fall back to the CPU, and for WebGPU that
// the results are those of the CPU. The CUDA provider is the real one, on a CUDA runtime that only pretends.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type Checkpoint, openCheckpoint, openControlNet } from "../../lib/checkpoint/index.js";
import { graphKey, graphName } from "../../lib/networks/index.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { EmitOptions, EmittedNetwork } from "../../lib/onnx/index.js";
import type { Program } from "../../lib/program/program.js";
import { cudaEmitOptions, gpuWidening, webGpuEmitOptions } from "../../lib/runtimes/onnxruntime/emission.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { type Case, casesOf, graphsWithAndWithout } from "../../verify/cases.js";
import { compare, graphsOf } from "../../verify/check.js";
import { misplaced, placementsOf } from "../../verify/placement.js";
import { noCudaProvider, pretendedCuda } from "../support/cuda.js";
import { fixture, fixtureNames, root } from "../support/fixtures.js";
import { noSwiftShader, swiftShaderEnv } from "../support/swiftshader.js";
import { type Bundles, bundle } from "./build.js";

const minutes = 60_000;

/** A fixture with its ControlNet. */
async function checkpointOf(name: string): Promise<Checkpoint> {
  const controlNet = await openControlNet(fixture(name, "controlnet"));
  return { ...(await openCheckpoint(fixture(name, "model"))), controlNets: new Map([[controlNet.id, controlNet]]) };
}

async function graphsFor(name: string, options: (network: EmittedNetwork) => EmitOptions) {
  const checkpoint = await checkpointOf(name);
  const graphs = new GraphLibrary(checkpoint, options);
  return graphsWithAndWithout(checkpoint).map((key) => graphs.get(graphName(key)));
}

/** Graphs of all that a step may have at once, and of nothing of it, stand for those of some of it. */
function isNeeded({ kind, program }: Case): boolean {
  if (kind !== "engine") return false;
  return graphsOf(program).every((graph) => {
    const { network, lora, controls, skipped } = graphKey(graph);
    const [some, all] = [[lora, controls, skipped].some(Boolean), lora && controls && skipped];
    return network !== "predict" || !some || Boolean(all);
  });
}

const running = (runtime: OnnxRuntime, graphs: GraphLibrary) => (program: Program) => {
  for (const graph of graphsOf(program)) if (!runtime.has(graph)) runtime.add(graphs.get(graph));
  return runtime.run(program);
};

/** Names of the nodes on the CPU, so that a failure shows them. */
const listed = (placements: Awaited<ReturnType<typeof placementsOf>>) =>
  placements.flatMap((placement) =>
    misplaced(placement).map(({ operator, name }) => `${placement.graph}: ${operator} ${name}`),
  );

describe.skipIf(noSwiftShader)(`WebGPU on SwiftShader${noSwiftShader ? `: ${noSwiftShader}` : ""}`, () => {
  const provider = "webgpu";
  let bundles: Bundles;
  beforeAll(async () => {
    bundles = await bundle();
  });
  afterAll(() => bundles?.remove());

  describe.each([true, false])("with its own attention: %s", (attention) => {
    it.each(fixtureNames)("%s has nothing but shape arithmetic on the CPU", { timeout: 5 * minutes }, async (name) => {
      const graphs = await graphsFor(name, webGpuEmitOptions({ float16: false, attention }));
      const placements = await placementsOf(graphs, { provider, root, env: swiftShaderEnv });
      expect(listed(placements)).toEqual([]);
      expect(placements.flatMap(({ nodes }) => nodes).length).toBeGreaterThan(100);
    });
  });

  it("a graph that falls back is noticed", async () => {
    const graphs = await graphsFor("sd3", (network) => ({
      ...webGpuEmitOptions({ float16: false, attention: false })(network),
      attention: "operator",
    }));
    const placements = await placementsOf(graphs.slice(0, 1), { provider, root, env: swiftShaderEnv });
    expect(listed(placements).join()).toMatch(/clip_l: Attention/);
  });

  it.each(fixtureNames)(
    "every graph of %s computes what it does on the CPU",
    { timeout: 10 * minutes },
    async (name) => {
      const checkpoint = await checkpointOf(name);
      await using cpu = new OnnxRuntime({ weights: "lazy", host: bundles.host });
      await using gpu = new OnnxRuntime({
        ...{ name: "webgpu", provider, weights: gpuWidening([]), host: bundles.host, env: swiftShaderEnv },
      });
      const { features } = await gpu.start();
      // Its groups of invocations are too small for ONNX Runtime's attention: see device-probe.ts.
      expect(features).toEqual({ float16: false, attention: false });
      const onCpu = running(cpu, new GraphLibrary(checkpoint));
      const onGpu = running(gpu, new GraphLibrary(checkpoint, webGpuEmitOptions(features!)));
      const cases = await casesOf(
        new GraphLibrary(checkpoint),
        { sizes: [{ width: 64, height: 64 }], batches: [1] },
        onCpu,
      );
      const errors: string[] = [];
      let compared = 0;
      for (const { name: launch, program } of cases.filter(isNeeded)) {
        const expected = await onCpu(program);
        for (const { result, relative } of compare(await onGpu(program), expected)) {
          compared++;
          if (!(relative < 1e-4)) errors.push(`${launch}, ${result}: ${relative}`);
        }
      }
      expect(errors).toEqual([]);
      expect(compared).toBeGreaterThan(10);
    },
  );
});

/**
 * The CPU has every operator of these graphs: ONNX Runtime casts around those that it has in float32 only. So it shows that
 * what is emitted for GPUs is the same network, in float16 and with ONNX Runtime's own attention, too.
 */
describe("graphs for a GPU, on the CPU", () => {
  let bundles: Bundles;
  beforeAll(async () => {
    bundles = await bundle();
  });
  afterAll(() => bundles?.remove());

  it.each(
    fixtureNames.flatMap((name) => [
      [name, "WebGPU in float16", webGpuEmitOptions({ float16: true, attention: true }), 1e-2] as const,
      [name, "WebGPU in float32", webGpuEmitOptions({ float16: false, attention: true }), 1e-5] as const,
      [name, "CUDA without bfloat16", cudaEmitOptions({ bfloat16: false, attention: true }), 1e-2] as const,
    ]),
  )("every graph of %s, for %s, computes what it does for the CPU", async (name, _, options, bar) => {
    const checkpoint = await checkpointOf(name);
    await using runtime = new OnnxRuntime({ weights: "lazy", host: bundles.host });
    await using other = new OnnxRuntime({ weights: "folded", host: bundles.host });
    const reference = new GraphLibrary(checkpoint);
    const expected = running(runtime, reference);
    const given = running(other, new GraphLibrary(checkpoint, options));
    const cases = await casesOf(reference, { sizes: [{ width: 64, height: 64 }], batches: [1, 2] }, expected);
    const errors: string[] = [];
    for (const { name: launch, program } of cases.filter(isNeeded))
      for (const { result, relative } of compare(await given(program), await expected(program)))
        if (!(relative < bar)) errors.push(`${launch}, ${result}: ${relative}`);
    expect(errors).toEqual([]);
    expect(cases.length).toBeGreaterThan(10);
  });
});

describe.skipIf(noCudaProvider)(`the CUDA provider${noCudaProvider ? `: ${noCudaProvider}` : ""}`, () => {
  describe.each([
    ["its own types", { attention: true, bfloat16: true }],
    ["a GPU without bfloat16", { attention: true, bfloat16: false }],
    ["attention written out", { attention: false, bfloat16: true }],
  ])("%s", (_, features) => {
    it.each(fixtureNames)("%s has nothing but shape arithmetic on the CPU", { timeout: 5 * minutes }, async (name) => {
      const graphs = await graphsFor(name, cudaEmitOptions(features));
      const placements = await placementsOf(graphs, { provider: "cuda", root, ...(await pretendedCuda()) });
      expect(listed(placements)).toEqual([]);
      expect(placements.flatMap(({ nodes }) => nodes).length).toBeGreaterThan(100);
    });
  });
});
