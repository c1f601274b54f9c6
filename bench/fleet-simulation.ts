/**
 * A fleet in virtual time: how many promises are kept, how busy the workers are, what Redis and the gateways have to do, from 10 to 1,000 workers,
 * by load, arrivals, gateways, age of their copies, noise, rules of the workers and number of queues. Admission and the workers' scheduler are
 * the library's own; times of launches are assumed (bench/fleet/fleet.ts). Writes
 * bench/results/fleet-simulation.{json,md}.
 *
 *   npm run bench:fleet-simulation [-- --quick --seed 1]
 */

import { parseArgs } from "node:util";
import { decisions } from "./fleet/decisions.js";
import { type Outcome, redisOperations, type Setting, simulate, usualSetting } from "./fleet/fleet.js";
import { machineLine, report, table } from "./support.js";

const { values: flags } = parseArgs({
  options: { quick: { type: "boolean", default: false }, seed: { type: "string", default: "1" } },
});
const { quick } = flags;
const seed = Number(flags.seed);

/** Requests of a run by its workers: some tens for each, so that the queue has its usual length for most of them. */
const requestsFor = (workers: number) => Math.round(Math.min(12_000, Math.max(2000, 40 * workers)) / (quick ? 10 : 1));
/** Redis runs commands on one thread. A round figure of what one does, of such commands: from bench/results/fleet.md, operations by processor time. */
const redisMost = 60_000;

interface Row {
  readonly name: string;
  readonly setting: Setting;
  readonly outcome: Outcome;
}

function runs(changes: readonly (readonly [name: string, Partial<Setting>])[]): Row[] {
  return changes.map(([name, change]) => {
    const workers = change.workers ?? usualSetting.workers;
    const setting = { ...usualSetting, requests: requestsFor(workers), seed, ...change };
    const start = performance.now();
    const outcome = simulate(setting);
    console.log(`${name}: ${Math.round(performance.now() - start)} ms`);
    return { name, setting, outcome };
  });
}

const most = quick ? 100 : 1000;
const sections = {
  load: runs(
    (["poisson", "bursts"] as const).flatMap((arrivals) =>
      [0.5, 0.8, 0.95, 1.2].map((load) => [`${load}, ${arrivals}`, { load, arrivals }] as const),
    ),
  ),
  workers: runs(
    [10, 30, 100, 300, 1000]
      .filter((workers) => workers <= most)
      .map((workers) => [`${workers}`, { workers, load: 0.95, gateways: 8 }]),
  ),
  gateways: runs([
    ["1, of the moment", { load: 1.2, allLimited: true, gateways: 1, ageMs: null }],
    ...[1, 2, 8].flatMap((gateways) =>
      [20, 200].map((ageMs) => [`${gateways}, ${ageMs} ms`, { load: 1.2, allLimited: true, gateways, ageMs }] as const),
    ),
    ["8, 200 ms, without what is taken", { load: 1.2, allLimited: true, gateways: 8, ageMs: 200, tellsTaken: false }],
  ]),
  noise: runs([0, 0.05, 0.1].map((noise) => [`${100 * noise} %`, { load: 0.95, noise }])),
  ahead: runs(
    [0, 100, 400, Number.POSITIVE_INFINITY].map((aheadMs) => [
      Number.isFinite(aheadMs) ? `at most ${aheadMs} ms of work` : "room",
      { load: 0.95, aheadMs },
    ]),
  ),
  cold: runs(
    [0, 300, 1000, 3000].flatMap((coldMs) =>
      [true, false].map(
        (excusesCold) =>
          [
            `${coldMs} ms${excusesCold ? "" : ", all counted"}`,
            { load: 1.2, allLimited: true, coldMs, excusesCold },
          ] as const,
      ),
    ),
  ),
  shards: runs(
    [20, 100, 300]
      .filter((workers) => workers <= most)
      .flatMap((workers) =>
        [1, 4].map((shards) => [`${workers}, ${shards}`, { workers, shards, load: 0.95, allLimited: true }] as const),
      ),
  ),
  overload: quick ? [] : runs([["1000", { workers: 1000, load: 1.2, gateways: 8, requests: 12_000 }]]),
};
const deciding = (
  [
    [10, 100, 1, 0.5],
    [100, 1000, 2, 0.5],
    [1000, 1000, 2, 0.5],
    [1000, 10_000, 2, 0],
    [1000, 10_000, 2, 0.5],
    [1000, 10_000, 8, 0.5],
  ] as const
).map(([workers, waiting, speeds, promised]) => decisions(workers, waiting, speeds, promised, quick ? 3 : 20));

const percent = (part: number, digits = 1) => `${(100 * part).toFixed(digits)} %`;
const thousands = (count: number) => Math.round(count).toLocaleString("en");
const tableOf = (head: string, rows: readonly Row[]) =>
  table([
    [head, "refused", "promises kept", "in time, of all with a limit", "late work", "cold draws", "put back", "utilisation", "rows a launch", "Redis operations/s", "a gateway's CPU, ms/s"], // biome-ignore format: one line
    ...rows.map(({ name, outcome }) => [
      ...[name, percent(1 - outcome.accepted / outcome.requests), percent(outcome.kept / outcome.promised, 2)],
      ...[percent(outcome.served), percent(outcome.lateWork, 2), percent(outcome.cold / outcome.accepted)],
      ...[
        percent(outcome.handedBack / outcome.accepted),
        percent(outcome.utilisation),
        outcome.rowsPerLaunch.toFixed(2),
      ],
      ...[thousands(outcome.redisPerSecond), outcome.admission.msPerSecond.toFixed(1)],
    ]),
  ]);

const largest = sections.workers.at(-1)!;
const perWorker = largest.outcome.redisPerSecond / largest.setting.workers;
const parts = Object.entries(largest.outcome.redis)
  .sort(([, a], [, b]) => b - a)
  .map(([name, each]) => `${name} ${percent(each / largest.outcome.redisPerSecond, 0)}`);
const roomy = sections.ahead.at(-1)!.outcome;
const usualAhead = sections.ahead[1]!.outcome;
const [current, aged] = [sections.gateways[0]!.outcome, sections.gateways.at(-2)!.outcome];
const [whole, split] = [sections.shards.at(-2)!.outcome, sections.shards.at(-1)!.outcome];
const largestQueues = sections.shards.at(-1)!.setting.workers;
const deepest = deciding.find(({ waiting, promised }) => waiting === 10_000 && promised > 0)!;

await report(
  "fleet-simulation",
  {
    ...{ quick, seed, redisOperations, deciding },
    sections: Object.fromEntries(
      Object.entries(sections).map(([name, rows]) => [
        name,
        rows.map(({ name, setting, outcome: { totals, ...outcome } }) => ({
          name,
          // JSON has no infinity.
          setting: { ...setting, aheadMs: Number.isFinite(setting.aheadMs) ? setting.aheadMs : null },
          outcome,
        })),
      ]),
    ),
  },
  `# A fleet, simulated

\`npm run bench:fleet-simulation --${quick ? " --quick" : ""} --seed ${seed}\` on ${machineLine()}

Virtual time. The gateways' decisions (\`lib/fleet/admission.ts\`) and the workers' scheduler are the library's; times of launches, which are assumed, are in
\`bench/fleet/fleet.ts\`: three sizes, 1, 2 or 4 pictures, 16 steps or at least 8, every other worker ${usualSetting.slower} times slower. Of the requests 40 % have no limit, 30 % one of 2 to 4 times
what they take alone, 30 % one of 6 to 12 times. Load 1 is what the workers can do one after another with the leanest schedules. Where nothing else is said: ${usualSetting.workers} workers, ${usualSetting.gateways} gateways,
copies that are ${usualSetting.ageMs} ms under way and made every ${usualSetting.refreshMs} ms, launches with a noise of ${percent(usualSetting.noise, 0)}; a worker keeps two sizes ready, another one takes ${usualSetting.coldMs} ms, which no prediction knows. A worker without work
takes the first job at once; a busy one asks for more while it has at most ${usualSetting.aheadMs} ms of work. A worker that would have to make a size ready puts a job back, up to three times, while another has it ready and room. Refused callers do not come again. The first fifth of each run is
not counted. Each row is one run. Only the processor's times are measured; everything else follows from the seed.

Redis operations for each event, those within scripts included, as counted on a real one: ${Object.entries(
    redisOperations,
  )
    .map(([name, each]) => `${name} ${each}`)
    .join(", ")}.

## Where it ends

- **Redis**: ${thousands(largest.outcome.redisPerSecond)} operations a second with ${thousands(largest.setting.workers)} workers at 0.95 (${parts.join(", ")}), ${perWorker.toFixed(1)} for each worker. At that rate one Redis of ${thousands(redisMost)} operations a second is at its end with ${thousands(redisMost / perWorker)} workers (by arithmetic); models that draw faster reach it with fewer.
- **Asking while there is room** alone: workers then take jobs long before they draw them, and promises are made by a list schedule that is not what happens. ${percent(1 - roomy.accepted / roomy.requests)} are refused, where it is ${percent(1 - usualAhead.accepted / usualAhead.requests)} when busy workers ask with at most ${usualSetting.aheadMs} ms of work.
- **Sizes that are not ready** are most of what breaks promises here: none of the predictions knows of them.
- **The age of copies** is not seen here up to 200 ms: ${percent(aged.kept / aged.promised, 2)} of the promises are kept with 8 gateways and copies of 200 ms, ${percent(current.kept / current.promised, 2)} where every decision sees the state of the moment.
- **A gateway's processor**: ${(deepest.micros.copy / 1000).toFixed(0)} ms for the plan of a copy with ${thousands(deepest.waiting)} waiting jobs, every ${usualSetting.refreshMs} ms, and ${(deepest.micros.early / 1000).toFixed(1)} ms for a request that goes before most of them. Copies that are made less often, or several queues, carry it further.
- **Several queues**, on a Redis each, are what carries it further. They cost little where each has some tens of workers (at ${largestQueues} workers ${percent(split.served)} in time in place of ${percent(whole.served)}), and much where one has five.

## Load and arrivals

Bursts: five times as many requests for a second on average, and then for four seconds the rest.

${tableOf("load", sections.load)}

## Workers

At 0.95, with 8 gateways.

${tableOf("workers", sections.workers)}
${sections.overload.length > 0 ? `\nAt 1.2:\n\n${tableOf("workers", sections.overload)}\n` : ""}
## Gateways and the age of their copies

At 1.2, and all requests have a limit. "Of the moment": every decision sees the state as it is. The last row: a job is in no copy from when it is taken until the worker's next beat.

${tableOf("gateways, age", sections.gateways)}

## Noise

At 0.95. The deviation of each launch's logarithm.

${tableOf("noise", sections.noise)}

## When a busy worker asks for more

At 0.95.

${tableOf("it has", sections.ahead)}

## Sizes that are not ready

At 1.2, all requests with a limit, by what making one ready takes. The margin of predictions grows with promises that are broken, but for those whose worker made a size ready meanwhile. "All counted": with them, too.

${tableOf("takes", sections.cold)}

## Several queues

At 0.95, all requests with a limit. Each queue has its own workers; requests are spread evenly.

${tableOf("workers, queues", sections.shards)}

## A decision

Processor's time in microseconds, medians: the first decision after a copy came, which makes the plan; a request without a limit, which is last; one with a limit that goes before most; one that is refused, with the least limit and the time to come again.

${table([
  ["workers", "waiting", "kinds of workers", "promised", "after a copy", "last", "early", "refused"],
  ...deciding.map(({ workers, waiting, speeds, promised, micros }) => [
    ...[thousands(workers), thousands(waiting), speeds, percent(promised, 0)],
    ...[micros.copy, micros.last, micros.early, micros.refused].map(thousands),
  ]),
])}
`,
);
