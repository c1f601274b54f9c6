/** The page of the peers: bench/results/peers.md, from peers.json alone. */

import { gigabytes } from "../../lib/common/memory.js";
import { bars } from "../plot.js";
import { type Spread, table } from "../support.js";
import { type Machine, machineName, type Row, type Start, type SubjectResult } from "./result.js";
import { onlyPublishedSizes } from "./stable-diffusion-cpp.js";

export const baselineName = "flowturbo, Euler";
const times = ({ median, min, max }: Spread) => `${median.toFixed(2)} (${min.toFixed(2)}–${max.toFixed(2)})`;

/** A column of a table: a subject on a machine. */
interface Column {
  readonly machine: Machine;
  readonly subject: SubjectResult;
}

/** Every subject, on each machine that it was measured on, side by side. */
function columns(machines: readonly Machine[]): Column[] {
  const names = [...new Set(machines.flatMap(({ subjects }) => subjects.map(({ name }) => name)))];
  return names.flatMap((name) =>
    machines.flatMap((machine) => {
      const subject = machine.subjects.find((each) => each.name === name);
      return subject ? [{ machine, subject }] : [];
    }),
  );
}

const heading = ({ machine, subject }: Column, machines: readonly Machine[]) =>
  `${subject.name}, ${subject.steps} steps${machines.length > 1 ? ` (${machine.environment.cpu})` : ""}`;

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
const equalWork = ({ contenders }: SubjectResult) => contenders.filter(({ skips }) => !skips);

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
    `${subject.name}${machines.length > 1 ? ` on ${machine.environment.cpu}` : ""}`;
  return columns(machines).flatMap((column) => {
    const { contenders, start } = column.subject;
    const int8 = contenders.find(({ ours, precision }) => ours && precision === "int8");
    const peers = contenders.filter(({ ours }) => !ours);
    const isAhead = ({ median }: Spread) => median < 1;
    const step = (row: Row) => {
      const known = row.precision === "float32" ? undefined : int8;
      const other = known
        ? `; with int8 weights ours takes ${known.stepRatio.median.toFixed(2)}, ${(row.stepRatio.median / known.stepRatio.median).toFixed(2)} × that is theirs`
        : "";
      return `- ${where(column)}: ${row.name} takes ${times(row.stepRatio)} of our float32 time for a step${other}.`;
    };
    const picture = (row: Row) =>
      `- ${where(column)}: ${row.name} takes ${times(row.pictureRatio)} of our float32 time for a picture${row.skips ? ", with fewer evaluations" : ""}.`;
    const process = ({ name, ratio }: Start) =>
      `- ${where(column)}, from process start: ${name} takes ${times(ratio)} of our time.`;
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
        .map(process),
    ];
  });
}

export const missing = (machines: readonly Machine[]): string[] =>
  columns(machines).flatMap(({ machine, subject }) =>
    subject.missing.map((line) => `- ${machines.length > 1 ? `${machine.environment.cpu}: ` : ""}${line}`),
  );

/** What a machine is, and what ran on it. */
export function machineLines(machines: readonly Machine[]): string[] {
  return machines.map((machine) => {
    const { memoryGiB, node, onnxruntime } = machine.environment as Record<string, string>;
    const set = machine.instructions.length > 0 ? ` (${machine.instructions.join(", ")})` : "";
    const versions = Object.entries(machine.versions).map(([name, version]) => `, ${name} ${version}`);
    const commits = [...new Set(machine.subjects.map(({ commit }) => commit))].join(", ");
    return `${machineName(machine)}${set}, ${memoryGiB} GiB; Node ${node}, ONNX Runtime ${onnxruntime}${versions.join("")}; commit ${commits}.`;
  });
}

/** One subject on one machine, with milliseconds. */
function details({ machine, subject }: Column): string[] {
  const { contenders, steps, rounds } = subject;
  const agreement = (row: Row) => {
    if (!row.agreement) return "";
    const { difference, psnr } = row.agreement;
    return `${psnr.toFixed(0)} dB (${difference.toExponential(0)})`;
  };
  const milliseconds = ({ median }: Spread) => median.toFixed(median < 100 ? 1 : 0);
  return [
    `## ${subject.name}: ${machineName(machine)}`,
    "",
    `${steps} Euler steps, guidance ${machine.guidance}, ${machine.threads} threads, ${rounds} rounds; commit ${subject.commit}.`,
    "",
    table([
      [
        "contender",
        "precision",
        "step, ratio",
        "step, ms",
        "ours, ms",
        "picture, ratio",
        "picture, ms",
        "ours, ms",
        "against our picture",
      ],
      ...contenders.map((row) => [
        ...[row.name, row.precision, times(row.stepRatio), milliseconds(row.step), milliseconds(row.baseline.step)],
        ...[times(row.pictureRatio), milliseconds(row.picture), milliseconds(row.baseline.picture), agreement(row)],
      ]),
    ]),
    "",
  ];
}

function caching({ caching, ...machine }: Machine): string[] {
  if (!caching) return [];
  const { captions, size, rows } = caching;
  return [
    `## What TaylorSeer costs in quality: ${machineName(machine)}`,
    "",
    `${captions} captions at ${size} px, each from the same noise for all. Right: shows all that its caption says (bench/shapes/detector.ts). PSNR: from the picture of the same pipeline with every step.`,
    "",
    table([
      ["pipeline", "evaluations", "right, %", "PSNR, dB"],
      ...rows.map(({ name, evaluations, right, psnr }) => [
        ...[name, evaluations, (100 * right).toFixed(1), psnr === null ? "" : psnr.toFixed(1)],
      ]),
    ]),
    "",
  ];
}

export function page(machines: readonly Machine[], plot: string | undefined): string {
  const front = ahead(machines);
  const section = (title: string, rows: string[][]) => (rows.length > 0 ? [`## ${title}`, "", table(rows), ""] : []);
  const notMeasured = missing(machines);
  return [
    "# Against other ways to draw the same picture on a CPU",
    "",
    "`npm run bench:peers`. Every contender has its turn with our Euler steps in float32, round by round, and ratios are to those: above 1 is slower than ours. Median and range.",
    "",
    ...machineLines(machines).map((line) => `- ${line}`),
    "",
    "## Where ours is behind",
    "",
    ...(front.length > 0 ? front : ["Nowhere here."]),
    "",
    ...(notMeasured.length > 0 ? ["## Not measured", "", ...notMeasured, ""] : []),
    ...section("A guided step (two rows), the same work", stepTable(machines)),
    ...section("A picture, from the prompt to the PNG", pictureTable(machines)),
    ...section("From process start to PNG, and peak memory", startTable(machines)),
    ...(plot ? [`![](${plot})`, ""] : []),
    "What each of them is: one graph a module for onnxruntime-node, the Euler loop in JavaScript; OpenVINO's modules converted from torch with fixed shapes, latency as its hint, the loop in numpy; openvino-genai's own pipeline over the same modules, TaylorSeer as in OpenVINO's example (every third step between the seventh and the last two but one); diffusers' own pipeline. All get",
    `prompts that they have not seen. Peak memory is the resident size of all processes of a contender. Processes of torch.compile find what an earlier one compiled in its cache. ${onlyPublishedSizes}`,
    "The last column below compares pictures from the same noise: PSNR, and the largest difference of values from 0 to 1. Whoever computes in float32 must draw our picture.",
    "",
    ...columns(machines).flatMap(details),
    ...machines.flatMap(caching),
  ].join("\n");
}

export function plot(machines: readonly Machine[]): string {
  const bar = (name: string, { median, min, max }: Spread) => ({ name, value: median, low: min, high: max });
  return bars({
    title: "Time of a guided step, relative to flowturbo in float32",
    groups: columns(machines)
      .map((column) => ({
        name: heading(column, machines),
        bars: equalWork(column.subject).map((row) => bar(row.name, row.stepRatio)),
      }))
      .filter(({ bars }) => bars.length > 0),
  });
}
