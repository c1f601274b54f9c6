/**
 * Against what a user would pick instead, on the CPU: the same checkpoint exported by torch.onnx and driven by plain
 * onnxruntime-node (bench/peers/onnxruntime.mjs), and diffusers (bench/peers/pipeline.py), with and without
 * torch.compile. Every contender in turn, round by round: first equal work (the same Euler steps), then the product's
 * FlowTurbo schedules; then each in a process of its own, from its start to the PNG, with its peak memory. All get
 * prompts that they have not seen, and as many threads as this machine has cores. The baseline's picture is compared
 * with ours from the same noise. A contender that fails is named in the page with the reason, and the others go on.
 *
 *   npm run bench:peers -- [--rounds 5] [--steps 28] [--wide-steps 4] [--only shapes|width] [--no-diffusers] [--no-compile]
 */

import { execFile } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs, promisify } from "node:util";
import { embeddedModel, FlowTurbo, type GenerateOptions } from "flowturbo";
import { gigabytes } from "../lib/common/memory.js";
import { open } from "./peers/onnxruntime.mjs";
import { Pipeline, peerPython, reason } from "./peers/python.js";
import { bars } from "./plot.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import {
  format,
  machineLine,
  measureProcess,
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
    "wide-steps": { type: "string", default: "4" },
    only: { type: "string" },
    "no-diffusers": { type: "boolean", default: false },
    "no-compile": { type: "boolean", default: false },
  },
});
const run = promisify(execFile);
const rounds = Number(flags.rounds);
const threads = os.availableParallelism();
const guidance = 2;
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
  /** Whether processes are timed from their start, too. */
  readonly start: boolean;
}

/** The default, and what the quality benchmark found to be as good as its reference, where it was run at this size. */
function chosenSchedules(size: number): string[] {
  const file = path.join(resultsFolder, size === 64 ? "quality.json" : `quality-${size}.json`);
  if (!existsSync(file)) return ["H1P7R2"];
  const { equalQuality } = JSON.parse(readFileSync(file, "utf8")) as { equalQuality?: { schedule: string }[] };
  return [...new Set(["H1P7R2", ...(equalQuality ?? []).map(({ schedule }) => schedule)])];
}

const steps = Number(flags.steps);
const wideSteps = Math.min(steps, Number(flags["wide-steps"]));
const shapes = async () => embeddedModel;
const subjects: Subject[] = [
  ...[64, 128].map((size) => ({
    ...{ name: `shapes, ${size} px`, folder: shapes, size, steps, rounds, tokens: 16, start: size === 64 },
    schedules: chosenSchedules(size),
  })),
  {
    name: "SD3.5-medium's width, 4 layers, 256 px",
    folder: async () => (await randomCheckpoint(4, true)).folder,
    ...{ size: 256, steps: wideSteps, rounds: Math.min(rounds, 3), tokens: 32, start: true },
    // It has no refiner. Against fewer Euler steps than users take, fewer blocks would show nothing.
    schedules: wideSteps >= 20 ? ["H1P9"] : [],
  },
].filter(({ name }) => !flags.only || name.toLowerCase().includes(flags.only.toLowerCase()));
if (subjects.length === 0) throw new Error(`Nothing here is called "${flags.only}": try shapes, 64, 128 or width.`);

const colours = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"];
let asked = 0;
/** A prompt that no contender has encoded yet. */
function freshPrompt(): string {
  const k = asked++;
  const [a, b, ground] = [k % 8, Math.floor(k / 8) % 8, Math.floor(k / 64) % 8].map((i) => colours[i]);
  return `a ${a} circle above a ${b} square on a ${ground} background`;
}

const baselineName = "onnxruntime-node, torch.onnx graphs";
const equal = "flowturbo, Euler";
const kinds = flags["no-diffusers"] ? [] : flags["no-compile"] ? [false] : [false, true];
const diffusersName = (compiled: boolean) => `diffusers${compiled ? ", torch.compile" : ""}`;
const graphsOf = (folder: string) => path.join(work, `graphs-${path.basename(folder)}`);

const peer = await peerPython();
const missing: string[] = [];
if ("missing" in peer) missing.push(`Not measured, all peers: ${peer.missing}.`);
if (flags["no-diffusers"]) missing.push("Not measured, diffusers: left out by --no-diffusers.");
else if (flags["no-compile"]) missing.push("Not measured, diffusers with torch.compile: left out by --no-compile.");
let torch = "";

interface Contender {
  readonly name: string;
  readonly step: Spread;
  readonly picture: Spread;
  readonly stepRatio: Spread;
  readonly pictureRatio: Spread;
}
interface Start {
  readonly name: string;
  readonly time: Spread;
  readonly ratio: Spread;
  readonly peak: Spread;
}
interface Result {
  readonly name: string;
  readonly steps: number;
  readonly rounds: number;
  /** Largest difference of the baseline's picture from ours, over the largest value. */
  readonly agreement: number | undefined;
  readonly contenders: readonly Contender[];
  readonly start: readonly Start[];
}

const results: Result[] = [];
for (const subject of subjects) {
  console.log(`\n${subject.name}: ${subject.steps} Euler steps, ${subject.rounds} rounds`);
  const folder = await subject.folder();
  const { agreement, contenders } = await sideBySide(subject, folder);
  const start = subject.start ? await fromProcessStart(subject, folder) : [];
  results.push({ name: subject.name, steps: subject.steps, rounds: subject.rounds, agreement, contenders, start });
}
writeFileSync(path.join(resultsFolder, "peers.svg"), plot());
await report("peers", { rounds, threads, guidance, missing, torch, subjects: results }, page());

/** Every contender loaded once, a picture at a time. */
async function sideBySide(subject: Subject, folder: string) {
  await using model = await FlowTurbo.load(folder, { measureCosts: false });
  const parts: Record<string, { step: number[]; picture: number[] }> = {};
  const contenders: Record<string, () => Promise<number>> = {};
  const contender = (
    name: string,
    draw: () => Promise<{ denoise: number; milliseconds: number; evaluations?: number }>,
  ) => {
    parts[name] = { step: [], picture: [] };
    contenders[name] = async () => {
      const { denoise, milliseconds, evaluations } = await draw();
      parts[name]!.step.push(denoise / (evaluations ?? subject.steps));
      parts[name]!.picture.push(milliseconds);
      return milliseconds;
    };
  };
  const ours = (options: Partial<GenerateOptions>) => async () => {
    const start = performance.now();
    const { timings, images, evaluations } = await model.generate({
      ...{ prompt: freshPrompt(), width: subject.size, height: subject.size, guidanceScale: guidance, seed: asked },
      maxSequenceLength: subject.tokens,
      ...options,
    });
    await images[0]!.toPNG();
    const milliseconds = performance.now() - start;
    const denoise = timings.steps.reduce((a, b) => a + b, 0);
    return { denoise, milliseconds, evaluations: evaluations.predictor };
  };
  contender(equal, ours({ sampler: "euler", steps: subject.steps }));
  for (const blocks of subject.schedules) contender(`flowturbo, ${blocks}`, ours({ blocks }));

  const request = { steps: subject.steps, guidance, size: subject.size, tokens: subject.tokens };
  let agreement: number | undefined;
  const closing: (() => unknown)[] = [];
  if ("python" in peer) {
    try {
      if (!existsSync(path.join(graphsOf(folder), "config.json")) || subject.start) {
        console.log("exporting by torch.onnx");
        rmSync(graphsOf(folder), { recursive: true, force: true });
        const script = path.join(root, "bench/peers/export.py");
        await run(peer.python, [script, folder, graphsOf(folder)], { maxBuffer: 2 ** 26 });
      }
      const baseline = await open(graphsOf(folder));
      closing.push(() => baseline.release());
      agreement = await compare(model, baseline, request);
      console.log(`largest difference of the pictures from the same noise: ${agreement.toExponential(1)}`);
      if (!(agreement < 1e-2)) throw new Error(`the baseline draws another picture: difference ${agreement}`);
      const out = path.join(work, "baseline.png");
      contender(baselineName, () => baseline.generate({ ...request, prompt: freshPrompt(), out }));
    } catch (error) {
      missing.push(`Not measured on ${subject.name}, ${baselineName}: ${reason(error)}.`);
    }
    for (const compiled of kinds)
      try {
        const args = ["--threads", String(threads), ...(compiled ? ["--compile"] : [])];
        const pipeline = await Pipeline.start(peer.python, folder, args);
        closing.push(() => pipeline.close());
        const out = path.join(work, "diffusers.png");
        const draw = () => pipeline.ask({ ...request, prompt: freshPrompt(), seed: asked, out });
        if (compiled) console.log("compiling by torch.compile");
        torch = (await draw()).torch;
        contender(diffusersName(compiled), draw);
      } catch (error) {
        missing.push(`Not measured on ${subject.name}, ${diffusersName(compiled)}: ${reason(error)}.`);
      }
  }
  await paired(contenders, subject.rounds, 1);
  for (const close of closing) await close();
  // The first of each was the warm-up.
  const measured = (values: readonly number[]) => values.slice(-subject.rounds);
  const rows = Object.entries(parts).map(
    ([name, { step, picture }]): Contender => ({
      name,
      step: spread(measured(step)),
      picture: spread(measured(picture)),
      stepRatio: ratios(measured(step), measured(parts[equal]!.step)),
      pictureRatio: ratios(measured(picture), measured(parts[equal]!.picture)),
    }),
  );
  for (const row of rows)
    console.log(
      `${row.name}: ${format(row.pictureRatio)} × a picture, ${format(row.stepRatio)} × an evaluation, ${format(row.picture, 0)} ms`,
    );
  return { agreement, contenders: rows };
}

/** Largest difference of the pictures over the largest value: ours and the baseline's from one noise, Euler. */
async function compare(
  model: FlowTurbo,
  baseline: Awaited<ReturnType<typeof open>>,
  request: { steps: number; guidance: number; size: number; tokens: number },
): Promise<number> {
  const prompt = "a red circle above a blue square";
  const { width, height } = { width: request.size, height: request.size };
  const include = ["latents", "pixels"] as const;
  const first = await model.generate({ prompt, width, height, sampler: "euler", steps: 1, seed: 7, include });
  const noise = { ...first.latents!, data: gaussian(first.latents!.data.length) };
  const { pixels } = await model.generate({
    ...{ prompt, width, height, sampler: "euler", steps: request.steps, guidanceScale: request.guidance },
    ...{ noise, maxSequenceLength: request.tokens, include },
  });
  const { image } = await baseline.generate({ ...request, prompt, noise: noise.data });
  let [difference, largest] = [0, 0];
  for (let i = 0; i < image.length; i++) {
    difference = Math.max(difference, Math.abs(image[i]! - pixels!.data[i]!));
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
async function fromProcessStart(subject: Subject, folder: string): Promise<Start[]> {
  console.log("from process start to PNG");
  const size = String(subject.size);
  const cli = (...more: string[]) => {
    const fixed = ["--model", folder, "--width", size, "--height", size, "--guidance", String(guidance), "--seed", "1"];
    const text = ["--max-sequence-length", String(subject.tokens), "--out", path.join(work, "cli.png")];
    return () => [path.join(root, "dist/cli.js"), "generate", freshPrompt(), ...fixed, ...text, ...more];
  };
  const request = { steps: subject.steps, guidance, size: subject.size, tokens: subject.tokens, seed: 1 };
  const json = (out: string) => JSON.stringify({ ...request, prompt: freshPrompt(), out: path.join(work, out) });
  const candidates: [name: string, command: string, args: () => string[]][] = [
    [equal, process.execPath, cli("--sampler", "euler", "--steps", String(subject.steps))],
    ...subject.schedules.map((blocks): [string, string, () => string[]] => [
      `flowturbo, ${blocks}`,
      process.execPath,
      cli("--blocks", blocks),
    ]),
  ];
  if ("python" in peer) {
    const driver = path.join(root, "bench/peers/onnxruntime.mjs");
    candidates.push([baselineName, process.execPath, () => [driver, graphsOf(folder), json("baseline.png")]]);
    const pipeline = [path.join(root, "bench/peers/pipeline.py"), folder, "--threads", String(threads)];
    for (const compiled of kinds) {
      const args = compiled ? [...pipeline, "--compile"] : pipeline;
      candidates.push([diffusersName(compiled), peer.python, () => [...args, "--once", json("diffusers.png")]]);
    }
  }
  const peaks: Record<string, number[]> = {};
  const contenders: Record<string, () => Promise<number>> = {};
  for (const [name, command, args] of candidates)
    try {
      // The warm-up, which also finds out who cannot run. Those of the rounds fill the list again.
      await measureProcess(command, args());
      contenders[name] = async () => {
        const { milliseconds, peak } = await measureProcess(command, args());
        peaks[name] = [...(peaks[name] ?? []), peak];
        return milliseconds;
      };
    } catch (error) {
      if (name === equal) throw error;
      missing.push(`Not measured from process start on ${subject.name}, ${name}: ${reason(error)}.`);
    }
  const times = await paired(contenders, Math.min(subject.rounds, 3), 0);
  const rows = Object.entries(times).map(([name, values]) => ({
    ...{ name, time: spread(values), ratio: ratios(values, times[equal]!), peak: spread(peaks[name]!) },
  }));
  for (const { name, time, ratio, peak } of rows)
    console.log(`${name}: ${format(ratio)} ×, ${format(time, 0)} ms, ${gigabytes(peak.median)} GB`);
  return rows;
}

function page(): string {
  const times = (value: Spread) => `${value.median.toFixed(2)} (${value.min.toFixed(2)}–${value.max.toFixed(2)})`;
  const lines = [
    "# Against other ways to draw the same picture on a CPU",
    "",
    `\`npm run bench:peers\`. Ratios are to the first row, round by round: above 1 is slower. Median and range; guidance (two rows an evaluation), one picture, ${threads} threads each.`,
    `${baselineName}: one graph a module, the Euler loop in JavaScript (bench/peers). Peak memory is the resident size of all processes of a contender. Processes of torch.compile find what an earlier one compiled in its cache.`,
    "",
  ];
  for (const { name, steps, rounds, agreement, contenders, start } of results) {
    lines.push(`## ${name}`, "", `${steps} Euler steps, ${rounds} rounds.`);
    if (agreement !== undefined)
      lines.push(
        "",
        `The baseline's picture and ours from the same noise differ by ${agreement.toExponential(1)} of the largest value.`,
      );
    lines.push(
      "",
      table([
        ["contender", "picture, ratio", "evaluation, ratio", "picture, ms", "evaluation, ms"],
        ...contenders.map((row) => [
          row.name,
          times(row.pictureRatio),
          times(row.stepRatio),
          row.picture.median.toFixed(0),
          row.step.median.toFixed(1),
        ]),
      ]),
      "",
    );
    if (start.length > 0)
      lines.push(
        "From process start to PNG:",
        "",
        table([
          ["contender", "ratio", "ms", "peak memory, GB"],
          ...start.map(({ name, time, ratio, peak }) => [
            ...[name, times(ratio), time.median.toFixed(0)],
            gigabytes(peak.median),
          ]),
        ]),
        "",
      );
  }
  lines.push(
    ...slower(),
    "![](peers.svg)",
    "",
    ...missing.map((line) => `- ${line}`),
    ...(missing.length > 0 ? [""] : []),
  );
  lines.push(machineLine(torch ? { torch } : {}));
  return lines.join("\n");
}

/** Who is faster than our equal work here, and why. */
function slower(): string[] {
  const lines: string[] = [];
  const faster = ({ median }: Spread) => median < 0.98;
  for (const { name, contenders, start } of results) {
    for (const row of contenders)
      if (!row.name.startsWith("flowturbo") && faster(row.pictureRatio))
        lines.push(
          `- ${name}: ${row.name} takes ${row.pictureRatio.median.toFixed(2)} of our time. ${
            row.name === diffusersName(true)
              ? "Inductor fuses the norms, gates and activations between the matrix products into a few loops, and torch has an attention kernel that never writes the score matrix; ONNX Runtime runs each operator over memory. The larger the share of these operators (bench/results/trials.md has it, by operator), the more that is worth; at real widths the matrix products decide."
              : "Within the spread of this machine, or for a reason that is not known here."
          }`,
        );
    for (const row of start)
      if (!row.name.startsWith("flowturbo") && faster(row.ratio))
        lines.push(
          `- ${name}, from process start: ${row.name} takes ${row.ratio.median.toFixed(2)} of our time. Our command starts a second process, in which ONNX Runtime runs (a crash or a lack of memory there is an error here, and the event loop stays free), and reads three tokenizers, two CLIPs and a T5 from one checkpoint folder; that costs the same once, whatever the model (npm run bench:cold-start has the parts), and a service pays it once.`,
        );
  }
  return lines.length > 0 ? ["## Where ours is slower, and why", "", ...lines, ""] : [];
}

function plot(): string {
  const bar = (name: string, { median, min, max }: Spread) => ({ name, value: median, low: min, high: max });
  return bars({
    title: "Time of a picture, relative to the same Euler steps in flowturbo",
    groups: results.flatMap(({ name, contenders, start }) => [
      { name, bars: contenders.map((row) => bar(row.name, row.pictureRatio)) },
      ...(start.length > 0
        ? [{ name: `${name}, from process start`, bars: start.map((row) => bar(row.name, row.ratio)) }]
        : []),
    ]),
  });
}
