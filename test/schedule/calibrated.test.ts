// Which calibrated schedule serves a request.
import { describe, expect, it } from "vitest";
import { areSomeMixed, type CalibratedSchedule, fittedSchedules, nearestOf } from "../../lib/schedule/index.js";

const entry = (side: number, guidanceScale: number, steps: number, value: number): CalibratedSchedule => ({
  ...{ width: side, height: side, guidanceScale },
  guided: new Array<boolean>(steps).fill(guidanceScale > 1),
  sigmas: Array.from({ length: steps + 1 }, (_, i) => (1 - i / steps) * (1 - (value / 1000) * (i > 0 ? 1 : 0))),
  weights: Array.from({ length: steps }, () => [-value, value / 10, value / 100] as const),
});
const all = [entry(64, 1, 4, 1), entry(64, 2, 4, 10), entry(64, 6, 4, 30), entry(128, 2, 4, 50), entry(64, 2, 6, 70)];
/** The schedule for a request of a number of steps. */
const fittedFor = (all: readonly CalibratedSchedule[], { steps, ...request }: ReturnType<typeof asked>) =>
  nearestOf(fittedSchedules(all, request).filter(({ guidance }) => guidance.length === steps));
/** A request at one scale, all of its steps guided, or none at scale 1. */
const asked = ({ guidanceScale = 2, steps = 4, width = 64, height = 64 }) => ({
  ...{ width, height, guidanceScale, steps },
  guided: new Array<boolean>(steps).fill(guidanceScale > 1) as boolean[] | undefined,
});
const weight = (request: Parameters<typeof asked>[0]) => fittedFor(all, asked(request))?.weights[0]?.new;

describe("fittedFor", () => {
  it("takes the schedule of the number of steps, the scale and the size", () => {
    expect(weight({})).toBe(-10);
    expect(weight({ width: 128, height: 128 })).toBe(-50);
    expect(weight({ steps: 6 })).toBe(-70);
    expect(weight({ steps: 5 })).toBeUndefined();
    const { blocks, sigmas, weights, guidance } = fittedFor(all, asked({}))!;
    expect([blocks.join(""), guidance, sigmas[0], sigmas[4]]).toEqual(["EAAA", [2, 2, 2, 2], 1, 0]);
    expect(weights[1]).toEqual({ in: 0, new: -10, old: 1, older: 0.1 });
  });

  it("takes one of two sizes of equal area, the one of the nearer shape", () => {
    const wide = { ...entry(64, 2, 4, 10), width: 128, height: 32, psnr: { held: 30, uncalibrated: 20 } };
    const high = { ...entry(64, 2, 4, 20), width: 32, height: 128, psnr: { held: 30, uncalibrated: 20 } };
    for (const both of [
      [wide, high],
      [high, wide],
    ]) {
      expect(fittedFor(both, asked({ width: 128, height: 40 }))!.weights[0]!.new).toBe(-10);
      expect(fittedFor(both, asked({ width: 40, height: 128 }))!.weights[0]!.new).toBe(-20);
      const between = fittedFor(both, asked({}))!;
      expect([-10, -20]).toContain(between.weights[0]!.new);
      for (const sigma of between.sigmas) expect(sigma).not.toBeNaN();
    }
  });

  it("interpolates between scales, every number, and falls still", () => {
    expect(weight({ guidanceScale: 3 })).toBeCloseTo(-15, 12);
    const { sigmas, weights } = fittedFor(all, asked({ guidanceScale: 4 }))!;
    expect(weights[3]).toEqual({ in: 0, new: -20, old: 2, older: expect.closeTo(0.2, 12) });
    for (const [i, sigma] of sigmas.entries()) if (i > 0) expect(sigma).toBeLessThan(sigmas[i - 1]!);
  });

  it("takes the nearest scale a little outside, and nothing far away", () => {
    expect(weight({ guidanceScale: 6.8 })).toBe(-30);
    expect(weight({ guidanceScale: 7 })).toBeUndefined();
    expect(weight({ steps: 6, guidanceScale: 1.8 })).toBe(-70);
    expect(weight({ steps: 6, guidanceScale: 1 })).toBeUndefined();
    expect(weight({ steps: 6, guidanceScale: 4.5 })).toBeUndefined();
  });

  it("does not mix guided steps and others", () => {
    expect(weight({ guidanceScale: 1 })).toBe(-1);
    // Between 1 and 2 a step is guided, which a schedule without guidance says nothing of.
    expect(weight({ guidanceScale: 1.3 })).toBeUndefined();
    expect(weight({ guidanceScale: 1.8 })).toBe(-10);
  });

  it("serves requests that guide the same steps", () => {
    const guided = [true, true, true, false];
    const own = [...all, { ...entry(64, 2, 4, 5), guided }, { ...entry(64, 6, 4, 9), guided }];
    const found = fittedFor(own, { ...asked({ guidanceScale: 4 }), guided })!;
    expect([found.weights[0]!.new, found.guidance]).toEqual([-7, [4, 4, 4, null]]);
    expect(fittedFor(own, asked({}))!.weights[0]!.new).toBe(-10);
    expect(fittedFor(own, { ...asked({}), guided: [false, true, true, true] })).toBeNull();
  });

  it("chooses which steps are guided where that is open: what is nearest, and of equal ones the cheapest", () => {
    const of = (guided: boolean[], held: number, scale = 2, uncalibrated = 10) => ({
      ...entry(64, scale, guided.length, held),
      ...{ guided, psnr: { held, uncalibrated } },
    });
    const [whole, first, last, both] = [[true, true, true], [false, true, true], [true, true, false], [false, true, false]] as [boolean[], boolean[], boolean[], boolean[]]; // biome-ignore format: a table
    const open = (own: CalibratedSchedule[], guidanceScale = 2) =>
      fittedFor(own, { ...asked({ steps: 3, guidanceScale }), guided: undefined })?.guidance;
    expect(open([of(whole, 20), of(first, 21), of(last, 19)])).toEqual([null, 2, 2]);
    expect(open([of(whole, 20), of(last, 20), of(both, 20)])).toEqual([null, 2, null]);
    // One that is no better than the usual schedule that guides the same steps is none, and where all are so there is none.
    expect(open([of(whole, 20), of(first, 21, 2, 22)])).toEqual([2, 2, 2]);
    expect(open([of(whole, 20, 2, 21), of(first, 21, 2, 22)])).toBeUndefined();
    // Between scales what was fitted at both.
    const two = [of(whole, 20), of(first, 30), of(whole, 20, 4), of(last, 30, 4)];
    expect([open(two, 2), open(two, 3), open(two, 4)]).toEqual([
      [null, 2, 2],
      [3, 3, 3],
      [4, 4, null],
    ]);
    // Nor is one that is no better than the usual schedule that guides all.
    expect(open([of(whole, 20, 2, 25), of(first, 24, 2, 10)])).toBeUndefined();
    expect(open([of(whole, 20, 2, 25), of(first, 26, 2, 10)])).toEqual([null, 2, 2]);
    // A scale that lies between what was fitted is not that of a pattern for which it lies outside.
    expect(open([of(whole, 20), of(whole, 12, 4), of(first, 30)], 2.2)).toEqual([2.2, 2.2, 2.2]);
    expect(open([of(whole, 20), of(first, 30)], 2.2)).toEqual([null, 2.2, 2.2]);
    // Of those that nobody measured the one that guides most.
    const unmeasured = [first, whole, both].map((guided) => ({ ...of(guided, 1), psnr: undefined }));
    expect(open(unmeasured)).toEqual([2, 2, 2]);
    expect([areSomeMixed(unmeasured), areSomeMixed([of(whole, 1)]), areSomeMixed([])]).toEqual([true, false, false]);
    // What is of another size says nothing of what is best here.
    expect(open([of(whole, 20), { ...of(first, 30), width: 96 }])).toEqual([2, 2, 2]);
  });

  it("scales the guidance of each step, and interpolates that too", () => {
    const scales = [0.5, 1, 1.5, 2];
    const own = [{ ...entry(64, 2, 4, 1), scales }, entry(64, 6, 4, 2)];
    const at = (guidanceScale: number) => fittedFor(own, asked({ guidanceScale }))!.guidance;
    expect(at(2)).toEqual([1, 2, 3, 4]);
    expect(at(6)).toEqual([6, 6, 6, 6]);
    expect(at(4)).toEqual([3, 4, 5, 6]);
  });

  it("takes none where what fits is no better than the usual schedule", () => {
    const psnr = { held: 20, uncalibrated: 21 };
    const own = [entry(64, 3, 4, 1), { ...entry(64, 4.5, 4, 2), psnr }, entry(64, 7, 4, 3)];
    const at = (guidanceScale: number) => fittedFor(own, asked({ guidanceScale }))?.weights[0]?.new;
    expect([at(3), at(4.5), at(4), at(5), at(7)]).toEqual([-1, undefined, undefined, undefined, -3]);
  });

  it("takes another size where its own has no scale that serves", () => {
    const own = [entry(64, 2, 4, 1), entry(128, 2, 4, 2), entry(128, 4.5, 4, 3)];
    const at = (guidanceScale: number) => fittedFor(own, asked({ guidanceScale }))?.weights[0]?.new;
    expect([at(2), at(4.5)]).toEqual([-1, -3]);
  });

  it("takes the nearest size within reach", () => {
    expect(weight({ width: 96, height: 64 })).toBe(-10);
    expect(weight({ width: 128, height: 112 })).toBe(-50);
    expect(weight({ width: 32, height: 32 })).toBe(-10);
    expect(weight({ width: 512, height: 512 })).toBeUndefined();
  });
});
