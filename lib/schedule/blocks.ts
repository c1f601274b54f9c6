/**
 * Block strings: how a schedule is written. One letter a block, from noise to image, each optionally followed by a
 * count: `H1P5R3` and `HPPPPPRRR` are the same schedule.
 *
 *   E  Euler             1 evaluation of the predictor
 *   H  Heun              2
 *   P  pseudo corrector  1, second order: it reuses the velocity that the block before ended with
 *   R  velocity refiner  2 of the refiner, none of the predictor
 */

import { OptionError } from "../errors.js";

export type Block = "E" | "H" | "P" | "R";
export type Sampler = "euler" | "heun" | "flowturbo";

/** More blocks than this is a typing error, not a schedule. */
const maxBlocks = 1000;

/** @throws OptionError for anything that is not a schedule, or one that starts with R (a refiner needs a velocity). */
export function parseBlocks(text: string): Block[] {
  const compact = text.replace(/\s+/g, "").toUpperCase();
  if (!/^([EHPR]\d*)+$/.test(compact))
    throw new OptionError(
      "blocks",
      `Expected blocks such as "H1P5R3" or "HPPPPPRRR" (E Euler, H Heun, P pseudo corrector, R refiner, each with an optional count) but received "${text}".`,
    );
  const blocks: Block[] = [];
  for (const [, letter, count] of compact.matchAll(/([EHPR])(\d*)/g)) {
    const repeat = count === "" ? 1 : Number(count);
    if (blocks.length + repeat > maxBlocks)
      throw new OptionError("blocks", `Expected at most ${maxBlocks} blocks but "${text}" has more.`);
    for (let i = 0; i < repeat; i++) blocks.push(letter as Block);
  }
  if (blocks.length === 0) throw new OptionError("blocks", `The blocks "${text}" are empty; give at least one.`);
  if (blocks[0] === "R")
    throw new OptionError(
      "blocks",
      `The blocks "${text}" start with R, but the refiner needs a velocity to refine. Start with H, for example "H1${compact}".`,
    );
  return blocks;
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

/**
 * The schedule of a sampler for n steps. `flowturbo` opens with one Heun block, since the pseudo corrector needs a
 * velocity to start from, and ends with refiner blocks where there is a refiner: a fifth of the blocks, as in the
 * paper (more without P between collapses, table 4).
 */
export function defaultBlocks(sampler: Sampler, steps: number, hasRefiner: boolean): Block[] {
  if (sampler === "euler") return new Array<Block>(steps).fill("E");
  if (sampler === "heun") return new Array<Block>(steps).fill("H");
  const refined = hasRefiner ? Math.min(Math.round(steps / 5), steps - 1) : 0;
  return ["H", ...new Array<Block>(steps - 1 - refined).fill("P"), ...new Array<Block>(refined).fill("R")];
}
