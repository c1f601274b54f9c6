/**
 * Which device makes which rows, where there are several: rows in the order of their priority, each to the device that will be
 * done with it first, by that device's own costs. Pure: the scheduler asks before each submission, the forecast of
 * promises ahead of time.
 */

import { unitsOf } from "./costs.js";
import { cheapestSplit, launchBatches } from "./split.js";

/** Launches of one kind that a row has still to make. */
export interface WorkPart {
  readonly graph: string;
  readonly size: string;
  readonly maxRows: number | undefined;
  readonly times: number;
}

/** What a row has still to do. Rows of equal keys make the same launches, and share them on one device. */
export interface RowWork {
  readonly key: string;
  readonly parts: readonly WorkPart[];
  readonly pin: number | null;
}

/** A row that is to be placed, or has its place already. */
export interface PlacedRow {
  /** The device that has its registers; null before its first launch. */
  readonly device: number | null;
  readonly work: RowWork;
}

/** Milliseconds of a launch on one device; null where that is not known. */
export type LaunchCost = (graph: string, size: string, batch: number) => number | null;

/** A device as rows are given to it. */
export interface DeviceLoad {
  /** Milliseconds until it has done what it has begun. */
  readonly busy: number;
  readonly cost: LaunchCost;
}

/** Rows that are counted together; the work of more of them is so many times that. It bounds what a long list takes to place. */
const rowsTogether = 64;

/** Sums of the same costs in another order differ in their last bits: those are equal. */
const tolerance = 1e-9;

/**
 * The cost of a launch on each of several devices. What a device has not measured it is assumed to do as fast as one that has;
 * what nobody has, in units of a launch of one row: so work is shared out evenly until more is known.
 */
export function comparableCosts(
  devices: readonly LaunchCost[],
): ((graph: string, size: string, batch: number) => number)[] {
  return devices.map((own) => (graph, size, batch) => {
    const known = own(graph, size, batch);
    if (known !== null) return known;
    for (const other of devices) {
      const theirs = other(graph, size, batch);
      if (theirs !== null) return theirs;
    }
    return unitsOf(batch);
  });
}

/**
 * Gives each row a device. Of devices that would be done at the same time, the one that has to do least for the row gets it, then
 * the one that has least to do in all, then the first.
 * @param rows in the order of their priority; those that have a device keep it
 * @param devices null for one that takes none
 * @param batches the compiled ones
 * @returns the device of each row
 * @throws RangeError if there is no device that takes any
 */
export function placeRows(
  rows: readonly PlacedRow[],
  devices: readonly (DeviceLoad | null)[],
  batches: readonly number[],
): number[] {
  const there = [...devices.keys()].filter((device) => devices[device] !== null);
  if (there.length === 0) throw new RangeError("There is no device to place rows on.");
  const costs = new Map<number, (graph: string, size: string, batch: number) => number>();
  for (const [at, cost] of comparableCosts(there.map((device) => devices[device]!.cost)).entries())
    costs.set(there[at]!, cost);
  const known = new Map<string, number>();
  /** Milliseconds of so many rows with the same work on a device. */
  const timeOf = (device: number, { key, parts, pin }: RowWork, count: number): number => {
    if (count > rowsTogether) {
      const whole = Math.floor(count / rowsTogether);
      const work = { key, parts, pin };
      return whole * timeOf(device, work, rowsTogether) + timeOf(device, work, count % rowsTogether);
    }
    if (count === 0) return 0;
    const name = `${device} ${count} ${key}`;
    let time = known.get(name);
    if (time === undefined) {
      const cost = costs.get(device)!;
      time = parts.reduce((sum, { graph, size, maxRows, times }) => {
        const allowed = launchBatches(batches, maxRows, pin);
        return sum + times * cheapestSplit(count, allowed, (batch) => cost(graph, size, batch)).milliseconds;
      }, 0);
      known.set(name, time);
    }
    return time;
  };
  const counts = devices.map(() => new Map<string, number>());
  /** What one more row adds to a device. */
  const added = (device: number, work: RowWork) => {
    const count = counts[device]!.get(work.key) ?? 0;
    return timeOf(device, work, count + 1) - timeOf(device, work, count);
  };
  // All that devices are bound to do: it delays no row that goes before it, and decides where nothing else does.
  const whole = devices.map((device) => device?.busy ?? 0);
  for (const { device, work } of rows)
    if (device !== null && devices[device]) whole[device]! += timeOf(device, work, 1);
  const loads = devices.map((device) => device?.busy ?? 0);
  return rows.map(({ device: bound, work }) => {
    let best = { device: bound ?? there[0]!, finish: Number.POSITIVE_INFINITY, more: 0 };
    for (const device of bound === null ? there : devices[bound] ? [bound] : []) {
      const more = added(device, work);
      const candidate = { device, finish: loads[device]! + more, more };
      if (isBetter(candidate, best, whole)) best = candidate;
    }
    const { device, more } = best;
    loads[device]! += more;
    if (bound === null) whole[device]! += more;
    counts[device]!.set(work.key, (counts[device]!.get(work.key) ?? 0) + 1);
    return device;
  });
}

interface Candidate {
  readonly device: number;
  readonly finish: number;
  readonly more: number;
}

function isBetter(a: Candidate, b: Candidate, whole: readonly number[]): boolean {
  for (const [own, other] of [
    [a.finish, b.finish],
    [a.more, b.more],
    [whole[a.device]!, whole[b.device]!],
  ] as const) {
    if (other === Number.POSITIVE_INFINITY) return true;
    if (Math.abs(own - other) > tolerance * Math.abs(other)) return own < other;
  }
  return false;
}
