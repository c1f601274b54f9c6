// Which calibrated schedules have the refiner correct their last step.
import { describe, expect, it } from "vitest";
import { type CalibratedSchedule, fittedSchedules, nearestOf } from "../../lib/schedule/calibrated.js";

const entry = (guidanceScale: number, refined?: boolean): CalibratedSchedule => ({
  ...{ width: 64, height: 64, guidanceScale, guided: [true, true, true], sigmas: [1, 0.7, 0.3, 0] },
  weights: [
    [-0.3, 0, 0],
    [-0.4, 0, 0],
    [-0.3, 0, 0],
  ],
  ...(refined !== undefined && { refined }),
});
const blocksFor = (all: CalibratedSchedule[], guidanceScale: number, hasRefiner?: boolean) =>
  nearestOf(
    fittedSchedules(all, { width: 64, height: 64, guidanceScale, ...(hasRefiner !== undefined && { hasRefiner }) }),
  )?.blocks.join("");

describe("a calibrated schedule that the refiner was found to improve", () => {
  it("ends with C where there is a refiner", () => {
    expect(blocksFor([entry(2, true)], 2, true)).toBe("EAC");
    expect(blocksFor([entry(2, true)], 2, false)).toBe("EAA");
    expect(blocksFor([entry(2, true)], 2)).toBe("EAA");
    expect(blocksFor([entry(2, false)], 2, true)).toBe("EAA");
    expect(blocksFor([entry(2)], 2, true)).toBe("EAA");
  });

  it("between two scales only if it improves both", () => {
    expect(blocksFor([entry(2, true), entry(4, true)], 3, true)).toBe("EAC");
    expect(blocksFor([entry(2, true), entry(4)], 3, true)).toBe("EAA");
  });
});
