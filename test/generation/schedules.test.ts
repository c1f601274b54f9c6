// schedules.json of a model: what is refused of it, and what the model draws with it.
import { cpSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { CheckpointError, embeddedModel, FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, expect, it } from "vitest";

let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-ladder-"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

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
    "a schedule that rests",
    { calibrated: [{ ...fitted, sigmas: [1, 1, 0] }] },
    /calibrated\.0: has sigmas that do not fall/,
  ],
  ["a schedule that begins later", { calibrated: [{ ...fitted, sigmas: [0.9, 0.5, 0] }] }, /do not go from 1 to 0/],
  ["a schedule that does not end", { calibrated: [{ ...fitted, sigmas: [1, 0.5, 0.1] }] }, /do not go from 1 to 0/],
  [
    "weights beyond float32",
    {
      calibrated: [
        {
          ...fitted,
          weights: [
            [1e300, 0, 0],
            [1, 0, 0],
          ],
        },
      ],
    },
    /weights\.0\.0: Too big/,
  ],
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

it("is what `quality` chooses from: its first, its middle and its last schedule", async () => {
  const copy = path.join(folder, "qualities");
  cpSync(embeddedModel, copy, { recursive: true });
  const drawn = async (ladder: string[], options: object) => {
    writeFileSync(path.join(copy, "schedules.json"), JSON.stringify({ ladder }));
    await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
    const request = { prompt: "a red circle", width: 16, height: 16, seed: 1, ...options };
    const results = [];
    for (const quality of ["best", "balanced", "fast"] as const)
      results.push(await model.generate({ ...request, quality }));
    return { blocks: results.map(({ blocks }) => blocks), results };
  };
  expect((await drawn(["H1P3", "H1P2", "H1P1", "H1"], {})).blocks).toEqual(["H1P3", "H1P2", "H1"]);
  expect((await drawn(["E5", "E3", "E2"], {})).blocks).toEqual(["E5", "E3", "E2"]);
  expect((await drawn(["E5", "E3"], {})).blocks).toEqual(["E5", "E5", "E3"]);
  expect((await drawn(["E4"], {})).blocks).toEqual(["E4", "E4", "E4"]);
  // As the blocks themselves, which the picture's parameters name.
  const { results } = await drawn(["E5", "E3", "E2"], {});
  expect(results[2]!.images[0]!.parameters).toMatchObject({ blocks: "E2" });
  writeFileSync(path.join(copy, "schedules.json"), JSON.stringify({ ladder: ["E5", "E3", "E2"] }));
  await using model = await FlowTurbo.load(copy, { cache: folder, measureCosts: false });
  const request = { prompt: "a red circle", width: 16, height: 16, seed: 1 };
  const same = await model.generate({ ...request, blocks: "E2" });
  expect(results[2]!.images[0]!.data).toEqual(same.images[0]!.data);
  // Without the option the ladder says nothing, and beside other words for the schedule it is refused.
  expect((await model.generate(request)).stages[0]!.sigmas).toHaveLength(11);
  await expect(model.generate({ ...request, quality: "fast", steps: 4 })).rejects.toMatchObject({ option: "quality" });
  await expect(model.generate({ ...request, quality: "fast", grid: "calibrated" })).rejects.toThrow(
    /No schedule of 6 steps/,
  );
});
