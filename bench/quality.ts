/**
 * Quality against cost, for every sampler, on the embedded model: held-out captions at fixed seeds, judged by rule
 * (bench/shapes/detector.ts), by a Fréchet distance to exact renders, and by PSNR against a reference of 100 evaluations from
 * the same noise. The product's samplers run through its public API, the others (bench/shapes/baselines.ts) on the same graphs
 * and the same runtime. Work is done caption shard by caption shard, every sampler in turn, and kept in
 * bench/.work/quality: a run that was stopped goes on, and `--part 1/4` does a quarter of the shards, so that several
 * machines or processes can share the work (copy the folders together, then run without `--part`). Time is measured after
 * the pictures, in rounds of every sampler in turn, and kept likewise; `--time-again` measures it anew, on a quieter machine.
 *
 *   npm run bench:quality -- [--quick] [--captions 1000] [--guidance 2] [--size 64] [--part 1/4] [--threads 1] [--only REGEXP] [--time-again]
 */

import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { diffusersSigmas, shiftedSigmas } from "../lib/schedule/index.js";
import { svg } from "./plot.js";
import { euler, reusing, taylorSeer, type Values, type Velocity } from "./shapes/baselines.js";
import { judge, score, type Verdict } from "./shapes/detector.js";
import { Direct } from "./shapes/direct.js";
import { Features, frechetDistance } from "./shapes/frechet.js";
import { psnr, shareInterval } from "./shapes/pictures.js";
import { type CalibratedEntry, calibratedEntries, shapesVariant } from "./shapes/variants.js";
import { caption, drawScenes, type Pixels, randomNumbers, render } from "./shapes/world.js";
import { environment, meanInterval, report, resultsFolder, root, spread } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    quick: { type: "boolean", default: false },
    captions: { type: "string" },
    guidance: { type: "string", default: "2" },
    size: { type: "string" },
    part: { type: "string", default: "1/1" },
    only: { type: "string" },
    threads: { type: "string" },
    "time-again": { type: "boolean", default: false },
  },
});
const threads = flags.threads ? { threads: Number(flags.threads) } : {};
const settings = { ...threads, measureCosts: false };
const model = await FlowTurbo.load(undefined, settings);
const direct = await Direct.open(undefined, threads);
const count = Number(flags.captions ?? (flags.quick ? 100 : 1000));
const guidance = Number(flags.guidance);
const size = Number(flags.size ?? model.nativeSize.width);
const [part, parts] = flags.part.split("/").map(Number) as [number, number];
const shardSize = 25;
const shards = Math.ceil(count / shardSize);
const modelShift = direct.checkpoint.scheduler.shift;

// ── The samplers ─────────────────────────────────────────────────────────────────────────────────────────────────────

interface Sampler {
  readonly name: string;
  readonly family: string;
  /** Guided evaluations of the predictor, of two rows each; one of a single row is half of one. A calibrated schedule may take less. */
  readonly evaluations: number;
  /** By the public API, or on a velocity. */
  readonly options?: Omit<GenerateOptions, "prompt" | "seed">;
  readonly run?: (velocity: Velocity, noise: Values) => Promise<Values>;
  /** What the product runs with the same launches: timed in its place, so that all are timed alike. */
  readonly launches?: Sampler["options"];
  /** Drawn by the model without its refiner. */
  readonly unrefined?: boolean;
}

const api = (
  family: string,
  name: string,
  evaluations: number,
  options: Omit<GenerateOptions, "prompt" | "seed">,
): Sampler => ({
  ...{ name, family, evaluations, options },
});
const other = (
  family: string,
  name: string,
  evaluations: number,
  launches: Sampler["launches"],
  run: Required<Sampler>["run"],
): Sampler => ({ ...{ name, family, evaluations, launches, run } });
const eulerSteps = (steps: number) => ({ sampler: "euler", steps, grid: "shifted" }) as const;
const written = (blocks: string) =>
  [...blocks.matchAll(/(.)\1*/g)].map(([run, letter]) => `${letter}${run!.length}`).join("");
const evaluationsOf = (blocks: string) =>
  [...blocks].reduce((sum, block) => sum + { E: 1, H: 2, P: 1, R: 0 }[block as "E"], 0);
const blocksOf = (h: number, p: number, r: number) => "H".repeat(h) + "P".repeat(p) + "R".repeat(r);

const calibratedFamily = "FlowTurbo, calibrated";
const unrefinedFamily = "calibrated, without the refiner";
/** What was fitted, in part: levels alone, or levels and scales, with the weights of Adams and Bashforth. */
const partsFamilies = ["calibrated levels", "calibrated levels and scales"] as const;
const usualFamily = "FlowTurbo, uncalibrated";

/**
 * Calibrated schedules that leave some steps without guidance, where none of no more rows is nearer: a time limit chooses from them, and
 * `steps` takes the nearest of its number.
 */
function calibratedPatterns(): (readonly boolean[])[] {
  const best = ownSchedules.filter(({ rows, psnr }) =>
    ownSchedules.every((other) => other.rows > rows || other.psnr.held <= psnr.held),
  );
  return best.filter((each) => !isNearest(each)).map(({ guided }) => guided);
}

/** What was calibrated for this size and scale. */
const ownSchedules = calibratedEntries.filter((each) => each.width === size && each.guidanceScale === guidance);

/** Those that guide every step. */
const wholeSchedules = ownSchedules.filter(({ guided }) => guided.every(Boolean));

/** Whether `steps` takes it. */
const isNearest = (each: CalibratedEntry) =>
  ownSchedules.every((other) => other.guided.length !== each.guided.length || other.psnr.held <= each.psnr.held);

/** Numbers of steps whose schedule ends with the refiner. */
const refinedCounts = ownSchedules
  .filter((each) => each.refined && isNearest(each))
  .map(({ guided }) => guided.length)
  .sort((a, b) => a - b);

/** A quick look takes a cheaper one. */
const reference = flags.quick
  ? api("reference", "H20", 40, { blocks: "H20" })
  : api("reference", "H50", 100, { blocks: "H50" });

/** Numbers of steps at which every family is compared. */
const counts = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

function samplers(tuned: ReadonlyMap<number, number>): Sampler[] {
  const turbo = (family: string, h: number, p: number, r: number) => {
    const blocks = blocksOf(h, p, r);
    return api(family, written(blocks), evaluationsOf(blocks), { blocks });
  };
  const reuse = (h: number, p: number, r: number) => {
    const blocks = blocksOf(h, p, r);
    const grid = shiftedSigmas(blocks.length, { shift: modelShift });
    const launches = { blocks: blocksOf(h, p, 0) };
    return other("R that reuses", `${written(blocks)} reused`, evaluationsOf(blocks), launches, (velocity, noise) =>
      reusing(velocity, noise, blocks, grid),
    );
  };
  const withR = [[1, 1, 2], [1, 2, 1], [1, 2, 2], [1, 3, 1], [1, 4, 1], [1, 5, 1]] as const; // biome-ignore format: a table
  const all = [
    ...counts.map((n) => api(calibratedFamily, `calibrated ${n}`, n, { steps: n })),
    ...calibratedPatterns().map((guided) => {
      const rows = guided.reduce((sum, each) => sum + (each ? 2 : 1), 0);
      const guidanceScale = guided.map((each) => (each ? guidance : 1));
      const name = `calibrated ${guided.length}, ${rows} rows`;
      return api(calibratedFamily, name, rows / 2, { steps: guided.length, guidanceScale });
    }),
    ...refinedCounts.map((n) => ({
      ...api(unrefinedFamily, `calibrated ${n}, unrefined`, n, { steps: n }),
      unrefined: true,
    })),
    ...counts.map((n) => api(usualFamily, `uncalibrated ${n}`, n, { steps: n, grid: "eased" })),
    ...[...counts, 14, 20, 28].map((n) =>
      api("Euler, diffusers' grid", `Euler ${n}`, n, { sampler: "euler", steps: n }),
    ),
    ...counts.map((n) =>
      api("Euler, shifted grid", `Euler ${n} shifted`, n, { sampler: "euler", steps: n, grid: "shifted" }),
    ),
    ...[...tuned].map(([n, shift]) =>
      api("Euler, tuned grid", `Euler ${n} tuned`, n, { sampler: "euler", steps: n, grid: "shifted", shift }),
    ),
    ...[3, 4, 5, 6, 8, 10].map((n) => turbo("Heun", n, 0, 0)),
    ...[...counts, 14, 16].map((n) => api("DPM-Solver++(2M)", `DPM++ ${n}`, n, { sampler: "dpmpp_2m", steps: n })),
    ...[...counts, 14, 16].map((n) => api("UniPC", `UniPC ${n}`, n, { sampler: "unipc", steps: n })),
    // What each ingredient brings: a second order, noise levels of its own, holding back, and guidance that is.
    ...[4, 6, 8, 10, 12].map((n) => api("Adams-Bashforth, shifted grid", `A${n} shifted`, n, { blocks: `A${n}` })),
    ...counts.map((n) =>
      api("uncalibrated, one guidance scale", `uncalibrated ${n}, one scale`, n, {
        ...{ steps: n, grid: "eased", guidanceScale: new Array<number>(n).fill(guidance) },
      }),
    ),
    ...wholeSchedules
      .filter(({ guided }) => guided.length % 2 === 0)
      .flatMap(({ guided: { length: n }, sigmas, scales = [] }) => {
        const blocks = `A${n}`;
        const list = Array.from({ length: n }, (_, step) => guidance * (scales[step] ?? 1));
        const [levels, both] = partsFamilies;
        return [
          api(levels, `A${n}, calibrated levels`, n, { blocks, sigmas }),
          api(both, `A${n}, calibrated levels and scales`, n, { blocks, sigmas, guidanceScale: list }),
        ];
      }),
    ...[4, 6, 8, 10, 12].map((n) => api("M on the shifted grid", `M${n} shifted`, n, { blocks: `M${n}` })),
    ...[4, 6, 8, 10, 12].map((n) => api("D on the eased grid", `D${n} eased`, n, { blocks: `D${n}`, grid: "eased" })),
    ...[2, 3, 4, 6, 8, 10].map((n) => turbo("FlowTurbo H1P*", 1, n, 0)),
    ...withR.map(([h, p, r]) => turbo("FlowTurbo H*P*R*", h, p, r)),
    ...withR.map(([h, p, r]) => reuse(h, p, r)),
    other("TaylorSeer", "TaylorSeer 28", 14, eulerSteps(14), (velocity, noise) =>
      taylorSeer(velocity, noise, diffusersSigmas(28, { shift: modelShift, numTrainTimesteps: 1000 })),
    ),
  ];
  const quick = [
    "calibrated 6",
    "uncalibrated 6",
    "Euler 10",
    "H4",
    "DPM++ 6",
    "UniPC 6",
    "H1P4",
    "H1P3R1",
    "H1P3R1 reused",
  ];
  const wanted = flags.quick ? all.filter(({ name }) => quick.includes(name)) : all;
  const only = flags.only === undefined ? null : new RegExp(flags.only);
  return only ? wanted.filter(({ name, family }) => only.test(`${family}: ${name}`)) : wanted;
}

// ── Drawing, kept on disk ────────────────────────────────────────────────────────────────────────────────────────────

const digest = (parts: readonly string[]) => {
  const hash = createHash("sha256");
  for (const part of parts)
    hash.update(readFileSync(path.join(root, "models/shapes", part, "diffusion_pytorch_model.safetensors")));
  return hash.digest("hex").slice(0, 12);
};
const key = `${digest(["transformer", "vae"])}-shift${modelShift}-${size}px-g${guidance}${flags.quick ? "-quick" : ""}`;
/** Other schedules leave what was drawn without them as it is. */
const schedulesKey = createHash("sha256")
  .update(readFileSync(path.join(root, "models/shapes/schedules.json")))
  .digest("hex")
  .slice(0, 8);
/** What the schedules of flowturbo's own rules are made of. */
const rulesKey = createHash("sha256")
  .update(
    ["stiffness", "samplers", "sigmas"].map((name) => readFileSync(path.join(root, `lib/schedule/${name}.ts`))).join(),
  )
  .digest("hex")
  .slice(0, 8);
/** Another refiner leaves what was drawn without one as it is. */
const refinerKey = digest(["refiner"]);
const folder = path.join(root, "bench/.work/quality", key);
mkdirSync(folder, { recursive: true });

/** One sampler's pictures of one shard, judged. */
interface Record_ {
  readonly verdicts: readonly Verdict[];
  readonly features: readonly (readonly number[])[];
  /** Against the reference, dB, one for each picture. */
  readonly psnr: readonly number[];
  /** Rows of the predictor for a picture, as the product counts them. */
  readonly rows?: number;
}

const slug = (name: string) => name.replaceAll(/[^A-Za-z0-9.]+/g, "-");
const write = (file: string, data: string | Uint8Array) => {
  writeFileSync(`${file}.${process.pid}.tmp`, data);
  renameSync(`${file}.${process.pid}.tmp`, file);
};

const variants: { withoutRefiner?: Promise<FlowTurbo> } = {};
function modelWithoutRefiner(): Promise<FlowTurbo> {
  variants.withoutRefiner ??= FlowTurbo.load(shapesVariant("unrefined", { without: ["refiner"] }), settings);
  return variants.withoutRefiner;
}

async function drawn(
  sampler: Sampler,
  captions: readonly string[],
  seed: number,
): Promise<{ pictures: Pixels[]; milliseconds: number; rows: number }> {
  if (sampler.options) {
    const options = { guidanceScale: guidance, ...sampler.options, width: size, height: size };
    const drawing = sampler.unrefined ? await modelWithoutRefiner() : model;
    const result = await drawing.generate({ ...options, prompt: [...captions], seed });
    // The name says what is measured.
    if (
      [calibratedFamily, unrefinedFamily].includes(sampler.family) &&
      result.images[0]!.parameters.grid !== "calibrated"
    )
      throw new Error(`There is no calibrated schedule for ${sampler.name} at guidance ${guidance} and ${size} px.`);
    const milliseconds = result.timings.steps.reduce((sum, step) => sum + step, 0);
    return { pictures: [...result.images], milliseconds, rows: result.evaluations.rows };
  }
  const rows = captions.length;
  const velocity = direct.velocity(await direct.condition(captions), guidance, rows, size);
  const before = direct.sampled.milliseconds;
  const latents = await sampler.run!(velocity, direct.noise(seed, rows, size));
  const milliseconds = direct.sampled.milliseconds - before;
  return { pictures: await direct.decode(latents, rows, size), milliseconds, rows: 2 * sampler.evaluations };
}

const scenes = drawScenes(7_000_003, count);
const features = await Features.open();

/** The reference's pictures of a shard, drawn once. */
async function referencePictures(shard: number): Promise<Uint8Array[]> {
  const rows = Math.min(shardSize, count - shard * shardSize);
  const file = path.join(folder, `reference-${shard}.rgb`);
  if (!existsSync(file) || !existsSync(recordFile(reference, shard))) {
    const own = scenes.slice(shard * shardSize, shard * shardSize + rows);
    const { pictures, rows: evaluated } = await drawn(reference, own.map(caption), shard * shardSize);
    write(file, Buffer.concat(pictures.map(({ data }) => data)));
    write(recordFile(reference, shard), JSON.stringify(await judgedRecord(pictures, shard, null, evaluated)));
  }
  const bytes = readFileSync(file);
  return Array.from({ length: rows }, (_, row) => bytes.subarray(row * size * size * 3, (row + 1) * size * size * 3));
}

const slugOf = ({ name, family, options }: Sampler) =>
  slug(name) +
  (options?.blocks?.includes("R") || (family === calibratedFamily && refinedCounts.length > 0)
    ? `-${refinerKey}`
    : "") +
  ([calibratedFamily, unrefinedFamily, ...partsFamilies].includes(family) ? `-${schedulesKey}` : "") +
  (family.startsWith("uncalibrated") || family === usualFamily ? `-${rulesKey}` : "");
const recordFile = (sampler: Sampler, shard: number) => path.join(folder, `${slugOf(sampler)}-${shard}.json`);

async function judgedRecord(
  pictures: readonly Pixels[],
  shard: number,
  references: readonly Uint8Array[] | null,
  rows: number,
): Promise<Record_> {
  return {
    rows,
    verdicts: pictures.map((picture, row) => judge(picture, scenes[shard * shardSize + row]!)),
    features: (await features.of(pictures)).map((row) => row.map((value) => Number(value.toPrecision(6)))),
    psnr: references ? pictures.map((picture, row) => psnr(picture, references[row]!)) : [],
  };
}

/** The shift of Euler's grid that comes nearest to the reference, for each number of steps, on captions of its own. */
async function tunedShifts(): Promise<Map<number, number>> {
  const file = path.join(folder, "tuned.json");
  const numbers = flags.quick ? [] : [4, 6, 8, 10, 12, 20, 28];
  const known = new Map(existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as [number, number][]) : []);
  const missing = numbers.filter((n) => !known.has(n));
  if (missing.length > 0) {
    const rows = 16;
    const velocity = direct.velocity(
      await direct.condition(drawScenes(8_000_009, rows).map(caption)),
      guidance,
      rows,
      size,
    );
    const noise = direct.noise(900_000, rows, size);
    const exact = await reusing(velocity, noise, "H".repeat(50), shiftedSigmas(50, { shift: modelShift }));
    for (const n of missing) {
      let best = { shift: 1, error: Number.POSITIVE_INFINITY };
      for (const shift of [1, 1.5, 2, 2.5, 3, 4]) {
        const x = await euler(velocity, noise, shiftedSigmas(n, { shift }));
        const error = x.reduce((sum, value, i) => sum + (value - exact[i]!) ** 2, 0);
        if (error < best.error) best = { shift, error };
      }
      known.set(n, best.shift);
      status(`tuning Euler's grid: ${n} steps, shift ${best.shift}`);
    }
    write(file, JSON.stringify([...known]));
  }
  return new Map(numbers.map((n) => [n, known.get(n)!]));
}

/** Pictures of a launch that is timed. */
const timedPictures = size > model.nativeSize.width ? 2 : 8;

/**
 * Sampling alone, milliseconds for a picture: rounds of every sampler in turn on the same captions. Those that have no times yet are
 * timed in rounds with the reference, and their times are brought to its times of the first measurement: ratios are what is shown.
 */
async function samplingTimes(): Promise<Record<string, number[]>> {
  const file = path.join(folder, `times.json`);
  const stored = existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as Record<string, number[]>) : {};
  const known = flags["time-again"] ? undefined : stored[slugOf(reference)];
  const missing = contenders.filter((sampler) => !known || !stored[slugOf(sampler)]);
  if (known && missing.length === 0) return stored;
  const all = [reference, ...missing];
  const rounds = flags.quick ? 1 : size > model.nativeSize.width ? 3 : 5;
  const captions = drawScenes(8_500_003, timedPictures).map(caption);
  const times: Record<string, number[]> = {};
  for (let round = 0; round < rounds; round++) {
    for (const sampler of round % 2 ? [...all].reverse() : all) {
      const { milliseconds } = await drawn(
        { ...sampler, options: sampler.options ?? sampler.launches! },
        captions,
        800_000,
      );
      times[slugOf(sampler)] ??= [];
      times[slugOf(sampler)]!.push(milliseconds / captions.length);
    }
    status(`timing: round ${round + 1} of ${rounds}`);
  }
  const now = [...times[slugOf(reference)]!];
  if (known)
    for (const own of Object.values(times))
      for (const [round, time] of own.entries()) own[round] = (time * known[round]!) / now[round]!;
  const result = known ? { ...stored, ...times, [slugOf(reference)]: known } : times;
  write(file, JSON.stringify(result));
  return result;
}

const status = (text: string) => {
  if (process.stderr.isTTY) process.stderr.write(`\r\x1b[K${text}`);
  else console.error(text);
};

const tuned = await tunedShifts();
const contenders = samplers(tuned);
for (let shard = part - 1; shard < shards; shard += parts) {
  const references = await referencePictures(shard);
  const captions = scenes.slice(shard * shardSize, (shard + 1) * shardSize).map(caption);
  const order = shard % 2 ? [...contenders].reverse() : contenders;
  for (const sampler of order) {
    const file = recordFile(sampler, shard);
    if (existsSync(file)) continue;
    const { pictures, rows } = await drawn(sampler, captions, shard * shardSize);
    write(file, JSON.stringify(await judgedRecord(pictures, shard, references, rows)));
  }
  status(`shard ${shard + 1} of ${shards}`);
}
if (process.stderr.isTTY) process.stderr.write("\r\x1b[K");

// ── What came out ────────────────────────────────────────────────────────────────────────────────────────────────────

interface Row {
  readonly name: string;
  readonly family: string;
  /** Rows of the predictor for a picture: two for a guided evaluation. */
  readonly rows: number;
  readonly captions: number;
  readonly ground: number;
  readonly colours: number;
  readonly shapes: number;
  readonly relation: number;
  /** Mean of the four shares, and of pictures right in everything that their caption says but sizes. */
  readonly accuracy: number;
  readonly accuracyInterval: readonly [number, number];
  readonly frechet: number;
  readonly frechetInterval: readonly [number, number];
  readonly psnr: number;
  readonly psnrInterval: readonly [number, number];
  /** Sampling time, milliseconds for a picture, and over that of the reference in the same round. */
  readonly milliseconds: number;
  readonly time: number;
}

/** Features of exact renders of other scenes: what the pictures are measured against, and a second set as the noise floor. */
async function renders(seed: number, n: number): Promise<number[][]> {
  const rows: number[][] = [];
  for (const batch of chunks(drawScenes(seed, n), 100))
    rows.push(...(await features.of(batch.map((s) => render(s, size)))));
  return rows;
}

function chunks<T>(items: readonly T[], length: number): T[][] {
  return Array.from({ length: Math.ceil(items.length / length) }, (_, i) => items.slice(i * length, (i + 1) * length));
}

/** Percentiles of a statistic over resamples of its rows, with replacement. */
function bootstrap<T>(
  rows: readonly T[],
  statistic: (sample: readonly T[]) => number,
  times: number,
): [number, number] {
  const random = randomNumbers(1);
  const found = Array.from({ length: times }, () =>
    statistic(rows.map(() => rows[Math.floor(random() * rows.length)]!)),
  ).sort((a, b) => a - b);
  return [found[Math.floor(times * 0.025)]!, found[Math.ceil(times * 0.975) - 1]!];
}

const right = ({ ground, colours, shapes, relation }: Verdict) => ground && colours && shapes && relation !== false;

const finished = Array.from({ length: shards }, (_, shard) => shard).filter((shard) =>
  [reference, ...contenders].every((sampler) => existsSync(recordFile(sampler, shard))),
);
if (finished.length < shards || parts > 1) {
  console.log(`${finished.length} of ${shards} shards are done; the results follow when all are.`);
  process.exit(0);
}
const times = await samplingTimes();
await model.dispose();
await (await variants.withoutRefiner)?.dispose();
const recordsOf = (sampler: Sampler) =>
  finished.map((shard) => JSON.parse(readFileSync(recordFile(sampler, shard), "utf8")) as Record_);
const truth = await renders(9_000_011, Math.max(count, 1000));
const floor = frechetDistance(await renders(9_500_021, count), truth);
const resamples = flags.quick ? 20 : 40;

const rows = [reference, ...contenders].map((sampler): Row => {
  const records = recordsOf(sampler);
  const verdicts = records.flatMap((record) => record.verdicts);
  const own = records.flatMap((record) => record.features);
  const decibels = records.flatMap((record) => record.psnr);
  const { ground, colours, shapes, relation } = score(verdicts);
  const accuracy = verdicts.filter(right).length / verdicts.length;
  const { mean: psnr, margin } = decibels.length ? meanInterval(decibels) : { mean: Number.NaN, margin: Number.NaN };
  const [low, high] = bootstrap(own, (sample) => frechetDistance(sample, truth), resamples);
  const frechet = frechetDistance(own, truth);
  // A resample repeats rows, which raises the distance itself: its spread is used, about the value found.
  const spreadHalf = (high - low) / 2;
  return {
    ...{ name: sampler.name, family: sampler.family, captions: verdicts.length },
    rows: records[0]!.rows ?? 2 * sampler.evaluations,
    ...{ ground, colours, shapes, relation, accuracy, accuracyInterval: shareInterval(accuracy, verdicts.length) },
    ...{ frechet, frechetInterval: [Math.max(0, frechet - spreadHalf), frechet + spreadHalf] as const },
    ...{ psnr, psnrInterval: [psnr - margin, psnr + margin] as const },
    milliseconds: spread(times[slugOf(sampler)]!).median,
    time: spread(times[slugOf(sampler)]!.map((time, round) => time / times[slugOf(reference)]![round]!)).median,
  };
});

const [best] = rows as [Row, ...Row[]];
const percent = (value: number) => (100 * value).toFixed(1);
const named = (name: string) => rows.find((row) => row.name === name);

/** Families that a default is compared with at equal row evaluations. */
const rivalFamilies = [
  "Euler, diffusers' grid",
  "Euler, shifted grid",
  "Euler, tuned grid",
  "DPM-Solver++(2M)",
  "UniPC",
];
const defaults = [calibratedFamily, usualFamily];
/** For each number of steps the default schedules, and the best of their rivals with as many guided steps. */
const byCount = counts.flatMap((n) => {
  const names = [`calibrated ${n}`, `uncalibrated ${n}`];
  const own = rows.filter((row) => defaults.includes(row.family) && names.includes(row.name));
  const rivals = rows.filter((row) => rivalFamilies.includes(row.family) && row.rows === 2 * n);
  if (own.length === 0 || rivals.length === 0) return [];
  const nearest = rivals.reduce((a, b) => (a.psnr >= b.psnr ? a : b));
  const surest = rivals.reduce((a, b) => (a.accuracy >= b.accuracy ? a : b));
  return [{ n, own, nearest, surest }];
});
const psnrOf = (name: string) =>
  recordsOf(contenders.find((sampler) => sampler.name === name)!).flatMap((record) => record.psnr);
/** How much nearer one is than another, with the same captions and the same noise: the mean of the differences picture by picture, dB. */
function gainOver(name: string, other: string): { mean: number; margin: number } {
  const [own, others] = [psnrOf(name), psnrOf(other)];
  return meanInterval(own.map((value, i) => value - others[i]!));
}
/** Whether a schedule is as good as another: at most half a decibel behind, and right and distant within the intervals. */
const isAsGood = (row: Row, than: Row) =>
  gainOver(row.name, than.name).mean >= -0.5 &&
  row.accuracyInterval[1] >= than.accuracy &&
  row.frechetInterval[0] <= than.frechet;
/** What a calibrated schedule needs for the quality of others, and what was asked of it. */
const equals = (
  [
    ["DPM++ 8", 0.75],
    ["DPM++ 12", 0.75],
    ["DPM++ 16", 0.75],
    ["Euler 28", 0.3],
    ["H10", 0.4],
  ] as const
).flatMap(([name, bar]) => {
  const rival = named(name);
  if (!rival) return [];
  const own = rows
    .filter(({ family }) => family === calibratedFamily)
    .sort((a, b) => a.rows - b.rows)
    .find((row) => isAsGood(row, rival));
  return [{ rival, own: own ?? null, part: own ? own.rows / rival.rows : null, bar }];
});
const nearestCalibrated = rows.filter(({ family }) => family === calibratedFamily).sort((a, b) => b.psnr - a.psnr)[0];
/** What calibration adds to flowturbo's own rule, picture by picture. */
const gains = counts.flatMap((n) =>
  named(`calibrated ${n}`) && named(`uncalibrated ${n}`)
    ? [{ n, ...gainOver(`calibrated ${n}`, `uncalibrated ${n}`) }]
    : [],
);
/** Schedules than which none is nearer to the reference with as many rows or fewer. */
const front = rows
  .slice(1)
  .filter((row) => rows.slice(1).every((other) => other.rows > row.rows || other.psnr <= row.psnr))
  .sort((a, b) => a.rows - b.rows);
const misses = byCount.flatMap(({ n, own, nearest, surest }) =>
  own.flatMap((row) => [
    ...(row.psnr < nearest.psnr
      ? [`${row.name} is ${(nearest.psnr - row.psnr).toFixed(2)} dB behind ${nearest.name}`]
      : []),
    ...(row.accuracyInterval[1] < surest.accuracyInterval[0]
      ? [`${row.name} is less often right than ${surest.name} (${n} steps)`]
      : []),
  ]),
);
const findings = [
  `The reference (${best.name}, ${best.rows} row evaluations) has ${percent(best.accuracy)} % right and a Fréchet distance of ${best.frechet.toFixed(2)}.`,
  ...equals.map(({ rival, own, part, bar }) =>
    own
      ? `As good as ${rival.name} (${rival.psnr.toFixed(1)} dB): ${own.name} (${own.psnr.toFixed(1)} dB), in ${(100 * part!).toFixed(0)} % of its row evaluations (bar ${100 * bar} %).`
      : `As good as ${rival.name} (${rival.psnr.toFixed(1)} dB): no calibrated schedule here${nearestCalibrated ? `; the nearest is ${nearestCalibrated.name} (${nearestCalibrated.psnr.toFixed(1)} dB, ${((100 * nearestCalibrated.rows) / rival.rows).toFixed(0)} % of its row evaluations, bar ${100 * bar} %)` : ""}.`,
  ),
  misses.length === 0
    ? `At every number of steps from ${counts[0]} to ${counts.at(-1)} both defaults are nearer to the reference than Euler, DPM++(2M) and UniPC with as many guided steps, and as often right.`
    : `Where a default is behind Euler, DPM++(2M) or UniPC with as many guided steps: ${misses.join("; ")}.`,
  ...(gains.length > 0
    ? [
        `Calibrated over uncalibrated, picture by picture: ${gains.map(({ n, mean, margin }) => `${n} steps ${mean >= 0 ? "+" : ""}${mean.toFixed(2)} (±${margin.toFixed(2)})`).join(", ")} dB.`,
      ]
    : []),
  `On the front of PSNR against row evaluations: ${front.map(({ name }) => name).join(", ")}.`,
];
const pairs = rows
  .map((row) => ({ trained: row, without: named(`${row.name} reused`) ?? named(`${row.name}, unrefined`) }))
  .filter((pair): pair is { trained: Row; without: Row } => pair.without !== undefined)
  .map(({ trained, without }) => {
    const { mean: gain, margin } = gainOver(trained.name, without.name);
    const [a, b] = [trained.psnrInterval, without.psnrInterval];
    const apart = a[0] > b[1] || b[0] > a[1];
    return { trained, without, gain, gainInterval: [gain - margin, gain + margin] as const, apart };
  });
if (gains.length > 0 && refinedCounts.length === 0)
  findings.push(
    "No calibrated schedule here ends with the refiner: trained for their last steps it adds too little (training/README.md has what was tried).",
  );
const better = pairs.filter(({ gainInterval: [low] }) => low > 0);
if (pairs.length > 0)
  findings.push(
    `The refiner against going without it, PSNR picture by picture: better in ${better.length} of ${pairs.length} schedules (${better.map(({ trained, gain }) => `${trained.name} +${gain.toFixed(2)} dB`).join(", ")}), worse in ${pairs.filter(({ gainInterval: [, high] }) => high < 0).length}.`,
  );

const table = [
  "| sampler | row evaluations | time | ground | colours | shapes | relations | all right, % | Fréchet distance | PSNR, dB |",
  "|---|---|---|---|---|---|---|---|---|---|",
  ...rows.map(
    (row) =>
      `| ${row.name} | ${row.rows} | ${row.time.toFixed(3)} | ${percent(row.ground)} | ${percent(row.colours)} | ${percent(row.shapes)} | ${percent(row.relation)} | ${percent(row.accuracy)} (${percent(row.accuracyInterval[0])}–${percent(row.accuracyInterval[1])}) | ${row.frechet.toFixed(2)} (${row.frechetInterval[0].toFixed(2)}–${row.frechetInterval[1].toFixed(2)}) | ${Number.isNaN(row.psnr) ? "" : `${row.psnr.toFixed(2)} (±${((row.psnrInterval[1] - row.psnrInterval[0]) / 2).toFixed(2)})`} |`,
  ),
].join("\n");

const results = resultsFolder;
const name = [
  flags.quick ? "quality-quick" : "quality",
  ...(size === model.nativeSize.width ? [] : [`${size}`]),
  ...(guidance === 2 ? [] : [`guidance-${guidance}`]),
].join("-");
const families = [...new Set(rows.slice(1).map(({ family }) => family))];
const plots = (
  [
    [
      "accuracy",
      "pictures right in ground, colours, shapes and relation, %",
      (row) => 100 * row.accuracy,
      (row) => row.accuracyInterval.map((v) => 100 * v),
    ],
    ["frechet", "Fréchet distance to exact renders", (row) => row.frechet, (row) => [...row.frechetInterval]],
    ["psnr", "PSNR against the reference, dB", (row) => row.psnr, (row) => [...row.psnrInterval]],
  ] as [string, string, (row: Row) => number, (row: Row) => number[]][]
).flatMap(([measure, label, of, interval]) =>
  (["rows", "time"] as const).map((cost) => {
    const file = `${name}-${measure}-${cost === "time" ? cost : "evaluations"}.svg`;
    const chart = svg({
      title: `${label.split(",")[0]} (${count} captions, ${size} px)`,
      x: {
        label: cost === "time" ? `sampling time, as a part of ${best.name}` : "row evaluations (two for a guided step)",
        scale: "log",
        from: Math.min(...rows.map((row) => row[cost])) * 0.9,
        to: Math.max(...rows.slice(1).map((row) => row[cost])) * 1.1,
      },
      y: { label },
      series: families.map((family) => ({
        name: family,
        line: true,
        points: rows
          .filter((row) => row.family === family)
          .sort((a, b) => a[cost] - b[cost])
          .map((row) => ({ x: row[cost], y: of(row), low: interval(row)[0]!, high: interval(row)[1]! })),
      })),
    });
    write(path.join(results, file), chart);
    return file;
  }),
);

const refinerLines = [
  "The refiner against going without it, with the same evaluations of the predictor: R blocks against reusing the velocity, and calibrated schedules that",
  "end with the refiner (C) against the same schedule alone. The difference is the mean over the pictures, each with its own noise and caption;",
  "in the last column whether the intervals of the two means lie apart as well.",
  "",
  "| schedule | difference of PSNR, dB | PSNR refined | PSNR without | all right refined, % | all right without, % | apart |",
  "|---|---|---|---|---|---|---|",
  ...pairs.map(({ trained, without, gain, gainInterval, apart }) => {
    const d = (row: Row) =>
      `${row.psnr.toFixed(2)} (${row.psnrInterval[0].toFixed(2)}–${row.psnrInterval[1].toFixed(2)})`;
    const a = (row: Row) =>
      `${percent(row.accuracy)} (${percent(row.accuracyInterval[0])}–${percent(row.accuracyInterval[1])})`;
    const difference = `${gain >= 0 ? "+" : ""}${gain.toFixed(2)} (±${((gainInterval[1] - gainInterval[0]) / 2).toFixed(2)})`;
    return `| ${trained.name} | ${difference} | ${d(trained)} | ${d(without)} | ${a(trained)} | ${a(without)} | ${apart ? "yes" : "no"} |`;
  }),
  "",
];
const { cpu, cores, node, onnxruntime, commit } = environment() as Record<string, string>;
await report(name, {
  captions: count,
  size,
  guidance,
  modelShift,
  tuned: [...tuned],
  floor,
  findings,
  equals: equals.map(({ rival, own, part, bar }) => ({ rival: rival.name, own: own?.name ?? null, part, bar })),
  front: front.map(({ name }) => name),
  rows,
  refiner: pairs.map(({ trained, gain, gainInterval, apart }) => ({ name: trained.name, gain, gainInterval, apart })),
});
const lines = [
  "# Quality against cost",
  "",
  `\`npm run bench:quality --${flags.quick ? " --quick" : ""} --captions ${count} --size ${size} --guidance ${guidance}${flags.only === undefined ? "" : ` --only "${flags.only}"`}\` on ${cpu}, ${cores} cores, Node ${node}, ONNX Runtime ${onnxruntime}, commit ${commit}.`,
  "",
  `${count} captions, one picture each, seeds 0 to ${count - 1}. Time is sampling alone, of ${timedPictures} captions at once, over that of ${best.name} in the same round (median of ${times[slugOf(reference)]!.length}; with this machine's unrest, row evaluations are the firmer measure). Shares in per cent with`,
  `95 % intervals (Wilson; bootstrap for the distance). Two sets of exact renders are ${floor.toFixed(2)} apart: the floor of the Fréchet distance.`,
  `Euler's tuned grid is \`shifted\` with the shift that comes nearest to the reference on 16 other captions: ${[...tuned].map(([n, s]) => `${n} steps ${s}`).join(", ")}.`,
  "",
  ...findings.map((line) => `- ${line}`),
  "",
  table,
  "",
  "The defaults against the best of Euler (three grids), DPM++(2M) and UniPC with as many guided steps, of two rows each; a calibrated schedule may leave guidance out of some:",
  "",
  "| steps | rows, calibrated | calibrated, dB | uncalibrated, dB | nearest rival | dB | calibrated right, % | uncalibrated right, % | surest rival | right, % |",
  "|---|---|---|---|---|---|---|---|---|---|",
  ...byCount.map(({ n, own, nearest, surest }) => {
    const of = (family: string) => own.find((row) => row.family === family);
    const [fitted, usual] = defaults.map(of);
    const decibels = (row: Row | undefined) => (row ? row.psnr.toFixed(2) : "");
    const share = (row: Row | undefined) => (row ? percent(row.accuracy) : "");
    return `| ${n} | ${fitted?.rows ?? ""} | ${decibels(fitted)} | ${decibels(usual)} | ${nearest.name} | ${decibels(nearest)} | ${share(fitted)} | ${share(usual)} | ${surest.name} | ${share(surest)} |`;
  }),
  "",
  ...(pairs.length > 0 ? refinerLines : []),
  ...plots.map((file) => `![](${file})`),
  "",
];
write(path.join(results, `${name}.md`), lines.join("\n"));
console.log([...findings, "", table].join("\n"));
