/**
 * The header Idempotency-Key: requests of one client with the same key and body are one run with one answer, whether they come at the same
 * time or later. Failures that may pass are forgotten, so that trying again tries again.
 */

import { createHash } from "node:crypto";
import { Failure } from "./failure.js";

interface Entry<T> {
  readonly fingerprint: string;
  readonly value: T;
  readonly at: number;
  /** What its answer takes, as far as it is known. */
  bytes: number;
}

/** How long an answer is kept, in milliseconds. */
const keptMs = 600_000;
/** Answers that are kept. */
const mostKept = 1000;
/** Bytes that they may take together. */
const mostBytes = 64 * 2 ** 20;

export class IdempotencyKeys<T> {
  readonly #known = new Map<string, Entry<T>>();

  /**
   * The value of a key: the one that it has, or a new one.
   * @param key the client's key, with what tells clients apart
   * @throws Failure with 409 if the key came with another body
   */
  valueOf(key: string, body: unknown, create: () => T): T {
    this.#forgetOld();
    const fingerprint = fingerprintOf(body);
    const known = this.#known.get(key);
    if (known && known.fingerprint !== fingerprint)
      throw new Failure(
        409,
        "This Idempotency-Key came with another request before. Use a new key for a new request.",
        {
          code: "idempotency_key_reused",
        },
      );
    if (known) return known.value;
    const value = create();
    this.#known.set(key, { fingerprint, value, at: performance.now(), bytes: 0 });
    return value;
  }

  /** Forgets a key, if it has this value: what it stands for did not come to an answer that stays. */
  forget(key: string, value: T): void {
    if (this.#known.get(key)?.value === value) this.#known.delete(key);
  }

  /** An answer of so many bytes is kept from now on. */
  weigh(key: string, value: T, bytes: number): void {
    const entry = this.#known.get(key);
    if (entry?.value === value) entry.bytes = bytes;
    this.#forgetOld();
  }

  /** Keys come in the order of their age. */
  #forgetOld(): void {
    let bytes = 0;
    for (const entry of this.#known.values()) bytes += entry.bytes;
    for (const [key, entry] of this.#known) {
      const isOld = performance.now() - entry.at >= keptMs;
      if (this.#known.size < mostKept && bytes <= mostBytes && !isOld) break;
      this.#known.delete(key);
      bytes -= entry.bytes;
    }
  }
}

/** @throws Failure for a header that is no key */
export function idempotencyKeyOf(header: string | string[] | undefined): string | null {
  if (header === undefined) return null;
  if (typeof header !== "string" || header === "" || header.length > 255)
    throw new Failure(400, "Expected an Idempotency-Key of 1 to 255 characters.", { code: "invalid_idempotency_key" });
  return header;
}

/** The same for bodies that mean the same, whatever the order of their fields or the boundaries of their parts. */
function fingerprintOf(body: unknown): string {
  const hash = createHash("sha256");
  const add = (value: unknown): void => {
    if (value instanceof Uint8Array) hash.update(`b${value.length}:`).update(value);
    else if (Array.isArray(value)) {
      hash.update(`[${value.length}:`);
      for (const each of value) add(each);
    } else if (typeof value === "object" && value !== null) {
      const entries = Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1));
      hash.update(`{${entries.length}:`);
      for (const [name, each] of entries) {
        hash.update(`${JSON.stringify(name)}:`);
        add(each);
      }
    } else hash.update(`${JSON.stringify(value)};`);
  };
  add(body);
  return hash.digest("hex");
}
