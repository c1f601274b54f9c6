/**
 * Abort signals. A caller may give one signal to any number of calls, and a call hands it to many parts of this package;
 * Node prints a warning where a signal has more than ten listeners. So each signal gets one listener here, whatever
 * number of parts follow it.
 */

const followers = new WeakMap<AbortSignal, { readonly acts: Set<() => void>; readonly notify: () => void }>();

/**
 * Calls `act` once when the signal aborts: at once if it has aborted already.
 * @returns a function that stops following the signal
 */
export function onAbort(signal: AbortSignal | undefined, act: () => void): () => void {
  if (!signal) return () => {};
  if (signal.aborted) {
    act();
    return () => {};
  }
  let followed = followers.get(signal);
  if (!followed) {
    const acts = new Set<() => void>();
    const notify = () => {
      followers.delete(signal);
      for (const each of acts)
        try {
          each();
        } catch (error) {
          // As from a listener of its own: the others are called all the same.
          queueMicrotask(() => {
            throw error;
          });
        }
    };
    followed = { acts, notify };
    followers.set(signal, followed);
    signal.addEventListener("abort", notify, { once: true });
  }
  const { acts, notify } = followed;
  // An object of its own: the same function may be given twice.
  const entry = () => act();
  acts.add(entry);
  return () => {
    if (!acts.delete(entry) || acts.size > 0 || signal.aborted) return;
    followers.delete(signal);
    signal.removeEventListener("abort", notify);
  };
}

/** A controller that also aborts when `signal` does, with its reason, until `unfollow` is called. */
export function following(signal: AbortSignal | undefined): {
  readonly controller: AbortController;
  readonly unfollow: () => void;
} {
  const controller = new AbortController();
  return { controller, unfollow: onAbort(signal, () => controller.abort(signal!.reason)) };
}

/** Settles as `work` does, or rejects with `signal.reason` as soon as the signal aborts. The work itself goes on. */
export function untilAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work;
  return new Promise<T>((resolve, reject) => {
    const stop = onAbort(signal, () => reject(signal.reason));
    work.then(resolve, reject).finally(stop);
  });
}

/**
 * Work that several callers wait for. It runs under a signal of its own, which aborts only when every caller has left:
 * the abort of one caller never reaches another.
 */
export class SharedTask<T> {
  readonly #controller = new AbortController();
  readonly #promise: Promise<T>;
  #waiting = 0;
  #isOver = false;

  constructor(work: (signal: AbortSignal) => Promise<T>) {
    this.#promise = work(this.#controller.signal).finally(() => {
      this.#isOver = true;
    });
    // Each caller gets a failure from `join`; if all have left, nobody needs it.
    this.#promise.catch(() => {});
  }

  /** Whether every caller has left before the end: nobody can join any more. */
  get abandoned(): boolean {
    return this.#controller.signal.aborted;
  }

  /** The result. @throws what the work throws, or the caller's own `signal.reason` */
  async join(signal?: AbortSignal): Promise<T> {
    signal?.throwIfAborted();
    this.#waiting++;
    try {
      return await untilAborted(this.#promise, signal);
    } finally {
      if (--this.#waiting === 0 && !this.#isOver) this.#controller.abort();
    }
  }
}
