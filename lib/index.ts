/** The public API. */
export type { Logger } from "./common/logger.js";
export type { FloatTensor, IntTensor, Tensor } from "./common/tensor.js";
export {
  CacheError,
  CheckpointError,
  CompileError,
  DeadlineError,
  DisposedError,
  FlowTurboError,
  type FlowTurboErrorCode,
  MemoryError,
  NotFiniteError,
  OptionError,
  OutputError,
  QueueFullError,
  RuntimeDiedError,
  RuntimeError,
  RuntimeUnavailableError,
} from "./errors.js";
export {
  type Costs,
  type DeadlineResult,
  embeddedModel,
  FlowTurbo,
  type GenerateResult,
  type RuntimeChoice,
  type StageResult,
  type Timings,
} from "./flowturbo.js";
export { type CompileReport, compileEngines, type Engine, type EngineProfile } from "./generation/engines.js";
export { Image, type ImageFormat } from "./generation/image.js";
export type {
  CompileEnginesOptions,
  EngineProgress,
  GenerateOptions,
  LoadOptions,
  LoadProgress,
  Picture,
  PictureSource,
  ProfileOptions,
  ProfileProgress,
  RgbPicture,
  Stage,
  StepEvent,
} from "./options.js";
export type { CostEntry } from "./serving/costs.js";
export type { Histogram, Stats } from "./serving/stats.js";
