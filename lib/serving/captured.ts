/**
 * Captured programs, by priority: each is replayed as one CUDA graph and shares no launch. One runs while the next waits
 * in the runtime, so that the device never waits for JavaScript; the others wait here, so that a program of higher
 * priority can still go before them.
 */

import { Gate } from "../common/gate.js";
import { DeviceLostError } from "../errors.js";
import { byPriority, type Priority } from "./priority.js";

/** Programs, or submissions, that the runtime has at a time. */
export const ahead = 2;

export class CapturedQueue {
  readonly #gate = new Gate<Priority>({ capacity: ahead, compare: byPriority });
  readonly #running = new Set<{ lostByAnother: boolean }>();

  /** Programs that wait or run. */
  get size(): number {
    return this.#gate.waiting + this.#gate.inside.entries;
  }

  /** Resolves when no program waits or runs. */
  idle(): Promise<void> {
    return this.#gate.idle();
  }

  /**
   * Does `work` when its turn has come, and again if the device was lost by another program meanwhile.
   * @param work gets how often it was done before
   * @throws what `work` throws; `signal.reason` if it aborts before
   */
  async run<T>(priority: Priority, signal: AbortSignal, work: (restarts: number) => Promise<T>): Promise<T> {
    for (let restarts = 0; ; restarts++) {
      const leave = await this.#gate.enter(priority, 1, signal);
      const run = { lostByAnother: false };
      this.#running.add(run);
      try {
        return await work(restarts);
      } catch (error) {
        if (!(error instanceof DeviceLostError)) throw error;
        if (!run.lostByAnother) {
          for (const other of this.#running) other.lostByAnother = true;
          throw error;
        }
      } finally {
        this.#running.delete(run);
        leave();
      }
    }
  }
}
