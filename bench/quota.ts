/** Control groups with a quota of processor time, of version 1 and 2: for what is measured under one. */

import { existsSync, mkdirSync, rmdirSync, writeFileSync } from "node:fs";
import path from "node:path";

const periodUs = 100_000;
const hierarchies = [
  { folder: "/sys/fs/cgroup/cpu", file: "cpu.cfs_quota_us", text: (quotaUs: number) => String(quotaUs) },
  { folder: "/sys/fs/cgroup", file: "cpu.max", text: (quotaUs: number) => `${quotaUs} ${periodUs}` },
] as const;

let groups = 0;

/**
 * @param cores processors' worth of time
 * @returns `join`: the file that a process writes its id to, to be in the group; `remove`: once it is empty. null where this
 *   user cannot make one
 */
export function quotaGroup(cores: number): { readonly join: string; remove(): void } | null {
  const name = `flowturbo-bench-${process.pid}-${groups++}`;
  for (const { folder, file, text } of hierarchies) {
    if (!existsSync(path.join(folder, "cgroup.procs"))) continue;
    const group = path.join(folder, name);
    try {
      mkdirSync(group);
      try {
        writeFileSync(path.join(group, file), text(cores * periodUs));
        return { join: path.join(group, "cgroup.procs"), remove: () => rmdirSync(group) };
      } catch {
        rmdirSync(group);
      }
    } catch {}
  }
  return null;
}
