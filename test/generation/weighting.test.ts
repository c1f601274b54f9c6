// How weights of parts are written. What they do is compared with compel's results in prompts.test.ts.
import { describe, expect, it } from "vitest";
import { mostDownweighted, parseWeights } from "../../lib/generation/weighting.js";

const read = (text: string) => parseWeights(text).map(({ text, weight }) => [text.trim(), Number(weight.toFixed(6))]);

describe("weights in a text", () => {
  it.each<[string, [string, number][]]>([
    ["a red circle", [["a red circle", 1]]],
    ["", [["", 1]]],
    ["()", [["", 1]]],
    ["a (red:1.3) circle", [["a", 1], ["red", 1.3], ["circle", 1]]], // biome-ignore format: one line
    ["a (red circle : .5 )", [["a", 1], ["red circle", 0.5]]], // biome-ignore format: one line
    ["a (red)1.3 circle", [["a", 1], ["red", 1.3], ["circle", 1]]], // biome-ignore format: one line
    ["(red)0", [["red", 0]]],
    ["(red)++ (blue)---", [["red", 1.21], ["blue", 0.729]]], // biome-ignore format: one line
    ["red+ blue--, green", [["red", 1.1], ["blue", 0.81], [", green", 1]]], // biome-ignore format: one line
    ["((a:2) b:1.5) c", [["a", 3], ["b", 1.5], ["c", 1]]], // biome-ignore format: one line
    ["(a (b)2)0.5", [["a", 0.5], ["b", 1]]], // biome-ignore format: one line
    // Neighbours of one weight are one part.
    ["(a)2 (b:2)", [["a b", 2]]],
    ["a (cat) here", [["a  cat  here", 1]]],
    // What is no weight is text.
    ["at 10:30, a (view: of a lake)", [["at 10:30, a  view: of a lake", 1]]],
    ["well-known, semi - detached", [["well-known, semi - detached", 1]]],
    ["1:2 (x)", [["1:2  x", 1]]],
    // Dashes are no words, as in compel.
    ["a cat -- at night,-- ++ --", [["a cat -- at night,-- ++ --", 1]]],
    ["-cat+ --dog", [["-cat", 1.1], ["--dog", 1]]], // biome-ignore format: one line
    ["\\-- a", [["-", 0.9], ["a", 1]]], // biome-ignore format: one line
    ["\\(red:1.3\\) c\\+\\+ \\\\ \\n", [["(red:1.3) c++ \\ \\n", 1]]],
    ["(a \\(b\\):1.2)", [["a (b)", 1.2]]],
    ["(café 🔴:1.2)", [["café 🔴", 1.2]]],
  ])("%j", (text, expected) => {
    expect(read(text)).toEqual(expected);
  });

  it.each([
    ["a (b", /"\(" that no "\)" closes/],
    ["a) b", /"\)" at character 2 that no "\(" opens/],
    ["(a:1.2", /closes/],
    ["(a:100.5)", /weight 100.5; weights are numbers from 0 to 100/],
    ["((a:90):2)", /product is 180/],
    [`${"(".repeat(33)}a${")".repeat(33)}`, /more than 32 groups in each other/],
    ["x".repeat(32_769), /32769 characters; a text with weights may have 32768/],
    [`(a)${"+".repeat(60)}`, /weight \++;/],
    ["(a:0.5) b ".repeat(mostDownweighted + 1), /17 parts with a weight below 1; there may be 16/],
  ])("%j is refused", (text, message) => {
    expect(() => parseWeights(text)).toThrow(SyntaxError);
    expect(() => parseWeights(text)).toThrow(message);
  });

  it("of any length are read in little time", () => {
    const long = ["(", ")", "a+ ", "(a:1", "-", ": 1 ", "\\", " "].map((each) => each.repeat(32_768).slice(0, 32_768));
    const start = performance.now();
    for (const text of [...long, `${"(".repeat(32)}${"a+ ".repeat(10_000)}${":1)".repeat(32)}`])
      try {
        parseWeights(text);
      } catch (error) {
        expect(error).toBeInstanceOf(SyntaxError);
      }
    expect(performance.now() - start).toBeLessThan(2000);
  });
});
