/** What a checkpoint is called where its path must not be seen: in pictures' files and for a service's clients. */

import path from "node:path";

/**
 * The base name of a folder, or of a file without ".safetensors". A snapshot of a Hugging Face cache (models--<owner>--<name>/snapshots/<commit>) is called by the
 * repository's name; a root folder, which has no name, is called "model".
 */
export function checkpointName(folder: string): string {
  const absolute = path.resolve(folder);
  const snapshots = path.dirname(absolute);
  const repository = path.basename(path.dirname(snapshots));
  if (path.basename(snapshots) === "snapshots" && repository.startsWith("models--"))
    return repository.split("--").at(-1) || path.basename(absolute);
  return path.basename(absolute).replace(/\.safetensors$/, "") || "model";
}
