/**
 * A fleet in virtual time: gateways that admit by copies of the fleet's state (`lib/fleet/admission.ts`), queues, and workers whose launches are put
 * together by the scheduler of the library (`lib/serving/scheduler.ts`). What launches take is assumed, not measured.
 * Everything follows from the seed, except for the processor's time.
 */

import { DeadlineError, FleetEmptyError, QueueFullError } from "../../lib/errors.js";
import { FleetAdmission, type JobView, type WorkerView } from "../../lib/fleet/admission.js";
import type { Price, Prices } from "../../lib/fleet/classes.js";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import { deadlineMargin } from "../../lib/serving/deadline.js";
import type { RowLaunch } from "../../lib/serving/rows.js";
import { Scheduler, type Submission } from "../../lib/serving/scheduler.js";
import { cheapestSplit } from "../../lib/serving/split.js";

/** Operations of Redis for each event, as `INFO commandstats` counts them: those that BullMQ's scripts call are in it (bench/results/fleet.md has them by command). */
export const redisOperations = {
  /** A job is entered in the ledger and put into the queue, and its caller listens. */
  add: 17,
  /** A worker takes a job, and tells its state. */
  take: 20,
  /** A worker has taken a job and puts it back; beside having taken it. */
  handBack: 13,
  /** A busy worker with room asks, and finds nothing that it takes. */
  poll: 7,
  /** A worker tells its state. */
  beat: 2,
  /** A gateway reads the state. */
  refresh: 2,
  /** A step of a job is published. */
  event: 1,
  /** A job has ended: its result is put, read and told of, and the worker tells its state. */
  finish: 28,
} as const;
type Operation = keyof typeof redisOperations;

/** Assumed of the fastest workers: milliseconds of a launch of one row, by size, and how often such pictures are asked for. */
const sizes = [
  { size: "512x512", step: 20, decode: 20, share: 0.6 },
  { size: "768x768", step: 45, decode: 45, share: 0.25 },
  { size: "1024x1024", step: 80, decode: 80, share: 0.15 },
] as const;
const steps = { usual: 16, least: 8 } as const;
const pictureCounts = [
  { pictures: 1, share: 0.7 },
  { pictures: 2, share: 0.15 },
  { pictures: 4, share: 0.15 },
] as const;
/** Time limits, in times of the leanest schedule on the slowest worker. */
const limits = [
  { name: "none", least: 0, most: 0, share: 0.4 },
  { name: "tight", least: 2, most: 4, share: 0.3 },
  { name: "loose", least: 6, most: 12, share: 0.3 },
] as const;
const batches = [1, 2, 4];
/** A launch of several rows takes this part of its rows' time more than what it shares. */
const shared = 0.15;
/** Pictures that a worker lets in, as in `lib/serving/service.ts`. */
const capacity = 8;
/** Sizes that a worker keeps ready. */
const warmSizes = 2;
const mostHandBacks = 3;
const poll = { part: 1 / 16, least: 10, most: 250 } as const;
/** Between the decision and the queue. */
const addMs = 2;
const beatMs = { least: 50, most: 1000 } as const;
const bursts = { factor: 5, onMs: 1000, offMs: 4000 } as const;

export interface Setting {
  readonly workers: number;
  /** Arriving work, of what the workers can do one job after another with the leanest schedules. */
  readonly load: number;
  readonly arrivals: "poisson" | "bursts";
  readonly gateways: number;
  /** Milliseconds that a copy has been under way; null for the state of the very moment. */
  readonly ageMs: number | null;
  /** Between two copies. */
  readonly refreshMs: number;
  /** Deviation of the logarithm of what a launch takes. */
  readonly noise: number;
  /** Queues; a worker attends one. */
  readonly shards: number;
  /** How much slower every other worker is. */
  readonly slower: number;
  /** A busy worker asks for more only when it has no more work than this: milliseconds; infinite for whenever it has room. */
  readonly aheadMs: number;
  /** What a size takes first that a worker does not have ready. */
  readonly coldMs: number;
  /** Whether gateways are not told of promises that are broken while a size is made ready: their margin stays. */
  readonly excusesCold: boolean;
  /** Whether a worker that takes a job, or has drawn one, tells its state at the same moment. */
  readonly tellsTaken: boolean;
  /** Whether all requests have a limit. */
  readonly allLimited: boolean;
  readonly requests: number;
  readonly maxQueue: number;
  readonly seed: number;
}

export const usualSetting: Setting = {
  ...{ workers: 100, load: 0.8, arrivals: "poisson", gateways: 2, ageMs: 20, refreshMs: 50, noise: 0.08, shards: 1 },
  ...{
    slower: 1.6,
    aheadMs: 100,
    coldMs: 1000,
    tellsTaken: true,
    allLimited: false,
    excusesCold: true,
    requests: 4000,
    maxQueue: 100_000,
    seed: 1,
  },
};

export interface Outcome {
  /** Requests that came after the first fifth, which is not counted. */
  readonly requests: number;
  readonly accepted: number;
  readonly refused: { readonly deadline: number; readonly impossible: number; readonly full: number };
  /** Accepted requests with a limit, and how many of them were in time. */
  readonly promised: number;
  readonly kept: number;
  /** Of all requests with a limit, those that were in time. */
  readonly served: number;
  /** Draws that had to make a size ready first, jobs put back, and the part of the work that came too late. */
  readonly cold: number;
  readonly handedBack: number;
  readonly lateWork: number;
  readonly utilisation: number;
  readonly rowsPerLaunch: number;
  /** Operations of Redis in a second of the fleet's time. */
  readonly redis: Readonly<Record<Operation, number>>;
  readonly redisPerSecond: number;
  /** Processor's time of a decision, in microseconds, making the plan of a new copy included; and of a gateway's second, in milliseconds. */
  readonly admission: {
    readonly median: number;
    readonly p95: number;
    readonly mean: number;
    readonly msPerSecond: number;
  };
  readonly waiting: { readonly most: number };
  readonly seconds: number;
  /** For checks. */
  readonly totals: {
    readonly requests: number;
    readonly accepted: number;
    readonly refused: number;
    readonly finished: number;
    readonly busyMs: number;
    readonly launchedMs: number;
    readonly rows: number;
    readonly rowsWanted: number;
  };
}

interface Job {
  readonly view: JobView;
  readonly size: string;
  readonly counts: boolean;
  hands: number;
}

interface Inside {
  readonly job: Job;
  readonly number: number;
  readonly cost: number;
  readonly rows: number;
  done: number;
  /** Whether a size was made ready meanwhile. */
  isDisturbed: boolean;
}

interface Worker {
  readonly index: number;
  readonly shard: Shard;
  readonly speed: Speed;
  readonly pollMs: number;
  readonly scheduler: Scheduler;
  readonly inside: Map<number, Inside>;
  /** Sizes that are ready, the latest used last. */
  warm: string[];
  pictures: number;
  /** What is to be made ready before the next submission. */
  coldMs: number;
  running: { readonly start: number; readonly milliseconds: number; readonly costs: number } | null;
  isIdle: boolean;
  isPolling: boolean;
  view: WorkerView;
  isBeating: boolean;
}

interface Shard {
  readonly workers: Worker[];
  /** By priority. */
  readonly queue: Job[];
  /** Workers that wait for a job, the longest waiting first. */
  readonly idle: Worker[];
  readonly admissions: FleetAdmission[];
}

interface Limit {
  readonly name: string;
  readonly least: number;
  readonly most: number;
  readonly share: number;
}

interface Speed {
  readonly costs: CostTable;
  readonly prices: Prices;
}

/** Even, from 0 to 1. */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let value = Math.imul(state ^ (state >>> 15), state | 1);
    value ^= value + Math.imul(value ^ (value >>> 7), value | 61);
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32;
  };
}

function speedOf(factor: number): Speed {
  const cost = (batch: number) => factor * (shared + (1 - shared) * batch);
  const costs = new CostTable(
    sizes.flatMap(({ size, step, decode }) =>
      batches.flatMap((batch) => [
        entryOf("step", batch, size, [step * cost(batch)], 0),
        entryOf("decode", batch, size, [decode * cost(batch)], 0),
      ]),
    ),
  );
  const prices = new Map<string, Price>();
  for (const { size } of sizes)
    for (const { pictures } of pictureCounts) {
      const of = (graph: string) =>
        cheapestSplit(pictures, batches, (batch) => costs.usual(graph, size, batch)!).milliseconds;
      const price = (steps: number) => steps * of("step") + of("decode");
      prices.set(kindOf(size, pictures), {
        ms: price(steps.usual),
        leastMs: price(steps.least),
        blocks: `E${steps.least}`,
      });
    }
  return { costs, prices };
}

function kindOf(size: string, pictures: number): string {
  return `${size} x ${pictures}`;
}

const launchesOf = (size: string, steps: number): RowLaunch[] => [
  ...Array.from({ length: steps }, (): RowLaunch => ({ key: `step|${size}`, graph: "step", size })),
  { key: `decode|${size}`, graph: "decode", size, deferrable: true },
];

/** One of a list with shares that sum to one. */
function pick<T extends { readonly share: number }>(list: readonly T[], random: () => number): T {
  let left = random();
  for (const each of list) {
    left -= each.share;
    if (left < 0) return each;
  }
  return list.at(-1)!;
}

/** Milliseconds of the fastest worker that a request takes on average. */
function meanWork({ prices }: Speed, limits: readonly Limit[]): number {
  let sum = 0;
  for (const { size, share } of sizes)
    for (const { pictures, share: often } of pictureCounts) {
      const { ms, leastMs } = prices.get(kindOf(size, pictures))!;
      for (const { name, share: part } of limits) sum += share * often * part * (name === "none" ? ms : leastMs);
    }
  return sum;
}

const dueOf = ({ due, arrival }: JobView) => due ?? arrival + 60_000;

/** Events by moment. */
class Agenda {
  readonly #heap: { readonly at: number; readonly order: number; run(): void }[] = [];
  #order = 0;
  now = 0;

  add(at: number, run: () => void): void {
    const heap = this.#heap;
    const event = { at: Math.max(at, this.now), order: this.#order++, run };
    let index = heap.push(event) - 1;
    while (index > 0) {
      const parent = (index - 1) >> 1;
      if (!isBefore(event, heap[parent]!)) break;
      heap[index] = heap[parent]!;
      index = parent;
    }
    heap[index] = event;
  }

  /** @returns whether there was one */
  next(): boolean {
    const heap = this.#heap;
    const [first] = heap;
    if (!first) return false;
    const last = heap.pop()!;
    if (heap.length > 0) {
      let index = 0;
      for (let child = 1; child < heap.length; child = 2 * index + 1) {
        if (child + 1 < heap.length && isBefore(heap[child + 1]!, heap[child]!)) child++;
        if (!isBefore(heap[child]!, last)) break;
        heap[index] = heap[child]!;
        index = child;
      }
      heap[index] = last;
    }
    this.now = first.at;
    first.run();
    return true;
  }
}

function isBefore(a: { at: number; order: number }, b: { at: number; order: number }): boolean {
  return a.at < b.at || (a.at === b.at && a.order < b.order);
}

export function simulate(setting: Setting): Outcome {
  const random = randomOf(setting.seed);
  const mix = setting.allLimited ? limits.slice(1).map((limit) => ({ ...limit, share: 0.5 })) : limits;
  const agenda = new Agenda();
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const speeds = [speedOf(1), speedOf(setting.slower)];
  const operations = Object.fromEntries(Object.keys(redisOperations).map((name) => [name, 0])) as Record<
    Operation,
    number
  >;
  const warmUp = Math.floor(setting.requests / 5);
  let isMeasuring = warmUp === 0;
  const count = (operation: Operation, times = 1) => {
    if (isMeasuring) operations[operation] += times;
  };
  const measured = { from: 0, to: 0, busyMs: 0, launches: 0, rows: 0, workMs: 0, lateMs: 0 };
  const totals = {
    requests: 0,
    accepted: 0,
    refused: 0,
    finished: 0,
    busyMs: 0,
    launchedMs: 0,
    rows: 0,
    rowsWanted: 0,
  };
  const outcome = { requests: 0, accepted: 0, deadline: 0, impossible: 0, full: 0, promised: 0, kept: 0, limited: 0, cold: 0, handedBack: 0, most: 0 }; // biome-ignore format: one line
  const micros: number[] = [];
  const launches = new Map<string, RowLaunch[]>();
  let numbers = 0;

  // ── The fleet ──────────────────────────────────────────────────────────────────────────────────────────────────────

  const shards = Array.from({ length: setting.shards }, (_, index): Shard => {
    const spread = randomOf(setting.seed + 1000 + index);
    const admissions = Array.from(
      { length: setting.gateways },
      () => new FleetAdmission({ maxQueue: () => Math.ceil(setting.maxQueue / setting.shards), random: spread }),
    );
    return { workers: [], queue: [], idle: [], admissions };
  });
  const workers = Array.from({ length: setting.workers }, (_, index): Worker => {
    const shard = shards[index % setting.shards]!;
    const speed = speeds[Math.floor(index / setting.shards) % speeds.length]!;
    const { costs, prices } = speed;
    const usualMs = sizes.reduce((sum, { size, share }) => sum + share * prices.get(kindOf(size, 1))!.ms, 0);
    const worker: Worker = {
      ...{ index, shard, speed, inside: new Map(), pictures: 0, coldMs: 0, running: null },
      pollMs: Math.min(poll.most, Math.max(poll.least, usualMs * poll.part)),
      scheduler: new Scheduler({ batches, maxWaitMs: 8, preemption: false, costs }),
      ...{ warm: [sizes[0].size, sizes[1 + (index % 2)]!.size], isIdle: true, isPolling: false, isBeating: false },
      view: { takes: true, backlogMs: 0, at: 0, room: capacity, prices },
    };
    shard.workers.push(worker);
    shard.idle.push(worker);
    return worker;
  });

  const backlogOf = ({ inside, running, coldMs }: Worker) => {
    let left = coldMs;
    for (const { cost, rows, done } of inside.values()) left += cost * (1 - done / rows);
    return Math.max(0, left - (running ? Math.min(agenda.now - running.start, running.costs) : 0));
  };

  const look = (worker: Worker) => {
    const { speed, pictures } = worker;
    const room = capacity - pictures;
    worker.view = { takes: true, backlogMs: backlogOf(worker), at: agenda.now, room, prices: speed.prices };
  };

  /** A worker's state has changed. */
  const beat = (worker: Worker) => {
    if (worker.isBeating) return;
    worker.isBeating = true;
    agenda.add(worker.view.at + beatMs.least, () => {
      worker.isBeating = false;
      count("beat");
      look(worker);
    });
  };

  const isWarm = ({ warm }: Worker, size: string) => warm.includes(size);

  const insert = (shard: Shard, job: Job) => {
    const { queue } = shard;
    let [low, high] = [0, queue.length];
    const due = dueOf(job.view);
    while (low < high) {
      const middle = (low + high) >> 1;
      if (dueOf(queue[middle]!.view) <= due) low = middle + 1;
      else high = middle;
    }
    queue.splice(low, 0, job);
    outcome.most = Math.max(outcome.most, queue.length);
  };

  const wake = (shard: Shard) => {
    while (shard.queue.length > 0 && shard.idle.length > 0) {
      const worker = shard.idle.shift()!;
      worker.isIdle = false;
      ask(worker);
    }
  };

  /** A worker takes the first job if it has room for it; one without work then waits for the next. */
  const ask = (worker: Worker) => {
    const { shard, inside } = worker;
    const [job] = shard.queue;
    const isEmpty = inside.size === 0;
    if (job && (isEmpty || job.view.pictures <= capacity - worker.pictures)) {
      shard.queue.shift();
      count("take");
      const { size } = job;
      const isBetterElsewhere = () =>
        shard.workers.some((other) => other !== worker && isWarm(other, size) && other.view.room >= job.view.pictures);
      if (!isWarm(worker, size) && job.hands < mostHandBacks && isBetterElsewhere()) {
        job.hands++;
        count("handBack");
        if (job.counts) outcome.handedBack++;
        insert(shard, job);
        // It asks again when others have had time to.
        pollLater(worker);
        wake(shard);
        return;
      }
      begin(worker, job);
      pollLater(worker);
      return;
    }
    if (!isEmpty) {
      count("poll");
      pollLater(worker);
    } else if (!worker.isIdle) {
      worker.isIdle = true;
      shard.idle.push(worker);
    }
  };

  const pollLater = (worker: Worker) => {
    if (worker.isPolling) return;
    worker.isPolling = true;
    agenda.add(agenda.now + worker.pollMs, () => {
      worker.isPolling = false;
      if (worker.isIdle) return;
      const mayAsk = worker.inside.size === 0 || (worker.pictures < capacity && backlogOf(worker) <= setting.aheadMs);
      if (mayAsk) ask(worker);
      else pollLater(worker);
    });
  };

  const begin = (worker: Worker, job: Job) => {
    const { shard, speed } = worker;
    const { view, size } = job;
    const { now } = agenda;
    if (!isWarm(worker, size)) {
      worker.coldMs += setting.coldMs;
      for (const other of worker.inside.values()) other.isDisturbed = true;
      if (job.counts) outcome.cold++;
      if (worker.warm.length >= warmSizes) worker.warm.shift();
    } else worker.warm.splice(worker.warm.indexOf(size), 1);
    worker.warm.push(size);
    const { ms, leastMs } = speed.prices.get(view.kind)!;
    // A richer schedule where nothing waits and it fits.
    const isRich =
      view.due === null || (shard.queue.length === 0 && now + (backlogOf(worker) + ms) * deadlineMargin <= view.due);
    const wanted = isRich ? steps.usual : steps.least;
    const key = `${size} ${wanted}`;
    const list = launches.get(key) ?? launchesOf(size, wanted);
    launches.set(key, list);
    const number = numbers++;
    const rows = Array.from({ length: view.pictures }, () => list);
    const inside: Inside = {
      job,
      number,
      cost: isRich ? ms : leastMs,
      rows: list.length * rows.length,
      done: 0,
      isDisturbed: worker.coldMs > 0,
    };
    worker.inside.set(number, inside);
    worker.pictures += view.pictures;
    totals.rowsWanted += inside.rows;
    const { level, arrival, due } = view;
    const aim = due === null ? null : arrival + (due - arrival) / deadlineMargin;
    worker.scheduler.start(
      { id: number, priority: { level, due: aim, arrival, sequence: number }, rows, pin: null },
      now,
    );
    run(worker);
    if (setting.tellsTaken) look(worker);
    else beat(worker);
  };

  const run = (worker: Worker) => {
    if (worker.running) return;
    const submission = worker.scheduler.assign(agenda.now);
    if (!submission) return;
    let [milliseconds, costs] = [worker.coldMs, worker.coldMs];
    worker.coldMs = 0;
    for (const { graph, size, batch, rows } of submission.launches) {
      const cost = worker.speed.costs.usual(graph, size, batch)!;
      costs += cost;
      milliseconds += cost * (setting.noise > 0 ? Math.exp(setting.noise * normal()) : 1);
      totals.rows += rows.length;
      if (isMeasuring) {
        measured.launches++;
        measured.rows += rows.length;
      }
    }
    worker.running = { start: agenda.now, milliseconds, costs };
    totals.launchedMs += milliseconds;
    agenda.add(agenda.now + milliseconds, () => over(worker, submission));
  };

  const over = (worker: Worker, submission: Submission) => {
    const { now } = agenda;
    const { start, milliseconds } = worker.running!;
    worker.running = null;
    totals.busyMs += milliseconds;
    measured.busyMs += Math.max(0, Math.min(now, measured.to) - Math.max(start, measured.from));
    const moved = new Set<number>();
    for (const { rows } of submission.launches)
      for (const { job } of rows) {
        worker.inside.get(job)!.done++;
        moved.add(job);
      }
    count(
      "event",
      submission.launches.reduce((sum, { rows }) => sum + new Set(rows.map(({ job }) => job)).size, 0),
    );
    for (const id of worker.scheduler.finished(submission.id, now)) finish(worker, worker.inside.get(id)!);
    run(worker);
    if (worker.inside.size === 0) ask(worker);
  };

  const finish = (worker: Worker, inside: Inside) => {
    const { job, number, cost, isDisturbed } = inside;
    const { view } = job;
    const { now } = agenda;
    worker.inside.delete(number);
    worker.pictures -= view.pictures;
    count("finish");
    if (setting.tellsTaken) look(worker);
    else beat(worker);
    totals.finished++;
    const late = view.due !== null && now > view.due;
    if (job.counts) {
      measured.workMs += cost;
      if (late) measured.lateMs += cost;
      if (view.due !== null) {
        outcome.promised++;
        if (!late) outcome.kept++;
      }
    }
    for (const admission of worker.shard.admissions)
      admission.ended(view.id, { late: view.due === null || (setting.excusesCold && isDisturbed) ? null : late }, now);
  };

  // ── Gateways ───────────────────────────────────────────────────────────────────────────────────────────────────────

  const copyOf = (shard: Shard) => ({
    at: agenda.now,
    workers: shard.workers.map(({ view }) => view),
    jobs: shard.queue.map(({ view }) => view),
  });
  let isOver = false;
  const refresh = () => {
    if (isOver) return;
    count("refresh", setting.gateways * setting.shards);
    const copies = shards.map(copyOf);
    agenda.add(agenda.now + setting.ageMs!, () => {
      for (const [index, { admissions }] of shards.entries())
        for (const admission of admissions) admission.see(copies[index]!);
    });
    agenda.add(agenda.now + setting.refreshMs, refresh);
  };
  for (const { admissions } of shards)
    for (const admission of admissions) admission.see(copyOf(shards.find((shard) => shard.admissions === admissions)!));
  if (setting.ageMs !== null) refresh();

  const request = (index: number) => {
    const { now } = agenda;
    const counts = index >= warmUp;
    const { size } = pick(sizes, random);
    const { pictures } = pick(pictureCounts, random);
    const limit = pick(mix, random);
    const kind = kindOf(size, pictures);
    const slowest = speeds[1]!.prices.get(kind)!.leastMs;
    const times = limit.least + (limit.most - limit.least) * random();
    const deadlineMs = limit.name === "none" ? null : Math.round(times * slowest);
    const shard = shards[Math.floor(random() * shards.length)]!;
    const admission = shard.admissions[Math.floor(random() * setting.gateways)]!;
    const id = `j${index}`;
    if (setting.ageMs === null) {
      for (const worker of shard.workers) look(worker);
      admission.see(copyOf(shard));
    }
    totals.requests++;
    if (counts) {
      outcome.requests++;
      if (deadlineMs !== null) outcome.limited++;
    }
    const start = processorMicros();
    try {
      admission.admit({ id, kind, pictures, level: 0, arrival: now, deadlineMs }, now);
      if (counts) micros.push(processorMicros() - start);
      totals.accepted++;
      if (counts) outcome.accepted++;
      const view: JobView = {
        id,
        kind,
        pictures,
        level: 0,
        arrival: now,
        due: deadlineMs === null ? null : now + deadlineMs,
      };
      agenda.add(now + (setting.ageMs === null ? 0 : addMs), () => {
        count("add");
        admission.queued(id, agenda.now);
        insert(shard, { view, size, counts, hands: 0 });
        wake(shard);
      });
    } catch (error) {
      if (counts) micros.push(processorMicros() - start);
      totals.refused++;
      if (!(error instanceof DeadlineError || error instanceof QueueFullError || error instanceof FleetEmptyError))
        throw error;
      if (!counts) return;
      if (error instanceof QueueFullError) outcome.full++;
      else if (error instanceof DeadlineError && error.retryAfterMs !== null) outcome.deadline++;
      else outcome.impossible++;
    }
  };

  // ── Arrivals ───────────────────────────────────────────────────────────────────────────────────────────────────────

  const speedSum = workers.reduce(
    (sum, { index }) => sum + (Math.floor(index / setting.shards) % 2 ? 1 / setting.slower : 1),
    0,
  );
  const rate = (setting.load * speedSum) / meanWork(speeds[0]!, mix);
  const { factor, onMs, offMs } = bursts;
  const calm = rate / ((offMs + factor * onMs) / (offMs + onMs));
  let burst = { isOn: false, until: 0 };
  const exponential = (mean: number) => -mean * Math.log(1 - random());
  const rateNow = () => {
    if (setting.arrivals === "poisson") return rate;
    while (agenda.now >= burst.until)
      burst = { isOn: !burst.isOn, until: burst.until + exponential(burst.isOn ? offMs : onMs) };
    return burst.isOn ? factor * calm : calm;
  };
  measured.to = Number.POSITIVE_INFINITY;
  const arrive = (index: number) => {
    if (index === warmUp) {
      isMeasuring = true;
      measured.from = agenda.now;
      measured.busyMs = 0;
    }
    request(index);
    if (index + 1 < setting.requests) agenda.add(agenda.now + exponential(1 / rateNow()), () => arrive(index + 1));
    else {
      isMeasuring = false;
      isOver = true;
      measured.to = agenda.now;
      for (const { running } of workers)
        if (running) measured.busyMs += Math.max(0, agenda.now - Math.max(running.start, measured.from));
      measured.from = Number.POSITIVE_INFINITY;
    }
  };
  agenda.add(exponential(1 / rate), () => arrive(0));
  const beatAll = () => {
    for (const worker of workers)
      if (agenda.now - worker.view.at >= beatMs.most) {
        count("beat");
        look(worker);
      }
    if (!isOver) agenda.add(agenda.now + beatMs.most / 10, beatAll);
  };
  if (setting.ageMs !== null) beatAll();
  let from = 0;
  while (agenda.next()) if (measured.from !== Number.POSITIVE_INFINITY) from = measured.from;

  const seconds = (measured.to - from) / 1000;
  const redis = Object.fromEntries(
    Object.entries(redisOperations).map(([name, each]) => [name, (each * operations[name as Operation]) / seconds]),
  ) as Record<Operation, number>;
  const cpu = micros.reduce((sum, each) => sum + each, 0);
  const { requests, accepted, deadline, impossible, full, promised, kept, limited, cold, handedBack, most } = outcome;
  return {
    ...{ requests, accepted, refused: { deadline, impossible, full }, promised, kept },
    ...{ served: kept / limited, cold, handedBack, lateWork: measured.lateMs / measured.workMs },
    utilisation: measured.busyMs / (1000 * seconds * setting.workers),
    rowsPerLaunch: measured.rows / measured.launches,
    ...{ redis, redisPerSecond: Object.values(redis).reduce((sum, each) => sum + each, 0) },
    admission: {
      ...{ median: quantile(micros, 0.5), p95: quantile(micros, 0.95), mean: cpu / micros.length },
      msPerSecond: cpu / 1000 / seconds / setting.gateways,
    },
    ...{ waiting: { most }, seconds, totals },
  };
}

/** Of the process: what other processes take of the machine is not in it. */
export function processorMicros(): number {
  const { user, system } = process.cpuUsage();
  return user + system;
}

function quantile(values: readonly number[], part: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor(part * (sorted.length - 1))] ?? Number.NaN;
}
