/**
 * What the pipeline adds to the sessions that it runs: 20 Euler steps through FlowTurbo.generate (schedule, noise,
 * child process, registers, checks, reports) against the same 20 session runs called directly on onnxruntime-node in
 * this process with inputs ready. The prompt's embedding is cached and the decoder's time is taken off, so both sides
 * are 20 evaluations of the same graph. Bar: at most 1.05.
 *
 * Both sides open their session alike: with ONNX Runtime's defaults the direct side's threads would spin on into the
 * pipeline's turn (bench:trials has what each setting costs). And both are warm: Node compiles a service's code in its
 * first requests, which are no part of what later ones pay.
 *
 *   npx tsx bench/overhead.ts [rounds]
 */

import "./telemetry.js";
import { FlowTurbo } from "flowturbo";
import * as ort from "onnxruntime-node";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { embeddedModel } from "../lib/flowturbo.js";
import { GraphLibrary } from "../lib/networks/library.js";
import { sessionOptions } from "../lib/runtimes/onnxruntime/sessions.js";
import { format, machineLine, paired, ratios, report, type Spread, spread, table } from "./support.js";

const given = process.argv[2] === undefined ? null : Number(process.argv[2]);
const steps = 20;
/** Rounds of each size unless they are given: as many as take so long, and at least so many. */
const [seconds, fewest] = [30, 15];
/** Milliseconds for which both sides run before they are timed. */
const warmUp = 15_000;

const checkpoint = await openCheckpoint(embeddedModel);
const graphs = new GraphLibrary(checkpoint);
const session = await ort.InferenceSession.create(
  graphs.get("predict.guidance").bytes,
  sessionOptions({ root: "/", widening: "folded" }, {}),
);

const results: Record<string, { pipeline: Spread; direct: Spread; ratio: Spread }> = {};
for (const size of [64, 128, 256]) {
  const side = size / checkpoint.vae.config.factor;
  const tensor = (...shape: number[]) =>
    new ort.Tensor("float32", new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(0.1), shape);
  const { jointAttentionDim, pooledProjectionDim, numAttentionHeads, attentionHeadDim } = checkpoint.transformer.config;
  const channels = checkpoint.vae.config.latentChannels;
  const tokens = checkpoint.tokenizer!.maxLength + checkpoint.tokenizer3!.maxLength;
  let feeds: Record<string, ort.Tensor> = {
    x: tensor(1, channels, side, side),
    velocity: tensor(2, channels, side, side),
    context: tensor(2, tokens, jointAttentionDim),
    pooled: tensor(2, pooledProjectionDim),
    position_embedding: tensor(1, (side / 2) ** 2, numAttentionHeads * attentionHeadDim),
    ...Object.fromEntries(["sigma", "a_in", "a_old", "a_new", "guidance"].map((name) => [name, tensor(1)])),
  };
  const direct = async () => {
    const start = performance.now();
    for (let step = 0; step < steps; step++) {
      const out = await session.run(feeds);
      feeds = { ...feeds, x: out.x_next!, velocity: out.velocity_next! };
    }
    return performance.now() - start;
  };

  await using model = await FlowTurbo.load(undefined, { weights: "folded", measureCosts: false });
  const pipeline = async () => {
    const start = performance.now();
    const { timings } = await model.generate({
      prompt: "a red circle",
      sampler: "euler",
      steps,
      width: size,
      height: size,
      seed: 1,
    });
    return performance.now() - start - timings.decode;
  };
  const start = performance.now();
  let warm = 0;
  for (; performance.now() - start < warmUp; warm++) {
    await pipeline();
    await direct();
  }
  // What disturbs the machine takes the same milliseconds of a short round as of a long one: short ones need more rounds.
  const rounds = given ?? Math.max(fewest, Math.round((1000 * seconds * warm) / (performance.now() - start)));
  const times = await paired({ pipeline, direct }, rounds, 0);
  const ratio = ratios(times.pipeline!, times.direct!);
  console.log(
    `${size} × ${size}: pipeline ${format(spread(times.pipeline!))} ms, direct ${format(spread(times.direct!))} ms, ratio ${format(ratio, 3)}`,
  );
  results[size] = { pipeline: spread(times.pipeline!), direct: spread(times.direct!), ratio };
}
const page = [
  "# What the pipeline adds to the sessions that it runs",
  "",
  `${steps} Euler steps through \`generate\` against the same session runs called directly with the same settings, paired rounds after ${warmUp / 1000} s of both. Bar: 1.05. \`npm run bench:overhead\`.`,
  "",
  table([
    ["pixels", "rounds", "ratio", "pipeline, ms", "direct, ms"],
    ...Object.entries(results).map(([size, { pipeline, direct, ratio }]) => [
      `${size} × ${size}`,
      String(ratio.runs),
      ...[format(ratio, 3), format(pipeline, 0), format(direct, 0)],
    ]),
  ]),
  "",
  machineLine(),
];
await report("overhead", { steps, bar: 1.05, sizes: results }, page.join("\n"));
