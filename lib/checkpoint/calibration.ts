/** Where a checkpoint's calibration is: beside its weights, or in the cache where that folder cannot be written or the checkpoint is one file. */

import { constants } from "node:fs";
import { access, readFile } from "node:fs/promises";
import path from "node:path";
import { filledLines } from "../common/text.js";
import { type Checkpoint, fingerprintOf, identityOf } from "./checkpoint.js";
import { exists } from "./files.js";
import { readSchedules, type StoredSchedules } from "./schedules.js";

/** Where calibrated schedules are written: in the model's folder where it has one and that is allowed, else in the cache by the model's digest. */
export async function calibrationFile(checkpoint: Checkpoint, cache: string): Promise<string> {
  const { schedulesFile } = checkpoint;
  const isAllowed = (folder: string) =>
    access(folder, constants.W_OK).then(
      () => true,
      () => false,
    );
  return schedulesFile !== null && (await isAllowed(path.dirname(schedulesFile)))
    ? schedulesFile
    : cachedFile(cache, await fingerprintOf(checkpoint));
}

const cachedFile = (cache: string, fingerprint: string) => path.join(cache, "schedules", `${fingerprint}.json`);

/** The prompts that a model brings for calibration, one a line. */
export async function calibrationPromptsOf(folder: string): Promise<string[] | null> {
  const text = await readFile(path.join(folder, "prompts.txt"), "utf8").catch(() => null);
  const prompts = filledLines(text ?? "");
  return prompts.length >= 2 ? prompts : null;
}

/** Schedules that were calibrated for a checkpoint: its own, and those of the cache. */
export async function calibratedSchedulesOf(
  checkpoint: Checkpoint,
  cache: string,
): Promise<StoredSchedules["calibrated"]> {
  const own = checkpoint.schedules.calibrated;
  // Most caches have none: then the model's digest, which reads its weights, is not needed.
  if (!(await exists(path.join(cache, "schedules")))) return own;
  const file = cachedFile(cache, await fingerprintOf(checkpoint));
  const later = (await readSchedules(file, identityOf(checkpoint)))?.calibrated ?? [];
  // What the user found counts more than what came with the model.
  const key = ({ width, height, guidanceScale, weights }: StoredSchedules["calibrated"][number]) =>
    [width, height, guidanceScale, weights.length].join();
  const found = new Set(later.map(key));
  return [...own.filter((each) => !found.has(key(each))), ...later];
}
