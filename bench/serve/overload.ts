/** More requests than can be drawn, each with a time limit: what is promised to those who are accepted, and to those who are refused. */

import { type Findings, log, percent, quantile, table } from "../support.js";
import { type Answered, body, openService, type Setting } from "./setting.js";

const load = 1.3;
/** Seconds of arrivals in a turn. */
const turnSeconds = 8;
/** Of a client, before it gives up. */
const mostTries = 10;

interface Outcome {
  readonly status: number;
  /** Milliseconds that it was told to wait, for each refusal. */
  readonly waits: readonly number[];
  readonly milliseconds?: number;
  readonly total?: number;
}

export async function overload(setting: Setting): Promise<Findings> {
  const { client, stop } = await openService(setting);
  const alone: number[] = [];
  for (let index = 0; index < 10; index++) alone.push((await client.call<Answered>("one", { body })).total);
  const deadlineMs = Math.round(6 * quantile(alone, 0.5));
  const outcomes: Outcome[] = [];
  const capacities: number[] = [];
  for (let turn = 0; turn < setting.rounds; turn++) {
    // Right before each turn: the machine is not the same from minute to minute.
    const { milliseconds } = await client.call<Answered>("closed", { body, callers: 16, requests: 96 });
    const capacity = (96 * 1000) / milliseconds;
    capacities.push(capacity);
    const arrivals = { perSecond: load * capacity, seconds: turnSeconds, seed: 1 + turn, mostTries };
    outcomes.push(
      ...(await client.call<Outcome[]>("open", { body: { ...body, deadline_ms: deadlineMs }, ...arrivals })),
    );
    log(
      `overload: ${outcomes.length} arrived so far, ${outcomes.filter(({ waits }) => waits.length > 0).length} refused at first`,
    );
  }
  await stop();

  const drawn = outcomes.filter(({ status }) => status === 200);
  const totals = drawn.map(({ total }) => total!);
  const late = totals.filter((total) => total > deadlineMs).map((total) => total - deadlineMs);
  const refused = outcomes.filter(({ waits }) => waits.length > 0);
  const refusedOften = (least: number) => refused.filter(({ waits }) => waits.length >= least).length;
  const atFirstRetry = refused.filter(({ status, waits }) => status === 200 && waits.length === 1).length;
  const never = outcomes.length - drawn.length;
  const firstWaits = refused.map(({ waits }) => waits[0]!);
  const byTries = Array.from({ length: Math.max(0, ...refused.map(({ waits }) => waits.length)) }, (_, index) => [
    index + 1,
    refusedOften(index + 1),
    refused.filter(({ status, waits }) => status === 200 && waits.length === index + 1).length,
  ]);
  const p95 = quantile(totals, 0.95);
  return {
    bars: [
      {
        bar: `Arrivals at ${load} of the capacity with \`deadline_ms\`: of those accepted the 95th percentile is in time`,
        value: `${p95.toFixed(0)} of ${deadlineMs} ms; ${late.length} of ${drawn.length} late${late.length > 0 ? `, by ${Math.max(...late).toFixed(0)} ms at most` : ""}`,
        met: p95 <= deadlineMs,
      },
      {
        bar: "Whoever is refused, and waits as long as `retry-after-ms` says, is then accepted",
        value: `${atFirstRetry} of ${refused.length} at the first retry, ${refusedOften(2)} needed a second, ${never} were not drawn`,
        met: atFirstRetry === refused.length,
      },
    ],
    results: {
      ...{
        load,
        deadlineMs,
        turnSeconds,
        turns: setting.rounds,
        capacities,
        arrived: outcomes.length,
        drawn: drawn.length,
      },
      ...{ p50: quantile(totals, 0.5), p95, late, refused: refused.length, atFirstRetry, never, byTries, firstWaits },
    },
    page: `## More than it can draw

Arrivals at random (Poisson) at ${load} of the throughput of 16 callers, measured before each of ${setting.rounds} turns of ${turnSeconds} s; the limit of ${deadlineMs} ms is six times what a picture takes
alone, and the schedule is fixed. Whoever is refused comes back with the same request after \`retry-after-ms\`, beside those who still arrive. In time is by the server's own clock.

${table([
  [
    "arrived",
    "refused at first",
    "drawn in the end",
    "p50 ms",
    "p95 ms",
    "late",
    "first wait, p50 ms",
    "longest first wait, ms",
  ],
  [
    ...[outcomes.length, `${refused.length} (${percent(refused.length / outcomes.length, 1)})`, drawn.length],
    ...[quantile(totals, 0.5).toFixed(0), p95.toFixed(0), late.length],
    ...[quantile(firstWaits, 0.5).toFixed(0), Math.max(0, ...firstWaits).toFixed(0)],
  ],
])}

${table([["retry", "came back", "accepted"], ...byTries])}`,
  };
}
