/**
 * Samplers that flowturbo does not offer, for comparison, as functions of a guided velocity: Euler on any sigmas,
 * DPM-Solver++(2M) in its form for flow models, and schedules whose R blocks merely reuse the last velocity.
 */

export type Values = Float32Array;
/** The guided velocity at x and σ. */
export type Velocity = (x: Values, sigma: number) => Promise<Values>;

/** x + Σ factor·value */
function combined(x: Values, ...terms: readonly (readonly [number, Values])[]): Values {
  const sum = Float32Array.from(x);
  for (const [factor, values] of terms) for (let i = 0; i < sum.length; i++) sum[i]! += factor * values[i]!;
  return sum;
}

export async function euler(velocity: Velocity, noise: Values, sigmas: readonly number[]): Promise<Values> {
  let x = noise;
  for (let i = 0; i + 1 < sigmas.length; i++)
    x = combined(x, [sigmas[i + 1]! - sigmas[i]!, await velocity(x, sigmas[i]!)]);
  return x;
}

/**
 * DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) with α = 1 − σ: x' = (σ'/σ)·x + (1 − σ'/σ)·D, where D extrapolates the last
 * two estimates x − σ·v of the picture in λ = log(α/σ). The last step is of first order, and so are those
 * that touch σ = 1, where λ is infinite; as in diffusers'
 * DPMSolverMultistepScheduler (`use_flow_sigmas`, `lower_order_final`).
 */
export async function dpmSolver2M(velocity: Velocity, noise: Values, sigmas: readonly number[]): Promise<Values> {
  const lambda = (sigma: number) => Math.log((1 - sigma) / sigma);
  let x = noise;
  let before: Values | null = null;
  for (let i = 0; i + 1 < sigmas.length; i++) {
    const [from, to] = [sigmas[i]!, sigmas[i + 1]!];
    const estimate = combined(x, [-from, await velocity(x, from)]);
    let target = estimate;
    if (before && sigmas[i - 1]! < 1 && to > 0) {
      const ratio = (lambda(from) - lambda(sigmas[i - 1]!)) / (lambda(to) - lambda(from));
      target = combined(estimate, [1 / (2 * ratio), estimate], [-1 / (2 * ratio), before]);
    }
    x = combined(x, [to / from - 1, x], [1 - to / from, target]);
    before = estimate;
  }
  return x;
}

/** H, P and R blocks of flowturbo, where R evaluates nothing: x += h·(the velocity of the block before). */
export async function reusing(
  velocity: Velocity,
  noise: Values,
  blocks: string,
  sigmas: readonly number[],
): Promise<Values> {
  let x = noise;
  let cache: Values | null = null;
  for (const [i, block] of [...blocks].entries()) {
    const h = sigmas[i + 1]! - sigmas[i]!;
    if (block === "R") {
      x = combined(x, [h, cache!]);
      continue;
    }
    const first: Values = block === "P" && cache ? cache : await velocity(x, sigmas[i]!);
    const second = await velocity(combined(x, [h, first]), sigmas[i + 1]!);
    x = combined(x, [h / 2, first], [h / 2, second]);
    cache = second;
  }
  return x;
}
