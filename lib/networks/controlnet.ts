/** The network of a ControlNet: what it adds to the picture's tokens after blocks of the transformer. */

import type { ControlNet, ControlNetConfig } from "../checkpoint/index.js";
import type { EmitOptions, GraphBuilder, Value } from "../onnx/index.js";
import type { MmditInputs } from "./mmdit.js";

/** Channels of what a ControlNet reads of a control picture: its latents, and what else it was trained with. */
export function controlChannels({ inChannels, extraConditioningChannels }: ControlNetConfig): number {
  return inChannels + extraConditioningChannels;
}

export function controlResiduals(
  _g: GraphBuilder,
  _controlNet: ControlNet,
  _options: EmitOptions,
  _inputs: Omit<MmditInputs, "positionEmbedding"> & {
    readonly control: Value;
    readonly tokens: Value;
    readonly positionEmbedding: Value | null;
  },
): Value[] {
  throw new RangeError("There is no ControlNet.");
}
