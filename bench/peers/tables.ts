/** What the page of the peers and the README say alike, from peers.json alone. */

import { gigabytes } from "../../lib/common/memory.js";
import type { Spread } from "../support.js";
import {
  commitsOf,
  type Machine,
  machineName,
  processorName,
  type Row,
  type Start,
  type SubjectResult,
} from "./result.js";

export const baselineName = "flowturbo, Euler";
export const times = ({ median, min, max }: Spread) => `${median.toFixed(2)} (${min.toFixed(2)}–${max.toFixed(2)})`;

/** A column of a table: a subject on a machine. */
export interface Column {
  readonly machine: Machine;
  readonly subject: SubjectResult;
}

/** Every subject, on each machine that it was measured on, side by side. */
export function columns(machines: readonly Machine[]): Column[] {
  const names = [...new Set(machines.flatMap(({ subjects }) => subjects.map(({ name }) => name)))];
  return names.flatMap((name) =>
    machines.flatMap((machine) => {
      const subject = machine.subjects.find((each) => each.name === name);
      return subject ? [{ machine, subject }] : [];
    }),
  );
}

export const heading = ({ machine, subject }: Column, machines: readonly Machine[]) =>
  `${subject.name}, ${subject.steps} steps${machines.length > 1 ? ` (${processorName(machine)})` : ""}`;

/** Contenders as rows, subjects and machines as columns; a cell is what `cell` makes, "" where there is nothing. */
function sideBySide<T extends { readonly name: string }>(
  machines: readonly Machine[],
  first: string,
  rowsOf: (subject: SubjectResult) => readonly T[],
  cell: (row: T) => string,
  ours: (subject: SubjectResult) => string,
): string[][] {
  const all = columns(machines).filter(({ subject }) => rowsOf(subject).length > 0);
  const names = [...new Set(all.flatMap(({ subject }) => rowsOf(subject).map(({ name }) => name)))];
  if (all.length === 0) return [];
  return [
    [first, ...all.map((column) => heading(column, machines))],
    [baselineName, ...all.map(({ subject }) => ours(subject))],
    ...names.map((name) => [
      name,
      ...all.map(({ subject }) => {
        const row = rowsOf(subject).find((each) => each.name === name);
        return row ? cell(row) : "";
      }),
    ]),
  ];
}

const contenders = ({ contenders }: SubjectResult) => contenders;
const starts = ({ start }: SubjectResult) => start;
/** Those that draw with as many evaluations as steps. */
export const equalWork = ({ contenders }: SubjectResult) => contenders.filter(({ skips }) => !skips);

export const stepTable = (machines: readonly Machine[]) =>
  sideBySide(
    machines,
    "guided step",
    equalWork,
    ({ stepRatio }) => times(stepRatio),
    () => "1",
  );
export const pictureTable = (machines: readonly Machine[]) =>
  sideBySide(
    machines,
    "picture",
    contenders,
    ({ pictureRatio }) => times(pictureRatio),
    () => "1",
  );
export const startTable = (machines: readonly Machine[]) =>
  sideBySide(
    machines,
    "from process start to PNG; peak memory, GB",
    starts,
    ({ ratio, peak }) => `${times(ratio)}; ${gigabytes(peak.median)}`,
    ({ start }) => `1; ${gigabytes(start[0]!.baseline.peak.median)}`,
  );

/** Who is ahead of ours, subject by subject, the furthest ahead first. */
export function ahead(machines: readonly Machine[]): string[] {
  const where = ({ machine, subject }: Column) =>
    `${subject.name}${machines.length > 1 ? ` on ${processorName(machine)}` : ""}`;
  return columns(machines).flatMap((column) => {
    const { contenders, start } = column.subject;
    const int8 = contenders.find(({ ours, precision }) => ours && precision === "int8");
    // Of less precision than float32 is int8 of ours, too: whoever is not ahead of that is not ahead.
    const isPassed = ({ precision, skips, stepRatio }: Row) =>
      int8 !== undefined && precision !== "float32" && !skips && stepRatio.median >= int8.stepRatio.median;
    const peers = contenders.filter((row) => !row.ours && !isPassed(row));
    const int8Start = start.find(({ name }) => name === int8?.name);
    const isExact = (name: string) => contenders.find((row) => row.name === name)?.precision === "float32";
    const startOfOurs = (name: string) => (isExact(name) ? undefined : int8Start);
    const isAhead = ({ median }: Spread) => median < 1;
    const step = (row: Row) => {
      const known = row.precision === "float32" ? undefined : int8;
      const other = known
        ? `; with int8 weights ours takes ${known.stepRatio.median.toFixed(2)}, so that theirs takes ${(row.stepRatio.median / known.stepRatio.median).toFixed(2)} of it`
        : "";
      return `- ${where(column)}: ${row.name} takes ${times(row.stepRatio)} of our float32 time for a step${other}.`;
    };
    const picture = (row: Row) =>
      `- ${where(column)}: ${row.name} takes ${times(row.pictureRatio)} of our float32 time for a picture${row.skips ? ", with fewer evaluations" : ""}.`;
    const process = ({ name, ratio }: Start) => {
      const known = startOfOurs(name);
      const other = known ? ` in float32; with int8 weights ours takes ${known.ratio.median.toFixed(2)}` : "";
      return `- ${where(column)}, from process start: ${name} takes ${times(ratio)} of our time${other}.`;
    };
    const sorted = <T>(rows: readonly T[], of: (row: T) => Spread) =>
      rows.filter((row) => isAhead(of(row))).sort((a, b) => of(a).median - of(b).median);
    return [
      ...sorted(
        peers.filter(({ skips }) => !skips),
        ({ stepRatio }) => stepRatio,
      ).map(step),
      ...sorted(
        peers.filter(({ skips, stepRatio }) => skips || !isAhead(stepRatio)),
        ({ pictureRatio }) => pictureRatio,
      ).map(picture),
      ...sorted(start, ({ ratio }) => ratio)
        .filter(({ name }) => !contenders.some((row) => row.name === name && row.ours))
        .filter(({ name, ratio }) => ratio.median < (startOfOurs(name)?.ratio.median ?? 1))
        .map(process),
    ];
  });
}

export const commits = (all: readonly string[]) => {
  const each = [...new Set(all)];
  return `commit${each.length > 1 ? "s" : ""} ${each.join(", ")}`;
};

export const missing = (machines: readonly Machine[]): string[] =>
  columns(machines).flatMap(({ machine, subject }) =>
    subject.missing.map(
      ({ name, what, reason }) =>
        `- ${machines.length > 1 ? `${processorName(machine)}: ` : ""}${subject.name}, ${what}, ${name}: ${reason}.`,
    ),
  );

/** What a machine is, and what ran on it. */
export function machineLines(machines: readonly Machine[]): string[] {
  return machines.map((machine) => {
    const { memoryGiB, node, onnxruntime } = machine.environment as Record<string, string>;
    const set = machine.instructions.length > 0 ? ` (${machine.instructions.join(", ")})` : "";
    const versions = Object.entries(machine.versions).map(([name, version]) => `, ${name} ${version}`);
    return `${machineName(machine)}${set}, ${memoryGiB} GiB; Node ${node}, ONNX Runtime ${onnxruntime}${versions.join("")}; ${commits(machine.subjects.flatMap(commitsOf))}.`;
  });
}
