/** A checkpoint folder on disk: configs, tokenizers, and where each weight lies. Knows nothing of graphs or programs. */

export { type Checkpoint, type OpenCheckpointOptions, openCheckpoint, type Part } from "./checkpoint.js";
export {
  type ClipConfig,
  readClipConfig,
  readSchedulerConfig,
  readT5Config,
  readTransformerConfig,
  readVaeConfig,
  type SchedulerConfig,
  type T5Config,
  type TransformerConfig,
  type VaeConfig,
} from "./configs.js";
export {
  type HeaderEntry,
  readSafetensorsHeader,
  readTensor,
  type SafetensorsHeader,
  supportedDType,
  writeSafetensors,
} from "./safetensors.js";
export { openClipTokenizer, openT5Tokenizer, type Tokenizer, type Tokens } from "./tokenizers.js";
export { type OpenWeightsOptions, openWeights, type Weights } from "./weights.js";
