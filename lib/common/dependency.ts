/**
 * Packages that this one loads when it first needs them and not when it is imported, so that `flowturbo doctor` runs
 * where one is missing or broken, and says so.
 */

import { InstallationError } from "../errors.js";
import { messageOf } from "./text.js";

/** What `flowturbo doctor` says of a package that this one needs. */
export interface DependencyFinding {
  readonly name: string;
  readonly available: boolean;
  readonly version: string | null;
  /** Why it cannot be used, and what to do about it. */
  readonly reason: string | null;
  readonly remedy: string | null;
}

/** A package that is loaded at its first use. */
export class Dependency<T> {
  #loading: Promise<T> | null = null;

  /**
   * @param open imports it
   * @param versionOf what was imported
   * @param remedy where it cannot be loaded
   * @param isThere looks for it without loading it; default: that is not possible
   */
  constructor(
    readonly name: string,
    private readonly open: () => Promise<T>,
    private readonly versionOf: (loaded: T) => string | null,
    private readonly remedy: () => string,
    private readonly isThere: () => boolean = () => false,
  ) {}

  /**
   * Looks for it before work that needs it at its end; it is loaded only where that does not find it.
   * @throws InstallationError if it cannot be loaded, with the reason and the remedy
   */
  async check(): Promise<void> {
    if (!this.#loading && this.isThere()) return;
    await this.load();
  }

  /** @throws InstallationError if it cannot be loaded, with the reason and the remedy */
  load(): Promise<T> {
    this.#loading ??= this.open().catch((cause) => {
      const reason = `${this.name} cannot be loaded: ${reasonOf(cause)}.`;
      throw new InstallationError(this.name, reason, this.remedy(), { cause });
    });
    return this.#loading;
  }

  /** Takes this in its place from now on: for a caller who needs none of it, where it may be missing. */
  replaceWith(other: T): void {
    this.#loading = Promise.resolve(other);
  }

  /** Never rejects. */
  async find(): Promise<DependencyFinding> {
    const found = { name: this.name, version: null, reason: null, remedy: null };
    try {
      return { ...found, available: true, version: this.versionOf(await this.load()) };
    } catch (error) {
      const { reason, remedy } = error as InstallationError;
      return { ...found, available: false, reason, remedy };
    }
  }
}

/** The first line says what happened; sharp, for one, lets advice follow. */
function reasonOf(error: unknown): string {
  const text = messageOf(error);
  return text.split("\n")[0]!.replace(/[\s:.]+$/, "");
}
