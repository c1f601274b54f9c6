/** Whether the parts of a checkpoint fit together: what would only crash later, or draw something else, is refused. */

import { CheckpointError } from "../errors.js";
import type { Checkpoint } from "./checkpoint.js";

/** Each text encoder with its tokenizer, and what it is called in messages. */
const textParts = [
  ["textEncoder", "tokenizer", "text_encoder"],
  ["textEncoder2", "tokenizer2", "text_encoder_2"],
  ["textEncoder3", "tokenizer3", "text_encoder_3"],
] as const;

/** @param about where the configuration of a part is, and what is said where two do not fit */
export function checkThatPartsFit(
  checkpoint: Checkpoint,
  { configOf, remedy }: { configOf: (part: string) => string; remedy: string },
): void {
  const { transformer, refiner, textEncoder, textEncoder2, textEncoder3, vae } = checkpoint;
  const predictor = transformer.config;
  const { inChannels, outChannels, latentChannels } = vae.config;
  const demand = (fits: boolean, part: string, what: string): void => {
    const file = configOf(part);
    if (!fits) throw new CheckpointError(file, `${file}: ${what}. ${remedy}`);
  };
  /** @param subject the key, @param other the key of another part that has the value `expected` */
  const demandEqual = (part: string, subject: string, value: number, other: string, expected: number) =>
    demand(value === expected, part, `${subject} is ${value}, but ${other} is ${expected}`);

  demand(inChannels === 3 && outChannels === 3, "vae", "in_channels and out_channels must be 3 (RGB)");
  const latents = "the VAE's latent_channels";
  demandEqual("transformer", "in_channels", predictor.inChannels, latents, latentChannels);
  demandEqual("transformer", "out_channels", predictor.outChannels, latents, latentChannels);

  const clips = [textEncoder, textEncoder2].flatMap((part) => (part ? [part.config] : []));
  const lacking = "text_encoder and text_encoder_2 are both null, so the pooled text is missing";
  demand(clips.length > 0, "transformer", lacking);
  const width = predictor.jointAttentionDim;
  const hidden = clips.reduce((sum, clip) => sum + clip.hiddenSize, 0);
  demand(
    hidden <= width,
    "transformer",
    `joint_attention_dim is ${width}, less than the CLIP encoders' hidden_size together (${hidden})`,
  );
  const pooled = clips.reduce((sum, clip) => sum + clip.projectionDim, 0);
  const together = "the CLIP encoders' projection_dim together";
  demandEqual("transformer", "pooled_projection_dim", predictor.pooledProjectionDim, together, pooled);
  if (textEncoder3)
    demandEqual(
      "text_encoder_3",
      "d_model",
      textEncoder3.config.dModel,
      "the transformer's joint_attention_dim",
      width,
    );

  // Ids and positions beyond the encoders' tables would otherwise stop a run in the middle.
  for (const [encoderKey, tokenizerKey, part] of textParts) {
    const { [encoderKey]: encoder, [tokenizerKey]: tokenizer } = checkpoint;
    if (!tokenizer || !encoder) continue;
    const { vocabSize } = encoder.config;
    const largestId = tokenizer.vocabSize - 1;
    demand(largestId < vocabSize, part, `vocab_size is ${vocabSize}, but its tokenizer has ids up to ${largestId}`);
    if (!("maxPositionEmbeddings" in encoder.config)) continue;
    const { maxPositionEmbeddings: positions } = encoder.config;
    demand(
      tokenizer.maxLength <= positions,
      part,
      `max_position_embeddings is ${positions}, but its tokenizer's model_max_length is ${tokenizer.maxLength}`,
    );
  }

  if (!refiner) return;
  const { config } = refiner;
  demand(
    config.inChannels === 2 * latentChannels,
    "refiner",
    `in_channels is ${config.inChannels}, but a refiner takes latents and velocity, 2 x ${latentChannels}`,
  );
  demandEqual("refiner", "out_channels", config.outChannels, latents, latentChannels);
  for (const [key, name] of [
    ["patchSize", "patch_size"],
    ["jointAttentionDim", "joint_attention_dim"],
    ["pooledProjectionDim", "pooled_projection_dim"],
  ] as const)
    demandEqual("refiner", name, config[key], "the transformer's", predictor[key]);
}

/** @throws CheckpointError for a preview autoencoder of other latents */
export function checkPreviewVae({ vae, previewVae }: Checkpoint): void {
  if (!previewVae) return;
  for (const [key, name] of [
    ["latentChannels", "latent_channels"],
    ["factor", "pixels for each latent"],
    ["inChannels", "in_channels"],
    ["outChannels", "out_channels"],
  ] as const) {
    const [own, other] = [vae.config[key], previewVae.config[key]];
    const isOfOthers = key === "latentChannels" && other === 4;
    if (own !== other)
      throw new CheckpointError(
        previewVae.weights.origin,
        `The autoencoder ${previewVae.weights.origin} for previewVae does not fit: its ${name} is ${other}` +
          `${isOfOthers ? ", as for Stable Diffusion 1, 2 and XL (taesd, taesdxl)" : ""}, but the model's is ${own}. It needs to be one for the same latents; for Stable Diffusion 3 that is taesd3.`,
      );
  }
}
