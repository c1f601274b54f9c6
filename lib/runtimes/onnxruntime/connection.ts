/**
 * The messages between the runtime and one child process: what the child has received, which runs are under way in it,
 * and the error of each run where the child fails or ends.
 */

import { thisPlatform } from "../../common/platform.js";
import type { Tensor } from "../../common/tensor.js";
import { InstallationError, NotFiniteError, RuntimeDiedError, RuntimeError } from "../../errors.js";
import type { Program } from "../../program/program.js";
import { Preempted } from "../runtime.js";
import { whyBroken, whyUnsupported } from "./binaries.js";
import { pack } from "./packing.js";
import { type HostEnd, HostProcess } from "./process.js";
import type { Failure, FinishedLaunch, FromHost, SentGraph, ToHost } from "./protocol.js";

export class HostConnection {
  readonly process: HostProcess;
  /** Resolves with ONNX Runtime's version. */
  readonly ready: Promise<string>;
  /** Resolves when the child has ended, with the reason: that of `ready` if it never was ready. */
  readonly ended: Promise<Error>;
  /** Names of the graphs that it has received. */
  readonly known = new Set<string>();
  #runs = 0;
  /** Of the runs under way. */
  readonly #listeners = new Map<number, { receive(message: FromHost): void; reject(error: Error): void }>();
  /** The error of runs that begin after the child has ended. */
  #end: Error | null = null;
  /** Messages for when the child is ready. */
  #outbox: ToHost[] | null = [];

  constructor(file: URL, settings: ConstructorParameters<typeof HostProcess>[1]) {
    let ready: { resolve(version: string): void; reject(error: Error): void };
    this.ready = new Promise((resolve, reject) => {
      ready = { resolve, reject };
    });
    this.process = new HostProcess(file, settings, (message) => {
      if (message.type === "ready") {
        for (const waiting of this.#outbox!) this.process.send(waiting);
        this.#outbox = null;
        ready.resolve(message.version);
      } else if (message.type === "broken") {
        const { reason, remedy } = whyBroken(message.message, thisPlatform());
        ready.reject(new InstallationError("onnxruntime-node", reason, remedy));
        void this.process.kill();
      } else this.#listeners.get(message.id)?.receive(message);
    });
    void this.process.ended.then((ending) => {
      // Libraries for glibc can crash with musl, where they load at all.
      const unsupported = this.#outbox && whyUnsupported(thisPlatform());
      ready.reject(
        unsupported
          ? new InstallationError("onnxruntime-node", unsupported.reason, unsupported.remedy)
          : diedError(ending),
      );
    });
    // Each caller that waits for it gets the error; where nobody waits, a child that cannot start must not end the program.
    this.ready.catch(() => {});
    this.ended = this.process.ended
      .then((ending) => this.ready.then(() => diedError(ending)))
      .catch((error: Error) => error);
    void this.ended.then((error) => {
      this.#end = error;
      for (const { reject } of this.#listeners.values()) reject(error);
    });
  }

  /** Sends a message, in order, now or when the child is ready. */
  send(message: ToHost): void {
    if (this.#outbox) this.#outbox.push(message);
    else this.process.send(message);
  }

  /** Sends a program. The outcome comes when the child is done with it. */
  run(
    graphs: readonly SentGraph[],
    program: Program,
    onLaunch: (report: FinishedLaunch) => void,
    workspace: number | undefined,
  ) {
    const id = this.#runs++;
    const outcome = new Promise<Record<string, Tensor>>((resolve, reject) => {
      const receive = (message: FromHost) => {
        if (message.type === "launched" || message.type === "done")
          for (const report of message.reports) onLaunch(report);
        if (message.type === "done") resolve(message.results);
        if (message.type === "failed") reject(errorOf(message.failure));
      };
      this.#listeners.set(id, { receive, reject });
      if (this.#end) reject(this.#end);
    }).finally(() => this.#listeners.delete(id));
    this.send({ type: "run", id, graphs, program: pack(program), workspace });
    for (const { name } of graphs) this.known.add(name);
    return {
      outcome,
      abort: () => this.send({ type: "abort", id }),
      preempt: () => this.send({ type: "preempt", id }),
    };
  }
}

function errorOf(failure: Failure): Error {
  if (failure.kind === "not-finite") return new NotFiniteError(failure.where, failure.message);
  if (failure.kind === "preempted") return new Preempted(failure.launches, failure.results);
  return new RuntimeError(failure.kind === "aborted" ? "The run was stopped." : failure.message);
}

function diedError({ exitCode, signal, stderr }: HostEnd): RuntimeDiedError {
  const how = signal ? `was ended by ${signal}` : exitCode === null ? "could not start" : `ended with code ${exitCode}`;
  const hint =
    signal === "SIGKILL"
      ? ' The system may have run out of memory: try smaller pictures, a smaller batch or `weights: "lazy"`.'
      : "";
  const output = stderr ? ` It wrote: ${stderr}` : "";
  return new RuntimeDiedError(`The process that runs ONNX Runtime ${how}.${hint}${output}`, exitCode, signal);
}
