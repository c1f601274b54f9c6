/**
 * How many processors this process may use. A control group's quota is processor time, not processors: the system shows
 * all of them, and threads beyond the quota spend it faster and then stand still together, the event loop among them.
 * Linux; elsewhere nothing is known here.
 */

import { readFileSync } from "node:fs";
import os from "node:os";

export interface Processors {
  /** Physical cores that this process may run on; null if not known. */
  readonly cores: number | null;
  /** Processors' worth of time that its control groups grant, such as 1.5; null for no limit. */
  readonly quota: number | null;
}

/** The text of a file; null if it cannot be read. */
export type ReadText = (file: string) => string | null;

export function processors(read: ReadText = readText): Processors {
  return { cores: coresOf(read), quota: quotaOf(read) };
}

/**
 * Threads that compute at the same time without slowing each other down: one for each physical core, and no more than
 * the quota pays for in full. With a quota of 1.5 two threads took 0.77 to 1.05 of the time of one, and the event loop
 * stood still with them: its delays had a 99th percentile of 30 ms instead of 15. Null if nothing is known.
 */
export function usableThreads({ cores, quota }: Processors): number | null {
  if (cores === null && quota === null) return null;
  const most = Math.min(cores ?? Number.POSITIVE_INFINITY, Math.floor(quota ?? Number.POSITIVE_INFINITY));
  return Math.max(1, most);
}

/** Cores are counted by their sets of sibling threads. */
function coresOf(read: ReadText): number | null {
  const allowed = /^Cpus_allowed_list:\s*(\S+)/m.exec(read("/proc/self/status") ?? "")?.[1];
  const cpus = allowed === undefined ? [] : listed(allowed);
  if (cpus.length === 0) return null;
  const topology = (cpu: number) => read(`/sys/devices/system/cpu/cpu${cpu}/topology/thread_siblings_list`)?.trim();
  return new Set(cpus.map((cpu) => topology(cpu) ?? String(cpu))).size;
}

/** "0-2,8" → 0, 1, 2, 8. */
function listed(list: string): number[] {
  return list.split(",").flatMap((range) => {
    const [first, last = first] = range.split("-").map(Number) as [number, number?];
    return Number.isInteger(first) && Number.isInteger(last)
      ? Array.from({ length: last! - first + 1 }, (_, index) => first + index)
      : [];
  });
}

/** The least of the process's control groups and of all above them, as far as they can be seen. */
function quotaOf(read: ReadText): number | null {
  const groups = (read("/proc/self/cgroup") ?? "").split("\n").flatMap((line) => {
    const match = /^\d+:([^:]*):(.*)$/.exec(line);
    return match ? [{ controllers: match[1]!.split(","), path: match[2]! }] : [];
  });
  let least = Number.POSITIVE_INFINITY;
  for (const { controllers, root, folder } of mountsOf(read)) {
    const isSecond = controllers === null;
    const group = groups.find((each) => each.controllers.includes(isSecond ? "" : "cpu"));
    if (!group || !(isSecond || controllers.includes("cpu"))) continue;
    // A container may see its own group as the root of the mount, or one that lies outside of it.
    const below = `${group.path}/`.startsWith(`${root}/`) ? group.path.slice(root.length) : group.path;
    const names = below.includes("..") ? [] : below.split("/").filter((name) => name !== "");
    for (let depth = names.length; depth >= 0; depth--) {
      const at = [folder, ...names.slice(0, depth)].join("/");
      least = Math.min(least, (isSecond ? secondVersion(at, read) : firstVersion(at, read)) ?? least);
    }
  }
  return Number.isFinite(least) ? least : null;
}

/** Where control groups are mounted; `controllers` is null for the second version, which has one tree for all. */
function mountsOf(read: ReadText): { controllers: string[] | null; root: string; folder: string }[] {
  return (read("/proc/self/mountinfo") ?? "").split("\n").flatMap((line) => {
    const [mount, source] = line.split(" - ");
    const [, , , root, folder] = mount!.split(" ");
    const [type, , options = ""] = source?.split(" ") ?? [];
    if (!root || !folder || (type !== "cgroup" && type !== "cgroup2")) return [];
    return [{ controllers: type === "cgroup" ? options.split(",") : null, root, folder }];
  });
}

/** "150000 100000", or "max 100000". */
function secondVersion(folder: string, read: ReadText): number | null {
  const [quota, period] = (read(`${folder}/cpu.max`) ?? "").trim().split(/\s+/).map(Number);
  return ratio(quota, period);
}

/** A quota of -1 is none. */
function firstVersion(folder: string, read: ReadText): number | null {
  return ratio(numberIn(read(`${folder}/cpu.cfs_quota_us`)), numberIn(read(`${folder}/cpu.cfs_period_us`)));
}

function numberIn(text: string | null): number {
  return text === null ? Number.NaN : Number(text);
}

function ratio(quota = Number.NaN, period = Number.NaN): number | null {
  return quota > 0 && period > 0 ? quota / period : null;
}

function readText(file: string): string | null {
  try {
    return readFileSync(file, "utf8");
  } catch {
    return null;
  }
}

/**
 * What kind of processor this is. Virtual machines give processors of several generations one name, so that on Linux the
 * names of its instruction sets belong to it.
 */
export function processorKind(read: ReadText = readText): string {
  const instructions = /^(?:flags|Features)\s*:(.*)$/m.exec(read("/proc/cpuinfo") ?? "")?.[1] ?? "";
  return `${process.arch}, ${os.cpus()[0]?.model ?? "unknown"},${instructions}`;
}

/** Whether this is a processor of Intel's with AVX-512, as Linux says; false where it is not known. */
export function isIntelAvx512(read: ReadText = readText): boolean {
  const text = read("/proc/cpuinfo") ?? "";
  return /^vendor_id\s*:\s*GenuineIntel\s*$/m.test(text) && /^flags\s*:.*\bavx512f\b/m.test(text);
}

/** Whether the processor has instructions for sums of products of 8-bit integers, as Linux says for x64; false where it is not known. */
export function hasVnni(read: ReadText = readText): boolean {
  return /^flags\s*:.*\b(avx512_vnni|avx_vnni)\b/m.test(read("/proc/cpuinfo") ?? "");
}
