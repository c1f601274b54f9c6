// Levels of schedules of few steps by dynamic programming, against trying all of them.
import { expect, it } from "vitest";
import { bestGrids, gramOf } from "../../lib/schedule/index.js";

/** A run in two dimensions, of eight steps whose velocity turns fastest at the end. */
const levels = [1, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0];
const velocity = (s: number, picture: number) => [
  Math.cos(4 * (1 - s) ** 2 + picture),
  Math.sin(3 * (1 - s) ** 3) + picture,
];
const runOf = (picture: number) => {
  const velocities = levels.slice(0, -1).map((s) => velocity(s, picture));
  const states = [[0, 0]];
  for (const [i, v] of velocities.entries()) {
    const h = levels[i + 1]! - levels[i]!;
    // The run itself has many steps between two levels.
    const middle = velocity((levels[i]! + levels[i + 1]!) / 2, picture);
    states.push(states[i]!.map((x, d) => x + (h / 2) * (v[d]! + middle[d]!)));
  }
  return { states, velocities };
};
const runs = [0, 0.3, 0.7].map(runOf);

/** What is left of a step after least squares over all pictures, from the vectors themselves. */
function errors(h: number | null, i: number, j: number): number[] {
  const moved = runs.flatMap(({ states }) => states[j]!.map((x, d) => x - states[i]![d]!));
  const a = runs.flatMap(({ velocities }) => velocities[i]!);
  const b = h === null ? a.map(() => 0) : runs.flatMap(({ velocities }) => velocities[h]!);
  const dot = (p: number[], q: number[]) => p.reduce((sum, value, k) => sum + value * q[k]!, 0);
  let [p, q] = [dot(moved, a) / dot(a, a), 0];
  if (h !== null) {
    const determinant = dot(a, a) * dot(b, b) - dot(a, b) ** 2;
    p = (dot(moved, a) * dot(b, b) - dot(moved, b) * dot(a, b)) / determinant;
    q = (dot(moved, b) * dot(a, a) - dot(moved, a) * dot(a, b)) / determinant;
  }
  const left = moved.map((value, k) => (value - p * a[k]! - q * b[k]!) ** 2);
  return runs.map((_, picture) => left[2 * picture]! + left[2 * picture + 1]!);
}

function* paths(steps: number, from = 0): Generator<number[]> {
  const last = levels.length - 1;
  if (steps === 1) yield [from, last];
  else
    for (let next = from + 1; next <= last - steps + 1; next++)
      for (const rest of paths(steps - 1, next)) yield [from, ...rest];
}

it.each(["squares", "roots"] as const)("finds the grid with the least sum of %s", async (norm) => {
  const grams = await Promise.all(runs.map(({ states, velocities }) => gramOf([...states, ...velocities])));
  const found = bestGrids(grams, [1, 2, 3, 4, 6, 8], norm);
  for (const [steps, grid] of found) {
    const cost = (path: number[]) =>
      path.slice(1).reduce((sum, j, k) => {
        const each = errors(k === 0 ? null : path[k - 1]!, path[k]!, j);
        return sum + each.reduce((total, error) => total + (norm === "squares" ? error : Math.sqrt(error)), 0);
      }, 0);
    const all = [...paths(steps)];
    const best = Math.min(...all.map(cost));
    expect(grid).toHaveLength(steps + 1);
    expect([grid[0], grid.at(-1)]).toEqual([0, levels.length - 1]);
    expect(cost(grid)).toBeCloseTo(best, 9);
  }
});
