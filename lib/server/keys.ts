/** Who may draw: keys are compared by their digests, in the same time whatever was sent. */

import { createHash, timingSafeEqual } from "node:crypto";

const digestOf = (text: string) => createHash("sha256").update(text).digest();

export class Keys {
  readonly #digests: readonly Buffer[];

  constructor(keys: readonly string[]) {
    this.#digests = keys.map(digestOf);
  }

  get areNeeded(): boolean {
    return this.#digests.length > 0;
  }

  /**
   * Which key a header has, as a number from 1; 0 where none is needed, null for a header without a known key.
   * @param authorization the header `Authorization`
   */
  ownerOf(authorization: string | undefined): number | null {
    if (!this.areNeeded) return 0;
    const [, key = ""] = authorization?.match(/^Bearer +(\S+) *$/i) ?? [];
    const digest = digestOf(key);
    let owner: number | null = null;
    // All of them, so that the time does not tell which one fitted.
    for (const [index, known] of this.#digests.entries()) if (timingSafeEqual(known, digest)) owner = index + 1;
    return key === "" ? null : owner;
  }
}
