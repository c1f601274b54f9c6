/** Requests in a closed loop, over HTTP and in the library's own process, in turns. */

import {
  type Bar,
  type Findings,
  format,
  log,
  paired,
  percent,
  quantile,
  ratios,
  type Spread,
  spread,
  table,
} from "../support.js";
import { type Process, processorMs } from "./process.js";
import { body, libraryOptions, openLibrary, openService, type Setting } from "./setting.js";

const callerCounts = [1, 4, 16];
/** What a turn should take, in seconds. */
const turnSeconds = 2;
const partialImages = 2;

interface Load {
  readonly callers: number;
  readonly requests: number;
}

interface Run {
  readonly milliseconds: number;
  readonly latencies: readonly number[];
}

/** What can be asked for a turn, and the process whose work it is beside the graphs' own process. */
interface Drawer {
  readonly process: Process;
  draw(): Promise<Run>;
}

/** One contender over its turns. */
interface Contender {
  readonly perSecond: Spread;
  /** Milliseconds; of all requests, and its median by turns. */
  readonly p50: number;
  readonly p99: number;
  readonly medians: readonly number[];
  /** Milliseconds of processor time for a request, without the graphs and without the client. */
  readonly processorMs: Spread;
}

interface Comparison {
  readonly callers: number;
  readonly requests: number;
  readonly contenders: Readonly<Record<string, Contender>>;
  /** HTTP to library. */
  readonly plain: { readonly throughput: Spread; readonly p50Difference: Spread };
  readonly streams: { readonly throughput: Spread; readonly p50Difference: Spread };
}

const [http, library, httpStream, libraryPreviews] = ["HTTP", "library", "HTTP, stream", "library, previews"] as const;

export async function throughput(setting: Setting): Promise<Findings> {
  const { server, client, stop } = await openService(setting);
  const inProcess = await openLibrary(setting);
  const comparisons: Comparison[] = [];
  for (const callers of callerCounts) {
    const overHttp = (load: Load, fields = {}): Drawer => ({
      process: server,
      draw: () => client.call("closed", { body: { ...body, ...fields }, ...load }),
    });
    const called = (load: Load, previewCount: number): Drawer => ({
      process: inProcess,
      draw: () => inProcess.call("closed", { options: libraryOptions, previewCount, ...load }),
    });
    // As many requests as fill a turn, as many for each caller.
    const trial = { callers, requests: 4 * callers };
    const { milliseconds } = await overHttp(trial).draw();
    const load = { callers, requests: callers * Math.max(2, Math.round((turnSeconds * 1000 * 4) / milliseconds)) };
    const drawers = {
      [http]: overHttp(load),
      [library]: called(load, 0),
      [httpStream]: overHttp(load, { stream: true, partial_images: partialImages }),
      [libraryPreviews]: called(load, partialImages),
    };
    comparisons.push(await compare(drawers, load, setting.rounds));
  }
  await Promise.all([stop(), inProcess.stop()]);
  return { bars: comparisons.flatMap(barsOf), results: { turnSeconds, comparisons }, page: pageOf(comparisons) };
}

async function compare(
  drawers: Readonly<Record<string, Drawer>>,
  { callers, requests }: Load,
  rounds: number,
): Promise<Comparison> {
  const turns: Record<string, { readonly latencies: readonly number[]; readonly processorMs: number }[]> = {};
  const turn =
    (name: string, { process, draw }: Drawer) =>
    async () => {
      const before = processorMs([process.pid]);
      const { milliseconds, latencies } = await draw();
      turns[name] ??= [];
      turns[name].push({ latencies, processorMs: (processorMs([process.pid]) - before) / requests });
      return milliseconds;
    };
  const contestants = Object.entries(drawers).map(([name, drawer]) => [name, turn(name, drawer)]);
  const times = await paired(Object.fromEntries(contestants), rounds, 1);
  const contenders = Object.fromEntries(
    Object.entries(times).map(([name, milliseconds]): [string, Contender] => {
      // Without the turn that warmed up.
      const counted = turns[name]!.slice(-rounds);
      const all = counted.flatMap(({ latencies }) => latencies);
      return [
        name,
        {
          perSecond: spread(milliseconds.map((each) => (1000 * requests) / each)),
          ...{ p50: quantile(all, 0.5), p99: quantile(all, 0.99) },
          medians: counted.map(({ latencies }) => quantile(latencies, 0.5)),
          processorMs: spread(counted.map(({ processorMs }) => processorMs)),
        },
      ];
    }),
  );
  const against = (one: string, other: string) => ({
    throughput: ratios(times[other]!, times[one]!),
    p50Difference: spread(contenders[one]!.medians.map((each, round) => each - contenders[other]!.medians[round]!)),
  });
  const plain = against(http, library);
  log(`throughput: ${callers} connections, ${requests} requests a turn, HTTP to library ${format(plain.throughput)}`);
  return { callers, requests, contenders, plain, streams: against(httpStream, libraryPreviews) };
}

const connections = (count: number) => `${count} connection${count === 1 ? "" : "s"}`;

function barsOf({ callers, plain: { throughput, p50Difference } }: Comparison): Bar[] {
  return [
    {
      bar: `${connections(callers)}: at most 5 % fewer requests per second than the library in its caller's process`,
      value: `${percent(throughput.median, 1)} (${percent(throughput.min, 1)} to ${percent(throughput.max, 1)})`,
      met: throughput.median >= 0.95,
    },
    {
      bar: `${connections(callers)}: the median latency is at most 3 ms above the library's`,
      value: `${format(p50Difference, 1)} ms`,
      met: p50Difference.median <= 3,
    },
  ];
}

function pageOf(comparisons: readonly Comparison[]): string {
  const rows = comparisons.flatMap(({ callers, requests, contenders, plain, streams }) =>
    Object.entries(contenders).map(([name, { perSecond, p50, p99, processorMs }]) => {
      const ratio = name === http ? plain : name === httpStream ? streams : null;
      return [
        ...[callers, name, requests, format(perSecond, 1), p50.toFixed(1), p99.toFixed(1), format(processorMs)],
        ...(ratio ? [format(ratio.throughput, 3), format(ratio.p50Difference, 1)] : ["", ""]),
      ];
    }),
  );
  return `## Requests per second and latency

Each caller asks again as soon as it is answered. Over HTTP the callers are in a process of their own, each with a connection that stays open; "library" is a
process that calls \`generate\` as often at the same time, and makes PNG and base64 of the pictures as the server does. "stream" is \`stream: true\` with
\`partial_images: ${partialImages}\`, against the library with as many decoded previews, encoded too. The contenders go in turns; of ${comparisons[0]!.plain.throughput.runs} rounds the median, the least and the
greatest. Ratios and differences are of the turns of a round. Callers that are never idle wait for each other: with many of them the latency is their number divided by the requests per second, so
that a percent less of these shows as a percent more latency. Processor time is that of the process that answers, or calls: without its graphs, which have a process of their own, and without the client.

${table([
  [
    "connections",
    "contender",
    "requests a turn",
    "requests/s",
    "p50 ms",
    "p99 ms",
    "processor ms a request",
    "requests/s to the library's",
    "p50 above the library's, ms",
  ],
  ...rows,
])}`;
}
