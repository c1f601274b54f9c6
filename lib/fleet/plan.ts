/**
 * The list schedule of a fleet: each waiting job in order goes to the worker that would finish it first. A plan is made of one copy of
 * the fleet's state and stays right while time passes: what it says has begun meanwhile has begun, also where the copy does not show it
 * yet.
 *
 * Workers of a class are a heap of the moments at which they are free. The heaps are kept for every so many jobs, so that the state before
 * any job is found by placing a few; what a new job changes is found by placing those behind it again.
 */

/** A job as the plan sees it. */
export interface PlannedJob {
  /** Milliseconds that it takes, by class. */
  readonly costs: readonly number[];
  /** Promised moment; infinite for none. */
  readonly due: number;
}

/** Where a new job would be placed. */
export interface Placement {
  readonly worker: number;
  readonly start: number;
  readonly finish: number;
}

/** Jobs between two states that are kept. */
const interval = 128;

export class Plan<Job extends PlannedJob> {
  readonly #jobs: Job[];
  /** Where the heap of a class begins; one more for the end of the last. */
  readonly #offsets: number[] = [0];
  /** All heaps, before every `interval`-th job. */
  readonly #marks: Float64Array[] = [];
  /** The heaps that are worked on. */
  readonly #heaps: Float64Array;
  #start: Float64Array;
  #finish: Float64Array;
  #class: Uint16Array;
  /** The latest start of all up to a job, and the earliest of all from it on. */
  #latest: Float64Array;
  #earliest: Float64Array;
  /** The last job that has a promise, or -1. */
  #lastPromise = -1;
  /** Where `#put` has put a job. */
  #placed = { worker: 0, start: 0, finish: 0 };

  /**
   * @param free moments at which workers are free, by class
   * @param jobs in order
   */
  constructor(free: readonly (readonly number[])[], jobs: readonly Job[], now: number) {
    for (const each of free) this.#offsets.push(this.#offsets.at(-1)! + each.length);
    this.#heaps = new Float64Array(this.#offsets.at(-1)!);
    // A sorted array is a heap.
    for (const [index, each] of free.entries())
      this.#heaps.set(Float64Array.from(each, (moment) => Math.max(now, moment)).sort(), this.#offsets[index]!);
    const capacity = jobs.length + interval;
    this.#class = new Uint16Array(capacity);
    this.#start = new Float64Array(capacity);
    this.#finish = new Float64Array(capacity);
    this.#latest = new Float64Array(capacity);
    this.#earliest = new Float64Array(capacity);
    this.#jobs = [...jobs];
    this.#marks.push(this.#heaps.slice());
    for (let index = 0; index < jobs.length; index++) {
      this.#place(index, now);
      if (Number.isFinite(jobs[index]!.due)) this.#lastPromise = index;
    }
    this.#measure(0);
  }

  get jobs(): readonly Job[] {
    return this.#jobs;
  }

  startOf(index: number): number {
    return this.#start[index]!;
  }

  finishOf(index: number): number {
    return this.#finish[index]!;
  }

  /** The first job that has not begun before now; some behind it may have. */
  firstWaiting(now: number): number {
    return lowerBound(0, this.#jobs.length, (index) => this.#latest[index]! >= now);
  }

  /** Jobs that begin later, of all before the job at `until`. */
  waiting(now: number, until = this.#jobs.length): number {
    const first = Math.min(until, this.firstWaiting(now));
    const end = Math.min(until, this.#endOfBegun(now));
    let waiting = until - first;
    for (let index = first; index < end; index++) if (this.#start[index]! <= now) waiting--;
    return waiting;
  }

  /** Milliseconds of work that are left of all that is accepted, summed over the workers. */
  work(now: number): number {
    this.#load(this.#jobs.length, now);
    let sum = 0;
    for (const free of this.#heaps) sum += Math.max(0, free - now);
    return sum;
  }

  /** Where a job would go that is put before the job at `position`. Jobs that have begun stay where they are. */
  find(costs: readonly number[], position: number, now: number): Placement {
    this.#load(position, now);
    this.#put(costs, now);
    return { ...this.#placed };
  }

  /**
   * Whether a job that is put before the job at `position` makes a later one break its promise: without it that one would end in
   * time, or with the margin to spare, and no more with it. One that is late in any case does not count.
   * @param margin factor that predictions leave free
   */
  harms(costs: readonly number[], position: number, now: number, margin: number): boolean {
    if (position > this.#lastPromise) return false;
    this.#load(position, now);
    this.#put(costs, now);
    for (let index = position; index <= this.#lastPromise; index++) {
      if (this.#start[index]! < now) continue;
      const { costs, due } = this.#jobs[index]!;
      this.#put(costs, now);
      const { finish } = this.#placed;
      const before = this.#finish[index]!;
      if (finish <= before || due === Number.POSITIVE_INFINITY) continue;
      const aim = now + (due - now) / margin;
      if ((finish > aim && before <= aim) || (finish > due && before <= due)) return true;
    }
    return false;
  }

  /** Puts a job before the job at `position`. */
  insert(job: Job, position: number, now: number): Placement {
    const at = this.#separate(position, now);
    this.#grow();
    this.#load(at, now);
    this.#jobs.splice(at, 0, job);
    if (this.#lastPromise >= at) this.#lastPromise++;
    else if (Number.isFinite(job.due)) this.#lastPromise = at;
    this.#forgetMarks(at);
    for (let index = at; index < this.#jobs.length; index++) this.#place(index, now);
    this.#measure(at);
    return { worker: this.#class[at]!, start: this.#start[at]!, finish: this.#finish[at]! };
  }

  /**
   * Moves jobs behind `position` that have begun before it, so that all that follows can be placed again.
   * @returns the position behind them
   */
  #separate(position: number, now: number): number {
    const end = this.#endOfBegun(now);
    if (end <= position) return position;
    const range = Array.from({ length: end - position }, (_, offset) => position + offset);
    const begun = range.filter((index) => this.#start[index]! < now);
    if (begun.length < range.length) {
      const order = [...begun, ...range.filter((index) => this.#start[index]! >= now)];
      const moved = order.map((index) => ({
        ...{ job: this.#jobs[index]!, worker: this.#class[index]! },
        ...{ start: this.#start[index]!, finish: this.#finish[index]! },
      }));
      for (const [offset, { job, worker, start, finish }] of moved.entries()) {
        const index = position + offset;
        this.#jobs[index] = job;
        this.#class[index] = worker;
        this.#start[index] = start;
        this.#finish[index] = finish;
      }
      // What was kept in the range was kept in another order.
      this.#forgetMarks(position);
      if (this.#lastPromise >= position && this.#lastPromise < end) this.#lastPromise = end - 1;
      this.#measure(position);
    }
    return position + begun.length;
  }

  /** Behind the last job that has begun, or begins now. */
  #endOfBegun(now: number): number {
    return lowerBound(0, this.#jobs.length, (index) => this.#earliest[index]! > now);
  }

  /** Places a job behind those before it, and keeps it. */
  #place(index: number, now: number): void {
    this.#mark(index);
    this.#put(this.#jobs[index]!.costs, now);
    const { worker, start, finish } = this.#placed;
    this.#class[index] = worker;
    this.#start[index] = start;
    this.#finish[index] = finish;
  }

  /** Gives a job to the worker that finishes it first. */
  #put(costs: readonly number[], now: number): void {
    const offsets = this.#offsets;
    const placed = this.#placed;
    placed.finish = Number.POSITIVE_INFINITY;
    for (let index = 0; index < costs.length; index++) {
      const start = Math.max(now, this.#heaps[offsets[index]!]!);
      const finish = start + costs[index]!;
      if (finish >= placed.finish) continue;
      placed.worker = index;
      placed.start = start;
      placed.finish = finish;
    }
    this.#replace(placed.worker, placed.finish);
  }

  /** The heaps when all jobs before `position`, and all that have begun, have been placed. */
  #load(position: number, now: number): void {
    const mark = Math.min(this.#marks.length - 1, Math.floor(position / interval));
    this.#heaps.set(this.#marks[mark]!);
    for (let index = mark * interval; index < position; index++) {
      this.#mark(index);
      this.#replace(this.#class[index]!, this.#finish[index]!);
    }
    const end = this.#endOfBegun(now);
    for (let index = position; index < end; index++)
      if (this.#start[index]! < now) this.#replace(this.#class[index]!, this.#finish[index]!);
  }

  /** The first free worker of a class is free at another moment. */
  #replace(worker: number, moment: number): void {
    const heaps = this.#heaps;
    const from = this.#offsets[worker]!;
    const size = this.#offsets[worker + 1]! - from;
    let at = 0;
    for (let child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && heaps[from + child + 1]! < heaps[from + child]!) child++;
      const value = heaps[from + child]!;
      if (value >= moment) break;
      heaps[from + at] = value;
      at = child;
    }
    heaps[from + at] = moment;
  }

  /** Keeps the heaps, which all jobs before `index` have been placed in. */
  #mark(index: number): void {
    if (index === this.#marks.length * interval) this.#marks.push(this.#heaps.slice());
  }

  #forgetMarks(position: number): void {
    this.#marks.length = Math.min(this.#marks.length, Math.floor(position / interval) + 1);
  }

  /** Starts have changed from a job on. */
  #measure(from: number): void {
    for (let index = from; index < this.#jobs.length; index++)
      this.#latest[index] = Math.max(this.#start[index]!, index > 0 ? this.#latest[index - 1]! : 0);
    for (let index = this.#jobs.length - 1; index >= 0; index--) {
      const after = index + 1 < this.#jobs.length ? this.#earliest[index + 1]! : Number.POSITIVE_INFINITY;
      const earliest = Math.min(this.#start[index]!, after);
      if (index < from && this.#earliest[index] === earliest) break;
      this.#earliest[index] = earliest;
    }
  }

  #grow(): void {
    if (this.#jobs.length < this.#start.length) return;
    const grown = <Array extends Float64Array | Uint16Array>(array: Array, larger: Array): Array => {
      larger.set(array);
      return larger;
    };
    const capacity = 2 * this.#start.length;
    this.#class = grown(this.#class, new Uint16Array(capacity));
    this.#start = grown(this.#start, new Float64Array(capacity));
    this.#finish = grown(this.#finish, new Float64Array(capacity));
    this.#latest = grown(this.#latest, new Float64Array(capacity));
    this.#earliest = grown(this.#earliest, new Float64Array(capacity));
  }
}

/** The first of a range that a condition holds for, where it holds for all that follow; the end if for none. */
export function lowerBound(from: number, to: number, holds: (index: number) => boolean): number {
  let [low, high] = [from, to];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}
