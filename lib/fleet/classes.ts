/**
 * Workers in classes of about equal prices. A list schedule asks each class for its first free worker, so that a job costs as
 * many comparisons as there are classes, and not as many as there are workers. Every worker measures its own prices: equal machines differ
 * by what measuring is off, and are one class all the same. A class has the dearest prices of its members.
 */

/** What drawing a kind of request takes on a worker that does nothing else, in milliseconds. */
export interface Price {
  readonly ms: number;
  /** With the leanest schedule that a time limit may choose. */
  readonly leastMs: number;
  /** That schedule. */
  readonly blocks: string;
}

/** Prices by kind. A kind is all that the price depends on, the number of pictures included. */
export type Prices = ReadonlyMap<string, Price>;

/** Prices of one kind in a class differ by no more than this factor. */
const mostSpread = 1.1;

/** Milliseconds that are assumed where nothing at all is known. */
export const unknownMs = 1000;

export interface WorkerClasses {
  /** The class of each worker. */
  readonly of: readonly number[];
  readonly size: number;
  /** Of a kind, by class; null for a kind that no worker has a price for. */
  pricesOf(kind: string): readonly Price[] | null;
  /** What is assumed of such a kind, by class: the dearest of all that is known. */
  readonly unknown: readonly Price[];
}

/** @param workers their prices, in any order */
export function classesOf(workers: readonly Prices[]): WorkerClasses {
  // Most workers of a fleet are seen with the prices that they had before.
  const members = new Map<Prices, number[]>();
  for (const [index, prices] of workers.entries()) {
    const same = members.get(prices);
    if (same) same.push(index);
    else members.set(prices, [index]);
  }
  const groups = divided([...members.keys()]);
  const of: number[] = new Array(workers.length).fill(0);
  for (const [index, group] of groups.entries())
    for (const prices of group) for (const worker of members.get(prices)!) of[worker] = index;
  const known = groups.map(dearestOf);
  const all = dearestOf(known);
  const unknown = known.map((prices) => [...prices.values()].reduce(dearer, { ms: 0, leastMs: 0, blocks: "" }));
  return {
    of,
    size: groups.length,
    pricesOf: (kind) => {
      const others = all.get(kind);
      return others ? known.map((prices) => prices.get(kind) ?? others) : null;
    },
    unknown: unknown.map((price) => (price.ms > 0 ? price : { ms: unknownMs, leastMs: unknownMs, blocks: "" })),
  };
}

/** Groups within which no kind's prices differ by more than `mostSpread`: cut where two neighbours are farthest apart. */
function divided(all: readonly Prices[]): (readonly Prices[])[] {
  const groups: (readonly Prices[])[] = [];
  const left = all.length > 0 ? [all] : [];
  for (let group = left.pop(); group; group = left.pop()) {
    const cut = cutOf(group);
    if (cut) left.push(...cut);
    else groups.push(group);
  }
  return groups;
}

function cutOf(group: readonly Prices[]): [Prices[], Prices[]] | null {
  if (group.length === 1) return null;
  const bounds = new Map<string, { low: number; high: number }>();
  for (const prices of group)
    for (const [kind, { ms }] of prices) {
      const known = bounds.get(kind);
      if (!known) bounds.set(kind, { low: ms, high: ms });
      else if (ms < known.low) known.low = ms;
      else if (ms > known.high) known.high = ms;
    }
  let widest: string | null = null;
  let spread = mostSpread;
  for (const [kind, { low, high }] of bounds)
    if (high > spread * low) {
      widest = kind;
      spread = high / low;
    }
  if (widest === null) return null;
  const of = (prices: Prices) => prices.get(widest)?.ms;
  const known = group.flatMap((prices) => of(prices) ?? []).sort((a, b) => a - b);
  let limit = known.at(-1)!;
  let gap = 1;
  for (let index = 1; index < known.length; index++)
    if (known[index]! > gap * known[index - 1]!) {
      gap = known[index]! / known[index - 1]!;
      limit = known[index]!;
    }
  // Those without a price of this kind are with the dearer ones: nothing is promised of them that they may not keep.
  const isDear = (prices: Prices) => (of(prices) ?? limit) >= limit;
  return [group.filter((prices) => !isDear(prices)), group.filter(isDear)];
}

function dearestOf(group: readonly Prices[]): Map<string, Price> {
  const dearest = new Map<string, Price>();
  for (const prices of group)
    for (const [kind, price] of prices) {
      const known = dearest.get(kind);
      dearest.set(kind, known ? dearer(known, price) : price);
    }
  return dearest;
}

function dearer(a: Price, b: Price): Price {
  if (a.ms >= b.ms && a.leastMs >= b.leastMs) return a;
  const { blocks } = a.leastMs >= b.leastMs ? a : b;
  return { ms: Math.max(a.ms, b.ms), leastMs: Math.max(a.leastMs, b.leastMs), blocks };
}
