/** A process of the benchmark, which is told what to do: see calls.mjs. */

import { type ChildProcess, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { root } from "../support.js";

interface Reply {
  readonly id: number;
  readonly value?: unknown;
  readonly error?: string;
}

export class Process {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, { resolve(value: unknown): void; reject(error: Error): void }>();
  readonly #ended: Promise<void>;
  #calls = 0;

  private constructor(file: string, options: unknown, flags: readonly string[]) {
    const args = [...flags, path.join(root, "bench/serve", file), JSON.stringify(options)];
    // A log has to be written, not to be read.
    this.#child = spawn(process.execPath, args, { cwd: root, stdio: ["ignore", "ignore", "inherit", "ipc"] });
    this.#child.on("message", ({ id, value, error }: Reply) => {
      const call = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error === undefined) call?.resolve(value);
      else call?.reject(new Error(`${file}: ${error}`));
    });
    this.#ended = new Promise((resolve) => {
      this.#child.once("close", (code) => {
        for (const { reject } of this.#waiting.values()) reject(new Error(`${file} ended with code ${code}.`));
        this.#waiting.clear();
        resolve();
      });
    });
  }

  /** Starts a file of bench/serve with Node, and waits until it takes calls. @param flags of Node */
  static async start(file: string, options: unknown = {}, flags: readonly string[] = []): Promise<Process> {
    const process = new Process(file, options, flags);
    await process.#replyTo(0);
    return process;
  }

  get pid(): number {
    return this.#child.pid!;
  }

  /** @throws Error with what it threw, or if it ended */
  async call<T>(name: string, params: unknown = null): Promise<T> {
    const id = ++this.#calls;
    const reply = this.#replyTo(id);
    this.#child.send({ id, name, params });
    return (await reply) as T;
  }

  /** Lets it end by itself, so that it can write a profile. */
  async stop(): Promise<void> {
    if (this.#child.connected) await this.call("close");
    await this.#ended;
  }

  #replyTo(id: number): Promise<unknown> {
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }
}

/** Milliseconds of processor time that all threads of some processes have had. Linux. */
export function processorMs(pids: readonly number[]): number {
  let milliseconds = 0;
  for (const pid of pids)
    for (const thread of readdirSync(`/proc/${pid}/task`))
      milliseconds += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]) / 1e6;
  return milliseconds;
}
