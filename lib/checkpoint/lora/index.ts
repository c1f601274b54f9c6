/** LoRA files: read for a checkpoint, and merged into its weights. */

export { type LoraPart, loraParts, partTitles } from "./layers.js";
export { mergeLoras, type ScaledLora } from "./merge.js";
export { type Lora, type LowRank, nameOfLora, readLora } from "./read.js";
