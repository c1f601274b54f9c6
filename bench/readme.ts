/**
 * The figures that the README quotes, between two comments, written from bench/results alone: nobody types one, and a test
 * compares the README with what this file makes of the results that are checked in.
 */

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { gigabytes } from "../lib/common/memory.js";

const root = path.resolve(import.meta.dirname, "..");
const results = path.join(root, "bench/results");
const readme = path.join(root, "README.md");

export const begin = "<!-- figures: written by npm run bench -- --page -->";
export const end = "<!-- end of figures -->";

interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}
export interface PeersResult {
  readonly environment: Readonly<Record<string, unknown>>;
  readonly torch: string;
  readonly missing: readonly string[];
  readonly subjects: readonly {
    readonly name: string;
    readonly steps: number;
    readonly rounds: number;
    readonly contenders: readonly {
      readonly name: string;
      readonly pictureRatio: Spread;
      readonly stepRatio: Spread;
    }[];
    readonly start: readonly { readonly name: string; readonly ratio: Spread; readonly peak: Spread }[];
  }[];
}
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

const times = ({ median, min, max }: Spread) => `${median.toFixed(2)} (${min.toFixed(2)}–${max.toFixed(2)})`;

/** The README's lines between its two comments. */
export function figures({ peers, quality, gpu }: Results): string {
  const lines: string[] = [];
  if (peers) {
    const { cpu, cores, node, onnxruntime, commit } = peers.environment;
    const of = <T extends { name: string }>(rows: readonly T[], name: string) => rows.find((row) => row.name === name);
    const names = [...new Set(peers.subjects.flatMap(({ contenders }) => contenders.map(({ name }) => name)))];
    const started = peers.subjects.filter(({ start }) => start.length > 0);
    const cell = (value: string | undefined) => value ?? "";
    const rows = [
      [
        "time of a picture",
        ...peers.subjects.map(({ name, steps }) => `${name} (${steps} steps)`),
        ...started.map(({ name }) => `${name}, from process start to PNG`),
        ...started.map(({ name }) => `${name}, peak memory, GB`),
      ],
      ...names.map((name) => [
        name,
        ...peers.subjects.map(({ contenders }) => {
          const found = of(contenders, name);
          return cell(found && times(found.pictureRatio));
        }),
        ...started.map(({ start }) => {
          const found = of(start, name);
          return cell(found && times(found.ratio));
        }),
        ...started.map(({ start }) => {
          const found = of(start, name);
          return cell(found && gigabytes(found.peak.median));
        }),
      ]),
    ];
    lines.push(
      "Times relative to the first row, which does the same Euler steps as the peers: above 1 is slower. Median (least to greatest) of rounds in which every contender",
      "has its turn.",
      "",
      ...rows.flatMap((row, index) => [
        `| ${row.join(" | ")} |`,
        ...(index ? [] : [`|${row.map(() => "---").join("|")}|`]),
      ]),
      "",
      ...peers.missing.map((line) => `- ${line}`),
      ...(peers.missing.length > 0 ? [""] : []),
      `${cpu}, ${cores} cores; Node ${node}, ONNX Runtime ${onnxruntime}${peers.torch ? `, torch ${peers.torch}` : ""}; commit ${commit}. Steps, milliseconds and plots:`,
      "[bench/results/peers.md](bench/results/peers.md).",
    );
  } else lines.push("Not measured yet: `npm run bench` writes the figures here.");
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
