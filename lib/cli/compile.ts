/** `flowturbo compile`: every engine that a model needs, ahead of time, each with a progress bar. */

import type { Command } from "commander";
import { embeddedModel } from "../flowturbo.js";
import { compileEngines, type Engine } from "../generation/engines.js";
import { locateAll } from "../generation/locate.js";
import type { EngineProgress } from "../model.js";
import { checkOptions, compileSchema } from "../options.js";
import { addMergedLoras, type LoadAdapterFlags, readLoadAdapters } from "./adapters.js";
import { addJsonFlag, addModelFlags, type CommonFlags, readFlags } from "./flags.js";
import { megabytes, print, showWarnings } from "./print.js";
import { bar, showDownload, withProgress } from "./progress.js";

export function compileCommand(command: Command, signal: AbortSignal): void {
  command.description("Build the TensorRT engines of a model ahead of time, one for each network.");
  addModelFlags(command, compileSchema);
  addMergedLoras(command);
  addJsonFlag(command)
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo compile --model ./stable-diffusion-3.5-medium --sizes 1024x1024 --batches 1,2
  $ flowturbo compile --runtime tensorrt-rtx --targets 8.6,8.9,12.0 --sizes 64x64,96x128 --batches 1,2,4 --json
  $ flowturbo compile --model ./stable-diffusion-3.5-medium --lora style.safetensors:0.8 --loras-rank 16 --skip-layers 7,8,9`,
    )
    .action((flags: CommonFlags & LoadAdapterFlags) => compile(flags, signal));
}

async function compile(flags: CommonFlags & LoadAdapterFlags, signal: AbortSignal): Promise<void> {
  const options = { ...readFlags(compileSchema, flags), ...readLoadAdapters(flags), signal };
  checkOptions(compileSchema, options, "compile");
  const report = await withProgress(!flags.json, async (progress) => {
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
    progress.show("opening the model");
    const onDownload = showDownload(progress);
    const { path, ...located } = await locateAll(flags.model ?? embeddedModel, { ...options, onDownload });
    const { base, previewVae } = located;
    const compiled = await compileEngines(path, { ...options, base, previewVae, onProgress: show });
    return { ...compiled, warnings: [...located.warnings, ...compiled.warnings] };
  });
  if (!flags.json) showWarnings(report.warnings);
  print(flags.json, report, `${report.runtime} ${report.version}\n${report.engines.map(describe).join("\n")}`);
}

function describe(engine: Engine): string {
  const { graph, profiles, plan, bytes, seconds, cached, rebuilt } = engine;
  const how = cached ? "from the cache" : `built in ${seconds.toFixed(1)} s`;
  const why = rebuilt === null ? "" : ` (the one in the cache was not used: ${rebuilt})`;
  const count = `${profiles.length} profile${profiles.length === 1 ? "" : "s"}`;
  return `${graph}: ${count}, ${megabytes(bytes)}, ${how}${why}\n  ${plan}`;
}
