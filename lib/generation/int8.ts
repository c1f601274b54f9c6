/**
 * A checkpoint whose linear layers are multiplied in 8 bits. Which of them, and how, is decided once for a checkpoint, by examining it: each
 * layer is compared with what it would be in 8 bits, on what reaches it in a step from noise or as a text is read; layers that lose too much
 * stay in float; the network as a whole is run with 8 bits and without, from other noise, too. The cache keeps what was decided and what was measured.
 */

import {
  type CheckedPlan,
  type Checkpoint,
  type ControlNet,
  checkFiniteWeights,
  type Int8Kind,
  type Int8Plan,
  int8Candidates,
  type Part,
  partTitles,
  planFile,
  plannedForms,
  quantisedLayers,
  quantisedWeights,
  readPlan,
  withoutWorst,
  worstToLeave,
  writePlan,
} from "../checkpoint/index.js";
import type { Logger } from "../common/logger.js";
import type { Rounding, Tensor } from "../common/tensor.js";
import { NotFiniteError } from "../errors.js";
import { type GraphKey, graphName, networks, networksOf, textEncodersOf } from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import type { Program } from "../program/program.js";
import { calibrationPrompts } from "./calibration-prompts.js";
import { errorsOf, type StepRows, stepProgram, type Trial, Trials } from "./int8-trials.js";
import { PromptEncoder, promptOf } from "./text.js";

export interface Int8Options {
  /** Whether T5 is among them, too; false where its weights are held in another way. Default: true. */
  readonly textEncoder3?: boolean | undefined;
  readonly threads?: number | undefined;
  readonly watchdogMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  /** `info` is told what is examined, and with what result; warnings are the caller's to tell. */
  readonly logger?: Logger | undefined;
}

/** Parts whose layers are quantised, by the networks that run them. */
const rows = {
  clip_l: { part: "textEncoder", kind: "clip", title: `the ${partTitles.textEncoder}` },
  clip_g: { part: "textEncoder2", kind: "clip", title: `the ${partTitles.textEncoder2}` },
  t5: { part: "textEncoder3", kind: "t5", title: `the ${partTitles.textEncoder3}` },
  predict: { part: "transformer", kind: "mmdit", title: `the ${partTitles.transformer}` },
  refine: { part: "refiner", kind: "mmdit", title: "the refiner" },
} as const satisfies Record<string, { part: keyof Checkpoint; kind: Int8Kind; title: string }>;

/** A part of the checkpoint at hand. */
interface ExaminedPart {
  /** The graph that it is examined in. */
  readonly key: GraphKey;
  readonly title: string;
  readonly part: Part<unknown>;
  /** The checkpoint with the part in its place. */
  put(checkpoint: Checkpoint, part: Part<unknown>): Checkpoint;
  /** Layers that may be quantised. */
  readonly layers: readonly string[];
  /** Where its plan is kept. */
  readonly file: string;
  /** Null where it has not been examined. */
  plan: CheckedPlan | null;
}

/** What the results of a part may be off by; more is told. */
const warnedAbove = 0.03;
/** From here on something is done about it. Measured with a few rows: others may be off by a quarter more. */
const acceptedUpTo = 0.025;
/** What they are brought to then: where activations are that hard to round, other noise may be off by nearly twice as much. */
const aimedAt = 0.016;
/** How often the part is run to find how many layers have to be in float. */
const rounds = 4;

/** What is drawn where layers are examined: steps of several noise levels, with the empty text among others. */
const prompts = ["", calibrationPrompts[1]!, calibrationPrompts[9]!];
/** Tokens of the T5 part. */
const sequenceLength = 77;
const examinedSteps = { sigmas: [0.95, 0.6, 0.25], texts: [0, 1, 2], seed: 1 };
const checkedSteps = { sigmas: [0.9, 0.75, 0.5, 0.3], texts: [2, 0, 1, 2], seed: 11 };

/**
 * The checkpoint with its attention and MLP in 8 bits as far as that pays, and with a warning for each part that is off by more than 3 %,
 * or has no layer in 8 bits.
 * The first time that takes a run of each network with its weights in float, some minutes for a published model, and writes the weights.
 *
 * @param cache folder of the caches
 * @throws CheckpointError if weights cannot be read, OutputError if the cache cannot be written, what running ONNX Runtime throws;
 *   `signal.reason` after an abort
 */
export async function withInt8Weights(
  checkpoint: Checkpoint,
  cache: string,
  options: Int8Options = {},
): Promise<Checkpoint> {
  const parts = await examinedParts(checkpoint, cache, options);
  if (parts.some(({ plan }) => plan === null)) await examine(checkpoint, parts, cache, options);
  let quantised = checkpoint;
  const warnings = [...checkpoint.warnings];
  for (const { part, put, title, plan } of parts) {
    const layers = quantisedLayers(plan!.layers);
    quantised = put(quantised, await quantisedWeights(part, layers, cache, { ...options, title }));
    if (layers.size === 0) warnings.push(leftInFloat(title, plan!));
    if (plan!.error > warnedAbove) warnings.push(warningOf(title, plan!));
  }
  return { ...quantised, warnings };
}

async function examinedParts(
  checkpoint: Checkpoint,
  cache: string,
  { textEncoder3 = true }: Int8Options,
): Promise<ExaminedPart[]> {
  const { transformer, controlNets } = checkpoint;
  const texts = textEncodersOf(checkpoint).map(({ name }) => checkpoint[rows[name as keyof typeof rows].part]!);
  const found: Omit<ExaminedPart, "file" | "plan">[] = [];
  const files: Promise<string>[] = [];
  // What results are measured with is part of what a plan follows from.
  const add = (kind: Int8Kind, beside: readonly Part<unknown>[], part: Omit<(typeof found)[number], "layers">) => {
    const layers = int8Candidates(kind, part.part.weights);
    found.push({ ...part, layers });
    files.push(planFile(cache, part.part, beside, layers));
  };
  for (const { name, row } of networksOf(checkpoint)) {
    if (!isExamined(name) || (name === "t5" && !textEncoder3)) continue;
    const { part: place, kind, title } = rows[name];
    const beside = row.role === "text" ? [] : name === "predict" ? texts : [...texts, transformer];
    const put = (whole: Checkpoint, part: Part<unknown>) => ({ ...whole, [place]: part });
    add(kind, beside, { key: { network: name }, title, part: checkpoint[place]!, put });
  }
  for (const [id, controlNet] of controlNets) {
    const put = (whole: Checkpoint, part: Part<unknown>) => ({
      ...whole,
      controlNets: new Map(whole.controlNets).set(id, part as ControlNet),
    });
    const title = `the ControlNet ${controlNet.folder}`;
    add("mmdit", [...texts, transformer], { key: { network: "predict", controls: id }, title, part: controlNet, put });
  }
  return Promise.all(
    found.map(async (part, index) => {
      const file = await files[index]!;
      const { find } = part.part.weights;
      const inputs = new Map(part.layers.map((layer) => [layer, find(`${layer}.weight`)!.shape[1]!]));
      return { ...part, file, plan: await readPlan(file, inputs) };
    }),
  );
}

const isExamined = (name: string): name is keyof typeof rows => Object.hasOwn(rows, name);
const isText = ({ key }: ExaminedPart) => networks[key.network]!.role === "text";

/** The parts of a checkpoint whose layers may be quantised, ControlNets aside. */
export function quantisableParts(
  checkpoint: Checkpoint,
): { readonly part: Part<unknown>; readonly layers: readonly string[] }[] {
  const names = networksOf(checkpoint).map(({ name }) => name);
  return names.filter(isExamined).map((name) => {
    const part: Part<unknown> = checkpoint[rows[name].part]!;
    return { part, layers: int8Candidates(rows[name].kind, part.weights) };
  });
}

/** Makes the plans that are missing. */
async function examine(
  checkpoint: Checkpoint,
  parts: readonly ExaminedPart[],
  cache: string,
  options: Int8Options,
): Promise<void> {
  const graphs = new GraphLibrary(checkpoint);
  // Weights that lack or have another shape are named before any part is run.
  for (const { key } of parts) graphs.get(graphName(key));
  const trials = await Trials.open(options);
  try {
    const examiner = new Examiner(checkpoint, trials, cache, options);
    const text = new PromptEncoder(graphs);
    const tokens = Math.min(sequenceLength, text.maxSequenceLength);
    const prepared = await text.prepare(prompts.map(promptOf), tokens, null, options.signal);
    const encoded = await text.encode(prepared, async (programs) => {
      const results: Record<string, Tensor>[] = new Array(programs.length);
      // One encoder after another, each with all texts.
      for (const name of new Set(programs.map(({ graph }) => graph))) {
        const own = [...programs.keys()].filter((index) => programs[index]!.graph === name);
        const texts = own.map((index) => programs[index]!.program);
        const part = parts.find((each) => graphName(each.key) === name);
        const found = part ? await examiner.results(part, texts) : (await trials.run(checkpoint, name, texts)).results;
        for (const [at, index] of own.entries()) results[index] = found[at]!;
      }
      return results;
    });
    const rowsOf = ({ sigmas, texts, seed }: typeof examinedSteps): StepRows => {
      return { sigmas, seed, condition: text.stack(texts.map((index) => encoded[index]!)) };
    };
    const steps = [rowsOf(examinedSteps), rowsOf(checkedSteps)];
    const missing = (network: string) => parts.some(({ key, plan }) => key.network === network && plan === null);
    let velocities: readonly Tensor[] = [];
    for (const part of parts.filter((part) => !isText(part))) {
      const { key, plan } = part;
      // The refiner reads the predictor's velocities.
      const isRead = key.network === "predict" && key.controls === undefined && missing("refine");
      if (plan && !isRead) continue;
      const read = key.network === "refine" ? velocities : [];
      const programs = await Promise.all(steps.map((each, at) => stepProgram(checkpoint, key, each, read[at])));
      const results = await examiner.results(part, programs);
      if (isRead) velocities = results.map(({ velocity_next }) => velocity_next!);
    }
  } finally {
    await trials.dispose();
  }
}

class Examiner {
  constructor(
    readonly checkpoint: Checkpoint,
    readonly trials: Trials,
    readonly cache: string,
    readonly options: Int8Options,
  ) {}

  /**
   * Results of programs in float32; as the part has no plan, it gets one.
   * @param programs all of which are checked; layers of text encoders are examined in all, of steps in the first
   */
  async results(part: ExaminedPart, programs: readonly Program[]): Promise<readonly Record<string, Tensor>[]> {
    const { checkpoint, trials } = this;
    const run = async (some: readonly Program[], weights = part.part) => {
      try {
        return await trials.run(part.put(checkpoint, weights), graphName(part.key), some);
      } catch (error) {
        if (error instanceof NotFiniteError)
          await checkFiniteWeights(part.part.weights, part.layers, this.options.signal);
        throw error;
      }
    };
    if (part.plan) return (await run(programs)).results;
    const { title, layers } = part;
    this.options.logger?.info?.(
      `${capital(title)} is examined for weights in int8, once: ${layers.length} layers are compared with what they are in float32.`,
    );
    const start = performance.now();
    // Of steps other noise decides, too: some is further off.
    const [examined, others] = isText(part) ? [programs, []] : [programs.slice(0, 1), programs.slice(1)];
    const compared = await run(
      examined,
      rounded(part, () => "compared"),
    );
    const exact = [...compared.results, ...(others.length > 0 ? (await run(others)).results : [])];
    const errorOf = async (weights: Part<unknown>) =>
      Math.max(...errorsOf((await run(programs, weights)).results, exact));
    const plan = await this.#settled(part, compared, (plan) =>
      errorOf(rounded(part, (layer) => roundingOf(plan, layer))),
    );
    const { cache, options } = this;
    const quantised = await quantisedWeights(part.part, quantisedLayers(plan), cache, { ...options, title });
    const error = await errorOf(quantised);
    part.plan = { layers: plan, error };
    await writePlan(part.file, part.plan);
    const seconds = ((performance.now() - start) / 1000).toFixed(0);
    options.logger?.info?.(`${resultOf(title, part.plan)} Examining it took ${seconds} s.`);
    return exact;
  }

  /**
   * The plan whose error is within the aim: of layers as each is by itself, else with all channels scaled where that is nearer, else with as few
   * layers in float as some runs find.
   */
  async #settled(
    { title }: ExaminedPart,
    { comparisons }: Trial,
    errorOf: (plan: Int8Plan) => Promise<number>,
  ): Promise<Int8Plan> {
    const measured = async (plan: Int8Plan) => {
      if (quantisedLayers(plan).size === 0) return 0;
      const error = await errorOf(plan);
      this.options.logger?.debug?.(resultOf(title, { layers: plan, error }));
      return error;
    };
    const first = plannedForms(comparisons);
    const before = await measured(first);
    if (before <= acceptedUpTo) return first;
    const scaled = plannedForms(comparisons, "better");
    const after = await measured(scaled);
    if (after <= acceptedUpTo) return scaled;
    const [nearer, error] = after < before ? [scaled, after] : [first, before];
    // So many in float were too few, and so many were enough: all of them are.
    const all = quantisedLayers(nearer).size;
    let [few, enough] = [0, all];
    let next = worstToLeave(nearer, error, aimedAt);
    for (let round = 0; round < rounds && enough - few > 1; round++) {
      const count = Math.min(enough - 1, Math.max(few + 1, next));
      if ((await measured(withoutWorst(nearer, count))) <= aimedAt) enough = count;
      else few = count;
      next = enough === all ? Math.ceil(1.5 * few) : (few + enough) >> 1;
    }
    return withoutWorst(nearer, enough);
  }
}

/** A part whose layers are compared or rounded. */
function rounded({ part, layers }: ExaminedPart, of: (layer: string) => Rounding | undefined): Part<unknown> {
  const names = new Set(layers);
  return { ...part, weights: { ...part.weights, rounding: (layer) => (names.has(layer) ? of(layer) : undefined) } };
}

function roundingOf(plan: Int8Plan, layer: string): Rounding | undefined {
  const { as, smooth = null } = plan.get(layer)!;
  return as === "float" ? undefined : { smooth };
}

const capital = (title: string) => title[0]!.toUpperCase() + title.slice(1);
const percent = (part: number) => `${(100 * part).toFixed(1)} %`;

function countsOf({ layers }: CheckedPlan): string {
  const count = (as: string) => [...layers.values()].filter((layer) => layer.as === as).length;
  return `${layers.size - count("float")} of ${layers.size} layers are in int8, ${count("smooth")} of them with scaled channels`;
}

const resultOf = (title: string, plan: CheckedPlan) =>
  `${capital(title)}: ${countsOf(plan)}; its results are off by ${percent(plan.error)}.`;

const leftInFloat = (title: string, { layers }: CheckedPlan) =>
  `weights "int8" has no effect on ${title}: none of its ${layers.size} linear layers is near enough to float32 in 8 bits.`;

const warningOf = (title: string, plan: CheckedPlan) =>
  `With weights in int8 the results of ${title} are off by ${percent(plan.error)}, more than the ${percent(warnedAbove)} that pictures bear (${countsOf(plan)}). Load the model with weights "folded" or "lazy" to have it exact.`;
