import { describe, expect, it } from "vitest";
import { OptionError } from "../../lib/errors.js";
import { formatBlocks, parseBlocks, samplers } from "../../lib/schedule/index.js";

describe("parseBlocks", () => {
  it("reads both spellings", () => {
    expect(parseBlocks("H1P5R3").join("")).toBe("HPPPPPRRR");
    expect(parseBlocks("HPPPPPRRR").join("")).toBe("HPPPPPRRR");
    expect(parseBlocks("hP2r").join("")).toBe("HPPR");
    expect(parseBlocks("H12").join("")).toBe("H".repeat(12));
    expect(parseBlocks("E3").join("")).toBe("EEE");
    expect(parseBlocks("H1P0R2").join("")).toBe("HRR");
  });

  it("writes what it reads", () => {
    for (const text of ["H1P5R3", "P3", "E28", "H2P4R2"]) expect(formatBlocks(parseBlocks(text))).toBe(text);
  });

  it.each(["", "X3", "3H", "H1Q2", "H-1", "H1.5", "H0", "H2000", "H999P2"])("refuses %j", (text) => {
    expect(() => parseBlocks(text)).toThrow(OptionError);
  });

  it("refuses a text of any length, and repeats only its beginning", () => {
    for (const text of ["H".repeat(6e6), "H".repeat(8000), "x".repeat(8000), "R".repeat(900), "H0".repeat(4000)]) {
      const refusal = expect.objectContaining({
        code: "ERR_FLOWTURBO_OPTION",
        message: expect.stringMatching(/^.{20,500}$/),
      });
      expect(() => parseBlocks(text)).toThrow(refusal);
    }
    expect(parseBlocks("H1 ".repeat(1000))).toHaveLength(1000);
  });

  it("refuses a schedule that starts with R and says what to do", () => {
    expect(() => parseBlocks("R2P3")).toThrow(/start with R.*Start with H/);
    expect(() => parseBlocks("H0R3")).toThrow(/start with R/);
  });
});

describe("the blocks of samplers", () => {
  it("is UniPC with mild guidance and the damped multistep method with strong", () => {
    const of = (n: number, guidance: number) => formatBlocks(samplers.flowturbo!.blocks(n, guidance));
    expect([of(10, 1), of(10, 2), of(10, 2.5), of(10, 3), of(1, 4.5)]).toEqual(["U10", "U10", "U10", "M10", "M1"]);
  });

  it("is uniform for euler and heun", () => {
    expect(formatBlocks(samplers.euler!.blocks(28, 2))).toBe("E28");
    expect(formatBlocks(samplers.heun!.blocks(4, 2))).toBe("H4");
  });
});
