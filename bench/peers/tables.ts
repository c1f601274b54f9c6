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

/**
 * Who is ahead of ours: a line for each subject and machine, the furthest ahead first. Steps and starts of less precision than float32 are
 * measured by ours with int8 weights, too: who is not ahead of that is not ahead.
 */
export function ahead(machines: readonly Machine[]): string[] {
  return columns(machines).flatMap((column) => {
    const { name, contenders, start } = column.subject;
    const ours = contenders.filter((row) => row.ours);
    const int8 = ours.find(({ precision }) => precision === "int8");
    const [fastest] = quickest(
      ours.filter(({ skips }) => skips),
      ({ pictureRatio }) => pictureRatio,
    );
    const peers = contenders.filter((row) => !row.ours);
    const isOurs = (each: Start) => ours.some((row) => row.name === each.name);
    const isExact = (each: { readonly name: string }) =>
      contenders.some((row) => row.name === each.name && row.precision === "float32");
    const every = peers.filter(({ skips }) => !skips);
    const steps = inFront(
      every,
      ({ stepRatio }) => stepRatio,
      (row) => (isExact(row) ? undefined : int8?.stepRatio),
    );
    const pictures = inFront(
      every.filter((row) => !steps.includes(row)),
      ({ pictureRatio }) => pictureRatio,
      (row) => (isExact(row) ? undefined : int8?.pictureRatio),
    );
    const fewer = inFront(
      peers.filter(({ skips }) => skips),
      ({ pictureRatio }) => pictureRatio,
    );
    const int8Start = start.find((each) => each.name === int8?.name)?.ratio;
    const starts = inFront(
      start.filter((each) => !isOurs(each)),
      ({ ratio }) => ratio,
      (each) => (isExact(each) ? undefined : int8Start),
    );
    const besides = (what: string, ratio: Spread | undefined) => (ratio ? `; ${what} ${times(ratio)}` : "");
    const list = (what: string, rows: readonly string[], more: string) =>
      rows.length > 0 ? [`${what}: ${rows.join("; ")}${more}.`] : [];
    const step = ({ name, stepRatio }: Row) => `${name} ${times(stepRatio)}`;
    const picture = ({ name, pictureRatio }: Row) => `${name} ${times(pictureRatio)}`;
    const process = ({ name, ratio }: Start) => `${name} ${times(ratio)}`;
    const parts = [
      ...list("A step", steps.map(step), besides("ours with int8 weights", int8?.stepRatio)),
      ...list("A picture", pictures.map(picture), besides("ours with int8 weights", int8?.pictureRatio)),
      ...list(
        "A picture with fewer evaluations",
        fewer.map(picture),
        besides(`ours (${fastest?.name})`, fastest?.pictureRatio),
      ),
      ...list("From process start", starts.map(process), besides("ours with int8 weights", int8Start)),
    ];
    const where = `${name}${machines.length > 1 ? ` on ${processorName(column.machine)}` : ""}`;
    return parts.length > 0 ? [`- ${where}, relative to ours in float32. ${parts.join(" ")}`] : [];
  });
}

const quickest = <T>(rows: readonly T[], of: (row: T) => Spread): T[] =>
  [...rows].sort((a, b) => of(a).median - of(b).median);

/** Those that take less than ours, the quickest first. @param other what of ours they are measured by besides */
function inFront<T>(
  rows: readonly T[],
  of: (row: T) => Spread,
  other: (row: T) => Spread | undefined = () => undefined,
): T[] {
  return quickest(
    rows.filter((row) => of(row).median < Math.min(1, other(row)?.median ?? 1)),
    of,
  );
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
