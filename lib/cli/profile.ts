/** `flowturbo profile`: what each launch of a model costs on this machine, measured and kept beside the engines. */

import type { Command } from "commander";
import type { Costs, ProfileProgress } from "../model.js";
import { checkOptions, loadSchema, profileSchema } from "../options.js";
import { addJsonFlag, addModelFlags, type CommonFlags, readFlags, readLoadFlags } from "./flags.js";
import { print, rounded } from "./print.js";
import { withModel } from "./with-model.js";

export function profileCommand(command: Command, signal: AbortSignal): void {
  command.description(
    "Measure what each step costs, by size and batch, and keep the table: deadlines and batches rest on it.",
  );
  addModelFlags(command, loadSchema, profileSchema);
  addJsonFlag(command)
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo profile
  $ flowturbo profile --model ./stable-diffusion-3.5-medium --sizes 512x512,1024x1024 --batches 1,2 --json`,
    )
    .action((flags: CommonFlags) => profile(flags, signal));
}

async function profile(flags: CommonFlags, signal: AbortSignal): Promise<void> {
  const loadOptions = { ...readLoadFlags(flags), signal };
  const options = { ...readFlags(profileSchema, flags), signal };
  checkOptions(loadSchema, loadOptions, "profile");
  checkOptions(profileSchema, options, "profile");
  const { costs, ...report } = await withModel(flags, loadOptions, null, async (model, progress) => {
    const onProgress = ({ done, total }: ProfileProgress) => progress.show("measuring launches", done, total);
    const costs = await model.profile({ ...options, onProgress });
    return { costs, model: model.folder, runtime: model.runtime.name, folder: costs.folder };
  });
  const entries = costs.entries.map((entry) => {
    const { milliseconds, low, high } = entry;
    return { ...entry, milliseconds: rounded(milliseconds), low: rounded(low), high: rounded(high) };
  });
  print(flags.json, { ...report, entries }, `${table(costs)}\n${costs.folder}`);
}

function table({ entries }: Costs): string {
  const heads = ["graph", "size", "batch", "ms", "ms a row", "quartiles", "runs"];
  const rows = entries.map(({ graph, size, batch, milliseconds, low, high, runs }) => [
    ...[graph, size, String(batch), milliseconds.toFixed(2), (milliseconds / batch).toFixed(2)],
    ...[`${low.toFixed(2)} to ${high.toFixed(2)}`, String(runs)],
  ]);
  const widths = heads.map((head, column) => Math.max(head.length, ...rows.map((row) => row[column]!.length)));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, column) => (column < 2 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!)))
      .join("  ");
  return [heads, ...rows].map((cells) => line(cells).trimEnd()).join("\n");
}
