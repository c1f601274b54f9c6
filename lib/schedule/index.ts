/** Schedules: grids, blocks, and the programs that they amount to. Pure. */
export { type Block, defaultBlocks, formatBlocks, parseBlocks, type Sampler } from "./blocks.js";
export { ProgramBuilder, rowsAtOnce } from "./builder.js";
export { diffusersGrid, type GridName, joinGrid, shiftedGrid, shiftSigma, skippedBlocks } from "./grids.js";
export {
  type SamplingProgram,
  type SamplingRequest,
  type SamplingStage,
  samplingProgram,
  withValues,
} from "./sampling.js";
export { countEvaluations, type Evaluations, planSteps, type StepLaunch } from "./steps.js";
