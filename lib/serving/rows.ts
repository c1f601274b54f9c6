/**
 * One row's program as the scheduler sees it: its launches in order, each with a key that says with whose launches it
 * may be shared. A row program draws one picture, or encodes one text; every operand of it that is "per row" has one row
 * (two where the network runs on an unconditional and a conditional one).
 */

import type { Constant, Launch, Program, StoredConstant } from "../program/program.js";
import type { RowLaunch } from "./scheduler.js";

/** Dimensions of a graph's operands; see `OnnxGraph`. */
export interface GraphShapes {
  readonly inputs: ReadonlyMap<string, readonly (number | string)[]>;
  readonly outputs: ReadonlyMap<string, readonly (number | string)[]>;
}

/** Whether an operand has a row, or a group of rows, of its own for each row of a launch. */
export function isPerRow(dimensions: readonly (number | string)[] | undefined): boolean {
  return dimensions?.[0] === "rows" || dimensions?.[0] === "network_rows";
}

export interface RowProgram {
  readonly program: Program;
  readonly launches: readonly Launch[];
  readonly specs: readonly RowLaunch[];
}

/**
 * Gives operands that several programs share a name: equal for the same values in memory (the same array, not equal
 * ones), and for the same rows of the same file.
 */
export class Identities {
  readonly #known = new WeakMap<object, string>();
  #next = 0;

  of(constant: Constant): string {
    const subject = constant.kind === "value" ? constant.tensor.data : constant;
    let identity = this.#known.get(subject);
    if (identity === undefined) {
      identity = constant.kind === "stored" ? placeOf(constant) : `value ${this.#next++}`;
      this.#known.set(subject, identity);
    }
    return identity;
  }
}

function placeOf({ source, firstElement, rowElements, strideElements, rows, shape }: StoredConstant): string {
  return JSON.stringify([source.file, source.offset, firstElement, rowElements, strideElements, rows, shape]);
}

/**
 * @param shapes of a graph by its name
 * @throws RangeError for a program with copies of rows (one row has none), or a launch that does not say how it may be shared
 */
export function rowProgram(
  program: Program,
  shapes: (graph: string) => GraphShapes,
  identities: Identities,
): RowProgram {
  const launches: Launch[] = [];
  const specs: RowLaunch[] = [];
  for (const instruction of program.instructions) {
    if (instruction.op === "copy") throw new RangeError("The program of one row has no rows to copy.");
    const { graph, inputs, sharing, label } = instruction;
    if (!sharing) throw new RangeError(`The launch "${label.name}" does not say how it may be shared.`);
    const { inputs: dimensions } = shapes(graph);
    const shared: string[] = [];
    for (const [input, operand] of Object.entries(inputs)) {
      if (isPerRow(dimensions.get(input))) continue;
      const constant = program.constants[operand];
      if (!constant) throw new RangeError(`"${input}" of "${graph}" is the same for all rows and must be a constant.`);
      shared.push(`${input}=${identities.of(constant)}`);
    }
    launches.push(instruction);
    specs.push({
      key: [graph, sharing.size, sharing.maxRows ?? "", ...shared.sort()].join("|"),
      graph,
      size: sharing.size,
      maxRows: sharing.maxRows ?? Number.POSITIVE_INFINITY,
      deferrable: sharing.deferrable ?? false,
    });
  }
  return { program, launches, specs };
}
