/**
 * Processes that tests and benchmarks start, and that never outlive who started them: not even where that one is killed, or where
 * they are stopped (SIGSTOP) and notice nothing. Needs a POSIX shell.
 */

import { type ChildProcess, spawn } from "node:child_process";
import { rename } from "node:fs/promises";
import path from "node:path";
import { root } from "./fixtures.js";

export interface ProcessOptions {
  /** Variables besides those of this process; undefined takes one away. */
  readonly env?: NodeJS.ProcessEnv | undefined;
  readonly cwd?: string | undefined;
  /** Whether there is a channel of messages to it: `child.send`, and its event `message`. Default: false. */
  readonly messages?: boolean | undefined;
}

export interface Ending {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
}

/** A process with what it wrote. */
export class GuardedProcess {
  readonly child: ChildProcess;
  readonly pid: number;
  /** When it has ended and all that it wrote is here. */
  readonly ended: Promise<Ending>;
  /** Lines of its standard output so far, without the last one while that is not complete. */
  readonly lines: string[] = [];
  readonly #name: string;
  #rest = "";
  #errors = "";
  #ending: Ending | null = null;
  readonly #waiting = new Set<() => void>();

  constructor(command: string, args: readonly string[], { env, cwd = root, messages = false }: ProcessOptions = {}) {
    this.#name = [path.basename(command), ...args.map((arg) => path.basename(arg))].join(" ").slice(0, 200);
    // A group of its own, with whatever it starts itself.
    this.child = spawn(command, args, {
      ...{ cwd, env: { ...process.env, ...env }, detached: true },
      stdio: ["ignore", "pipe", "pipe", ...(messages ? (["ipc"] as const) : [])],
    });
    let failure: Error | null = null;
    this.child.once("error", (error) => {
      failure = error;
    });
    this.pid = this.child.pid ?? 0;
    const dismiss = this.pid ? guard(this.pid) : () => {};
    this.child.stdout!.setEncoding("utf8").on("data", (text: string) => {
      const [first, ...others] = text.split("\n");
      this.#rest += first;
      for (const line of others) {
        this.lines.push(this.#rest);
        this.#rest = line;
      }
      this.#tell();
    });
    this.child.stderr!.setEncoding("utf8").on("data", (text: string) => {
      this.#errors += text;
    });
    this.child.once("exit", () => {
      // What it started goes with it.
      send(-this.pid, "SIGKILL");
      dismiss();
    });
    this.ended = new Promise((resolve) => {
      this.child.once("close", (code, signal) => {
        if (this.#rest !== "") this.lines.push(this.#rest);
        if (failure) this.#errors += failure.message;
        this.#ending = { code, signal };
        this.#tell();
        resolve(this.#ending);
      });
    });
  }

  /** How it ended; null while it runs. */
  get ending(): Ending | null {
    return this.#ending;
  }

  /** Its standard error so far. */
  get errors(): string {
    return this.#errors;
  }

  /** Signals the process alone. SIGSTOP and SIGCONT are how a machine seems to hang. */
  kill(signal: NodeJS.Signals = "SIGTERM"): void {
    if (this.child.exitCode === null && this.child.signalCode === null) send(this.pid, signal);
  }

  /**
   * The first line of its output with that text or pattern, from the line at index `from` on: now, or when it comes.
   * @throws Error with its standard error if it ends before, or if so many milliseconds pass
   */
  async line(wanted: string | RegExp, { from = 0, timeoutMs = 60_000 } = {}): Promise<string> {
    const isWanted = (text: string) => (typeof wanted === "string" ? text.includes(wanted) : wanted.test(text));
    let isLate = false;
    const timer = setTimeout(() => {
      isLate = true;
      this.#tell();
    }, timeoutMs);
    try {
      for (let at = from; ; ) {
        for (; at < this.lines.length; at++) if (isWanted(this.lines[at]!)) return this.lines[at]!;
        if (this.#ending || isLate) {
          const what = this.#ending
            ? `ended with ${this.#ending.signal ?? `code ${this.#ending.code}`}`
            : `wrote nothing like it in ${timeoutMs} ms`;
          throw new Error(
            `"${wanted}" was expected, but ${this.#name} ${what}.\n${this.lines.slice(-20).join("\n")}\n${this.#errors}`,
          );
        }
        await new Promise<void>((resolve) => this.#waiting.add(resolve));
      }
    } finally {
      clearTimeout(timer);
    }
  }

  /** Ends it, with SIGKILL where a milder signal has not done so in time. */
  async stop(signal: NodeJS.Signals = "SIGTERM", graceMs = 10_000): Promise<Ending> {
    this.kill(signal);
    // A stopped process takes no signal but SIGKILL.
    if (signal !== "SIGKILL") this.kill("SIGCONT");
    const timer = setTimeout(() => this.kill("SIGKILL"), graceMs);
    try {
      return await this.ended;
    } finally {
      clearTimeout(timer);
    }
  }

  #tell(): void {
    for (const resolve of this.#waiting) resolve();
    this.#waiting.clear();
  }
}

/**
 * Runs a TypeScript file of the repository. It is bundled first, once for each process that asks: what a loader does at each start takes longer than
 * all that a worker does until it is ready.
 * @param file from the root of the repository, two folders below it: `import.meta.dirname` then has the same depth
 */
export async function startScript(
  file: string,
  args: readonly string[] = [],
  options: ProcessOptions & { readonly flags?: readonly string[] } = {},
): Promise<GuardedProcess> {
  const { flags = [], ...rest } = options;
  const source = path.resolve(root, file);
  let bundle = bundles.get(source);
  if (!bundle) {
    bundle = bundled(source);
    bundles.set(source, bundle);
  }
  return new GuardedProcess(process.execPath, [...flags, await bundle, ...args], rest);
}

const bundles = new Map<string, Promise<string>>();

/** @param source a file of TypeScript @returns the bundle, which finds packages and the files of this one as the source would */
async function bundled(source: string): Promise<string> {
  const { build } = await import("esbuild");
  const name = path.relative(root, source).replaceAll(/[^\w]+/g, "-");
  const outfile = path.join(root, ".cache/scripts", `${name}.mjs`);
  const own = `${outfile}.${process.pid}`;
  await build({
    ...{ entryPoints: [source], outfile: own, bundle: true, packages: "external", logLevel: "warning" },
    ...{ platform: "node", format: "esm", target: "node20" },
    tsconfig: path.join(root, "bench/tsconfig.json"),
  });
  // Another process may run the one that is there.
  await rename(own, outfile);
  return outfile;
}

/**
 * Has a process group killed when this process ends, in whatever way: a shell waits at a pipe that only this process holds open.
 * @returns lets the group be
 */
function guard(group: number): () => void {
  const script = 'read -r line || kill -s KILL -- "-$0"';
  // In a group of its own, so that an interrupt at the terminal does not end it first.
  const shell = spawn("/bin/sh", ["-c", script, String(group)], {
    stdio: ["pipe", "ignore", "ignore"],
    detached: true,
  });
  shell.unref();
  (shell.stdin as typeof shell.stdin & { unref(): void }).unref();
  shell.stdin.on("error", () => {});
  return () => void shell.stdin.end("over\n");
}

function send(pid: number, signal: NodeJS.Signals): void {
  // 0 would be the group of this process: what could not be started has no number.
  if (pid === 0) return;
  try {
    process.kill(pid, signal);
  } catch {
    // It has ended.
  }
}
