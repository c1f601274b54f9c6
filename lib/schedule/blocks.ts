/**
 * The blocks that a schedule is made of, one row a letter: what it is called, and the evaluations that it takes. A new
 * linear multistep method is one more row: graphs, runtimes and serving do not use the letters.
 *
 * A schedule is written as one letter a block, from noise to image, each optionally followed by a count: `H1P5R3` and
 * `HPPPPPRRR` are the same.
 */

import { table } from "../common/table.js";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";
import { type Solver, type SolverPlace, usualSolver } from "./solvers.js";
import { stiffness } from "./stiffness.js";

/** Which network a launch evaluates: the transformer, or FlowTurbo's velocity refiner. */
export type StepType = "predict" | "refine";

/** Weights of w, m₁ and m₂ in a sum: see `Combination`. */
export type Weights = readonly [w: number, first: number, second: number];

/**
 * What is done without a network after an evaluation, or in place of one: w is the guided velocity that was evaluated
 * last, m₁ and m₂ are two more tensors like x, which nothing else changes.
 *
 *   x' = x + x·(w, m₁, m₂)      m₁' = first·(w, m₁, m₂)      m₂' = second·(w, m₁, m₂)
 */
export interface Combination {
  /** What is added to x. */
  readonly x: Weights;
  /** The next m₁. */
  readonly first: Weights;
  /** The next m₂. */
  readonly second: Weights;
}

/** x' = x + weight·w; the rest stays. */
export const moveBy = (weight: number): Combination => ({ x: [weight, 0, 0], first: [0, 1, 0], second: [0, 0, 1] });

/**
 * One evaluation of a fused step: from the state x and a velocity v,
 *
 *   v' = network(x + a_in·v, σ)      x' = x + a_old·v + a_new·v'
 *
 * and then what `combination` says. Of the type `combine` it evaluates nothing, and is the combination alone.
 */
export interface Evaluation {
  /** The network that is evaluated. */
  readonly type: StepType | "combine";
  /** Noise level at which the network is evaluated. */
  readonly sigma: number;
  /** Weight of v in the point of evaluation. */
  readonly aIn: number;
  /** Weight of v in the update. */
  readonly aOld: number;
  /** Weight of v' in the update. */
  readonly aNew: number;
  /** Whether v' replaces v for the launches that follow. */
  readonly keepsVelocity: boolean;
  /**
   * Share of the change between the last two velocities that is added to v, v + e·(v − v₋), before it is used here; v itself stays for
   * the launches that follow. Absent for none.
   */
  readonly extrapolation?: number;
  /** What is done after it without a network; absent for nothing. */
  readonly combination?: Combination;
  /** Whether it needs m₁ and m₂ to be the last two velocities before it, the latest first. */
  readonly readsVelocities?: boolean;
}

/** What a block knows of its place in a schedule. */
export interface BlockPlace {
  /** Noise level at its start. */
  readonly from: number;
  /** Noise level at its end. */
  readonly to: number;
  /** `to - from`; negative. */
  readonly h: number;
  /** Noise levels of the whole schedule; `from` is `sigmas[index]`. */
  readonly sigmas: readonly number[];
  /** Index of the block, from 0. */
  readonly index: number;
  /** Index of the first block of the run of equal letters that it is in. */
  readonly run: number;
  /** Letter of the block after it; null for the last one. */
  readonly next: string | null;
  /** Noise levels at which the velocities so far were evaluated, the latest first; of the first of them v is there. */
  readonly velocities: readonly number[];
  /** The largest guidance scale of the schedule; 1 without guidance. */
  readonly guidance: number;
  /** How D and U step, as the model's scheduler says; absent for diffusers' defaults. */
  readonly solver?: (Solver & SolverPlace) | undefined;
}

/** A row of the table of blocks. */
export interface BlockRow {
  /** What the block is called. */
  readonly name: string;
  /** How many velocities from blocks before it are needed: then it cannot be the first. */
  readonly needs: number;
  /** Whether it extrapolates from the velocity at the beginning of the block before it, which that one has to leave. */
  readonly reusesBeginning?: boolean;
  /** Whether m₁ and m₂ have a meaning of their own while blocks of this letter follow each other. */
  readonly ownsMemory?: boolean;
  /** Its evaluations, in order. */
  readonly evaluations: (place: BlockPlace) => readonly Evaluation[];
  /** What follows the evaluation of the transformer where that has weights that were fitted; absent for nothing. */
  readonly afterFitted?: (place: BlockPlace) => readonly Evaluation[];
}

/** Evaluates the network at the start of the block; x stays. */
const evaluate = (type: StepType, { from }: BlockPlace): Evaluation => ({
  ...{ type, sigma: from, aIn: 0, aOld: 0, aNew: 0 },
  keepsVelocity: true,
});

/** Evaluates at the guess x + h·v, and steps with the mean of both velocities. */
const correct = (type: StepType, place: BlockPlace): Evaluation => ({
  ...{ type, sigma: place.to, aIn: place.h, aOld: place.h / 2, aNew: place.h / 2 },
  // After the refiner the velocity that goes on is the one at the point itself, as in FlowTurbo's reference code.
  keepsVelocity: type === "predict" && !(place.next !== null && blockTable[place.next]!.reusesBeginning),
});

const euler = (place: BlockPlace): Evaluation => ({ ...evaluate("predict", place), aNew: place.h });

const heun = (place: BlockPlace) => [evaluate("predict", place), correct("predict", place)];

/**
 * Adams-Bashforth of order 2 with unequal steps: the velocity is evaluated at the block's start, where x is known, and
 * extrapolated along the line through it and the one before. h₋ is the way from where that one was evaluated.
 */
function adamsBashforth(place: BlockPlace): Evaluation {
  const { from, h, velocities } = place;
  const before = velocities.length > 0 ? from - velocities[0]! : 0;
  if (before === 0) return euler(place);
  const extrapolated = (h * h) / (2 * before);
  return { ...evaluate("predict", place), aOld: -extrapolated, aNew: h + extrapolated };
}

/**
 * The midpoint rule with a refiner: the transformer is evaluated at the block's start, where x is known; its velocity is
 * extrapolated to the middle along the line through it and the one before, as Adams-Bashforth does; the refiner corrects that at
 * x + (h/2)·v, and with what it gives x goes over the whole block. With a refiner that changes nothing it is Adams-Bashforth.
 */
function refinedMidpoint(place: BlockPlace): Evaluation[] {
  const { h } = place;
  return [evaluate("predict", place), { ...refinedAtMiddle(place), aIn: h / 2, aOld: 0, aNew: h }];
}

/**
 * The same after a step whose weights were fitted, which has moved x already: the refiner's part of the velocity, h·(v' − v), is added. The
 * middle is half a step back from there.
 */
function refinedEnd(place: BlockPlace): Evaluation[] {
  const { h } = place;
  return [{ ...refinedAtMiddle(place), aIn: -h / 2, aOld: -h, aNew: h }];
}

function refinedAtMiddle({ from, h, velocities }: BlockPlace) {
  const before = velocities.length > 0 ? from - velocities[0]! : 0;
  return {
    ...({ type: "refine", sigma: from + h / 2, keepsVelocity: false } as const),
    ...(before !== 0 && { extrapolation: h / (2 * before) }),
  };
}

/** The line through the last two velocities, integrated over the block. */
function skip({ from, h, velocities }: BlockPlace): Evaluation {
  const [latest, before] = velocities as [number, number];
  const middle = from + h / 2;
  const part = latest === before ? 0 : (middle - latest) / (latest - before);
  const combination: Combination = { x: [0, h * (1 + part), -h * part], first: [0, 1, 0], second: [0, 0, 1] };
  return {
    ...{ type: "combine", sigma: from, aIn: 0, aOld: 0, aNew: 0 },
    ...{ keepsVelocity: false, combination, readsVelocities: true },
  };
}

/** λ = ln(α/σ) with α = 1 − σ, half the logarithm of the signal-to-noise ratio: the time of the solvers below. */
const lambda = (sigma: number) => Math.log((1 - sigma) / sigma);

/** Ratio of a step in λ to the one before it; 0 where that one begins at σ = 1, which is infinitely far. */
function ratioOf(sigmas: readonly number[], index: number): number {
  const [before, from, to] = [sigmas[index - 1]!, sigmas[index]!, sigmas[index + 1]!];
  return before >= 1 || to <= 0 ? 0 : (lambda(to) - lambda(from)) / (lambda(from) - lambda(before));
}

/**
 * DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with α = 1 − σ. The data prediction x₀ = x − σ·w is
 * extrapolated in λ: x' = (σ'/σ)·x + (1 − σ'/σ)·(x₀ + ½·r·(x₀ − x₀₋)), r the ratio of this step in λ to the one before. With
 * k = (1 − σ'/σ)·r/2 that is x' = x + h·w + k·d, d = x₀ − x₀₋ = m − σ·w, and the memory m = σ·w₋ + k₋·d₋ goes on as
 * m' = σ'·w + k·(m − σ·w). The first step of a run and the one to σ = 0 are of first order, k = 0. A step of third order has k₋·d₋
 * besides, and keeps d in the second memory.
 */
function dpmSolver(place: BlockPlace): Evaluation {
  const { sigmas, index, run, from, to, solver } = place;
  const order = Math.min(dpmSolverOrder(place), index - run + 1);
  if (order === 1 || to <= 0 || sigmas[index - 1]! >= 1) return dataPrediction(place, "D", 0);
  const q = 1 - to / from;
  const r = ratioOf(sigmas, index);
  if (order === 2 && solver?.type !== "heun") return dataPrediction(place, "D", (q * r) / 2);
  const h = lambda(to) - lambda(from);
  // Weights of the first and the second derivative of x₀ in the step.
  const first = 1 - to - q / h;
  if (order === 2) return dataPrediction(place, "D", first * r);
  const second = (1 - to - q / h) / h - (1 - to) / 2;
  const r0 = 1 / r;
  const r1 = (lambda(sigmas[index - 1]!) - lambda(Math.min(sigmas[index - 2]!, 1))) / h;
  const [line, bend] = [first * (1 + r0 / (r0 + r1)) - second / (r0 + r1), (second - first * r0) / (r0 + r1)];
  return dataPrediction(place, "D", line / r0, bend / r1);
}

/** Order of a step, were there enough steps before it. */
function dpmSolverOrder({ sigmas, index, solver }: BlockPlace): number {
  const { order, lowerOrderFinal, eulerAtFinal } = solver ?? usualSolver;
  const left = sigmas.length - 1 - index;
  const lowers = lowerOrderFinal && (solver?.steps ?? sigmas.length - 1) < 15;
  if (left === 1 && (eulerAtFinal || lowers)) return 1;
  return left === 2 && lowers ? Math.min(order, 2) : order;
}

/**
 * The same where extrapolation is held back as far as the schedule is stiff (m, see stiffness.ts): r/2 becomes r/(2·m), and the two
 * steps for which r says nothing, the second one and the one to σ = 0, have 1/(2·m⁶) and 1/(4·m⁶). With four steps or fewer the last one
 * is of first order.
 */
function heldBack(place: BlockPlace): Evaluation {
  const { sigmas, index, run, guidance } = place;
  const steps = sigmas.length - 1;
  const m = stiffness(steps, guidance);
  const isLast = index === steps - 1;
  const factor = isLast
    ? steps > 4
      ? 1 / (4 * m ** 6)
      : 0
    : index === run + 1
      ? 1 / (2 * m ** 6)
      : ratioOf(sigmas, index) / (2 * m);
  return dataPrediction(place, "M", index === run ? 0 : (1 - place.to / place.from) * factor);
}

/** @param k weight of d = x₀ − x₀₋ in the step @param before weight of the d before it */
function dataPrediction(place: BlockPlace, letter: "D" | "M", k: number, before = 0): Evaluation {
  const { from, to, h, next, index, run, solver } = place;
  const goesOn = next === letter;
  const combination: Combination = {
    ...{ x: [0, k, before], first: [to - k * from, k, before] },
    second: solver?.order === 3 && index > run ? [-from, 1, 0] : [0, 0, 0],
  };
  return {
    ...{ type: "predict", sigma: from, aIn: 0, aOld: 0, aNew: h - k * from, keepsVelocity: true },
    ...((k !== 0 || goesOn) && { combination }),
  };
}

/**
 * UniPC of order 2 with B(h) = e^h − 1 ("bh2") and data prediction (Zhao et al. 2023, arXiv 2302.04867), with α = 1 − σ. The
 * predictor goes from the corrected x to the point of the next evaluation; the corrector moves x after that evaluation, and
 * asks for no other. So x here is the predicted point, and each block corrects it and predicts the next one:
 *
 *   F = x₀ − x₀₋ = m₁ − σ·w,   C = q₋·(c₀·F₋ + c₁·F),   x' = x + (1 − q)·C + h·w − (q/2ρ)·F,   q = 1 − σ'/σ
 *
 * with m₁ = x − x₀₋ and m₂ = F₋. C is the corrector less the second-order part of the last predictor. With B(h) = h ("bh1") both parts
 * have other weights than q; of order 1 there is no second-order part.
 */
function uniPC({ from, to, h, sigmas, index, run, next, solver }: BlockPlace): Evaluation {
  const { order, lowerOrderFinal, uncorrected } = solver ?? usualSolver;
  // λ is infinite at σ = 1; diffusers moves that level by as much.
  const level = (at: number) => lambda(Math.min(sigmas[at]!, 1 - 1e-6));
  const isLinear = solver?.type === "bh1";
  const q = 1 - to / from;
  /** The corrector's weights of F₋ and F. */
  let [old, own] = [0, 0];
  if (index > run && !uncorrected.some((each) => each === (solver?.skipped ?? 0) + index - 1)) {
    const step = level(index) - level(index - 1);
    const before = isLinear ? (1 - from) * step : 1 - from / sigmas[index - 1]!;
    if (index === run + 1 || order === 1) own = before / 2;
    else {
      const rho = (level(index - 2) - level(index - 1)) / step;
      const phi1 = Math.expm1(-step) / -step - 1;
      const phi2 = phi1 / -step - 0.5;
      const b = isLinear ? -step : Math.expm1(-step);
      // c₀ + c₁ = φ₁/b and ρ·c₀ + c₁ = 2φ₂/b.
      const c0 = (phi1 / b - (2 * phi2) / b) / (1 - rho);
      [old, own] = [(before * (0.5 - c0)) / rho, before * (phi1 / b - c0)];
    }
  }
  // The predictor's own second-order part, −(q/2ρ)·F.
  let ahead = 0;
  if (index > run && order > 1 && to > 0 && !(lowerOrderFinal && index === sigmas.length - 2)) {
    const step = level(index + 1) - level(index);
    const weight = isLinear ? (1 - to) * step : q;
    ahead = weight / 2 / ((level(index) - level(index - 1)) / step);
  }
  const ofF = (1 - q) * own + ahead;
  const ofOldF = (1 - q) * old;
  const goesOn = next === "U";
  const combination: Combination = {
    x: [0, ofF, ofOldF],
    first: [to - ofF * from, ofF, ofOldF],
    second: [-from, 1, 0],
  };
  return {
    ...{ type: "predict", sigma: from, aIn: 0, aOld: 0, aNew: h - ofF * from, keepsVelocity: true },
    ...((ofF !== 0 || goesOn) && { combination }),
  };
}

const rows = table<BlockRow>()({
  E: { name: "Euler", needs: 0, evaluations: (place) => [euler(place)] },
  H: { name: "Heun", needs: 0, evaluations: heun },
  A: {
    name: "Adams-Bashforth",
    needs: 0,
    reusesBeginning: true,
    evaluations: (place) => [adamsBashforth(place)],
  },
  P: {
    name: "pseudo corrector",
    needs: 0,
    // It reuses the velocity that the block before ended with. Without one it is a Heun step.
    evaluations: (place) => (place.velocities.length === 0 ? heun(place) : [correct("predict", place)]),
  },
  R: {
    name: "velocity refiner",
    needs: 1,
    evaluations: (place) => [evaluate("refine", place), correct("refine", place)],
  },
  C: {
    ...{ name: "refined midpoint", needs: 0, reusesBeginning: true },
    ...{ evaluations: refinedMidpoint, afterFitted: refinedEnd },
  },
  S: { name: "skip", needs: 2, evaluations: (place) => [skip(place)] },
  M: { name: "damped DPM-Solver++(2M)", needs: 0, ownsMemory: true, evaluations: (place) => [heldBack(place)] },
  D: { name: "DPM-Solver++(2M)", needs: 0, ownsMemory: true, evaluations: (place) => [dpmSolver(place)] },
  U: { name: "UniPC", needs: 0, ownsMemory: true, evaluations: (place) => [uniPC(place)] },
});

/** Letter of a block: see the option `blocks`. */
export type Block = keyof typeof rows;

/** The table of blocks by letter. */
export const blockTable: Record<string, BlockRow> = rows;

/** More blocks than this is a typing error, not a schedule. */
const maxBlocks = 1000;
/** Characters of a schedule: that many blocks in any spelling, and spaces. */
export const longestSchedule = 8192;

/** @throws OptionError for anything that is not a schedule, or one that starts with a block that needs a velocity */
export function parseBlocks(text: string): Block[] {
  if (text.length > longestSchedule)
    throw new OptionError(
      "blocks",
      `Expected blocks of at most ${longestSchedule} characters but received ${text.length}: "${shown(text)}".`,
    );
  const compact = text.replace(/\s+/g, "").toUpperCase();
  const letters = Object.keys(blockTable);
  if (!new RegExp(`^([${letters.join("")}]\\d*)+$`).test(compact))
    throw new OptionError(
      "blocks",
      `Expected blocks such as "H1P5R3" or "HPPPPPRRR" (${letters.map((letter) => `${letter} ${blockTable[letter]!.name}`).join(", ")}, each with an optional count) but received "${shown(text)}".`,
    );
  const blocks: Block[] = [];
  for (const [, letter, count] of compact.matchAll(/([A-Z])(\d*)/g)) {
    const repeat = count === "" ? 1 : Number(count);
    if (blocks.length + repeat > maxBlocks)
      throw new OptionError("blocks", `Expected at most ${maxBlocks} blocks but "${shown(text)}" has more.`);
    for (let i = 0; i < repeat; i++) blocks.push(letter as Block);
  }
  if (blocks.length === 0) throw new OptionError("blocks", `The blocks "${shown(text)}" are empty; give at least one.`);
  const unmet = unmetNeed(blocks);
  if (unmet) throw new OptionError("blocks", unmetMessage(blocks, unmet, `The blocks "${shown(text)}"`));
  return blocks;
}

/** A block that needs more velocities than the blocks before it leave. */
export interface UnmetNeed {
  readonly index: number;
  readonly letter: Block;
  /** Velocities that there are. */
  readonly has: number;
}

/** The first block that lacks a velocity which it needs, or null. */
export function unmetNeed(blocks: readonly Block[]): UnmetNeed | null {
  let has = 0;
  for (const [index, letter] of blocks.entries()) {
    const { needs, ownsMemory, evaluations } = blockTable[letter]!;
    if (needs > has) return { index, letter, has };
    const velocities = new Array<number>(Math.min(has, 2)).fill(0.9);
    const place = { ...anyPlace, next: blocks[index + 1] ?? null, velocities };
    // Memory with a meaning of its own leaves no room for more than the velocity that was evaluated last.
    has = ownsMemory ? 1 : has + evaluations(place).filter(({ keepsVelocity }) => keepsVelocity).length;
  }
  return null;
}

/** Where it does not matter which noise levels a block has. */
const anyPlace: BlockPlace = {
  ...{ from: 0.6, to: 0.4, h: -0.2, sigmas: [0.6, 0.4], index: 0, run: 0, next: null },
  ...{ velocities: [0.9, 0.8], guidance: 1 },
};

/** @param what what is wrong: "The blocks "R2"" */
function unmetMessage(blocks: readonly Block[], { index, letter, has }: UnmetNeed, what: string): string {
  const { name, needs } = blockTable[letter]!;
  const velocities = needs === 1 ? "the velocity of a block" : `the velocities of ${needs} evaluations`;
  return index === 0
    ? `${what} start with ${letter} (${name}), which needs ${velocities} before it. Start with H, for example "H1${shown(formatBlocks(blocks))}".`
    : `${what} have ${letter} (${name}) as block ${index + 1}, which needs ${velocities} before it, but there ${has === 1 ? "is 1" : `are ${has}`}. Put H, or two blocks such as E, P or A, before it.`;
}

function shown(text: string): string {
  return clipped(text, 80);
}

/** The shortest list of blocks, in the order of the table, that launches every step type which is wanted. */
export function blocksForEach(isWanted: (type: StepType) => boolean): string {
  const launched = new Set<string>();
  return Object.entries(blockTable)
    .filter(([, { evaluations }]) => {
      const types = evaluations(anyPlace).flatMap(({ type }) => (type === "combine" ? [] : [type]));
      if (!types.every(isWanted) || types.every((type) => launched.has(type))) return false;
      for (const type of types) launched.add(type);
      return true;
    })
    .map(([letter]) => letter)
    .join("");
}

/** The short spelling, `H1P5R3`. */
export function formatBlocks(blocks: readonly Block[]): string {
  let text = "";
  for (let start = 0; start < blocks.length; ) {
    let end = start + 1;
    while (end < blocks.length && blocks[end] === blocks[start]) end++;
    text += `${blocks[start]}${end - start}`;
    start = end;
  }
  return text;
}
