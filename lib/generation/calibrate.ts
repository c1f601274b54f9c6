/**
 * Calibration: for a model, sizes and guidance scales the schedules of few steps that come nearest to a run of many
 * (schedule-search.ts), for each budget of evaluated rows. Every schedule is written as soon as it is found, so that a run that was
 * stopped goes on.
 */

import { createHash } from "node:crypto";
import { readFile, rm, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import * as z from "zod";
import {
  calibratedSchema,
  identityOf,
  isModelOf,
  type ModelIdentity,
  namedModelSchema,
  schedulesVersion,
} from "../checkpoint/index.js";
import { makeFolders, writeFileAtomic } from "../common/files.js";
import { packageVersion } from "../common/package.js";
import { OptionError, OutputError } from "../errors.js";
import type { CalibratedEntry, CalibrateProgress, Size } from "../model.js";
import { rowsOf } from "../schedule/index.js";
import { type ReferencePlace, type ReferenceSettings, referenceOf } from "./calibration-reference.js";
import { isWorthwhile, ScheduleSearch, type SearchSubject } from "./schedule-search.js";

export interface CalibrationSettings extends ReferenceSettings {
  readonly sizes: readonly Size[];
  readonly guidanceScales: readonly number[];
  readonly steps: readonly number[];
  /** Whether schedules are found too that leave the first or the last steps without guidance. */
  readonly intervals: boolean;
  /** Whether what the file holds is fitted again. */
  readonly reset: boolean;
  /** Of the settings those that were named: what the file holds of others is fitted again as well. */
  readonly named: readonly ("pictures" | "seed" | "prompts")[];
  readonly onProgress?: ((progress: CalibrateProgress) => void) | undefined;
}

export interface CalibrationPlace extends ReferencePlace {
  /** Where schedules are written, beside those that are there. */
  readonly file: string;
}

/** The file as it is written; what it holds besides is kept. */
interface SchedulesJson {
  readonly version: number;
  readonly model: string;
  readonly variant?: string | null | undefined;
  readonly samples?: readonly number[] | undefined;
  readonly calibrated: readonly CalibratedEntry[];
}

/** @returns the schedules for all that was asked for, those that were in the file already among them */
export async function calibrate(place: CalibrationPlace, settings: CalibrationSettings): Promise<CalibratedEntry[]> {
  const { sizes, guidanceScales, steps: counts, intervals, onProgress } = settings;
  const file = await ScheduleFile.open(place);
  const found: CalibratedEntry[] = [];
  const prompts = digestOfPrompts(settings);
  const own = { pictures: settings.pictures, seed: settings.seed, prompts };
  const isAsAsked = (each: CalibratedEntry) => settings.named.every((name) => each[name] === own[name]);
  const total = sizes.length * guidanceScales.length * (counts.length + 1);
  const progress: Progress = { launches: 0, now: null };
  const observed = { ...place, run: withLaunchesTold(place.run, progress, onProgress) };
  let done = 0;
  for (const size of sizes) {
    // Strong guidance first: what was fitted to it is a good start for milder guidance, and not the reverse.
    let stronger: readonly CalibratedEntry[] = [];
    for (const guidanceScale of [...guidanceScales].sort((a, b) => b - a)) {
      const report = (phase: CalibrateProgress["phase"], part = 0) => {
        progress.now = { phase, ...size, guidanceScale, done: done + part, total };
        onProgress?.({ ...progress.now, launches: progress.launches });
      };
      // The reference of a size and a scale counts as a schedule does.
      let isReferenceDone = false;
      const referenceDone = () => {
        if (!isReferenceDone) done++;
        isReferenceDone = true;
        report("fitting");
      };
      const search = searchOf(observed, settings, { size, scale: guidanceScale, prompts }, report, referenceDone);
      const isHere = (each: CalibratedEntry) => isOf(each, size, guidanceScale);
      /** What was fitted to a number of steps, so many of them without guidance; those of scale 1 have none that could be without. */
      const alike = (steps: number, without: number) => (each: CalibratedEntry) =>
        each.guided.length === steps && withoutOf(each) === without;
      /** One of the file, if it is not to be fitted again, or a new one, which is then written. */
      const entry = async (
        steps: number,
        without: number,
        find: (search: ScheduleSearch, neighbours: readonly CalibratedEntry[]) => Promise<CalibratedEntry>,
      ) => {
        const near = file.entries.filter(alike(steps, without));
        const own = near.find(isHere);
        const elsewhere = near.find((each) => each.guidanceScale === guidanceScale && !isHere(each));
        const neighbours = [own, stronger.find(alike(steps, without)), elsewhere].filter((each) => each !== undefined);
        const one = own?.psnr && !settings.reset && isAsAsked(own) ? own : await find(await search(), neighbours);
        if (one !== own) await file.add(one, (each) => isHere(each) && alike(steps, without)(each));
        found.push(one);
        here.push(one);
        return one;
      };
      /** What is fitted again in this run decides nothing before that. */
      const isReset = ({ guided }: CalibratedEntry) => settings.reset && counts.includes(guided.length);
      const here: CalibratedEntry[] = [];
      for (const steps of counts) {
        let last = await entry(steps, 0, (search, neighbours) => search.whole(steps, neighbours));
        // As long as it pays, one guided step less at one of the ends.
        for (let without = 1; intervals && guidanceScale > 1 && without < steps; without++) {
          const others = file.entries.filter((each) => isHere(each) && !isReset(each));
          if (without > 1 && !isWorthwhile(last, [...others, ...here])) break;
          const more = last;
          last = await entry(steps, without, (search, neighbours) => search.shorter(more, neighbours));
        }
        if (settings.reset && intervals)
          await file.remove(
            (each) => isHere(each) && each.guided.length === steps && !here.some(alike(steps, withoutOf(each))),
          );
        done++;
        report("fitting");
      }
      referenceDone();
      stronger = here;
    }
  }
  return found;
}

/** Of what pictures show that schedules are fitted to. */
const digestOfPrompts = ({ prompts, sequenceLength }: CalibrationSettings) =>
  createHash("sha256")
    .update(JSON.stringify([prompts, sequenceLength]))
    .digest("hex")
    .slice(0, 16);

interface Progress {
  launches: number;
  /** What was reported last. */
  now: Omit<CalibrateProgress, "launches"> | null;
}

/** A fit takes many launches: each is told, so that what is shown moves. */
function withLaunchesTold(
  run: ReferencePlace["run"],
  progress: Progress,
  onProgress: CalibrationSettings["onProgress"],
): ReferencePlace["run"] {
  return async (program) => {
    const result = await run(program);
    progress.launches++;
    if (progress.now) onProgress?.({ ...progress.now, launches: progress.launches });
    return result;
  };
}

/** The search at a size and a guidance scale, whose reference is run when it is needed first. */
function searchOf(
  place: CalibrationPlace,
  settings: CalibrationSettings,
  { size, scale, prompts }: Pick<SearchSubject, "size" | "scale" | "prompts">,
  report: (phase: CalibrateProgress["phase"], part?: number) => void,
  referenceDone: () => void,
): () => Promise<ScheduleSearch> {
  let opened: ScheduleSearch | null = null;
  return async () => {
    if (!opened) {
      const reference = await referenceOf(place, settings, size, scale, (part) => report("reference", part));
      opened = new ScheduleSearch({ ...settings, reference, size, scale, prompts }, settings.steps);
    }
    referenceDone();
    return opened;
  };
}

const isOf = (each: CalibratedEntry, { width, height }: Size, guidanceScale: number) =>
  each.width === width && each.height === height && each.guidanceScale === guidanceScale;

/** Steps without guidance, of a schedule that has some with it. */
const withoutOf = ({ guided }: CalibratedEntry) => (guided.includes(true) ? guided.filter((each) => !each).length : 0);

/** The file of schedules while it grows. */
class ScheduleFile {
  readonly #file: string;
  readonly #identity: ModelIdentity;
  #json: SchedulesJson;

  private constructor(file: string, identity: ModelIdentity, json: SchedulesJson) {
    this.#file = file;
    this.#identity = identity;
    this.#json = json;
  }

  static async open({ checkpoint, file }: CalibrationPlace): Promise<ScheduleFile> {
    await tryToWrite(file);
    const identity = identityOf(checkpoint);
    return new ScheduleFile(file, identity, await readJson(file, identity));
  }

  get entries(): readonly CalibratedEntry[] {
    return this.#json.calibrated;
  }

  /** Takes out what an earlier run has found and this one has not looked at. */
  async remove(isStale: (each: CalibratedEntry) => boolean): Promise<void> {
    if (!this.#json.calibrated.some(isStale)) return;
    const now = await readJson(this.#file, this.#identity);
    this.#json = { ...now, calibrated: now.calibrated.filter((each) => !isStale(each)) };
    await writeFileAtomic(this.#file, formatted(this.#json));
  }

  /** Writes an entry in place of those that it replaces, beside what others have found meanwhile. */
  async add(entry: CalibratedEntry, replaces: (each: CalibratedEntry) => boolean): Promise<void> {
    const now = await readJson(this.#file, this.#identity);
    this.#json = { ...now, calibrated: sorted([...now.calibrated.filter((each) => !replaces(each)), entry]) };
    await writeFileAtomic(this.#file, formatted(this.#json));
  }
}

const sorted = (entries: CalibratedEntry[]) =>
  entries.sort(
    (a, b) =>
      a.width * a.height - b.width * b.height ||
      a.guidanceScale - b.guidanceScale ||
      a.weights.length - b.weights.length ||
      rowsOf(b) - rowsOf(a),
  );

/** The text of a file of schedules: JSON with a line for each schedule. */
export function formatted({ calibrated, ...others }: { readonly calibrated: readonly unknown[] }): string {
  const lines = calibrated.map((each) => `    ${JSON.stringify(each)}`).join(",\n");
  return `${JSON.stringify(others, null, 2).slice(0, -2)},\n  "calibrated": [\n${lines}\n  ]\n}\n`;
}

/** @throws OutputError where the file cannot be written */
async function tryToWrite(file: string): Promise<void> {
  const refuse = (reason: string, cause?: unknown): never => {
    throw new OutputError(file, `The schedules cannot be written to ${file}: ${reason}`, { cause });
  };
  const existing = await stat(file).catch(() => null);
  if (existing?.isDirectory()) refuse("it is a folder.");
  const trial = `${file}.${process.pid}.tmp`;
  try {
    await makeFolders(path.dirname(file));
    await writeFile(trial, "");
    await rm(trial);
  } catch (cause) {
    refuse((cause as Error).message, cause);
  }
}

/**
 * What the file holds, if it is there. A ladder alone belongs to whatever model it lies with.
 * @throws OptionError for one that cannot be read, or is another model's
 */
async function readJson(file: string, identity: ModelIdentity): Promise<SchedulesJson> {
  const refuse = (reason: string): never => {
    throw new OptionError("file", `${file} ${reason}. Remove it, or name another file.`);
  };
  const text = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) =>
    error.code === "ENOENT" ? "{}" : refuse(`cannot be read (${error.message})`),
  );
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    refuse(`is not JSON (${(cause as Error).message})`);
  }
  const { success, data } = fileSchema.safeParse(json);
  if (!success) return refuse("is no file of schedules");
  const { version = schedulesVersion, calibrated = [] } = data;
  const isOther = data.model !== undefined && !(await isModelOf(data, identity));
  if (version !== schedulesVersion || isOther) refuse("holds schedules of another model or version");
  return {
    ...data,
    // What names the model stays: these are the same weights, perhaps in another precision.
    ...(data.model === undefined ? await namedModelOf(identity) : { model: data.model }),
    ...{ version, made: `flowturbo ${packageVersion()}`, calibrated: calibrated as unknown as CalibratedEntry[] },
  };
}

/** What a file that is begun says of its model. */
async function namedModelOf({ variant, fingerprint, samples }: ModelIdentity) {
  return { model: await fingerprint(), ...(variant && { variant }), samples: await samples() };
}

const fileSchema = namedModelSchema.extend({
  version: z.number().optional(),
  calibrated: z.array(calibratedSchema).optional(),
});
