/** Schedules: grids, blocks, and the programs that they amount to. Pure. */
export { type Block, defaultBlocks, formatBlocks, parseBlocks, type Sampler } from "./blocks.js";
export { diffusersGrid, type GridName, shiftedGrid, shiftSigma } from "./grids.js";
export { type SamplingProgram, type SamplingRequest, samplingProgram } from "./sampling.js";
export { countEvaluations, type Evaluations, planSteps, type StepLaunch } from "./steps.js";
