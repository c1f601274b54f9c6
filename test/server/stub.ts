// A model that answers at once with pictures of noise: for what the server does around drawing, whatever the pictures are.
import { setImmediate as nextTurn, setTimeout as sleep } from "node:timers/promises";
import { seedOf, seedsFrom } from "../../lib/common/seed.js";
import { Image } from "../../lib/generation/image.js";
import type { GenerateOptions, GenerateResult, ImageFormat, ImageModel } from "../../lib/model.js";
import { parseBlocks } from "../../lib/schedule/index.js";

/** Encoded once. */
class Stub extends Image {
  readonly #files = new Map<ImageFormat, Promise<Buffer>>();

  override encode(format: ImageFormat): Promise<Buffer> {
    const known = this.#files.get(format);
    if (known) return known;
    const file = super.encode(format);
    this.#files.set(format, file);
    return file;
  }
}

export interface StubOptions {
  /** Side of its pictures in pixels, whatever size is asked for. */
  readonly side: number;
  /** Milliseconds of a step. */
  readonly stepMs?: number;
}

/** It takes every call that the server makes of a valid request. Its pictures are as large as it was told, and named as large as was asked for. */
export function stubModel({ side, stepMs = 0 }: StubOptions): ImageModel {
  const noise = new Uint8Array(3 * side * side);
  let state = 1;
  for (const index of noise.keys()) {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    noise[index] = state >>> 24;
  }
  const picture = new Stub(side, side, noise);
  const generate = async (options: GenerateOptions): Promise<GenerateResult> => {
    const { width = 64, height = 64, seed = 1, count = 1, signal, onAccept, onStart, onStep, stages } = options;
    const given = stages?.map((stage) => stage.blocks) ?? (options.blocks === undefined ? [] : [options.blocks]);
    const blocks = given.length > 0 ? given.join(" ") : `H1P${(options.steps ?? 10) - 1}`;
    const steps = given.length > 0 ? given.flatMap((text) => parseBlocks(text)).length : (options.steps ?? 10);
    const seeds = options.seeds?.map(seedOf) ?? seedsFrom(seed, count);
    const last = stages?.at(-1) ?? { width, height };
    const pictures = seeds.map(() => picture);
    const { previewCount = 0 } = options;
    const previewed = Array.from({ length: previewCount }, (_, index) =>
      Math.ceil(((index + 1) * steps) / (previewCount + 1)),
    );
    const handled = { signal: signal ?? new AbortController().signal };
    // A model reads the prompt before it says that it takes a call.
    await nextTurn();
    signal?.throwIfAborted();
    await onAccept?.({ place: 0, predictedMs: null, blocks, seeds, aloneMs: null, leastMs: null }, handled);
    await onStart?.({ queuedMs: 0, blocks }, handled);
    for (let step = 0; step < steps; step++) {
      if (stepMs > 0) await sleep(stepMs, undefined, signal && { signal }).catch(() => {});
      signal?.throwIfAborted();
      const hasPreview = options.preview !== undefined && previewed.includes(step + 1) && step + 1 < steps;
      await onStep?.(
        {
          ...{ step, steps, stage: 0, stages: 1, block: "P", sigma: 1 - (step + 1) / steps, milliseconds: stepMs },
          previews: hasPreview ? pictures : [],
          latents: null,
        },
        handled,
      );
    }
    return {
      ...{ images: pictures, latents: null, pixels: null, seeds, ...last, blocks, sigmas: [], stages: [] },
      ...{ evaluations: { predictor: steps, refiner: 0, rows: steps }, tokens: { text: 3, image: 64 } },
      timings: {
        load: 0,
        queue: 0,
        encode: 0,
        steps: Array(steps).fill(stepMs),
        upscale: 0,
        edit: 0,
        decode: 0,
        total: 1,
      },
      ...{ deadline: null, warnings: [] },
    };
  };
  const zeros = { bounds: [1], counts: [0, 0], count: 0, sum: 0 };
  const model: Partial<ImageModel> = {
    ...{ name: "stub", nativeSize: { width: 64, height: 64 }, hasRefiner: true, generate },
    costs: { entries: [], folder: "", drift: 1, estimate: () => null, reset: async () => {} },
    stats: () =>
      ({
        queue: { waiting: 0, limit: 64 },
        running: { requests: 0, pictures: 0 },
        requests: { accepted: 0, refused: {}, completed: 0, failed: 0, aborted: 0, timedOut: 0, late: 0 },
        ...{ launches: { count: 0, rows: 0, padding: 0, restarted: 0 }, runtime: { restarts: 0, slowLaunches: 0 } },
        ...{ rowsPerLaunch: {}, milliseconds: { queued: zeros, total: zeros, launches: {} } },
      }) as never,
    health: () => ({
      ...{ live: true, ready: true, degraded: false, reasons: [], restarts: 0, lastError: null, oldestLaunch: null },
    }),
  };
  return model as ImageModel;
}
