/**
 * Lets work in while it fits a capacity; the rest waits in order. Admission of requests, captured programs and engine
 * builds differ only in their weights and their order. No smaller entry goes before the first one that waits, so that
 * large entries have their turn.
 */

import { onAbort } from "./abort.js";

export interface GateOptions<Order> {
  /** Weight that may be inside at a time; a function is asked again whenever an entry comes or leaves. */
  readonly capacity: number | (() => number);
  /** Entries that may wait; default: any number. */
  readonly limit?: number;
  /** Negative if `a` goes before `b`; of equals the earlier one goes first. Default: first come, first served. */
  readonly compare?: (a: Order, b: Order) => number;
}

interface Entry<Order> {
  readonly order: Order;
  readonly weight: number;
  readonly signal: AbortSignal | undefined;
  admit(): void;
}

export class Gate<Order = void> {
  readonly #options: GateOptions<Order>;
  readonly #waiting = new Set<Entry<Order>>();
  #entries = 0;
  #weight = 0;
  #idle: (() => void)[] = [];

  constructor(options: GateOptions<Order>) {
    this.#options = options;
  }

  /** Entries that wait. */
  get waiting(): number {
    return this.#waiting.size;
  }

  /** What has been let in and has not left. */
  get inside(): { readonly entries: number; readonly weight: number } {
    return { entries: this.#entries, weight: this.#weight };
  }

  /** Whether `enter` would refuse: it would have to wait, and as many wait as may. */
  isFull(weight = 1): boolean {
    const mustWait = this.#waiting.size > 0 || !this.#fits(weight);
    return mustWait && this.#waiting.size >= (this.#options.limit ?? Number.POSITIVE_INFINITY);
  }

  /** The place that an entry would have if it came now: 0 goes in at once, 1 is the first of those that wait. */
  placeOf(order: Order, weight = 1): number {
    const { compare = () => 0 } = this.#options;
    const before = [...this.#waiting].filter((entry) => !entry.signal?.aborted && compare(entry.order, order) <= 0);
    return before.length === 0 && this.#fits(weight) ? 0 : before.length + 1;
  }

  /**
   * Resolves when the entry is inside, with the function that lets it leave; more calls of that do nothing. An entry that
   * weighs more than the capacity goes in when nothing else is inside.
   * @param mayExceed whether it may wait though as many wait as may
   * @throws RangeError if the gate is full; `signal.reason` if the signal aborts before
   */
  async enter(order: Order, weight = 1, signal?: AbortSignal, mayExceed = false): Promise<() => void> {
    signal?.throwIfAborted();
    if (!mayExceed && this.isFull(weight))
      throw new RangeError(`${this.#waiting.size} entries wait, which is as many as may.`);
    await new Promise<void>((resolve, reject) => {
      const unfollow = onAbort(signal, () => {
        this.#waiting.delete(entry);
        reject(signal!.reason);
        // Smaller entries may have waited behind this one.
        this.#admit();
      });
      const entry: Entry<Order> = {
        order,
        weight,
        signal,
        admit: () => {
          unfollow();
          resolve();
        },
      };
      this.#waiting.add(entry);
      this.#admit();
    });
    let isInside = true;
    return () => {
      if (!isInside) return;
      isInside = false;
      this.#entries--;
      this.#weight -= weight;
      this.#admit();
    };
  }

  /** Resolves when nothing waits or is inside. */
  async idle(): Promise<void> {
    // Before the caller is told, another entry may come.
    while (this.#waiting.size + this.#entries > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  #fits(weight: number): boolean {
    const { capacity } = this.#options;
    return this.#entries === 0 || this.#weight + weight <= (typeof capacity === "number" ? capacity : capacity());
  }

  #admit(): void {
    const { compare = () => 0 } = this.#options;
    for (;;) {
      // Several entries may share a signal: one that has aborted, and is still to be removed, is not let in.
      const [head, ...rest] = [...this.#waiting].filter(({ signal }) => !signal?.aborted);
      if (!head) break;
      const first = rest.reduce((a, b) => (compare(a.order, b.order) <= 0 ? a : b), head);
      if (!this.#fits(first.weight)) return;
      this.#waiting.delete(first);
      this.#entries++;
      this.#weight += first.weight;
      first.admit();
    }
    if (this.#entries === 0) for (const resolve of this.#idle.splice(0)) resolve();
  }
}
