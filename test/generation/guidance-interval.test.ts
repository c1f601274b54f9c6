// Intervals of guidance that hold no step are refused before work, and are no way to meet a time limit.
import { beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { type ModelFacts, settleRequest } from "../../lib/generation/request.js";
import { PromptEncoder } from "../../lib/generation/text.js";
import type { GenerateOptions } from "../../lib/model.js";
import { GraphLibrary } from "../../lib/networks/library.js";

let facts: ModelFacts;
beforeAll(async () => {
  const ladder = [20, 10, 4, 1].map((steps) => new Array<"M">(steps).fill("M"));
  const checkpoint = await openCheckpoint(embeddedModel);
  facts = {
    ...{ checkpoint, ladder, calibrated: [] },
    text: new PromptEncoder(new GraphLibrary(checkpoint)),
    ...{ captured: false, pinBatch: null, allowPaths: false },
  };
});

const settle = (options: Partial<GenerateOptions>, model = facts) =>
  settleRequest({ prompt: "x", guidanceScale: 4.5, ...options }, model);
const stepsOf = (options: Partial<GenerateOptions>, model?: ModelFacts) =>
  settle(options, model).candidates.map(({ stages: [stage] }) => stage!.schedule.blocks.length);

const between = { guidanceStart: 0.55, guidanceStop: 0.58 };
const size = { width: 32, height: 32 };
const refusalOf = (steps: number) =>
  expect.objectContaining({
    ...{ code: "ERR_FLOWTURBO_OPTION", option: "guidanceStart" },
    message: expect.stringMatching(
      new RegExp(
        `guidanceStart [\\d.]+ and guidanceStop [\\d.]+ no step would be guided: of ${steps} steps? .*at least one guided step, or guidanceScale 1 `,
      ),
    ),
  });

describe("an interval of guidance", () => {
  it.each<[string, Partial<GenerateOptions>, number]>([
    ["steps", { ...between, steps: 10 }, 10],
    ["the usual number of steps", between, 10],
    ["a quality, which is a step of the ladder", { ...between, quality: "fast" }, 1],
    ["another sampler", { ...between, sampler: "euler", steps: 5 }, 5],
    ["blocks", { ...between, blocks: "H1P9" }, 10],
    ["sigmas", { ...between, sigmas: [1, 0.5, 0] }, 2],
    ["one step", { guidanceStop: 0.9, steps: 1 }, 1],
    [
      "a list, of which other steps have a scale",
      { steps: 4, guidanceScale: [4, 1, 1, 4], guidanceStart: 0.25, guidanceStop: 0.75 },
      4,
    ],
    [
      "all stages",
      {
        ...between,
        stages: [
          { ...size, blocks: "H1P3" },
          { width: 64, height: 64, blocks: "H6" },
        ],
      },
      10,
    ],
  ])("that holds no step is refused: %s", (_, options, steps) => {
    expect(() => settle(options)).toThrow(refusalOf(steps));
  });

  it("that holds no step is refused: a quality of a model that has no ladder of its own", () => {
    const options: Partial<GenerateOptions> = { ...between, quality: "fast" };
    expect(() => settle(options, { ...facts, ladder: null })).toThrow(refusalOf(6));
  });

  it("that holds one step guides it, and without guidance any interval is as good", () => {
    const launches = (options: Partial<GenerateOptions>) =>
      settle({ steps: 10, ...options }).candidates[0].stages[0]!.schedule.launches.map(
        ({ guidance }) => guidance !== null,
      );
    const only = Array.from({ length: 10 }, (_, step) => step === 5);
    expect(launches({ guidanceStart: 0.55, guidanceStop: 0.62 })).toEqual(only);
    const none = only.map(() => false);
    for (const guidanceScale of [1, 0, Array.from(none, () => 1)])
      expect(launches({ ...between, guidanceScale })).toEqual(none);
  });

  it("leaves out of a time limit's schedules those in which no step is guided", () => {
    const deadlineMs = 1000;
    expect(stepsOf({ deadlineMs })).toEqual([20, 10, 4, 1]);
    // ⌊20 · 0.55⌋ = 11 = ⌊20 · 0.58⌋; ⌊20 · 0.6⌋ = 12, and one of ten.
    expect(stepsOf({ deadlineMs, guidanceStart: 0.55, guidanceStop: 0.6 })).toEqual([20, 10]);
    expect(stepsOf({ deadlineMs, guidanceStop: 0.5 })).toEqual([20, 10, 4]);
    // Said of the richest where none is left, and of the one that a ladder of the caller's names.
    expect(() => settle({ deadlineMs, ...between })).toThrow(/no step would be guided: of 20 steps/);
    expect(() => settle({ deadlineMs, guidanceStop: 0.5, ladder: ["H1P3", "H1"] })).toThrow(
      /no step would be guided: of 1 step those/,
    );
  });

  it("has no calibrated schedule without guidance stand in for guided ones", () => {
    const entry = (guidanceScale: number, guided: boolean[], held: number) => ({
      ...{ width: 64, height: 64, guidanceScale, guided, psnr: { held, uncalibrated: 1 } },
      sigmas: [...guided.map((_, i) => 1 - i / guided.length), 0],
      weights: guided.map(() => [-1 / guided.length, 0, 0] as const),
    });
    const calibrated = [entry(1, [false, false], 40), entry(4.5, [true, true, false, false], 20)];
    const options = { width: 64, height: 64, deadlineMs: 1000, guidanceStart: 0, guidanceStop: 0.49 };
    const model = { ...facts, ladder: null, calibrated: [...calibrated, entry(4.5, [true, false, false, false], 20)] };
    const found = settle(options, model).candidates.map(({ stages: [stage] }) => stage!);
    expect(found.every(({ schedule }) => schedule.evaluations.rows > schedule.evaluations.predictor)).toBe(true);
    expect(found.filter(({ whole }) => whole.grid === "calibrated").map(({ whole }) => whole.steps)).toEqual([4]);
    expect(() => settle({ ...options, deadlineMs: undefined, steps: 2 }, model)).toThrow(/of 2 steps/);
  });
});
