// Serving on the embedded model: requests together, deadlines, the queue, costs. What the numbers are depends on the machine; that they
// are consistent with each other does not.
import { execFile } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { type Costs, DeadlineError, FlowTurbo, type GenerateOptions, OptionError, QueueFullError } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { relativeError, root } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

let cache: string;
let model: FlowTurbo;
beforeAll(async () => {
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-serving-"));
  model = await FlowTurbo.load(undefined, { cache, measureCosts: false });
});
afterAll(async () => {
  await model.dispose();
  rmSync(cache, { recursive: true, force: true });
});

const small = { width: 32, height: 32 };
/** Often enough to see a state that lasts for a few launches. */
const polling = { interval: 1, timeout: 50_000 };
const mixed: GenerateOptions[] = [
  { prompt: "a red circle", ...small, blocks: "H1P4R2", seed: 1 },
  { prompt: "a blue square", ...small, blocks: "H1P2", seed: 2, guidanceScale: 8 },
  { prompt: "a green star", ...small, sampler: "euler", steps: 6, seed: 3, count: 2 },
  { prompt: ["a star", "a circle"], ...small, blocks: "H2P1R1", seed: 4, negativePrompt: "red" },
  { prompt: "a triangle", width: 16, height: 48, blocks: "H1P1", seed: 5 },
  { prompt: "a triangle", ...small, blocks: "H1P3", seed: 6, guidanceScale: 1 },
];

describe("requests at the same time", () => {
  it("change nothing beyond rounding, whatever the schedules, sizes and guidance", async () => {
    const alone = [];
    for (const request of mixed) alone.push(await withValues(model, request));
    const before = model.stats();
    const together = await Promise.all(mixed.map((request) => withValues(model, request)));
    for (const [index, result] of together.entries()) {
      expect(relativeError(result.latents, alone[index]!.latents)).toBeLessThan(1e-5);
      expect(relativeError(result.pixels, alone[index]!.pixels)).toBeLessThan(1e-5);
      expect(result.seeds).toEqual(alone[index]!.seeds);
      expect(result.blocks).toBe(alone[index]!.blocks);
    }
    const after = model.stats();
    const launches = after.launches.count - before.launches.count;
    // Launches were shared: there were fewer than rows.
    expect(after.launches.rows - before.launches.rows).toBeGreaterThan(launches);
    expect(after.requests.completed - before.requests.completed).toBe(mixed.length);
  });

  it("change nothing in any bit with pinBatch, in any place of any batch", async () => {
    await using pinned = await FlowTurbo.load(undefined, { cache, pinBatch: 4, measureCosts: false });
    const alone = [];
    for (const request of mixed) alone.push(await withValues(pinned, request));
    for (const order of [mixed, [...mixed].reverse()]) {
      const together = await Promise.all(order.map((request) => withValues(pinned, request)));
      for (const [index, request] of order.entries()) {
        const reference = alone[mixed.indexOf(request)]!;
        expect(together[index]!.latents.data).toEqual(reference.latents.data);
        expect(together[index]!.pixels.data).toEqual(reference.pixels.data);
      }
    }
    const { launches, rowsPerLaunch } = pinned.stats();
    expect(launches.padding).toBeGreaterThan(0);
    expect(Math.max(...Object.keys(rowsPerLaunch).map(Number))).toBeGreaterThan(1);
  });

  it("do not notice that one of them is aborted", async () => {
    const controller = new AbortController();
    const reason = new Error("enough");
    const others = mixed.slice(1, 4);
    const expected = await Promise.all(others.map((request) => withValues(model, request)));
    const aborted = withValues(model, {
      ...mixed[0]!,
      signal: controller.signal,
      onStep: ({ step }) => step === 1 && controller.abort(reason),
    });
    const results = others.map((request) => withValues(model, request));
    await expect(aborted).rejects.toBe(reason);
    for (const [index, result] of (await Promise.all(results)).entries())
      expect(relativeError(result.latents, expected[index]!.latents)).toBeLessThan(1e-5);
    expect(model.stats().requests.aborted).toBeGreaterThan(0);
  });
});

describe("costs", () => {
  it("are measured by profile(), kept in a file, and there again after the next load", async () => {
    // A cache of its own: what other models have observed later is in the stored table, but not in this model's.
    const own = path.join(cache, "profiled");
    await using profiled = await FlowTurbo.load(undefined, { cache: own, measureCosts: false });
    const progress: number[] = [];
    const costs = await profiled.profile({
      sizes: [small],
      batches: [1, 2],
      rounds: 3,
      onProgress: ({ done, total }) => progress.push(done / total),
    });
    expect(progress[0]).toBe(0);
    expect(progress.at(-1)).toBe(1);
    const graphs = new Set(costs.entries.map(({ graph }) => graph));
    for (const graph of [
      "clip_l",
      "clip_g",
      "t5",
      "predict.guidance",
      "refine.guidance",
      "vae_encoder",
      "vae_decoder",
      "host",
    ])
      expect(graphs).toContain(graph);
    const step = (batch: number) =>
      costs.entries.find(
        (entry) => entry.graph === "predict.guidance" && entry.size === "32x32" && entry.batch === batch,
      )!;
    for (const batch of [1, 2]) {
      const { milliseconds, low, high, runs } = step(batch);
      expect(low).toBeLessThanOrEqual(milliseconds);
      expect(high).toBeGreaterThanOrEqual(milliseconds);
      expect(runs).toBeGreaterThanOrEqual(3);
    }
    // Two rows that were measured to take less than one say that one does not take more.
    const least = Math.min(step(1).milliseconds, step(2).milliseconds);
    expect(costs.estimate("predict.guidance", "32x32", 1)).toBeCloseTo(least * costs.drift, 6);
    expect(costs.estimate("predict.guidance", "8x8", 1)).toBeNull();
    const [file] = readdirSync(costs.folder);
    const { entries } = JSON.parse(readFileSync(path.join(costs.folder, file!), "utf8"));
    expect(entries.length).toBeGreaterThanOrEqual(costs.entries.length);
    await using again = await FlowTurbo.load(undefined, { cache: own, measureCosts: false });
    // An entry that was measured twice in one millisecond is stored with a later moment than its own.
    const timeless = ({ entries }: Costs) => entries.map(({ at: _, ...entry }) => entry);
    expect(timeless(again.costs)).toEqual(timeless(costs));
    // Other settings of the runtime are another table.
    await using other = await FlowTurbo.load(undefined, { cache: own, threads: 1, measureCosts: false });
    expect(other.costs.folder).not.toBe(costs.folder);
    expect(other.costs.entries).toEqual([]);
  });

  it("are forgotten by reset(), and by profile() with the option, also on disk", async () => {
    const options = { cache: path.join(cache, "reset"), measureCosts: false };
    await using one = await FlowTurbo.load(undefined, options);
    const stored = async () => {
      await using other = await FlowTurbo.load(undefined, options);
      return new Set(other.costs.entries.filter(({ graph }) => graph === "vae_decoder").map(({ size }) => size));
    };
    const profile = { batches: [1], rounds: 1 };
    await one.profile({ ...profile, sizes: [{ width: 16, height: 16 }] });
    expect(await stored()).toEqual(new Set(["16x16"]));
    await one.profile({ ...profile, sizes: [small], reset: true });
    expect(await stored()).toEqual(new Set(["32x32"]));
    await one.costs.reset();
    expect(one.costs.entries).toEqual([]);
    expect(await stored()).toEqual(new Set());
  });

  it("are measured of the guidance that is named", async () => {
    await using own = await FlowTurbo.load(undefined, { cache: path.join(cache, "modes"), measureCosts: false });
    const options = { sizes: [{ width: 16, height: 16 }], batches: [1], rounds: 1, guidance: "both" } as const;
    const { entries } = await own.profile({ ...options, guidanceMode: "cfg_zero" });
    const steps = new Set(entries.map(({ graph }) => graph).filter((graph) => /^(predict|refine)/.test(graph)));
    expect([...steps].sort()).toEqual([
      ...["predict", "predict.guidance-cfg_zero", "refine", "refine.guidance-cfg_zero"],
    ]);
    // A time limit then needs no measuring.
    const request = { prompt: "a red circle", width: 16, height: 16, guidanceMode: "cfg_zero", seed: 1 } as const;
    expect((await own.generate({ ...request, deadlineMs: 60_000 })).deadline!.predictedMs).toBeGreaterThan(0);
    expect(own.costs.entries.map(({ graph }) => graph)).not.toContain("predict.guidance");
  });

  it("are measured in the background on first use, and kept", async () => {
    const folder = path.join(cache, "fresh");
    const fresh = await FlowTurbo.load(undefined, { cache: folder, maxBatch: 2 });
    expect(fresh.costs.entries).toEqual([]);
    await fresh.generate({ prompt: "a red circle", width: 16, height: 16, blocks: "H1R1", seed: 1 });
    await vi.waitFor(() => expect(readdirSync(fresh.costs.folder)).toHaveLength(1), { timeout: 50_000 });
    const known = fresh.costs.entries.map(({ graph, size, batch }) => `${graph} ${size} ${batch}`);
    for (const entry of [
      "predict.guidance 16x16 1",
      "predict.guidance 16x16 2",
      "refine.guidance 16x16 1",
      "vae_decoder 16x16 2",
    ])
      expect(known).toContain(entry);
    await fresh.dispose();
  });

  it("in the background do not end a script that awaits dispose() meanwhile", async () => {
    // As a script of its own, since a test runner keeps the event loop alive by itself.
    const script = `
      import { existsSync } from "node:fs";
      import { setTimeout } from "node:timers/promises";
      import { FlowTurbo } from "flowturbo";
      const model = await FlowTurbo.load(undefined, { cache: ${JSON.stringify(path.join(cache, "ended"))} });
      await model.generate({ prompt: "a red circle", width: 256, height: 256, blocks: "H1", seed: 1 });
      // The first cost that is known has been measured; the table is stored after the last.
      while (model.costs.entries.length === 0) await setTimeout(10);
      console.log(existsSync(model.costs.folder) ? "measured" : "measuring");
      await model.dispose();
      console.log("disposed");`;
    const { stdout } = await promisify(execFile)(process.execPath, ["--input-type=module", "-e", script], {
      cwd: root,
    });
    expect(stdout).toBe("measuring\ndisposed\n");
  });

  it.each([
    ["a size off the grid", { sizes: [{ width: 30, height: 32 }] }],
    ["no batch", { batches: [] }],
    ["no rounds", { rounds: 0 }],
  ])("are not measured for %s", async (_, options) => {
    await expect(model.profile(options)).rejects.toBeInstanceOf(OptionError);
  });
});

describe("a deadline", () => {
  it("takes the richest schedule that fits and says why, with the predicted and the real time", async () => {
    await model.profile({ sizes: [small], batches: [1], rounds: 5 });
    const prompt = "a red circle";
    const usual = ["H1P21R6", "H1P7R2", "H1P2R1", "H1"];
    const generous = await model.generate({ prompt, ...small, ladder: usual, deadlineMs: 60_000 });
    expect(generous.deadline).toMatchObject({ deadlineMs: 60_000, blocks: generous.blocks });
    expect(generous.blocks).toBe("H1P21R6");
    expect(generous.deadline!.reason).toMatch(
      /^H1P21R6 is predicted to take \d+ ms of 60000 ms, and is the richest of/,
    );
    expect(generous.deadline!.actualMs).toBeCloseTo(generous.timings.total, 6);
    expect(generous.deadline!.predictedMs).toBeGreaterThan(0);
    // For a time limit between the first candidate and the last: the one in between.
    const ladder = ["H1P21R6", "H1P2R1", "H1"];
    const predicted = async (blocks: string) =>
      (await model.generate({ prompt, ...small, deadlineMs: 60_000, blocks })).deadline!.predictedMs;
    const [long, middle] = [await predicted("H1P21R6"), await predicted("H1P2R1")];
    expect(middle).toBeLessThan(long);
    const chosen = await model.generate({ prompt, ...small, ladder, deadlineMs: Math.sqrt(long * middle) * 1.05 });
    expect(chosen.blocks).toBe("H1P2R1");
    expect(chosen.deadline!.reason).toMatch(/H1P21R6 would need \d+ ms/);
    expect((await model.generate({ prompt, ...small, blocks: "H1" })).deadline).toBeNull();
  });

  it("that nothing fits is refused before any work, with the best possible time", async () => {
    const before = model.stats();
    let steps = 0;
    const ladder = ["H1P3R1", "H1"];
    const work = model.generate({ prompt: "a red circle", ...small, ladder, deadlineMs: 1, onStep: () => steps++ });
    const error = await work.then(
      () => null,
      (reason) => reason as DeadlineError,
    );
    expect(error).toBeInstanceOf(DeadlineError);
    expect(error).toMatchObject({
      code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE",
      deadlineMs: 1,
      blocks: "H1",
      retryAfterMs: null,
    });
    expect(error!.bestMs).toBeGreaterThan(1);
    expect(error!.message).toContain(`${error!.bestMs} ms`);
    expect(steps).toBe(0);
    expect(model.stats().launches.count).toBe(before.launches.count);
    expect(model.stats().requests.refused.impossible).toBe(before.requests.refused.impossible + 1);
    // The time that was named is accepted, with some room for what else this machine does.
    const again = await model.generate({ prompt: "a red circle", ...small, ladder, deadlineMs: 1.5 * error!.bestMs });
    expect(again.deadline).not.toBeNull();
  });

  it("is refused for what others do, with a time to come back", async () => {
    const alone = await model.generate({ prompt: "a red circle", ...small, blocks: "H1P2", deadlineMs: 60_000 });
    const deadlineMs = 4 * alone.deadline!.predictedMs;
    const work = Array.from({ length: 30 }, (_, index) =>
      model.generate({ prompt: "a red circle", ...small, blocks: "H1P2", deadlineMs, seed: index }),
    );
    const settled = await Promise.allSettled(work);
    const refused = settled.flatMap((outcome) => (outcome.status === "rejected" ? [outcome.reason as unknown] : []));
    expect(refused.length).toBeGreaterThan(0);
    expect(refused.length).toBeLessThan(30);
    for (const error of refused) {
      expect(error).toBeInstanceOf(DeadlineError);
      const { bestMs, message, retryAfterMs } = error as DeadlineError;
      expect(retryAfterMs).toBeGreaterThan(0);
      // Where this process had to wait for others of the machine, the time may have passed before the choice.
      if (!/\d+ ms went into measuring/.test(message)) expect(bestMs).toBeGreaterThan(deadlineMs);
    }
  });

  it.each([
    ["a ladder without a deadline", { ladder: ["H1"] }],
    ["a ladder and blocks", { ladder: ["H1"], blocks: "H1", deadlineMs: 1000 }],
    ["a ladder of no schedule", { ladder: ["X"], deadlineMs: 1000 }],
    ["no time", { deadlineMs: 0 }],
    ["a priority that is none", { priority: 0.5 }],
  ])("with %s is refused as an option", async (_, options) => {
    await expect(model.generate({ prompt: "x", ...options })).rejects.toBeInstanceOf(OptionError);
  });
});

describe("the queue", () => {
  it("is bounded: more are refused, with a time to come back", async () => {
    await using narrow = await FlowTurbo.load(undefined, { cache, maxBatch: 1, maxQueue: 2, measureCosts: false });
    await narrow.generate({ prompt: "x", ...small, blocks: "H1" });
    // Two at a time may work, two may wait.
    const work = Promise.allSettled(
      Array.from({ length: 6 }, (_, seed) => narrow.generate({ prompt: "x", ...small, blocks: "H1P6", seed })),
    );
    const full = { queue: { waiting: 2, limit: 2 }, running: { requests: 2, pictures: 2 } };
    await vi.waitFor(() => expect(narrow.stats()).toMatchObject(full), polling);
    const settled = await work;
    expect(settled.map(({ status }) => status === "fulfilled")).toEqual([true, true, true, true, false, false]);
    const error = (settled[5] as PromiseRejectedResult).reason as QueueFullError;
    expect(error).toBeInstanceOf(QueueFullError);
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_QUEUE_FULL", waiting: 2 });
    expect(error.retryAfterMs).toBeGreaterThan(0);
    expect(narrow.stats().requests).toMatchObject({ accepted: 5, refused: { queueFull: 2 }, completed: 5 });
    const { queued, total, launches } = narrow.stats().milliseconds;
    expect([queued.count, total.count]).toEqual([5, 5]);
    expect(launches["predict.guidance"]!.count).toBeGreaterThan(5 * 2);
    expect(launches["predict.guidance"]!.counts).toHaveLength(launches["predict.guidance"]!.bounds.length + 1);
  });

  it("that is full refuses an edit before its picture is decoded", async () => {
    await using narrow = await FlowTurbo.load(undefined, { cache, maxBatch: 1, maxQueue: 0, measureCosts: false });
    const first = [0, 1].map((seed) => narrow.generate({ prompt: "x", ...small, blocks: "H1P6", seed }));
    await vi.waitFor(() => expect(narrow.stats().running.requests).toBe(2), polling);
    const edit = { prompt: "x", ...small, blocks: "H1", image: new Uint8Array(8), strength: 1 };
    await expect(narrow.generate(edit)).rejects.toBeInstanceOf(QueueFullError);
    await Promise.all(first);
    // No picture at all.
    await expect(narrow.generate(edit)).rejects.toBeInstanceOf(OptionError);
  });

  it("is left by those that are aborted while they wait", async () => {
    await using narrow = await FlowTurbo.load(undefined, { cache, maxBatch: 1, maxQueue: 8, measureCosts: false });
    const controller = new AbortController();
    const first = [0, 1].map((seed) => narrow.generate({ prompt: "x", ...small, blocks: "H1P4", seed }));
    const waiting = narrow.generate({ prompt: "x", ...small, signal: controller.signal });
    const last = narrow.generate({ prompt: "x", ...small, blocks: "H1", seed: 3 });
    await vi.waitFor(() => expect(narrow.stats().queue.waiting).toBe(2), polling);
    controller.abort(new Error("left"));
    await expect(waiting).rejects.toThrow("left");
    expect((await Promise.all([...first, last])).map(({ images }) => images.length)).toEqual([1, 1, 1]);
    expect(narrow.stats()).toMatchObject({ queue: { waiting: 0 }, running: { requests: 0, pictures: 0 } });
  });
});
