/**
 * Programs that are replayed as one CUDA graph. A program's graph lives in its registers, so those of the last few
 * programs are kept; they are freed with the engines that they launch, and where memory runs out.
 */

import type { Logger } from "../../common/logger.js";
import type { Program } from "../../program/program.js";
import type { NativeExecutor, NativeRegisters, NativeSubmission } from "./addon.js";

/** Programs whose CUDA graphs are kept. */
const keptPrograms = 4;

interface CapturedProgram {
  readonly registers: NativeRegisters;
  /** Names of what it launches. */
  readonly graphs: ReadonlySet<string>;
}

export class CapturedPrograms {
  readonly #logger: Logger | undefined;
  /** By their instructions, the least recently used first. */
  readonly #programs = new Map<string, CapturedProgram>();
  #hasWarned = false;

  constructor(logger: Logger | undefined) {
    this.#logger = logger;
  }

  get size(): number {
    return this.#programs.size;
  }

  /**
   * Registers for a program: the same for the same instructions, and with them the CUDA graph.
   * @returns also a function to be called at the end of the run
   */
  use(executor: NativeExecutor, submission: NativeSubmission, bytes: number, program: Program) {
    const key = JSON.stringify([submission.constants.length, submission.instructions, submission.results]);
    const captured = this.#programs.get(key) ?? {
      registers: executor.registers(bytes),
      graphs: new Set(program.instructions.flatMap((each) => (each.op === "launch" ? each.graph : []))),
    };
    this.#programs.delete(key);
    this.#programs.set(key, captured);
    if (this.#programs.size > keptPrograms) this.#forget(this.#programs.keys().next().value!);
    const done = (failed: boolean) => {
      if (failed && this.#programs.get(key) === captured) this.#forget(key);
    };
    return { registers: captured.registers, done };
  }

  /** Frees the programs that launch a graph: they would keep its engine on the device. */
  forgetLaunchesOf(graph: string): void {
    for (const [key, { graphs }] of this.#programs) if (graphs.has(graph)) this.#forget(key);
  }

  clear(): void {
    for (const key of [...this.#programs.keys()]) this.#forget(key);
  }

  /** Says once why programs cannot be captured. */
  warn(reason: string): void {
    if (this.#hasWarned) return;
    this.#hasWarned = true;
    this.#logger?.warn?.(`This program runs launch by launch, not as one CUDA graph: ${reason}.`);
  }

  #forget(key: string): void {
    this.#programs.get(key)!.registers.release();
    this.#programs.delete(key);
  }
}
