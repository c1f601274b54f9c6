/** A checkpoint on disk, a folder or one file: configs, tokenizers, and where each weight lies. Knows nothing of graphs or programs. */

export { calibratedSchedulesOf, calibrationFile, calibrationPromptsOf } from "./calibration.js";
export {
  baseOfFile,
  baseOfFolder,
  type Checkpoint,
  checkBase,
  checkModelIndex,
  fingerprintOf,
  identityOf,
  openCheckpoint,
  openPreviewVae,
  type Part,
  partsOfFile,
} from "./checkpoint.js";
export {
  type ClipConfig,
  type KlVaeConfig,
  readTransformerConfig,
  type T5Config,
  type TinyVaeConfig,
  type TransformerConfig,
  type VaeConfig,
} from "./configs.js";
export type { ControlNet, ControlNetConfig } from "./controlnet.js";
export { type Distilled, distilledOf } from "./distilled.js";
export { clearQuantised, leftAsStored, listQuantised, quantisedFolder, quantisedT5 } from "./int8.js";
export { checkpointName } from "./name.js";
export { readSafetensorsHeader, readTensor, writeSafetensors } from "./safetensors.js";
export {
  calibratedSchema,
  isModelOf,
  type ModelIdentity,
  modelFingerprint,
  namedModelSchema,
  readSchedules,
  type StoredSchedules,
  schedulesVersion,
} from "./schedules.js";
export { huggingFaceTokenizers, type Tokenizer } from "./tokenizers.js";
export { openWeights } from "./weights.js";
