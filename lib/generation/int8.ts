/** A checkpoint whose linear layers are multiplied in 8 bits: which parts have them, and the weights for it. */

import {
  type Checkpoint,
  type Int8Kind,
  int8Candidates,
  type Part,
  partTitles,
  quantisedWeights,
} from "../checkpoint/index.js";
import type { Logger } from "../common/logger.js";

/** Networks that have such layers. */
const parts = {
  transformer: { kind: "mmdit", title: `the ${partTitles.transformer}` },
  refiner: { kind: "mmdit", title: "the refiner" },
  textEncoder: { kind: "clip", title: `the ${partTitles.textEncoder}` },
  textEncoder2: { kind: "clip", title: `the ${partTitles.textEncoder2}` },
  textEncoder3: { kind: "t5", title: `the ${partTitles.textEncoder3}` },
} as const satisfies Partial<Record<keyof Checkpoint, unknown>>;

interface Int8Options {
  /** Whether T5 is among them, too; false where its weights are held in another way. */
  readonly textEncoder3: boolean;
  readonly signal?: AbortSignal | undefined;
  readonly logger?: Logger | undefined;
}

/**
 * The checkpoint with the linear layers of attention and MLP in int8: of the transformer, the refiner, the text encoders and the ControlNets that it has.
 * @param cache folder of the caches
 * @throws as `quantisedWeights`
 */
export async function withInt8Weights(
  checkpoint: Checkpoint,
  cache: string,
  { textEncoder3, ...options }: Int8Options,
): Promise<Checkpoint> {
  const quantised = <P extends Part<unknown>>(part: P, kind: Int8Kind, title: string): Promise<P> => {
    const layers = new Map(int8Candidates(kind, part.weights).map((layer) => [layer, null]));
    return quantisedWeights(part, layers, cache, { ...options, title });
  };
  const changed: Partial<Record<keyof typeof parts, Part<unknown>>> = {};
  for (const [name, { kind, title }] of Object.entries(parts)) {
    const key = name as keyof typeof parts;
    const part = checkpoint[key];
    if (part && (textEncoder3 || key !== "textEncoder3")) changed[key] = await quantised(part, kind, title);
  }
  const controlNets = new Map(checkpoint.controlNets);
  for (const [id, net] of controlNets)
    controlNets.set(id, await quantised(net, "mmdit", `the ControlNet ${net.folder}`));
  return { ...checkpoint, ...(changed as Partial<Checkpoint>), controlNets };
}
