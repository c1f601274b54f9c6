/**
 * The noise levels that a schedule visits: n + 1 of them for n blocks, falling from 1 (noise) to 0 (image). Spacings are those of
 * diffusers' schedulers, for exact parity, and one that is shifted evenly.
 */

import { table } from "../common/table.js";
import { betaQuantile } from "./beta.js";
import type { Solver } from "./solvers.js";
import { easing, stiffness } from "./stiffness.js";

/** How a scheduler shifts by the size of the picture: `use_dynamic_shifting`. */
export interface DynamicShift {
  /** μ is linear in the patches of a picture: its value at `baseTokens` of them. */
  readonly baseShift: number;
  /** Its value at `maxTokens` patches. */
  readonly maxShift: number;
  /** Patches of a small picture. */
  readonly baseTokens: number;
  /** Patches of a large picture. */
  readonly maxTokens: number;
  /** The shift is e^μ, or μ itself. */
  readonly type: "exponential" | "linear";
}

/** What noise levels depend on: values of the checkpoint's scheduler. */
export interface SchedulerSettings {
  /** Shift towards noise, 3 for SD3. */
  readonly shift: number;
  /** Steps that the model was trained with, 1000. */
  readonly numTrainTimesteps: number;
  /** Null for a shift that is the same for all sizes. */
  readonly dynamic?: DynamicShift | null;
  /** Spacing between the ends of diffusers' levels, where the scheduler has one. */
  readonly spacing?: "karras" | "exponential" | "beta" | null | undefined;
  /** Level of the last step, to which the others are stretched: `shift_terminal`. Null for none. */
  readonly terminal?: number | null;
  /** How the scheduler steps, where a sampler of this package steps alike; null otherwise. */
  readonly solver?: Solver | null;
}

/** The same for one request. */
export interface SigmaSettings extends Pick<SchedulerSettings, "numTrainTimesteps" | "spacing" | "terminal"> {
  /** Shift of the noise levels at the request's size. */
  readonly shift: number;
  /** Whether the shift follows from the size. */
  readonly isDynamic?: boolean;
  /** The largest guidance scale; 1, which is the default, without guidance. */
  readonly guidance?: number;
  /** How the scheduler steps, if the request's sampler takes its steps. */
  readonly solver?: Pick<Solver, "end" | "karras"> | null | undefined;
}

/**
 * The settings for a picture.
 * @param patches of the picture: tokens that the transformer has for it
 * @param given a shift, which takes the place of a dynamic one, or μ
 */
export function sigmaSettings(
  { shift, dynamic, ...scheduler }: SchedulerSettings,
  patches: number,
  given: { readonly shift?: number | undefined; readonly mu?: number | undefined } = {},
): SigmaSettings {
  const { numTrainTimesteps, spacing, terminal } = scheduler;
  const fixed = { numTrainTimesteps, spacing, ...(terminal && { terminal }) };
  if (!dynamic || given.shift !== undefined) return { ...fixed, shift: given.shift ?? shift };
  const { baseShift, maxShift, baseTokens, maxTokens, type } = dynamic;
  const slope = (maxShift - baseShift) / (maxTokens - baseTokens);
  // In the order of diffusers' calculate_shift, so that it is rounded alike.
  const mu = given.mu ?? patches * slope + (baseShift - slope * baseTokens);
  return { ...fixed, shift: type === "linear" ? mu : Math.exp(mu), isDynamic: true };
}

/** σ = s·u / (1 + (s − 1)·u): the resolution-dependent shift of SD3 (Esser et al. 2024, section 5.3.2). */
export function shiftSigma(u: number, shift: number): number {
  return (shift * u) / (1 + (shift - 1) * u);
}

/**
 * The same for u above 0, rounded as diffusers rounds it, which writes a dynamic shift as s / (s + 1/u − 1): multistep schedulers cut a
 * level off to a whole training step, and a last level that was stretched to 0.05 may be just below it.
 */
function roundedShift(u: number, { shift, isDynamic = false }: Pick<SigmaSettings, "shift" | "isDynamic">): number {
  return isDynamic ? shift / (shift + (1 / u - 1)) : shiftSigma(u, shift);
}

/**
 * Denser at both ends than evenly shifted levels, and shifted further where few steps meet strong guidance: t = i/n,
 * u = 1 − (t − a·sin(2πt)/(2π)), shifted by s·m, with m and a of stiffness.ts. For the blocks M and U.
 */
function easedSigmas(blocks: number, { shift, guidance = 1 }: SigmaSettings): number[] {
  const [m, a] = [stiffness(blocks, guidance), easing(blocks, guidance)];
  return Array.from({ length: blocks + 1 }, (_, i) => {
    const t = i / blocks;
    const u = 1 - (t - (a * Math.sin(2 * Math.PI * t)) / (2 * Math.PI));
    return i === blocks ? 0 : shiftSigma(u, shift * m);
  });
}

/**
 * n numbers from `from` to `to`; `from` alone for one. They are rounded as those of `numpy.linspace`: a whole training step is cut off
 * a level, and a level that is smaller in its last bit may be a step earlier.
 */
function even(from: number, to: number, n: number): number[] {
  const step = (to - from) / (n - 1);
  return Array.from({ length: n }, (_, i) => (i === 0 ? from : i === n - 1 ? to : i * step + from));
}

/** u_i = 1 − i/n, shifted once. The last two points are far enough apart to be worth an evaluation. */
export function shiftedSigmas(blocks: number, { shift }: Pick<SigmaSettings, "shift">): number[] {
  return Array.from({ length: blocks + 1 }, (_, i) => shiftSigma(1 - i / blocks, shift));
}

/** Levels stretched so that the last one is `terminal`, and 1 stays. One level of 1, which nothing stretches, stays too. */
function stretched(levels: number[], { terminal }: Pick<SigmaSettings, "terminal">): number[] {
  const last = levels.at(-1);
  if (!terminal || last === undefined || last === 1) return levels;
  const factor = (1 - last) / (1 - terminal);
  return levels.map((level) => 1 - (1 - level) / factor);
}

/**
 * FlowMatchEulerDiscreteScheduler.set_timesteps(n) without a spacing: that scheduler shifts twice, once when it finds its smallest σ
 * and once more over the linear spacing down to it. n = 4, shift 3: 1, .857692, .602151, .008929. A dynamic shift is done once.
 */
function flowMatchSigmas(blocks: number, settings: SigmaSettings): number[] {
  const { shift, numTrainTimesteps, isDynamic = false } = settings;
  const smallest = isDynamic ? 1 / numTrainTimesteps : shiftSigma(1 / numTrainTimesteps, shift);
  return stretched(
    even(1, smallest, blocks).map((u) => roundedShift(u, settings)),
    settings,
  );
}

/** Spacings between the ends of those levels, as diffusers has them: `use_karras_sigmas` and so on. q runs evenly from 0 to 1. */
const spacings = {
  /** Karras et al. 2022 (arXiv 2206.00364), equation 5, ρ = 7. */
  karras: (high: number, low: number, q: number) => (high ** (1 / 7) + q * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
  exponential: (high: number, low: number, q: number) =>
    Math.exp(Math.log(high) + q * (Math.log(low) - Math.log(high))),
  /** Quantiles of a beta distribution, α = β = 0.6 (arXiv 2407.12173). */
  beta: (high: number, low: number, q: number) => low + (high - low) * betaQuantile(1 - q, 0.6, 0.6),
};

const spaced =
  (spacing: keyof typeof spacings): Grid =>
  (blocks, settings) => {
    const levels = flowMatchSigmas(blocks, settings);
    const [high, low] = [levels[0]!, levels.at(-1)!];
    return [...even(0, 1, blocks).map((q) => spacings[spacing](high, low, q)), 0];
  };

/** FlowMatchEulerDiscreteScheduler.set_timesteps(n), with the spacing that the scheduler's config asks for. */
export function diffusersSigmas(blocks: number, settings: SigmaSettings): number[] {
  return settings.spacing ? spaced(settings.spacing)(blocks, settings) : [...flowMatchSigmas(blocks, settings), 0];
}

/**
 * DPMSolverMultistepScheduler.set_timesteps(n) with `use_flow_sigmas`: even levels from 1 − 1/T to 0, shifted, T being the
 * number of training steps. As there they are the complements of even levels from 1 to 1/T, so that they are rounded alike.
 */
export function dpmSolverSigmas(blocks: number, { shift, numTrainTimesteps, solver }: SigmaSettings): number[] {
  const alphas = even(1, 1 / numTrainTimesteps, blocks + 1);
  const levels = alphas.map((alpha) => shiftSigma(1 - alpha, shift)).reverse();
  return withEnd(levels.slice(0, -1), solver);
}

/**
 * UniPCMultistepScheduler.set_timesteps(n) with `use_flow_sigmas`: even levels from 1 to 1/T, shifted; 0 in place of the last. With
 * `use_karras_sigmas` they are those of Karras et al., mapped to s/(1 + s) and not shifted.
 */
export function uniPCSigmas(blocks: number, settings: SigmaSettings): number[] {
  const { numTrainTimesteps, solver } = settings;
  if (solver?.karras) {
    const { high, low } = solver.karras;
    const levels = even(0, 1, blocks).map((q) => spacings.karras(high, low, q));
    return withEnd(
      levels.map((level) => level / (level + 1)),
      solver,
    );
  }
  const linear = even(1, 1 / numTrainTimesteps, blocks + 1).slice(0, -1);
  const levels = stretched(
    linear.map((u) => roundedShift(u, settings)),
    settings,
  );
  // As there: λ is infinite at 1.
  return withEnd([levels[0]! - 1e-6, ...levels.slice(1)], solver);
}

/** Levels with the one after the last step. */
const withEnd = (levels: number[], solver: SigmaSettings["solver"]): number[] => [
  ...levels,
  solver?.end === "last" ? levels.at(-1)! : (solver?.end ?? 0),
];

/**
 * Noise levels that were given, as diffusers' pipelines take `sigmas`: shifted and stretched as the scheduler does, with 0 at the end.
 * @param levels falling, in (0, 1]; a last one of 0 is the end
 */
export function givenSigmas(
  levels: readonly number[],
  settings: Pick<SigmaSettings, "shift" | "isDynamic" | "terminal">,
): number[] {
  const shifted = levels.filter((level) => level > 0).map((level) => roundedShift(level, settings));
  return [...stretched(shifted, settings), 0];
}

/** Noise levels for a number of blocks. */
export type Grid = (blocks: number, settings: SigmaSettings) => number[];

const rows = table<Grid>()({
  eased: easedSigmas,
  shifted: shiftedSigmas,
  diffusers: diffusersSigmas,
  karras: spaced("karras"),
  exponential: spaced("exponential"),
  beta: spaced("beta"),
});

/** Name of a spacing of noise levels: see the option `grid`. */
export type GridName = keyof typeof rows;

/** The table of spacings, by the values of the option `grid`. A sampler may have another for "diffusers". */
export const sigmaGrids: Record<string, Grid> = rows;

/**
 * The noise levels of one of several stages: as `shiftedSigmas`, but from `sigma` instead of 1 where it starts from a
 * re-noised picture, and to `end` instead of 0 where the next one takes noise over.
 * u_0 = σ / (s − (s − 1)·σ), u_n likewise of the end, u_i = u_0 + (u_n − u_0)·i/n.
 */
export function upscaleSigmas(
  blocks: number,
  { shift }: Pick<SigmaSettings, "shift">,
  sigma: number,
  end = 0,
): number[] {
  const [first, last] = [sigma, end].map((level) => level / (shift - (shift - 1) * level)) as [number, number];
  return Array.from({ length: blocks + 1 }, (_, i) => {
    if (i === 0) return sigma;
    return i === blocks ? end : shiftSigma(last + (first - last) * (1 - i / blocks), shift);
  });
}

/**
 * How many blocks of a full schedule an image-to-image run of some strength skips: as diffusers, ⌊n − min(n·strength, n)⌋.
 * @param strength in (0, 1]; at least one block is left
 */
export function skippedBlocks(blocks: number, strength: number): number {
  return Math.floor(Math.max(blocks - Math.min(blocks * strength, blocks), 0));
}
