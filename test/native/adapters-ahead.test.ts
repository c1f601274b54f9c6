// Engines for LoRAs, ControlNets and skip-layer guidance, built ahead of time by `flowturbo compile` with the simulated builder, then drawn
// with: nothing is built any more, and the picture is that of the closed forms in TypeScript, bit for bit.
import { readdirSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { beforeAll, expect, it, vi } from "vitest";
import { openCheckpoint, openControlNet } from "../../lib/checkpoint/index.js";
import { embeddedModel, FlowTurbo } from "../../lib/flowturbo.js";
import { type CompileReport, requiredEngines } from "../../lib/generation/engines.js";
import type { GenerateOptions, LoadOptions } from "../../lib/model.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { cpuEmitOptions } from "../../lib/onnx/index.js";
import { runtimes } from "../../lib/runtimes/index.js";
import { ClosedFormRuntime, checkpointForms, type Forms, writeForms } from "../support/closed-forms.js";
import { root } from "../support/fixtures.js";
import { simulatedFolder } from "../support/simulated.js";
import { cli, describeAddons, startNode, temporaryFolder } from "./support.js";

const adapters = path.join(root, "models/adapters");
const loading: LoadOptions = {
  loras: [{ file: path.join(adapters, "outlined.safetensors"), dynamic: true }],
  controlNets: [{ folder: path.join(adapters, "edges"), name: "edges" }],
  measureCosts: false,
};
/** Steps with and without each: the control ends after three of four, blocks are left out of the second. */
const request: GenerateOptions = {
  ...{ prompt: "a red circle", width: 64, height: 64, sampler: "euler", steps: 4, guidanceScale: 4, seed: 7 },
  loras: [{ name: "outlined", scale: 0.7 }],
  controls: [{ folder: "edges", image: path.join(root, "docs/images/lora.png"), preprocess: "canny", stop: 0.75 }],
  skipLayers: { layers: [2, 1], start: 0, stop: 0.5 },
};

describeAddons("engines for adapters, built ahead", () => {
  const cache = temporaryFolder();
  const folder = temporaryFolder();
  const env = { LD_LIBRARY_PATH: simulatedFolder, FLOWTURBO_SIMULATED_FORMS: folder };
  const tensorrtFolder = path.join(simulatedFolder, "tensorrt");
  let id: string;
  let factor: number;
  let forms: Forms;
  beforeAll(async () => {
    const checkpoint = await openCheckpoint(embeddedModel);
    const controlNet = await openControlNet(path.join(adapters, "edges"));
    id = controlNet.id;
    const graphs = new GraphLibrary({ ...checkpoint, controlNets: new Map([[id, controlNet]]) });
    const added = { lorasRank: 8, controlIds: [id], skipLayers: [1, 2] } as const;
    const engines = requiredEngines(graphs, { batches: [1], guidance: "on", ...added });
    factor = checkpoint.vae.config.factor;
    forms = checkpointForms(
      factor,
      engines.map(({ graph }) => graph),
    );
    writeForms(folder, forms);
  });

  const compile = async (...flags: string[]) => {
    const common = ["--runtime", "tensorrt", "--tensorrt-dir", tensorrtFolder, "--cache", cache, "--json"];
    const args = [cli, "compile", "--model", embeddedModel, "--sizes", "64x64", "--batches", "1", ...common, ...flags];
    const { code, stdout, stderr } = await startNode(args, env).finished;
    expect(code, stderr).toBe(0);
    return JSON.parse(stdout) as CompileReport;
  };
  const plans = () => readdirSync(path.join(cache, "engines")).filter((name) => name.endsWith(".plan"));

  /** Draws the request in a process of its own, with what the cache has. */
  const draw = async () => {
    const load = { ...loading, runtime: "tensorrt", tensorrtFolder, cache, batches: [1] };
    const code = `
      import { FlowTurbo } from ${JSON.stringify(pathToFileURL(path.join(root, "dist/index.js")).href)};
      const model = await FlowTurbo.load(${JSON.stringify(embeddedModel)}, ${JSON.stringify(load)});
      const { latents, evaluations } = await model.generate(${JSON.stringify(request)});
      console.log(JSON.stringify({ latents: [...latents.data], rows: evaluations.rows }));
      await model.dispose();`;
    const { stdout, stderr } = await startNode(["--input-type=module", "-e", code], env).finished;
    expect(stderr).toBe("");
    return JSON.parse(stdout) as { readonly latents: readonly number[]; readonly rows: number };
  };

  it("are those of every step that can occur, and all that the picture needs", { timeout: 300_000 }, async () => {
    const { engines } = await compile(
      ...["--loras-rank", "8", "--skip-layers", "1,2", "--controls", path.join(adapters, "edges")],
    );
    const steps = engines.filter(({ stepType }) => stepType === "predict").map(({ graph }) => graph);
    // Calibrated schedules of this model leave guidance out of some steps, and blocks are left out of guided ones only.
    const controls = `controls-${id}`;
    expect(steps.sort()).toEqual(
      [
        ...["predict", "predict.lora-8", `predict.${controls}`, `predict.${controls}.lora-8`],
        ...["predict.guidance", "predict.guidance.skipped-1+2", "predict.guidance.lora-8"],
        ...["predict.guidance.lora-8.skipped-1+2", `predict.${controls}.guidance`],
        ...[`predict.${controls}.guidance.skipped-1+2`, `predict.${controls}.guidance.lora-8`],
        `predict.${controls}.guidance.lora-8.skipped-1+2`,
      ].sort(),
    );
    // The control picture is encoded.
    expect(engines.map(({ graph }) => graph)).toContain("vae_encoder");
    const built = plans();
    const drawn = await draw();
    expect(plans()).toEqual(built);

    const open = vi.spyOn(runtimes.onnxruntime!, "open").mockImplementation(async () => ({
      ...{ runtime: new ClosedFormRuntime(forms), settings: {}, device: null, emitOptions: () => cpuEmitOptions },
    }));
    const model = await FlowTurbo.load(embeddedModel, { ...loading, runtime: "onnxruntime" });
    const { latents, evaluations } = await model.generate(request);
    await model.dispose();
    open.mockRestore();
    expect(drawn.rows).toBe(evaluations.rows);
    expect(evaluations.rows).toBe(2 * 4 + 1);
    expect(new Set(drawn.latents).size).toBeGreaterThan(100);
    expect(Float32Array.from(drawn.latents)).toEqual(latents!.data);
  });

  it("are reused by whatever needs some of them; other blocks need engines of their own", {
    timeout: 300_000,
  }, async () => {
    const before = plans();
    const { engines } = await compile("--skip-layers", "1,2");
    expect(engines.filter(({ cached }) => !cached)).toEqual([]);
    writeForms(folder, checkpointForms(factor, ["predict.guidance.skipped-0"]));
    const { engines: other } = await compile("--skip-layers", "0");
    expect(other.filter(({ cached }) => !cached).map(({ graph }) => graph)).toEqual(["predict.guidance.skipped-0"]);
    expect(plans()).toHaveLength(before.length + 1);
  });
});
