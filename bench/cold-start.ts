/**
 * Cold start: from the start of the process to the PNG on the disk, on the embedded model at its defaults, and how that
 * time divides. "node" is an empty script; "start" is what lies between it and the first line that FlowTurbo reports.
 *
 *   npx tsx bench/cold-start.ts [rounds]
 */

import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { format, machineLine, paired, report, root, spread, table } from "./support.js";

const rounds = Number(process.argv[2] ?? 9);
const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-cold-start-"));
const parts: Record<string, number[]> = { load: [], encode: [], steps: [], decode: [] };

const timed = (args: string[]) => {
  const start = performance.now();
  const { status, stdout } = spawnSync(process.execPath, args, { cwd: folder, encoding: "utf8" });
  if (status !== 0) throw new Error(`node ${args.join(" ")} ended with code ${status}`);
  return { milliseconds: performance.now() - start, stdout };
};
const times = await paired(
  {
    node: async () => timed(["-e", "0"]).milliseconds,
    picture: async () => {
      const { milliseconds, stdout } = timed([
        path.join(root, "dist/cli.js"),
        "generate",
        "a large red square",
        "--seed",
        "1",
        "--json",
      ]);
      const spent = (JSON.parse(stdout) as { milliseconds: Record<string, number> & { steps: number[] } }).milliseconds;
      for (const part of ["load", "encode", "decode"]) parts[part]!.push(spent[part]!);
      parts.steps!.push(spent.steps.reduce((a, b) => a + b, 0));
      return milliseconds;
    },
  },
  rounds,
);
rmSync(folder, { recursive: true });

const parted = Object.fromEntries(
  Object.entries({ ...times, ...parts }).map(([name, values]) => [name, spread(values)]),
);
for (const [name, value] of Object.entries(parted)) console.log(`${name.padEnd(8)} ${format(value, 0)} ms`);
const page = [
  "# From process start to PNG",
  "",
  `\`flowturbo generate\` on the embedded model at its defaults, median and range of ${rounds} rounds, beside an empty Node process. \`npm run bench:cold-start\`.`,
  "",
  table([["part", "ms"], ...Object.entries(parted).map(([name, value]) => [name, format(value, 0)])]),
  "",
  machineLine(),
];
await report("cold-start", { milliseconds: parted }, page.join("\n"));
