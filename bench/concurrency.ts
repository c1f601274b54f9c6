/**
 * Many callers at once: requests with mixed schedules, sizes and guidance, served together against one after another by a
 * model that batches nothing and waits for nobody. Closed loop: each of 1, 2, 4, 8, 16 callers asks again as soon as it is
 * answered; both ways in turn, round by round, with the same requests. Open loop: requests arrive at random (Poisson) at 0.5,
 * 0.8 and 1.2 of the capacity, which is measured right before, each with a time limit; what cannot be in time is refused.
 * Before all that: what is predicted for requests that have the model to themselves, against what they take. Writes
 * bench/results/concurrency.{json,md} and two plots.
 *
 *   npm run bench:concurrency [-- --requests 24 --rounds 9 --arrivals 150 --predictions 60 --threads 1]
 */

import { writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { DeadlineError, FlowTurbo, type GenerateOptions, QueueFullError, type Stats } from "flowturbo";
import { svg } from "./plot.js";
import { format, machineLine, quantile, ratios, report, resultsFolder, spread, table } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    requests: { type: "string", default: "24" },
    rounds: { type: "string", default: "9" },
    arrivals: { type: "string", default: "150" },
    predictions: { type: "string", default: "60" },
    threads: { type: "string" },
  },
});
const [requests, rounds, arrivals, predictions] = [flags.requests, flags.rounds, flags.arrivals, flags.predictions].map(
  Number,
) as [number, number, number, number];

const threads = flags.threads === undefined ? undefined : Number(flags.threads);

let state = 1;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const pick = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;
const captions = [
  "a red circle",
  "a large blue square",
  "a small green triangle",
  "a yellow triangle above a red circle",
];
const sizes = [64, 128];
const mixed = (seed: number): GenerateOptions => {
  const size = pick(sizes);
  const schedule = pick([
    { blocks: "H1P7R2" },
    { blocks: "H1P3R1" },
    { blocks: "H1P1R1" },
    { sampler: "euler" as const, steps: 8 },
  ]);
  return { prompt: pick(captions), width: size, height: size, ...schedule, guidanceScale: pick([1, 2, 4.5, 7]), seed };
};

const model = await FlowTurbo.load(undefined, { measureCosts: false, maxQueue: 1000, threads });
await model.profile({
  sizes: sizes.map((side) => ({ width: side, height: side })),
  batches: [1, 2, 4, 8],
  guidance: "both",
});
// The same table of costs; what it draws is in turn whoever asks.
const single = await FlowTurbo.load(undefined, {
  ...{ measureCosts: false, maxQueue: 1000, threads },
  ...{ maxBatch: 1, maxWaitMs: 0 },
});
for (const prompt of captions)
  for (const { width, height } of sizes.map((side) => ({ width: side, height: side })))
    for (const guidanceScale of [1, 2])
      for (const served of [model, single])
        await served.generate({ prompt, width, height, guidanceScale, blocks: "H1R1" });

// ── Predictions, nobody else there ───────────────────────────────────────────────────────────────────────────────────

/** Each request is drawn twice: how much the two differ is what no prediction could know. */
const alone = { errors: [] as number[], ratios: [] as number[], repeats: [] as number[] };
for (let index = 0; index < predictions; index++) {
  const options = { ...mixed(9000 + index), count: pick([1, 1, 2, 4]), deadlineMs: 600_000 };
  const times: number[] = [];
  for (let again = 0; again < 2; again++) {
    const { deadline } = await model.generate(options);
    times.push(deadline!.actualMs);
    alone.ratios.push(deadline!.predictedMs / deadline!.actualMs);
    alone.errors.push(Math.abs(deadline!.predictedMs / deadline!.actualMs - 1));
  }
  alone.repeats.push(Math.abs(times[1]! / times[0]! - 1));
}
const idle = {
  requests: alone.errors.length,
  ...{ median: quantile(alone.errors, 0.5), p90: quantile(alone.errors, 0.9), bias: quantile(alone.ratios, 0.5) },
  repeats: { median: quantile(alone.repeats, 0.5), p90: quantile(alone.repeats, 0.9) },
};
console.error("predictions");

// ── Closed loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

interface Pass {
  /** Requests a second. */
  readonly throughput: number;
  readonly latencies: readonly number[];
  readonly rowsPerLaunch: number;
}

type Draw = (options: GenerateOptions) => Promise<unknown>;

async function closedLoop(
  callers: number,
  list: readonly GenerateOptions[],
  draw: Draw,
  served: FlowTurbo,
): Promise<Pass> {
  const latencies: number[] = [];
  const before = served.stats().launches;
  const start = performance.now();
  let next = 0;
  await Promise.all(
    Array.from({ length: callers }, async () => {
      while (next < list.length) {
        const options = list[next++]!;
        const asked = performance.now();
        await draw(options);
        latencies.push(performance.now() - asked);
      }
    }),
  );
  const seconds = (performance.now() - start) / 1000;
  const after = served.stats().launches;
  const rowsPerLaunch = (after.rows - before.rows) / (after.count - before.count);
  return { throughput: list.length / seconds, latencies, rowsPerLaunch };
}

let turn: Promise<unknown> = Promise.resolve();
const together: Draw = (options) => model.generate(options);
const oneAfterAnother: Draw = (options) => {
  const mine = turn.then(() => single.generate(options));
  turn = mine.catch(() => undefined);
  return mine;
};

const callerCounts = [1, 2, 4, 8, 16];
const closed: Record<number, { together: Pass[]; alone: Pass[] }> = {};
for (const callers of callerCounts) {
  const passes = { together: [] as Pass[], alone: [] as Pass[] };
  closed[callers] = passes;
  for (let round = 0; round < rounds; round++) {
    // Several for each caller: else it would be one burst.
    const length = Math.max(requests, 4 * callers);
    const list = Array.from({ length }, (_, index) => mixed(1000 * round + index));
    const runs = [
      async () => passes.together.push(await closedLoop(callers, list, together, model)),
      async () => passes.alone.push(await closedLoop(callers, list, oneAfterAnother, single)),
    ];
    for (const run of round % 2 ? runs.reverse() : runs) await run();
  }
  console.error(`${callers} callers`);
}
const closedRows = callerCounts.map((callers) => {
  const { together, alone } = closed[callers]!;
  const median = (passes: readonly Pass[]) => passes.map(({ latencies }) => quantile(latencies, 0.5));
  /** Over all rounds: a single one has too few requests for a percentile. */
  const all = (passes: readonly Pass[]) => passes.flatMap(({ latencies }) => latencies);
  const greatest = (passes: readonly Pass[]) => spread(passes.map(({ latencies }) => quantile(latencies, 0.99)));
  const p50Ratios = median(together).map((value, round) => value / median(alone)[round]!);
  return {
    callers,
    requests: all(together).length,
    throughput: spread(together.map(({ throughput }) => throughput)),
    throughputAlone: spread(alone.map(({ throughput }) => throughput)),
    throughputRatio: ratios(
      together.map(({ throughput }) => throughput),
      alone.map(({ throughput }) => throughput),
    ),
    ...{ p50: spread(median(together)), p50Alone: spread(median(alone)) },
    ...{ p50Ratio: spread(p50Ratios), p50RatioLowerQuartile: quantile(p50Ratios, 0.25) },
    ...{ p99: quantile(all(together), 0.99), p99Alone: quantile(all(alone), 0.99) },
    ...{ p99OfRounds: greatest(together), p99AloneOfRounds: greatest(alone) },
    rowsPerLaunch: spread(together.map(({ rowsPerLaunch }) => rowsPerLaunch)),
  };
});

// ── Open loop ────────────────────────────────────────────────────────────────────────────────────────────────────────

const aloneMs = closedRows.find(({ callers }) => callers === 1)!.p50.median;
/** Several times what the usual request takes alone: room for some others at the same time. */
const deadlineMs = Math.round(6 * aloneMs);

/** Requests a second with more callers than can be served at once, now. */
async function capacityNow(): Promise<number> {
  const list = Array.from({ length: 64 }, (_, index) => mixed(4000 + index));
  return (await closedLoop(16, list, together, model)).throughput;
}

interface Outcome {
  readonly load: number;
  readonly capacity: number;
  readonly perSecond: number;
  readonly accepted: number;
  readonly refused: number;
  /** Told when to come again, or how much time it would take. */
  readonly refusedWithTime: number;
  readonly inTime: number;
  readonly p50: number;
  readonly p95: number;
  readonly p99: number;
  readonly predictionError: { readonly median: number; readonly p90: number };
}

async function openLoop(load: number): Promise<Outcome> {
  const capacity = await capacityNow();
  const perSecond = load * capacity;
  const latencies: number[] = [];
  const errors: number[] = [];
  let refused = 0;
  let refusedWithTime = 0;
  const calls: Promise<void>[] = [];
  const start = performance.now();
  let at = 0;
  for (let index = 0; index < arrivals; index++) {
    at += (-Math.log(1 - random()) / perSecond) * 1000;
    await setTimeout(Math.max(0, start + at - performance.now()));
    const asked = performance.now();
    calls.push(
      model.generate({ ...mixed(5000 + index), deadlineMs }).then(
        ({ deadline }) => {
          latencies.push(performance.now() - asked);
          errors.push(Math.abs(deadline!.predictedMs / deadline!.actualMs - 1));
        },
        (error) => {
          if (!(error instanceof DeadlineError || error instanceof QueueFullError)) throw error;
          refused++;
          const best = error instanceof DeadlineError ? error.bestMs : 0;
          if ((error.retryAfterMs ?? 0) > 0 || best > deadlineMs) refusedWithTime++;
        },
      ),
    );
  }
  await Promise.all(calls);
  return {
    ...{ load, capacity, perSecond, accepted: latencies.length, refused, refusedWithTime },
    inTime: latencies.filter((latency) => latency <= deadlineMs).length / latencies.length,
    ...{ p50: quantile(latencies, 0.5), p95: quantile(latencies, 0.95), p99: quantile(latencies, 0.99) },
    predictionError: { median: quantile(errors, 0.5), p90: quantile(errors, 0.9) },
  };
}

const open: Outcome[] = [];
for (const load of [0.5, 0.8, 1.2]) {
  open.push(await openLoop(load));
  console.error(`load ${load}`);
}

const stats: Stats = model.stats();
await model.dispose();
await single.dispose();

// ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const percent = (part: number) => `${(100 * part).toFixed(0)} %`;
const ms = (value: number) => value.toFixed(0);
const closedTable = table([
  ["callers", "requests", "requests/s", "throughput, together / in turn", "p50 ms", "p50 in turn", "p50, together / in turn", "p99 ms", "p99 in turn", "rows a launch"], // biome-ignore format: one line
  ...closedRows.map((row) => [
    ...[row.callers, row.requests, row.throughput.median.toFixed(1), format(row.throughputRatio)],
    ...[ms(row.p50.median), ms(row.p50Alone.median), format(row.p50Ratio), ms(row.p99), ms(row.p99Alone)],
    row.rowsPerLaunch.median.toFixed(2),
  ]),
]);
const openTable = table([
  ["load", "capacity/s", "arrivals/s", "accepted", "refused", "of them told what would do", "in time", "p50 ms", "p95 ms", "p99 ms"], // biome-ignore format: one line
  ...open.map((row) => [
    ...[row.load, row.capacity.toFixed(1), row.perSecond.toFixed(1), row.accepted, row.refused, row.refusedWithTime],
    ...[percent(row.inTime), ms(row.p50), ms(row.p95), ms(row.p99)],
  ]),
]);

const rowOf = (callers: number) => closedRows.find((row) => row.callers === callers)!;
const overload = open.find(({ load }) => load === 1.2)!;
const bars = [
  {
    bar: "At 8 callers batching does not lose throughput: together / in turn, median of the rounds, at least 1",
    value: rowOf(8).throughputRatio.median.toFixed(2),
    met: rowOf(8).throughputRatio.median >= 1,
  },
  {
    bar: "At 1 caller batching does not lose latency: p50 together / in turn, above 1 in no more than three rounds of four",
    value: `${rowOf(1).p50Ratio.median.toFixed(2)} (lower quartile ${rowOf(1).p50RatioLowerQuartile.toFixed(2)})`,
    met: Number(rowOf(1).p50RatioLowerQuartile.toFixed(2)) <= 1,
  },
  {
    bar: "At 1.2 of capacity some are refused, each told what would do",
    value: `${overload.refused} refused, ${overload.refusedWithTime} told`,
    met: overload.refused > 0 && overload.refusedWithTime === overload.refused,
  },
  ...open.map(({ load, inTime, p95 }) => ({
    bar: `At ${load} of capacity the accepted ones keep their deadline at the 95th percentile (${deadlineMs} ms)`,
    value: `${ms(p95)} ms, ${percent(inTime)} in time`,
    met: p95 <= deadlineMs,
  })),
  {
    bar: "Alone, predictions are within 15 % at the 90th percentile",
    value: `${percent(idle.p90)} (the same request twice differs by ${percent(idle.repeats.p90)})`,
    met: idle.p90 <= 0.15,
  },
];
const barTable = table([
  ["bar", "measured", ""],
  ...bars.map(({ bar, value, met }) => [bar, value, met ? "met" : "missed"]),
]);

const plots = [
  {
    file: "concurrency.svg",
    title: "Latency of mixed requests",
    label: "milliseconds (p50: median of the rounds, least to greatest; p99: of all)",
    series: [
      ["p50, together", (row: Closed) => row.p50],
      ["p50, one after another", (row: Closed) => row.p50Alone],
      ["p99, together", (row: Closed) => ({ ...row.p99OfRounds, median: row.p99 })],
      ["p99, one after another", (row: Closed) => ({ ...row.p99AloneOfRounds, median: row.p99Alone })],
    ] as const,
  },
  {
    file: "concurrency-throughput.svg",
    title: "Throughput of mixed requests",
    label: "requests a second (median of the rounds, least to greatest)",
    series: [
      ["together", (row: Closed) => row.throughput],
      ["one after another", (row: Closed) => row.throughputAlone],
    ] as const,
  },
];
type Closed = (typeof closedRows)[number];
for (const { file, title, label, series } of plots)
  await writeFile(
    path.join(resultsFolder, file),
    svg({
      title,
      x: { label: "callers", scale: "log", from: 1, to: 16 },
      y: { label, scale: "log" },
      series: series.map(([name, of]) => ({
        name,
        line: true,
        points: closedRows.map((row) => ({ x: row.callers, y: of(row).median, low: of(row).min, high: of(row).max })),
      })),
    }),
  );
await report(
  "concurrency",
  { requests, rounds, arrivals, predictions, threads, deadlineMs, bars, closed: closedRows, open, idle, stats },
  `# Many callers at once

\`npm run bench:concurrency -- --requests ${requests} --rounds ${rounds} --arrivals ${arrivals} --predictions ${predictions}${threads ? ` --threads ${threads}` : ""}\` on ${machineLine()}

${barTable}

The embedded model at 64 and 128 px, four schedules, four guidance scales, mixed. "In turn" serves the same requests one after
another, waiting included, on a model with \`maxBatch: 1, maxWaitMs: 0\`. Ratios are of passes over the same requests, next to each other
in time (median, least to greatest); p99 is over the requests of all rounds.

${closedTable}

![latency](concurrency.svg)
![throughput](concurrency-throughput.svg)

Random arrivals, each with a limit of ${deadlineMs} ms; the load is relative to the throughput of 16 callers, measured right before.

${openTable}

Predicted against real time of ${idle.requests} requests for 1, 2 and 4 pictures that had the model to themselves: off by ${percent(idle.median)} at the median and ${percent(idle.p90)} at
the 90th percentile, predicted / real ${idle.bias.toFixed(2)} at the median. The same request drawn twice in a row differs by ${percent(idle.repeats.median)} and ${percent(idle.repeats.p90)}: the machine's own unrest, which is in
all numbers of this page.
`,
);
console.log(`${barTable}\n\n${closedTable}\n\n${openTable}`);
