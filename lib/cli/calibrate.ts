/** `flowturbo calibrate`: finds schedules of few steps for a model, which it then draws with. */

import { readFile } from "node:fs/promises";
import type { Command } from "commander";
import { filledLines } from "../common/text.js";
import { OptionError } from "../errors.js";
import type { CalibratedEntry, CalibrateProgress } from "../model.js";
import { calibrateSchema, checkOptions, loadSchema } from "../options.js";
import { addJsonFlag, addModelFlags, type CommonFlags, readFlags, readLoadFlags } from "./flags.js";
import { print } from "./print.js";
import { withModel } from "./with-model.js";

interface Flags extends CommonFlags {
  prompts?: string;
}

export function calibrateCommand(command: Command, signal: AbortSignal): void {
  command.description(
    "Find schedules of few steps for a model, by size and guidance scale, and keep them in its folder: later runs draw with them.",
  );
  addModelFlags(command, loadSchema, calibrateSchema);
  addJsonFlag(command)
    .option("--prompts <file>", "prompts of a file, one a line, in place of the model's own or the package's")
    .addHelpText(
      "after",
      `
What was found before is kept, so that a run that was stopped goes on. Calibrate on the machine that is fastest: the file serves all.
A file of --out is read by no run until it lies in the model's folder as schedules.json.

Examples:
  $ flowturbo calibrate --model ./stable-diffusion-3.5-medium --sizes 1024x1024 --guidance 3,4.5,7 --steps 6,8,10
  $ flowturbo calibrate --model ./stable-diffusion-3.5-medium --prompts prompts.txt --out ./found/medium.json`,
    )
    .action((flags: Flags) => calibrate(flags, signal));
}

async function calibrate(flags: Flags, signal: AbortSignal): Promise<void> {
  const loadOptions = { ...readLoadFlags(flags), measureCosts: false, signal };
  const prompts = flags.prompts === undefined ? undefined : await readPrompts(flags.prompts);
  const options = { ...readFlags(calibrateSchema, flags), ...(prompts && { prompts }), signal };
  checkOptions(loadSchema, loadOptions, "calibrate");
  checkOptions(calibrateSchema, options, "calibrate");
  const { schedules, ...report } = await withModel(flags, loadOptions, null, async (model, progress) => {
    const onProgress = ({ phase, width, height, guidanceScale, done, total, launches }: CalibrateProgress) => {
      const what = phase === "reference" ? "running the reference" : "fitting schedules";
      progress.show(`${what}, ${width}x${height}, guidance ${guidanceScale}, ${launches} launches`, done, total);
    };
    const { file, schedules } = await model.calibrate({ ...options, onProgress });
    return { schedules, file, model: model.folder, runtime: model.runtime.name };
  });
  print(flags.json, { ...report, schedules }, `${table(schedules)}\n${report.file}`);
}

async function readPrompts(file: string): Promise<string[]> {
  const text = await readFile(file, "utf8").catch((cause: Error) => {
    throw new OptionError("prompts", `The prompts of ${file} cannot be read: ${cause.message}`, { cause });
  });
  return filledLines(text);
}

/** Which steps are guided, from 1, such as `2-4`. */
function interval(guided: readonly boolean[]): string {
  const [first, last] = [guided.indexOf(true), guided.lastIndexOf(true)];
  return first < 0 ? "none" : first === last ? String(first + 1) : `${first + 1}-${last + 1}`;
}

/** PSNR to the reference on pictures that were not fitted to. */
function table(schedules: readonly CalibratedEntry[]): string {
  const heads = ["size", "guidance", "steps", "guided", "rows", "dB", "dB uncalibrated"];
  const rows = schedules.map(({ width, height, guidanceScale, guided, rows, psnr }) => [
    ...[`${width}x${height}`, String(guidanceScale), String(guided.length), interval(guided), String(rows)],
    ...[psnr.held.toFixed(2), psnr.uncalibrated.toFixed(2)],
  ]);
  const widths = heads.map((head, column) => Math.max(head.length, ...rows.map((row) => row[column]!.length)));
  return [heads, ...rows].map((cells) => cells.map((cell, i) => cell.padStart(widths[i]!)).join("  ")).join("\n");
}
