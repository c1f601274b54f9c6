/** Schedules: blocks, noise levels, samplers. Pure: no network, no program. */
export {
  type Block,
  type BlockRow,
  blocksForEach,
  blockTable,
  formatBlocks,
  longestSchedule,
  parseBlocks,
  type StepType,
} from "./blocks.js";
export {
  defaultLadder,
  defaultSampler,
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
  scheduleOf,
  stepTypesOf,
} from "./schedule.js";
export {
  diffusersSigmas,
  type GridName,
  shiftedSigmas,
  shiftSigma,
  sigmaGrids,
  skippedBlocks,
  upscaleSigmas,
} from "./sigmas.js";
