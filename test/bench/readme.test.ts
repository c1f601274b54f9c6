// What the README quotes of the benchmarks.
import { describe, expect, it } from "vitest";
import { begin, end, figures, type PeersResult, withFigures } from "../../bench/readme.js";

const at = (median: number) => ({ median, min: median - 0.1, max: median + 0.1 });
const peers: PeersResult = {
  environment: { cpu: "A", cores: 2, node: "20", onnxruntime: "1.30", commit: "abc" },
  torch: "2.9",
  missing: ["Not measured, diffusers: it is not there."],
  subjects: [
    {
      ...{ name: "small", steps: 28, rounds: 3 },
      contenders: [
        { name: "flowturbo, Euler", pictureRatio: at(1), stepRatio: at(1) },
        { name: "flowturbo, H1P7R2", pictureRatio: at(0.4), stepRatio: at(1) },
      ],
      start: [{ name: "flowturbo, Euler", ratio: at(1), peak: { median: 2e8, min: 2e8, max: 2e8 } }],
    },
    {
      ...{ name: "wide", steps: 4, rounds: 3 },
      contenders: [{ name: "baseline", pictureRatio: at(1.3), stepRatio: at(1) }],
      start: [],
    },
  ],
};

describe("the README's figures", () => {
  it("have a row for each contender and a column for each subject", () => {
    const rows = figures({ peers })
      .split("\n")
      .filter((line) => line.startsWith("|"))
      .map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim())); // biome-ignore format: one line
    expect(rows.map((row) => row.length)).toEqual(new Array(5).fill(5));
    expect(rows[2]).toEqual(["flowturbo, Euler", "1.00 (0.90–1.10)", "", "1.00 (0.90–1.10)", "0.20"]);
    expect(rows[4]).toEqual(["baseline", "", "1.30 (1.20–1.40)", "", ""]);
    expect(figures({ peers })).toMatch(/it is not there[\s\S]*torch 2\.9; commit abc/);
  });

  it("say what was not measured", () => {
    expect(figures({})).toMatch(/^Not measured yet/);
    expect(figures({ gpu: { measured: false } })).toMatch(/nothing has been measured yet/);
    const quality = { name: "quality-x", captions: 200, size: 64, guidance: 3, findings: ["H1P5 is as good."] };
    expect(figures({ quality: [quality] })).toMatch(
      /64 px and guidance 3, 200 captions \(\[bench\/results\/quality-x\.md\].*\n\n- H1P5 is as good\./,
    );
  });

  it("go between the comments, again and again", () => {
    const once = withFigures(`a\n${begin}\nold\n${end}\nb`, "new");
    expect(once).toBe(`a\n${begin}\nnew\n${end}\nb`);
    expect(withFigures(once, "new")).toBe(once);
    expect(() => withFigures("a", "new")).toThrow(/README.md has no/);
  });
});
