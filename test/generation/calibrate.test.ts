// Calibration from end to end, on the embedded model at its smallest size.
import { execFile } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { type CalibrateOptions, embeddedModel, FlowTurbo, type GenerateOptions, OptionError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint, readSafetensorsHeader, readTensor, writeSafetensors } from "../../lib/checkpoint/index.js";
import type { FloatTensor } from "../../lib/common/tensor.js";
import { settleRequest } from "../../lib/generation/request.js";
import { PromptEncoder } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { root } from "../support/fixtures.js";

const size = { width: 16, height: 16 };
const asked = { sizes: [size], guidanceScales: [2, 4], steps: [3, 2], pictures: 2, seed: 3, intervals: false };

describe("calibrate", () => {
  let folder: string;
  let copy: string;
  let cache: string;
  beforeAll(() => {
    folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-calibrate-"));
    [copy, cache] = [path.join(folder, "model"), path.join(folder, "cache")];
    cpSync(embeddedModel, copy, { recursive: true });
    rmSync(path.join(copy, "schedules.json"), { force: true });
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  const load = (from = copy) => FlowTurbo.load(from, { cache, measureCosts: false });
  const file = () => path.join(copy, "schedules.json");

  it("finds schedules that are nearer to many steps, keeps each, and goes on after a stop", {
    timeout: 120_000,
  }, async () => {
    await using model = await load();
    const controller = new AbortController();
    const stopped = model.calibrate({
      ...{ ...asked, signal: controller.signal },
      onProgress: ({ phase, done }) => phase === "fitting" && done >= 2 && controller.abort(new Error("enough")),
    });
    await expect(stopped).rejects.toThrow("enough");
    const kept = JSON.parse(readFileSync(file(), "utf8"));
    expect(kept.calibrated).toHaveLength(1);
    expect(readdirSync(path.join(cache, "calibration"))).toHaveLength(1);

    const progress: string[] = [];
    const { schedules, file: written } = await model.calibrate({
      ...asked,
      onProgress: ({ phase, guidanceScale, done, total }) =>
        progress.push(`${phase} ${guidanceScale} ${Math.floor(done)}/${total}`),
    });
    expect(written).toBe(file());
    // The reference at the scale where it was stopped is there already.
    expect(progress.some((text) => text.startsWith("reference 4"))).toBe(false);
    expect(progress.at(-1)).toBe("fitting 2 6/6");
    expect(schedules.map(({ guidanceScale, weights, rows }) => [guidanceScale, weights.length, rows])).toEqual([
      [4, 2, 4],
      [4, 3, 6],
      [2, 2, 4],
      [2, 3, 6],
    ]);
    expect(schedules[0]).toEqual(kept.calibrated[0]);
    for (const { sigmas, weights, psnr, guided } of schedules) {
      expect([sigmas.length, sigmas[0], sigmas.at(-1)]).toEqual([weights.length + 1, 1, 0]);
      expect(Math.min(psnr.fitted, psnr.held)).toBeGreaterThan(5);
      expect(guided.every(Boolean)).toBe(true);
    }
    const gains = schedules.map(({ psnr }) => psnr.held - psnr.uncalibrated);
    expect(gains.reduce((a, b) => a + b)).toBeGreaterThan(0);
    // All that was asked for is there: nothing is fitted, and the file stays as it is.
    const before = statSync(file()).mtimeMs;
    expect((await model.calibrate(asked)).schedules).toEqual(schedules);
    expect(statSync(file()).mtimeMs).toBe(before);
  });

  it("draws with them, by number of steps, quality and time limit, and says so", async () => {
    const { calibrated } = JSON.parse(readFileSync(file(), "utf8")) as {
      calibrated: {
        guidanceScale: number;
        weights: number[][];
        sigmas: number[];
        psnr: { held: number; uncalibrated: number };
      }[];
    };
    // Whatever came out here is to be used.
    writeFileSync(
      file(),
      JSON.stringify({
        ...JSON.parse(readFileSync(file(), "utf8")),
        calibrated: calibrated.map(({ psnr, ...rest }) => rest),
      }),
    );
    const own = calibrated.find(({ guidanceScale, weights }) => guidanceScale === 2 && weights.length === 3)!;
    await using model = await load();
    const request = { prompt: "a red circle", seed: 1, ...size, guidanceScale: 2 };
    const { images, blocks, sigmas, evaluations } = await model.generate({ ...request, steps: 3 });
    expect([blocks, sigmas, evaluations]).toEqual(["E1A2", own.sigmas, { predictor: 3, refiner: 0, rows: 6 }]);
    expect(images[0]!.parameters).toMatchObject({ steps: 3, grid: "calibrated", sampler: "flowturbo" });
    // A grid that is named, another size, or another number of steps is not calibrated.
    for (const other of [{ steps: 3, grid: "eased" as const }, { steps: 3, width: 64, height: 64 }, { steps: 4 }])
      expect((await model.generate({ ...request, ...other })).blocks).toMatch(/^U/);
    const between = await model.generate({ ...request, steps: 3, guidanceScale: 3 });
    const [two, four] = [2, 4].map(
      (scale) => calibrated.find((each) => each.guidanceScale === scale && each.weights.length === 3)!,
    );
    for (const [i, sigma] of between.sigmas.entries())
      expect(sigma).toBeCloseTo((two!.sigmas[i]! + four!.sigmas[i]!) / 2, 6);
    // The usual schedules, with what was calibrated among them: from 28 steps down to 1.
    const accepted: string[] = [];
    for (const deadlineMs of [60_000, 0.001])
      await model
        .generate({ ...request, deadlineMs, onAccept: ({ blocks }) => void accepted.push(blocks) })
        .catch((error) => accepted.push(error.blocks));
    expect(accepted).toEqual(["U28", "U1"]);
  });

  it("finds schedules that leave out guidance, and what is drawn is what was measured", {
    timeout: 120_000,
  }, async () => {
    const own = path.join(folder, "intervals");
    cpSync(copy, own, { recursive: true });
    rmSync(path.join(own, "schedules.json"), { force: true });
    const prompts = ["a red circle", "a blue square", "a green triangle above a red square"];
    const request = { ...size, guidanceScale: 4 };
    await using finder = await load(own);
    const { schedules } = await finder.calibrate({
      ...{ sizes: [size], guidanceScales: [4], steps: [2, 3], pictures: 2, seed: 3, prompts },
    });
    const rows = schedules.map(({ guided }) => guided.map((each) => (each ? 2 : 1)).join(""));
    // All guided, and one step less at one of the ends, for each number of steps.
    expect(rows.slice(0, 2)).toEqual(["22", expect.stringMatching(/^(12|21)$/)]);
    expect(rows.filter((each) => each.length === 3).slice(0, 2)).toEqual(["222", expect.stringMatching(/^(122|221)$/)]);
    for (const each of schedules) {
      expect(each.rows).toBe(each.guided.reduce((sum, guided) => sum + (guided ? 2 : 1), 0));
      for (const [step, factor] of (each.scales ?? []).entries()) if (!each.guided[step]) expect(factor).toBe(1);
    }
    expect(schedules.some(({ scales }) => scales)).toBe(true);

    // The pictures that were not looked at: the product's own references and pictures have the PSNR that was written.
    const file = path.join(own, "schedules.json");
    const json = JSON.parse(readFileSync(file, "utf8"));
    for (const entry of json.calibrated) entry.psnr.uncalibrated = 0;
    writeFileSync(file, JSON.stringify(json));
    await using model = await load(own);
    const picture = { ...request, prompt: prompts[2]!, include: ["pixels" as const] };
    // Two are fitted to and one decides before them.
    const seeds = [6, 7];
    const drawnAs = (options: Partial<GenerateOptions>) =>
      Promise.all(seeds.map((seed) => model.generate({ ...picture, ...options, seed })));
    const references = (await drawnAs({ blocks: "H50" })).map(({ pixels }) => pixels!.data);
    const decibels = (results: Awaited<ReturnType<typeof drawnAs>>) =>
      results.reduce((sum, { pixels }, index) => {
        const reference = references[index]!;
        const square = pixels!.data.reduce((all, value, i) => all + (value - reference[i]!) ** 2, 0);
        return sum - (10 * Math.log10(square / reference.length / 4)) / seeds.length;
      }, 0);
    const drawn: string[] = [];
    for (const { guided, psnr } of schedules) {
      const guidanceScale = guided.map((each) => (each ? 4 : 1));
      const results = await drawnAs({ steps: guided.length, guidanceScale, metadata: "parameters" });
      const [result] = results as [(typeof results)[number]];
      expect(result.images[0]!.parameters!.grid).toBe("calibrated");
      expect(decibels(results)).toBeCloseTo(psnr.held, 2);
      // The usual schedule with the same steps guided.
      const steps = guided.length;
      const interval = {
        guidanceStart: (guided.indexOf(true) + 0.1) / steps,
        guidanceStop: Math.min(1, (guided.lastIndexOf(true) + 1.1) / steps),
      };
      expect(decibels(await drawnAs({ ...interval, steps, grid: "eased" }))).toBeCloseTo(psnr.uncalibrated, 2);
      drawn.push(`${result.blocks} ${result.evaluations.rows}`);
    }
    expect(drawn[1]).toBe("E1A1 3");
    // The interval in other words.
    const [, { guided: two }] = schedules as [unknown, { guided: boolean[] }];
    const interval = two[0] ? { guidanceStop: 0.5 } : { guidanceStart: 0.5 };
    const asInterval = await model.generate({ ...picture, seed: 5, steps: 2, guidanceScale: 4, ...interval });
    const asList = await model.generate({
      ...picture,
      seed: 5,
      steps: 2,
      guidanceScale: two.map((each) => (each ? 4 : 1)),
    });
    expect(asInterval.pixels!.data).toEqual(asList.pixels!.data);
  });

  it("chooses for a time limit from what leaves out guidance, where that is nearer", async () => {
    const entry = (guided: boolean[], held: number) => ({
      ...{ ...size, guidanceScale: 4, guided, psnr: { held, uncalibrated: 1 } },
      sigmas: [...guided.map((_, i) => 1 - i / guided.length), 0],
      weights: guided.map(() => [-1 / guided.length, 0, 0] as const),
      scales: guided.map((each, i) => (each ? 1 + i / 8 : 1)),
    });
    const calibrated = [
      ...[entry([true, true], 20), entry([true, true, true], 25)],
      // Without guidance, for requests without it.
      ...[{ ...entry([false, false, false], 35), guidanceScale: 1 }],
      // Nearer than two guided steps; and no nearer than what costs less.
      ...[entry([true, true, false], 23), entry([false, true, true, false], 22)],
    ];
    const checkpoint = await openCheckpoint(embeddedModel);
    const model = {
      ...{ checkpoint, ladder: null, calibrated },
      text: new PromptEncoder(new GraphLibrary(checkpoint)),
      ...{ captured: false, pinBatch: null, allowPaths: false },
    };
    const request = { ...size, prompt: "a red circle", guidanceScale: 4, deadlineMs: 1000 };
    const rowsOf = (options: Partial<GenerateOptions>) =>
      settleRequest({ ...request, ...options }, model).candidates.map(({ stages: [stage] }) => [
        stage!.schedule.evaluations.rows,
        stage!.whole.grid === "calibrated",
      ]);
    const usual = [28, 20, 14, 10, 8, 6, 5].map((steps) => [2 * steps, false]);
    expect(rowsOf({})).toEqual([...usual, [6, true], [5, true], [4, true], [2, false]]);
    // Where the request says which steps are guided, that holds.
    expect(rowsOf({ guidanceStop: 0.99 }).some(([, isCalibrated]) => isCalibrated)).toBe(true);
    expect(rowsOf({ guidanceScale: 1 }).filter(([, isCalibrated]) => isCalibrated)).toEqual([[3, true]]);
    // By what they cost, whatever steps are guided.
    const stops = rowsOf({ guidanceStop: 0.7 }).map(([rows]) => rows as number);
    expect(stops.length).toBeGreaterThan(1);
    expect(stops).toEqual([...stops].sort((a, b) => b - a));
    const [stage] = settleRequest({ ...request }, model).candidates[8]!.stages;
    expect(stage!.schedule.launches.map(({ guidance }) => guidance)).toEqual([4, 4.5, null]);
    // What draws it again.
    const [again] = settleRequest({ ...size, prompt: "x", steps: 3, guidanceScale: [4, 4, 1] }, model).candidates;
    expect(again.stages[0]!.schedule.key).toBe(stage!.schedule.key);
    expect(stage!.whole).toEqual({ blocks: null, steps: 3, grid: "calibrated", guidanceScale: [4, 4, 1] });
  });

  it("is refused by name where nothing was calibrated", async () => {
    await using model = await load();
    for (const options of [
      { steps: 9 },
      { steps: 3, shift: 2 },
      { steps: 3, guidanceScale: 9 },
      { steps: 3, sampler: "euler" as const },
    ])
      await expect(
        model.generate({ prompt: "x", ...size, guidanceScale: 2, grid: "calibrated", ...options }),
      ).rejects.toMatchObject({
        ...{ code: "ERR_FLOWTURBO_OPTION", option: "grid" },
        message: expect.stringMatching(/No schedule of \d steps was calibrated/),
      });
    for (const options of [{ blocks: "E3" }, { ladder: ["E3"], deadlineMs: 1000 }]) {
      const [name] = Object.keys(options);
      const expected = `The option ${name} and grid "calibrated" exclude each other.*Leave out ${name}, or grid`;
      await expect(
        model.generate({ prompt: "x", ...size, guidanceScale: 2, grid: "calibrated", ...options }),
      ).rejects.toMatchObject({
        ...{ code: "ERR_FLOWTURBO_OPTION", option: "grid" },
        message: expect.stringMatching(new RegExp(expected)),
      });
    }
  });

  it("refuses what it cannot do before any work", async () => {
    await using model = await load();
    for (const [options, option] of [
      [{ sizes: [{ width: 17, height: 16 }] }, "sizes"],
      [{ guidanceScales: [0.5] }, "guidanceScales"],
      [{ steps: [1] }, "steps"],
      [{ prompts: ["one"] }, "prompts"],
      [{ pictures: 1 }, "pictures"],
      [{ unknown: 1 }, "unknown"],
    ] as [object, string][]) {
      const error = await model.calibrate(options).catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error.option).toBe(option);
    }
  });

  it("writes over nothing that is another model's, and nowhere that is not allowed, before any work", async () => {
    await using model = await load();
    const foreign = path.join(folder, "foreign.json");
    writeFileSync(foreign, JSON.stringify({ version: 1, model: "other", calibrated: [] }));
    await expect(model.calibrate({ ...asked, file: foreign })).rejects.toMatchObject({
      ...{ code: "ERR_FLOWTURBO_OPTION", option: "file" },
      message: expect.stringMatching(/foreign\.json holds schedules of another model.*another file/),
    });
    await expect(model.calibrate({ ...asked, file: folder })).rejects.toThrow(/it is a folder/);
    for (const text of ["null", '{"calibrated":{}}', '{"calibrated":[{"guidanceScale":2}]}']) {
      writeFileSync(foreign, text);
      await expect(model.calibrate({ ...asked, file: foreign })).rejects.toThrow(
        /foreign\.json is no file of schedules/,
      );
    }
    writeFileSync(foreign, "{");
    await expect(model.calibrate({ ...asked, file: foreign })).rejects.toThrow(/foreign\.json is not JSON/);
    await expect(model.calibrate({ ...asked, file: "/proc/none/schedules.json" })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_OUTPUT",
    });
  });

  it("finds again what was found with other pictures, seeds or prompts than those that are named", async () => {
    await using model = await load();
    const few = {
      sizes: [size],
      guidanceScales: [2],
      steps: [2],
      intervals: false,
      file: path.join(folder, "again.json"),
    };
    const entry = async (options: CalibrateOptions) => (await model.calibrate({ ...few, ...options })).schedules[0]!;
    const first = await entry({ pictures: 2, seed: 3, prompts: ["a red circle", "a blue square"] });
    expect(await entry({ pictures: 2 })).toEqual(first);
    expect(await entry({ prompts: ["a red circle", "a blue square"], pictures: 2, seed: 3 })).toEqual(first);
    const others = await entry({ pictures: 2, seed: 4, prompts: ["a red circle", "a blue square"] });
    expect([others.seed, others.prompts]).toEqual([4, first.prompts]);
    const again = await entry({ pictures: 2, seed: 4, prompts: ["a red circle", "a green square"] });
    expect(again.prompts).not.toBe(first.prompts);
    expect(JSON.parse(readFileSync(few.file, "utf8")).calibrated).toEqual([again]);
  });

  it("knows its model in files of another precision, and no other", async () => {
    const twice = path.join(folder, "twice");
    cpSync(copy, twice, { recursive: true });
    const place = path.join(twice, "transformer/diffusion_pytorch_model");
    const tensors: Record<string, FloatTensor> = {};
    for (const [name, entry] of await readSafetensorsHeader(`${place}.safetensors`))
      tensors[name] = await readTensor(`${place}.safetensors`, entry);
    // Rounded about as much as in bfloat16.
    const rounded = (value: number) => Number(value.toPrecision(3));
    const write = (change: (data: Float32Array) => Float32Array) =>
      writeSafetensors(
        `${place}.coarse.safetensors`,
        Object.fromEntries(Object.entries(tensors).map(([name, each]) => [name, { ...each, data: change(each.data) }])),
      );
    const open = () => FlowTurbo.load(twice, { cache, measureCosts: false, variant: "coarse" });
    await write((data) => data.map(rounded));
    const file = path.join(twice, "schedules.json");
    const before = JSON.parse(readFileSync(file, "utf8"));
    expect(before.samples).toHaveLength(48);
    {
      await using model = await open();
      // What is found with it is added, and the file keeps the name of the model that it was begun with.
      await model.calibrate({ ...{ sizes: [size], guidanceScales: [3], steps: [2], pictures: 2, intervals: false } });
      const after = JSON.parse(readFileSync(file, "utf8"));
      expect([after.model, after.variant, after.samples]).toEqual([before.model, undefined, before.samples]);
      expect(after.calibrated).toHaveLength(before.calibrated.length + 1);
    }
    await write((data) => data.map((value) => 1.05 * value));
    await expect(open()).rejects.toThrow(/calibrated for another model than the one in this folder/);
    // A file that says nothing of the weights cannot be known again.
    await write((data) => data);
    writeFileSync(file, JSON.stringify({ ...before, samples: undefined }));
    await expect(open()).rejects.toThrow(/calibrated for another model/);
  });

  it("that is not whole is refused with what to do", async () => {
    const broken = path.join(folder, "broken");
    cpSync(copy, broken, { recursive: true });
    for (const text of ["{", "[]", '{"version":2,"calibrated":[]}']) {
      writeFileSync(path.join(broken, "schedules.json"), text);
      await expect(load(broken)).rejects.toThrow(
        /schedules\.json.*remove the file: the usual schedules are then taken/,
      );
    }
  });

  it("of another model is refused where it lies, by name", async () => {
    const other = path.join(folder, "other");
    cpSync(copy, other, { recursive: true });
    const weights = path.join(other, "transformer/diffusion_pytorch_model.safetensors");
    const bytes = readFileSync(weights);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(weights, bytes);
    await expect(load(other)).rejects.toThrow(
      /other\/schedules\.json: its schedules were calibrated for another model/,
    );
  });

  it("finds its own schedules in the cache where the model's folder has others", async () => {
    const own = JSON.parse(readFileSync(file(), "utf8"));
    const found = {
      ...own,
      calibrated: [{ ...own.calibrated[0], sigmas: own.calibrated[0].sigmas.map((sigma: number) => sigma ** 1.5) }],
    };
    const place = path.join(cache, "schedules");
    mkdirSync(place, { recursive: true });
    writeFileSync(path.join(place, `${own.model}.json`), JSON.stringify(found));
    await using model = await load();
    const [{ width, height, guidanceScale, weights, sigmas }] = found.calibrated;
    const request = { prompt: "x", width, height, guidanceScale, steps: weights.length };
    expect((await model.generate(request)).sigmas).toEqual(sigmas);
    rmSync(place, { recursive: true });
  });

  it("draws again what a picture's parameters say", async () => {
    await using model = await load();
    for (const options of [
      { steps: 3, guidanceScale: 2 },
      { steps: 3, guidanceScale: 2, grid: "calibrated" },
      { steps: 5, guidanceMode: "cfg_zero" },
      { blocks: "H1P3", guidanceMode: "cfg_zero" },
      { sigmas: [1, 0.8, 0.5], guidanceMode: "cfg_zero" },
      { deadlineMs: 60_000, ladder: ["H1P4"] },
      { steps: 4, guidanceScale: [3, 3, 1, 2] },
      { steps: 4, shift: 2, guidanceStart: 0.25 },
      { steps: 3, sampler: "dpmpp_2m" },
      { steps: 6, grid: "eased", guidanceScale: 5 },
      {
        steps: 6,
        guidanceScale: 4,
        guidanceStop: 0.2,
        guidanceMode: "cfg_zero",
      },
      { steps: 5, guidanceScale: [3, 1, 1, 1, 1], guidanceMode: "cfg_zero" },
      {
        stages: [
          { ...size, blocks: "H1P1" },
          { width: 32, height: 32, blocks: "E1", sigma: 0.5 },
        ],
      },
    ] as Partial<GenerateOptions>[]) {
      const request = { prompt: "a red circle", seed: 4, ...(options.stages ? {} : size) };
      const [first] = (await model.generate({ ...request, ...options, metadata: "parameters" })).images;
      const [second] = (await model.generate(first!.parameters as unknown as GenerateOptions)).images;
      expect(second!.data, JSON.stringify(options)).toEqual(first!.data);
    }
    // An original is not named: it is given again. What its strength leaves out was guided.
    const image = { data: new Uint8Array(3 * 16 * 16).fill(90), width: 16, height: 16, channels: 3 as const };
    const edit = { prompt: "a red circle", seed: 4, ...size, image, strength: 0.5 };
    for (const options of [{ steps: 4, guidanceStop: 0.5 }, { steps: 6 }] as const) {
      const [first] = (await model.generate({ ...edit, ...options, metadata: "parameters" })).images;
      const { inpainted, ...parameters } = first!.parameters;
      const [second] = (await model.generate({ ...(parameters as unknown as GenerateOptions), image })).images;
      expect([inpainted, second!.data]).toEqual([false, first!.data]);
    }
  });

  it("is a command, whose file may lie elsewhere", { timeout: 60_000 }, async () => {
    const out = path.join(folder, "elsewhere/schedules.json");
    const prompts = path.join(folder, "prompts.txt");
    writeFileSync(prompts, "a red circle\n\na blue square\na green triangle\n");
    const run = (...args: string[]) =>
      promisify(execFile)(process.execPath, [
        path.join(root, "bin/flowturbo.js"),
        "calibrate",
        "--model",
        copy,
        "--cache",
        cache,
        ...args,
      ]);
    const args = [
      "--sizes",
      "16x16",
      "--guidance",
      "1",
      "--steps",
      "2",
      "--pictures",
      "2",
      "--prompts",
      prompts,
      "--out",
      out,
    ];
    const { stdout } = await run(...args, "--json");
    const report = JSON.parse(stdout);
    expect([report.file, report.schedules.length, report.schedules[0].rows]).toEqual([out, 1, 2]);
    expect(existsSync(out)).toBe(true);
    expect((await run(...args)).stdout).toMatch(/16x16 +1 +2 +none +2 +[\d.]+ +[\d.]+\n.*elsewhere\/schedules\.json/);
    const failure = await run("--prompts", path.join(folder, "absent.txt")).catch((error) => error);
    expect([failure.code, failure.stderr]).toEqual([2, expect.stringMatching(/absent\.txt cannot be read/)]);
  });
});
