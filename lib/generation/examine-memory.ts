/** What `flowturbo doctor` says of a model's memory on the CPU: what it would take for each way to hold weights, and what of that is there. */

import { type Checkpoint, openCheckpoint } from "../checkpoint/index.js";
import { hasVnni } from "../common/cpu.js";
import { availableMemory } from "../common/memory.js";
import type { Size } from "../model.js";
import { mmditWidth } from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import { resolveWeights } from "../runtimes/onnxruntime/weights.js";
import { type HeldWeights, type HostMemory, heldWeights, hostMemoryNeeded } from "./host-memory.js";
import { locateAll } from "./locate.js";
import { fitsPositions, nativeSize } from "./sizes.js";

/** Bytes, estimated. */
export interface MemoryExamination {
  /** What this machine has free now. */
  readonly available: number;
  readonly sizes: readonly (Size & {
    readonly weights: Readonly<Record<HeldWeights, HostMemory & { fits: boolean }>>;
  })[];
  /** What `weights: "auto"` takes here. */
  readonly auto: "lazy" | "folded";
  /** What is quickest of what fits at the model's own size; `"int8"` is never what `"auto"` takes. Null where none fits. */
  readonly recommended: HeldWeights | null;
}

/** The least width of a network that int8 was measured to be quicker for. */
const leastWidth = 1536;

/** From the quickest on. Without instructions for it, and for narrow networks, int8 is only the smallest. */
function byTime({ transformer }: Checkpoint): readonly HeldWeights[] {
  const isQuick = mmditWidth(transformer.config) >= leastWidth && hasVnni();
  return isQuick ? ["int8", "folded", "lazy"] : ["folded", "lazy", "int8"];
}

const large: Size = { width: 1024, height: 1024 };

/**
 * @param model folder, file or name on the hub
 * @returns estimates for the model's own size and, where it draws that, 1024 × 1024
 * @throws CheckpointError or HubError for a model that cannot be opened
 */
export async function examineMemory(model: string, available = availableMemory()): Promise<MemoryExamination> {
  const { path } = await locateAll(model, {});
  const checkpoint = await openCheckpoint(path);
  const native = nativeSize(checkpoint);
  const hasLarge = native.width !== large.width && fitsPositions(checkpoint, "predict", large);
  const sizes = [native, ...(hasLarge ? [large] : [])].map((size) => {
    const needed = (held: HeldWeights) => {
      const memory = hostMemoryNeeded(checkpoint, held, size);
      return [held, { ...memory, fits: memory.total <= available }] as const;
    };
    const weights = Object.fromEntries(heldWeights.map(needed)) as MemoryExamination["sizes"][number]["weights"];
    return { ...size, weights };
  });
  const recommended = byTime(checkpoint).find((held) => sizes[0]!.weights[held].fits) ?? null;
  const auto = resolveWeights("auto", new GraphLibrary(checkpoint).bytesOf16Bit, available);
  return { available, sizes, auto, recommended };
}
