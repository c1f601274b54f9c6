/**
 * Who may work, and who waits: a bounded queue in front of the dispatcher. Few pictures are in flight at a time, so that
 * memory is bounded and somebody urgent need not wait for all who came before. The most urgent one goes first (see
 * urgency.ts); nobody overtakes it for being smaller, so that large requests do not starve either.
 */

import { comparePriorities, type Priority } from "./priority.js";

interface Waiting {
  readonly claim: Priority;
  readonly pictures: number;
  start(): void;
}

export class Admission {
  /** Requests that may wait. */
  readonly limit: number;
  readonly #capacity: number;
  readonly #now: () => number;
  readonly #waiting: Waiting[] = [];
  #requests = 0;
  #pictures = 0;

  /** @param capacity pictures in flight; a request with more goes when nobody else does */
  constructor(limit: number, capacity: number, now: () => number = () => performance.now()) {
    this.limit = limit;
    this.#capacity = capacity;
    this.#now = now;
  }

  get waiting(): number {
    return this.#waiting.length;
  }

  /** Requests, and their pictures, that have been let in and have not left. */
  get running(): { readonly requests: number; readonly pictures: number } {
    return { requests: this.#requests, pictures: this.#pictures };
  }

  /** Whether a newcomer has to be refused. */
  isFull(pictures: number): boolean {
    const mustWait = this.#waiting.length > 0 || !this.#fits(pictures);
    return mustWait && this.#waiting.length >= this.limit;
  }

  /**
   * Resolves when the request may work, with the function to call once when it is over.
   * @throws RangeError if the queue is full (see `isFull`), `signal.reason` if it is aborted while it waits
   */
  async enter(claim: Priority, pictures: number, signal?: AbortSignal): Promise<() => void> {
    signal?.throwIfAborted();
    if (this.isFull(pictures)) throw new RangeError("The queue is full.");
    await new Promise<void>((resolve, reject) => {
      const leave = () => {
        this.#waiting.splice(this.#waiting.indexOf(entry), 1);
        reject(signal!.reason);
        // The one that is gone may have stood in front of smaller ones.
        this.#admit();
      };
      const entry: Waiting = {
        claim,
        pictures,
        start: () => {
          signal?.removeEventListener("abort", leave);
          resolve();
        },
      };
      signal?.addEventListener("abort", leave, { once: true });
      this.#waiting.push(entry);
      this.#admit();
    });
    let isOver = false;
    return () => {
      if (isOver) return;
      isOver = true;
      this.#requests--;
      this.#pictures -= pictures;
      this.#admit();
    };
  }

  #fits(pictures: number): boolean {
    return this.#pictures === 0 || this.#pictures + pictures <= this.#capacity;
  }

  #admit(): void {
    while (this.#waiting.length > 0) {
      const now = this.#now();
      const first = this.#waiting.reduce((a, b) => (comparePriorities(a.claim, b.claim, now) <= 0 ? a : b));
      if (!this.#fits(first.pictures)) return;
      this.#waiting.splice(this.#waiting.indexOf(first), 1);
      this.#requests++;
      this.#pictures += first.pictures;
      first.start();
    }
  }
}
