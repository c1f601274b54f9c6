/**
 * Cold start: from the start of the process to the PNG on the disk, on the embedded model, and how that time divides.
 * "default" is `flowturbo generate` at its defaults, "Euler" with 28 Euler steps, which plain onnxruntime-node is timed beside
 * where the peers' Python is there for its graphs (bench/peers). "node" is an empty script; what a command spends outside of
 * load and total is Node, imports, files and the end.
 *
 *   npx tsx bench/cold-start.ts [rounds] [--base <folder of another built clone>]
 */

import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { embeddedModel } from "../lib/flowturbo.js";
import { pythonWith, reason, runScript } from "./peers/python.js";
import { format, machineLine, paired, ratios, report, root, type Spread, spread, table } from "./support.js";

const { values: flags, positionals } = parseArgs({
  options: { base: { type: "string" } },
  allowPositionals: true,
});
const rounds = Number(positionals[0] ?? 9);
const steps = 28;
const request = { prompt: "a large red square", steps, guidance: 4.5, size: 64, tokens: 16, seed: 1, out: "peer.png" };
const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-cold-start-"));
const euler = ["--sampler", "euler", "--steps", String(steps), "--max-sequence-length", String(request.tokens)];

/** Milliseconds until a Node process has ended, and what it printed. */
function timed(args: readonly string[]): { milliseconds: number; stdout: string } {
  const start = performance.now();
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: folder, encoding: "utf8" });
  if (status !== 0) throw new Error(`node ${args.join(" ")} ended with code ${status}: ${stderr}`);
  return { milliseconds: performance.now() - start, stdout };
}

/** What the command itself says of its default picture, by part, in milliseconds. */
const parts: Record<string, number[]> = {};
function draw(clone: string, more: readonly string[] = [], isWatched = false): number {
  const cli = path.join(clone, "dist/cli.js");
  const { milliseconds, stdout } = timed([cli, "generate", request.prompt, "--seed", "1", "--json", ...more]);
  if (!isWatched) return milliseconds;
  const said = (JSON.parse(stdout) as { milliseconds: Record<string, number> & { steps: number[] } }).milliseconds;
  const sum = (values: readonly number[]) => values.reduce((a, b) => a + b, 0);
  const spent: Record<string, number> = {
    ...{
      load: said.load!,
      encode: said.encode!,
      "first step": said.steps[0]!,
      "other steps": sum(said.steps.slice(1)),
    },
    ...{ decode: said.decode!, rest: milliseconds - said.load! - said.total! },
  };
  for (const [name, value] of Object.entries(spent)) parts[name] = [...(parts[name] ?? []), value];
  return milliseconds;
}

const peerName = "onnxruntime-node";
const contenders: Record<string, () => Promise<number>> = {
  node: async () => timed(["-e", "0"]).milliseconds,
  default: async () => draw(root, [], true),
  Euler: async () => draw(root, euler),
};
const missing: string[] = [];
if (flags.base) {
  const base = path.resolve(flags.base);
  if (!existsSync(path.join(base, "dist/cli.js"))) throw new Error(`${base} has no dist/cli.js: build it first.`);
  contenders["base, default"] = async () => draw(base);
  contenders["base, Euler"] = async () => draw(base, euler);
}
const graphs = await exportedGraphs();
if ("missing" in graphs) missing.push(`Not measured, ${peerName}: ${graphs.missing}.`);
else {
  const driver = path.join(root, "bench/peers/onnxruntime.mjs");
  contenders[peerName] = async () => timed([driver, graphs.folder, JSON.stringify(request)]).milliseconds;
}

const warmUp = 2;
const times = await paired(contenders, rounds, warmUp);
rmSync(folder, { recursive: true });
const spreads = Object.fromEntries(Object.entries(times).map(([name, values]) => [name, spread(values)]));
const divided = Object.fromEntries(Object.entries(parts).map(([name, values]) => [name, spread(values.slice(warmUp))]));
const pairs: [name: string, over: string][] = [
  ["default", "base, default"],
  ["Euler", "base, Euler"],
  ["Euler", peerName],
];
const compared: Record<string, Spread> = Object.fromEntries(
  pairs
    .filter(([, over]) => times[over])
    .map(([name, over]) => [`${name} / ${over}`, ratios(times[name]!, times[over]!)]),
);
for (const [name, value] of [...Object.entries(spreads), ...Object.entries(divided)])
  console.log(`${name.padEnd(16)} ${format(value, 0)} ms`);
for (const [name, value] of Object.entries(compared)) console.log(`${name.padEnd(28)} ${format(value)}`);

const listed = (values: Record<string, Spread>, digits: number) =>
  Object.entries(values).map(([name, value]) => [name, format(value, digits)]);
const page = [
  "# From process start to PNG",
  "",
  `\`flowturbo generate\` on the embedded model at its defaults, and with ${steps} Euler steps as plain onnxruntime-node draws them; median and range of ${rounds} rounds in turn, beside an empty Node process. \`npm run bench:cold-start\`.`,
  "",
  table([["process", "ms"], ...listed(spreads, 0)]),
  "",
  "The default, as it times itself; the rest is Node, imports, files and the end.",
  "",
  table([["part", "ms"], ...listed(divided, 0)]),
  "",
  ...(Object.keys(compared).length > 0
    ? ["Ratios of each round.", "", table([["ratio", "×"], ...listed(compared, 2)]), ""]
    : []),
  ...missing.flatMap((line) => [line, ""]),
  machineLine(),
];
await report("cold-start", { milliseconds: spreads, parts: divided, ratios: compared }, page.join("\n"));

/** The graphs of torch.onnx for plain onnxruntime-node, or why there are none. */
async function exportedGraphs(): Promise<{ readonly folder: string } | { readonly missing: string }> {
  const given = process.env.FLOWTURBO_BENCH_PYTHON;
  const venv = path.join(root, "bench/.work/peers-python");
  // Nothing is installed for this: bench:peers does that.
  if (!given && !existsSync(venv)) return { missing: "neither FLOWTURBO_BENCH_PYTHON nor the peers' Python is there" };
  const out = path.join(root, "bench/.work/graphs-shapes");
  if (existsSync(path.join(out, "config.json"))) return { folder: out };
  try {
    await runScript(await pythonWith("torch"), "export.py", [embeddedModel, out]);
    return { folder: out };
  } catch (error) {
    return { missing: reason(error) };
  }
}
