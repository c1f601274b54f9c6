// What the README quotes of the benchmarks.
import { describe, expect, it } from "vitest";
import { page } from "../../bench/peers/page.js";
import {
  type At,
  type Machine,
  merged,
  processorName,
  type Row,
  type SubjectResult,
} from "../../bench/peers/result.js";
import { ahead } from "../../bench/peers/tables.js";
import { begin, end, figures, withFigures } from "../../bench/readme.js";

const at = (median: number) => ({ median, min: median - 0.1, max: median + 0.1, runs: 5 });
const row = (name: string, step: number, picture: number, more: Partial<Row> = {}): At<Row> => ({
  ...{ name, precision: "float32", step: at(50), picture: at(500), stepRatio: at(step), pictureRatio: at(picture) },
  baseline: { step: at(50), picture: at(500) },
  commit: "abc",
  ...more,
});
const small: SubjectResult = {
  ...{ name: "small", steps: 28, rounds: 5 },
  missing: [{ name: "torch", what: "side by side", reason: "it is not there" }],
  contenders: [
    row("flowturbo, int8", 0.4, 0.5, { ours: true, precision: "int8" }),
    row("flowturbo, H1P7R2", 1, 0.3, { ours: true, skips: true }),
    row("fast", 0.3, 0.9, { precision: "int8" }),
    row("passed", 0.5, 0.6, { precision: "int8" }),
    row("slow", 1.3, 1.4),
    row("skipping", 1.2, 0.6, { skips: true }),
  ],
  start: [
    {
      ...{ name: "fast", time: at(9), ratio: at(2), peak: at(3e8), commit: "abc" },
      baseline: { time: at(5), peak: at(2e8) },
    },
  ],
};
const machine = (cpu: string, subjects: readonly SubjectResult[]): Machine => ({
  environment: { cpu, cores: 2, memoryGiB: 8, node: "20", onnxruntime: "1.30" },
  ...{ instructions: ["avx2"], threads: 2, guidance: 2, versions: { torch: "2.9" }, subjects },
});
const wide: SubjectResult = { ...small, name: "wide", contenders: [row("slow", 1.5, 1.6)], start: [], missing: [] };
const peers = { machines: [machine("A", [small, wide]), machine("B", [small])] };

const cells = (text: string) =>
  text
    .split("\n")
    .filter((line) => line.startsWith("|") && !line.startsWith("|---"))
    .map((line) => line.split("|").slice(1, -1).map((cell) => cell.trim())); // biome-ignore format: one line

describe("the README's figures", () => {
  it("have a row for each contender and a column for each subject and machine", () => {
    const rows = cells(figures({ peers }));
    expect(rows[0]).toEqual(["guided step", "small, 28 steps (A)", "small, 28 steps (B)", "wide, 28 steps (A)"]);
    expect(rows[1]).toEqual(["flowturbo, Euler", "1", "1", "1"]);
    // Whoever skips evaluations does not do the same work.
    expect(rows.slice(2, 6).map(([name]) => name)).toEqual(["flowturbo, int8", "fast", "passed", "slow"]);
    expect(rows[5]).toEqual(["slow", "1.30 (1.20–1.40)", "1.30 (1.20–1.40)", "1.50 (1.40–1.60)"]);
    expect(rows).toContainEqual(["skipping", "0.60 (0.50–0.70)", "0.60 (0.50–0.70)", ""]);
    expect(rows.at(-2)).toEqual(["flowturbo, Euler", "1; 0.20", "1; 0.20"]);
    expect(figures({ peers })).toMatch(/A: small, side by side, torch: it is not there\.[\s\S]*torch 2\.9; commit abc/);
  });

  it("begin with who is ahead of ours, by name and ratio", () => {
    const text = figures({ peers });
    const lines = ahead(peers.machines);
    expect(text.indexOf(lines[0]!)).toBeLessThan(text.indexOf("|"));
    // One for small on each machine; nobody is ahead of wide.
    expect(lines).toHaveLength(2);
    expect(lines[0]).toBe(
      "- small on A, relative to ours in float32. A step: fast 0.30 (0.20–0.40); ours with int8 weights 0.40 (0.30–0.50). " +
        "A picture with fewer evaluations: skipping 0.60 (0.50–0.70); ours (flowturbo, H1P7R2) 0.30 (0.20–0.40).",
    );
    expect(ahead([machine("A", [wide])])).toEqual([]);
    expect(ahead([machine("A", [{ ...wide, contenders: [row("late", 1.1, 0.9)] }])])).toEqual([
      "- wide, relative to ours in float32. A picture: late 0.90 (0.80–1.00).",
    ]);
    // Behind our int8 in steps, ahead of it in pictures.
    const close = [...small.contenders.slice(0, 1), row("close", 0.5, 0.4, { precision: "int8" })];
    expect(ahead([machine("A", [{ ...wide, contenders: close }])])).toEqual([
      expect.stringMatching(/float32\. A picture: close 0\.40 .*; ours with int8 weights 0\.50/),
    ]);
    // From process start, too, a peer in int8 is measured by ours in int8.
    const started = (name: string, ratio: number) => ({ ...small.start[0]!, name, ratio: at(ratio) });
    const ofStart = (theirs: number) =>
      ahead([machine("A", [{ ...small, start: [started("flowturbo, int8", 0.5), started("fast", theirs)] }])])[0];
    expect(ofStart(0.6)).not.toMatch("From process start");
    expect(ofStart(0.4)).toMatch(/From process start: fast 0\.40 .*; ours with int8 weights 0\.50/);
    expect(page([machine("A", [wide])], undefined)).toMatch(/## Where ours is behind\n\nNowhere here/);
  });

  it("keep other machines, subjects and contenders when some are measured again", () => {
    const fast = { ...row("fast", 0.7, 0.8), commit: "def" };
    const slow = { name: "slow", what: "side by side", reason: "it failed" };
    const again = { ...small, contenders: [fast], start: [], missing: [slow] };
    const { machines } = merged(peers, machine("A", [again]));
    expect(machines.map(({ environment }) => environment.cpu)).toEqual(["A", "B"]);
    const [now, rest] = machines[0]!.subjects as [SubjectResult, SubjectResult];
    expect([now.name, rest.name]).toEqual(["small", "wide"]);
    expect(now.contenders.map(({ name, commit }) => `${name} ${commit}`)).toEqual([
      ...["fast def", "flowturbo, int8 abc", "flowturbo, H1P7R2 abc", "passed abc", "slow abc", "skipping abc"],
    ]);
    expect(now.contenders[0]!.stepRatio.median).toBe(0.7);
    expect(now.start).toEqual(small.start);
    // What failed today is said beside what was measured before; what was tried and is there now is missing no more.
    expect(now.missing).toEqual([slow, ...small.missing]);
    const torch = { ...row("torch", 2, 2), commit: "def" };
    expect(merged(peers, machine("A", [{ ...again, contenders: [torch] }])).machines[0]!.subjects[0]!.missing).toEqual([
      slow,
    ]);
    expect(page(machines, undefined)).toContain("5 rounds; commits def, abc.");
    // Other numbers of steps are another measurement.
    const { machines: anew } = merged(peers, machine("A", [{ ...again, steps: 4 }]));
    expect(anew[0]!.subjects[0]!.contenders).toEqual([fast]);
    expect(merged(peers, machine("C", [small])).machines).toHaveLength(3);
    // Processors of several generations have one name.
    const other = { ...machine("A", [again]), instructions: ["avx512f", "amx_int8"] };
    const three = merged(peers, other).machines;
    expect(three.map((each) => processorName(each))).toEqual(["A", "B", "A with AMX"]);
    expect(figures({ peers: { machines: three } })).toContain("small, 28 steps (A with AMX)");
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
