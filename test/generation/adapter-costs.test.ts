// What steps with a LoRA, a ControlNet or skip-layer guidance cost: measured before a time limit is promised, under names of their own.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import {
  type AcceptEvent,
  type CostEntry,
  FlowTurbo,
  type GenerateOptions,
  OptionError,
  type ProfileOptions,
} from "flowturbo";
import { afterAll, beforeAll, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const adapters = path.join(root, "models/adapters");
const request: GenerateOptions = { prompt: "a red circle", width: 32, height: 32, guidanceScale: 2, seed: 1 };
const limit = { deadlineMs: 100_000, ladder: ["E4"] };
const image = path.join(root, "docs/images/lora.png");

let cache: string;
beforeAll(() => {
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-adapter-costs-"));
});
afterAll(() => rmSync(cache, { recursive: true, force: true }));

it("is known before a promise, each by its graph, and kept for the next process", async () => {
  const load = () =>
    FlowTurbo.load(undefined, {
      loras: [{ file: path.join(adapters, "outlined.safetensors"), dynamic: true }],
      controlNets: [{ folder: path.join(adapters, "edges"), name: "edges" }],
      ...{ cache, measureCosts: false },
    });
  /** Of four steps those that have it, the graph of these, and what else is launched. */
  const ways: { readonly options: GenerateOptions; steps: number; graph: RegExp; others: readonly string[] }[] = [
    { options: { loras: [{ name: "outlined" }] }, steps: 4, graph: /^predict\.guidance\.lora-8$/, others: [] },
    {
      options: { controls: [{ folder: "edges", image, stop: 0.5 }] },
      ...{ steps: 2, graph: /^predict\.controls-[0-9a-f]{8}\.guidance$/, others: ["predict.guidance", "vae_encoder"] },
    },
    {
      options: { skipLayers: { layers: [1, 2], start: 0, stop: 0.75 } },
      ...{ steps: 2, graph: /^predict\.guidance\.skipped-1\+2$/, others: ["predict.guidance"] },
    },
  ];
  const measured: string[] = [];
  {
    await using model = await load();
    for (const { options, steps, graph, others } of ways) {
      const before = model.costs.entries.filter((entry) => graph.test(entry.graph));
      let [entries, predicted]: [readonly CostEntry[], number | null] = [[], null];
      const onAccept = ({ predictedMs }: AcceptEvent) => {
        [entries, predicted] = [model.costs.entries, predictedMs];
      };
      const { deadline } = await model.generate({ ...request, ...options, ...limit, onAccept });
      const own = entries.find((entry) => graph.test(entry.graph))!;
      expect([before, own.batch, own.size]).toEqual([[], 1, "32x32"]);
      expect(entries.map((entry) => entry.graph)).toEqual(expect.arrayContaining([...others]));
      expect(predicted).toBeGreaterThan(0.99 * steps * own.milliseconds);
      expect(deadline!.predictedMs).toBe(predicted);
      measured.push(own.graph);
    }
  }
  await using again = await load();
  const kept = again.costs.entries.map(({ graph }) => graph);
  for (const graph of measured) expect(kept).toContain(graph);
}, 120_000);

it("is measured by profile(), for what is named together", async () => {
  const folder = mkdtempSync(path.join(cache, "profiled-"));
  await using model = await FlowTurbo.load(undefined, {
    loras: [{ file: path.join(adapters, "outlined.safetensors"), dynamic: true, scale: 0 }],
    controlNets: [{ folder: path.join(adapters, "edges"), name: "edges" }],
    ...{ cache: folder, measureCosts: false },
  });
  const options = { sizes: [{ width: 32, height: 32 }], batches: [1, 2], rounds: 1, guidance: "on" } as const;
  const batches = async (more: ProfileOptions): Promise<Record<string, number[]>> => {
    const { entries } = await model.profile({ ...options, ...more, reset: true });
    const found: Record<string, number[]> = {};
    // Drawing enters other batches where it launches them.
    for (const { graph, batch } of entries)
      if (graph.startsWith("predict") && batch <= 2) {
        const name = graph.replace(/controls-[0-9a-f]{8}/, "controls");
        found[name] = [...(found[name] ?? []), batch].sort();
      }
    return found;
  };
  // Calibrated schedules of this model leave guidance out of some steps.
  const plain = { predict: [1, 2], "predict.guidance": [1, 2] };
  expect(await batches({})).toEqual(plain);
  expect(await batches({ loras: ["outlined"], controls: ["edges"], skipLayers: [1, 2] })).toEqual({
    ...plain,
    "predict.controls.lora-8": [1, 2],
    "predict.controls.guidance.lora-8": [1, 2],
    "predict.controls.guidance.lora-8.skipped-1+2": [1, 2],
  });
  expect(await batches({ skipLayers: [0] })).toEqual({ ...plain, "predict.guidance.skipped-0": [1, 2] });
  await expect(model.profile({ ...options, loras: ["other"] })).rejects.toThrow(/There is no dynamic LoRA "other"/);
  await expect(model.profile({ ...options, controls: ["other"] })).rejects.toThrow(OptionError);
  await expect(model.profile({ ...options, skipLayers: [99] })).rejects.toThrow(OptionError);
}, 120_000);
