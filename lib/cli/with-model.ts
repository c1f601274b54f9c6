/** What the commands that run a model have in common: it is loaded for their work, its warnings are shown, and it is disposed after it. */

import { FlowTurbo, loadFor } from "../flowturbo.js";
import type { GenerateOptions, LoadOptions, LoadProgress } from "../model.js";
import type { CommonFlags } from "./flags.js";
import { showWarnings } from "./print.js";
import { type Progress, showDownload, withProgress } from "./progress.js";

/**
 * The report of the command's work with all warnings, the model's first; without `--json` they are shown as they come.
 * @param first what is drawn first, if that is known
 */
export async function withModel<T extends object>(
  { model: folder, json }: CommonFlags,
  options: LoadOptions,
  first: GenerateOptions | null,
  work: (model: FlowTurbo, progress: Progress) => Promise<T>,
): Promise<T & { readonly warnings: readonly string[] }> {
  return withProgress(!json, async (progress) => {
    progress.show("loading the model");
    // Measuring in the background would disturb a measurement, and delay the end of a process that draws once.
    const download = showDownload(progress);
    const onProgress = (at: LoadProgress) => {
      if (at.phase === "download") download({ files: [], ...at });
      else progress.show("loading the model");
    };
    // What takes minutes at a first load: weights that are quantised or merged.
    let isLoading = true;
    const logger = { info: (text: string) => isLoading && progress.show(text) };
    const all = { ...options, onProgress, logger, measureCosts: false };
    const model = await (first ? loadFor(folder, all, first) : FlowTurbo.load(folder, all));
    isLoading = false;
    try {
      progress.clear();
      if (!json) showWarnings(model.warnings);
      const report: T & { readonly warnings?: readonly string[] } = await work(model, progress);
      const { warnings = [] } = report;
      progress.clear();
      if (!json) showWarnings(warnings);
      return { ...report, warnings: [...model.warnings, ...warnings] };
    } finally {
      progress.clear();
      await model.dispose();
    }
  });
}
