/**
 * Against what a user would pick instead, on the CPU: the same checkpoint exported by torch.onnx and driven by plain
 * onnxruntime-node (bench/peers/onnxruntime.mjs), and diffusers (bench/peers/pipeline.py), with and without
 * torch.compile. Every contender in turn, round by round: first equal work (the same Euler steps), then the product's
 * FlowTurbo schedules; then from process start to PNG. All contenders get prompts that they have not seen, and as many
 * threads as this machine has cores. The baseline's picture is compared with ours from the same noise.
 *
 *   npm run bench:peers -- [--rounds 5] [--steps 28] [--only shapes|medium] [--no-diffusers] [--compile]
 */

import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs, promisify } from "node:util";
import { embeddedModel, FlowTurbo, type GenerateOptions } from "flowturbo";
import { open } from "./peers/onnxruntime.mjs";
import { Pipeline, peerPython, reason } from "./peers/python.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import {
  format,
  machineLine,
  paired,
  ratios,
  report,
  resultsFolder,
  root,
  type Spread,
  spread,
  table,
} from "./support.js";

const { values: flags } = parseArgs({
  options: {
    rounds: { type: "string", default: "5" },
    steps: { type: "string", default: "28" },
    only: { type: "string" },
    "no-diffusers": { type: "boolean", default: false },
    compile: { type: "boolean", default: false },
  },
});
const run = promisify(execFile);
const rounds = Number(flags.rounds);
const threads = os.availableParallelism();
const work = path.join(root, "bench/.work/peers");
mkdirSync(work, { recursive: true });

interface Subject {
  readonly name: string;
  readonly folder: () => Promise<string>;
  readonly size: number;
  readonly steps: number;
  readonly rounds: number;
  readonly tokens: number;
  /** FlowTurbo schedules beside the equal work. */
  readonly schedules: readonly string[];
}

/** Of the quality benchmark where it was run: the FlowTurbo schedule that stands for Euler's quality at this many steps. */
function chosenSchedules(): string[] {
  const file = path.join(resultsFolder, "quality.json");
  if (!existsSync(file)) return ["H1P7R2"];
  const { equalQuality } = JSON.parse(readFileSync(file, "utf8")) as { equalQuality?: { schedule: string }[] };
  return [...new Set(["H1P7R2", ...(equalQuality ?? []).map(({ schedule }) => schedule)])];
}

const steps = Number(flags.steps);
const shapes = async () => embeddedModel;
const subjects: Subject[] = [
  ...[64, 128].map((size) => ({
    ...{ name: `shapes, ${size} px`, folder: shapes, size, steps, rounds, tokens: 16, schedules: chosenSchedules() },
  })),
  {
    name: "SD3.5-medium's width, 4 layers, 256 px",
    folder: async () => (await randomCheckpoint(4, true)).folder,
    ...{ size: 256, steps: Math.min(steps, 4), rounds: Math.min(rounds, 3), tokens: 32, schedules: [] },
  },
].filter(({ name }) => !flags.only || name.toLowerCase().includes(flags.only.toLowerCase()));

const colours = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"];
let asked = 0;
/** A prompt that no contender has encoded yet. */
function freshPrompt(): string {
  const k = asked++;
  const [a, b, ground] = [k % 8, Math.floor(k / 8) % 8, Math.floor(k / 64) % 8].map((i) => colours[i]);
  return `a ${a} circle above a ${b} square on a ${ground} background`;
}

const guidance = 2;
const peer = await peerPython();
const missing: string[] = [];
if ("missing" in peer) missing.push(`Not measured, all peers: ${peer.missing}.`);
const results: Record<string, unknown> = {};
const page: string[] = ["# Against other ways to draw the same picture on a CPU", ""];
let torch = "";

for (const subject of subjects) {
  console.log(`\n${subject.name}: ${subject.steps} Euler steps, ${subject.rounds} rounds`);
  const folder = await subject.folder();
  await using model = await FlowTurbo.load(folder);
  const parts: Record<string, { step: number[]; picture: number[] }> = {};
  const contenders: Record<string, () => Promise<number>> = {};
  const contender = (
    name: string,
    draw: () => Promise<{ denoise: number; milliseconds: number }>,
    evaluations: number,
  ) => {
    parts[name] = { step: [], picture: [] };
    contenders[name] = async () => {
      const { denoise, milliseconds } = await draw();
      parts[name]!.step.push(denoise / evaluations);
      parts[name]!.picture.push(milliseconds);
      return milliseconds;
    };
  };
  const ours = (options: Partial<GenerateOptions>) => async () => {
    const start = performance.now();
    const { timings, images } = await model.generate({
      ...{ prompt: freshPrompt(), width: subject.size, height: subject.size, guidanceScale: guidance, seed: asked },
      maxSequenceLength: subject.tokens,
      ...options,
    });
    await images[0]!.toPNG();
    return { denoise: timings.steps.reduce((a, b) => a + b, 0), milliseconds: performance.now() - start };
  };
  const equal = `flowturbo, ${subject.steps} Euler steps`;
  contender(equal, ours({ sampler: "euler", steps: subject.steps }), subject.steps);
  for (const blocks of subject.schedules) contender(`flowturbo, ${blocks}`, ours({ blocks }), blocks.length);

  let graphs = "";
  let agreement: number | undefined;
  const closing: (() => unknown)[] = [];
  if ("python" in peer) {
    graphs = path.join(work, `graphs-${path.basename(folder)}`);
    try {
      console.log("exporting by torch.onnx");
      rmSync(graphs, { recursive: true, force: true });
      await run(peer.python, [path.join(root, "bench/peers/export.py"), folder, graphs], { maxBuffer: 2 ** 26 });
      const baseline = await open(graphs);
      closing.push(() => baseline.release());
      const request = { steps: subject.steps, guidance, size: subject.size, tokens: subject.tokens };
      const out = path.join(work, "baseline.png");
      contender("ONNX baseline", () => baseline.generate({ ...request, prompt: freshPrompt(), out }), subject.steps);
      agreement = await compare(model, baseline, request);
      console.log(`largest difference of the pictures from the same noise: ${agreement.toExponential(1)}`);
      if (!(agreement < 1e-2)) throw new Error(`the baseline draws another picture: difference ${agreement}`);
    } catch (error) {
      missing.push(`Not measured on ${subject.name}, ONNX baseline: ${reason(error)}.`);
    }
    for (const compiled of flags["no-diffusers"] ? [] : flags.compile ? [false, true] : [false]) {
      const name = compiled ? "diffusers, torch.compile" : "diffusers";
      try {
        const args = ["--threads", String(threads), ...(compiled ? ["--compile"] : [])];
        const pipeline = await Pipeline.start(peer.python, folder, args);
        closing.push(() => pipeline.close());
        const request = { steps: subject.steps, guidance, size: subject.size, tokens: subject.tokens };
        const draw = () =>
          pipeline.ask({ ...request, prompt: freshPrompt(), seed: asked, out: path.join(work, "diffusers.png") });
        torch = (await draw()).torch;
        contender(name, draw, subject.steps);
      } catch (error) {
        missing.push(`Not measured on ${subject.name}, ${name}: ${reason(error)}.`);
      }
    }
  }
  await paired(contenders, subject.rounds, 1);
  for (const close of closing) await close();
  // The first of each was the warm-up.
  const measured = (values: readonly number[]) => values.slice(-subject.rounds);
  const rows = Object.entries(parts).map(([name, { step, picture }]) => ({
    name,
    step: spread(measured(step)),
    picture: spread(measured(picture)),
    stepRatio: ratios(measured(step), measured(parts[equal]!.step)),
    pictureRatio: ratios(measured(picture), measured(parts[equal]!.picture)),
  }));
  for (const row of rows)
    console.log(
      `${row.name}: ${format(row.pictureRatio)} × a picture, ${format(row.stepRatio)} × a step, ${format(row.picture, 0)} ms`,
    );
  results[subject.name] = { steps: subject.steps, rounds: subject.rounds, agreement, contenders: rows };
  const times = (value: Spread) => `${value.median.toFixed(2)} (${value.min.toFixed(2)}–${value.max.toFixed(2)})`;
  page.push(
    `## ${subject.name}`,
    "",
    `${subject.steps} Euler steps with guidance (two rows a step), one picture, median and range of ${subject.rounds} rounds. Ratios are to the first row, round by round: above 1 is slower.`,
    ...(agreement === undefined
      ? []
      : [
          "",
          `The baseline's picture and ours from the same noise differ by ${agreement.toExponential(1)} of the largest value.`,
        ]),
    "",
    table([
      ["contender", "picture, ratio", "step, ratio", "picture, ms", "step, ms"],
      ...rows.map((row) => [
        row.name,
        times(row.pictureRatio),
        times(row.stepRatio),
        row.picture.median.toFixed(0),
        row.step.median.toFixed(1),
      ]),
    ]),
    "",
  );
}

if (!flags.only || flags.only === "shapes") await fromProcessStart();
page.push(...missing.map((line) => `- ${line}`), "", machineLine(torch ? { torch } : {}));
await report("peers", { rounds, threads, guidance, missing, torch, subjects: results }, page.join("\n"));

/** Largest difference of the pictures over the largest value: ours and the baseline's from one noise, Euler. */
async function compare(
  model: FlowTurbo,
  baseline: Awaited<ReturnType<typeof open>>,
  request: { steps: number; guidance: number; size: number; tokens: number },
): Promise<number> {
  const prompt = "a red circle above a blue square";
  const { width, height } = { width: request.size, height: request.size };
  const first = await model.generate({ prompt, width, height, sampler: "euler", steps: 1, seed: 7 });
  const noise = { ...first.latents, data: gaussian(first.latents.data.length) };
  const { pixels } = await model.generate({
    ...{ prompt, width, height, sampler: "euler", steps: request.steps, guidanceScale: request.guidance },
    ...{ noise, maxSequenceLength: request.tokens },
  });
  const { image } = await baseline.generate({ ...request, prompt, noise: noise.data });
  let [difference, largest] = [0, 0];
  for (let i = 0; i < image.length; i++) {
    difference = Math.max(difference, Math.abs(image[i]! - pixels.data[i]!));
    largest = Math.max(largest, Math.abs(image[i]!));
  }
  return difference / largest;
}

function gaussian(count: number): Float32Array {
  const uniform = () => Math.random() || Number.MIN_VALUE;
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()),
  );
}

/** A new process each time: start, load, encode, the same Euler steps, decode, PNG. */
async function fromProcessStart(): Promise<void> {
  console.log("\nfrom process start to PNG, shapes, 64 px");
  const graphs = path.join(work, `graphs-${path.basename(embeddedModel)}`);
  const request = { steps, guidance, size: 64, tokens: 16, seed: 1 };
  const timed = (command: string, args: () => string[]) => async () => {
    const start = performance.now();
    await run(command, args(), { maxBuffer: 2 ** 26 });
    return performance.now() - start;
  };
  const cli = (...more: string[]) => {
    const out = path.join(work, "cli.png");
    return timed(process.execPath, () => [
      ...[path.join(root, "dist/cli.js"), "generate", freshPrompt(), "--guidance", String(guidance), "--seed", "1"],
      ...["--out", out, ...more],
    ]);
  };
  const ours = `flowturbo generate, ${steps} Euler steps`;
  const contenders: Record<string, () => Promise<number>> = {
    [ours]: cli("--sampler", "euler", "--steps", String(steps)),
    "flowturbo generate, default schedule": cli(),
  };
  if ("python" in peer) {
    const script = path.join(root, "bench/peers/onnxruntime.mjs");
    const json = (out: string) => JSON.stringify({ ...request, prompt: freshPrompt(), out: path.join(work, out) });
    contenders["ONNX baseline"] = timed(process.execPath, () => [script, graphs, json("baseline.png")]);
    if (!flags["no-diffusers"]) {
      const pipeline = [path.join(root, "bench/peers/pipeline.py"), embeddedModel, "--threads", String(threads)];
      contenders.diffusers = timed(peer.python, () => [...pipeline, "--once", json("diffusers.png")]);
    }
  }
  const times = await paired(contenders, Math.min(rounds, 5), 1);
  const rows = Object.entries(times).map(([name, values]) => ({
    ...{ name, time: spread(values), ratio: ratios(values, times[ours]!) },
  }));
  for (const { name, time, ratio } of rows) console.log(`${name}: ${format(ratio)} ×, ${format(time, 0)} ms`);
  results["process start to PNG"] = rows;
  page.push(
    "## From process start to PNG (shapes, 64 px)",
    "",
    table([
      ["contender", "ratio", "ms"],
      ...rows.map(({ name, time, ratio }) => [
        name,
        `${ratio.median.toFixed(2)} (${ratio.min.toFixed(2)}–${ratio.max.toFixed(2)})`,
        time.median.toFixed(0),
      ]),
    ]),
    "",
  );
}
