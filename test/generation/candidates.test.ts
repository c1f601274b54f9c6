// What a time limit may choose from.
import { embeddedModel, type GenerateOptions } from "flowturbo";
import { expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { settleRequest } from "../../lib/generation/request.js";
import { PromptEncoder } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { type CalibratedSchedule, parseBlocks } from "../../lib/schedule/index.js";

const entry = (side: number, guided: boolean[], held: number): CalibratedSchedule => ({
  ...{ width: side, height: side, guidanceScale: 4, guided, psnr: { held, uncalibrated: 1 } },
  sigmas: [...guided.map((_, i) => 1 - i / guided.length), 0],
  weights: guided.map(() => [-1 / guided.length, 0, 0] as const),
});
const whole = (steps: number) => new Array<boolean>(steps).fill(true);

/** Of each candidate the grid, the steps and the rows. */
async function candidates(
  options: Partial<GenerateOptions>,
  calibrated: readonly CalibratedSchedule[],
  ladder: string[] | null = null,
): Promise<[string, number, number][]> {
  const checkpoint = await openCheckpoint(embeddedModel);
  const model = {
    ...{ checkpoint, ladder: ladder?.map(parseBlocks) ?? null, calibrated },
    text: new PromptEncoder(new GraphLibrary(checkpoint)),
    ...{ captured: false, pinBatch: null, allowPaths: false },
  };
  const request = { prompt: "a red circle", guidanceScale: 4, deadlineMs: 1000, ...options };
  return settleRequest(request, model).candidates.map(({ stages: [stage] }) => {
    const { schedule, whole } = stage!;
    return [whole.grid, whole.steps, schedule.evaluations.rows];
  });
}

it("compares what was calibrated with what was calibrated at the same size only", async () => {
  const own = [
    // At 64 px what costs more and comes no nearer is left out.
    ...[entry(64, whole(3), 40), entry(64, [false, true, true, true, false], 45), entry(64, whole(5), 44)],
    // At 128 px nothing comes as near, and is what was fitted for it all the same.
    ...[entry(128, whole(4), 30), entry(128, whole(6), 32), entry(128, [false, ...whole(5)], 31)],
  ];
  const rungs = async (side: number) =>
    (await candidates({ width: side, height: side }, own)).filter(([grid]) => grid === "calibrated");
  const of = (...each: readonly (readonly [number, number])[]) => each.map((rung) => ["calibrated", ...rung]);
  expect(await rungs(128)).toEqual(of([6, 12], [6, 11], [4, 8], [5, 8], [3, 6]));
  // Of equal rows what was fitted at the nearest size comes first.
  expect(await rungs(64)).toEqual(of([6, 12], [6, 11], [5, 8], [4, 8], [3, 6]));
});

it("takes a ladder that was written, before what was calibrated, in its own order", async () => {
  const own = [entry(64, whole(3), 20), entry(64, whole(5), 25)];
  const size = { width: 64, height: 64 };
  const ladder = ["E4", "E7", "E2"];
  const written = (...each: readonly number[]) => each.map((steps) => ["shifted", steps, 2 * steps]);
  expect(await candidates(size, own, ladder)).toEqual(written(4, 7, 2));
  expect(await candidates({ ...size, ladder: ["E2", "E6"] }, own, ladder)).toEqual(written(2, 6));
  // One that names the calibrated grid means what was calibrated.
  const calibrated = [5, 3].map((steps) => ["calibrated", steps, 2 * steps]);
  expect(await candidates({ ...size, grid: "calibrated" }, own, ladder)).toEqual(calibrated);
  const open = await candidates(size, own);
  expect(open.filter(([grid]) => grid === "calibrated")).toEqual(calibrated);
  expect(open.map(([, steps]) => steps)).toEqual([28, 20, 14, 10, 8, 6, 5, 4, 3, 2, 1]);
});

it.each([{ sampler: "flowturbo" }, { quality: "fast" }, { steps: 4 }, { blocks: "E4" }, { sigmas: [1, 0.5] }] as const)(
  "leaves no choice with %j",
  async (fixed) => {
    expect(await candidates(fixed, [entry(64, whole(3), 20)], ["E2", "E1"])).toHaveLength(1);
  },
);
