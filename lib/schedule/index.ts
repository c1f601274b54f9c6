/** Schedules: grids, blocks, and the programs that they amount to. Pure. */

export {
  type SamplingProgram,
  type SamplingRequest,
  type SamplingStage,
  samplingProgram,
  withValues,
} from "../generation/programs.js";
export { ProgramBuilder, rowsAtOnce } from "../program/builder.js";
export { type Block, defaultBlocks, formatBlocks, parseBlocks, type Sampler } from "./blocks.js";
export { diffusersSigmas, type GridName, shiftedSigmas, shiftSigma, skippedBlocks, upscaleSigmas } from "./sigmas.js";
export { countEvaluations, type Evaluations, planSteps, type StepLaunch } from "./steps.js";
