// The ladder that a model gets from the quality benchmark, and what the model does with it.
import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { CheckpointError, embeddedModel, FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, expect, it } from "vitest";
import { ladderOf, scheduleFile } from "../../bench/shapes/ladder.js";
import { root } from "../support/fixtures.js";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-ladder-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

it("holds the schedules that are worth their time, the richest first", () => {
  const row = (name: string, time: number, error: number, family = "FlowTurbo H*P*R*") => ({ name, family, time, psnr: 40 - error }); // biome-ignore format: one line
  const rows = [
    row("H50", 100, 1, "reference"),
    row("E20", 20, 2, "Euler, tuned grid"),
    row("H1P9", 11, 3),
    row("H1P7R2", 10, 2.5),
    row("H1P3R1", 5, 6),
    row("H1P2R2", 5, 7),
    row("H1P1", 3, 6.5),
    row("H1", 2, 20),
    row("H1P3R1 reused", 5, 1, "R that reuses"),
  ];
  expect(ladderOf(rows)).toEqual(["H1P7R2", "H1P3R1", "H1P1", "H1"]);
  expect(() => ladderOf(rows.slice(0, 2))).toThrow(RangeError);
});

/** As bench/quality.ts writes it: its rows say more than a ladder needs, and JSON has no NaN. */
const quality = {
  benchmark: "quality",
  environment: { cpu: "some", cores: 2, node: "20.9.0", flowturbo: "0.1.0", onnxruntime: "1.30.0", commit: "abc1234" },
  ...{ captions: 1000, size: 64, guidance: 2, modelShift: 1, floor: 0.3, findings: [], equalQuality: [] },
  tuned: [[4, 1.25]],
  rows: (
    [
      ["H50", "reference", 100, 1, 2.1],
      ["Euler 28", "Euler, diffusers' grid", 28, 0.28, 2.4],
      ["Euler 10 tuned", "Euler, tuned grid", 10, 0.1, 3],
      ["H5", "Heun", 10, 0.1, 2.6],
      ["DPM++ 8", "DPM-Solver++(2M)", 8, 0.08, 3.1],
      ["H1P13", "FlowTurbo H1P*", 15, 0.15, 2.2],
      ["H1P7", "FlowTurbo H1P*", 9, 0.09, 2.5],
      ["H1P1", "FlowTurbo H1P*", 3, 0.03, 9],
      ["H1P7R2", "FlowTurbo H*P*R*", 9, 0.1, 2.3],
      ["H1P3R1", "FlowTurbo H*P*R*", 5, 0.055, 4],
      ["H1P3R2", "FlowTurbo H*P*R*", 5, 0.06, 4.4],
      ["H1P7R2 reused", "R that reuses", 9, 0.09, 2],
    ] as const
  ).map(([name, family, evaluations, time, frechet]) => ({
    ...{ name, family, evaluations, captions: 1000, ground: 1, colours: 0.97, shapes: 0.9, relation: 0.8 },
    ...{ accuracy: 0.8, accuracyInterval: [0.77, 0.83], frechet, frechetInterval: [frechet - 0.1, frechet + 0.1] },
    ...{ psnr: name === "H50" ? Number.NaN : 40 - frechet, psnrInterval: [30, 40], milliseconds: 100 * time, time },
  })),
};

it("is written from the benchmark's results, read with the model, and chosen from", { timeout: 120_000 }, async () => {
  const copy = path.join(folder, "written");
  cpSync(embeddedModel, copy, { recursive: true });
  const from = path.join(folder, "quality.json");
  const to = path.join(copy, "schedules.json");
  writeFileSync(from, JSON.stringify(quality, null, 2));
  const script = (...args: string[]) =>
    execFileSync("npx", ["tsx", "--tsconfig", "bench/tsconfig.json", "bench/ladder.ts", ...args], {
      ...{ cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] },
    } as const);
  script("--from", from, "--to", to);
  const { ladder, source } = JSON.parse(readFileSync(to, "utf8"));
  expect(ladder).toEqual(["H1P13", "H1P7R2", "H1P7", "H1P3R1", "H1P1"]);
  expect(source).toMatch(/^PSNR against 100 evaluations on 1000 captions, .*quality\.json at abc1234$/);
  const options = { prompt: "a red circle", width: 16, height: 16 };
  await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
  const { deadline } = await model.generate({ ...options, deadlineMs: 120_000 });
  expect(deadline!.blocks).toBe("H1P13");
  expect(deadline!.reason).toContain("the richest of 5 schedules");
  // The least of the ladder is the best that there is.
  await expect(model.generate({ ...options, deadlineMs: 0.001 })).rejects.toMatchObject({ blocks: "H1P1" });

  writeFileSync(from, JSON.stringify({ ...quality, rows: undefined }));
  expect(() => script("--from", from, "--to", to)).toThrow(/is not what the quality benchmark writes/);
  expect(() => scheduleFile(JSON.stringify({ ...quality, rows: [{ ...quality.rows[5], psnr: null }] }), "x")).toThrow(
    /H1P13 has no time or no PSNR/,
  );
});

it("without any is of numbers of steps, the most first", async () => {
  const copy = path.join(folder, "without");
  cpSync(embeddedModel, copy, { recursive: true });
  rmSync(path.join(copy, "schedules.json"), { force: true });
  await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
  const generous = { prompt: "a red circle", width: 16, height: 16, deadlineMs: 120_000 };
  expect((await model.generate(generous)).blocks).toBe("M28");
  await expect(model.generate({ ...generous, deadlineMs: 0.001 })).rejects.toMatchObject({ blocks: "M1" });
});

const fitted = {
  ...{ width: 64, height: 64, guidanceScale: 4.5, guided: [true, true], sigmas: [1, 0.5, 0] },
  weights: [
    [-0.5, 0, 0],
    [-0.6, 0.1, 0],
  ],
};

it.each([
  ["an entry that is no schedule", { ladder: ["H1P3", "H1Q6"] }, /schedules\.json: Expected blocks such as .* "H1Q6"/],
  ["a schedule that starts with a refiner", { ladder: ["R3"] }, /schedules\.json: The blocks "R3" start with R/],
  ["an empty schedule", { ladder: ["H0"] }, /schedules\.json: The blocks "H0" are empty/],
  ["numbers", { ladder: [10, 5] }, /expected "ladder" to be a list of schedules .* but found \[10,5\]/],
  ["an empty ladder", { ladder: [] }, /but found \[\]/],
  ["no ladder", {}, /but found nothing/],
  [
    "another version",
    { version: 2, ladder: ["H1"] },
    /expected version 1 but found 2\. It was written by another version/,
  ],
  [
    "schedules of another model",
    { model: "x", calibrated: [fitted] },
    /calibrated for another model than the one in this folder/,
  ],
  [
    "a schedule without its end",
    { calibrated: [{ ...fitted, sigmas: [1, 0.5] }] },
    /calibrated\.0: needs one more of sigmas/,
  ],
  [
    "a schedule that rises",
    { calibrated: [{ ...fitted, sigmas: [0.5, 0.6, 0] }] },
    /calibrated\.0: has sigmas that do not fall/,
  ],
  ["a schedule that does not end", { calibrated: [{ ...fitted, sigmas: [1, 0.5, 0.1] }] }, /do not end at 0/],
  [
    "weights that are none",
    {
      calibrated: [
        {
          ...fitted,
          weights: [
            [1, 0, 0],
            [1, 0],
          ],
        },
      ],
    },
    /calibrated\.0\.weights\.1/,
  ],
  ["a list", ["H1"], /does not hold a JSON object/],
  ["no JSON", "{", /is not JSON/],
])("with %s is refused, by name of the file", async (name, content, message) => {
  const copy = path.join(folder, name);
  cpSync(embeddedModel, copy, { recursive: true });
  const file = path.join(copy, "schedules.json");
  writeFileSync(file, typeof content === "string" ? content : JSON.stringify(content));
  const error = await FlowTurbo.load(copy, { cache: folder }).catch((reason) => reason);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toMatch(message);
  expect(error.path).toBe(file);
});

it("is read with the model and chosen from, whatever the number of evaluations", async () => {
  const copy = path.join(folder, "model");
  cpSync(embeddedModel, copy, { recursive: true });
  const file = path.join(copy, "schedules.json");
  // In this order, which no count of evaluations gives.
  writeFileSync(file, JSON.stringify({ ladder: ["H1P1", "H1P6R2", "H1"] }));
  const request = { prompt: "a red circle", width: 16, height: 16, deadlineMs: 60_000 };
  {
    await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
    expect((await model.generate(request)).blocks).toBe("H1P1");
  }
  // Without a refiner, what needs one is left out.
  rmSync(path.join(copy, "refiner"), { recursive: true, force: true });
  writeFileSync(file, JSON.stringify({ ladder: ["H1P6R2", "H1P3"] }));
  {
    await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
    expect((await model.generate(request)).blocks).toBe("H1P3");
  }
});
