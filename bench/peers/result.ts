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
  readonly commit: string;
  readonly contenders: readonly Row[];
  readonly start: readonly Start[];
  /** Why a contender has no row. */
  readonly missing: readonly string[];
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

export const machineName = ({ environment: { cpu, cores } }: Pick<Machine, "environment">): string =>
  `${cpu}, ${cores} cores`;

export const readPeers = (file: string): PeersResult =>
  existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as PeersResult) : { machines: [] };

/** What was measured now over what was there: subjects of this machine are replaced by name, other machines stay. */
export function merged({ machines }: PeersResult, now: Machine): PeersResult {
  const isSame = (machine: Machine) => machineName(machine) === machineName(now);
  const before = machines.find(isSame);
  const kept = (before?.subjects ?? []).filter(({ name }) => !now.subjects.some((subject) => subject.name === name));
  const entry = { ...now, subjects: [...now.subjects, ...kept], caching: now.caching ?? before?.caching };
  return { machines: before ? machines.map((each) => (isSame(each) ? entry : each)) : [...machines, entry] };
}

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
