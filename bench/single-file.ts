/**
 * Opening a checkpoint in one file: resident memory once it is loaded on the CPU (this process and the one that runs graphs), the time that
 * takes, and the time until a tensor that is wrong is refused, also as processor time, since others may use the machine. The file has the shapes of SD3.5-medium with both CLIP encoders and the VAE
 * in bfloat16; its data are a hole, since opening reads none of them. Bars: 0.3 GB, 1 s.
 *
 *   npx tsx bench/single-file.ts
 */

import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import path from "node:path";
import { gigabytes } from "../lib/common/memory.js";
import { checkpointShapes, type Shapes, sd35Medium, writeSparse } from "./single-file-checkpoint.js";
import { machineLine, measureProcess, report, root, spread, table } from "./support.js";

const rounds = 5;
const bar = { residentBytes: 0.3e9, refusalMilliseconds: 1000 };

mkdirSync(path.join(root, "bench/.work"), { recursive: true });
const folder = mkdtempSync(path.join(root, "bench/.work/single-file-"));
const cache = path.join(folder, "cache");
/** Loads a file in a process of its own; what it prints is how long that took, and the error. */
const load = async (file: string) => {
  const script = `
    const { FlowTurbo } = await import(${JSON.stringify(path.join(root, "dist/index.js"))});
    const start = performance.now();
    const used = process.cpuUsage();
    let message = null;
    try {
      const model = await FlowTurbo.load(${JSON.stringify(file)}, { runtime: "onnxruntime", measureCosts: false, cache: ${JSON.stringify(cache)} });
      setTimeout(() => model.dispose(), 500);
    } catch (error) { message = error.message; }
    const { user, system } = process.cpuUsage(used);
    console.log(JSON.stringify({ milliseconds: performance.now() - start, processor: (user + system) / 1000, message }));`;
  const { stdout, peak } = await measureProcess(process.execPath, ["--input-type=module", "-e", script]);
  type Printed = { milliseconds: number; processor: number; message: string | null };
  return { ...(JSON.parse(stdout) as Printed), peak };
};

try {
  const shapes = checkpointShapes(sd35Medium);
  const whole = path.join(folder, "sd3.5_medium_incl_clips.safetensors");
  const fileBytes = await writeSparse(whole, shapes);
  const loads = [];
  for (let round = 0; round < rounds; round++) loads.push(await load(whole));
  const failed = loads.find(({ message }) => message !== null);
  if (failed) throw new Error(`The file could not be loaded: ${failed.message}`);

  const last = "model.diffusion_model.joint_blocks.23.x_block.mlp.fc2.weight";
  const without = (name: string) => Object.fromEntries(Object.entries(shapes).filter(([each]) => each !== name));
  const [rows, columns] = shapes[last]! as [number, number];
  const wrong: Record<string, [Shapes, Record<string, string>?]> = {
    missing: [without(last)],
    "wrong shape": [{ ...shapes, [last]: [columns, rows] }],
    "wrong dtype": [shapes, { [last]: "I16" }],
  };
  const refusals: Record<string, { milliseconds: number; processor: number; message: string }> = {};
  for (const [name, [changed, dtypes]] of Object.entries(wrong)) {
    const file = path.join(folder, `${name.replace(" ", "-")}.safetensors`);
    await writeSparse(file, changed, dtypes);
    const { milliseconds, processor, message } = await load(file);
    if (message === null || !message.includes("joint_blocks.23.x_block.mlp.fc2.weight"))
      throw new Error(`A file with a tensor that is ${name} was not refused for it: ${message}`);
    refusals[name] = { milliseconds, processor, message: message.replaceAll(folder, "") };
  }

  const residentBytes = spread(loads.map(({ peak }) => peak));
  const milliseconds = spread(loads.map((each) => each.milliseconds));
  const processor = spread(loads.map((each) => each.processor));
  const page = [
    "# A checkpoint in one file",
    "",
    `Loading a file of ${gigabytes(fileBytes)} GB (SD3.5-medium's shapes, both CLIP encoders, VAE, bfloat16) on the CPU; the largest resident size of both processes together, ` +
      `medians of ${rounds}. Bars: ${gigabytes(bar.residentBytes)} GB, and ${bar.refusalMilliseconds} ms until a wrong tensor in the last block is refused. \`npm run bench:single-file\`.`,
    "",
    table([
      ["", "resident, GB", "ms", "processor, ms"],
      ["load", gigabytes(residentBytes.median), milliseconds.median.toFixed(0), processor.median.toFixed(0)],
      ...Object.entries(refusals).map(([name, each]) => [
        ...[`${name}: refused`, ""],
        ...[each.milliseconds.toFixed(0), each.processor.toFixed(0)],
      ]),
    ]),
    "",
    machineLine(),
  ];
  await report("single-file", { fileBytes, bar, residentBytes, milliseconds, processor, refusals }, page.join("\n"));
} finally {
  rmSync(folder, { recursive: true, force: true });
}
