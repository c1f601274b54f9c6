export interface Request {
  prompt: string;
  steps: number;
  guidance: number;
  size: number;
  /** T5 tokens. */
  tokens: number;
  /** [1, C, h, w]; drawn at random where it is left out. */
  noise?: Float32Array;
  out?: string;
}
export interface Answer {
  milliseconds: number;
  denoise: number;
  decode: number;
  latents: Float32Array;
  /** [1, 3, H, W], decoded and not clamped. */
  image: Float32Array;
}
export function open(folder: string, options?: { executionProviders?: string[] }): Promise<{ generate(request: Request): Promise<Answer>; release(): Promise<void> }>;
