/** Processes of a fleet, for tests and benchmarks that end some of them in whatever way. */

import { type GuardedProcess, startScript } from "../processes.js";
import type { AskedFor, Ended, FromProcess, Settings, ToProcess } from "./protocol.js";

export interface Answer {
  readonly ended: Ended;
  readonly steps: readonly number[];
  /** From the call in the process to its end. */
  readonly milliseconds: number;
}

interface Asked {
  settle(answer: Answer | null): void;
  readonly onAccepted: () => void;
}

/** One of these processes. */
export class FleetProcess {
  readonly process: GuardedProcess;
  readonly role: Settings["role"];
  /** Of the HTTP server of a gateway that has one. */
  port: number | null = null;
  /** What happened that must not: an end of what has ended, or was not asked. */
  readonly faults: string[] = [];
  /** What it tells besides. */
  onMessage: (message: FromProcess) => void = () => {};
  readonly #asked = new Map<number, Asked>();
  readonly #over = new Set<number>();
  readonly #others = new Map<FromProcess["type"], (message: FromProcess | null) => void>();
  #asks = 0;

  /** Resolves when it works. @throws Error with what it wrote if it does not */
  static async start(settings: Settings, onMessage?: (message: FromProcess) => void): Promise<FleetProcess> {
    const file = "test/support/fleet/process.ts";
    const child = await startScript(file, [JSON.stringify(settings)], { messages: true });
    const started = new FleetProcess(child, settings.role);
    if (onMessage) started.onMessage = onMessage;
    const ready = await started.#next("ready");
    if (!ready)
      throw new Error(`A ${settings.role} did not start: ${JSON.stringify(started.process.ending)} ${started.process.errors}`); // biome-ignore format: one line
    started.port = ready.port;
    return started;
  }

  private constructor(child: GuardedProcess, role: Settings["role"]) {
    this.role = role;
    this.process = child;
    this.process.child.on("message", (message: FromProcess) => this.#heard(message));
    // One that is killed may have been sent something.
    this.process.child.on("error", () => {});
    void this.process.ended.then(() => {
      for (const { settle } of this.#asked.values()) settle(null);
      this.#asked.clear();
      for (const settle of this.#others.values()) settle(null);
    });
  }

  get isRunning(): boolean {
    return this.process.child.exitCode === null && this.process.child.signalCode === null;
  }

  /**
   * Asks a gateway, or a library, for something.
   * @returns how to cancel it, and how it ended; null if the process ended before
   */
  ask(asked: AskedFor, onAccepted: () => void = () => {}): { cancel(): void; answer: Promise<Answer | null> } {
    const ask = this.#asks++;
    const answer = new Promise<Answer | null>((settle) => this.#asked.set(ask, { settle, onAccepted }));
    if (!this.#send({ type: "ask", ask, ...asked })) {
      this.#asked.get(ask)?.settle(null);
      this.#asked.delete(ask);
    }
    return { cancel: () => void this.#send({ type: "cancel", ask }), answer };
  }

  /** Requests with seeds of their own by callers that each ask again when they are answered. */
  async load(callers: number, jobs: number, asked: AskedFor): Promise<Extract<FromProcess, { type: "loaded" }>> {
    const loaded = this.#next("loaded");
    this.#send({ type: "load", callers, jobs, asked });
    return (await loaded) ?? this.#failed();
  }

  /** Milliseconds of processor time that it has had. */
  async usage(): Promise<number> {
    const usage = this.#next("usage");
    this.#send({ type: "usage" });
    return (await usage)?.milliseconds ?? this.#failed();
  }

  /** Lets it leave the fleet and end. */
  async stop(): Promise<void> {
    this.#send({ type: "stop" });
    this.process.kill("SIGCONT");
    const late = setTimeout(() => this.process.kill("SIGKILL"), 15_000);
    await this.process.ended;
    clearTimeout(late);
  }

  #heard(message: FromProcess): void {
    if (message.type === "accepted") this.#asked.get(message.ask)?.onAccepted();
    else if (message.type === "ended") {
      const { ask } = message;
      if (this.#over.has(ask)) this.faults.push(`ask ${ask} ended twice`);
      this.#over.add(ask);
      this.#asked.get(ask)?.settle(message);
      this.#asked.delete(ask);
    }
    this.#others.get(message.type)?.(message);
    this.onMessage(message);
  }

  #next<T extends FromProcess["type"]>(type: T): Promise<Extract<FromProcess, { type: T }> | null> {
    return new Promise((resolve) => {
      this.#others.set(type, (message) => {
        this.#others.delete(type);
        resolve(message as Extract<FromProcess, { type: T }> | null);
      });
      if (this.process.ending) this.#others.get(type)!(null);
    });
  }

  #send(message: ToProcess): boolean {
    if (!this.isRunning || !this.process.child.connected) return false;
    this.process.child.send(message, () => {});
    return true;
  }

  #failed(): never {
    throw new Error(`A ${this.role} ended: ${this.process.errors}`);
  }
}
