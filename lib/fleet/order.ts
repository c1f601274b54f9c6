/**
 * BullMQ's priority of a job: a number that puts waiting jobs into the order of `comparePriorities` (serving/priority.ts), whenever
 * they came. Waiting raises a level by one each ten seconds, for all alike: so of two jobs the order never changes, and it can be a number.
 */

import { agingMilliseconds } from "../serving/priority.js";

/** BullMQ takes 1 to 2^21 − 1; lower numbers go first. */
const largest = 2 ** 21 - 1;
/** Moments within a bucket of ten seconds that are told apart. */
const moments = 256;
/** Buckets of an epoch: nearly 23 hours. */
const buckets = Math.floor(largest / moments) - 202;
const epochMs = buckets * agingMilliseconds;
/** Due moments up to here are told apart by `fine` milliseconds, later ones by their logarithm. */
const nearMs = 20_000;
const fine = 100;
const defaultDue = 60_000;

/** Epochs follow each other; in a new one numbers begin again, and jobs that wait from before have to be put to the front. */
export function epochOf(arrival: number): number {
  return Math.floor(arrival / epochMs);
}

/** Milliseconds since its epoch began. */
export function sinceEpoch(arrival: number): number {
  return arrival % epochMs;
}

/**
 * @param level −100 to 100
 * @param arrival by the fleet's clock
 * @param due by the fleet's clock; null without a time limit
 */
export function queuePriority(level: number, arrival: number, due: number | null): number {
  const bucket = Math.floor((arrival % epochMs) / agingMilliseconds);
  const start = arrival - (arrival % agingMilliseconds);
  const from = Math.max(0, (due ?? arrival + defaultDue) - start);
  const late = from < nearMs ? Math.floor(from / fine) : nearMs / fine + Math.floor(3.2 * Math.log2(from / nearMs));
  return (bucket + 101 - Math.floor(level)) * moments + Math.min(moments - 1, late);
}
