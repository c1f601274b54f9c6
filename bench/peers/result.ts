/** What is measured of the peers, as bench/results/peers.json has it: a list of machines. */

import { existsSync, readFileSync } from "node:fs";
import type { Spread } from "../support.js";
import type { Contender } from "./contender.js";

/** One contender on one subject, in turn with our Euler steps in float32. Ratios are to those, round by round. */
export interface Row extends Pick<Contender, "name" | "precision" | "skips" | "ours"> {
  /** Milliseconds of an evaluation of the transformer, which with guidance has two rows. */
  readonly step: Spread;
  readonly picture: Spread;
  readonly stepRatio: Spread;
  readonly pictureRatio: Spread;
  /** Ours, in the same rounds. */
  readonly baseline: { readonly step: Spread; readonly picture: Spread };
  /** Of its picture from ours, from the same noise: values from 0 to 1; decibels. */
  readonly agreement?: { readonly difference: number; readonly psnr: number };
}

/** A result, and the version of ours that was measured with it. */
export type At<T> = T & { readonly commit: string };

/** From process start to PNG, in turn with ours. */
export interface Start {
  readonly name: string;
  readonly time: Spread;
  readonly ratio: Spread;
  /** Bytes resident at most, of all its processes. */
  readonly peak: Spread;
  readonly baseline: { readonly time: Spread; readonly peak: Spread };
}

export interface SubjectResult {
  readonly name: string;
  readonly steps: number;
  readonly rounds: number;
  readonly contenders: readonly At<Row>[];
  readonly start: readonly At<Start>[];
  /** Contenders without a row, and why. */
  readonly missing: readonly Missing[];
}

export interface Missing {
  readonly name: string;
  /** What was to be measured. */
  readonly what: string;
  readonly reason: string;
}

/** Pictures with and without TaylorSeer, from the same captions and noise, judged. */
export interface CachingResult {
  readonly captions: number;
  readonly size: number;
  readonly rows: readonly {
    readonly name: string;
    /** Share of the pictures that show all that their caption says. */
    readonly right: number;
    readonly evaluations: number;
    /** Of its picture from that of the same pipeline with every step, mean. */
    readonly psnr: number | null;
  }[];
}

export interface Machine {
  readonly environment: Readonly<Record<string, unknown>>;
  /** Sets of instructions that matter to matrix products, as Linux names them. */
  readonly instructions: readonly string[];
  readonly threads: number;
  readonly guidance: number;
  readonly versions: Readonly<Record<string, string>>;
  readonly subjects: readonly SubjectResult[];
  readonly caching?: CachingResult | undefined;
}

export interface PeersResult {
  readonly machines: readonly Machine[];
}

/** Its name and its widest instructions: virtual machines give processors of several generations one name. */
export function processorName({
  environment: { cpu },
  instructions,
}: Pick<Machine, "environment" | "instructions">): string {
  const widest = instructions.includes("amx_int8") ? "AMX" : instructions.includes("avx512f") ? "AVX-512" : null;
  return widest ? `${cpu} with ${widest}` : String(cpu);
}

export const machineName = (machine: Pick<Machine, "environment" | "instructions">): string =>
  `${processorName(machine)}, ${machine.environment.cores} cores`;

export const readPeers = (file: string): PeersResult =>
  existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as PeersResult) : { machines: [] };

/**
 * What was measured now over what was there: each contender of a subject of this machine is replaced by name, in the order
 * of the new ones, where a subject has the same steps and rounds; other subjects and machines stay.
 */
export function merged({ machines }: PeersResult, now: Machine): PeersResult {
  const isSame = (machine: Machine) => machineName(machine) === machineName(now);
  const before = machines.find(isSame);
  const isNow = ({ name }: SubjectResult) => now.subjects.some((subject) => subject.name === name);
  const kept = (before?.subjects ?? []).filter((subject) => !isNow(subject));
  const subjects = now.subjects.map((subject) => {
    const old = before?.subjects.find(({ name }) => name === subject.name);
    return old && old.steps === subject.steps && old.rounds === subject.rounds ? together(subject, old) : subject;
  });
  const versions = { ...before?.versions, ...now.versions };
  const entry = { ...now, versions, subjects: [...subjects, ...kept], caching: now.caching ?? before?.caching };
  return { machines: before ? machines.map((each) => (isSame(each) ? entry : each)) : [...machines, entry] };
}

function together(now: SubjectResult, old: SubjectResult): SubjectResult {
  const both = <T extends { readonly name: string }>(rows: readonly T[], earlier: readonly T[]) => [
    ...rows,
    ...earlier.filter(({ name }) => !rows.some((row) => row.name === name)),
  ];
  const contenders = both(now.contenders, old.contenders);
  const start = both(now.start, old.start);
  const isTried = ({ name, what }: Missing) =>
    now.missing.some((each) => each.name === name && each.what === what) ||
    (what === "from process start" ? now.start : now.contenders).some((row) => row.name === name);
  return { ...now, contenders, start, missing: [...now.missing, ...old.missing.filter((each) => !isTried(each))] };
}

/** The versions of ours that a subject's rows were measured with. */
export const commitsOf = ({ contenders, start }: SubjectResult): string[] => [
  ...new Set([...contenders, ...start].map(({ commit }) => commit)),
];

/** Sets of instructions of this CPU. */
export function instructions(): string[] {
  const wanted = ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"];
  const file = "/proc/cpuinfo";
  const flags = existsSync(file)
    ? (readFileSync(file, "utf8")
        .match(/^flags\s*:(.*)$/m)?.[1]
        ?.split(" ") ?? [])
    : [];
  return wanted.filter((flag) => flags.includes(flag));
}
