/** The defaults of a checkpoint, which follow from whether it was distilled. */

import { type Checkpoint, distilledOf } from "../checkpoint/index.js";
import type { Logger } from "../common/logger.js";
import { distilledDefaults, type ScheduleDefaults, usualDefaults } from "../schedule/index.js";

/**
 * @param asked the option `distilled`
 * @param logger is told of a distilled model, and why it is taken for one
 */
export async function defaultsOf(
  checkpoint: Checkpoint,
  asked: boolean | undefined,
  logger: Logger = {},
): Promise<ScheduleDefaults> {
  const distilled = await distilledOf(checkpoint, asked);
  if (!distilled) return usualDefaults;
  const { steps, reason, isByScheduler } = distilled;
  const defaults = distilledDefaults(steps, isByScheduler);
  logger.info?.(
    `The model is taken for a distilled one, since ${reason}: where a request says nothing, it draws with the sampler ${defaults.sampler}, ${steps} steps and no guidance. The option distilled: false turns that off.`,
  );
  return defaults;
}
