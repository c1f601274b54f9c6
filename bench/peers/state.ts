/**
 * What has been measured so far, a result at a time, so that a run that was interrupted goes on. It holds for one machine,
 * commit, set of versions and of settings; anything else starts anew.
 */

import { mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import path from "node:path";

export class State {
  readonly #file: string;
  readonly #key: string;
  readonly #results: Record<string, unknown>;

  /** @param key what the results depend on */
  constructor(file: string, key: unknown, fresh: boolean) {
    this.#file = file;
    this.#key = JSON.stringify(key);
    const before = fresh ? undefined : read(file);
    this.#results = before?.key === this.#key ? before.results : {};
  }

  get size(): number {
    return Object.keys(this.#results).length;
  }

  has(name: string): boolean {
    return name in this.#results;
  }

  get<T>(name: string): T | undefined {
    return this.#results[name] as T | undefined;
  }

  set(name: string, result: unknown): void {
    this.#results[name] = result;
    mkdirSync(path.dirname(this.#file), { recursive: true });
    // A whole file at any time.
    writeFileSync(`${this.#file}.new`, JSON.stringify({ key: this.#key, results: this.#results }));
    renameSync(`${this.#file}.new`, this.#file);
  }
}

function read(file: string): { key: string; results: Record<string, unknown> } | undefined {
  try {
    return JSON.parse(readFileSync(file, "utf8"));
  } catch {
    // None yet.
    return undefined;
  }
}
