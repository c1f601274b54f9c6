/** How many pictures a worker takes at a time, so that its launches are full and no job waits in it that another worker could begin. */

import type { CostEntry } from "../serving/costs.js";

const unknown = 4;
/** A batch that makes a picture cheaper by less than this is not worth waiting for. */
const gain = 0.05;
const isOfSteps = (graph: string) => /^(predict|refine)(\.|$)/.test(graph);

/** The batch beyond which a picture gets no cheaper. @param entries the model's table of costs */
export function usefulBatch(entries: readonly CostEntry[]): number {
  const kinds = new Map<string, CostEntry[]>();
  for (const entry of entries) {
    if (!isOfSteps(entry.graph)) continue;
    const key = `${entry.graph}@${entry.size}`;
    kinds.set(key, [...(kinds.get(key) ?? []), entry]);
  }
  let most = 0;
  for (const each of kinds.values()) {
    if (each.length < 2) continue;
    const perRow = each.map(({ batch, milliseconds }) => ({ batch, milliseconds: milliseconds / batch }));
    const least = Math.min(...perRow.map(({ milliseconds }) => milliseconds));
    const enough = perRow.filter(({ milliseconds }) => milliseconds <= least * (1 + gain));
    most = Math.max(most, Math.min(...enough.map(({ batch }) => batch)));
  }
  return most === 0 ? unknown : most;
}

/** Sizes that it can draw without a first launch that takes longer: those that it knows the cost of. */
export function knownSizes(entries: readonly CostEntry[]): string[] {
  return [...new Set(entries.filter(({ graph }) => isOfSteps(graph)).map(({ size }) => size))];
}
