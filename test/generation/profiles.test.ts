// Engines have fixed shapes: whatever a picture's program launches must be among the profiles that are required for its
// size and batch. Programs are recorded by a runtime that answers zeros.
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { describe, expect, it, vi } from "vitest";
import { openCheckpoint, openControlNet, writeSafetensors } from "../../lib/checkpoint/index.js";
import { elementCount, float32, type Tensor } from "../../lib/common/tensor.js";
import { OptionError } from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/flowturbo.js";
import { type EngineNeeds, requiredEngines } from "../../lib/generation/engines.js";
import type { GenerateOptions } from "../../lib/model.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { type Constant, type Program, type Register, shapeOf } from "../../lib/program/program.js";
import type { RunOptions } from "../../lib/runtimes/runtime.js";
import { fixture, fixtureNames, readAll } from "../support/fixtures.js";

const programs = vi.hoisted(() => [] as unknown[]) as Program[];

vi.mock("../../lib/runtimes/onnxruntime/onnxruntime.js", async (original) => ({
  ...(await original<object>()),
  OnnxRuntime: class {
    readonly name = "onnxruntime";
    readonly capabilities = { preemption: false, capture: false, anyShape: true };
    async start() {
      return { version: "0" };
    }
    async dispose() {}
    widening() {
      return "lazy";
    }
    add() {}
    has() {
      return true;
    }
    async run(program: Program, { onLaunch }: RunOptions = {}): Promise<Record<string, Tensor>> {
      programs.push(program);
      const zeros = (names: readonly string[] = []) =>
        Object.fromEntries(
          names.map((name) => {
            const { shape } = program.registers[name]!;
            return [name, float32(shape, new Float32Array(elementCount(shape)))];
          }),
        );
      for (const [index, launch] of program.instructions.filter(({ op }) => op === "launch").entries())
        if (launch.op === "launch") onLaunch?.({ launch, index, milliseconds: 1, values: zeros(launch.reported) });
      return zeros(program.results);
    }
    open() {
      const registers: Record<string, Register> = {};
      const constants: Record<string, Constant> = {};
      return {
        lost: false,
        submit: (submission: Program, options: RunOptions) => {
          Object.assign(registers, submission.registers);
          Object.assign(constants, submission.constants);
          return this.run({ ...submission, registers: { ...registers }, constants: { ...constants } }, options);
        },
        free() {},
        close() {},
      };
    }
  },
}));

/** Every launch of the programs since the last call: its graph, and the shape of each input. */
function launches(): { graph: string; inputs: Record<string, readonly number[]> }[] {
  return programs.splice(0).flatMap(({ instructions, registers, constants }) =>
    instructions.flatMap((instruction) => {
      if (instruction.op !== "launch") return [];
      const inputs = Object.entries(instruction.inputs).map(([input, operand]) => {
        const constant = constants[operand];
        const { shape } = constant ? shapeOf(constant) : registers[operand]!;
        return [input, shape] as const;
      });
      return [{ graph: instruction.graph, inputs: Object.fromEntries(inputs) }];
    }),
  );
}

const small = { width: 64, height: 64 };
const wide = { width: 128, height: 96 };
/** So large that the autoencoder takes its pictures in several launches. */
const large = { width: 384, height: 384 };
const image = { ...small, data: new Uint8Array(64 * 64 * 3) };
const mask = { ...small, data: new Uint8Array(64 * 64 * 3).fill(255) };
const stages = [
  { ...small, blocks: "HPR" },
  { ...wide, blocks: "HP" },
];

const cases: [string, Omit<GenerateOptions, "prompt">, EngineNeeds][] = [
  ["one picture", small, { sizes: [small], batches: [1], guidance: "on" }],
  ["four without guidance", { ...wide, count: 4, guidanceScale: 1 }, { sizes: [wide], batches: [4], guidance: "off" }],
  [
    "a batch that is decoded in several launches",
    { ...large, count: 10 },
    { sizes: [large], batches: [10], guidance: "on" },
  ],
  ["stages", { stages, count: 2 }, { sizes: [small, wide], batches: [2], guidance: "on", features: ["stages"] }],
  [
    "stages in latents",
    { stages: [stages[0]!, { ...stages[1]!, upscale: "latents" }], count: 2 },
    { sizes: [small, wide], batches: [2], guidance: "on", features: ["stages"] },
  ],
  [
    "stages that are decoded in several launches",
    { stages: [stages[0]!, { ...large, blocks: "HP" }], count: 9 },
    { sizes: [large, small], batches: [9], guidance: "on", features: ["stages"] },
  ],
  ["image to image", { ...wide, image }, { sizes: [wide], batches: [1], guidance: "on", features: ["editing"] }],
  [
    "inpainting over stages",
    { stages, image, mask, count: 2, guidanceScale: 0 },
    { sizes: [small, wide], batches: [2], guidance: "both", features: ["editing", "stages"] },
  ],
  [
    "previews",
    { ...small, preview: "decoded", count: 2 },
    { sizes: [small], batches: [2], guidance: "both", features: ["previews"] },
  ],
  [
    "skip-layer guidance in some steps",
    { ...small, steps: 6, count: 2, skipLayers: { layers: [2, 1], stop: 0.5 }, guidanceStop: 0.8 },
    { sizes: [small], batches: [2], guidance: "both", skipLayers: [1, 2] },
  ],
  ["native size", {}, { batches: [1], guidance: "on" }],
];

it.each(cases)("profiles for %s cover every launch", async (_, options, needs) => {
  for (const name of fixtureNames) {
    await using model = await FlowTurbo.load(fixture(name, "model"), {
      // As with engines of one batch only.
      pinBatch: needs.batches[0],
      measureCosts: false,
    });
    await model.generate({ prompt: "a red circle", ...options });
    const engines = requiredEngines(new GraphLibrary(await openCheckpoint(fixture(name, "model"))), needs);
    const recorded = launches();
    expect(recorded.length).toBeGreaterThan(3);
    for (const { graph, inputs } of recorded) {
      const profiles =
        engines.find((engine) => engine.graph === graph)?.profiles.map((profile) => profile.inputs) ?? [];
      const text = ["clip_l", "clip_g", "t5"].includes(graph);
      // Texts are independent of each other: those that no profile takes together are encoded one by one.
      const wanted = text ? { ...inputs, ids: [1, inputs.ids![1]!] } : inputs;
      expect(profiles, `${name}: ${graph}`).toContainEqual(wanted);
    }
  }
});

it("profiles for ControlNets cover every launch, that of the encoder of their pictures too", async () => {
  const folders = ["controlnet", "controlnet_own"].map((name) => fixture("sd3", name));
  const named = folders.map((folder, index) => ({ folder, name: `net ${index}` }));
  const white = { width: 8, height: 8, data: new Uint8Array(3 * 64).fill(255) };
  await using model = await FlowTurbo.load(fixture("sd3", "model"), {
    ...{ pinBatch: 2, measureCosts: false, controlNets: named },
  });
  launches();
  const controls = named.map(({ name: folder }) => ({ folder, image: white, stop: 0.7 }));
  await model.generate({ prompt: "a red circle", ...small, steps: 6, count: 2, controls });
  const opened = await Promise.all(folders.map((folder) => openControlNet(folder)));
  const controlNets = new Map(opened.map((each) => [each.id, each]));
  const checkpoint = { ...(await openCheckpoint(fixture("sd3", "model"))), controlNets };
  const needs = { sizes: [small], batches: [2], guidance: "on" as const, controlIds: opened.map(({ id }) => id) };
  const engines = requiredEngines(new GraphLibrary(checkpoint), needs);
  const seen = launches().filter(({ graph }) => graph.startsWith("predict") || graph === "vae_encoder");
  expect(new Set(seen.map(({ graph }) => graph)).size).toBe(3);
  for (const { graph, inputs } of seen) {
    const profiles = engines.find((engine) => engine.graph === graph)?.profiles.map((profile) => profile.inputs);
    expect(profiles, graph).toContainEqual(inputs);
  }
  // One has positions for 160 pixels.
  expect(() =>
    requiredEngines(new GraphLibrary(checkpoint), { ...needs, sizes: [{ width: 176, height: 64 }] }),
  ).toThrow(/guides pictures of at most 160 pixels a side/);
});

it("names every graph once, and each profile once", async () => {
  const engines = requiredEngines(new GraphLibrary(await openCheckpoint(fixture("medium", "model"))), {
    ...{ sizes: [small, wide, { ...small }], batches: [4, 1, 4], guidance: "both" },
    features: ["previews", "stages", "editing"],
  });
  const names = engines.map(({ graph }) => graph);
  expect(new Set(names).size).toBe(names.length);
  expect(names).toHaveLength(20);
  for (const { graph, profiles } of engines) {
    const shapes = profiles.map(({ inputs }) => JSON.stringify(inputs));
    expect(new Set(shapes).size, graph).toBe(shapes.length);
  }
});

it("has a graph for every combination of what steps may have, and leaves blocks out of guided ones only", async () => {
  const graphs = new GraphLibrary(await openCheckpoint(fixture("medium", "model")));
  const names = (needs: Partial<EngineNeeds>) =>
    requiredEngines(graphs, { sizes: [small], batches: [1], guidance: "both", ...needs }).flatMap(
      ({ graph, stepType }) => (stepType === "predict" ? [graph] : []),
    );
  expect(names({})).toEqual(["predict.guidance", "predict"]);
  const skipped = ["predict.guidance", "predict", "predict.guidance.skipped-0+2"];
  expect(names({ skipLayers: [2, 0, 2] }).sort()).toEqual(skipped.sort());
  expect(() => names({ skipLayers: [3] })).toThrow(/from 0 to 2 for skipLayers, .* received 3/);
});

it("refuses stages of one size", async () => {
  const checkpoint = await openCheckpoint(fixture("medium", "model"));
  const needs: EngineNeeds = { sizes: [small], batches: [1], guidance: "on", features: ["stages"] };
  expect(() => requiredEngines(new GraphLibrary(checkpoint), needs)).toThrow(OptionError);
});

describe("no profile is built that is never launched", () => {
  const batchesOf = (engines: ReturnType<typeof requiredEngines>, graph: string, { width, height } = large) =>
    engines
      .find((engine) => engine.graph === graph)
      ?.profiles.filter((profile) => profile.width === width && profile.height === height)
      .map(({ batch }) => batch);

  it("of the autoencoder: batches within its limit of rows, or the limit itself where there are none", async () => {
    const graphs = new GraphLibrary(await openCheckpoint(fixture("medium", "model")));
    const engines = (batches: number[]) =>
      requiredEngines(graphs, { sizes: [small, large], batches, guidance: "on", features: ["stages", "editing"] });
    for (const graph of ["vae_decoder", "upscale"]) {
      expect(batchesOf(engines([1, 4, 10]), graph)).toEqual([1, 4]);
      expect(batchesOf(engines([10]), graph)).toEqual([7]);
      expect(batchesOf(engines([8, 2, 9]), graph)).toEqual([2]);
    }
    // In latents there is no such limit.
    expect(batchesOf(engines([1, 10]), "upscale_latents")).toEqual([1, 10]);
    expect(batchesOf(engines([1, 10]), "vae_decoder", small)).toEqual([1, 10]);
    expect(batchesOf(engines([4, 10]), "predict.guidance")).toEqual([4, 10]);
    expect(batchesOf(engines([4, 10]), "vae_encoder")).toEqual([1]);
  });

  it("of the refiner at a size beyond its own table of positions, which generate refuses", async () => {
    const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-profiles-"));
    try {
      cpSync(fixture("medium", "model"), folder, { recursive: true });
      const config = path.join(folder, "refiner/config.json");
      writeFileSync(
        config,
        readFileSync(config, "utf8").replace('"pos_embed_max_size": 24', '"pos_embed_max_size": 4'),
      );
      const file = path.join(folder, "refiner/diffusion_pytorch_model.safetensors");
      const tensors = await readAll(file);
      const table = float32([1, 16, 64], tensors["pos_embed.pos_embed"]!.data.slice(0, 1024));
      await writeSafetensors(file, { ...tensors, "pos_embed.pos_embed": table });

      const graphs = new GraphLibrary(await openCheckpoint(folder));
      const within = requiredEngines(graphs, { sizes: [small, wide], batches: [1], guidance: "both" });
      for (const graph of ["refine", "refine.guidance"]) {
        expect(batchesOf(within, graph, small)).toEqual([1]);
        expect(batchesOf(within, graph, wide)).toEqual([]);
      }
      expect(batchesOf(within, "predict.guidance", wide)).toEqual([1]);
      const beyond = requiredEngines(graphs, { sizes: [wide], batches: [1], guidance: "on" });
      expect(beyond.map(({ graph }) => graph)).not.toContain("refine.guidance");

      // The same rule where pictures are drawn and launches measured.
      await using model = await FlowTurbo.load(folder, { measureCosts: false });
      const refused = model.generate({ prompt: "x", ...wide, blocks: "H1R1" });
      await expect(refused).rejects.toThrow(/refiner's table of positions has 4 × 4/);
      programs.length = 0;
      await model.profile({ sizes: [wide], batches: [1], rounds: 1 });
      const measured = new Set(launches().map(({ graph }) => graph));
      expect(measured).toContain("predict.guidance");
      expect(measured).not.toContain("refine.guidance");
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});

it("has steps without guidance beside those with it where calibrated schedules run both", async () => {
  const graphs = new GraphLibrary(await openCheckpoint(fixture("medium", "model")));
  const calibrated = (guided: boolean[]) => [
    {
      ...small,
      guidanceScale: 4,
      guided,
      sigmas: [1, 0.8, 0],
      weights: [[-0.2, 0, 0] as const, [-0.8, 0, 0] as const],
    },
  ];
  const steps = (guided: boolean[]) =>
    requiredEngines(graphs, { sizes: [small], batches: [1], guidance: "on", calibrated: calibrated(guided) })
      .map(({ graph }) => graph)
      .filter((graph) => graph.startsWith("predict"));
  expect(steps([true, true])).toEqual(["predict.guidance"]);
  expect(steps([false, true])).toEqual(["predict.guidance", "predict"]);
});
