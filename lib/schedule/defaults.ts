/** What is drawn with where a request says nothing: as a model was trained, many steps with guidance, or distilled, few without. */

import { defaultSampler, ladderSteps, type QualityName, qualities, type SamplerName, samplers } from "./samplers.js";

export interface ScheduleDefaults {
  readonly distilled: boolean;
  /** Whether nothing but the model's scheduler says that it was distilled. */
  readonly isOfScheduler?: boolean;
  readonly sampler: SamplerName;
  /** Of that sampler; of a distilled model those of every sampler. */
  readonly steps: number;
  readonly guidanceScale: number;
  /** Steps of each quality. */
  readonly quality: Readonly<Record<QualityName, number>>;
  /** Numbers of steps to choose from for a time limit, where nobody has ranked or calibrated schedules for the model. */
  readonly ladder: readonly number[];
}

export const usualDefaults: ScheduleDefaults = {
  distilled: false,
  sampler: defaultSampler,
  steps: samplers[defaultSampler]!.steps,
  guidanceScale: 4.5,
  quality: { fast: qualities.fast!.steps, balanced: qualities.balanced!.steps, best: qualities.best!.steps },
  ladder: ladderSteps,
};

/** Such a model gains nothing from more steps than twice those that it was distilled to. */
const distilledLadder: readonly number[] = [8, 6, 4, 3, 2, 1];

/** @param steps that the model was distilled to */
export function distilledDefaults(steps: number, isOfScheduler = false): ScheduleDefaults {
  return {
    ...{ distilled: true, isOfScheduler, sampler: "euler", steps, guidanceScale: 1, ladder: distilledLadder },
    quality: { fast: Math.ceil(steps / 2), balanced: steps, best: Math.max(steps, distilledLadder[0]!) },
  };
}

/** The defaults of a request: one that names a sampler has put the scheduler aside, and with it what the scheduler says of the model. */
export function defaultsBeside(
  sampler: SamplerName | undefined,
  defaults: ScheduleDefaults = usualDefaults,
): ScheduleDefaults {
  return defaults.isOfScheduler && sampler !== undefined ? usualDefaults : defaults;
}
