/**
 * One child process from its start to its end, seen from the parent: messages, and a promise of how it ended. A child
 * and not a worker thread, because `session.run` is synchronous and ending a worker thread during it aborts all of
 * the process (code 134); a crash or a lack of memory ends only the child, too.
 */

import { type ChildProcess, fork } from "node:child_process";
import { fileURLToPath } from "node:url";
import type { FromHost, HostSettings, ToHost } from "./protocol.js";

/** How a child ended. */
export interface HostEnd {
  readonly exitCode: number | null;
  readonly signal: string | null;
  /** Last lines that it wrote to its standard error. */
  readonly stderr: string;
}

/** What a child is started with. */
export interface HostLaunch {
  /** Path of the built host.ts. */
  readonly file: string;
  /** A folder with ONNX Runtime's library and a provider's, to be loaded from there; default: onnxruntime-node's own. */
  readonly libraries: string | undefined;
  /** Environment variables besides this process's own, and in place of them. */
  readonly env: Readonly<Record<string, string>>;
}

/** How a child is started. */
export function hostLaunch(
  host: URL,
  libraries: string | undefined,
  env: Readonly<Record<string, string>>,
): HostLaunch {
  // Read when ONNX Runtime is loaded: without it, it keeps a device id in the user's cache folder and reports its use
  // to Microsoft. What the user has set counts; an empty variable is none.
  const telemetry = { ORT_DISABLE_TELEMETRY: process.env.ORT_DISABLE_TELEMETRY || "1" };
  return { file: fileURLToPath(host), libraries, env: { ...env, ...telemetry } };
}

/** Characters of standard error that are kept for a message. */
const keptStderr = 4096;

/** Children to kill when this environment (the process, or a worker thread) exits: one listener for all of them. */
const alive = new Set<ChildProcess>();
function killAll(): void {
  for (const child of alive) child.kill("SIGKILL");
}

export class HostProcess {
  readonly ended: Promise<HostEnd>;
  readonly #child: ChildProcess;
  #stderr = "";

  /** Starts the child, which loads its library and then waits for `begin`. */
  constructor({ file, libraries, env }: HostLaunch) {
    const child = fork(file, libraries === undefined ? [] : [libraries], {
      serialization: "advanced",
      env: { ...process.env, ...env },
      // None of the parent's flags: --inspect would claim its port, a test runner's loaders do not belong there.
      execArgv: [],
      // host.ts watches stdin, whose end is the end of that process, and answers on stdout.
      stdio: ["pipe", "pipe", "pipe", "ipc"],
    });
    this.#child = child;
    this.ended = new Promise((resolve) => {
      const end = (exitCode: number | null, signal: string | null) => {
        alive.delete(child);
        if (alive.size === 0) process.off("exit", killAll);
        resolve({ exitCode, signal, stderr: this.#stderr.trim() });
      };
      child.once("close", end);
      child.on("error", (error) => {
        // It never started: no other event follows. Later errors (a closed channel) come with an end of their own.
        if (child.pid !== undefined) return;
        this.#stderr = error.message;
        end(null, null);
      });
    });
    if (alive.size === 0) process.on("exit", killAll);
    alive.add(child);
    child.stdin?.on("error", () => {});
    child.stderr?.setEncoding("utf8").on("data", (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-keptStderr);
    });
  }

  /**
   * Says what the child is for. It sends nothing before that. To be called once.
   * @param onAnswer called with each answer to a ping; of several at once with the last
   */
  begin(settings: HostSettings, onMessage: (message: FromHost) => void, onAnswer: (answer: string) => void): void {
    const { stdout } = this.#child;
    stdout?.setEncoding("utf8").on("data", (text: string) => onAnswer(text.trim().split("\n").at(-1)!));
    this.#child.on("message", onMessage);
    this.send({ type: "begin", settings });
  }

  send(message: ToHost): void {
    // A channel that has closed is reported by `ended`.
    if (this.#child.connected) this.#child.send(message, () => {});
  }

  /** Asks for a sign of life. */
  ping(): void {
    if (this.#child.stdin?.writable) this.#child.stdin.write(".");
  }

  /** Ends the child at once; everything that it holds goes with it. Resolves when it has ended. */
  kill(): Promise<HostEnd> {
    this.#child.kill("SIGKILL");
    return this.ended;
  }

  /** Whether this child keeps the parent's event loop alive. */
  set keepsAlive(value: boolean) {
    const method = value ? "ref" : "unref";
    const { channel, stdin, stdout, stderr } = this.#child;
    this.#child[method]();
    // Sockets here, typed as plain streams. Bun's channel has neither method: there the child alone counts.
    for (const handle of [channel, stdin, stdout, stderr] as ({ ref?(): void; unref?(): void } | null | undefined)[])
      handle?.[method]?.();
  }
}
