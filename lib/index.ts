/** The public API. */
export { type CompileReport, compileEngines, type Engine, type EngineProfile } from "./engines.js";
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
export { Image, type ImageFormat } from "./image.js";
export type {
  CompileEnginesOptions,
  EngineProgress,
  GenerateOptions,
  LoadOptions,
  LoadProgress,
  Logger,
  Picture,
  PictureSource,
  ProfileOptions,
  ProfileProgress,
  RgbPicture,
  Stage,
  StepEvent,
} from "./options.js";
export {
  type Costs,
  type DeadlineResult,
  embeddedModel,
  FlowTurbo,
  type GenerateResult,
  type RuntimeChoice,
  type StageResult,
  type Timings,
} from "./pipeline.js";
export type { CostEntry } from "./serving/costs.js";
export type { Histogram, Stats } from "./serving/stats.js";
export type { FloatTensor, IntTensor, Tensor } from "./tensor.js";
