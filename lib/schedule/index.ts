/** Schedules: blocks, noise levels, samplers. Pure: no network, no program. */
export {
  type Block,
  type BlockRow,
  blocksForEach,
  blockTable,
  type Combination,
  formatBlocks,
  longestSchedule,
  moveBy,
  parseBlocks,
  type StepType,
  type UnmetNeed,
  unmetNeed,
  type Weights,
} from "./blocks.js";
export {
  areSomeMixed,
  type CalibratedSchedule,
  type FittedSchedule,
  fittedSchedules,
  nearestOf,
  rowsOf,
} from "./calibrated.js";
export { defaultsBeside, distilledDefaults, type ScheduleDefaults, usualDefaults } from "./defaults.js";
export { bestGrids, type Gram, gramOf } from "./grid-search.js";
export {
  blocksGrid,
  defaultSampler,
  ladderSteps,
  ownScales,
  type QualityName,
  qualities,
  type SamplerName,
  type SamplerRow,
  samplers,
  samplersWithBlocks,
} from "./samplers.js";
export {
  countEvaluations,
  type Evaluations,
  planSteps,
  type Schedule,
  type StepLaunch,
  type StepWeights,
  scheduleOf,
  stepTypesOf,
} from "./schedule.js";
export {
  diffusersSigmas,
  type GridName,
  givenSigmas,
  type SchedulerSettings,
  type SigmaSettings,
  shiftedSigmas,
  shiftSigma,
  sigmaGrids,
  sigmaSettings,
  skippedBlocks,
  upscaleSigmas,
} from "./sigmas.js";
export type { Solver } from "./solvers.js";
