/**
 * The blocks that a schedule is made of, one row a letter: what it is called, and the launches that it takes. A new
 * linear multistep method is one more row: graphs, runtimes and serving do not use the letters.
 *
 * A schedule is written as one letter a block, from noise to image, each optionally followed by a count: `H1P5R3` and
 * `HPPPPPRRR` are the same.
 */

import { table } from "../common/table.js";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";

/** Which network a launch evaluates: the transformer, or FlowTurbo's velocity refiner. */
export type StepType = "predict" | "refine";

/**
 * One evaluation of a fused step: from the state x and a velocity v,
 *
 *   v' = network(x + a_in·v, σ)      x' = x + a_old·v + a_new·v'
 */
export interface Evaluation {
  /** The network that is evaluated. */
  readonly type: StepType;
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
}

/** What a block knows of its place in a schedule. */
export interface BlockPlace {
  /** Noise level at its start. */
  readonly from: number;
  /** Noise level at its end. */
  readonly to: number;
  /** `to - from`; negative. */
  readonly h: number;
  /** Step of the block before; null for the first. */
  readonly before: number | null;
}

/** A row of the table of blocks. */
export interface BlockRow {
  /** What the block is called. */
  readonly name: string;
  /** Whether a velocity from a block before it is needed: then it cannot be the first. */
  readonly needsVelocity: boolean;
  /** Its evaluations, in order. */
  readonly evaluations: (place: BlockPlace) => readonly Evaluation[];
}

/** Evaluates the network at the start of the block; x stays. */
const evaluate = (type: StepType, { from }: BlockPlace): Evaluation => ({
  ...{ type, sigma: from, aIn: 0, aOld: 0, aNew: 0 },
  keepsVelocity: true,
});

/** Evaluates at the guess x + h·v, and steps with the mean of both velocities. */
const correct = (type: StepType, { to, h }: BlockPlace): Evaluation => ({
  ...{ type, sigma: to, aIn: h, aOld: h / 2, aNew: h / 2 },
  // After the refiner the velocity that goes on is the one at the point itself, as in FlowTurbo's reference code.
  keepsVelocity: type === "predict",
});

const heun = (place: BlockPlace) => [evaluate("predict", place), correct("predict", place)];

const rows = table<BlockRow>()({
  E: {
    name: "Euler",
    needsVelocity: false,
    evaluations: (place) => [{ ...evaluate("predict", place), aNew: place.h }],
  },
  H: { name: "Heun", needsVelocity: false, evaluations: heun },
  P: {
    name: "pseudo corrector",
    needsVelocity: false,
    // It reuses the velocity that the block before ended with. Without one it is a Heun step.
    evaluations: (place) => (place.before === null ? heun(place) : [correct("predict", place)]),
  },
  R: {
    name: "velocity refiner",
    needsVelocity: true,
    evaluations: (place) => [evaluate("refine", place), correct("refine", place)],
  },
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
  const [first] = blocks;
  if (!first) throw new OptionError("blocks", `The blocks "${shown(text)}" are empty; give at least one.`);
  if (blockTable[first]!.needsVelocity)
    throw new OptionError(
      "blocks",
      `The blocks "${shown(text)}" start with ${first} (${blockTable[first]!.name}), which needs the velocity of a block before it. Start with H, for example "H1${shown(compact)}".`,
    );
  return blocks;
}

function shown(text: string): string {
  return clipped(text, 80);
}

/** The shortest list of blocks, in the order of the table, that launches every step type which is wanted. */
export function blocksForEach(isWanted: (type: StepType) => boolean): string {
  const launched = new Set<StepType>();
  const place: BlockPlace = { from: 1, to: 0, h: -1, before: -1 };
  return Object.entries(blockTable)
    .filter(([, { evaluations }]) => {
      const types = evaluations(place).map(({ type }) => type);
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
