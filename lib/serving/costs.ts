/**
 * What launches cost: the table that every choice of this folder is based on. An entry is the median of measured runs of
 * one graph at one batch and size, with its quartiles. Two things are added while a model works: launches that have not
 * been measured enter the table when they have been observed often enough, and the drift of the machine (other programs,
 * a warmer processor) since the table was measured is followed, so that predictions stay right. An entry that launches
 * contradict, in its ratio to the others, is replaced by them: it was measured while the machine was disturbed.
 */

import { Fading } from "./fading.js";

/** What is not in launches (noise, tokens, pixels to bytes, messages): an entry of the table like a graph. */
export const hostGraph = "host";

/** What a launch of one graph at one batch and size takes. */
export interface CostEntry {
  /** Name of the graph, or "host" for what is not in launches. */
  readonly graph: string;
  /** Rows of the launch, padding included; pictures for "host". */
  readonly batch: number;
  /** What the graph runs on besides rows: "64x64" for a picture in pixels, "77 tokens" for a text. */
  readonly size: string;
  /** Median of the runs, in milliseconds. */
  readonly milliseconds: number;
  /** Lower quartile, in milliseconds. */
  readonly low: number;
  /** Upper quartile, in milliseconds. */
  readonly high: number;
  /** Number of runs that the entry is made of. */
  readonly runs: number;
  /** When it was measured, in milliseconds since 1970. */
  readonly at: number;
}

/** Part of a launch's cost at batch 1 that does not grow with rows, where only one batch has been measured. */
const fixedShare = 0.2;

/** Observations of a launch that make an entry, and how many are kept. */
const observationsNeeded = 5;
const observationsKept = 25;

/**
 * Launches of all entries that are remembered to compare entries, how many of one entry are needed for that, and by which
 * factor those must be off from what is usual: more than what differs between launches alone and among others.
 */
const comparedLaunches = 200;
const comparedOfEntry = 9;
const contradiction = 1.3;

/** Weight of one launch in the drift, and bounds of its ratio: one launch that was interrupted must not change much. */
const driftWeight = 0.025;
const driftBounds = [0.5, 3] as const;

/**
 * What many launches agree on is no disturbance: weight of one launch in the drift that lasts, and in how many milliseconds
 * without launches half of it is forgotten.
 */
const lastingWeight = driftWeight / 20;
const lastingHalfLifeMs = 3600_000;

const { compare } = new Intl.Collator("en", { numeric: true });

export class CostTable {
  readonly #entries = new Map<string, Map<number, CostEntry>>();
  readonly #observed = new Map<string, number[]>();
  /** The entries of the latest launches, and of each entry how much slower they were than it says. */
  #recent: CostEntry[] = [];
  readonly #ratios = new Map<CostEntry, number[]>();
  /** Launches of known entries so far. */
  #launches = 0;
  /** Entries that launches contradict, and since which launch. */
  #contradicted = new WeakMap<CostEntry, number>();
  /** The drift that lasts, and what the present one is beyond it. */
  #lasting = new Fading(1, lastingHalfLifeMs);
  #present = new Fading(0);
  #version = 0;

  constructor(entries: Iterable<CostEntry> = []) {
    for (const entry of entries) this.set(entry);
  }

  /** Changes whenever an entry does. */
  get version(): number {
    return this.#version;
  }

  /** By graph, size and batch. */
  get entries(): CostEntry[] {
    const all = [...this.#entries.values()].flatMap((batches) => [...batches.values()]);
    return all.sort((a, b) => compare(a.graph, b.graph) || compare(a.size, b.size) || a.batch - b.batch);
  }

  set(entry: CostEntry): void {
    const key = keyOf(entry.graph, entry.size);
    const batches = this.#entries.get(key) ?? new Map<number, CostEntry>();
    batches.set(entry.batch, entry);
    this.#entries.set(key, batches);
    this.#observed.delete(`${key} x ${entry.batch}`);
    this.#version++;
  }

  /** Forgets all entries that were measured up to a moment, in milliseconds since 1970; default: all. */
  forget(until = Number.POSITIVE_INFINITY): void {
    const kept = this.entries.filter(({ at }) => at > until);
    if (kept.length === this.entries.length) return;
    this.#entries.clear();
    this.#observed.clear();
    this.#recent = [];
    this.#ratios.clear();
    this.#lasting = new Fading(1, lastingHalfLifeMs);
    this.#present = new Fading(0);
    this.#version++;
    for (const entry of kept) this.set(entry);
  }

  get(graph: string, size: string, batch: number): CostEntry | undefined {
    return this.#entries.get(keyOf(graph, size))?.get(batch);
  }

  /** How much slower launches are now than when they were measured. Without launches it goes back to 1: soon, or slowly if it lasted. */
  get drift(): number {
    return this.driftAfter(0);
  }

  /** The drift in so many milliseconds, if nothing is launched until then. */
  driftAfter(milliseconds: number): number {
    return this.#lasting.after(milliseconds) + this.#present.after(milliseconds);
  }

  /**
   * Milliseconds of a launch, as the machine is now. Between measured batches linear; beyond them by the slope of the
   * nearest two, or with only one measured by the usual share of fixed cost.
   * @returns null if nothing is known about this graph at this size
   */
  estimate(graph: string, size: string, batch: number): number | null {
    const usual = this.usual(graph, size, batch);
    return usual === null ? null : usual * this.drift;
  }

  /** As `estimate`, on a machine without drift: it stays until the version changes. */
  usual(graph: string, size: string, batch: number): number | null {
    const batches = this.#entries.get(keyOf(graph, size));
    if (!batches) return null;
    // Fewer rows never take longer than more. Where the table says so, its entries were measured at different loads of
    // the machine, and single rows would always be padded: what is never launched is never observed to be cheaper.
    const larger = [...batches.values()].filter((entry) => entry.batch > batch).map((entry) => entry.milliseconds);
    return Math.min(interpolated(batches, batch), ...larger);
  }

  /** As `estimate`; where nothing is known, in units of a launch of one row. */
  relative(graph: string, size: string, batch: number): number {
    return this.estimate(graph, size, batch) ?? unitsOf(batch);
  }

  /**
   * Milliseconds of a launch, for a forecast and not for a promise: as `estimate`, or by the few launches that there were.
   * @returns null before the second launch of a graph at this size
   */
  guess(graph: string, size: string, batch: number): number | null {
    const known = this.estimate(graph, size, batch);
    if (known !== null) return known;
    const prefix = `${keyOf(graph, size)} x `;
    const units = [...this.#observed].flatMap(([key, values]) =>
      key.startsWith(prefix) ? values.map((value) => value / unitsOf(Number(key.slice(prefix.length)))) : [],
    );
    return units.length === 0 ? null : medianOf(units) * unitsOf(batch) * this.drift;
  }

  /** A launch that was made for a request, not to measure it. Must not have included compiling the graph. */
  observe(graph: string, size: string, batch: number, milliseconds: number): void {
    const known = this.get(graph, size, batch);
    if (known) {
      const [low, high] = driftBounds;
      const ratio = Math.min(high, Math.max(low, milliseconds / known.milliseconds));
      // The mean, not the median: what is predicted are sums of many launches, the interrupted ones among them.
      const { drift } = this;
      const lasting = this.#lasting.value + lastingWeight * (ratio - this.#lasting.value);
      this.#lasting.set(lasting);
      this.#present.set(drift + driftWeight * (ratio - drift) - lasting);
      this.#compare(known, milliseconds / known.milliseconds);
      return;
    }
    const key = `${keyOf(graph, size)} x ${batch}`;
    const values = this.#observed.get(key) ?? [];
    values.push(milliseconds / this.drift);
    if (values.length > observationsKept) values.shift();
    this.#observed.set(key, values);
    if (values.length >= observationsNeeded) this.set(entryOf(graph, batch, size, values));
  }

  /**
   * Replaces an entry whose launches are off by another factor than those of all, and stay so until all that is compared is
   * new: when the whole machine changes, some entries meet the change before others.
   */
  #compare(entry: CostEntry, ratio: number): void {
    this.#launches++;
    this.#recent.push(entry);
    const own = this.#ratios.get(entry) ?? [];
    own.push(ratio);
    this.#ratios.set(entry, own);
    if (this.#recent.length > comparedLaunches) {
      const oldest = this.#recent.shift()!;
      const left = this.#ratios.get(oldest)!;
      left.shift();
      if (left.length === 0) this.#ratios.delete(oldest);
    }
    if (own.length < comparedOfEntry) return;
    // Each entry once: where two are launched about equally often, the median of all launches would be now one's, now the
    // other's.
    const compared = [...this.#ratios.values()].filter((of) => of.length >= comparedOfEntry);
    const usual = medianOf(compared.map(medianOf));
    const off = medianOf(own) / usual;
    if (off < contradiction && off > 1 / contradiction) {
      this.#contradicted.delete(entry);
      return;
    }
    const since = this.#contradicted.get(entry);
    if (since === undefined) this.#contradicted.set(entry, this.#launches);
    if (since === undefined || this.#launches - since < comparedLaunches) return;
    const { graph, batch, size, milliseconds } = entry;
    const values = own.map((ratio) => (ratio / usual) * milliseconds);
    this.#contradicted.delete(entry);
    this.#recent = this.#recent.filter((each) => each !== entry);
    this.#ratios.delete(entry);
    this.set(entryOf(graph, batch, size, values));
  }
}

/** Quartiles this far apart, as a part of the median, say that the machine was disturbed while an entry was measured. */
const wideSpread = 0.4;
/** Entries of the same machine become wrong with the system's updates. */
const oldAge = 30 * 24 * 3600_000;
/** An entry that no launch can contradict, since it is never chosen, is believed for so long. */
const unchosenAge = 600_000;

/** How far apart the quartiles are, as a part of the median. */
export function spreadOf({ low, high, milliseconds }: CostEntry): number {
  return (high - low) / milliseconds;
}

/**
 * Why an entry should be measured again: its runs differed much, it is old, or by it a batch is never launched, so that no
 * launch can contradict it. null for an entry that is believed.
 * @param others the entries of the same graph and size
 * @param now milliseconds since 1970
 */
export function doubtOf(
  entry: CostEntry,
  others: readonly CostEntry[],
  now: number,
): "spread" | "age" | "unchosen" | null {
  if (spreadOf(entry) > wideSpread) return "spread";
  const age = now - entry.at;
  if (age > oldAge) return "age";
  if (age < unchosenAge) return null;
  const smaller = others.filter(({ batch }) => batch < entry.batch);
  const isDear = smaller.some(
    ({ batch, milliseconds }) => milliseconds * Math.ceil(entry.batch / batch) <= entry.milliseconds,
  );
  const isAboveLarger = others.some(
    ({ batch, milliseconds }) => batch > entry.batch && milliseconds < entry.milliseconds,
  );
  return isDear || isAboveLarger ? "unchosen" : null;
}

/** An entry from measured milliseconds. */
export function entryOf(
  graph: string,
  batch: number,
  size: string,
  values: readonly number[],
  at = Date.now(),
): CostEntry {
  const sorted = [...values].sort((a, b) => a - b);
  const [low, milliseconds, high] = [0.25, 0.5, 0.75].map((part) => quantile(sorted, part)) as [number, number, number];
  return { graph, batch, size, milliseconds, low, high, runs: sorted.length, at };
}

function medianOf(values: readonly number[]): number {
  return quantile(
    [...values].sort((a, b) => a - b),
    0.5,
  );
}

/** @param sorted rising, at least one */
function quantile(sorted: readonly number[], part: number): number {
  const at = part * (sorted.length - 1);
  const below = sorted[Math.floor(at)]!;
  const above = sorted[Math.ceil(at)]!;
  return below + (above - below) * (at - Math.floor(at));
}

function interpolated(batches: ReadonlyMap<number, CostEntry>, batch: number): number {
  const exact = batches.get(batch);
  if (exact) return exact.milliseconds;
  const points = [...batches.values()].sort((a, b) => a.batch - b.batch);
  if (points.length === 1) return (points[0]!.milliseconds * unitsOf(batch)) / unitsOf(points[0]!.batch);
  // The two points around it, or the nearest two.
  const smaller = points.filter((point) => point.batch < batch).length;
  const right = Math.min(Math.max(smaller, 1), points.length - 1);
  const [a, b] = [points[right - 1]!, points[right]!];
  const slope = (b.milliseconds - a.milliseconds) / (b.batch - a.batch);
  const line = a.milliseconds + slope * (batch - a.batch);
  // Noise can give the line a wrong slope: more rows never cost less than half of what fewer cost, in proportion.
  return Math.max(line, (0.5 * a.milliseconds * Math.min(batch, a.batch)) / a.batch);
}

/** What a launch costs in units of one row, where nothing else is known. */
export function unitsOf(batch: number): number {
  return fixedShare + (1 - fixedShare) * batch;
}

function keyOf(graph: string, size: string): string {
  return `${graph}@${size}`;
}
