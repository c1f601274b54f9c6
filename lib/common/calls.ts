/** Calls under way, for whoever ends when they are over. */

export class Calls {
  readonly #open = new Set<Promise<unknown>>();

  /** Begins a call that `idle` waits for, even if the call's own first step asks for the end. */
  track<T>(work: () => Promise<T>): Promise<T> {
    const call = Promise.resolve().then(work);
    const settled = call.then(
      () => undefined,
      () => undefined,
    );
    this.#open.add(settled);
    void settled.then(() => this.#open.delete(settled));
    return call;
  }

  /** Makes `idle` wait until what is returned is called. */
  enter(): () => void {
    let leave = () => {};
    const entered = new Promise<void>((resolve) => {
      leave = resolve;
    });
    this.#open.add(entered);
    return () => {
      this.#open.delete(entered);
      leave();
    };
  }

  /** Resolves when no call is under way: one may have begun another. */
  async idle(): Promise<void> {
    while (this.#open.size > 0) await Promise.all(this.#open);
  }
}
