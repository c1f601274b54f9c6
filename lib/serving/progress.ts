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
    const run = { rows, made: rows.map(() => 0) };
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
    this.#count();
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
