/**
 * The ways to draw a request: one, or with a time limit several, whose schedules differ. Which of them is taken is the service's choice.
 */

import { LruCache } from "../common/lru-cache.js";
import { OptionError } from "../errors.js";
import type { ResolvedGenerateOptions } from "../options.js";
import {
  type Block,
  defaultSampler,
  defaultsBeside,
  rowsOf,
  type ScheduleDefaults,
  usualDefaults,
} from "../schedule/index.js";
import { guidanceOf } from "./programs.js";
import {
  blocksOf,
  firstStage,
  fittedSchedule,
  fittedSchedulesOf,
  leavesGuidanceOpen,
  type RequestStage,
  risingStages,
  type StageFacts,
} from "./stages.js";

/** What candidates have to know of a model. */
export interface CandidateFacts extends StageFacts {
  /** The model's own schedules for time limits, the richest first; null where nobody wrote any. */
  readonly ladder: readonly (readonly Block[])[] | null;
  /** What is drawn with where a request says nothing. Default: as for a model that was not distilled. */
  readonly defaults?: ScheduleDefaults;
}

/** A way to draw a request. Those of a time limit differ in their schedules only. */
export interface Candidate {
  /** Schedules of its stages, such as "H1P7R2 H1P1". */
  readonly text: string;
  /** Name of the sampler. */
  readonly sampler: string;
  readonly stages: readonly RequestStage[];
  /** Whether some step of it is guided. */
  readonly isGuided: boolean;
}

const knownCandidates = new WeakMap<CandidateFacts, LruCache<[Candidate, ...Candidate[]]>>();

/** One way to draw a request, or with a time limit those of the ladder, each schedule once. Requests of a kind share them. */
export function candidatesOf(
  options: ResolvedGenerateOptions,
  model: CandidateFacts,
  pictures: number,
): [Candidate, ...Candidate[]] {
  const { deadlineMs, ladder, sampler, blocks, steps, stages, width, height, grid, image, strength } = options;
  const { sigmas, shift, mu, guidanceScale, guidanceStart, guidanceStop, guidanceMode } = options;
  const shape = {
    ...{ ladder, sampler, blocks, steps, stages, width, height, grid, strength, pictures, sigmas, shift, mu },
    ...{ guidanceScale, guidanceStart, guidanceStop, guidanceMode },
  };
  const key = JSON.stringify({ ...shape, isEdit: image !== undefined, isLimited: deadlineMs !== undefined });
  const kept = knownCandidates.get(model) ?? new LruCache(64);
  knownCandidates.set(model, kept);
  return kept.get(key) ?? kept.set(key, newCandidates(options, model, pictures));
}

function newCandidates(
  options: ResolvedGenerateOptions,
  model: CandidateFacts,
  pictures: number,
): [Candidate, ...Candidate[]] {
  const { deadlineMs, ladder, sampler, blocks, steps, stages, sigmas, guidanceScale } = options;
  if (ladder !== undefined && deadlineMs === undefined)
    throw new OptionError("ladder", "A ladder is for a time limit; give deadlineMs, or leave ladder out.");
  const fixed = { sampler, blocks, steps, stages, sigmas };
  for (const [name, value] of Object.entries(fixed))
    if (ladder !== undefined && value !== undefined)
      throw new OptionError("ladder", `The ladder says what may be run; leave out ${name} or ladder.`);
  const given = blocks === undefined || stages ? null : blocksOf(blocks, model.checkpoint);
  const isFixed = Object.values(fixed).some((value) => value !== undefined);
  if (deadlineMs === undefined || isFixed) return [candidateOf(options, model, pictures, given)];
  if (typeof guidanceScale !== "number")
    throw new OptionError(
      "guidanceScale",
      "A list of guidance scales is for a number of steps, which a time limit leaves open; give steps, or one scale.",
    );
  const candidates = new Map<string, Candidate>();
  let refused: unknown;
  // A ladder was written on purpose, which calibrating never does. A calibrated grid that is named has no blocks.
  const ofModel = options.grid === "calibrated" ? null : model.ladder;
  const written = ladder?.map((text) => blocksOf(text, model.checkpoint)) ?? ofModel;
  for (const rung of written ?? openRungs(options, model))
    try {
      const candidate =
        "steps" in rung
          ? candidateOf({ ...options, ...rung }, model, pictures, null)
          : candidateOf(options, model, pictures, rung);
      const key = candidate.stages.map(({ schedule }) => schedule.key).join();
      if (!candidates.has(key)) candidates.set(key, candidate);
    } catch (error) {
      // At some strengths what is left of a short schedule is not valid, and an interval of guidance may miss all of few steps; other
      // schedules may do. Where none does, it is said of the richest.
      if (ladder !== undefined || !(error instanceof OptionError)) throw error;
      refused ??= error;
    }
  const found = [...candidates.values()];
  // What was written is in its own order.
  if (!written) found.sort((a, b) => rowsOfCandidate(b) - rowsOfCandidate(a));
  const [first, ...others] = found;
  if (!first) throw refused;
  return [first, ...others];
}

const rowsOfCandidate = ({ stages }: Candidate) =>
  stages.reduce((sum, { schedule }) => sum + schedule.evaluations.rows, 0);

/** A number of steps, and the guidance scale of each. */
type Rung = Pick<ResolvedGenerateOptions, "guidanceScale"> & { readonly steps: number };

/**
 * Schedules for a time limit where none were written: of calibrated ones those that come nearer to the reference than any of no more rows
 * that was fitted at the same size, and the usual ones of other numbers of steps. Of equal rows those of the request's size come first.
 * @param options with one guidance scale
 */
function openRungs(options: ResolvedGenerateOptions, model: CandidateFacts): Rung[] {
  const scale = options.guidanceScale as number;
  const settled = { ...options, sampler: samplerOf(options, model, null) };
  const counts = [...new Set(model.calibrated.map(({ guided }) => guided.length))];
  const found = leavesGuidanceOpen(options)
    ? fittedSchedulesOf(settled, model)
    : counts.flatMap((steps) => fittedSchedule(settled, model, steps) ?? []);
  const all = found.map(({ width, height, guidance, psnr }) => {
    const guided = guidance.map((each) => each !== null);
    return { steps: guided.length, guided, rows: rowsOf({ guided }), size: `${width}x${height}`, psnr };
  });
  // How near few steps come differs between sizes, so that a PSNR of another size says nothing.
  const best = all.filter(({ rows, size, psnr }) =>
    all.every(
      (other) => other.size !== size || other.rows > rows || psnr === null || other.psnr === null || other.psnr <= psnr,
    ),
  );
  const known = new Set(all.map(({ steps }) => steps));
  return [
    ...best.map(({ steps, guided }) => ({
      steps,
      guidanceScale: leavesGuidanceOpen(options) ? guided.map((each) => (each ? scale : 1)) : scale,
    })),
    ...(model.defaults ?? usualDefaults).ladder
      .filter((steps) => !known.has(steps))
      .map((steps) => ({ steps, guidanceScale: scale })),
  ];
}

function candidateOf(
  options: ResolvedGenerateOptions,
  model: CandidateFacts,
  pictures: number,
  blocks: readonly Block[] | null,
): Candidate {
  const sampler = samplerOf(options, model, blocks);
  const stages = options.stages
    ? risingStages(options, options.stages, model, pictures)
    : [firstStage({ ...options, sampler, steps: stepsOf(options, model, blocks) }, model, pictures, blocks)];
  const text = stages.map(({ schedule }) => schedule.text).join(" ");
  return { text, sampler, stages, isGuided: guidanceOf(stages).guided };
}

/** Blocks and calibrated schedules are of the sampler that takes them, whatever the model. */
function samplerOf(
  { sampler, stages, grid }: ResolvedGenerateOptions,
  { defaults = usualDefaults }: CandidateFacts,
  blocks: readonly Block[] | null,
) {
  return sampler ?? (blocks || stages || grid === "calibrated" ? defaultSampler : defaults.sampler);
}

/** A distilled model has a number of steps that is its own, whatever the sampler. */
function stepsOf(
  { sampler, steps, sigmas, grid }: ResolvedGenerateOptions,
  model: CandidateFacts,
  blocks: readonly Block[] | null,
): number | undefined {
  const defaults = defaultsBeside(sampler, model.defaults);
  const isOpen = steps === undefined && sigmas === undefined && grid !== "calibrated" && !blocks;
  return isOpen && defaults.distilled ? defaults.steps : steps;
}
