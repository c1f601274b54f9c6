/**
 * What the transformer is run with in some steps of a run: LoRAs, ControlNets, skip-layer guidance. Each has variants of the
 * step's graph; which one a step launches follows from its place among all steps. The refiner, which was trained for velocities
 * without them, is run without.
 */

import { graphName, guidedKeysOf, type LoraRank, listed, type Variants } from "../networks/index.js";
import type { Schedule, StepLaunch } from "../schedule/index.js";

/** What the steps of a run may have. */
export interface Additions {
  /** Matrices of LoRAs, in all steps. */
  readonly lora: { readonly rank: LoraRank; readonly down: number; readonly up: number } | null;
  /** ControlNets in the order of the graph's inputs, each in the steps of its interval. */
  readonly controls: readonly ControlKind[];
  /** Skip-layer guidance, in guided steps of its interval. */
  readonly skipLayers: SkippedLayers | null;
}

export const noAdditions: Additions = { lora: null, controls: [], skipLayers: null };

/** A ControlNet of a kind of pictures. */
export interface ControlKind {
  /** Id of the ControlNet. */
  readonly id: string;
  /** Of the control latents, with what else it reads. */
  readonly channels: number;
  readonly scale: number;
  readonly start: number;
  readonly stop: number;
}

/** Skip-layer guidance, settled. */
export interface SkippedLayers {
  /** Rising, each once. */
  readonly layers: readonly number[];
  readonly scale: number;
  readonly start: number;
  readonly stop: number;
}

/** Which steps of a run a stage has. */
export interface StepPlace {
  /** Number of the first one, from 0. */
  readonly first: number;
  /** Steps of all stages. */
  readonly steps: number;
}

/** A stage as far as it matters here. */
export interface PlacedStage {
  readonly schedule: Schedule;
  /** Default: its blocks are all steps. */
  readonly place?: StepPlace | undefined;
}

/** What one step has of what the run has. */
export interface StepAdditions {
  readonly lora: Additions["lora"];
  /** Those that guide it, with their numbers among all of the run. */
  readonly controls: readonly (readonly [index: number, control: ControlKind])[];
  readonly skipLayers: SkippedLayers | null;
  /** Of the step's graph. */
  readonly variants: Variants;
}

/** What a launch of the transformer has. */
export function additionsAt(
  { lora, controls, skipLayers }: Additions,
  stage: PlacedStage,
  { block, guidance }: Pick<StepLaunch, "block" | "guidance">,
): StepAdditions {
  const { first, steps } = placeOf(stage);
  const at = first + block;
  const active = [...controls.entries()].filter(([, control]) => isControlled(control, at, steps));
  const skipped = guidance !== null && skipLayers && skipsLayers(skipLayers, at, steps) ? skipLayers : null;
  const variants = {
    ...(lora && { lora: lora.rank }),
    ...(active.length > 0 && { controls: listed(active.map(([, { id }]) => id)) }),
    ...(skipped && { skipped: listed(skipped.layers) }),
  };
  return { lora, controls: active, skipLayers: skipped, variants };
}

/** Names of the graphs of the transformer that the steps of a run launch, each once. */
export function predictGraphs(
  additions: Additions,
  mode: "cfg" | "cfg_zero",
  stages: readonly PlacedStage[],
): ReadonlySet<string> {
  const names = stages.flatMap((stage) =>
    launchesOf(stage).map((launch) => {
      const [key] = guidedKeysOf("predict", [launch.guidance !== null], mode);
      return graphName({ ...key!, ...additionsAt(additions, stage, launch).variants });
    }),
  );
  return new Set(names);
}

/** Of each stage whether some step of it is controlled. */
export function controlledStages(
  control: Pick<ControlKind, "start" | "stop">,
  stages: readonly PlacedStage[],
): boolean[] {
  return stages.map((stage) => {
    const { first, steps } = placeOf(stage);
    return launchesOf(stage).some(({ block }) => isControlled(control, first + block, steps));
  });
}

/** Whether some step of a run has skip-layer guidance. */
export function hasSkippedStep(skipped: SkippedLayers, stages: readonly PlacedStage[]): boolean {
  return stages.some((stage) =>
    launchesOf(stage).some(
      (launch) => additionsAt({ ...noAdditions, skipLayers: skipped }, stage, launch).skipLayers !== null,
    ),
  );
}

const placeOf = ({ schedule, place = { first: 0, steps: schedule.blocks.length } }: PlacedStage): StepPlace => place;

const launchesOf = ({ schedule }: PlacedStage) => schedule.launches.filter(({ type }) => type === "predict");

/** As in diffusers' pipeline, strictly between both ends. */
function skipsLayers({ start, stop }: SkippedLayers, step: number, steps: number): boolean {
  return steps * start < step && step < steps * stop;
}

/** As in diffusers' pipeline: not if the step begins before `start` or ends after `stop`. */
function isControlled({ start, stop }: Pick<ControlKind, "start" | "stop">, step: number, steps: number): boolean {
  return !(step / steps < start || (step + 1) / steps > stop);
}
