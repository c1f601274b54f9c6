/**
 * On a GPU: every engine and schedule as `npm run verify:gpu` measures them (launches by CUDA events, programs launch by
 * launch and as one CUDA graph), then a whole picture against what else draws one there: the graphs of bench/peers/export.py
 * on onnxruntime-node's CUDA and TensorRT providers, and diffusers with and without torch.compile. What is not present is
 * named; without a GPU the page says so, and why.
 *
 *   npm run bench:gpu -- [--model FOLDER] [--steps 28] [--rounds 20]
 */

import { execFile, spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync } from "node:fs";
import path from "node:path";
import { parseArgs, promisify } from "node:util";
import { embeddedModel, FlowTurbo } from "flowturbo";
import { open } from "./peers/onnxruntime.mjs";
import { Pipeline, peerPython, reason } from "./peers/python.js";
import { format, machineLine, paired, ratios, report, root, spread, table } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string", default: embeddedModel },
    steps: { type: "string", default: "28" },
    rounds: { type: "string", default: "20" },
  },
});
const [steps, rounds] = [Number(flags.steps), Number(flags.rounds)];
const out = path.join(root, "bench/.work/gpu");
rmSync(out, { recursive: true, force: true });

const tsx = path.join(root, "node_modules/tsx/dist/cli.mjs");
const verify = [tsx, "--tsconfig", path.join(root, "bench/tsconfig.json"), path.join(root, "verify/gpu.ts")];
const { status, stderr } = spawnSync(
  process.execPath,
  [...verify, flags.model, "--rounds", flags.rounds, "--out", out],
  {
    encoding: "utf8",
    cwd: root,
  },
);
const page = ["# On a GPU", "", "`npm run bench:gpu` on a machine with one.", ""];
if (status === 3) {
  const why = stderr.trim().split("\n").slice(1);
  console.log(`not measured: there is no GPU here\n${why.join("\n")}`);
  page.push(
    "**Not measured yet.** Where this page was written there was no GPU:",
    "",
    ...why.map((line) => `- ${line}`),
  );
  await report("gpu", { measured: false, why }, [...page, "", machineLine()].join("\n"));
} else {
  if (!existsSync(path.join(out, "report.json"))) throw new Error(`verify:gpu ended with ${status}: ${stderr}`);
  const verified = JSON.parse(readFileSync(path.join(out, "report.json"), "utf8")) as { passed: boolean };
  page.push(readFileSync(path.join(out, "report.md"), "utf8"));
  const { rows, missing } = await pictures();
  page.push(
    `## A picture, ${steps} Euler steps with guidance`,
    "",
    table([
      ["contender", "ratio", "ms"],
      ...rows.map(({ name, ratio, time }) => [name, format(ratio), format(time, 1)]),
    ]),
    "",
    ...missing.map((line) => `- ${line}`),
    "",
    machineLine(),
  );
  await report("gpu", { measured: true, verified, steps, rounds, rows, missing }, page.join("\n"));
  process.exitCode = verified.passed ? 0 : 1;
}

async function pictures() {
  const size = { guidance: 4.5, size: 0, tokens: 256, prompt: "a red circle" };
  const missing: string[] = [];
  const contenders: Record<string, () => Promise<number>> = {};
  const closing: (() => unknown)[] = [];
  const timed = (draw: () => Promise<unknown>) => async () => {
    const start = performance.now();
    await draw();
    return performance.now() - start;
  };
  for (const capture of [false, true]) {
    const model = await FlowTurbo.load(flags.model, { capture });
    closing.push(() => model.dispose());
    Object.assign(size, { size: model.nativeSize.width });
    contenders[`flowturbo, ${model.runtime.name}${capture ? ", as one CUDA graph" : ""}`] = timed(() =>
      model.generate({ prompt: size.prompt, sampler: "euler", steps, guidanceScale: size.guidance, seed: 1 }),
    );
  }
  const peer = await peerPython();
  if ("missing" in peer) missing.push(`Not measured, all peers: ${peer.missing}.`);
  else {
    const graphs = path.join(root, "bench/.work/peers", `graphs-${path.basename(flags.model)}`);
    await promisify(execFile)(peer.python, [path.join(root, "bench/peers/export.py"), flags.model, graphs], {
      maxBuffer: 2 ** 26,
    });
    for (const provider of ["cuda", "tensorrt"])
      try {
        const driver = await open(graphs, { executionProviders: [provider] });
        await driver.generate({ ...size, steps: 1 });
        closing.push(() => driver.release());
        contenders[`onnxruntime-node, ${provider}`] = timed(() => driver.generate({ ...size, steps }));
      } catch (error) {
        missing.push(`Not measured, onnxruntime-node with its ${provider} provider: ${reason(error)}.`);
      }
    for (const args of [[], ["--compile"]])
      try {
        const pipeline = await Pipeline.start(peer.python, flags.model, [
          "--device",
          "cuda",
          "--dtype",
          "bfloat16",
          ...args,
        ]);
        closing.push(() => pipeline.close());
        await pipeline.ask({ ...size, steps: 1, seed: 1 });
        contenders[`diffusers${args.length > 0 ? ", torch.compile" : ""}`] = timed(() =>
          pipeline.ask({ ...size, steps, seed: 1 }),
        );
      } catch (error) {
        missing.push(`Not measured, diffusers ${args.join(" ")}: ${reason(error)}.`);
      }
  }
  const times = await paired(contenders, rounds, 2);
  for (const close of closing) await close();
  const [first] = Object.keys(times) as [string];
  const rows = Object.entries(times).map(([name, values]) => ({
    ...{ name, time: spread(values), ratio: ratios(values, times[first]!) },
  }));
  for (const { name, ratio, time } of rows) console.log(`${name}: ${format(ratio)} ×, ${format(time, 1)} ms`);
  return { rows, missing };
}
