/**
 * How much of an accepted request's work is done, in units of its price. Each row's place among its launches is kept, so
 * that a launch which is made twice counts once, and the units can change when more is known about costs.
 */

import type { Program } from "../program/program.js";
import { launchPhases } from "./rows.js";

/** One call of the dispatcher. */
interface Run {
  readonly rows: readonly Program[];
  /** Launches that each row has made. */
  readonly made: number[];
  /** The device of each row, as far as one has been chosen. */
  readonly devices: (number | null)[];
}

/** Where the rows of a run are. */
export interface Places {
  /** By device: how many rows are there, and what is done of them in units. */
  readonly on: ReadonlyMap<number, { readonly rows: number; readonly done: number }>;
  /** All rows, those without a device included. */
  readonly rows: number;
  /** What is done in other runs, in units. */
  readonly before: number;
}

export class Progress {
  readonly #runs: Run[] = [];
  #units: ReadonlyMap<string, number>;
  #done = 0;

  /** @param units of one row in a launch, by kind */
  constructor(units: ReadonlyMap<string, number>) {
    this.#units = units;
  }

  /** In units. */
  get done(): number {
    return this.#done;
  }

  /** Other units from now on. */
  priced(units: ReadonlyMap<string, number>): void {
    this.#units = units;
    this.#count();
  }

  /** The rows begin with their first launches. */
  begin(rows: readonly Program[]): Run {
    const run: Run = { rows, made: rows.map(() => 0), devices: rows.map(() => null) };
    this.#runs.push(run);
    return run;
  }

  /**
   * A row has made a launch, and those before it.
   * @param index among its launches
   * @returns whether it had made it before
   */
  made(run: Run, row: number, index: number): boolean {
    const before = run.made[row]!;
    run.made[row] = index + 1;
    this.#done += this.#unitsUntil(run.rows[row]!, index + 1) - this.#unitsUntil(run.rows[row]!, before);
    return before > index;
  }

  /**
   * A row begins again. Launches that it repeats are not reported, so that nothing of it counts as done until it has come
   * further than before: promises that are made meanwhile are the more careful.
   */
  again(run: Run, row: number): void {
    run.made[row] = 0;
    run.devices[row] = null;
    this.#count();
  }

  /** A device has been chosen for a row. */
  placed(run: Run, row: number, device: number): void {
    run.devices[row] = device;
  }

  /** Where the rows are of the run that is the larger part of so many units; null before there is one. */
  places(weight: number): Places | null {
    const run = this.#runs.at(-1);
    if (!run) return null;
    const unitsOf = (row: number, launches: number) => this.#unitsUntil(run.rows[row]!, launches);
    const all = run.rows.reduce((sum, _, row) => sum + unitsOf(row, Number.POSITIVE_INFINITY), 0);
    if (2 * all < weight) return null;
    const on = new Map<number, { rows: number; done: number }>();
    let own = 0;
    for (const [row, device] of run.devices.entries()) {
      const done = unitsOf(row, run.made[row]!);
      own += done;
      if (device === null) continue;
      const before = on.get(device) ?? { rows: 0, done: 0 };
      on.set(device, { rows: before.rows + 1, done: before.done + done });
    }
    return { on, rows: run.rows.length, before: this.#done - own };
  }

  #count(): void {
    this.#done = 0;
    for (const { rows, made } of this.#runs)
      for (const [row, program] of rows.entries()) this.#done += this.#unitsUntil(program, made[row]!);
  }

  #unitsUntil(program: Program, launches: number): number {
    let left = launches;
    let sum = 0;
    for (const { kind, times } of launchPhases(program)) {
      const count = Math.min(times, left);
      sum += count * (this.#units.get(kind.key) ?? 0);
      left -= count;
      if (left === 0) break;
    }
    return sum;
  }
}
