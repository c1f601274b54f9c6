/**
 * Which rows share the next launch: the state of all requests in flight, and every decision about them, without a
 * clock, a runtime or a tensor, so that it can be tested under any sequence of events.
 *
 * A request has rows, a row has launches in a fixed order. Rows whose next launches have the same key may share one,
 * wherever each is in its schedule. What happens is told by method calls (`start`, `abort`, `finished`, `failed`); what
 * to do next is asked for with `plan`, which hands out a piece of a few launches. A row advances when it is planned, not
 * when it has run: pieces run in the order of planning, so that the next piece can be planned and submitted while this
 * one runs.
 *
 * After a failure nobody pays for another's mistake. A piece of one request fails that request. A piece of several says
 * nothing about who is to blame: each of them starts again, from now on in pieces of its own. Pieces that were planned
 * behind one that failed, on the values which that should have left, cannot run; their requests start again, too.
 */

import { comparePriorities, type Priority } from "./priority.js";
import { type BatchCost, cheapestSplit } from "./split.js";

/** A launch that a row makes. */
export interface RowLaunch {
  /** Rows may share a launch if their keys are equal: the same graph, size and operands that are not per row. */
  readonly key: string;
  readonly graph: string;
  readonly size: string;
  /** At most this many rows in one launch. */
  readonly maxRows: number;
  /** Worth waiting for company: launches that leave the device half empty (refiners, coarse stages). */
  readonly deferrable: boolean;
}

export interface Ticket {
  readonly id: number;
  readonly claim: Priority;
  /** Launches of each row. */
  readonly rows: readonly (readonly RowLaunch[])[];
  /** Every launch is padded to this batch, or to as much of it as `maxRows` allows. */
  readonly pin: number | null;
}

/** A row's place in a launch. */
export interface PlannedRow {
  readonly request: number;
  /** How often the request has been started. */
  readonly attempt: number;
  readonly row: number;
  /** Index among the row's launches. */
  readonly launch: number;
  /** Whether this is the row's last launch. */
  readonly last: boolean;
}

export interface PlannedLaunch {
  readonly graph: string;
  readonly size: string;
  /** At least the number of rows; the rest is padding. */
  readonly batch: number;
  readonly rows: readonly PlannedRow[];
}

/** What is submitted at once: launches in order. */
export interface Submission {
  readonly id: number;
  readonly launches: readonly PlannedLaunch[];
  /** Whether these are all launches that are left of the only request: to be cut short when somebody comes. */
  readonly whole: boolean;
}

export interface SchedulerOptions {
  /** Compiled batches. */
  readonly batches: readonly number[];
  readonly maxBatch: number;
  /** How long a row may be held for company that is on its way, in milliseconds. */
  readonly maxWait: number;
  /** Whether pieces can be cut short. */
  readonly cuts?: boolean;
  /** Milliseconds of a launch, or null if nothing is known about it. */
  readonly cost: (graph: string, size: string, batch: number) => number | null;
  /** As `cost`, but in any unit where nothing is known. */
  readonly relativeCost: (graph: string, size: string, batch: number) => number;
}

/** What a failure comes to. */
export interface Verdict {
  /** Requests that the failure belongs to; they are over. */
  readonly rejected: readonly number[];
  /** Requests that start again from their first launch. */
  readonly restarted: readonly number[];
}

/**
 * A piece takes at least this long, so that telling the runtime and hearing of it costs little: about half a millisecond of
 * a core, while a step of a small picture takes eight. A request that has the device to itself holds nobody up by longer
 * pieces: where they can be cut short, all of it is one, and who comes behind it waits for one launch; else who comes waits
 * for at most two of them.
 */
const submissionMilliseconds = { whole: Number.POSITIVE_INFINITY, alone: 40, shared: 10 } as const;

/**
 * How much cheaper rows of several requests must be together, as a part of their cost alone. Sharing delays the more urgent
 * row, so that it has to pay beyond doubt. Eager launches are shared even at a loss: they are short, and company is rare.
 * Rows of one request have the same end: what is cheapest is best for all of them.
 */
const gainNeeded = { usual: 0.02, deferrable: -0.1 } as const;

/** Rows of a group that a split is planned for. More of them do not change the first batch, which is all that is planned. */
const rowsAhead = { least: 64, batches: 4 } as const;

/** Who would come late by more than this part of the time that was given is not waited for. */
const hopelessPart = 0.25;

interface Row {
  readonly request: Request;
  readonly index: number;
  readonly launches: readonly RowLaunch[];
  /** The next launch to plan. */
  next: number;
  /** Since when that one could have been planned. */
  since: number;
  /** Launches that have run. */
  done: number;
}

interface Request {
  readonly ticket: Ticket;
  readonly rows: Row[];
  /** For each launch, milliseconds from it to the end, if the request has the device to itself; null if not known. */
  readonly left: readonly number[] | null;
  attempt: number;
  /** Whether its pieces hold no other request. */
  isolated: boolean;
}

export class Scheduler {
  readonly #options: SchedulerOptions;
  readonly #requests = new Map<number, Request>();
  readonly #inFlight = new Map<number, Submission>();
  #pieces = 0;

  constructor(options: SchedulerOptions) {
    this.#options = options;
  }

  /** Requests that have been started and are not over. */
  get requests(): number {
    return this.#requests.size;
  }

  /** Their rows. */
  get rows(): number {
    let rows = 0;
    for (const request of this.#requests.values()) rows += request.rows.length;
    return rows;
  }

  /** Pieces that were planned and are neither finished nor failed. */
  get inFlight(): number {
    return this.#inFlight.size;
  }

  /** The piece in flight that somebody waits for, and that is to be cut short: nothing is planned before it is over. */
  get inTheWay(): number | null {
    return this.#requests.size > 1 ? (this.#whole?.id ?? null) : null;
  }

  /** The piece in flight that holds all that was left of a request. */
  get #whole(): Submission | undefined {
    return [...this.#inFlight.values()].find(({ whole }) => whole);
  }

  /** @throws RangeError for an id in use, or a request without rows or with a row without launches */
  start(ticket: Ticket, now: number): void {
    if (this.#requests.has(ticket.id)) throw new RangeError(`There is a request ${ticket.id} already.`);
    if (ticket.rows.length === 0 || ticket.rows.some((launches) => launches.length === 0))
      throw new RangeError("A request needs rows with launches.");
    const request: Request = { ticket, rows: [], left: this.#left(ticket), attempt: 0, isolated: false };
    for (const [index, launches] of ticket.rows.entries())
      request.rows.push({ request, index, launches, next: 0, since: now, done: 0 });
    this.#requests.set(ticket.id, request);
  }

  /**
   * Removes a request; unknown ones are ignored.
   * @returns pieces in flight that need not run: they run for nobody, and no piece that does run for somebody reads what
   *   they write (a shared launch still gathers the rows of a request that is gone)
   */
  abort(id: number): number[] {
    if (!this.#requests.delete(id)) return [];
    const droppable: number[] = [];
    const needed = new Set<string>();
    for (const piece of [...this.#inFlight.values()].reverse()) {
      const members = membersOf(piece);
      if (this.#isWanted(piece) || members.some((member) => needed.has(member)))
        for (const member of members) needed.add(member);
      else droppable.push(piece.id);
    }
    return droppable.reverse();
  }

  #left({ rows, pin }: Ticket): number[] | null {
    const longest = rows.reduce((a, b) => (b.length > a.length ? b : a));
    const left: number[] = new Array(longest.length + 1).fill(0);
    for (let index = longest.length - 1; index >= 0; index--) {
      const { graph, size, maxRows } = longest[index]!;
      const limit = Math.min(pin ?? this.#options.maxBatch, maxRows);
      const batches = pin === null ? this.#batches(limit) : [limit];
      const cost = (batch: number) => this.#options.cost(graph, size, batch);
      if (cost(batches[0]!) === null) return null;
      const { milliseconds } = cheapestSplit(rows.length, batches, (batch) => cost(batch)!);
      left[index] = left[index + 1]! + milliseconds;
    }
    return left;
  }

  /** The next piece; null if every launch of every request has been planned, or a piece is in the way. */
  plan(now: number): Submission | null {
    if (this.#whole) return null;
    const launches: PlannedLaunch[] = [];
    let alone: Request | null = null;
    let isAll = false;
    const isOnly = this.#requests.size === 1;
    const least = submissionMilliseconds[isOnly ? (this.#options.cuts ? "whole" : "alone") : "shared"];
    for (let milliseconds = 0; milliseconds < least; ) {
      const rows = this.#choose(now, alone);
      if (!rows) {
        isAll = true;
        break;
      }
      const { request } = rows[0]!;
      // A request that runs alone has pieces of its own, from the first launch to the last.
      if (request.isolated && launches.length > 0 && alone !== request) break;
      if (request.isolated) alone = request;
      const launch = this.#launch(rows, now, now + this.#ahead() + milliseconds);
      launches.push(launch);
      milliseconds += this.#options.cost(launch.graph, launch.size, launch.batch) ?? Number.POSITIVE_INFINITY;
    }
    if (launches.length === 0) return null;
    const piece = { id: this.#pieces++, launches, whole: isOnly && isAll && (this.#options.cuts ?? false) };
    this.#inFlight.set(piece.id, piece);
    return piece;
  }

  /** A piece has run. @returns the requests that it has completed */
  finished(id: number): number[] {
    const piece = this.#take(id);
    const over: number[] = [];
    for (const { rows } of piece.launches)
      for (const planned of rows) {
        const request = this.#current(planned);
        if (!request) continue;
        request.rows[planned.row]!.done++;
        if (request.rows.every(({ done, launches }) => done === launches.length)) {
          this.#requests.delete(planned.request);
          over.push(planned.request);
        }
      }
    return over;
  }

  /**
   * A whole piece was cut short: its other launches are to be planned again.
   * @param made launches that have run
   */
  cut(id: number, made: number, now: number): void {
    for (const [index, { rows }] of this.#take(id).launches.entries())
      for (const planned of rows) {
        const row = this.#current(planned)?.rows[planned.row];
        if (!row) continue;
        if (index < made) row.done++;
        else {
          row.next = Math.min(row.next, planned.launch);
          row.since = now;
        }
      }
  }

  /**
   * A piece has failed.
   * @param lost whether all registers are gone with it: every request starts again, and no piece in flight counts
   */
  failed(id: number, lost: boolean, now: number): Verdict {
    const piece = this.#take(id);
    const rejected: number[] = [];
    const again = new Set<Request>();
    const involved = this.#involved(piece);
    if (involved.size === 1) {
      const [request] = involved as Set<Request>;
      this.#requests.delete(request!.ticket.id);
      rejected.push(request!.ticket.id);
    } else
      for (const request of involved) {
        request.isolated = true;
        again.add(request);
      }
    // At once, before anything is planned beside them: else each of them could spoil a piece behind it, for ever.
    for (const spoilt of this.#spoiltBy(piece)) for (const request of this.#involved(spoilt)) again.add(request);
    if (lost) {
      this.#inFlight.clear();
      for (const request of this.#requests.values()) again.add(request);
    }
    for (const request of again) restart(request, now);
    return { rejected, restarted: [...again].map(({ ticket }) => ticket.id) };
  }

  /** Requests, not over, with rows in a piece. */
  #involved(piece: Submission): Set<Request> {
    const involved = new Set<Request>();
    for (const { rows } of piece.launches)
      for (const planned of rows) {
        const request = this.#current(planned);
        if (request) involved.add(request);
      }
    return involved;
  }

  /** Pieces in flight that read what a piece that failed should have written, or what such a piece should have. */
  #spoiltBy(failed: Submission): Submission[] {
    const missing = new Set(membersOf(failed));
    const spoilt: Submission[] = [];
    for (const piece of this.#inFlight.values()) {
      const members = membersOf(piece);
      if (piece.id < failed.id || !members.some((member) => missing.has(member))) continue;
      spoilt.push(piece);
      for (const member of members) missing.add(member);
    }
    return spoilt;
  }

  #take(id: number): Submission {
    const piece = this.#inFlight.get(id);
    if (!piece) throw new RangeError(`There is no piece ${id} in flight.`);
    this.#inFlight.delete(id);
    return piece;
  }

  #isWanted(piece: Submission): boolean {
    return piece.launches.some(({ rows }) => rows.some((row) => this.#current(row)));
  }

  /** The request that a planned row belongs to, unless it is over or has been started again since. */
  #current({ request: id, attempt }: PlannedRow): Request | null {
    const request = this.#requests.get(id);
    return request?.attempt === attempt ? request : null;
  }

  /** The rows of the next launch, most urgent first; more than fit into one. Null if there are none. */
  #choose(now: number, alone: Request | null): Row[] | null {
    const waiting: Row[] = [];
    for (const request of this.#requests.values())
      if (alone === null || request === alone)
        for (const row of request.rows) if (row.next < row.launches.length) waiting.push(row);
    if (waiting.length === 0) return null;
    waiting.sort(
      (a, b) =>
        comparePriorities(a.request.ticket.claim, b.request.ticket.claim, now) || a.next - b.next || a.index - b.index,
    );
    const groups = new Map<string, Row[]>();
    for (const row of waiting) {
      const key = groupOf(row);
      const group = groups.get(key);
      if (group) group.push(row);
      else groups.set(key, [row]);
    }
    for (const group of groups.values()) if (!this.#isHeld(group, waiting, now)) return group;
    return groups.values().next().value!;
  }

  /** Whether a group waits for another row that will make the same launch soon enough. */
  #isHeld(group: readonly Row[], waiting: readonly Row[], now: number): boolean {
    const [first] = group as [Row];
    const launch = first.launches[first.next]!;
    if (!launch.deferrable || first.request.isolated || group.length >= this.#limit(first)) return false;
    // Who has a time limit waits only where there is plenty of time.
    const { claim } = first.request.ticket;
    if (claim.deadline !== null && claim.deadline - now < 2 * (first.request.left?.[first.next] ?? 0)) return false;
    // The one that has waited longest decides.
    const patience = this.#options.maxWait - (now - Math.min(...group.map(({ since }) => since)));
    if (patience <= 0) return false;
    const key = groupOf(first);
    return waiting.some((row) => !group.includes(row) && this.#timeUntil(row, key, patience) <= patience);
  }

  /** Milliseconds until a row makes a launch of this group, if it runs alone; infinite where costs are not known. */
  #timeUntil(row: Row, key: string, limit: number): number {
    let milliseconds = 0;
    for (let index = row.next; index < row.launches.length && milliseconds <= limit; index++) {
      const launch = row.launches[index]!;
      if (groupOf(row, index) === key) return milliseconds;
      milliseconds += this.#options.cost(launch.graph, launch.size, 1) ?? Number.POSITIVE_INFINITY;
    }
    return Number.POSITIVE_INFINITY;
  }

  /** Rows that a launch of this row's group may have. */
  #limit(row: Row): number {
    const { pin } = row.request.ticket;
    return Math.max(1, Math.min(pin ?? this.#options.maxBatch, row.launches[row.next]!.maxRows));
  }

  /**
   * Plans the launch of the first rows of a group, as many as pay.
   * @param start when it will begin
   */
  #launch(group: readonly Row[], now: number, start: number): PlannedLaunch {
    const [first] = group as [Row];
    const { graph, size } = first.launches[first.next]!;
    const limit = this.#limit(first);
    let batch = limit;
    if (first.request.ticket.pin === null) {
      batch = this.#batch(group, limit);
      // Company delays the urgent: no more of it than everybody's time limit allows.
      while (batch > 1 && this.#makesLate(group.slice(0, batch), batch, now, start))
        batch = this.#batch(group.slice(0, batch - 1), batch - 1);
    }
    const rows = group.slice(0, batch).map((row): PlannedRow => {
      const launch = row.next++;
      row.since = now;
      const { ticket, attempt } = row.request;
      return { request: ticket.id, attempt, row: row.index, launch, last: row.next === row.launches.length };
    });
    return { graph, size, batch, rows };
  }

  /**
   * Whether somebody would come late if these rows share the next launch and everybody is served in the order of urgency
   * after it, who would not if the most urgent request had it to itself.
   */
  #makesLate(rows: readonly Row[], batch: number, now: number, start: number): boolean {
    const [first] = rows as [Row];
    const { graph, size } = first.launches[first.next]!;
    const own = rows.filter(({ request }) => request === first.request).length;
    if (own === rows.length && batch === own) return false;
    const shared = this.#options.cost(graph, size, batch);
    if (shared === null) return false;
    const waiting = [...this.#requests.values()].sort((a, b) => comparePriorities(a.ticket.claim, b.ticket.claim, now));
    // Milliseconds until the requests so far are done, with the shared launch and without it.
    let withIt = shared;
    let without = 0;
    for (const request of waiting) {
      const left = leftOf(request);
      const inIt = rows.filter((row) => row.request === request).length;
      const part = inIt === 0 ? 0 : ((left[0] - left[1]) * inIt) / request.rows.length;
      without += left[0];
      withIt += left[0] - part;
      const { deadline, arrival } = request.ticket.claim;
      if (deadline === null || withIt <= without) continue;
      // For those that are hopelessly late nobody is held up.
      const hopeless = deadline + hopelessPart * (deadline - arrival);
      // With room for one more such launch: nothing that has begun is interrupted for what arrives behind it.
      if (start + withIt + shared > deadline && start + without <= hopeless) return true;
    }
    return false;
  }

  /** Milliseconds of the pieces in flight. */
  #ahead(): number {
    let milliseconds = 0;
    for (const { launches } of this.#inFlight.values())
      for (const { graph, size, batch } of launches) milliseconds += this.#options.cost(graph, size, batch) ?? 0;
    return milliseconds;
  }

  /** The batch of the next launch of these rows: the first of their cheapest split. */
  #batch(group: readonly Row[], limit: number): number {
    const [first] = group as [Row];
    const { graph, size, deferrable } = first.launches[first.next]!;
    const batches = this.#batches(limit);
    const rows = Math.min(group.length, Math.max(rowsAhead.least, rowsAhead.batches * Math.max(...batches)));
    const cost: BatchCost = (batch) => this.#options.relativeCost(graph, size, batch);
    const cheapest = () => cheapestSplit(rows, batches, cost).batches[0]!;
    if (group.every(({ request }) => request === first.request)) return cheapest();
    const gain = gainNeeded[deferrable ? "deferrable" : "usual"];
    const shared = cheapestSplit(rows, batches, (batch) => cost(batch) * (1 + gain * (1 - 1 / batch))).batches[0]!;
    // Company is worth a loss, padding is not.
    return shared > rows ? cheapest() : shared;
  }

  /** Compiled batches up to a limit; the limit itself where there are none. */
  #batches(limit: number): number[] {
    const batches = this.#options.batches.filter((batch) => batch <= limit);
    return batches.length > 0 ? batches : [limit];
  }
}

/** Milliseconds that a request still needs, now and after its next launches. */
function leftOf({ left, rows }: Request): readonly [number, number] {
  if (left === null) return [0, 0];
  const next = Math.min(...rows.map((row) => row.next));
  return [left[next]!, left[next + 1] ?? 0];
}

/** Rows in a piece, those of requests that are over included; each attempt of each has registers of its own. */
function membersOf(piece: Submission): string[] {
  return [
    ...new Set(
      piece.launches.flatMap(({ rows }) => rows.map(({ request, attempt, row }) => `${request}.${attempt}.${row}`)),
    ),
  ];
}

function restart(request: Request, now: number): void {
  request.attempt++;
  for (const row of request.rows) {
    row.next = 0;
    row.done = 0;
    row.since = now;
  }
}

/** Rows of one group may share a launch. */
function groupOf({ request, launches, next }: Row, index = next): string {
  const { id, pin } = request.ticket;
  return `${launches[index]!.key}|${pin ?? ""}|${request.isolated ? id : ""}`;
}
