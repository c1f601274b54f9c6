/**
 * The files that name the parts of a repository or folder, and the form of their entries: for folders on disk and for
 * listings of repositories.
 */

import { posix } from "node:path";

/** Files that name the parts, the one that counts first: that of pipelines, and that of modular ones. */
export const indexFiles = ["model_index.json", "modular_model_index.json"] as const;

/** What an index says of a part. */
export interface IndexEntry {
  /** Its class, unchecked; null for a part that is not there. */
  readonly className: unknown;
  /** In the folder of the index; "." for that folder. It may leave it. */
  readonly folder: string;
  /** The variant that a modular index names for this part. */
  readonly variant?: string | undefined;
  /** The repository that a modular index names for this part. */
  readonly origin?: string | undefined;
}

/**
 * @param part its name
 * @param entry [library, class], [library, class, loading] of a modular pipeline, or the class alone
 */
export function readIndexEntry(part: string, entry: unknown): IndexEntry {
  if (!Array.isArray(entry)) return { className: entry ?? null, folder: part };
  const [, name = null, loading] = entry as readonly unknown[];
  if (typeof loading !== "object" || loading === null) return { className: name, folder: part };
  const { type_hint: hint, ...from } = loading as Record<string, unknown>;
  const text = (key: string) => (typeof from[key] === "string" && from[key] !== "" ? from[key] : undefined);
  const [subfolder, origin] = [text("subfolder"), text("pretrained_model_name_or_path") ?? text("repo")];
  // What a pipeline was saved without has a type and no place.
  const isThere = subfolder !== undefined || origin !== undefined;
  return {
    className: isThere ? ((Array.isArray(hint) ? hint[1] : undefined) ?? name) : null,
    folder: posix.normalize(subfolder ?? ".").replace(/(?<=.)\/$/, ""),
    variant: text("variant"),
    origin,
  };
}

/** Whether a part lies in another repository: a folder with an index holds no part beside it. */
export function isElsewhere({ folder, origin }: Pick<IndexEntry, "folder" | "origin">): boolean {
  return folder === "." && origin !== undefined;
}

/** What to do about parts that a modular index takes from another repository. */
export function remedyForParts(origin: string): string {
  return (
    `Parts of other repositories are not fetched. Pass ${origin} as the model if it has all parts; else collect them with diffusers in Python: ` +
    "ModularPipeline.from_pretrained(name), load_components(), save_pretrained(folder)"
  );
}
