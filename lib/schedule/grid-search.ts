/**
 * Where a schedule of few evaluations should have its noise levels: dynamic programming over the levels of a reference run of many,
 * with a model of the error of one step that needs nothing but inner products of what the run went through. No network is
 * evaluated for it.
 */

import { isDue, rest } from "../common/turns.js";

/**
 * A run of many steps, as inner products of one picture's states x₀ … x_M at `levels` and velocities v₀ … v_(M−1), in this order: a
 * symmetric matrix of 2M + 1 rows, row by row.
 */
export type Gram = Float64Array;

/** Inner products of vectors, each of the same length. */
export async function gramOf(vectors: readonly ArrayLike<number>[]): Promise<Gram> {
  const n = vectors.length;
  const gram = new Float64Array(n * n);
  for (let a = 0; a < n; a++)
    for (let b = a; b < n; b++) {
      const [left, right] = [vectors[a]!, vectors[b]!];
      let sum = 0;
      for (let i = 0; i < left.length; i++) sum += left[i]! * right[i]!;
      gram[a * n + b] = gram[b * n + a] = sum;
      if (isDue()) await rest();
    }
  return gram;
}

/**
 * The error of the step from level i to j that may use the velocities at i and at the level h before it: what is left of x_j − x_i after
 * least squares over all pictures, for each picture its squared norm.
 */
function stepErrors(grams: readonly Gram[], total: Gram, n: number, h: number | null, i: number, j: number): number[] {
  const states = (n + 1) / 2;
  const [first, second] = [states + i, h === null ? -1 : states + h];
  const at = (gram: Gram, a: number, b: number) => gram[a * n + b]!;
  const moved = (gram: Gram, v: number) => at(gram, j, v) - at(gram, i, v);
  // Weights over all pictures.
  const [aa, b1] = [at(total, first, first), moved(total, first)];
  let weights: readonly [number, number] = [b1 / aa, 0];
  if (second >= 0) {
    const [ab, bb, b2] = [at(total, first, second), at(total, second, second), moved(total, second)];
    const determinant = aa * bb - ab * ab;
    if (determinant > 1e-12 * aa * bb) weights = [(b1 * bb - b2 * ab) / determinant, (b2 * aa - b1 * ab) / determinant];
  }
  const [p, q] = weights;
  return grams.map((gram) => {
    const distance = at(gram, j, j) - 2 * at(gram, i, j) + at(gram, i, i);
    const old = second < 0 ? [0, 0, 0] : [moved(gram, second), at(gram, first, second), at(gram, second, second)];
    const left =
      distance -
      2 * (p * moved(gram, first) + q * old[0]!) +
      p * p * at(gram, first, first) +
      2 * p * q * old[1]! +
      q * q * old[2]!;
    return Math.max(0, left);
  });
}

/**
 * The levels, as indices from 0 to M, of the grid of so many steps with the least error, for each number of steps asked for.
 * @param norm what is added up over steps: squared errors, or their roots
 */
export function bestGrids(
  grams: readonly Gram[],
  steps: readonly number[],
  norm: "squares" | "roots",
): Map<number, number[]> {
  const n = Math.sqrt(grams[0]!.length);
  const last = (n - 1) / 2;
  const total = grams[0]!.map((_, index) => grams.reduce((sum, gram) => sum + gram[index]!, 0));
  const costOf = (h: number | null, i: number, j: number) =>
    stepErrors(grams, total, n, h, i, j).reduce(
      (sum, error) => sum + (norm === "squares" ? error : Math.sqrt(error)),
      0,
    );
  const most = Math.max(...steps);
  const side = last + 1;
  const costs = new Float64Array(side ** 3).fill(Number.NaN);
  const cost = (h: number, i: number, j: number) => {
    const key = (h * side + i) * side + j;
    if (Number.isNaN(costs[key]!)) costs[key] = costOf(h, i, j);
    return costs[key]!;
  };
  // best[k][h·side + i]: the least error of k steps that end at i, the last of them from h; from[k]: the level before h.
  const best = [new Float64Array(side * side).fill(Number.POSITIVE_INFINITY)];
  const from: Int16Array[] = [new Int16Array(side * side)];
  const one = new Float64Array(side * side).fill(Number.POSITIVE_INFINITY);
  for (let i = 1; i < side; i++) one[i] = costOf(null, 0, i);
  best.push(one);
  from.push(new Int16Array(side * side));
  for (let k = 2; k <= most; k++) {
    const [before, now, path] = [best[k - 1]!, new Float64Array(side * side).fill(Number.POSITIVE_INFINITY), new Int16Array(side * side)]; // biome-ignore format: one line
    for (let h = 0; h < side; h++)
      for (let i = h + 1; i < side; i++) {
        const so = before[h * side + i]!;
        if (so === Number.POSITIVE_INFINITY) continue;
        for (let j = i + 1; j < side; j++) {
          const sum = so + cost(h, i, j);
          if (sum < now[i * side + j]!) [now[i * side + j], path[i * side + j]] = [sum, h];
        }
      }
    best.push(now);
    from.push(path);
  }
  return new Map(
    steps.map((count) => {
      let h = 0;
      for (let each = 0; each < last; each++)
        if (best[count]![each * side + last]! < best[count]![h * side + last]!) h = each;
      const levels = [last];
      let [at, k] = [last, count];
      while (k >= 1) {
        levels.unshift(h);
        [h, at, k] = [from[k]![h * side + at]!, h, k - 1];
      }
      return [count, levels];
    }),
  );
}
