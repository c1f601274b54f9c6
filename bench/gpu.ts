/**
 * On a GPU: a model of SD3.5-medium's shape with random weights, on every runtime of the table that this machine can use,
 * launch by launch and, where the runtime can capture, as one CUDA graph; beside torch, eager and compiled, where python3
 * has it (bench/peers/torch_mmdit.py, which needs nothing else). Each contender is a process of its own with a time limit,
 * so that one that fails or hangs does not end the others, and the page is written after every line that one prints. Ends
 * with 0 if all was measured, 1 if a contender failed, 2 for wrong arguments, 3 where there is no GPU.
 *
 *   npm run bench:gpu -- [--sizes 512,1024] [--steps 28] [--rounds 5] [--limit 600] [--layers 24]
 *   --runtime NAME,NAME    these runtimes of the table instead, whatever they run on
 *   --model FOLDER         a checkpoint in the diffusers layout with a transformer in one file
 *   --no-torch             without torch
 */

import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { FlowTurbo } from "flowturbo";
import { runtimeNames, runtimes } from "../lib/runtimes/index.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import { machineLine, report, root, type Spread, spread, table } from "./support.js";

/** What a process measures. */
interface Task {
  readonly model: string;
  readonly runtime: string;
  readonly capture: boolean;
  readonly side: number;
  readonly steps: number;
  readonly rounds: number;
}

/** One picture. Milliseconds. */
interface Round {
  readonly event: "round";
  readonly steps: readonly number[];
  /** All steps. */
  readonly denoise: number;
  /** From the prompt to the pixels; torch draws none. */
  readonly picture?: number;
  readonly decode?: number;
}

/** A line of a contender. */
type Line =
  | { readonly event: "machine"; readonly gpu?: string; readonly torch?: string }
  | { readonly event: "first"; readonly milliseconds: number }
  | Round;

interface Row {
  readonly contender: string;
  readonly side: number;
  /** From the start of loading to the first picture, with everything that is compiled for it. */
  first: number | null;
  step: Spread | null;
  denoise: Spread | null;
  picture: Spread | null;
  decode: Spread | null;
  /** Why there is no more. */
  error: string | null;
}

interface Contender {
  readonly name: string;
  readonly command: (side: number) => { readonly file: string; readonly args: readonly string[] };
}

const tokens = 77 + 256;
const guidance = 4.5;
/** Lines of a child among whatever else is printed. */
const mark = "bench:gpu ";

if (process.argv[2] === "--measure")
  await measure(JSON.parse(process.argv[3]!) as Task).catch((error: Error) => {
    console.error(`${error.name}: ${error.message.replaceAll("\n", " ")}`);
    process.exitCode = 1;
  });
else process.exitCode = await main();

/** One runtime, in a process of its own: loads, draws, prints. */
async function measure({ model: folder, runtime, capture, side, steps, rounds }: Task): Promise<void> {
  const say = (line: Line) => process.stdout.write(`${mark}${JSON.stringify(line)}\n`);
  const start = performance.now();
  let notCaptured: string | null = null;
  const logger = {
    info: (text: string) => console.error(text),
    warn(text: string) {
      console.error(text);
      if (text.includes("not as one CUDA graph")) notCaptured = text;
    },
  };
  const settings = { capture, batches: [1], measureCosts: false, logger };
  await using model = await FlowTurbo.load(folder, {
    runtime: runtime as ReturnType<typeof runtimeNames>[number],
    ...settings,
  });
  const size = { width: side, height: side };
  const asked = { prompt: "a lighthouse at dusk", ...size, seed: 1, guidanceScale: guidance, maxSequenceLength: 256 };
  const draw = () => model.generate({ ...asked, sampler: "euler", steps });
  await draw();
  say({ event: "first", milliseconds: performance.now() - start });
  await draw();
  for (let round = 0; round < rounds; round++) {
    const { timings } = await draw();
    if (notCaptured !== null) throw new Error(notCaptured);
    const { steps: each, decode, total, encode, queue } = timings;
    say({ event: "round", steps: each, denoise: total - encode - queue - decode, picture: total, decode });
  }
}

async function main(): Promise<number> {
  const flags = parsed();
  if (typeof flags === "string") {
    console.error(flags);
    return 2;
  }
  const { sizes, steps, rounds, layers, limit } = flags;

  // 1. Who takes part.
  const found = await Promise.all(
    Object.values(runtimes).map(async (row) => ({ row, finding: await row.find({ tensorrtFolder: undefined }) })),
  );
  const chosen = found.filter(({ row, finding }) =>
    flags.runtime ? flags.runtime.includes(row.name) : row.name !== "onnxruntime" && finding.available,
  );
  const missing = found
    .filter(({ row, finding }) => !chosen.some((other) => other.row === row) && !finding.available)
    .map(({ row, finding }) => `Not measured, ${row.name}: ${finding.reason} ${finding.remedy}`);
  const torch = flags.torch ? await torchReason() : "it was left out";
  if (torch !== null) missing.push(`Not measured, torch: ${torch}.`);
  if (chosen.length === 0 && torch !== null) {
    console.error(`Nothing was measured: there is no GPU here.\n${missing.join("\n")}`);
    return 3;
  }
  const { folder, name } = flags.model
    ? { folder: path.resolve(flags.model), name: flags.model }
    : await medium(layers);

  const self = [...process.execArgv, fileURLToPath(import.meta.url), "--measure"];
  const contenders: Contender[] = chosen.flatMap(({ row }) =>
    (row.capabilities.capture ? [false, true] : [false]).map((capture) => ({
      name: `flowturbo, ${row.name}${capture ? ", as one CUDA graph" : ""}`,
      command: (side) => {
        const task: Task = { model: folder, runtime: row.name, capture, side, steps, rounds };
        return { file: process.execPath, args: [...self, JSON.stringify(task)] };
      },
    })),
  );
  const factor = vaeFactor(folder);
  if (torch === null)
    for (const compiled of [false, true])
      contenders.push({
        name: `torch, ${compiled ? "compiled" : "eager"}`,
        command: (side) => {
          const numbers = { side: side / factor, steps, rounds, tokens, guidance };
          const script = path.join(root, "bench/peers/torch_mmdit.py");
          const args = Object.entries(numbers).flatMap(([key, value]) => [`--${key}`, String(value)]);
          return { file: "python3", args: [script, folder, ...args, ...(compiled ? ["--compile"] : [])] };
        },
      });

  // 2. One after the other, the smaller size first. The page is whole after each line.
  const rows: Row[] = [];
  const machines = new Set(chosen.flatMap(({ finding }) => finding.hardware?.gpus.map((gpu) => gpu.name) ?? []));
  const versions: Record<string, string> = {};
  const write = (complete: boolean) => {
    const measured = { model: name, steps, rounds, gpus: [...machines], versions, rows, missing };
    return report("gpu", { measured: true, complete, ...measured }, page({ ...measured, complete }));
  };
  for (const side of sizes)
    for (const { name: contender, command } of contenders) {
      const row: Row = {
        contender,
        side,
        first: null,
        step: null,
        denoise: null,
        picture: null,
        decode: null,
        error: null,
      };
      rows.push(row);
      const rounded: Round[] = [];
      row.error = await follow(command(side), limit, async (line) => {
        if (line.event === "machine") {
          if (line.gpu) machines.add(line.gpu);
          if (line.torch) versions.torch = line.torch;
        } else if (line.event === "first") {
          row.first = line.milliseconds;
        } else {
          rounded.push(line);
          const of = (pick: (each: Round) => number | undefined) => {
            const values = rounded.map(pick).filter((value) => value !== undefined);
            return values.length > 0 ? spread(values) : null;
          };
          row.step = spread(rounded.flatMap((each) => each.steps));
          row.denoise = of((each) => each.denoise);
          row.picture = of((each) => each.picture);
          row.decode = of((each) => each.decode);
        }
        await write(false);
      });
      const text =
        row.error ?? `a step ${row.step?.median.toFixed(2)} ms, ${steps} steps ${row.denoise?.median.toFixed(1)} ms`;
      console.log(`${contender}, ${side} px: ${text}`);
    }
  await write(true);
  return rows.every(({ error }) => error === null) ? 0 : 1;
}

function parsed() {
  let values: ReturnType<typeof parse>["values"];
  try {
    ({ values } = parse());
  } catch (error) {
    return (error as Error).message;
  }
  const whole = (name: "steps" | "rounds" | "layers" | "limit") => {
    const value = Number(values[name]);
    return Number.isInteger(value) && value > 0 ? value : null;
  };
  const [steps, rounds, layers, limit] = [whole("steps"), whole("rounds"), whole("layers"), whole("limit")];
  const sizes = values.sizes.split(",").map(Number);
  const runtime = values.runtime?.split(",");
  const unknown = runtime?.find((name) => !(name in runtimes));
  if (unknown !== undefined) return `--runtime names some of ${runtimeNames().join(", ")}, not ${unknown}.`;
  if (steps === null || rounds === null || layers === null || limit === null)
    return "--steps, --rounds, --layers and --limit are whole numbers above 0.";
  if (!sizes.every((size) => Number.isInteger(size) && size >= 64 && size % 16 === 0))
    return `--sizes are multiples of 16 from 64 on, such as 512,1024, not ${values.sizes}.`;
  return { sizes, steps, rounds, layers, limit, runtime, model: values.model, torch: !values["no-torch"] };
}

function parse() {
  return parseArgs({
    options: {
      sizes: { type: "string", default: "512,1024" },
      steps: { type: "string", default: "28" },
      rounds: { type: "string", default: "5" },
      limit: { type: "string", default: "600" },
      layers: { type: "string", default: "24" },
      runtime: { type: "string" },
      model: { type: "string" },
      "no-torch": { type: "boolean", default: false },
    },
  });
}

async function medium(layers: number) {
  const { folder, bytes } = await randomCheckpoint(layers, 13);
  const shape = `the shape of SD3.5-medium's transformer${layers === 24 ? "" : ` with ${layers} of its 24 layers`}`;
  return {
    folder,
    name: `${shape}, ${(bytes / 1e9).toFixed(1)} GB of random bfloat16 weights, tiny text encoders and autoencoder`,
  };
}

/** Pixels of a latent's side. */
function vaeFactor(folder: string): number {
  const config = JSON.parse(readFileSync(path.join(folder, "vae/config.json"), "utf8")) as {
    block_out_channels: unknown[];
  };
  return 2 ** (config.block_out_channels.length - 1);
}

/** Why torch takes no part; null where it does. */
async function torchReason(): Promise<string | null> {
  const script = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'torch finds no CUDA device')";
  return follow({ file: "python3", args: ["-c", script] }, 120, async () => {});
}

/** @returns why it failed, or null */
async function follow(
  { file, args }: { readonly file: string; readonly args: readonly string[] },
  limit: number,
  onLine: (line: Line) => Promise<void>,
): Promise<string | null> {
  const child = spawn(file, args, { stdio: ["ignore", "pipe", "pipe"], timeout: limit * 1000, killSignal: "SIGKILL" });
  let stderr = "";
  child.stderr.on("data", (chunk) => {
    stderr = (stderr + chunk).slice(-4000);
  });
  const ended = new Promise<string | null>((resolve) => {
    child.once("error", (error: NodeJS.ErrnoException) =>
      resolve(error.code === "ENOENT" ? `${file} is not on PATH` : error.message),
    );
    child.once("close", (code, signal) => {
      const last = stderr.trim().split("\n").at(-1) ?? "";
      if (code === 0) resolve(null);
      else
        resolve(signal ? `it took longer than ${limit} s, or was killed (${signal})` : last || `it ended with ${code}`);
    });
  });
  try {
    for await (const text of createInterface({ input: child.stdout })) {
      const line = text.startsWith(mark) ? text.slice(mark.length) : text;
      if (line.startsWith('{"event":')) await onLine(JSON.parse(line) as Line);
    }
    return await ended;
  } finally {
    child.kill("SIGKILL");
  }
}

function page(measured: {
  readonly model: string;
  readonly steps: number;
  readonly rounds: number;
  readonly gpus: readonly string[];
  readonly versions: Record<string, string>;
  readonly rows: readonly Row[];
  readonly missing: readonly string[];
  readonly complete: boolean;
}): string {
  const { model, steps, rounds, gpus, versions, rows, missing, complete } = measured;
  const ms = (value: Spread | null, digits = 1) =>
    value ? `${value.median.toFixed(digits)} (${value.min.toFixed(digits)} to ${value.max.toFixed(digits)})` : "";
  const sizes = [...new Set(rows.map(({ side }) => side))];
  const tables = sizes.flatMap((side) => {
    const own = rows.filter((row) => row.side === side);
    const base = own.find(({ contender }) => contender === "torch, eager")?.step ?? own[0]?.step;
    return [
      `## ${side} × ${side}`,
      "",
      table([
        [
          "contender",
          "step, ratio",
          "step, ms",
          `${steps} steps, ms`,
          "picture, ms",
          "decoding, ms",
          "first picture, s",
        ],
        ...own.map((row) => [
          row.contender,
          row.step && base ? (row.step.median / base.median).toFixed(2) : "",
          ms(row.step, 2),
          ms(row.denoise),
          ms(row.picture),
          ms(row.decode),
          row.first === null ? "" : (row.first / 1000).toFixed(1),
        ]),
      ]),
      "",
    ];
  });
  const failed = rows.filter(({ error }) => error !== null);
  return [
    "# On a GPU",
    "",
    `\`npm run bench:gpu\` on ${gpus.join(", ") || "a device without a name"}: ${model}.${complete ? "" : " **Not finished.**"}`,
    `A step is one evaluation with guidance (two rows, ${tokens} tokens of text), ${steps} Euler steps a picture, ${rounds} pictures after two; medians with the range. Ratios are to torch, eager, where it`,
    "was measured, otherwise to the first row. Times of steps are by CUDA events on TensorRT and in torch, by the clock elsewhere. torch is given the text's embeddings and draws no",
    "pixels: compare its steps. The first picture includes loading, and everything that is compiled or built.",
    "",
    ...tables,
    ...failed.map(({ contender, side, error }) => `- Failed, ${contender}, ${side} px: ${error}`),
    ...missing.map((line) => `- ${line}`),
    "",
    machineLine(versions),
  ].join("\n");
}
