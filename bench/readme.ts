/**
 * The figures that the README quotes, between two comments, written from bench/results alone: nobody types one, and a test
 * compares the README with what this file makes of the results that are checked in.
 */

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import type { PeersResult } from "./peers/result.js";
import { ahead, machineLines, missing, pictureTable, startTable, stepTable } from "./peers/tables.js";

const root = path.resolve(import.meta.dirname, "..");
const results = path.join(root, "bench/results");
const readme = path.join(root, "README.md");

export const begin = "<!-- figures: written by npm run bench -- --page -->";
export const end = "<!-- end of figures -->";

export interface QualityResult {
  /** Of the page. */
  readonly name: string;
  readonly captions: number;
  readonly size: number;
  readonly guidance: number;
  readonly findings: readonly string[];
}
export interface Results {
  readonly peers?: PeersResult | undefined;
  /** Pages of the quality benchmark that are quoted. */
  readonly quality?: readonly QualityResult[] | undefined;
  readonly gpu?: { readonly measured: boolean } | undefined;
}

const markdown = (rows: readonly (readonly string[])[]): string[] =>
  rows.flatMap((row, index) => [`| ${row.join(" | ")} |`, ...(index ? [] : [`|${row.map(() => "---").join("|")}|`])]);

/** The README's lines between its two comments. */
export function figures({ peers, quality, gpu }: Results): string {
  const lines: string[] = [];
  if (peers && peers.machines.length > 0) {
    const { machines } = peers;
    const front = ahead(machines);
    const notMeasured = missing(machines);
    const section = (before: string, rows: readonly (readonly string[])[]) =>
      rows.length > 0 ? [before, "", ...markdown(rows), ""] : [];
    lines.push(
      ...(front.length > 0 ? ["Where ours is behind:", "", ...front, ""] : []),
      ...section(
        "A guided step (two rows), relative to ours in float32 in the same rounds: above 1 is slower. Median (least to greatest).",
        stepTable(machines),
      ),
      ...section("A picture, from the prompt to the PNG:", pictureTable(machines)),
      ...section("A process that starts, draws one picture and ends, and its peak memory in GB:", startTable(machines)),
      ...(notMeasured.length > 0 ? ["Not measured:", "", ...notMeasured, ""] : []),
      ...machineLines(machines),
      "Milliseconds, plots and how far each picture is from ours: [bench/results/peers.md](bench/results/peers.md).",
    );
  } else lines.push("Not measured yet: `npm run bench:peers` writes the figures here.");
  for (const { name, captions, size, guidance, findings } of quality ?? [])
    lines.push(
      "",
      `Quality on the embedded model at ${size} px and guidance ${guidance}, ${captions} captions ([bench/results/${name}.md](bench/results/${name}.md)):`,
      "",
      ...findings.map((line) => `- ${line}`),
    );
  if (gpu) {
    const said = gpu.measured ? "On a GPU" : "On a GPU nothing has been measured yet";
    lines.push("", `${said}: [bench/results/gpu.md](bench/results/gpu.md).`);
  }
  return lines.join("\n");
}

/** What is in bench/results. */
export function readResults(): Results {
  const read = (name: string) => {
    const file = path.join(results, `${name}.json`);
    return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : undefined;
  };
  const quality = ["quality", "quality-guidance-4.5"].flatMap((name) => {
    const result = read(name);
    return result ? [{ ...result, name }] : [];
  });
  return { peers: read("peers"), quality, gpu: read("gpu") };
}

/** A document with the figures put between its comments. @throws Error if it lacks them */
export function withFigures(document: string, text: string): string {
  const [from, to] = [document.indexOf(begin), document.indexOf(end)];
  if (from < 0 || to < from) throw new Error(`README.md has no "${begin}" … "${end}"`);
  return `${document.slice(0, from + begin.length)}\n${text}\n${document.slice(to)}`;
}

/** Writes the README's figures again, from bench/results. */
export function refreshReadme(): void {
  const before = readFileSync(readme, "utf8");
  const after = withFigures(before, figures(readResults()));
  if (after !== before) writeFileSync(readme, after);
}
