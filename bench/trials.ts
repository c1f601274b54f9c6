/**
 * What was tried to make a step cheaper on the CPU, each trial against what the product does, in turn, on the same graph
 * and inputs: static shapes, Attention against its primitives, Gemm against MatMul, what does not change between steps
 * (context embedding, pooled projection) computed once, the unconditional half, threads and session settings, and the
 * decoder with its share of a short run. Sessions are bare ones of onnxruntime-node in this process, with the settings
 * of the product but for what is tried. Ratios above 1: slower than the product.
 *
 *   npm run bench:trials -- [--rounds 7] [--only shapes|width] [--trial vae]
 */

import "./telemetry.js";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { embeddedModel, FlowTurbo } from "flowturbo";
import * as ort from "onnxruntime-node";
import { type Checkpoint, openCheckpoint } from "../lib/checkpoint/index.js";
import { mmditWidth } from "../lib/networks/index.js";
import { Layers } from "../lib/networks/layers.js";
import { GraphLibrary } from "../lib/networks/library.js";
import { cpuEmitOptions, type EmitOptions, GraphBuilder, type OnnxGraph } from "../lib/onnx/index.js";
import { sessionOptions } from "../lib/runtimes/onnxruntime/sessions.js";
import { bars } from "./plot.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import { format, machineLine, paired, ratios, report, resultsFolder, type Spread, spread, table } from "./support.js";

const { values: flags } = parseArgs({
  options: { rounds: { type: "string", default: "7" }, only: { type: "string" }, trial: { type: "string" } },
});
const rounds = Number(flags.rounds);
const cores = os.availableParallelism();

type Settings = ort.InferenceSession.SessionOptions;
type Feeds = Record<string, ort.Tensor>;

interface Variant {
  readonly name: string;
  readonly graph: OnnxGraph;
  readonly feeds: Feeds;
  readonly settings?: Settings;
}
interface Trial {
  readonly name: string;
  readonly about: string;
  /** The first is what the product does. */
  readonly variants: readonly [Variant, ...Variant[]];
}
interface Subject {
  readonly name: string;
  readonly checkpoint: Checkpoint;
  readonly folder: string;
  readonly size: number;
  readonly tokens: number;
  readonly rounds: number;
  /** Runs of a session that make one measurement. */
  readonly runs: number;
}

const filled = (...shape: number[]) =>
  new ort.Tensor(
    "float32",
    Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => Math.sin(i) / 2),
    shape,
  );

/** Inputs of a step on one picture. */
function stepFeeds({ checkpoint, size, tokens }: Subject, guided: boolean): Feeds {
  const { config } = checkpoint.transformer;
  const rows = guided ? 2 : 1;
  const side = size / checkpoint.vae.config.factor;
  const all: Feeds = {
    x: filled(1, config.outChannels, side, side),
    velocity: filled(rows, config.outChannels, side, side),
    context: filled(rows, tokens, config.jointAttentionDim),
    pooled: filled(rows, config.pooledProjectionDim),
    position_embedding: filled(1, (side / config.patchSize) ** 2, mmditWidth(config)),
    ...Object.fromEntries(["sigma", "a_in", "a_old", "a_new"].map((name) => [name, filled(1)])),
  };
  return guided ? { ...all, guidance: filled(1) } : all;
}

/** The part of a step that only the prompt decides: what computing it once could save of each step. */
function promptPart({ checkpoint }: Subject): OnnxGraph {
  const { weights, config } = checkpoint.transformer;
  const width = mmditWidth(config);
  const g = new GraphBuilder("prompt");
  const context = g.input("context", "float32", ["rows", "tokens", config.jointAttentionDim]);
  const pooled = g.input("pooled", "float32", ["rows", config.pooledProjectionDim]);
  const l = new Layers(g, weights, cpuEmitOptions, g.op("Shape", [context], { start: 0, end: 1 }));
  const embedded = l.linear(context, "context_embedder", config.jointAttentionDim, width);
  const embedder = "time_text_embed.text_embedder";
  const first = l.silu(l.linear(pooled, `${embedder}.linear_1`, config.pooledProjectionDim, width, { rank: 2 }));
  g.output("context_embedded", embedded, ["rows", "tokens", width]);
  g.output("pooled_embedded", l.linear(first, `${embedder}.linear_2`, width, width, { rank: 2 }), ["rows", width]);
  return g.build();
}

function trialsOf(subject: Subject): Trial[] {
  const { checkpoint, size } = subject;
  const emitted = (name: string, options: Partial<EmitOptions> = {}) =>
    new GraphLibrary(checkpoint, () => ({ ...cpuEmitOptions, ...options })).get(name);
  const feeds = stepFeeds(subject, true);
  const predict = emitted("predict.guidance");
  const step = (name: string, settings?: Settings, graph = predict): Variant => ({
    ...{ name, graph, feeds, ...(settings && { settings }) },
  });
  const dimensions: Record<string, number> = {};
  for (const [name, shape] of predict.inputs)
    for (const [axis, dimension] of shape.entries())
      if (typeof dimension === "string") dimensions[dimension] = feeds[name]!.dims[axis]!;
  const side = size / checkpoint.vae.config.factor;
  const latents = { latents: filled(1, checkpoint.vae.config.latentChannels, side, side) };
  const decoder = (name: string, options: Partial<EmitOptions> = {}, settings?: Settings): Variant => ({
    ...{ name, graph: emitted("vae_decoder", options), feeds: latents, ...(settings && { settings }) },
  });
  const spinning = { session: { intra_op: { allow_spinning: "0" } } };
  const trials: Trial[] = [
    {
      name: "static shapes",
      about: "One session for every (batch, size) with its dimensions fixed, against one for all of them.",
      variants: [
        step("dynamic shapes"),
        step("static shapes", { freeDimensionOverrides: dimensions }),
        step("static shapes, memory pattern", { freeDimensionOverrides: dimensions, enableMemPattern: true }),
      ],
    },
    {
      name: "attention",
      about:
        "Attention of opset 23 with few tokens and MultiHeadAttention block by block with many, chosen as the graph runs, against each of them alone and MatMul, Softmax, MatMul.",
      variants: [
        step("by the number of tokens"),
        step("Attention", undefined, emitted("predict.guidance", { attention: "operator" })),
        step("MultiHeadAttention", undefined, emitted("predict.guidance", { attention: "contrib" })),
        step("primitives", undefined, emitted("predict.guidance", { attention: "matmul" })),
      ],
    },
    {
      name: "linear",
      about: "Gemm on the stored layout against Transpose and MatMul, with weights folded.",
      variants: [step("Gemm"), step("MatMul", undefined, emitted("predict.guidance", { linear: "matmul" }))],
    },
    {
      name: "prompt",
      about:
        "What does not change between steps (context embedding, pooled projection): its part of a step, which computing it once would save.",
      variants: [
        step("the whole step"),
        {
          name: "that part alone",
          graph: promptPart(subject),
          feeds: { context: feeds.context!, pooled: feeds.pooled! },
        },
      ],
    },
    {
      name: "guidance",
      about:
        "A step with both halves against one without the unconditional half, which runs where guidanceScale is 1 or less.",
      variants: [
        step("both halves"),
        { name: "conditional half", graph: emitted("predict"), feeds: stepFeeds(subject, false) },
      ],
    },
    {
      name: "threads",
      about: `Threads and session settings; ${cores} cores.`,
      variants: [
        step("a thread a core"),
        ...[...new Set([1, 2, cores >> 1, 2 * cores])]
          .filter((threads) => threads >= 1 && threads !== cores)
          .map((threads) => step(threads === 1 ? "1 thread" : `${threads} threads`, { intraOpNumThreads: threads })),
        step("no spinning", { extra: spinning }),
        step("spinning without a limit", { extra: { session: { intra_op: {} } } }),
        step("spinning between runs", { extra: { session: { force_spinning_stop: "0" } } }),
        step("parallel execution", { executionMode: "parallel", interOpNumThreads: cores }),
        step("memory pattern", { enableMemPattern: true }),
      ],
    },
    {
      name: "vae",
      about:
        "The decoder: group normalisation by InstanceNormalization against the operator, attention, static shapes.",
      variants: [
        decoder("InstanceNormalization, attention by the number of tokens"),
        decoder("GroupNormalization", { groupNorm: "operator" }),
        decoder("primitives for attention", { attention: "matmul" }),
        decoder("static shapes", {}, { freeDimensionOverrides: { rows: 1, height: side, width: side } }),
      ],
    },
  ];
  return trials.filter(({ name }) => !flags.trial || name === flags.trial);
}

interface Outcome {
  readonly name: string;
  readonly about: string;
  readonly rows: readonly { readonly name: string; readonly ratio: Spread; readonly time: Spread }[];
}

async function run({ variants, name, about }: Trial, { rounds, runs }: Subject): Promise<Outcome> {
  const sessions: ort.InferenceSession[] = [];
  const contenders: Record<string, () => Promise<number>> = {};
  for (const { name, graph, feeds, settings = {} } of variants) {
    const product = sessionOptions({ root: "/", widening: "folded" }, {});
    const extra = { session: { ...sessionOf(product), ...sessionOf(settings) } };
    const session = await ort.InferenceSession.create(graph.bytes, { ...product, ...settings, extra });
    sessions.push(session);
    contenders[name] = async () => {
      const start = performance.now();
      for (let i = 0; i < runs; i++) await session.run(feeds);
      return (performance.now() - start) / runs;
    };
  }
  const times = await paired(contenders, rounds, 1);
  for (const session of sessions) await session.release();
  const base = times[variants[0].name]!;
  const rows = Object.entries(times).map(([name, values]) => ({
    ...{ name, ratio: ratios(values, base), time: spread(values) },
  }));
  for (const row of rows) console.log(`${name}, ${row.name}: ${format(row.ratio)} ×, ${format(row.time, 1)} ms`);
  return { name, about, rows };
}

/** Each kind of operator's part of a step's time, the largest first, from ONNX Runtime's own profile. */
async function operatorShares(subject: Subject): Promise<{ operator: string; share: number }[]> {
  const { graph, feeds } = trialsOf(subject)[0]!.variants[0];
  const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-profile-"));
  try {
    const profileFilePrefix = path.join(folder, "step");
    const session = await ort.InferenceSession.create(graph.bytes, {
      ...sessionOptions({ root: "/", widening: "folded" }, {}),
      ...{ enableProfiling: true, profileFilePrefix },
    });
    for (let i = 0; i < 3 * subject.runs; i++) await session.run(feeds);
    session.endProfiling();
    await session.release();
    const events = JSON.parse(readFileSync(path.join(folder, readdirSync(folder)[0]!), "utf8")) as {
      cat: string;
      name: string;
      dur: number;
      args: { op_name?: string };
    }[];
    const times = new Map<string, number>();
    for (const { cat, name, dur, args } of events)
      if (cat === "Node" && name.endsWith("_kernel_time"))
        times.set(args.op_name!, (times.get(args.op_name!) ?? 0) + dur);
    const all = [...times.values()].reduce((a, b) => a + b, 0);
    return [...times].map(([operator, time]) => ({ operator, share: time / all })).sort((a, b) => b.share - a.share);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const sessionOf = ({ extra }: Settings) => (extra?.session ?? {}) as Record<string, unknown>;

const subjects: { name: string; folder: () => Promise<string>; size: number; rounds: number; runs: number }[] = [
  ...[64, 128].map((size) => ({
    ...{ name: `shapes, ${size} px`, folder: async () => embeddedModel, size, rounds, runs: size === 64 ? 10 : 4 },
  })),
  ...[256, 512].map((size) => ({
    ...{ name: `SD3.5-medium's width, 4 layers, ${size} px`, size, rounds: Math.min(rounds, 3), runs: 1 },
    folder: async () => (await randomCheckpoint(4, true)).folder,
  })),
].filter(({ name }) => !flags.only || name.toLowerCase().includes(flags.only.toLowerCase()));

const results: {
  name: string;
  trials: Outcome[];
  decode: Spread | null;
  operators: { operator: string; share: number }[];
}[] = [];
for (const { name, folder, size, rounds, runs } of subjects) {
  console.log(`\n${name}`);
  const place = await folder();
  const checkpoint = await openCheckpoint(place);
  const tokens = (checkpoint.tokenizer?.maxLength ?? 0) + (checkpoint.tokenizer3?.maxLength ?? 0);
  const subject = { name, checkpoint, folder: place, size, rounds, runs, tokens };
  const trials: Outcome[] = [];
  for (const trial of trialsOf(subject)) trials.push(await run(trial, subject));
  const decode = place === embeddedModel && !flags.trial ? await decoderShare(size) : null;
  const operators = flags.trial ? [] : await operatorShares(subject);
  results.push({ name, trials, decode, operators });
}

/** The decoder's share of a short run of the embedded model at its default schedule. */
async function decoderShare(size: number): Promise<Spread> {
  await using model = await FlowTurbo.load(undefined, { measureCosts: false });
  const shares: number[] = [];
  for (let round = -1; round < rounds; round++) {
    const options = { width: size, height: size, guidanceScale: 2, seed: 1 };
    const { timings } = await model.generate({ prompt: "a red circle", ...options });
    if (round >= 0) shares.push(timings.decode / (timings.decode + timings.steps.reduce((a, b) => a + b, 0)));
  }
  console.log(`the decoder's share of the default schedule: ${format(spread(shares))}`);
  return spread(shares);
}

const page = [
  "# What was tried to make a step cheaper on the CPU",
  "",
  "`npm run bench:trials`. In each table the first row is what flowturbo does; ratios are to it, round by round, median and range: above 1 is slower. Bare sessions of",
  "onnxruntime-node, one picture with guidance, weights widened to float32 once.",
  "",
];
for (const { name, trials, decode, operators } of results) {
  page.push(`## ${name}`, "");
  for (const { about, rows } of trials)
    page.push(
      about,
      "",
      table([
        ["variant", "ratio", "ms"],
        ...rows.map((row) => [row.name, format(row.ratio), row.time.median.toFixed(2)]),
      ]),
      "",
    );
  if (operators.length > 0) {
    const parts = operators.filter(({ share }) => share >= 0.01);
    const list = parts.map(({ operator, share }) => `${operator} ${(100 * share).toFixed(0)} %`).join(", ");
    page.push(`Where the time of a step goes, by operator (ONNX Runtime's profile): ${list}.`, "");
  }
  if (decode) page.push(`The decoder takes ${format(decode)} of sampling and decoding at the default schedule.`, "");
}
page.push("![](trials.svg)", "", machineLine());
mkdirSync(resultsFolder, { recursive: true });
writeFileSync(
  path.join(resultsFolder, "trials.svg"),
  bars({
    title: "Trials, relative to what flowturbo does",
    groups: results.flatMap(({ name, trials }) =>
      trials.map((trial) => ({
        name: `${trial.name} (${name})`,
        bars: trial.rows.map(({ name, ratio }) => ({ name, value: ratio.median, low: ratio.min, high: ratio.max })),
      })),
    ),
  }),
);
await report("trials", { rounds, subjects: results }, page.join("\n"));
