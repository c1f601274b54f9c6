/** The networks of SD3 class models as ONNX graphs, one file a network. */
export { type ClipConfig, emitClip } from "./clip.js";
export { emitInpaintBlend, emitPreview, emitScaleNoise } from "./edit.js";
export { type MmditConfig, mmditWidth, positionTable } from "./mmdit.js";
export { emitStep, type StepOptions, type StepType } from "./step.js";
export { emitT5, relativeBuckets, type T5Config } from "./t5.js";
export { emitUpscale } from "./upscale.js";
export { emitVaeDecoder, emitVaeEncoder, type VaeConfig } from "./vae.js";
