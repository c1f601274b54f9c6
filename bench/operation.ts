/**
 * A service in operation: one server process with the embedded model, tried over HTTP on loopback as its clients and its
 * operators would try it. Load at random (Poisson) with fixed schedules and with a time limit that leaves the schedule free;
 * what refused callers are told; hang-ups; a runtime that is killed, idle and at work, or stopped; a quota of processor time;
 * memory over many requests. Writes bench/results/operation.{json,md}, with a bar for each. Linux.
 *
 *   npm run bench:operation [-- --minutes 15 --only load,retry,hangups,deaths,memory,quota]
 *
 * Every part has a share of the time; the rates that it needs are measured right before, since the machine is not quiet.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { Agent, request as httpRequest } from "node:http";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { setTimeout as pause } from "node:timers/promises";
import { parseArgs } from "node:util";
import type { Health, Stats } from "flowturbo";
import { quotaGroup } from "./quota.js";
import {
  type Bar,
  log,
  machineLine,
  percent,
  processTree,
  quantile,
  report,
  residentBytes,
  root,
  table,
} from "./support.js";

const parts = ["load", "retry", "hangups", "deaths", "memory", "quota"] as const;
const { values: flags } = parseArgs({
  options: { minutes: { type: "string", default: "15" }, only: { type: "string", default: parts.join() } },
});
const chosen = new Set(flags.only.split(","));
/** Seconds that a part may take, of the sum of all weights. */
const weights = { load: 7, retry: 2, hangups: 0.5, deaths: 1.5, memory: 2, quota: 1 };
const secondsOf = (part: keyof typeof weights) => (weights[part] / 14) * Number(flags.minutes) * 60;

let seed = 1;
const random = () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 2 ** 32;
};
const captions = [
  "a red circle",
  "a large blue square",
  "a small green triangle",
  "a yellow triangle above a red circle",
];

// ── The server, and calls to it ──────────────────────────────────────────────────────────────────────────────────────

interface State {
  readonly stats: Stats;
  readonly health: Health;
  readonly drift: number;
  readonly rss: number;
  readonly loopP99: number;
}

interface Answer {
  readonly status: number;
  /** From the call to the last byte. */
  readonly milliseconds: number;
  readonly about: { readonly blocks: string; readonly total: number; readonly predictedMs: number | null } | null;
  readonly error: {
    readonly code: string | null;
    readonly message: string;
    readonly retryAfterMs: number | null;
  } | null;
}

type Body = Readonly<Record<string, unknown>>;

class Server {
  readonly #child: ChildProcess;
  readonly #port: number;
  readonly #agent = new Agent({ keepAlive: true, maxSockets: 1000 });

  private constructor(child: ChildProcess, port: number) {
    this.#child = child;
    this.#port = port;
  }

  /** @param join puts the process into a group before it loads anything */
  static async start(options: Body, join?: (pid: number) => void): Promise<Server> {
    const file = path.join(root, "bench/operation/server.mjs");
    const args = ["--expose-gc", file, JSON.stringify(options)];
    const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "inherit"] });
    join?.(child.pid!);
    const lines = createInterface({ input: child.stdout! });
    const [port] = await new Promise<string[]>((resolve, reject) => {
      lines.once("line", (line) => resolve([line]));
      child.once("close", (code) => reject(new Error(`The server ended with code ${code}.`)));
    });
    return new Server(child, Number(port));
  }

  get pid(): number {
    return this.#child.pid!;
  }

  /** The processes that run graphs for it. */
  get hosts(): number[] {
    const command = (pid: number) => {
      try {
        return readFileSync(`/proc/${pid}/cmdline`, "utf8");
      } catch {
        return "";
      }
    };
    return processTree(this.pid).filter((pid) => pid !== this.pid && command(pid).includes("onnxruntime-host"));
  }

  signal(name: NodeJS.Signals): void {
    for (const pid of this.hosts) process.kill(pid, name);
  }

  post(url: string, body: Body, signal?: AbortSignal): Promise<Answer> {
    const start = performance.now();
    return new Promise((resolve, reject) => {
      const call = httpRequest(
        { host: "127.0.0.1", port: this.#port, path: url, method: "POST", agent: this.#agent, signal },
        (response) => {
          const chunks: Buffer[] = [];
          response.on("data", (chunk) => chunks.push(chunk));
          response.once("error", reject);
          response.once("end", () => {
            const { statusCode: status = 0, headers } = response;
            const about = headers["x-about"] ? JSON.parse(String(headers["x-about"])) : null;
            const error = status < 400 ? null : JSON.parse(Buffer.concat(chunks).toString());
            resolve({ status, milliseconds: performance.now() - start, about, error });
          });
        },
      );
      call.once("error", reject);
      call.end(JSON.stringify(body));
    });
  }

  /** Draws; a caption and a seed are chosen. */
  draw(options: Body, signal?: AbortSignal): Promise<Answer> {
    const prompt = captions[Math.floor(random() * captions.length)];
    return this.post("/generate", { prompt, guidanceScale: 2, seed: Math.floor(random() * 1e6), ...options }, signal);
  }

  async state(): Promise<State> {
    const response = await fetch(`http://127.0.0.1:${this.#port}/state`);
    return (await response.json()) as State;
  }

  /** Waits until nothing is under way. */
  async idle(): Promise<State> {
    for (;;) {
      const state = await this.state();
      if (state.stats.running.requests + state.stats.queue.waiting === 0) return state;
      await pause(50);
    }
  }

  async stop(): Promise<void> {
    this.#agent.destroy();
    const ended = new Promise((resolve) => this.#child.once("close", resolve));
    this.#child.kill("SIGTERM");
    await ended;
  }
}

const cache = await mkdtemp(path.join(os.tmpdir(), "flowturbo-operation-"));
/** Profiled and warm, so that every part begins alike. */
async function open(options: Body = {}, join?: (pid: number) => void): Promise<Server> {
  const server = await Server.start({ cache, measureCosts: false, ...options }, join);
  await server.post("/profile", { batches: [1, 2, 4, 8], rounds: 5 });
  for (const prompt of captions) await server.draw({ prompt, blocks: "H1P1R1" });
  return server;
}

const usual = "H1P7R2";
const leanest = "H1P1R2";

/** Requests a second with 16 callers, each of which asks again as soon as it is answered. */
async function throughput(server: Server, options: Body, seconds: number): Promise<number> {
  const until = performance.now() + seconds * 1000;
  const start = performance.now();
  let drawn = 0;
  await Promise.all(
    Array.from({ length: 16 }, async () => {
      while (performance.now() < until) if ((await server.draw(options)).status === 200) drawn++;
    }),
  );
  return drawn / ((performance.now() - start) / 1000);
}

const bars: Bar[] = [];
const results: Record<string, unknown> = {};
const pages: string[] = [];

// ── Load ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** What became of the arrivals at one load with one schedule, over its turns. */
interface Poisson {
  readonly load: string;
  readonly schedule: string;
  readonly perSecond: number;
  arrived: number;
  refused: number;
  late: number;
  failed: number;
  /** Milliseconds of each call that was drawn. */
  readonly times: number[];
  readonly blocks: Record<string, number>;
  loopP99: number;
}

/** Turns that the schedules take at each load. */
const turns = 6;

/** One turn of arrivals at random, the same for each schedule. */
async function poisson(server: Server, run: Poisson, options: Body, turn: number, seconds: number): Promise<void> {
  await server.idle();
  seed = 1 + turn;
  const { perSecond, times, blocks } = run;
  const calls: Promise<void>[] = [];
  const start = performance.now();
  for (let at = 0; ; ) {
    at += (-Math.log(1 - random()) / perSecond) * 1000;
    if (at > seconds * 1000) break;
    await pause(Math.max(0, start + at - performance.now()));
    run.arrived++;
    calls.push(
      server.draw(options).then(({ status, about }) => {
        if (status === 200) {
          times.push(about!.total);
          blocks[about!.blocks] = (blocks[about!.blocks] ?? 0) + 1;
          // By the server's clock: what HTTP adds is not in the promise.
          if (about!.total > Number(options.deadlineMs)) run.late++;
        } else if (status === 503 || status === 429 || status === 422) run.refused++;
        else run.failed++;
      }),
    );
  }
  await Promise.all(calls);
  run.loopP99 = Math.max(run.loopP99, (await server.state()).loopP99);
  log(`load ${run.load}, ${run.schedule}: ${run.arrived} arrived, ${run.refused} refused, ${run.late} late`);
}

async function load(): Promise<void> {
  const server = await open({ maxQueue: 1000 });
  const seconds = secondsOf("load") / 10;
  const alone: number[] = [];
  for (let index = 0; index < 10; index++) alone.push((await server.draw({ blocks: usual })).about!.total);
  const deadlineMs = Math.round(6 * quantile(alone, 0.5));
  const schedules: Record<string, Body> = {
    [usual]: { blocks: usual, deadlineMs },
    [leanest]: { blocks: leanest, deadlineMs },
    free: { deadlineMs },
    "free, quality": { deadlineMs, prefer: "quality" },
  };
  const runs: Poisson[] = [];
  const trials: readonly (readonly [load: number, of: string, schedules: readonly string[]])[] = [
    [0.7, usual, [usual, "free", "free, quality"]],
    [1.3, usual, [usual, leanest, "free"]],
    [1.3, leanest, [leanest, "free"]],
  ];
  for (const [factor, of, names] of trials) {
    const capacity = await throughput(server, { blocks: of }, seconds / 3);
    const group = names.map((schedule): Poisson => {
      const counts = { arrived: 0, refused: 0, late: 0, failed: 0, times: [], blocks: {}, loopP99: 0 };
      return { load: `${factor} of ${of}`, schedule, perSecond: factor * capacity, ...counts };
    });
    runs.push(...group);
    // Short turns, forth and back: the machine is not the same from minute to minute.
    for (let turn = 0; turn < turns; turn++)
      for (const run of turn % 2 === 0 ? group : [...group].reverse())
        await poisson(server, run, schedules[run.schedule]!, turn, seconds / turns);
  }
  await server.stop();
  results.load = {
    ...{ deadlineMs, seconds },
    runs: runs.map(({ times, ...run }) => {
      return { ...run, drawn: times.length, p50: quantile(times, 0.5), p95: quantile(times, 0.95) };
    }),
  };
  const run = (load: string, schedule: string) =>
    runs.find((each) => each.load === load && each.schedule === schedule)!;
  const calm = run(`0.7 of ${usual}`, "free");
  bars.push({
    bar: `At 0.7 of the capacity of ${usual}, a free schedule refuses less than 2 % and none is late`,
    value: `${percent(calm.refused / calm.arrived, 1)} refused, ${calm.late} of ${calm.times.length} late`,
    met: calm.refused / calm.arrived < 0.02 && calm.late === 0,
  });
  for (const [factor, of] of trials.slice(1)) {
    const name = `${factor} of ${of}`;
    const free = run(name, "free");
    const fixed = runs.filter(({ load, schedule }) => load === name && schedule !== "free");
    const drawn = ({ times, arrived }: Poisson) => times.length / arrived;
    const best = fixed.reduce((a, b) => (drawn(b) > drawn(a) ? b : a));
    const ratio = drawn(free) / drawn(best);
    // Where there is no leaner schedule to go to, the machine is never idle: each disturbance of it makes promises late that
    // were given before. Then it is the margin that counts, which aims at one in a thousand.
    const most = of === leanest ? 0.001 : 0;
    bars.push({
      bar: `At ${factor} of the capacity of ${of}, a free schedule draws as many as the best fixed one (${best.schedule}) within 5 %, ${most === 0 ? "none" : "at most one in a thousand"} late`,
      value: `${percent(ratio)} of its pictures, ${free.late} of ${free.times.length} late (${best.schedule}: ${best.late} of ${best.times.length})`,
      met: ratio > 0.95 && free.late <= most * free.times.length,
    });
  }
  const loopP99 = Math.max(...runs.map(({ loopP99 }) => loopP99));
  bars.push({
    bar: "Under all these loads the server's event loop is delayed by less than 25 ms at the 99th percentile",
    value: `${loopP99.toFixed(1)} ms`,
    met: loopP99 < 25,
  });
  const text = (blocks: Readonly<Record<string, number>>) =>
    Object.entries(blocks)
      .sort(([, a], [, b]) => b - a)
      .map(([name, count]) => `${name} ${count}`)
      .join(", ");
  pages.push(`## Load

Random arrivals for ${seconds.toFixed(0)} s each in ${turns} turns, with a limit of ${deadlineMs} ms (six times what ${usual} takes alone). The load is relative to the throughput of 16
callers with one schedule, measured right before.

${table([
  ["load", "schedule", "arrivals/s", "arrived", "drawn", "refused", "late", "p50 ms", "p95 ms", "schedules drawn"],
  ...runs.map((row) => [
    ...[
      row.load,
      row.schedule,
      row.perSecond.toFixed(1),
      row.arrived,
      row.times.length,
      percent(row.refused / row.arrived, 1),
    ],
    ...[row.late, quantile(row.times, 0.5).toFixed(0), quantile(row.times, 0.95).toFixed(0), text(row.blocks)],
  ]),
])}`);
}

// ── What refused callers are told ────────────────────────────────────────────────────────────────────────────────────

async function retry(): Promise<void> {
  const server = await open({ maxQueue: 8 });
  const until = performance.now() + secondsOf("retry") * 1000;
  const options = { blocks: usual };
  // Alone: the queue is filled once, the next caller is refused, waits as long as it is told, and asks again.
  let [accepted, trials] = [0, 0];
  const waits: number[] = [];
  while (trials < 20 && performance.now() < until - secondsOf("retry") * 500) {
    await server.idle();
    const others = Array.from({ length: 24 }, () => server.draw(options));
    await pause(20);
    const first = await server.draw(options);
    if (first.status === 429) {
      trials++;
      waits.push(first.error!.retryAfterMs!);
      await pause(first.error!.retryAfterMs!);
      const again = await server.draw(options);
      if (again.status === 200) accepted++;
    }
    await Promise.all(others);
  }
  // Together: forty callers that all obey.
  const retries: number[] = [];
  let rounds = 0;
  while (rounds === 0 || (rounds < 3 && performance.now() < until)) {
    rounds++;
    await server.idle();
    await Promise.all(
      Array.from({ length: 40 }, async () => {
        for (let tries = 0; ; tries++) {
          const { status, error } = await server.draw(options);
          if (status === 200) {
            retries.push(tries);
            return;
          }
          if (status !== 429) throw new Error(`${status}: ${error?.message}`);
          await pause(error!.retryAfterMs!);
        }
      }),
    );
  }
  await server.stop();
  const mean = retries.reduce((sum, tries) => sum + tries, 0) / retries.length;
  results.retry = { trials, accepted, waits, rounds, retries };
  log(`retry: ${accepted} of ${trials} alone, ${mean.toFixed(2)} retries of ${retries.length}`);
  bars.push(
    {
      bar: "A caller who was refused by a full queue, and waits as long as it was told, is accepted in 9 of 10 trials",
      value: `${accepted} of ${trials}`,
      met: trials > 0 && accepted >= 0.9 * trials,
    },
    {
      bar: "40 callers that all obey are accepted within two retries on average",
      value: `${mean.toFixed(2)} (at most ${Math.max(...retries)})`,
      met: mean <= 2,
    },
  );
}

// ── Hang-ups ─────────────────────────────────────────────────────────────────────────────────────────────────────────

async function hangups(): Promise<void> {
  const server = await open({ maxQueue: 1000 });
  const before = (await server.idle()).stats.requests;
  const until = performance.now() + secondsOf("hangups") * 1000;
  let [gone, answered, wrong] = [0, 0, 0];
  while (performance.now() < until - 3000 || gone === 0) {
    await Promise.all(
      Array.from({ length: 16 }, async (_, index) => {
        const hangsUp = index % 2 === 1;
        const signal = hangsUp ? AbortSignal.timeout(1 + Math.floor(random() * 150)) : undefined;
        const outcome = await server.draw({ blocks: usual }, signal).catch(() => null);
        if (outcome === null) gone++;
        else if (outcome.status === 200) answered++;
        if (!hangsUp && outcome?.status !== 200) wrong++;
      }),
    );
  }
  const { stats } = await server.idle();
  await server.stop();
  const aborted = stats.requests.aborted - before.aborted;
  const failed = stats.requests.failed - before.failed;
  results.hangups = { gone, answered, wrong, aborted, failed };
  log(`hang-ups: ${gone} gone, ${answered} answered, ${wrong} wrong`);
  bars.push({
    bar: "Clients that hang up disturb no other, and nothing of theirs stays",
    value: `${gone} hung up, ${aborted} aborted, ${failed} failed; of the others ${wrong} without a picture`,
    // Some hang up before their call is accepted, or when it is already done.
    met: wrong === 0 && failed === 0 && aborted <= gone,
  });
}

// ── Kills and stops ──────────────────────────────────────────────────────────────────────────────────────────────────

async function deaths(): Promise<void> {
  const server = await open({ maxQueue: 1000, watchdogMs: 3000 });
  const options = { blocks: usual };
  const until = performance.now() + secondsOf("deaths") * 1000;
  let idleDrawn = 0;
  for (let trial = 0; trial < 9; trial++) {
    await server.idle();
    server.signal("SIGKILL");
    await pause(trial % 3 === 0 ? 0 : 50 * trial);
    if ((await server.draw(options)).status === 200) idleDrawn++;
  }
  let [busy, died, wrong, next, trials] = [0, 0, 0, 0, 0];
  while (trials < 9 && performance.now() < until - 15_000) {
    trials++;
    const calls = Array.from({ length: 4 }, () => server.draw(options));
    await pause(20 + 15 * trials);
    server.signal("SIGKILL");
    for (const { status, error } of await Promise.all(calls)) {
      busy++;
      if (status === 200) continue;
      if (error?.code === "ERR_FLOWTURBO_RUNTIME_DIED") died++;
      else wrong++;
    }
    if ((await server.draw(options)).status === 200) next++;
  }
  await server.idle();
  const stopped: number[] = [];
  let stoppedDrawn = 0;
  for (const isBusy of [false, true]) {
    const call = isBusy ? server.draw({ blocks: "H1P60" }) : null;
    if (isBusy) await pause(150);
    server.signal("SIGSTOP");
    const other = server.draw(options);
    for (const { status, milliseconds } of await Promise.all([other, ...(call ? [call] : [])])) {
      stopped.push(milliseconds);
      if (status === 200) stoppedDrawn++;
    }
  }
  const { health } = await server.state();
  await server.stop();
  results.deaths = { idleDrawn, trials, busy, died, wrong, next, stopped, stoppedDrawn, health };
  log(`deaths: ${idleDrawn} of 9 idle, ${died} of ${busy} died, ${stoppedDrawn} of ${stopped.length} stopped`);
  bars.push(
    {
      bar: "After the runtime was killed while idle, the next call draws, 9 of 9",
      value: `${idleDrawn} of 9`,
      met: idleDrawn === 9,
    },
    {
      bar: "Killed at work: calls draw or fail by their code, and the next call draws",
      value: `${busy - died - wrong} of ${busy} drawn, ${died} failed so, ${wrong} otherwise; next call: ${next} of ${trials}`,
      met: wrong === 0 && next === trials && trials > 0,
    },
    {
      bar: "A runtime that has stopped (watchdogMs 3000) is replaced: what waited for it is drawn",
      value: `${stoppedDrawn} of ${stopped.length}, after ${stopped.map((ms) => `${(ms / 1000).toFixed(1)} s`).join(", ")}`,
      met: stoppedDrawn === stopped.length,
    },
  );
}

// ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

async function memory(): Promise<void> {
  const server = await open({ maxQueue: 1000 });
  const until = performance.now() + secondsOf("memory") * 1000;
  const sizes: { readonly requests: number; readonly megabytes: number; readonly before: number }[] = [];
  let requests = 0;
  const batch = 100;
  // The first thousand are not counted: heaps and the runtime's arenas reach their size.
  while (requests < 3000 && performance.now() < until) {
    let left = batch;
    await Promise.all(
      Array.from({ length: 8 }, async () => {
        while (left-- > 0) await server.draw({ blocks: "H1", preview: "fast" });
      }),
    );
    requests += batch;
    // While there is memory enough V8 puts off collecting: what it keeps then is no growth.
    const before = residentBytes(server.pid) / 1e6;
    await server.post("/collect", {});
    sizes.push({ requests, megabytes: residentBytes(server.pid) / 1e6, before });
  }
  await server.stop();
  const counted = sizes.filter(({ requests }) => requests > 1000).map(({ megabytes }) => megabytes);
  const most = Math.max(...sizes.map(({ before }) => before));
  const quarter = Math.ceil(counted.length / 4);
  const early = quantile(counted.slice(0, quarter), 0.5);
  const late = quantile(counted.slice(-quarter), 0.5);
  results.memory = { requests, most, sizes };
  log(`memory: ${requests} requests, ${early.toFixed(0)} to ${late.toFixed(0)} MB`);
  bars.push({
    bar: "Over 2,000 requests, after a thousand others, memory does not grow: last quarter against first, resident after garbage is collected, below 1.05",
    value: `${requests} requests, ${early.toFixed(0)} MB to ${late.toFixed(0)} MB (before collecting at most ${most.toFixed(0)} MB)`,
    met: requests >= 3000 && late < 1.05 * early,
  });
}

// ── A quota of processor time ────────────────────────────────────────────────────────────────────────────────────────

async function quota(): Promise<void> {
  const cores = 1;
  const seconds = secondsOf("quota") / 10;
  const groups: { remove(): void }[] = [];
  const start = async (options: Body) => {
    const group = quotaGroup(cores);
    if (!group) return null;
    groups.push(group);
    return open({ maxQueue: 1000, ...options }, (pid) => writeFileSync(group.join, String(pid)));
  };
  const servers = { "default threads": await start({}), "threads: 1": await start({ threads: 1 }) };
  const [byDefault, one] = Object.values(servers);
  if (!byDefault || !one) {
    log("quota: not possible here");
    bars.push({ bar: "Under a quota of one core", value: "not measured: no cgroup can be made here", met: false });
    return;
  }
  const ratios: number[] = [];
  for (let round = 0; round < 4; round++) {
    const order = [byDefault, one];
    if (round % 2) order.reverse();
    const rates = new Map<Server, number>();
    for (const server of order) rates.set(server, await throughput(server, { blocks: usual }, seconds));
    ratios.push(rates.get(byDefault)! / rates.get(one)!);
  }
  await Promise.all([byDefault.stop(), one.stop()]);
  await pause(200);
  for (const { remove } of groups) remove();
  const median = quantile(ratios, 0.5);
  results.quota = { cores, ratios };
  log(`quota: ${median.toFixed(2)}`);
  bars.push({
    bar: "Under a quota of one core the default number of threads draws as many pictures as one thread, within 10 %",
    value: `${median.toFixed(2)} (${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)})`,
    met: median >= 0.9,
  });
}

// ── All ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

const run = { load, retry, hangups, deaths, memory, quota };
try {
  for (const part of parts) if (chosen.has(part)) await run[part]();
} finally {
  await rm(cache, { recursive: true, force: true });
}

const barTable = table([
  ["bar", "measured", ""],
  ...bars.map(({ bar, value, met }) => [bar, value, met ? "met" : "missed"]),
]);
await report(
  "operation",
  {
    minutes: Number(flags.minutes),
    parts: [...chosen],
    seconds: Math.round(performance.now() / 1000),
    bars,
    ...results,
  },
  `# A service in operation

\`npm run bench:operation -- --minutes ${flags.minutes}\` on ${machineLine()}

One server process with the embedded model at 64 px, tried over HTTP on loopback.

${barTable}

${pages.join("\n\n")}
`,
);
console.log(barTable);
