/**
 * Whether a checkpoint was distilled to few steps without guidance. No config says so, so that names and the scheduler have to: a table of
 * words that such checkpoints are called by.
 */

import { realpath } from "node:fs/promises";
import { basename, join } from "node:path";
import type { Checkpoint } from "./checkpoint.js";
import { readJsonObject } from "./files.js";
import { checkpointName } from "./name.js";

/**
 * A word of a name, and the steps that such a model was distilled to where the name has no number of them; null for 4, or 8 with the transformer of SD3.5 medium
 * (stabilityai/stable-diffusion-3.5-large-turbo has 4, tensorart/stable-diffusion-3.5-medium-turbo 8). "hyper" is not among them: such
 * models take guidance.
 */
const words: Readonly<Record<string, number | null>> = {
  turbox: 8,
  turbo: null,
  lightning: null,
  flash: null,
  lcm: null,
};

/** What a distilled checkpoint draws with. */
export interface Distilled {
  readonly steps: number;
  /** Completes "since …". */
  readonly reason: string;
  /** Whether its scheduler alone says so: people save any checkpoint with any scheduler. */
  readonly isByScheduler?: true;
}

/** A number of steps in a name, such as 8 of "lora_sd3.5m_turbo_8steps"; null for none. */
function stepsIn(name: string): number | null {
  const [, steps] = /(?:^|[^0-9a-z.])([1-9]\d?)[-_ ]?steps?(?![a-z])/i.exec(name) ?? [];
  return steps === undefined ? null : Number(steps);
}

/**
 * Null for a model that was not distilled.
 * @param asked the option `distilled`; undefined to recognise it by its scheduler, and by the names of LoRAs that are merged into it, its folder or repository, its files
 *   and what it was made of (`_name_or_path`)
 */
export async function distilledOf(checkpoint: Checkpoint, asked?: boolean): Promise<Distilled | null> {
  if (asked === false) return null;
  const { folder, scheduler, transformer } = checkpoint;
  const found = (await namesOf(checkpoint)).flatMap((name) => {
    const parts = name.toLowerCase().split(/[^a-z0-9]+/);
    return Object.keys(words).flatMap((word) => (parts.includes(word) ? [{ name, word }] : []));
  })[0];
  // The second attention is what tells SD3.5 medium from the others.
  const usual = transformer.config.dualAttentionLayers.length > 0 ? 8 : 4;
  const steps = (found && (stepsIn(found.name) ?? words[found.word])) ?? usual;
  if (asked) return { steps, reason: "the option distilled says so" };
  if (found) return { steps, reason: `the name "${found.name}" says "${found.word}"` };
  if (scheduler.className === "FlowMatchLCMScheduler")
    return { steps, reason: `its scheduler is ${scheduler.className}`, isByScheduler: true };
  return null;

  /** Those of LoRAs first, which may make a distilled model of another, then its own name. */
  async function namesOf({ transformer: { weights }, loras }: Checkpoint): Promise<string[]> {
    const index = await readJsonObject(join(folder, "model_index.json")).catch(() => null);
    const made = await readJsonObject(join(folder, "transformer", "config.json")).catch(() => null);
    const origins = [index, made].flatMap((json) =>
      typeof json?._name_or_path === "string" ? [checkpointName(json._name_or_path)] : [],
    );
    // A link to a folder is often called by what the folder is used for.
    const folders = [folder, await realpath(folder)].map(checkpointName);
    const merged = loras.flatMap(({ name, file }) => [name, checkpointName(file)]);
    return [...merged, ...folders, ...weights.files.map(({ file }) => basename(file)), ...origins];
  }
}
