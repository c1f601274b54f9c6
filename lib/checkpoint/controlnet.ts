/** A ControlNet on disk. */

import type { Part } from "./checkpoint.js";

export interface ControlNetConfig {
  readonly inChannels: number;
  readonly extraConditioningChannels: number;
  /** Whether it has positions of its own; otherwise it reads the transformer's tokens. */
  readonly usePosEmbed: boolean;
}

export interface ControlNet extends Part<ControlNetConfig> {
  /** Tells it from others: 8 hexadecimal digits. */
  readonly id: string;
  readonly folder: string;
}
