/** `flowturbo profile`: what each launch of a model costs on this machine, measured and kept beside the engines. */

import { type Command, Option } from "commander";
import { FlowTurbo } from "../flowturbo.js";
import type { Costs } from "../model.js";
import { checkOptions, loadSchema, profileSchema } from "../options.js";
import { addFlags, readFlags, readLists } from "./flags.js";
import { createProgress } from "./progress.js";

interface OwnFlags {
  model?: string;
  json?: boolean;
}

export function profileCommand(command: Command, signal: AbortSignal): void {
  command
    .description(
      "Measure what each step costs, by size and batch, and keep the table: deadlines and batches rest on it.",
    )
    .addOption(
      new Option("--model <folder>", "checkpoint in the diffusers layout (default: the embedded shapes model)"),
    );
  addFlags(command, loadSchema);
  addFlags(command, profileSchema);
  command
    .addOption(new Option("--json", "print one JSON object"))
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo profile
  $ flowturbo profile --model ./stable-diffusion-3.5-medium --sizes 512x512,1024x1024 --batches 1,2 --json`,
    )
    .action((flags: OwnFlags) => profile(flags, signal));
}

async function profile(flags: OwnFlags, signal: AbortSignal): Promise<void> {
  const given = flags as Record<string, unknown>;
  // Measuring in the background would only disturb.
  const loadOptions = { ...readFlags(loadSchema, given), signal, measureCosts: false };
  const options = { ...readLists(readFlags(profileSchema, given)), signal };
  checkOptions(loadSchema, loadOptions, "profile");
  checkOptions(profileSchema, options, "profile");
  const progress = createProgress(!flags.json);
  let model: FlowTurbo | undefined;
  try {
    progress.show("loading the model");
    model = await FlowTurbo.load(flags.model, loadOptions);
    const costs = await model.profile({
      ...options,
      onProgress: ({ done, total }) => progress.show("measuring launches", done, total),
    });
    progress.clear();
    const { folder, entries } = costs;
    if (flags.json)
      process.stdout.write(
        `${JSON.stringify({ model: model.folder, runtime: model.runtime.name, folder, entries: entries.map(rounded) })}\n`,
      );
    else process.stdout.write(`${table(costs)}\n${folder}\n`);
  } finally {
    progress.clear();
    await model?.dispose();
  }
}

function rounded<T extends Costs["entries"][number]>(entry: T): T {
  const round = (value: number) => Math.round(value * 1000) / 1000;
  return { ...entry, milliseconds: round(entry.milliseconds), low: round(entry.low), high: round(entry.high) };
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
