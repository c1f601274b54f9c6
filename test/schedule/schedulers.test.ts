/**
 * The levels, the timesteps and the steps of random scheduler configs, against diffusers 0.42's own (test/fixtures/generate/schedulers.py):
 * from the JSON of scheduler_config.json to where a toy velocity field ends.
 */
import { mkdir, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { readSchedulerConfig } from "../../lib/checkpoint/configs.js";
import {
  type Block,
  diffusersSigmas,
  planSteps,
  type StepLaunch,
  samplers,
  sigmaSettings,
} from "../../lib/schedule/index.js";

interface Case {
  readonly class: string;
  readonly config: Record<string, unknown>;
  readonly width: number;
  readonly height: number;
  readonly steps: number;
  readonly sigmas: readonly number[];
  readonly timesteps: readonly number[];
  readonly values?: readonly number[];
}

const cases = JSON.parse(
  await readFile(path.join(import.meta.dirname, "../fixtures/schedulers.json"), "utf8"),
) as readonly Case[];
const folder = await mkdtemp(path.join(os.tmpdir(), "schedulers-"));
afterAll(() => rm(folder, { recursive: true }));

/** The sampler that steps as a class does. */
const samplerOf: Record<string, string> = {
  FlowMatchEulerDiscreteScheduler: "euler",
  FlowMatchHeunDiscreteScheduler: "heun",
  UniPCMultistepScheduler: "unipc",
  DPMSolverMultistepScheduler: "dpmpp_2m",
};

async function settingsOf(each: Case, index: number) {
  const scheduler = path.join(folder, String(index), "scheduler");
  await mkdir(scheduler, { recursive: true });
  // The class is that of model_index.json, as in diffusers.
  await writeFile(
    path.join(scheduler, "../model_index.json"),
    JSON.stringify({ scheduler: ["diffusers", each.class] }),
  );
  const file = path.join(scheduler, "scheduler_config.json");
  await writeFile(file, JSON.stringify({ ...each.config, _class_name: "FlowMatchEulerDiscreteScheduler" }));
  const config = await readSchedulerConfig(file);
  expect(config.className).toBe(each.class);
  return config;
}

/** Runs launches over one number, with the velocity field of the fixture. */
function run(launches: readonly StepLaunch[], start: number): number {
  let [x, v, first, second] = [start, 0, 0, 0];
  for (const { sigma, aIn, aOld, aNew, keepsVelocity, combination } of launches) {
    const w = Math.sin(x + aIn * v + 2 * sigma);
    x += aOld * v + aNew * w;
    if (keepsVelocity) v = w;
    if (!combination) continue;
    const sum = ([a, b, c]: readonly [number, number, number]) => a * w + b * first + c * second;
    [x, first, second] = [x + sum(combination.x), sum(combination.first), sum(combination.second)];
  }
  return x;
}

describe("schedulers of diffusers", () => {
  it.each([
    ["FlowMatchEulerDiscreteScheduler", 40, 40],
    ["FlowMatchLCMScheduler", 15, 0],
    ["FlowMatchHeunDiscreteScheduler", 8, 8],
    ["UniPCMultistepScheduler", 66, 51],
    ["DPMSolverMultistepScheduler", 60, 60],
  ])("%s", async (name, count, leastStepped) => {
    const own = [...cases.entries()].filter(([, each]) => each.class === name);
    expect(own).toHaveLength(count);
    expect(own.filter(([, { values }]) => values).length).toBeGreaterThanOrEqual(leastStepped);
    for (const [index, each] of own) {
      const about = JSON.stringify({ ...each, sigmas: 0, timesteps: 0 });
      const config = await settingsOf(each, index);
      const sampler = samplerOf[name] ?? "euler";
      const { blocks, diffusersSigmas: own, wholeTimesteps } = samplers[sampler]!;
      const solver = config.solver?.sampler === sampler ? config.solver : null;
      expect(config.solver?.unsupported ?? [], about).toEqual([]);
      const settings = { ...sigmaSettings(config, (each.width / 16) * (each.height / 16)), solver };
      const sigmas = (own ?? diffusersSigmas)(each.steps, settings);

      // Heun's scheduler says each level twice but the ends.
      const levels = name.includes("Heun") ? sigmas.flatMap((s, i) => (i % each.steps === 0 ? [s] : [s, s])) : sigmas;
      expect(levels.length, about).toBe(each.sigmas.length);
      for (const [i, sigma] of levels.entries()) expect(Math.abs(sigma - each.sigmas[i]!), about).toBeLessThan(1e-6);

      const launches = planSteps(blocks(each.steps, 1, "diffusers") as Block[], sigmas, {
        wholeTimestepsOf: wholeTimesteps ? config.numTrainTimesteps : undefined,
        solver: solver ? { ...solver, skipped: 0, steps: each.steps } : undefined,
      });
      const timesteps = launches.map(({ sigma }) => sigma * config.numTrainTimesteps);
      expect(timesteps.length, about).toBe(each.timesteps.length);
      for (const [i, t] of timesteps.entries()) expect(Math.abs(t - each.timesteps[i]!), about).toBeLessThan(1e-3);
      if (!each.values) continue;
      for (const [i, start] of [0.3, -1.2, 0.7].entries())
        expect(Math.abs(run(launches, start) - each.values[i]!), about).toBeLessThan(5e-6);
    }
  });
});
