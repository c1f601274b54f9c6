// A call of generate() with the values that tests compare: latents and decoded pixels.
import type { FloatTensor, GenerateOptions, GenerateResult, ImageModel } from "../../lib/index.js";

export interface WithValues extends GenerateResult {
  readonly latents: FloatTensor;
  readonly pixels: FloatTensor;
}

/** Draws, and asks for latents and pixels. */
export async function withValues(model: Pick<ImageModel, "generate">, options: GenerateOptions): Promise<WithValues> {
  return (await model.generate({ ...options, include: ["latents", "pixels"] })) as WithValues;
}
