import { describe, expect, it } from "vitest";
import { clipped } from "../../lib/common/text.js";

describe("clipped", () => {
  it("leaves a text of that length, and ends a longer one with an ellipsis", () => {
    expect([clipped("abcdef", 6), clipped("abcdefg", 6)]).toEqual(["abcdef", "abc..."]);
  });

  it("keeps characters whole wherever it cuts", () => {
    for (let before = 0; before < 12; before++) {
      const text = `${"x".repeat(before)}${"🐈".repeat(12)}`;
      const cut = clipped(text, 12);
      expect(cut).toMatch(/^x*🐈*\.\.\.$/u);
      expect(cut.length).toBeGreaterThanOrEqual(11);
      expect(cut.length).toBeLessThanOrEqual(12);
    }
  });
});
