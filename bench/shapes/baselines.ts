/**
 * Samplers that flowturbo does not offer, for comparison, as functions of a guided velocity: Euler on any sigmas, TaylorSeer, and
 * schedules whose R blocks merely reuse the last velocity.
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
 * Euler with TaylorSeer of order 1 (arXiv 2503.06923) on the velocity, as OpenVINO GenAI plans it: the first six steps and the last two are
 * computed, and of those between every third; in the others the velocity goes on by its last difference, step by step.
 */
export async function taylorSeer(velocity: Velocity, noise: Values, sigmas: readonly number[]): Promise<Values> {
  const steps = sigmas.length - 1;
  let x = noise;
  const known: { step: number; v: Values }[] = [];
  for (let i = 0; i < steps; i++) {
    const isComputed = i < 6 || i >= steps - 2 || (i - 6) % 3 === 2;
    if (isComputed) known.unshift({ step: i, v: await velocity(x, sigmas[i]!) });
    const [last, before] = known;
    const ahead = before ? (i - last!.step) / (last!.step - before.step) : 0;
    const v = ahead === 0 ? last!.v : combined(last!.v, [ahead, last!.v], [-ahead, before!.v]);
    x = combined(x, [sigmas[i + 1]! - sigmas[i]!, v]);
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
