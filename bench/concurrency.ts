/**
 * Many callers at once: requests with mixed schedules, sizes and guidance, served together against one after another.
 * Closed loop: each of 1, 2, 4, 8, 16 callers asks again as soon as it is answered; both ways in turn, round by round, with the
 * same requests. Open loop: requests arrive at random (Poisson) at 0.5, 0.8 and 1.2 of the capacity that the closed loop has
 * shown, each with a time limit; what cannot be in time is refused. Writes bench/results/concurrency.{json,md,svg}.
 *
 *   npm run bench:concurrency [-- --requests 16 --rounds 7 --arrivals 80 --threads 1]
 */

import { writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { DeadlineError, FlowTurbo, type GenerateOptions, QueueFullError, type Stats } from "flowturbo";
import { svg } from "./plot.js";
import { format, machineLine, ratios, report, resultsFolder, spread } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    requests: { type: "string", default: "16" },
    rounds: { type: "string", default: "7" },
    arrivals: { type: "string", default: "80" },
    threads: { type: "string" },
  },
});
const [requests, rounds, arrivals] = [flags.requests, flags.rounds, flags.arrivals].map(Number) as [
  number,
  number,
  number,
];

const threads = flags.threads === undefined ? undefined : Number(flags.threads);

let state = 1;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};
const pick = <T>(list: readonly T[]): T => list[Math.floor(random() * list.length)]!;
const captions = ["a red circle", "a large blue square", "a small green triangle", "a yellow star above a red circle"];
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
for (const prompt of captions) await model.generate({ prompt, blocks: "H1" });

const quantile = (values: readonly number[], part: number) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1)]!;
};

// ── Closed loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

interface Pass {
  /** Requests a second. */
  readonly throughput: number;
  readonly latencies: readonly number[];
  readonly rowsPerLaunch: number;
}

type Draw = (options: GenerateOptions) => Promise<unknown>;

async function closedLoop(callers: number, list: readonly GenerateOptions[], draw: Draw): Promise<Pass> {
  const latencies: number[] = [];
  const before = model.stats().launches;
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
  const after = model.stats().launches;
  const rowsPerLaunch = (after.rows - before.rows) / (after.count - before.count);
  return { throughput: list.length / seconds, latencies, rowsPerLaunch };
}

let turn: Promise<unknown> = Promise.resolve();
const together: Draw = (options) => model.generate(options);
const oneAfterAnother: Draw = (options) => {
  const mine = turn.then(() => model.generate(options));
  turn = mine.catch(() => undefined);
  return mine;
};

const callerCounts = [1, 2, 4, 8, 16];
const closed: Record<number, { together: Pass[]; alone: Pass[] }> = {};
for (const callers of callerCounts) {
  const passes = { together: [] as Pass[], alone: [] as Pass[] };
  closed[callers] = passes;
  for (let round = 0; round < rounds; round++) {
    const list = Array.from({ length: requests }, (_, index) => mixed(1000 * round + index));
    const runs = [
      async () => passes.together.push(await closedLoop(callers, list, together)),
      async () => passes.alone.push(await closedLoop(callers, list, oneAfterAnother)),
    ];
    for (const run of round % 2 ? runs.reverse() : runs) await run();
  }
  console.error(`${callers} callers`);
}
const closedRows = callerCounts.map((callers) => {
  const { together, alone } = closed[callers]!;
  const latency = (passes: readonly Pass[], part: number) =>
    spread(passes.map(({ latencies }) => quantile(latencies, part)));
  return {
    callers,
    throughput: spread(together.map(({ throughput }) => throughput)),
    throughputRatio: ratios(
      together.map(({ throughput }) => throughput),
      alone.map(({ throughput }) => throughput),
    ),
    p50: latency(together, 0.5),
    p50Alone: latency(alone, 0.5),
    p99: latency(together, 0.99),
    p99Alone: latency(alone, 0.99),
    p50Ratio: ratios(
      together.map(({ latencies }) => quantile(latencies, 0.5)),
      alone.map(({ latencies }) => quantile(latencies, 0.5)),
    ),
    rowsPerLaunch: spread(together.map(({ rowsPerLaunch }) => rowsPerLaunch)),
  };
});

// ── Open loop ────────────────────────────────────────────────────────────────────────────────────────────────────────

const capacity = closedRows.find(({ callers }) => callers === 8)!.throughput.median;
const aloneMs = closedRows.find(({ callers }) => callers === 1)!.p50.median;
/** Several times what the usual request takes alone: room for some company. */
const deadlineMs = Math.round(6 * aloneMs);

interface Outcome {
  readonly load: number;
  readonly perSecond: number;
  readonly accepted: number;
  readonly refused: number;
  readonly refusedWithTime: number;
  readonly inTime: number;
  readonly p50: number;
  readonly p95: number;
  readonly p99: number;
  readonly predictionError: { readonly median: number; readonly p90: number };
}

async function openLoop(load: number): Promise<Outcome> {
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
          if (error.retryAfterMs !== null && error.retryAfterMs > 0) refusedWithTime++;
        },
      ),
    );
  }
  await Promise.all(calls);
  return {
    ...{ load, perSecond, accepted: latencies.length, refused, refusedWithTime },
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

// ── Predictions on an idle model ─────────────────────────────────────────────────────────────────────────────────────

const idleErrors: number[] = [];
for (let index = 0; index < 60; index++) {
  const { deadline } = await model.generate({ ...mixed(9000 + index), deadlineMs: 60_000 });
  idleErrors.push(Math.abs(deadline!.predictedMs / deadline!.actualMs - 1));
}
const idle = { median: quantile(idleErrors, 0.5), p90: quantile(idleErrors, 0.9) };
const stats: Stats = model.stats();
await model.dispose();

// ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const percent = (part: number) => `${(100 * part).toFixed(0)} %`;
const ms = (value: number) => value.toFixed(0);
const closedTable = [
  "| callers | requests/s | throughput, together / in turn | p50 ms | p50 in turn | p99 ms | p99 in turn | rows a launch |",
  "|---|---|---|---|---|---|---|---|",
  ...closedRows.map(
    (row) =>
      `| ${row.callers} | ${row.throughput.median.toFixed(1)} | ${format(row.throughputRatio)} | ${ms(row.p50.median)} | ${ms(row.p50Alone.median)} | ${ms(row.p99.median)} | ${ms(row.p99Alone.median)} | ${row.rowsPerLaunch.median.toFixed(2)} |`,
  ),
].join("\n");
const openTable = [
  "| load | arrivals/s | accepted | refused | of them told when to return | in time | p50 ms | p95 ms | p99 ms |",
  "|---|---|---|---|---|---|---|---|---|",
  ...open.map(
    (row) =>
      `| ${row.load} | ${row.perSecond.toFixed(1)} | ${row.accepted} | ${row.refused} | ${row.refusedWithTime} | ${percent(row.inTime)} | ${ms(row.p50)} | ${ms(row.p95)} | ${ms(row.p99)} |`,
  ),
].join("\n");
const chart = svg({
  title: `Latency of mixed requests, ${requests} a pass`,
  x: { label: "callers", scale: "log", from: 1, to: 16 },
  y: { label: "milliseconds (median of the rounds, least to greatest)", scale: "log" },
  series: (
    [
      ["p50, together", "p50"],
      ["p50, one after another", "p50Alone"],
      ["p99, together", "p99"],
      ["p99, one after another", "p99Alone"],
    ] as const
  ).map(([name, key]) => ({
    name,
    line: true,
    points: closedRows.map((row) => ({ x: row.callers, y: row[key].median, low: row[key].min, high: row[key].max })),
  })),
});
await writeFile(path.join(resultsFolder, "concurrency.svg"), chart);
await report(
  "concurrency",
  { requests, rounds, arrivals, threads, deadlineMs, closed: closedRows, open, idle, stats },
  `# Many callers at once

\`npm run bench:concurrency -- --requests ${requests} --rounds ${rounds} --arrivals ${arrivals}${threads ? ` --threads ${threads}` : ""}\` on ${machineLine()}

The embedded model at 64 and 128 px, four schedules, four guidance scales, mixed. "In turn" serves the same requests one after
another, waiting included. Ratios are of passes over the same requests, next to each other in time (median, least to greatest).

${closedTable}

![latency](concurrency.svg)

Random arrivals, each with a limit of ${deadlineMs} ms; the load is relative to the throughput of 8 callers above.

${openTable}

Predicted against real time, on the model without other requests: off by ${percent(idle.median)} at the median and ${percent(idle.p90)} at the 90th percentile.
Other programs take the processor at times here: predictions and limits are to be read with the spread of the ratios above.
`,
);
console.log(`${closedTable}\n\n${openTable}\n\npredictions alone: ${JSON.stringify(idle)}`);
