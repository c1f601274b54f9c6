/**
 * Threads where the cores are not free: steps of the embedded model by default, on one thread and on a thread a core, with
 * busy neighbours and under quotas of a control group (made where this user may). Contenders go in turn, and ratios are
 * to one thread, so that what else runs on the machine weighs on all of them. A part of bench:scaling.
 */

import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { quotaGroup } from "./quota.js";
import { format, machineLine, measureProcess, ratios, report, root, type Spread, spread, table } from "./support.js";

const cores = os.availableParallelism();
const [size, steps] = [128, 24];

interface Condition {
  readonly name: string;
  /** Programs beside it that never wait. */
  readonly neighbours: number;
  /** Processors' worth of time. */
  readonly quota: number | null;
}
const conditions: readonly Condition[] = [
  { name: "free cores", neighbours: 0, quota: null },
  { name: "one busy neighbour", neighbours: 1, quota: null },
  { name: "a busy neighbour a core", neighbours: cores, quota: null },
  ...[1, cores / 2 + 0.5].map((quota) => ({ name: `a quota of ${quota}`, neighbours: 0, quota })),
];
const contenders: Readonly<Record<string, readonly string[]>> = {
  "1 thread": ["--threads", "1"],
  "a thread a core": ["--threads", String(cores)],
  "by default": [],
};

/** Milliseconds of a step; the first two make the session and warm it. */
async function measure(flags: readonly string[], join: string | null): Promise<number> {
  const out = path.join(root, "bench/.work/contention.png");
  const args = [
    ...[
      path.join(root, "dist/cli.js"),
      "generate",
      "a red circle",
      "--width",
      String(size),
      "--height",
      String(size),
      "--seed",
      "1",
    ],
    ...["--sampler", "euler", "--steps", String(steps), "--guidance", "2", "--json", "--out", out, ...flags],
  ];
  const joined = ["-c", 'echo $$ > "$0"; exec "$@"', join ?? "", process.execPath, ...args];
  const { stdout } = await (join ? measureProcess("/bin/sh", joined) : measureProcess(process.execPath, args));
  const { steps: times } = (JSON.parse(stdout) as { milliseconds: { steps: number[] } }).milliseconds;
  const rest = times.slice(2);
  return rest.reduce((a, b) => a + b, 0) / rest.length;
}

/** Measures all conditions and writes the page. */
export async function measureContention(rounds: number): Promise<void> {
  mkdirSync(path.join(root, "bench/.work"), { recursive: true });
  const results: Record<string, Record<string, { time: Spread; ratio: Spread }> | null> = {};
  for (const { name, neighbours, quota } of conditions) {
    const group = quota === null ? null : quotaGroup(quota);
    if (quota !== null && !group) {
      results[name] = null;
      console.log(`${name}: not measured, since no control group can be made here`);
      continue;
    }
    const busy = Array.from({ length: neighbours }, () => spawn(process.execPath, ["-e", "for (;;);"]));
    try {
      const times: Record<string, number[]> = {};
      for (let round = 0; round < rounds; round++)
        for (const [contender, flags] of Object.entries(contenders)) {
          times[contender] ??= [];
          times[contender].push(await measure(flags, group?.join ?? null));
        }
      const base = times["1 thread"]!;
      results[name] = Object.fromEntries(
        Object.entries(times).map(([contender, all]) => [contender, { time: spread(all), ratio: ratios(all, base) }]),
      );
      for (const [contender, { time, ratio }] of Object.entries(results[name]))
        console.log(`${name}, ${contender}: ${format(time, 1)} ms a step, ${format(ratio)} of one thread's`);
    } finally {
      for (const each of busy) each.kill("SIGKILL");
      group?.remove();
    }
  }
  const names = Object.keys(contenders);
  const page = [
    "# Threads where the cores are not free",
    "",
    `\`npm run bench:scaling -- --only threads\`. The embedded model, ${size} × ${size}, one picture with guidance: milliseconds of a step, in parentheses the ratio to one thread, round by round: above 1 is`,
    `slower. Every run is a process of its own, contenders in turn, median and range of ${rounds} rounds. By default flowturbo takes a thread for each physical core, within the control group's quota.`,
    "",
    table([
      ["while", ...names],
      ...Object.entries(results).map(([name, of]) => [
        name,
        ...names.map((contender) =>
          of ? `${of[contender]!.time.median.toFixed(1)} (${format(of[contender]!.ratio)})` : "not measured",
        ),
      ]),
    ]),
    "",
    "A quota is of processor time: threads beyond it spend it faster and then stand still together. Beside busy neighbours threads that wait for each other spin for 20 µs at most.",
    "",
    machineLine(),
  ];
  await report("scaling-threads", { rounds, size, cores, conditions: results }, page.join("\n"));
}
