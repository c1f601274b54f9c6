/**
 * Against what a user would pick instead, on the CPU (bench/peers/contenders.ts has who): first the same Euler steps, then
 * the product's FlowTurbo schedules and a peer's caching; then each in a process of its own, from its start to the PNG, with its
 * peak memory. A contender is measured in turn with our Euler steps in float32, round by round, so that its result stands
 * alone: it is kept as soon as it is there, and a run that was interrupted goes on. All get prompts that they have not
 * seen, and as many threads as this machine has cores. A contender that fails is named with the reason, and the others go
 * on. Results are kept for each machine side by side; those of --quick are no measurements, and go to peers-quick.
 *
 *   npm run bench:peers -- [--quick] [--rounds 5] [--steps 28] [--only 64,width] [--contenders REGEXP] [--captions 100] [--fresh]
 *   npm run bench:peers -- --page     nothing is measured, the page is written again
 */

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { embeddedModel } from "flowturbo";
import { gigabytes } from "../lib/common/memory.js";
import { measureCaching } from "./peers/caching.js";
import type { Contender, Place, Subject } from "./peers/contender.js";
import { contendersOf } from "./peers/contenders.js";
import { baseline, type OurSession, openOurs, schedule } from "./peers/flowturbo.js";
import { fromProcessStart, measure, type Reference, reference } from "./peers/measure.js";
import { genai } from "./peers/openvino.js";
import { page, plot } from "./peers/page.js";
import { packageSets, pythonWith, reason, versions } from "./peers/python.js";
import {
  type At,
  type CachingResult,
  instructions,
  type Machine,
  type Missing,
  merged,
  type Row,
  readPeers,
  type Start,
} from "./peers/result.js";
import { State } from "./peers/state.js";
import { randomCheckpoint, writeRandom } from "./random-checkpoint.js";
import { checkpointShapes, sd35Medium } from "./single-file-checkpoint.js";
import { environment, format, report, resultsFolder, root } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    rounds: { type: "string", default: "5" },
    steps: { type: "string", default: "28" },
    captions: { type: "string", default: "100" },
    only: { type: "string" },
    contenders: { type: "string", default: "" },
    fresh: { type: "boolean", default: false },
    page: { type: "boolean", default: false },
  },
});
const name = flags.quick ? "peers-quick" : "peers";
const threads = os.availableParallelism();
const guidance = 2;
const work = path.join(root, "bench/.work/peers");
const shapesModel = async () => embeddedModel;
mkdirSync(work, { recursive: true });

if (flags.page) await write(readPeers(path.join(resultsFolder, "peers.json")).machines);
else await main();

/** The default, and what the quality benchmark found to be as good as its reference, where it was run at this size. */
function chosenSchedules(size: number): string[] {
  const file = path.join(root, "bench/results", size === 64 ? "quality.json" : `quality-${size}.json`);
  if (!existsSync(file)) return ["H1P7R2"];
  const { equalQuality } = JSON.parse(readFileSync(file, "utf8")) as { equalQuality?: { schedule: string }[] };
  return [...new Set(["H1P7R2", ...(equalQuality ?? []).map(({ schedule }) => schedule)])];
}

/** SD3.5-medium's shape with random weights, in one file of 6.7 GB. */
async function oneFile(): Promise<string> {
  const file = path.join(work, "sd35-medium.safetensors");
  const whole = `${file}.whole`;
  if (!existsSync(whole)) {
    await writeRandom(file, checkpointShapes(sd35Medium));
    writeFileSync(whole, "");
  }
  return file;
}

function allSubjects(): Subject[] {
  const rounds = Number(flags.rounds);
  const most = Number(flags.steps);
  const width = (layers: number, size: number, steps: number, start: boolean): Subject => ({
    name: `SD3.5-medium's width, ${layers} layers, ${size} px`,
    model: async () => (await randomCheckpoint(layers, true)).folder,
    ...{ size, guidance, tokens: 32, rounds, start, steps: Math.min(most, steps) },
    // It has no refiner. Against fewer Euler steps than users take, fewer blocks would show nothing.
    schedules: [],
  });
  const shapes = (size: number, more: number): Subject => ({
    ...{ name: `shapes, ${size} px`, model: shapesModel, size, steps: most, guidance, tokens: 16 },
    // A picture takes a fraction of a second.
    ...{ rounds: more * rounds, schedules: chosenSchedules(size), start: size === 64 && !flags.quick },
  });
  const whole: Subject = {
    ...{ name: "SD3.5-medium, 256 px", model: oneFile, size: 256, steps: 1, guidance, tokens: 77, rounds },
    ...{ schedules: [], start: false, oneFile: true },
  };
  const every = flags.quick
    ? [shapes(64, 1), width(4, 256, 1, false)]
    : [shapes(64, 3), shapes(128, 2), width(4, 256, 4, true), width(2, 512, 2, false), whole];
  const wanted = flags.only?.toLowerCase().split(",");
  const chosen = every.filter((subject) => !wanted || wanted.some((part) => subject.name.toLowerCase().includes(part)));
  if (chosen.length === 0)
    throw new Error(`No subject is called "${flags.only}": there are ${every.map((each) => each.name).join("; ")}.`);
  return chosen;
}

async function main(): Promise<void> {
  const wanted = new RegExp(flags.contenders, "i");
  const subjects = allSubjects();
  const where = environment();
  // What can be installed is installed first: results depend on the versions.
  for (const set of flags.quick ? packageSets.filter((each) => each !== "stable-diffusion.cpp") : packageSets)
    await pythonWith(set).catch(() => undefined);
  const settings = { rounds: flags.rounds, steps: flags.steps, captions: flags.captions };
  const state = new State(path.join(work, `${name}-state.json`), [where, settings, await versions()], flags.fresh);
  if (state.size > 0) console.log(`going on with ${state.size} results (--fresh starts anew)`);
  const measured: Machine["subjects"][number][] = [];
  let caching: CachingResult | undefined;

  for (const subject of subjects) {
    console.log(`\n${subject.name}: ${subject.steps} Euler steps, ${subject.rounds} rounds`);
    const missing: Missing[] = [];
    const contenders = contendersOf(subject);
    const chosen = contenders.filter(({ name, slow }) => wanted.test(name) && !(flags.quick && slow));
    const model = await subject.model();
    const place: Place = { subject, model, work: await workFolder(model), threads };
    let ours: { session: OurSession; reference: Reference } | undefined;
    /** Ours is loaded once for all that is left to measure. */
    const opened = async () => {
      if (!ours) {
        const session = await openOurs(place, {});
        ours = { session, reference: await reference(place, session) };
      }
      return ours;
    };
    /** A result that is there, or that is measured now and kept. */
    const once = async <T>(what: string, contender: Contender, run: () => Promise<T>): Promise<void> => {
      const key = `${subject.name} | ${what} | ${contender.name}`;
      if (state.has(key)) return;
      try {
        state.set(key, (await run()) ?? null);
      } catch (error) {
        missing.push({ name: contender.name, what, reason: reason(error) });
        console.log(`${contender.name}, ${what}: ${reason(error)}`);
      }
    };
    for (const contender of chosen)
      await once("side by side", contender, async () => {
        const { session, reference } = await opened();
        const row = await measure(place, contender, session, reference);
        console.log(
          `${row.name}: ${format(row.stepRatio)} × a step, ${format(row.pictureRatio)} × a picture, ${row.step.median.toFixed(1)} ms a step${row.agreement ? `, ${row.agreement.psnr.toFixed(0)} dB` : ""}`,
        );
        return row;
      });
    if (subject.model === shapesModel && subject.size === 64 && genai.some(({ name }) => wanted.test(name)))
      await once("quality", genai[1]!, async () => {
        const [every, cached] = genai as [Contender, Contender];
        const fast = schedule("H1P7R2");
        const pipelines = [
          ...[{ contender: every }, { contender: cached, reference: every.name }],
          ...[{ contender: baseline }, { contender: fast, reference: baseline.name }],
        ];
        return measureCaching(place, pipelines, (await opened()).session, flags.quick ? 8 : Number(flags.captions));
      });
    await ours?.session.close();
    if (subject.start)
      for (const contender of chosen)
        await once("from process start", contender, async () => {
          const start = await fromProcessStart(place, contender);
          if (start)
            console.log(
              `${start.name}, from process start: ${format(start.ratio)} ×, ${gigabytes(start.peak.median)} GB`,
            );
          return start;
        });
    const kept = <T>(what: string) =>
      contenders.flatMap((each) => state.get<T>(`${subject.name} | ${what} | ${each.name}`) ?? []);
    caching = kept<CachingResult>("quality")[0] ?? caching;
    const at = <T>(rows: T[]): At<T>[] => rows.map((row) => ({ ...row, commit: String(where.commit) }));
    const rows = {
      contenders: at(kept<Row>("side by side")),
      start: at(kept<Start>("from process start")),
    };
    // With --contenders a subject may have none.
    if (rows.contenders.length + rows.start.length + missing.length === 0) continue;
    measured.push({ name: subject.name, steps: subject.steps, rounds: subject.rounds, missing, ...rows });
    const machine = { environment: where, instructions: instructions(), threads, guidance };
    const now: Machine = { ...machine, versions: await versions(), subjects: measured, caching };
    // After each subject: what is there is not lost.
    await write(merged(readPeers(path.join(resultsFolder, `${name}.json`)), now).machines);
  }
}

async function write(machines: readonly Machine[]): Promise<void> {
  const image = flags.quick ? undefined : `${name}.svg`;
  mkdirSync(resultsFolder, { recursive: true });
  if (image) writeFileSync(path.join(resultsFolder, image), plot(machines));
  await report(name, { machines }, page(machines, image));
}

/** Where exports of a checkpoint lie: another one for each version of the checkpoint and of the scripts that export it. */
async function workFolder(model: string): Promise<string> {
  const hash = createHash("sha256");
  const scripts = path.join(root, "bench/peers");
  for (const file of readdirSync(scripts).filter((each) => each.endsWith(".py")))
    hash.update(readFileSync(path.join(scripts, file)));
  const weights = statSync(model).isDirectory()
    ? path.join(model, "transformer/diffusion_pytorch_model.safetensors")
    : model;
  const { size, mtimeMs } = statSync(weights);
  const version = hash.update(`${size} ${mtimeMs}`).digest("hex").slice(0, 12);
  const stem = path.basename(model, ".safetensors");
  for (const old of readdirSync(work))
    if (old.startsWith(`${stem}-`) && old !== `${stem}-${version}`) rmSync(path.join(work, old), { recursive: true });
  const folder = path.join(work, `${stem}-${version}`);
  mkdirSync(folder, { recursive: true });
  return folder;
}
