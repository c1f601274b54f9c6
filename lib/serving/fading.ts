/**
 * A value that is learned from what happens, and believed less the longer nothing has happened: a machine that was disturbed
 * for a moment must not count as disturbed for as long as it is not used because of that.
 */

/** Milliseconds without observations in which a value stays as it is, and then in which half of what differs is forgotten. */
const quietMs = 5000;
const usualHalfLifeMs = 30_000;

/** What differs by less than this is nothing: a limit that fits just so has to fit again one day. */
const negligible = 0.01;

export class Fading {
  readonly #usual: number;
  readonly #halfLifeMs: number;
  readonly #clock: () => number;
  #excess = 0;
  #at = 0;

  /**
   * @param usual what it comes back to
   * @param halfLifeMs how fast
   * @param clock the present moment, in milliseconds
   */
  constructor(usual: number, halfLifeMs = usualHalfLifeMs, clock = () => performance.now()) {
    this.#usual = usual;
    this.#halfLifeMs = halfLifeMs;
    this.#clock = clock;
  }

  get value(): number {
    return this.after(0);
  }

  /** What it will be in so many milliseconds, if nothing is observed until then. */
  after(milliseconds: number): number {
    if (this.#excess === 0) return this.#usual;
    const quiet = this.#clock() + milliseconds - this.#at - quietMs;
    if (quiet <= 0) return this.#usual + this.#excess;
    const left = this.#excess * 2 ** (-quiet / this.#halfLifeMs);
    return this.#usual + (Math.abs(left) < negligible ? 0 : left);
  }

  /** It has been observed. */
  set(value: number): void {
    this.#excess = value - this.#usual;
    this.#at = this.#clock();
  }
}
