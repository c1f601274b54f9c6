/** The page of the peers: bench/results/peers.md. */

import { bars } from "../plot.js";
import { type Spread, table } from "../support.js";
import { commitsOf, type Machine, machineName, type Row } from "./result.js";
import { onlyPublishedSizes } from "./stable-diffusion-cpp.js";
import {
  ahead,
  type Column,
  columns,
  commits,
  equalWork,
  heading,
  machineLines,
  missing,
  pictureTable,
  startTable,
  stepTable,
  times,
} from "./tables.js";

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
    `${steps} Euler steps, guidance ${machine.guidance}, ${machine.threads} threads, ${rounds} rounds; ${commits(commitsOf(subject))}.`,
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
