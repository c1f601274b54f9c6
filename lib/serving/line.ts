/**
 * Whole programs one after another, the most urgent first, for runtimes that replay a picture as one CUDA graph. One runs
 * while the next waits behind it, so that the device never waits for JavaScript; the others wait here, where somebody
 * more urgent can still overtake them.
 */

import { DeviceLostError } from "../errors.js";
import { comparePriorities, type Priority } from "./priority.js";

/** Programs that the runtime has at a time. */
const ahead = 2;

interface Place {
  readonly claim: Priority;
  start(turn: Turn): void;
}

/** A program that the runtime has. */
interface Turn {
  /** Whether the device was lost under another. */
  disturbed: boolean;
}

export class Line {
  readonly #waiting: Place[] = [];
  readonly #running = new Set<Turn>();
  readonly #idle: (() => void)[] = [];

  /** Programs that wait or run. */
  get length(): number {
    return this.#waiting.length + this.#running.size;
  }

  /** Resolves when nothing waits or runs. */
  async idle(): Promise<void> {
    if (this.length > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  /**
   * Does `work` when its turn has come, and again if the device was lost under another's.
   * @throws what `work` throws; `signal.reason` if it aborts before
   */
  async run<T>(claim: Priority, signal: AbortSignal, work: () => Promise<T>): Promise<T> {
    for (;;) {
      const turn = await this.#turn(claim, signal);
      try {
        return await work();
      } catch (error) {
        const isOthers = turn.disturbed;
        if (error instanceof DeviceLostError && !isOthers) for (const other of this.#running) other.disturbed = true;
        if (!(error instanceof DeviceLostError) || !isOthers) throw error;
      } finally {
        this.#running.delete(turn);
        this.#start();
      }
    }
  }

  #turn(claim: Priority, signal: AbortSignal): Promise<Turn> {
    return new Promise((resolve, reject) => {
      signal.throwIfAborted();
      const leave = () => {
        this.#waiting.splice(this.#waiting.indexOf(place), 1);
        reject(signal.reason);
      };
      const place: Place = {
        claim,
        start: (turn) => {
          signal.removeEventListener("abort", leave);
          resolve(turn);
        },
      };
      signal.addEventListener("abort", leave, { once: true });
      this.#waiting.push(place);
      this.#start();
    });
  }

  #start(): void {
    while (this.#running.size < ahead && this.#waiting.length > 0) {
      const now = performance.now();
      const first = this.#waiting.reduce((a, b) => (comparePriorities(a.claim, b.claim, now) <= 0 ? a : b));
      this.#waiting.splice(this.#waiting.indexOf(first), 1);
      const turn: Turn = { disturbed: false };
      this.#running.add(turn);
      first.start(turn);
    }
    if (this.length === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }
}
