// `previewCount`: which steps have previews, what is launched for them, and which events come.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type StepEvent } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { previewedBlocks } from "../../lib/generation/programs.js";

describe("the steps that have previews", () => {
  it.each([
    [10, 1, [5]],
    [10, 2, [4, 7]],
    [10, 3, [3, 5, 8]],
    [4, 3, [1, 2, 3]],
    [4, 4, [1, 2, 3]],
    [4, 1000, [1, 2, 3]],
    [2, 3, [1]],
    [1, 3, []],
    [0, 3, []],
  ])("of %i with a count of %i are %j", (steps, count, numbers) => {
    expect([...previewedBlocks(steps, count)].map((index) => index + 1)).toEqual(numbers);
  });

  it("are as many as were asked for, in order, in range, the last never", () => {
    for (let steps = 1; steps <= 60; steps++)
      for (let count = 1; count <= 60; count++) {
        const indices = [...previewedBlocks(steps, count)];
        expect(indices).toHaveLength(Math.min(count, steps - 1));
        expect(indices).toEqual([...new Set(indices)].sort((a, b) => a - b));
        for (const index of indices) expect(index >= 0 && index < steps - 1, `${index} of ${steps}`).toBe(true);
      }
  });

  it("are all of them without a count", () => {
    expect([...previewedBlocks(3, undefined)]).toEqual([0, 1, 2]);
  });
});

let cache: string;
let model: FlowTurbo;
beforeAll(async () => {
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-previews-"));
  model = await FlowTurbo.load(undefined, { cache, measureCosts: false });
});
afterAll(async () => {
  await model.dispose();
  rmSync(cache, { recursive: true, force: true });
});

const small = { prompt: "a red circle", width: 32, height: 32, seed: 5, sampler: "euler" } as const;

/** Step events of a call, and its launches by graph, as its statistics count them. */
async function watched(options: Partial<GenerateOptions>) {
  const counts = () =>
    Object.fromEntries(Object.entries(model.stats().milliseconds.launches).map(([name, { count }]) => [name, count]));
  const before = counts();
  const events: StepEvent[] = [];
  const result = await model.generate({ ...small, ...options, onStep: (event) => events.push(event) });
  const launches = Object.entries(counts()).flatMap(([name, count]) => {
    const made = count - (before[name] ?? 0);
    return made > 0 ? [[name, made] as const] : [];
  });
  return { result, events, launches: Object.fromEntries(launches) };
}
/** Steps by number, from 1, whose events have previews. */
const shown = (events: readonly StepEvent[]) =>
  events.flatMap(({ step, previews }) => (previews.length > 0 ? [step + 1] : []));

describe("generate() with previewCount", () => {
  it.each(["fast", "decoded"] as const)(
    "launches %s previews for those steps only; every step has its event",
    async (preview) => {
      // The map of colours is fitted before, and the prompt is encoded.
      await watched({ steps: 2, preview });
      const { events, launches } = await watched({ steps: 10, preview, previewCount: 3 });
      expect(events.map(({ step }) => step)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
      expect(shown(events)).toEqual([3, 5, 8]);
      const decodes = preview === "decoded" ? 3 : 0;
      expect(launches).toEqual({ "predict.guidance": 10, "preview.guidance": 3, vae_decoder: 1 + decodes });
      for (const { previews } of events.filter((event) => event.previews.length > 0))
        expect([previews[0]!.width, previews[0]!.height]).toEqual(preview === "fast" ? [8, 8] : [32, 32]);
    },
  );

  it("shows what previews of every step show", async () => {
    const every = await watched({ steps: 6, preview: "decoded" });
    const some = await watched({ steps: 6, preview: "decoded", previewCount: 2 });
    expect(shown(every.events)).toEqual([1, 2, 3, 4, 5, 6]);
    expect(shown(some.events)).toEqual([2, 4]);
    for (const step of [2, 4])
      expect(some.events[step - 1]!.previews[0]!.data).toEqual(every.events[step - 1]!.previews[0]!.data);
    expect(some.result.images[0]!.data).toEqual(every.result.images[0]!.data);
  });

  it("has one for each picture, whose launches are shared", async () => {
    const { events } = await watched({ steps: 4, count: 3, preview: "fast", previewCount: 1 });
    expect(events.map(({ previews }) => previews.length)).toEqual([0, 3, 0, 0]);
  });

  it("numbers the steps of all stages together", async () => {
    const stages = [
      { width: 16, height: 16, blocks: "E4" },
      { width: 32, height: 32, blocks: "H1E1" },
    ];
    const { events } = await watched({
      stages,
      sampler: undefined,
      width: undefined,
      height: undefined,
      preview: "decoded",
      previewCount: 2,
    });
    expect(events.map(({ step, stage }) => [step, stage])).toEqual([[0, 0], [1, 0], [2, 0], [3, 0], [4, 1], [5, 1]]); // biome-ignore format: one line
    expect(shown(events)).toEqual([2, 4]);
    const { events: late } = await watched({
      stages,
      sampler: undefined,
      width: undefined,
      height: undefined,
      preview: "decoded",
      previewCount: 5,
    });
    expect(shown(late)).toEqual([1, 2, 3, 4, 5]);
    expect(late[3]!.previews[0]!.width).toBe(16);
    expect(late[4]!.previews[0]!.width).toBe(32);
  });

  it("counts the steps of the schedule that a time limit has chosen", async () => {
    const open = { sampler: undefined, deadlineMs: 60_000, ladder: ["E8", "E2"] };
    const { events, result } = await watched({ ...open, preview: "fast", previewCount: 3 });
    expect([result.blocks, shown(events)]).toEqual(["E8", [2, 4, 6]]);
  });

  it("has none where there is one step, and with a mask puts the known part back after each step all the same", async () => {
    const { events, launches } = await watched({ steps: 1, preview: "decoded", previewCount: 3 });
    expect(events.map(({ previews }) => previews.length)).toEqual([0]);
    expect(launches).toEqual({ "predict.guidance": 1, vae_decoder: 1 });
    const grey = (value: number) => ({ width: 32, height: 32, data: new Uint8Array(3 * 32 * 32).fill(value) });
    const data = grey(0).data.fill(255, 0, 1500);
    const painted = await watched({
      ...{ image: grey(90), mask: { width: 32, height: 32, data }, strength: 1, steps: 4 },
      ...{ preview: "fast", previewCount: 1 },
    });
    expect(painted.events.map(({ previews }) => previews.length)).toEqual([0, 1, 0, 0]);
    expect(painted.launches).toMatchObject({ "preview.guidance": 1, "inpaint_blend.guidance": 4 });
  });

  it("is refused without preview, and out of range", async () => {
    await expect(model.generate({ ...small, previewCount: 2 })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_OPTION",
      option: "previewCount",
      message: expect.stringMatching(/previewCount .* preview too/),
    });
    for (const previewCount of [0, 1001, 1.5])
      await expect(model.generate({ ...small, preview: "fast", previewCount })).rejects.toMatchObject({
        option: "previewCount",
      });
  });
});
