/** What the workspaces of all runtimes have in common: the names that they hold, and which submissions are refused. */

import type { Tensor } from "../common/tensor.js";
import { RuntimeError } from "../errors.js";
import type { Program } from "../program/program.js";
import { type Kept, type Operand, validateProgram } from "../program/validate.js";
import type { SubmissionOptions, Workspace } from "./runtime.js";

/** The runtime that a workspace belongs to. */
export interface WorkspaceOwner {
  has(graph: string): boolean;
  /** @throws DisposedError */
  throwIfDisposed(): void;
}

export abstract class NamedWorkspace implements Workspace {
  readonly #owner: WorkspaceOwner;
  /** What its registers are lost with. */
  readonly #holder: string;
  readonly #kept = new Map<string, Operand>();

  constructor(owner: WorkspaceOwner, holder: string) {
    this.#owner = owner;
    this.#holder = holder;
  }

  abstract readonly lost: boolean;

  async submit(program: Program, options: SubmissionOptions = {}): Promise<Record<string, Tensor>> {
    this.#owner.throwIfDisposed();
    options.signal?.throwIfAborted();
    if (this.lost)
      throw new RuntimeError(`This workspace is gone with the ${this.#holder} that held it; open a new one.`);
    const left = validateProgram(program, (name) => this.#owner.has(name), this.#kept);
    for (const [name, operand] of left) this.#kept.set(name, operand);
    return this.run(program, options, left, this.#kept);
  }

  free(names: readonly string[]): void {
    for (const name of names) this.#kept.delete(name);
    this.release(names);
  }

  abstract close(): void;

  /**
   * Runs a submission that has been checked.
   * @param left what it leaves
   * @param kept everything that is there when it has run
   */
  protected abstract run(
    program: Program,
    options: SubmissionOptions,
    left: Kept,
    kept: Kept,
  ): Promise<Record<string, Tensor>>;

  /** Frees the memory behind names. */
  protected abstract release(names: readonly string[]): void;
}
