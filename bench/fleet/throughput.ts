/**
 * Throughput of fleets of 1, 2, 4 and 8 workers against as many times that of one model in its caller's process, which draws with the same
 * launches. All are there from the beginning, and are loaded in turn.
 */

import { FleetProcess } from "../../test/support/fleet/processes.js";
import { type Findings, format, log, ratios, type Spread, spread, table } from "../support.js";
import { asked, difference, Fleet, type Setting, steps, type Usage, usageOf } from "./setting.js";

/** A batch of eight takes 228.8 ms for each of 8 steps and three quarters of that for text and pixels: 4 pictures a second. */
const model = { msPerLaunch: 40, msPerRow: 23.6, maxBatch: 8 };
const usualPerSecond = 4;
const counts = [1, 2, 4, 8];
/** Callers of a worker: as many as fill its launches, and as many again that wait. */
const callersPerWorker = 16;

interface Run {
  readonly perSecond: number;
  readonly seconds: number;
  readonly pictures: number;
  readonly usage: Usage | null;
}

/** Pictures a second once all workers are busy, and until the first of them has no more to do. */
function rateOf(ends: readonly number[]): number {
  const [from, to] = [Math.floor(0.2 * ends.length) - 1, Math.floor(0.8 * ends.length) - 1];
  return (1000 * (to - from)) / (ends[to]! - ends[from]!);
}

export async function throughput(setting: Setting): Promise<Findings> {
  const { quick, rounds } = setting;
  const turnSeconds = quick ? 10 : 18;
  const library = await FleetProcess.start({ role: "library", model, cache: setting.cache });
  const fleets = new Map<number, Fleet>();
  for (const workers of counts) fleets.set(workers, await Fleet.start(setting, model, { workers, gateways: workers > 4 ? 2 : 1 })); // biome-ignore format: one line
  const runs = new Map<number, Run[]>([0, ...counts].map((workers) => [workers, []]));
  const alone = async (): Promise<Run> => {
    const pictures = usualPerSecond * turnSeconds;
    const { ends } = await library.load(callersPerWorker, pictures, asked);
    return { perSecond: rateOf(ends), seconds: 0, pictures, usage: null };
  };
  const together = async (workers: number): Promise<Run> => {
    const fleet = fleets.get(workers)!;
    const { gateways } = fleet;
    const pictures = usualPerSecond * turnSeconds * workers;
    const before = await usageOf(setting, fleet);
    const start = performance.now();
    const loaded = await Promise.all(
      gateways.map((gateway) =>
        gateway.load((callersPerWorker * workers) / gateways.length, pictures / gateways.length, asked),
      ),
    );
    const seconds = (performance.now() - start) / 1000;
    const ends = loaded.flatMap(({ ends }) => ends).sort((a, b) => a - b);
    return {
      perSecond: rateOf(ends),
      seconds,
      pictures,
      usage: difference(await usageOf(setting, fleet), before),
    };
  };
  try {
    // The first round warms up.
    for (let round = -1; round < rounds; round++) {
      const order = round % 2 ? [...counts].reverse() : counts;
      for (const workers of [0, ...order]) {
        const run = workers === 0 ? await alone() : await together(workers);
        if (round >= 0) runs.get(workers)!.push(run);
        log(`throughput, round ${round}, ${workers} workers: ${run.perSecond.toFixed(1)} pictures a second`);
      }
    }
  } finally {
    await library.stop();
    for (const fleet of fleets.values()) await fleet.stop();
  }
  const single = runs.get(0)!.map(({ perSecond }) => perSecond);
  const rows = counts.map((workers) => {
    const all = runs.get(workers)!;
    const perSecond = all.map(({ perSecond }) => perSecond);
    const part = (of: (usage: Usage) => number): Spread =>
      spread(all.map(({ usage, seconds }) => of(usage!) / 1000 / seconds));
    const commands = new Map<string, number>();
    const pictures = all.reduce((sum, { pictures }) => sum + pictures, 0);
    for (const { usage } of all)
      for (const [name, calls] of usage!.commands) commands.set(name, (commands.get(name) ?? 0) + calls / pictures);
    return {
      ...{ workers, perSecond: spread(perSecond) },
      ratio: ratios(perSecond, single.map((value) => workers * value)), // biome-ignore format: one line
      redis: part(({ redisMs }) => redisMs),
      gateways: part(({ gatewayMs }) => gatewayMs),
      workersCpu: part(({ workerMs }) => workerMs),
      redisUsPerPicture: (1000 * all.reduce((sum, { usage }) => sum + usage!.redisMs, 0)) / pictures,
      operations: [...commands.values()].reduce((sum, calls) => sum + calls, 0),
      commands: Object.fromEntries([...commands].sort(([, a], [, b]) => b - a)),
    };
  });
  const names = [...new Set(rows.flatMap(({ commands }) => Object.keys(commands)))].filter((name) =>
    rows.some(({ commands }) => (commands[name] ?? 0) >= 0.005),
  );
  const page = `## Throughput

${callersPerWorker} callers for each worker, without pauses; pictures of 64 px, ${steps} steps, each with a seed of its own. The waiting model takes 40 ms a launch and 23.6 ms a row: batches of eight are 4 pictures a
second by arithmetic. Counted from when a fifth is drawn until four fifths are. One model in its caller's process: ${format(spread(single), 1)} pictures a second. Ratios are to that, times the workers, of the same round. Processors are counted in cores; "all" is redis-server, gateways and workers.
One gateway, two with eight workers.

${table([
  ["workers", "pictures/s", "of workers × one model", "cores: Redis", "gateways", "workers", "all", "µs of Redis a picture", "operations a picture"], // biome-ignore format: one line
  ...rows.map((row) => [
    ...[row.workers, format(row.perSecond, 1), format(row.ratio, 3)],
    ...[row.redis, row.gateways, row.workersCpu].map(({ median }) => median.toFixed(2)),
    (row.redis.median + row.gateways.median + row.workersCpu.median).toFixed(2),
    row.redisUsPerPicture.toFixed(0),
    row.operations.toFixed(1),
  ]),
])}

Operations a picture by command, those that scripts call included (\`INFO commandstats\`), and beats and the like with them:

${table([
  ["command", ...rows.map(({ workers }) => `${workers} workers`)],
  ...names.map((name) => [name, ...rows.map(({ commands }) => (commands[name] ?? 0).toFixed(2))]),
])}`;
  return {
    bars: rows.map(({ workers, ratio }) => ({
      bar: `${workers} worker${workers === 1 ? "" : "s"}: throughput of ${workers} × one model in its caller's process, median of the rounds, at least 0.95`,
      value: ratio.median.toFixed(3),
      met: ratio.median >= 0.95,
    })),
    results: { model, callersPerWorker, single: spread(single), rows },
    page,
  };
}
