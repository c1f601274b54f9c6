/**
 * Building at full width: the guided step of SD3.5-medium (24 layers, 13 of them with a second attention, random
 * bfloat16 weights) at 1024 × 1024, with TensorRT-RTX, for batch 1 and for batches 1 and 2. Each build is a process of
 * its own. Reports time, peak memory (of the process; anonymous memory alone, since mapped weights can be dropped) and
 * the size of the plan; bars: weights are stored once (two profiles at most 1.10 × one), every attention is fused.
 * Needs TensorRT-RTX (`npm run fetch:tensorrt-rtx`, FLOWTURBO_TENSORRT_RTX_DIR), 16 GB of memory and 15 GB of disk.
 *
 *   npx tsx bench/build.ts
 */

import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync } from "node:fs";
import path from "node:path";
import { openWeights, readTransformerConfig } from "../lib/checkpoint/index.js";
import { gigabytes } from "../lib/common/memory.js";
import { mmditWidth } from "../lib/networks/index.js";
import { emitStep } from "../lib/networks/step.js";
import { EngineCompiler } from "../lib/runtimes/tensorrt/compile.js";
import { tensorRtEmitOptions } from "../lib/runtimes/tensorrt/row.js";
import { randomMedium } from "./random-checkpoint.js";
import { machineLine, report, root, table } from "./support.js";

const side = 1024 / 8;
const tokens = 77 + 256;

interface Build {
  readonly batches: readonly number[];
  readonly seconds: number;
  readonly planBytes: number;
  readonly peakBytes: number;
  readonly peakAnonymousBytes: number;
  readonly fusedAttentions: number;
  readonly attentions: number;
  readonly version: string;
}

/** A line of /proc/self/status, in bytes. */
function memory(line: string): number {
  const kilobytes = readFileSync("/proc/self/status", "utf8").match(new RegExp(`^${line}:\\s+(\\d+)`, "m"))?.[1];
  return Number(kilobytes) * 1024;
}

async function build(folder: string, batches: readonly number[]): Promise<Build> {
  const config = await readTransformerConfig(path.join(folder, "transformer/config.json"));
  const weights = await openWeights(path.join(folder, "transformer"), "diffusion_pytorch_model");
  const emit = tensorRtEmitOptions()({
    ...{
      name: "predict",
      dtype: "BF16",
      eightBit: [],
      overflowsInFloat16: false,
      isConvolutional: false,
      isOfSteps: true,
      bytesOf16Bit: 0,
    },
  });
  const graph = emitStep("predict", "predict", weights, config, { ...emit, guidance: true, numTrainTimesteps: 1000 });
  const profiles = batches.map((batch) => ({
    x: [batch, 16, side, side],
    velocity: [2 * batch, 16, side, side],
    context: [2 * batch, tokens, config.jointAttentionDim],
    pooled: [2 * batch, config.pooledProjectionDim],
    position_embedding: [1, (side / config.patchSize) ** 2, mmditWidth(config)],
    ...{ sigma: [batch], a_in: [batch], a_old: [batch], a_new: [batch], guidance: [batch] },
  }));
  const cache = path.join(root, "bench/.work/build-cache");
  const logFile = path.join(root, `bench/.work/build-${batches.length}.log`);
  rmSync(cache, { recursive: true, force: true });
  rmSync(logFile, { force: true });
  mkdirSync(cache, { recursive: true, mode: 0o700 });
  const compiler = await EngineCompiler.open({ kind: "tensorrt-rtx", targets: [86, 89, 120], cache });
  let peakAnonymousBytes = 0;
  const sampler = setInterval(() => {
    peakAnonymousBytes = Math.max(peakAnonymousBytes, memory("RssAnon"));
  }, 50);
  const engine = await compiler.compile({ graph, profiles }, { files: weights.files, logFile });
  clearInterval(sampler);
  rmSync(cache, { recursive: true, force: true });
  const fused = new Set(readFileSync(logFile, "utf8").match(/_gemm_mha_v2_myl\d+_\d+/g));
  return {
    batches,
    seconds: engine.seconds,
    planBytes: engine.bytes,
    peakBytes: memory("VmHWM"),
    peakAnonymousBytes,
    fusedAttentions: fused.size,
    attentions: batches.length * (config.numLayers + config.dualAttentionLayers.length),
    version: compiler.library.version.join("."),
  };
}

const { folder, bytes } = await randomMedium();
const child = process.argv[2];
if (child !== undefined) {
  console.log(JSON.stringify(await build(folder, child.split(",").map(Number))));
} else {
  console.log(`transformer: ${gigabytes(bytes)} GB of bfloat16`);
  const builds: Build[] = [];
  for (const batches of ["1", "1,2"]) {
    const script = path.join(root, "bench/build.ts");
    const tsx = path.join(root, "node_modules/tsx/dist/cli.mjs");
    const output = execFileSync(
      process.execPath,
      [tsx, "--tsconfig", path.join(root, "bench/tsconfig.json"), script, batches],
      {
        encoding: "utf8",
        stdio: ["ignore", "pipe", "inherit"],
      },
    );
    const result = JSON.parse(output) as Build;
    builds.push(result);
    console.log(
      `batches ${batches}: ${result.seconds.toFixed(0)} s, plan ${gigabytes(result.planBytes)} GB, peak ${gigabytes(result.peakBytes)} GB ` +
        `(${gigabytes(result.peakAnonymousBytes)} GB anonymous), ${result.fusedAttentions} of ${result.attentions} attentions fused`,
    );
  }
  const ratio = builds[1]!.planBytes / builds[0]!.planBytes;
  console.log(`two profiles: ${ratio.toFixed(3)} × one`);
  const page = [
    "# The engine of SD3.5-medium's predictor at full width",
    "",
    `24 layers, ${gigabytes(bytes)} GB of random bfloat16 weights, 1024 × 1024, guided, for targets 8.6, 8.9 and 12.0, built without a GPU by TensorRT-RTX ${builds[0]!.version}. Bar: two profiles at most 1.10 × the plan of one. \`npm run bench:build\` (15 GB of memory and of disk).`,
    "",
    table([
      ["batches", "build, s", "plan", "peak", "of it anonymous", "attentions fused"],
      ...builds.map((one) => [
        one.batches.join(", "),
        one.seconds.toFixed(0),
        ...[one.planBytes, one.peakBytes, one.peakAnonymousBytes].map((value) => `${gigabytes(value)} GB`),
        `${one.fusedAttentions} of ${one.attentions}`,
      ]),
    ]),
    "",
    `Two profiles: ${ratio.toFixed(3)} × one.`,
    "",
    machineLine(),
  ];
  await report("build", { weightBytes: bytes, bars: { ratio: 1.1 }, ratio, builds }, page.join("\n"));
}
