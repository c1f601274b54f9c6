/** The public API. */
export {
  CheckpointError,
  DisposedError,
  FlowTurboError,
  type FlowTurboErrorCode,
  NotFiniteError,
  OptionError,
  OutputError,
  RuntimeDiedError,
  RuntimeError,
} from "./errors.js";
export { Image, type ImageFormat } from "./image.js";
export type {
  GenerateOptions,
  LoadOptions,
  LoadProgress,
  Logger,
  Picture,
  PictureSource,
  RgbPicture,
  Stage,
  StepEvent,
} from "./options.js";
export {
  embeddedModel,
  FlowTurbo,
  type GenerateResult,
  type RuntimeChoice,
  type StageResult,
  type Timings,
} from "./pipeline.js";
export type { FloatTensor, IntTensor, Tensor } from "./tensor.js";
