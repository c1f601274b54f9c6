// The processes that run graphs for this one, found by /proc: for tests that kill or stop them. Linux only.
import { readdirSync, readFileSync } from "node:fs";

/** Children of this process that run that entry of dist/, by /proc; Linux only. */
export function hosts(entry = "onnxruntime-host"): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
        const [state, parent] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
        return Number(parent) === process.pid && state !== "Z" && command(pid).includes(entry);
      } catch {
        return false;
      }
    });
}
const command = (pid: number) => readFileSync(`/proc/${pid}/cmdline`, "utf8");
