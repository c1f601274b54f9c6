/** The LoRAs that a model is loaded with: their names, which pictures and requests know them by, and those that are merged into the weights. */

import { type Checkpoint, mergeLoras, nameOfLora, readLora, type ScaledLora } from "../checkpoint/index.js";
import type { Logger } from "../common/logger.js";
import { OptionError } from "../errors.js";
import type { LoraSource } from "../model.js";
import { longestAdapterName } from "../options.js";

/** A LoRA of the option `loras`, with what was left open settled. */
export interface NamedLora {
  readonly file: string;
  readonly name: string;
  readonly scale: number;
  readonly dynamic: boolean;
}

/**
 * @param sources the option `loras` of `load`
 * @throws OptionError for two of one name, and for a dynamic one called as a file whose name is too long for requests; CheckpointError for a folder that holds no LoRA, or several
 */
export async function namedLoras(sources: readonly LoraSource[] = []): Promise<NamedLora[]> {
  const named = await Promise.all(
    sources.map(async ({ file, scale = 1, name, dynamic = false }) => ({
      ...{ file, scale, dynamic },
      name: name ?? (await nameOfLora(file)),
    })),
  );
  for (const [index, { name, file, dynamic }] of named.entries()) {
    if (dynamic && name.length > longestAdapterName)
      throw new OptionError(
        "loras",
        `The LoRA ${file} is called as its file, with more than ${longestAdapterName} characters, so that no request can name it. Give it a name: { file, name }, or on the command line --dynamic-lora name=file.`,
        { publicMessage: "A LoRA of loras has a name too long for requests." },
      );
    const before = named.slice(0, index).find((each) => each.name === name);
    if (before) throw twoLorasOfOneName(name, [before.file, file]);
  }
  return named;
}

export function twoLorasOfOneName(name: string, [first, second]: readonly [string, string]): OptionError {
  return new OptionError(
    "loras",
    `Two LoRAs of loras have the name "${name}": ${first} and ${second}. Give one of them another name: { file, name }, or on the command line --dynamic-lora name=file. One of --lora is called as its file.`,
    { publicMessage: `Two LoRAs of loras have the name "${name}".` },
  );
}

/**
 * The checkpoint with those LoRAs in its weights that are not dynamic. All are read before the first is merged; one with scale 0 is read, and left out.
 * @throws as `readLora` and `mergeLoras`
 */
export async function withMergedLoras(
  checkpoint: Checkpoint,
  loras: readonly NamedLora[],
  cache: string,
  options: { readonly signal?: AbortSignal | undefined; readonly logger?: Logger | undefined },
): Promise<Checkpoint> {
  const scaled: ScaledLora[] = [];
  for (const { file, name, scale, dynamic } of loras)
    if (!dynamic) scaled.push({ lora: await readLora(file, checkpoint, { ...options, name }), scale });
  return mergeLoras(checkpoint, scaled, cache, options);
}
