/**
 * How rows are split over the batches that are compiled: by measured cost. A batch does not cost what its rows would
 * cost alone (a small one does not fill the device, a large one may not fit its caches), so that neither "as large as
 * possible" nor "never pad" is right; the cheapest covering of n rows is found exactly.
 */

/**
 * Batches that a launch may have.
 * @param batches the compiled ones
 * @param maxRows of the launch; undefined for any number
 * @param pin the batch that every launch is padded to, as far as `maxRows` allows; null for any
 */
export function launchBatches(
  batches: readonly number[],
  maxRows: number | undefined,
  pin: number | null,
): readonly number[] {
  const most = maxRows ?? Number.POSITIVE_INFINITY;
  if (pin !== null) return [Math.min(pin, most)];
  const allowed = batches.filter((batch) => batch <= most);
  return allowed.length > 0 ? allowed : [most];
}

export interface Split {
  /** Batches in falling order. Their sum is at least the number of rows; what is beyond is padding. */
  readonly batches: readonly number[];
  readonly milliseconds: number;
}

/** The cheapest split of some rows: its last launch, and that of the rest. */
interface Best {
  readonly milliseconds: number;
  readonly padding: number;
  readonly launches: number;
  readonly batch: number;
  readonly rest: Best | null;
}

/**
 * The cheapest multiset of batches that covers `rows`. Among equally cheap ones: the least padding, then the fewest
 * launches. Dynamic programming over rows, O(rows · batches).
 * @param batches the compiled ones, at least one, in any order
 * @param cost milliseconds of one launch at a batch
 * @throws RangeError for no batches, or a cost that is no positive number
 */
export function cheapestSplit(rows: number, batches: readonly number[], cost: (batch: number) => number): Split {
  if (batches.length === 0) throw new RangeError("There are no batches to split over.");
  const sizes = [...new Set(batches)].sort((a, b) => b - a);
  const costs = new Map(sizes.map((batch) => [batch, cost(batch)]));
  for (const [batch, milliseconds] of costs)
    if (!(milliseconds > 0) || !Number.isFinite(milliseconds))
      throw new RangeError(`A launch of ${batch} rows cannot take ${milliseconds} ms.`);
  const best: Best[] = [{ milliseconds: 0, padding: 0, launches: 0, batch: 0, rest: null }];
  for (let covered = 1; covered <= rows; covered++) {
    let winner: Best | null = null;
    for (const batch of sizes) {
      const rest = best[Math.max(0, covered - batch)]!;
      const candidate: Best = {
        milliseconds: rest.milliseconds + costs.get(batch)!,
        padding: rest.padding + Math.max(0, batch - covered),
        launches: rest.launches + 1,
        batch,
        rest,
      };
      if (winner === null || better(candidate, winner)) winner = candidate;
    }
    best.push(winner!);
  }
  const found = best[rows]!;
  const chosen: number[] = [];
  for (let at: Best = found; at.rest; at = at.rest) chosen.push(at.batch);
  chosen.sort((a, b) => b - a);
  return { batches: chosen, milliseconds: found.milliseconds };
}

/** Sums of the same costs in another order differ in their last bits: those are equal. */
const tolerance = 1e-9;

function better(a: Best, b: Best): boolean {
  const difference = a.milliseconds - b.milliseconds;
  if (Math.abs(difference) > tolerance * b.milliseconds) return difference < 0;
  return (a.padding - b.padding || a.launches - b.launches) < 0;
}
