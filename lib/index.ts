/** The public API. */
export type { Logger } from "./common/logger.js";
export type { Seed } from "./common/seed.js";
export type { FloatTensor, IntTensor, Tensor } from "./common/tensor.js";
export { withTraceparent } from "./common/tracing.js";
export {
  CacheError,
  CheckpointError,
  CompileError,
  DeadlineError,
  DeviceLostError,
  DisposedError,
  DrainingError,
  type ErrorRow,
  errorTable,
  FleetEmptyError,
  FleetFormatError,
  FlowTurboError,
  type FlowTurboErrorCode,
  type FlowTurboErrorOptions,
  HubError,
  type HubReason,
  InstallationError,
  LaunchError,
  MemoryError,
  NotFiniteError,
  OptionError,
  OutputError,
  PoisonousJobError,
  publicMessage,
  QueueFullError,
  RedisError,
  RuntimeDiedError,
  RuntimeError,
  RuntimeUnavailableError,
  TimeoutError,
} from "./errors.js";
export { embeddedModel, FlowTurbo } from "./flowturbo.js";
export { type CannyOptions, canny } from "./generation/canny.js";
export { type CompileReport, compileEngines, type Engine, type EngineProfile } from "./generation/engines.js";
export { Image } from "./generation/image.js";
export { generateStream } from "./generation/stream.js";
export { type Json, requestFromJson, requestToJson, resultFromJson, resultToJson } from "./json.js";
export type {
  AcceptEvent,
  AdapterNames,
  CalibratedEntry,
  CalibrateOptions,
  CalibrateProgress,
  Calibration,
  CompileEnginesOptions,
  Control,
  ControlNetSource,
  Costs,
  DeadlineResult,
  DeviceCosts,
  EncodeOptions,
  EngineProgress,
  GenerateEvent,
  GenerateOptions,
  GenerateResult,
  GenerateStream,
  GenerateTrace,
  HandlerOptions,
  ImageFormat,
  ImageModel,
  LaunchTrace,
  LoadOptions,
  LoadProgress,
  LoraSource,
  LoraUse,
  ModelDefaults,
  Picture,
  PictureSource,
  PixelRange,
  ProfileOptions,
  ProfileProgress,
  PromptEmbeds,
  QueueTrace,
  RgbPicture,
  RuntimeChoice,
  Size,
  SkipLayers,
  Stage,
  StageResult,
  StartEvent,
  StepEvent,
  TextOptions,
  Timings,
} from "./model.js";
export type { Feature, UpscaleName } from "./networks/index.js";
export type { BuilderName, RuntimeName } from "./runtimes/index.js";
export type { DeviceName } from "./runtimes/runtime.js";
export type { Block, Evaluations, GridName, QualityName, SamplerName } from "./schedule/index.js";
export type { CostEntry } from "./serving/costs.js";
export type { Health, HealthError, ModelEvents } from "./serving/health.js";
export type { DeviceStats, Histogram, Stats } from "./serving/stats.js";
export type { SlowLaunch } from "./serving/watch.js";
