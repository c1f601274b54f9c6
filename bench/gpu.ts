/**
 * On a GPU: every engine and schedule as `npm run verify:gpu` measures them (launches by CUDA events, programs launch by
 * launch and as one CUDA graph), then a whole picture, side by side and from process start, against what else draws one
 * there: the graphs of bench/peers/export.py on onnxruntime-node's CUDA and TensorRT providers, and diffusers with and
 * without torch.compile. What is not present is named; without a GPU the page says so, and why.
 *
 *   npm run bench:gpu -- [--model FOLDER] [--steps 28] [--rounds 20]
 */

import { execFile, spawnSync } from "node:child_process";
import { existsSync, readFileSync, rmSync } from "node:fs";
import path from "node:path";
import { parseArgs, promisify } from "node:util";
import { embeddedModel, FlowTurbo, type GenerateOptions } from "flowturbo";
import { open } from "./peers/onnxruntime.mjs";
import { Pipeline, peerPython, reason } from "./peers/python.js";
import { format, machineLine, measureProcess, paired, ratios, report, root, spread, table } from "./support.js";

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
  const { rows, startRows, missing } = await pictures();
  const shown = (some: typeof rows) =>
    table([
      ["contender", "ratio", "ms"],
      ...some.map(({ name, ratio, time }) => [name, format(ratio), format(time, 1)]),
    ]);
  page.push(
    `## A picture, ${steps} Euler steps with guidance`,
    "",
    shown(rows),
    "",
    "## From process start to PNG",
    "",
    shown(startRows),
    "",
    ...missing.map((line) => `- ${line}`),
    "",
    machineLine(),
  );
  await report("gpu", { measured: true, verified, steps, rounds, rows, startRows, missing }, page.join("\n"));
  process.exitCode = verified.passed ? 0 : 1;
}

/** Who draws, loaded once; then the same in processes of their own. */
async function pictures() {
  const native = await nativeSize();
  const request = { guidance: 4.5, size: native, tokens: 256, prompt: "a red circle", seed: 1 };
  const missing: string[] = [];
  const contenders: Record<string, () => Promise<number>> = {};
  const starts: Record<string, () => Promise<number>> = {};
  const closing: (() => unknown)[] = [];
  const timed = (draw: () => Promise<unknown>) => async () => {
    const start = performance.now();
    await draw();
    return performance.now() - start;
  };
  const started = (command: string, args: readonly string[]) => async () =>
    (await measureProcess(command, args)).milliseconds;
  const equal = { sampler: "euler", steps } as const;
  for (const capture of [false, true]) {
    const model = await FlowTurbo.load(flags.model, { capture });
    closing.push(() => model.dispose());
    const name = `flowturbo, ${model.runtime.name}${capture ? ", as one CUDA graph" : ""}`;
    const draw = (options: GenerateOptions) => timed(() => model.generate(options));
    const asked = { prompt: request.prompt, guidanceScale: request.guidance, seed: request.seed };
    contenders[name] = draw({ ...asked, ...equal });
    contenders[`${name}, default schedule`] = draw(asked);
    const cli = [path.join(root, "dist/cli.js"), "generate", request.prompt, "--model", flags.model, "--seed", "1"];
    const more = ["--guidance", String(request.guidance), "--out", path.join(out, "cli.png")];
    const euler = ["--sampler", "euler", "--steps", String(steps)];
    if (!capture) starts[name] = started(process.execPath, [...cli, ...more, ...euler]);
    if (!capture) starts[`${name}, default schedule`] = started(process.execPath, [...cli, ...more]);
  }
  const peer = await peerPython();
  if ("missing" in peer) missing.push(`Not measured, all peers: ${peer.missing}.`);
  else {
    const graphs = path.join(root, "bench/.work/peers", `graphs-${path.basename(flags.model)}`);
    for (const provider of ["cuda", "tensorrt"])
      try {
        if (provider === "cuda") {
          const script = path.join(root, "bench/peers/export.py");
          await promisify(execFile)(peer.python, [script, flags.model, graphs], { maxBuffer: 2 ** 26 });
        }
        const driver = await open(graphs, { executionProviders: [provider] });
        await driver.generate({ ...request, steps: 1 });
        closing.push(() => driver.release());
        contenders[`onnxruntime-node, ${provider}`] = timed(() => driver.generate({ ...request, steps }));
      } catch (error) {
        missing.push(`Not measured, onnxruntime-node with its ${provider} provider: ${reason(error)}.`);
      }
    for (const compiled of [false, true]) {
      const name = `diffusers${compiled ? ", torch.compile" : ""}`;
      try {
        const args = ["--device", "cuda", "--dtype", "bfloat16", ...(compiled ? ["--compile"] : [])];
        const pipeline = await Pipeline.start(peer.python, flags.model, args);
        closing.push(() => pipeline.close());
        await pipeline.ask({ ...request, steps: 1 });
        contenders[name] = timed(() => pipeline.ask({ ...request, steps }));
        const once = JSON.stringify({ ...request, steps, out: path.join(out, "diffusers.png") });
        const script = path.join(root, "bench/peers/pipeline.py");
        starts[name] = started(peer.python, [script, flags.model, ...args, "--once", once]);
      } catch (error) {
        missing.push(`Not measured, ${name}: ${reason(error)}.`);
      }
    }
  }
  const rowsOf = (times: Record<string, number[]>) => {
    const [first] = Object.keys(times) as [string];
    const rows = Object.entries(times).map(([name, values]) => ({
      ...{ name, time: spread(values), ratio: ratios(values, times[first]!) },
    }));
    for (const { name, ratio, time } of rows) console.log(`${name}: ${format(ratio)} ×, ${format(time, 1)} ms`);
    return rows;
  };
  const rows = rowsOf(await paired(contenders, rounds, 2));
  for (const close of closing) await close();
  return { rows, startRows: rowsOf(await paired(starts, Math.min(rounds, 3), 1)), missing };
}

async function nativeSize(): Promise<number> {
  await using model = await FlowTurbo.load(flags.model);
  return model.nativeSize.width;
}
