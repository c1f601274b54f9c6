/**
 * What steps are off by with weights in int8: on checkpoints of SD3.5-medium's width with ordinary activations and with heavy tails
 * (heavy-tails.ts), and on the embedded model. Each is examined as a load does it; then velocities are compared with those in float32, from
 * noise, at noise levels and with prompts that the examination has not seen.
 *
 *   npm run bench:int8 [-- --layers 4]
 */

import "./telemetry.js";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { type Checkpoint, int8Candidates, openCheckpoint } from "../lib/checkpoint/index.js";
import type { Tensor } from "../lib/common/tensor.js";
import { calibrationPrompts } from "../lib/generation/calibration-prompts.js";
import { withInt8Weights } from "../lib/generation/int8.js";
import { errorsOf, type StepRows, stepProgram, Trials } from "../lib/generation/int8-trials.js";
import { type Condition, PromptEncoder, promptOf } from "../lib/generation/text.js";
import { GraphLibrary } from "../lib/networks/library.js";
import type { Program } from "../lib/program/program.js";
import { checkpointWithTails } from "./heavy-tails.js";
import { machineLine, report, root, table } from "./support.js";

const { values } = parseArgs({ options: { layers: { type: "string", default: "4" } } });
const layers = Number(values.layers);
const guidanceScale = 4.5;
const sigmas = [0.98, 0.85, 0.7, 0.45, 0.2];
const prompts = [3, 6, 12, 20].map((index) => calibrationPrompts[index]!);

/** The condition of a prompt at all noise levels. */
async function conditionsOf(trials: Trials, checkpoint: Checkpoint): Promise<Condition[]> {
  const text = new PromptEncoder(new GraphLibrary(checkpoint));
  const prepared = await text.prepare(["", ...prompts].map(promptOf), 77);
  const encoded = await text.encode(prepared, async (programs) => {
    const results: Record<string, Tensor>[] = [];
    for (const { graph, program } of programs)
      results.push((await trials.run(checkpoint, graph, [program])).results[0]!);
    return results;
  });
  return encoded.map((each) => text.stack(sigmas.map(() => each)));
}

interface Kind {
  readonly name: string;
  readonly transformer: Checkpoint;
  readonly conditions: readonly Condition[];
}

/** What each velocity is off by: by noise level, the largest over the prompts, and the largest of guided ones. */
async function errorsBy(trials: Trials, exact: Kind, kinds: readonly Kind[]) {
  const velocities = async ({ transformer, conditions }: Kind) => {
    const rows = (condition: Condition): StepRows => ({ sigmas, seed: 1000, condition });
    const programs: Program[] = [];
    for (const condition of conditions)
      programs.push(await stepProgram(transformer, { network: "predict" }, rows(condition)));
    return (await trials.run(transformer, "predict", programs)).results;
  };
  const expected = await velocities(exact);
  const result = [];
  for (const kind of kinds) {
    const found = await velocities(kind);
    const worst = (of: (results: typeof found) => typeof found) => {
      const errors = errorsOf(of(found), of(expected));
      return sigmas.map((_, level) => Math.max(...errors.filter((_, index) => index % sigmas.length === level)));
    };
    result.push({ kind: kind.name, alone: worst((all) => all), guided: worst(guided) });
  }
  return result;
}

/** u + g·(c − u) of each prompt's velocity c and the first one, the empty text's. */
function guided(results: readonly Record<string, Tensor>[]): Record<string, Tensor>[] {
  const [u, ...others] = results.map(({ velocity_next }) => velocity_next!.data as Float32Array);
  const { shape } = results[0]!.velocity_next!;
  return others.map((c) => {
    const data = c.map((value, i) => u![i]! + guidanceScale * (value - u![i]!));
    return { velocity_next: { dtype: "float32", shape, data } };
  });
}

/** With all layers in int8 as they come. */
function allPlain(checkpoint: Checkpoint): Checkpoint {
  const { transformer } = checkpoint;
  const names = new Set(int8Candidates("mmdit", transformer.weights));
  const rounding = (layer: string) => (names.has(layer) ? { smooth: null } : undefined);
  return { ...checkpoint, transformer: { ...transformer, weights: { ...transformer.weights, rounding } } };
}

const percent = (value: number) => `${(100 * value).toFixed(2)} %`;
const models = [
  ["ordinary", () => checkpointWithTails({ layers, dual: layers >> 1, heavy: false })],
  ["heavy tails", () => checkpointWithTails({ layers, dual: layers >> 1, heavy: true })],
  ["embedded model", async () => path.join(root, "models/shapes")],
] as const;

const results = [];
for (const [name, folderOf] of models) {
  const checkpoint = await openCheckpoint(await folderOf());
  const cache = mkdtempSync(path.join(tmpdir(), "flowturbo-int8-"));
  const trials = await Trials.open({});
  try {
    const notes: string[] = [];
    const logger = { info: (text: string) => void notes.push(text) };
    const start = performance.now();
    const quantised = await withInt8Weights(checkpoint, cache, { logger });
    const examined = (performance.now() - start) / 1000;
    const again = performance.now();
    await withInt8Weights(checkpoint, cache);
    const found = (performance.now() - again) / 1000;
    const exact = { name: "float32", transformer: checkpoint, conditions: await conditionsOf(trials, checkpoint) };
    const kinds: Kind[] = [
      { ...exact, name: "all layers in int8", transformer: allPlain(checkpoint) },
      { ...exact, name: "as planned", transformer: quantised },
      { ...exact, name: "text encoders alone", conditions: await conditionsOf(trials, quantised) },
      { name: "both", transformer: quantised, conditions: await conditionsOf(trials, quantised) },
    ];
    const errors = await errorsBy(trials, exact, kinds);
    const plans = notes.filter((text) => text.includes("layers are in int8"));
    results.push({ name, examined, found, plans, warnings: quantised.warnings, errors });
    console.log(name, examined.toFixed(1), found.toFixed(2), plans.join("\n"), quantised.warnings);
    for (const each of errors)
      console.log(each.kind, each.alone.map(percent).join(" "), "guided", each.guided.map(percent).join(" "));
  } finally {
    await trials.dispose();
    rmSync(cache, { recursive: true, force: true });
  }
}

const page = `
# Weights in int8: what steps are off by

Velocities with \`weights: "int8"\` against float32: root mean square of the difference as a part of the velocity's, the largest over the empty
text and ${prompts.length} prompts, at ${sigmas.length} noise levels. Noise, levels and prompts are not those that layers are examined with.
The first two are of SD3.5-medium's width with ${layers} layers, ${layers >> 1} of them with a second attention, and random weights
(bench/heavy-tails.ts): with normal weights, and with channels of 50 to 200 times the others' size, Student-t distributed weights and large tokens.
"All layers in int8" is without examination. Guidance (scale ${guidanceScale}) makes of errors what it makes of differences between texts.

${results
  .map(({ name, examined, found, plans, errors }) => {
    const head = ["", ...sigmas.map((sigma) => `σ ${sigma}`), "guided, worst"];
    const rows = errors.map(({ kind, alone, guided }) => [kind, ...alone.map(percent), percent(Math.max(...guided))]);
    const first = `Examined and quantised in ${examined.toFixed(0)} s; found in the cache in ${found.toFixed(2)} s.`;
    return [
      `## ${name[0]!.toUpperCase()}${name.slice(1)}`,
      first,
      plans.map((plan) => `- ${plan}`).join("\n"),
      table([head, ...rows]),
    ].join("\n\n");
  })
  .join("\n\n")}

${machineLine()}
`;
await report("int8", { layers, guidanceScale, sigmas, prompts, results }, page);
