/**
 * Captured programs, by priority: each is replayed as one CUDA graph and shares no launch. One runs while the next waits
 * in the runtime, so that the device never waits for JavaScript; the others wait here, so that a program of higher
 * priority can still go before them.
 */

import { Gate } from "../common/gate.js";
import { byPriority, type Priority } from "./priority.js";

/** Programs, or submissions, that the runtime has at a time. */
export const ahead = 2;

export class CapturedQueue {
  readonly #gate = new Gate<Priority>({ capacity: ahead, compare: byPriority });

  /** Programs that wait or run. */
  get size(): number {
    return this.#gate.waiting + this.#gate.inside.entries;
  }

  /** Resolves when no program waits or runs. */
  idle(): Promise<void> {
    return this.#gate.idle();
  }

  /**
   * Does `work` when its turn has come.
   * @throws what `work` throws; `signal.reason` if it aborts before
   */
  async run<T>(priority: Priority, signal: AbortSignal, work: () => Promise<T>): Promise<T> {
    const leave = await this.#gate.enter(priority, 1, signal);
    try {
      return await work();
    } finally {
      leave();
    }
  }
}
