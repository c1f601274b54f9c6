/**
 * One row's program as the scheduler and the table of costs see it: its launches in order, each with a key that says with
 * whose launches it may be shared, and how many of them cost the same. A row program draws one picture, or encodes one
 * text; every operand of it that is "per row" has one row (two where the network runs on an unconditional and a
 * conditional one).
 */

import { type Constant, type Launch, type Program, type Register, type Sharing, shapeOf } from "../program/program.js";

/** A launch that a row makes. */
export interface RowLaunch extends Sharing {
  /** Rows may share a launch if their keys are equal: the same graph, size and operands that are not per row. */
  readonly key: string;
  readonly graph: string;
}

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
  /** The same launches as the scheduler sees them. */
  readonly specs: readonly RowLaunch[];
}

/** The launches of a program that cost the same: those of one graph at one size. */
export interface LaunchKind {
  /** Graph and size. */
  readonly key: string;
  readonly graph: string;
  readonly size: string;
  readonly maxRows: number | undefined;
  /** How many they are. */
  readonly times: number;
  readonly program: Program;
  /** One of them. */
  readonly launch: Launch;
}

/** Graph and size of a launch that may be shared. */
export function kindOf({ graph, sharing }: Launch): string {
  return `${graph}@${sharing!.size}`;
}

const knownPhases = new WeakMap<Program, readonly { readonly kind: LaunchKind; readonly times: number }[]>();

/** The launches of a program in order, those of one kind that follow each other together. */
export function launchPhases(program: Program) {
  const known = knownPhases.get(program);
  if (known) return known;
  const kinds = new Map(launchKinds(program).map((kind) => [kind.key, kind]));
  const phases: { kind: LaunchKind; times: number }[] = [];
  for (const launch of program.instructions) {
    if (launch.op !== "launch" || !launch.sharing) continue;
    const kind = kinds.get(kindOf(launch))!;
    const last = phases.at(-1);
    if (last?.kind === kind) last.times++;
    else phases.push({ kind, times: 1 });
  }
  knownPhases.set(program, phases);
  return phases;
}

const knownKinds = new WeakMap<Program, readonly LaunchKind[]>();

export function launchKinds(program: Program): readonly LaunchKind[] {
  const known = knownKinds.get(program);
  if (known) return known;
  const kinds = new Map<string, LaunchKind>();
  for (const launch of program.instructions) {
    if (launch.op !== "launch" || !launch.sharing) continue;
    const { graph, sharing } = launch;
    const key = kindOf(launch);
    const times = (kinds.get(key)?.times ?? 0) + 1;
    kinds.set(key, { key, graph, size: sharing.size, maxRows: sharing.maxRows, times, program, launch });
  }
  const list = [...kinds.values()];
  knownKinds.set(program, list);
  return list;
}

/** Type and shape of a register or a constant. */
export function operandOf({ constants, registers }: Program, name: string): Register {
  const constant = constants[name];
  return constant ? shapeOf(constant) : registers[name]!;
}

const identities = new WeakMap<object, string>();
let values = 0;

/**
 * A name for a constant that several programs share: equal for the same values in memory (the same array, not equal
 * ones), and for the same rows of the same file.
 */
export function identityOf(constant: Constant): string {
  const subject = constant.kind === "value" ? constant.tensor.data : constant;
  let identity = identities.get(subject);
  if (identity === undefined) {
    if (constant.kind === "stored") {
      const { source, firstElement, rowElements, strideElements, rows, shape } = constant;
      identity = JSON.stringify([source.file, source.offset, firstElement, rowElements, strideElements, rows, shape]);
    } else identity = `value ${values++}`;
    identities.set(subject, identity);
  }
  return identity;
}

/**
 * @param shapes of a graph by its name
 * @throws RangeError for a program with copies of rows (one row has none), or a launch that does not say how it may be shared
 */
export function rowProgram(program: Program, shapes: (graph: string) => GraphShapes): RowProgram {
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
      shared.push(`${input}=${identityOf(constant)}`);
    }
    launches.push(instruction);
    const key = [graph, sharing.size, sharing.maxRows ?? "", ...shared.sort()].join("|");
    specs.push({ key, graph, ...sharing });
  }
  return { program, launches, specs };
}
