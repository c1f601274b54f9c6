// The ladder that a model gets from the quality benchmark, and what the model does with it.
import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { CheckpointError, embeddedModel, FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, expect, it } from "vitest";
import { ladderOf } from "../../bench/shapes/ladder.js";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-ladder-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

it("holds the schedules that are worth their time, the richest first", () => {
  const row = (name: string, time: number, frechet: number, family = "FlowTurbo H*P*R*") => ({ name, family, time, frechet }); // biome-ignore format: one line
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
  writeFileSync(file, JSON.stringify({ ladder: ["H1Q6"] }));
  await expect(FlowTurbo.load(copy)).rejects.toBeInstanceOf(CheckpointError);
});
