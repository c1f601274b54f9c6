/**
 * How a scheduler of diffusers steps where a sampler of this package steps alike: the settings of its config that change the steps of
 * DPM-Solver++ and UniPC.
 */

export interface Solver {
  /** Name of the sampler. */
  readonly sampler: "dpmpp_2m" | "unipc";
  /** The largest order of a step: 1 to 3 for DPM-Solver++, 1 or 2 for UniPC. */
  readonly order: number;
  /** Of DPM-Solver++ how a step of second order weighs the change (midpoint or heun), of UniPC the function B(h). */
  readonly type: "midpoint" | "heun" | "bh1" | "bh2";
  /** Whether the last steps are of lower order; with DPM-Solver++ only of fewer than 15. */
  readonly lowerOrderFinal: boolean;
  /** Whether the last step of DPM-Solver++ is of first order, however many there are. */
  readonly eulerAtFinal: boolean;
  /** Steps, from 0, after which UniPC does not correct. */
  readonly uncorrected: readonly number[];
  /** Noise level after the last step; "last" for that of the last step again. */
  readonly end: number | "last";
  /** Ends of levels that are spaced as those of Karras et al. and mapped to s/(1 + s) after; null for even ones. */
  readonly karras: { readonly high: number; readonly low: number } | null;
  /** Keys of the config that the sampler does not compute, each with what to set instead. */
  readonly unsupported: readonly { readonly key: string; readonly value: unknown; readonly instead: string }[];
}

/** Where a schedule's blocks are in the whole of which it is a part. */
export interface SolverPlace {
  /** Steps before the first block. */
  readonly skipped: number;
  /** Steps of the whole. */
  readonly steps: number;
}

/** The defaults of diffusers. */
export const usualSolver = {
  order: 2,
  lowerOrderFinal: true,
  eulerAtFinal: false,
  uncorrected: [],
} as const;
