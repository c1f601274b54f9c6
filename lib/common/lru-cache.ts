/** A bounded cache: what has not been used for longest leaves first. */
export class LruCache<Value extends object> {
  readonly #limit: number;
  readonly #sizeOf: (value: Value, key: string) => number;
  readonly #entries = new Map<string, Value>();
  #size = 0;

  /**
   * @param limit of all sizes together; the latest value is kept even if it alone is larger
   * @param sizeOf default: 1, so that the limit is a number of values
   */
  constructor(limit: number, sizeOf: (value: Value, key: string) => number = () => 1) {
    this.#limit = limit;
    this.#sizeOf = sizeOf;
  }

  has(key: string): boolean {
    return this.#entries.has(key);
  }

  /** A kept value, which now is the latest that was used. */
  get(key: string): Value | undefined {
    const value = this.#entries.get(key);
    if (value === undefined) return undefined;
    // A map keeps the order in which its keys came.
    this.#entries.delete(key);
    this.#entries.set(key, value);
    return value;
  }

  /** Keeps a value, in place of the key's former one. @returns the value */
  set(key: string, value: Value): Value {
    this.#drop(key);
    this.#entries.set(key, value);
    this.#size += this.#sizeOf(value, key);
    for (const oldest of this.#entries.keys()) {
      if (this.#size <= this.#limit || oldest === key) break;
      this.#drop(oldest);
    }
    return value;
  }

  #drop(key: string): void {
    const value = this.#entries.get(key);
    if (value === undefined) return;
    this.#entries.delete(key);
    this.#size -= this.#sizeOf(value, key);
  }
}
