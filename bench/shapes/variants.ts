/**
 * The embedded model with something left out: a folder of links to its files.
 */

import { mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import path from "node:path";
import { root } from "../support.js";

export const shapesFolder = path.join(root, "models/shapes");

/** What benchmarks read of an entry of schedules.json. */
export interface CalibratedEntry {
  readonly width: number;
  readonly guidanceScale: number;
  readonly guided: readonly boolean[];
  /** Guidance scale of each step as a multiple of the whole; absent where all are 1. */
  readonly scales?: readonly number[];
  readonly sigmas: readonly number[];
  readonly rows: number;
  readonly psnr: { readonly held: number; readonly uncalibrated: number };
  readonly refined?: boolean;
}

const schedules = JSON.parse(readFileSync(path.join(shapesFolder, "schedules.json"), "utf8")) as {
  calibrated: CalibratedEntry[];
};

/** What the embedded model was calibrated to. */
export const calibratedEntries: readonly CalibratedEntry[] = schedules.calibrated;

/**
 * A folder in bench/.work, made anew.
 *
 * @param without names of files and folders that it lacks
 * @param isKept which calibrated schedules it has (default: all)
 */
export function shapesVariant(
  name: string,
  { without = [], isKept }: { without?: readonly string[]; isKept?: (entry: CalibratedEntry) => boolean },
): string {
  const folder = path.join(root, "bench/.work", name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const written = isKept ? ["schedules.json"] : [];
  for (const part of readdirSync(shapesFolder))
    if (![...without, ...written].includes(part)) symlinkSync(path.join(shapesFolder, part), path.join(folder, part));
  if (isKept) {
    const calibrated = calibratedEntries.filter(isKept);
    writeFileSync(path.join(folder, "schedules.json"), JSON.stringify({ ...schedules, calibrated }));
  }
  return folder;
}
