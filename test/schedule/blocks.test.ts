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
  it("is H1P(n-1) without a refiner", () => {
    expect(formatBlocks(samplers.flowturbo!.blocks(10, false))).toBe("H1P9");
    expect(formatBlocks(samplers.flowturbo!.blocks(1, false))).toBe("H1");
  });

  it("ends with n/5 refiner blocks, rounded, with one", () => {
    const of = (n: number) => formatBlocks(samplers.flowturbo!.blocks(n, true));
    expect([1, 2, 3, 5, 8, 10, 12, 13].map(of)).toEqual([
      "H1",
      "H1P1",
      "H1P1R1",
      "H1P3R1",
      "H1P5R2",
      "H1P7R2",
      "H1P9R2",
      "H1P9R3",
    ]);
  });

  it("is uniform for euler and heun", () => {
    expect(formatBlocks(samplers.euler!.blocks(28, true))).toBe("E28");
    expect(formatBlocks(samplers.heun!.blocks(4, true))).toBe("H4");
  });
});
