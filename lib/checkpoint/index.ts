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
  type ControlNetConfig,
  type KlVaeConfig,
  readTransformerConfig,
  type T5Config,
  type TinyVaeConfig,
  type TransformerConfig,
  type VaeConfig,
} from "./configs.js";
export {
  type ControlNet,
  checkControlNetConfig,
  checkControlNetFits,
  checkControlNetValues,
  type OpenControlNetOptions,
  openControlNet,
} from "./controlnet.js";
export { type Distilled, distilledOf } from "./distilled.js";
export { leftAsStored, quantisedT5 } from "./int8.js";
export {
  type CheckedPlan,
  type Int8Plan,
  type LayerComparison,
  planFile,
  plannedForms,
  quantisedLayers,
  readPlan,
  withoutWorst,
  worstToLeave,
  writePlan,
} from "./int8-plan.js";
export { checkFiniteWeights, type Int8Kind, int8Candidates, quantisedWeights } from "./int8-weights.js";
export {
  type Lora,
  type LoraPart,
  type LowRank,
  loraParts,
  mergeLoras,
  nameOfLora,
  partTitles,
  readLora,
  type ScaledLora,
} from "./lora/index.js";
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
export { clearCachedWeights, listCachedWeights, weightsFolder } from "./weight-cache.js";
export { openWeights } from "./weights.js";
