/** `flowturbo compile`: every engine that a model needs, ahead of time, each with a progress bar. */

import { type Command, Option } from "commander";
import { embeddedModel } from "../flowturbo.js";
import { compileEngines, type Engine } from "../generation/engines.js";
import type { EngineProgress } from "../model.js";
import { checkOptions, compileSchema } from "../options.js";
import { addFlags, readFlags, readLists } from "./flags.js";
import { bar, createProgress } from "./progress.js";

interface OwnFlags {
  model?: string;
  json?: boolean;
}

export function compileCommand(command: Command, signal: AbortSignal): void {
  command
    .description("Build the TensorRT engines of a model ahead of time, one for each network.")
    .addOption(
      new Option("--model <folder>", "checkpoint in the diffusers layout (default: the embedded shapes model)"),
    );
  addFlags(command, compileSchema);
  command
    .addOption(new Option("--json", "print one JSON object"))
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo compile --model ./stable-diffusion-3.5-medium --sizes 1024x1024 --batches 1,2
  $ flowturbo compile --runtime tensorrt-rtx --targets 8.6,8.9,12.0 --sizes 64x64,96x128 --batches 1,2,4 --json`,
    )
    .action((flags: OwnFlags) => compile(flags, signal));
}

async function compile(flags: OwnFlags, signal: AbortSignal): Promise<void> {
  const options = { ...readLists(readFlags(compileSchema, flags as Record<string, unknown>)), signal };
  checkOptions(compileSchema, options, "compile");
  const progress = createProgress(!flags.json);
  // A bar for each engine: those under way are redrawn, those that are done stay.
  const bars = new Map<string, string>();
  const show = ({ graph, engine, engines, phase, detail, done, total }: EngineProgress) => {
    const line = `${bar(done, total)} ${engine + 1}/${engines} ${graph}`;
    if (phase === "done") {
      bars.delete(graph);
      progress.keep(`  ${line}`);
    } else bars.set(graph, `${line}: ${phase === "building" ? detail : phase}`);
    if (bars.size > 0) progress.show([...bars.values()].join("\n  "));
  };
  try {
    progress.show("opening the model");
    const report = await compileEngines(flags.model ?? embeddedModel, { ...options, onProgress: show });
    progress.clear();
    if (flags.json) process.stdout.write(`${JSON.stringify(report)}\n`);
    else process.stdout.write(`${report.runtime} ${report.version}\n${report.engines.map(describe).join("\n")}\n`);
  } finally {
    progress.clear();
  }
}

function describe(engine: Engine): string {
  const { graph, profiles, plan, bytes, seconds, cached, rebuilt } = engine;
  const how = cached ? "from the cache" : `built in ${seconds.toFixed(1)} s`;
  const why = rebuilt === null ? "" : ` (the one in the cache was not used: ${rebuilt})`;
  const count = `${profiles.length} profile${profiles.length === 1 ? "" : "s"}`;
  return `${graph}: ${count}, ${(bytes / 1e6).toFixed(1)} MB, ${how}${why}\n  ${plan}`;
}
