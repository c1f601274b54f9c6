/** Clients that hang up: what is still done for them, and what the others gain. Linux. */

import { setTimeout as pause } from "node:timers/promises";
import type { Stats } from "flowturbo";
import {
  type Findings,
  format,
  log,
  mean,
  paired,
  percent,
  processTree,
  quantile,
  ratios,
  spread,
  table,
} from "../support.js";
import { type Process, processorMs } from "./process.js";
import { type Answered, body, openService, type Service, type Setting, steps } from "./setting.js";

/** Part of the requests whose clients hang up. */
const part = 0.2;
const callers = 16;
/** In a turn. */
const requests = 192;
/** A picture of steps that are all alike, and long beside the way of a hang-up to the graphs. */
const long = { size: "256x256", sampler: "euler", num_inference_steps: 12, guidance_scale: 2 };
/** In steps: what the processor time of a step differs by, beside the step that is under way. */
const tolerance = 0.2;
const trials = 10;

interface Impatient {
  readonly milliseconds: number;
  /** After how many milliseconds those left who left. */
  readonly left: readonly number[];
  /** Milliseconds that the others waited. */
  readonly stayed: readonly number[];
  /** How many meant to leave, answered before or not. */
  readonly leaving: number;
}

export async function hangups(setting: Setting): Promise<Findings> {
  const service = await openService(setting);
  const stops = await stopsOf(service);
  log(`hang-ups: steps after the hang-up ${format(stops.stepsAfter)}`);
  const turns = await compare(service, setting.rounds);
  await service.stop();

  const gain = ratios(turns.times.patient!, turns.times.impatient!);
  const rowsSaved = 1 - turns.rows.impatient / turns.rows.patient;
  const { left, stayed } = turns;
  const leftPart = left.length / turns.asked;
  // Of each of those who left: what was left of its time, less a step: one that has begun is not stopped.
  const duration = mean(stayed);
  const saved =
    (leftPart * left.reduce((sum, after) => sum + Math.max(0, 1 - after / duration - 1 / steps), 0)) / left.length;
  const least = 1 / (1 - saved);
  log(
    `hang-ups: the others gain ${format(gain)}, at least ${least.toFixed(3)} expected, rows saved ${percent(rowsSaved, 1)}`,
  );
  const { aborted, failed } = turns;
  return {
    bars: [
      {
        bar: `After a hang-up at most the step under way is finished: its processor time, and ${tolerance} of it by which steps differ`,
        value: `${format(stops.stepsAfter)} steps in ${trials} trials (${stops.stepMs.toFixed(0)} ms of processor time each)`,
        met: stops.stepsAfter.max <= 1 + tolerance,
      },
      {
        bar: `${percent(part)} of ${callers} connections' requests are given up: the others are drawn faster by what that saves, at least ${least.toFixed(3)} times`,
        value: `${format(gain, 3)}`,
        met: gain.median >= least,
      },
      {
        bar: "Every hang-up is an aborted call, and no other call fails",
        value: `${left.length} hung up, ${aborted} aborted, ${failed} failed`,
        met: failed === 0 && aborted <= left.length,
      },
    ],
    results: {
      part,
      callers,
      requests,
      stops,
      gain,
      least,
      saved,
      rowsSaved,
      leftPart,
      duration,
      aborted,
      failed,
      left: left.length,
    },
    page: `## Clients that hang up

A client that closes its connection asks for the next picture at once, so that ${callers} connections are always busy. In turns with the same requests of which none is given up, ${gain.runs}
rounds of ${requests} requests; ${percent(leftPart, 1)} of all were given up before they were answered, after a time at random up to the median latency of the others (${turns.withinMs.toFixed(0)} ms).

What the others gain is the time of the same requests without hang-ups by the time with them. At least: a request that is given up after a part of the time that a picture takes has had that part of the
work, and at most a step more of its ${steps}, since one that has begun is not stopped; the rest, ${percent(saved, 1)} of all work, goes to the others. By the rows that were launched
${percent(rowsSaved, 1)} of the work was saved.

${table([
  ["turns", "requests drawn/s", "p50 ms of those who stay", "rows launched"],
  [
    "nobody hangs up",
    turns.perSecond.patient.toFixed(1),
    quantile(turns.patientStayed, 0.5).toFixed(0),
    turns.rows.patient,
  ],
  ["some hang up", turns.perSecond.impatient.toFixed(1), quantile(stayed, 0.5).toFixed(0), turns.rows.impatient],
])}

Steps after a hang-up are processor time of the process that runs graphs, from the hang-up on, by a ${long.num_inference_steps}th of that of the whole picture
(${long.size}, ${long.num_inference_steps} Euler steps), which is drawn alone.`,
  };
}

/** One picture at a time, given up at a random moment: how many steps' processor time is spent afterwards. */
async function stopsOf({ client, server }: Service) {
  const host = (): number => processorMs(processTree(server.pid).filter((pid) => pid !== server.pid));
  const whole = async () => {
    const before = host();
    const { milliseconds } = await client.call<Answered>("one", { body: long });
    return { milliseconds, stepMs: (host() - before) / long.num_inference_steps };
  };
  await whole();
  const measured = [await whole(), await whole(), await whole()];
  const milliseconds = quantile(
    measured.map((each) => each.milliseconds),
    0.5,
  );
  const stepMs = quantile(
    measured.map((each) => each.stepMs),
    0.5,
  );
  const stepsAfter: number[] = [];
  for (let trial = 0; trial < trials; trial++) {
    const hangUpAfterMs = milliseconds * (0.1 + (0.7 * trial) / (trials - 1));
    const answer = await client.call<Answered | null>("one", { body: long, hangUpAfterMs });
    if (answer) continue;
    const before = host();
    // Whatever was left to do would be done by then.
    await pause(milliseconds);
    stepsAfter.push((host() - before) / stepMs);
  }
  return { milliseconds, stepMs, stepsAfter: spread(stepsAfter) };
}

/** The same requests with and without hang-ups, in turns. */
async function compare({ client, server }: Service, rounds: number) {
  const load = { body, callers, requests, part };
  let turn = 0;
  const run = (withinMs: number) => client.call<Impatient>("impatient", { ...load, withinMs, seed: 1 + (turn++ >> 1) });
  const { stayed: trial } = await run(0);
  turn = 0;
  const withinMs = quantile(trial, 0.5);
  const rows = { patient: 0, impatient: 0 };
  const drawn = { patient: 0, impatient: 0 };
  const spent = { patient: 0, impatient: 0 };
  const [left, stayed, patientStayed]: number[][] = [[], [], []] as number[][];
  const first = await idle(server);
  const contender = (name: "patient" | "impatient") => async () => {
    const before = (await idle(server)).launches.rows;
    const found = await run(name === "patient" ? 0 : withinMs);
    const after = await idle(server);
    rows[name] += after.launches.rows - before;
    drawn[name] += requests - found.leaving;
    spent[name] += found.milliseconds;
    if (name === "patient") patientStayed!.push(...found.stayed);
    else {
      left!.push(...found.left);
      stayed!.push(...found.stayed);
    }
    return found.milliseconds;
  };
  const times = await paired({ patient: contender("patient"), impatient: contender("impatient") }, rounds, 0);
  const { requests: last } = await idle(server);
  return {
    ...{ times, withinMs, rows, asked: rounds * requests, left: left!, stayed: stayed!, patientStayed: patientStayed! },
    perSecond: {
      patient: (1000 * drawn.patient) / spent.patient,
      impatient: (1000 * drawn.impatient) / spent.impatient,
    },
    aborted: last.aborted - first.requests.aborted,
    failed: last.failed - first.requests.failed,
  };
}

/** Waits until nothing is under way; what runs now is over a little later than its call. */
async function idle(server: Process): Promise<Stats> {
  for (;;) {
    await pause(100);
    const stats = await server.call<Stats>("stats");
    if (stats.running.requests + stats.queue.waiting === 0) return stats;
  }
}
