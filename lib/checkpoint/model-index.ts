/** model_index.json and modular_model_index.json: which parts a folder has, and where. */

import { basename, join } from "node:path";
import { type IndexEntry, indexFiles, readIndexEntry } from "../common/model-index.js";
import { CheckpointError } from "../errors.js";
import { exists, type JsonObject } from "./files.js";

/** Pipelines of SD3 differ in parts that are added to the same ones: a ControlNet, an image encoder, guiders. */
const pipelineClass = /^StableDiffusion3\w*Pipeline$/;

/** The file that names a folder's parts: as `StableDiffusion3Pipeline.from_pretrained`, and else as `ModularPipeline` does. */
export async function indexOf(root: string): Promise<string> {
  const [usual, modular] = indexFiles.map((name) => join(root, name)) as [string, string];
  return !(await exists(usual)) && (await exists(modular)) ? modular : usual;
}

/** Where the index says that a part is: its folder is in the checkpoint's. */
export type Place = Omit<IndexEntry, "className">;

/** A part that an index may name. */
export interface IndexedPart {
  /** Its entry. */
  readonly name: string;
  /** Classes that its entry may name. */
  readonly classes: readonly string[];
  /** Whether nothing can be drawn without it. */
  readonly required?: boolean;
}

/** Each text encoder with its tokenizer. */
const textParts = [
  ["text_encoder", "tokenizer"],
  ["text_encoder_2", "tokenizer_2"],
  ["text_encoder_3", "tokenizer_3"],
] as const;

/** The parts of a model index that are not null, by their names. @throws CheckpointError for an index of another model */
export function readModelIndex(file: string, json: JsonObject, parts: readonly IndexedPart[]): Map<string, Place> {
  const refuse = (message: string): never => {
    throw new CheckpointError(file, message);
  };
  const isModular = basename(file) === indexFiles[1];
  const pipeline = json._class_name;
  if (typeof pipeline !== "string" || !pipelineClass.test(pipeline))
    refuse(
      `${file}: _class_name is ${JSON.stringify(pipeline) ?? "absent"}; known are StableDiffusion3Pipeline and others ` +
        "whose names begin and end like it. Only Stable Diffusion 3 and 3.5 checkpoints can be read.",
    );
  const places = new Map<string, Place>();
  for (const { name: part, classes, required } of parts) {
    // A modular pipeline does not list what it was saved without.
    const entry = json[part] ?? (json[part] === null || isModular ? null : undefined);
    if (entry === undefined)
      refuse(`${file} lacks the part "${part}". A part that a checkpoint does without is [null, null].`);
    const { className: name, ...place } = readIndexEntry(part, entry);
    if (name === null && required)
      refuse(`${file}: the part "${part}" is null, but no picture can be made without it.`);
    if (name === null) continue;
    if (typeof name !== "string" || !classes.includes(name))
      refuse(
        `${file}: the part "${part}" is of the unknown class ${JSON.stringify(name)}; known for it are ${classes.join(", ")}.`,
      );
    if (leaves(place.folder))
      refuse(`${file}: the part "${part}" has the subfolder "${place.folder}", which leaves the folder.`);
    places.set(part, place);
  }
  // diffusers keeps the tokenizer of a T5 that is left out.
  if (!places.has("text_encoder_3")) places.delete("tokenizer_3");
  for (const pair of textParts) {
    const has = pair.find((part) => places.has(part));
    const lacks = pair.find((part) => !places.has(part));
    if (has && lacks)
      refuse(
        `${file}: "${lacks}" is null but "${has}" is not; a text encoder needs its tokenizer. Make both null or neither.`,
      );
  }
  return places;
}

const leaves = (folder: string) => /^[/\\]|[:\0]/.test(folder) || folder.split(/[/\\]/).includes("..");
