/** Memory of this machine, and bytes in words. */

import { freemem } from "node:os";

/** Bytes that this process can still take, without swapping and within the limit of its control group. */
export function availableMemory(): number {
  const { availableMemory, constrainedMemory } = process as Partial<NodeJS.Process> & NodeJS.Process;
  // Node 20.13 and later know the control group, earlier versions only its limit: 0 or a huge number for "no limit".
  if (availableMemory) return Math.min(freemem(), availableMemory.call(process));
  return Math.min(freemem(), constrainedMemory?.call(process) || Number.POSITIVE_INFINITY);
}

/** `1.25`, in units of 10⁹ bytes; small numbers with more digits. */
export function gigabytes(bytes: number): string {
  return bytes < 1e7 ? (bytes / 1e9).toFixed(4) : (bytes / 1e9).toFixed(2);
}
