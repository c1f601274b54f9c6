/**
 * Peak memory with 16-bit weights: loads a checkpoint with 1 GB of bfloat16 transformer weights and runs one 256 × 256
 * step, with weights "lazy" and "folded". Resident sizes are summed over all processes (this one, which only holds the
 * library, and the one that runs the graphs) and compared with the transformer's file. Bar for lazy: under 2.2.
 *
 *   npx tsx bench/memory.ts
 */

import { spawn } from "node:child_process";
import path from "node:path";
import { gigabytes } from "../lib/common/memory.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import { machineLine, report, residentBytes, root, table } from "./support.js";

const { folder, bytes } = await randomCheckpoint(6);
console.log(`transformer: ${gigabytes(bytes)} GB of bfloat16`);

const results: Record<string, { peakBytes: number; ratio: number; milliseconds: unknown }> = {};
for (const weights of ["lazy", "folded"]) {
  const args = ["generate", "x", "--model", folder, "--weights", weights, "--sampler", "euler", "--steps", "1"];
  const out = ["--width", "256", "--height", "256", "--seed", "1", "--json", "--out", path.join(folder, "out.png")];
  const child = spawn(process.execPath, [path.join(root, "dist/cli.js"), ...args, ...out], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let stdout = "";
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  let peak = 0;
  const poll = setInterval(() => {
    peak = Math.max(peak, residentBytes(child.pid!));
  }, 10);
  const code = await new Promise<number | null>((resolve) => child.on("close", resolve));
  clearInterval(poll);
  if (code !== 0) throw new Error(`flowturbo generate ended with code ${code}`);
  const ratio = peak / bytes;
  const { milliseconds } = JSON.parse(stdout) as { milliseconds: Record<string, unknown> };
  console.log(`${weights}: peak ${gigabytes(peak)} GB, ${ratio.toFixed(2)} × the file`);
  results[weights] = { peakBytes: peak, ratio, milliseconds };
}
const page = [
  "# Peak memory with 16-bit weights",
  "",
  `One 256 × 256 Euler step of a model with ${gigabytes(bytes)} GB of bfloat16 transformer weights; resident sizes of all processes together. Bar for \`lazy\`: 2.2 × the file. \`npm run bench:memory\`.`,
  "",
  table([
    ["weights", "peak", "× the file"],
    ...Object.entries(results).map(([name, { peakBytes, ratio }]) => [
      name,
      `${gigabytes(peakBytes)} GB`,
      ratio.toFixed(2),
    ]),
  ]),
  "",
  machineLine(),
];
await report("memory", { fileBytes: bytes, bar: { lazy: 2.2 }, weights: results }, page.join("\n"));
