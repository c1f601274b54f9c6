/**
 * A workspace on the GPU: each of its registers, and each constant that it keeps, is device memory of its own, so that it
 * can be freed by name while submissions that use others are under way.
 */

import type { Tensor } from "../../common/tensor.js";
import type { Program } from "../../program/program.js";
import type { Kept } from "../../program/validate.js";
import type { RunOptions, SubmissionOptions } from "../runtime.js";
import { NamedWorkspace, type WorkspaceOwner } from "../workspace.js";
import type { NativeExecutor, NativeRegisters } from "./addon.js";
import type { SharedDevice } from "./device.js";
import type { LoadedEngines } from "./engines.js";
import { bytesOf, layOutApart, layOutSubmission, operandsOf } from "./layout.js";
import { type PreparedRun, withoutValue } from "./run.js";

/** Device memory from its first use until it has been freed and no submission uses it any more. */
class DeviceMemory {
  /** Submissions under way that name it. */
  uses = 0;
  /** Whether the last submission that was to write it never began. */
  missing = false;
  #freed = false;
  #native: NativeRegisters | null = null;

  constructor(readonly bytes: number) {}

  on(executor: NativeExecutor): NativeRegisters {
    this.#native ??= executor.registers(this.bytes);
    return this.#native;
  }

  free(): void {
    this.#freed = true;
    this.#release();
  }

  leave(): void {
    this.uses--;
    this.#release();
  }

  #release(): void {
    if (!this.#freed || this.uses > 0) return;
    this.#native?.release();
    this.#native = null;
  }
}

/** What a workspace needs of its runtime. */
export interface DeviceOwner extends WorkspaceOwner {
  readonly device: SharedDevice;
  readonly engines: LoadedEngines;
  constants(program: Program): Promise<ReadonlyMap<string, Tensor>>;
  /** Prepares and submits in the order of the calls. `missed` is called, in that order, for what is never submitted. */
  execute(
    options: RunOptions,
    prepare: (signal: AbortSignal | undefined) => Promise<PreparedRun>,
    missed: () => void,
  ): Promise<Record<string, Tensor>>;
}

export class DeviceWorkspace extends NamedWorkspace {
  readonly #owner: DeviceOwner;
  readonly #onClose: (workspace: DeviceWorkspace) => void;
  readonly #memory = new Map<string, DeviceMemory>();
  /** The registers submitted to, which hold nothing: see NativeSubmission.others. */
  readonly #empty = new DeviceMemory(0);
  #closed = false;

  constructor(owner: DeviceOwner, onClose: (workspace: DeviceWorkspace) => void) {
    super(owner, "GPU");
    this.#owner = owner;
    this.#onClose = onClose;
  }

  get lost(): boolean {
    return this.#closed || this.#owner.device.lost !== null;
  }

  override async submit(program: Program, options?: SubmissionOptions): Promise<Record<string, Tensor>> {
    this.#owner.throwIfDisposed();
    if (this.#owner.device.lost) throw this.#owner.device.lost;
    return super.submit(program, options);
  }

  close(): void {
    this.#closed = true;
    for (const memory of [this.#empty, ...this.#memory.values()]) memory.free();
    this.#memory.clear();
    this.#onClose(this);
  }

  protected run(program: Program, options: SubmissionOptions, left: Kept, kept: Kept): Promise<Record<string, Tensor>> {
    const { device, engines } = this.#owner;
    const read = new Set(program.instructions.flatMap(operandsOf));
    // Names are resolved now: they may be freed, and given again, before the submission has its turn.
    const names = new Set([...left.keys(), ...read, ...program.results]);
    const operands = Object.fromEntries([...names].map((name) => [name, kept.get(name)!]));
    const used = Object.entries(operands).map(([name, operand]) => {
      const memory = this.#memory.get(name) ?? new DeviceMemory(bytesOf(operand));
      this.#memory.set(name, memory);
      return [name, memory] as const;
    });
    const all = [this.#empty, ...used.map(([, memory]) => memory)];
    for (const memory of all) memory.uses++;
    const written = used.filter(([name]) => left.has(name)).map(([, memory]) => memory);

    const prepare = async (signal: AbortSignal | undefined): Promise<PreparedRun> => {
      for (const [name, memory] of used)
        if (memory.missing && read.has(name) && !left.has(name)) throw withoutValue(name);
      const executor = await device.open();
      const constants = await this.#owner.constants(program);
      const registers = { ...program.registers, ...operands };
      const engineOf = await engines.ready(executor, { ...program, registers }, constants, signal);
      const layout = layOutApart(operands);
      const submission = layOutSubmission(program, layout, constants, engineOf, false);
      const [empty, ...others] = all.map((memory) => memory.on(executor));
      for (const memory of written) memory.missing = false;
      return {
        ...{ registers: empty!, layout, engineOf, program },
        submission: { ...submission, others: others.map(({ id }) => id) },
        nameOf: (block: number) => used[block - 1]?.[0] ?? "",
      };
    };
    const missed = () => {
      for (const memory of written) memory.missing = true;
    };
    return this.#owner.execute(options, prepare, missed).finally(() => {
      for (const memory of all) memory.leave();
    });
  }

  protected release(names: readonly string[]): void {
    for (const name of names) {
      this.#memory.get(name)?.free();
      this.#memory.delete(name);
    }
  }
}
