// The schedules that a request with a time limit may be drawn with.
import { describe, expect, it } from "vitest";
import { defaultLadder, formatBlocks, parseBlocks } from "../../lib/schedule/index.js";

const texts = (hasRefiner: boolean) => defaultLadder(hasRefiner).map(formatBlocks);

describe("defaultLadder", () => {
  it("goes from many evaluations of the predictor to few", () => {
    expect(texts(false)).toEqual(
      ["H1P27", "H1P19", "H1P13", "H1P9", "H1P7", "H1P5", "H1P4", "H1P3", "H1P2", "H1P1", "H1"], // biome-ignore format: one line
    );
    expect(texts(true)).toEqual(
      ["H1P21R6", "H1P15R4", "H1P10R3", "H1P7R2", "H1P5R2", "H1P4R1", "H1P3R1", "H1P2R1", "H1P1R1", "H1P1", "H1"], // biome-ignore format: one line
    );
    for (const blocks of [...texts(true), ...texts(false)]) parseBlocks(blocks);
  });
});
