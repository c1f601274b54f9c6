/**
 * What the public checkpoints take: disk, by the shapes of their parts (the sums agree with diffusers' and transformers'
 * models on torch's meta device); memory and time of one guided Euler step on the CPU, from folders of that size with random
 * bfloat16 weights. Files of some 17 GB (medium) and 28 GB (large) are written to bench/.work.
 *
 *   npm run bench:checkpoints                      SD3.5-medium
 *   npm run bench:checkpoints -- --large           SD3.5-large too, without T5
 *   npm run bench:checkpoints -- --sizes           the table of sizes alone, nothing is run
 */

import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { gigabytes } from "../lib/common/memory.js";
import { machineLine, processTree, report, root, table } from "./support.js";
import { type CheckpointName, parametersOf, partsOf, transformers, wholeCheckpoint } from "./whole-checkpoints.js";

const { values: flags } = parseArgs({
  options: { large: { type: "boolean", default: false }, sizes: { type: "boolean", default: false } },
});

/** Bytes of resident memory of a tree of processes: all of it, and what is not backed by a file. */
function resident(pid: number): { all: number; anonymous: number } {
  const sum = { all: 0, anonymous: 0 };
  for (const each of processTree(pid))
    try {
      const status = readFileSync(`/proc/${each}/status`, "utf8");
      const bytes = (key: string) => Number(status.match(new RegExp(`^${key}:\\s+(\\d+)`, "m"))?.[1] ?? 0) * 1024;
      sum.all += bytes("VmRSS");
      sum.anonymous += bytes("RssAnon");
    } catch {
      // It ended meanwhile.
    }
  return sum;
}

interface Run {
  readonly checkpoint: CheckpointName;
  readonly side: number;
  readonly flags: readonly string[];
}

async function measure({ checkpoint, side, flags }: Run) {
  const folder = await wholeCheckpoint(checkpoint);
  const args = [
    "generate",
    "a red circle above a blue square",
    "--model",
    folder,
    "--sampler",
    "euler",
    "--steps",
    "1",
  ];
  const size = ["--width", String(side), "--height", String(side), "--seed", "1", "--weights", "lazy"];
  const out = ["--json", "--out", path.join(folder, "out.png"), "--runtime", "onnxruntime"];
  const child = spawn(process.execPath, [path.join(root, "dist/cli.js"), ...args, ...size, ...out, ...flags], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let stdout = "";
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  const peak = { all: 0, anonymous: 0 };
  const poll = setInterval(() => {
    const { all, anonymous } = resident(child.pid!);
    peak.all = Math.max(peak.all, all);
    peak.anonymous = Math.max(peak.anonymous, anonymous);
  }, 50);
  const code = await new Promise<number | null>((resolve) => child.on("close", resolve));
  clearInterval(poll);
  if (code !== 0) throw new Error(`flowturbo generate ended with code ${code}`);
  const { milliseconds } = JSON.parse(stdout) as {
    milliseconds: { load: number; encode: number; steps: number[]; decode: number };
  };
  return { checkpoint, side, flags, peak, milliseconds };
}

// 1. Sizes.
const gb = (bytes: number) => (bytes / 1e9).toFixed(2);
const sizes = (Object.keys(transformers) as CheckpointName[]).map((name) => {
  const parts = Object.fromEntries(Object.entries(partsOf(name)).map(([part, each]) => [part, parametersOf(each)]));
  return { name, parts };
});
const sizeRows = sizes.map(({ name, parts }) => {
  const bytes = (part: string, each = 2) => parts[part]! * each;
  const small = bytes("text_encoder") + bytes("text_encoder_2") + bytes("vae");
  return [
    name,
    gb(bytes("transformer")),
    gb(small),
    gb(bytes("text_encoder_3")),
    gb(bytes("text_encoder_3", 1)),
    gb(bytes("transformer") + small + bytes("text_encoder_3")),
    gb(bytes("transformer") + small),
  ];
});
const sizePage = table([
  ["GB", "transformer", "both CLIPs and VAE", "T5", "T5 in 8 bits", "all in 16 bits", "without T5"],
  ...sizeRows,
]);

// 2. Memory and time.
const runs: Run[] = flags.sizes
  ? []
  : [
      { checkpoint: "sd3.5-medium", side: 512, flags: ["--no-t5"] },
      { checkpoint: "sd3.5-medium", side: 512, flags: [] },
      { checkpoint: "sd3.5-medium", side: 512, flags: ["--no-keep-text-encoders"] },
      { checkpoint: "sd3.5-medium", side: 512, flags: ["--t5", "int8"] },
      { checkpoint: "sd3.5-medium", side: 1024, flags: ["--no-t5"] },
      ...(flags.large ? [{ checkpoint: "sd3.5-large" as const, side: 512, flags: ["--no-t5"] }] : []),
    ];
const measured: Awaited<ReturnType<typeof measure>>[] = [];
for (const run of runs) {
  const result = await measure(run);
  const { peak, milliseconds } = result;
  console.log(
    `${run.checkpoint} ${run.side} px ${run.flags.join(" ")}: peak ${gigabytes(peak.all)} GB, anonymous ${gigabytes(peak.anonymous)} GB, ${JSON.stringify(milliseconds)}`,
  );
  measured.push(result);
}
const seconds = (ms: number) => (ms / 1000).toFixed(1);
const page = [
  "# What the public checkpoints take",
  "",
  "Disk, by the shapes of the parts, in 16 bits where nothing else is said:",
  "",
  sizePage,
  "",
  "One guided Euler step on the CPU, `weights: lazy`, from folders of these sizes with random weights. Resident memory of all processes together: what is mapped from files can be taken back by the system, what is anonymous cannot.",
  "",
  table([
    [
      "checkpoint",
      "pixels",
      "flags",
      "peak, GB",
      "of it anonymous, GB",
      "load, s",
      "encode, s",
      "a step, s",
      "decode, s",
    ],
    ...measured.map(({ checkpoint, side, flags: given, peak, milliseconds: { load, encode, steps, decode } }) => [
      ...[checkpoint, `${side} × ${side}`, given.join(" ") || "none", gb(peak.all), gb(peak.anonymous)],
      ...[seconds(load), seconds(encode), seconds(steps[0]!), seconds(decode)],
    ]),
  ]),
  "",
  machineLine(),
];
if (flags.sizes) console.log(sizePage);
else await report("checkpoints", { sizes, measured }, page.join("\n"));
