/**
 * A checkpoint in one .safetensors file, as Stability publishes them and ComfyUI saves them: its tensors under the names that the networks
 * ask for, none of them copied. Weights that share a tensor are rows of it; what a file cannot say comes from a base or from the public models.
 */

import { realpath } from "node:fs/promises";
import { type FileVersion, versionOf } from "../../common/files.js";
import { CheckpointError } from "../../errors.js";
import { readSafetensorsHeader } from "../safetensors.js";
import { locatedWeights, type Weights } from "../weights.js";
import { type BaseConfig, configOf, type FileConfigs } from "./configs.js";
import { refuseAlike, refuseOtherFormats, refuseOthers, refuseShards } from "./kinds.js";
import { type FilePart, fileParts, leftOver, type NamedTensors, namedTensors } from "./naming.js";

export type { BaseConfig, FileConfigs, FilePart };
export { fileParts };

/** A part of a file. */
export interface PartInFile<Name extends FilePart> {
  readonly weights: Weights;
  /** @throws CheckpointError for shapes that fit no such part, and for a base of other shapes */
  config(base: BaseConfig<FileConfigs[Name]> | null): FileConfigs[Name];
}

/** The parts of a file; null for those that it does not have. */
export type SingleFile = { readonly [Name in FilePart]: PartInFile<Name> | null };

/**
 * Reads the header of a checkpoint in one file. There is a transformer.
 * @returns its parts, and what is in the file and not read
 * @throws CheckpointError for a file that is none, with what it is instead. `signal.reason` after an abort.
 */
export async function readSingleFile(
  path: string,
  signal?: AbortSignal,
): Promise<{ readonly parts: SingleFile; readonly warnings: readonly string[] }> {
  await refuseOtherFormats(path);
  const header = await readSafetensorsHeader(path, { signal });
  refuseAlike(path, header);
  refuseShards(path);
  // Without links, as runtimes open it.
  const file = await realpath(path);
  const version = await versionOf(file);
  const named = fileParts.map((name) => namedTensors(path, header, name));
  const parts = fileParts.map((name, index) => {
    const tensors = named[index]!;
    const weights = tensors && weightsOf(path, version, tensors);
    return [name, tensors && { weights, config: (base: never) => configOf(name, path, tensors, base) }];
  });
  const found = Object.fromEntries(parts) as SingleFile;
  if (!found.transformer) refuseOthers(path, header);
  const unread = leftOver(header, named);
  const warning =
    `${unread.length} of the tensors in ${path} have names of no part that is known, such as "${unread[0]}", and are not read. ` +
    "Names of text encoders begin with text_encoders.clip_l.transformer. and the like, those of the VAE with first_stage_model.";
  return { parts: found, warnings: unread.length > 0 ? [warning] : [] };
}

/**
 * What a folder is that holds .safetensors files and no model_index.json.
 * @throws CheckpointError, always: with the file that is a checkpoint, or with what the first one is instead
 */
export async function refuseFolderOf(folder: string, files: readonly string[]): Promise<never> {
  const reasons: unknown[] = [];
  for (const file of files) {
    const found = await readSingleFile(file).catch((error) => void reasons.push(error));
    if (found)
      throw new CheckpointError(
        folder,
        `${folder} is a folder without model_index.json. It holds a checkpoint in one file: pass that file, ${file}.`,
      );
  }
  throw reasons[0];
}

function weightsOf(origin: string, version: FileVersion, tensors: NamedTensors): Weights {
  const { entries, reversedHalves, identities, storedName } = tensors;
  const located = [...entries].map(([name, entry]) => [name, { file: version.file, entry }] as const);
  return {
    ...locatedWeights(origin, [version], new Map(located)),
    ...{ reversedHalves, identities, storedName },
    // Marks have no values.
    names: [...entries].flatMap(([name, { length }]) => (length > 0 ? name : [])),
  };
}
