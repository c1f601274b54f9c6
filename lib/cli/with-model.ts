/** What the commands that run a model have in common: it is loaded for their work, and disposed after it. */

import { FlowTurbo } from "../flowturbo.js";
import type { LoadOptions } from "../model.js";
import type { CommonFlags } from "./flags.js";
import { type Progress, withProgress } from "./progress.js";

export async function withModel<T>(
  { model: folder, json }: CommonFlags,
  options: LoadOptions,
  work: (model: FlowTurbo, progress: Progress) => Promise<T>,
): Promise<T> {
  return withProgress(!json, async (progress) => {
    progress.show("loading the model");
    // Measuring in the background would disturb a measurement, and delay the end of a process that draws once.
    const model = await FlowTurbo.load(folder, { ...options, measureCosts: false });
    try {
      return await work(model, progress);
    } finally {
      progress.clear();
      await model.dispose();
    }
  });
}
