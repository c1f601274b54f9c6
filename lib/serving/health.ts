/**
 * The health of a model at work, for probes of orchestrators and for people: whether calls are answered, and what is
 * wrong though they are. It hears what befalls the runtime, and tells those who listen.
 */

import { EventEmitter } from "node:events";
import { DeviceLostError } from "../errors.js";
import type { DeviceName, RuntimeListener } from "../runtimes/runtime.js";
import type { SlowLaunch } from "./watch.js";

/** What a model tells those who listen to it, by name. */
export interface ModelEvents {
  /** The runtime's process is gone: work that was not at fault starts again. Or the GPU is, for good. */
  lost: [
    event: {
      /** Why. */
      readonly error: Error;
      /** Number of the device that it ran on, of a model that was loaded with `devices`; the others go on. */
      readonly device?: number;
    },
  ];
  /** The runtime works again after that. */
  restart: [
    event: {
      /** How often it has been started again since the model was loaded. */
      readonly restarts: number;
      /** What it was lost by. */
      readonly error: Error;
      /** Number of the device that it runs on, of a model that was loaded with `devices`. */
      readonly device?: number;
    },
  ];
  /** A launch takes far longer than it costs. Sent once for each such launch, while it runs. */
  slow: [launch: SlowLaunch];
}

/** The last error of a model that was not a caller's. */
export interface HealthError {
  /** Its code, such as "ERR_FLOWTURBO_RUNTIME_DIED"; null if it has none. */
  readonly code: string | null;
  /** For people. It may hold paths of this machine. */
  readonly message: string;
  /** When it came, as `Date.now()` gives it. */
  readonly at: number;
}

/** Whether a model works. */
export interface Health {
  /** Whether this process can go on; false once it has lost its GPU, or the last of several, for good (TensorRT), which only another process gets again. For liveness probes, which make an orchestrator restart it. */
  readonly live: boolean;
  /** Whether a call that is made now would be worked on: the model is neither disposed nor draining, and its runtime could be started when it was last tried. */
  readonly ready: boolean;
  /** Whether something is wrong though calls are taken; `reasons` say what. */
  readonly degraded: boolean;
  /** What is wrong, in sentences; empty if nothing is. */
  readonly reasons: readonly string[];
  /** How often the runtime's process was started again since the model was loaded. */
  readonly restarts: number;
  /** The last loss of the runtime, or the last call that failed through no fault of its caller; null if there was none. */
  readonly lastError: HealthError | null;
  /** The launch that runs now; null if none does. */
  readonly oldestLaunch: SlowLaunch | null;
}

/** For people. */
export function slowText({ graph, milliseconds, usualMs }: SlowLaunch): string {
  const usual = usualMs === null ? "what it usually takes is not known" : `it usually takes ${Math.round(usualMs)} ms`;
  return `A launch of "${graph}" runs for ${seconds(milliseconds)}; ${usual}.`;
}

function seconds(milliseconds: number): string {
  return `${Math.round(milliseconds / 1000)} s`;
}

/** A restart makes a model degraded for so many milliseconds. */
const restartShows = 60_000;

/** What is known of the runtime of one device. */
class RuntimeState {
  restartedAt = Number.NEGATIVE_INFINITY;
  /** What the runtime was lost by, until it runs again. */
  lost: Error | null = null;
  /** Whether it could not be started since. */
  isDown = false;
  /** What the GPU was lost by, for good. */
  fatal: DeviceLostError | null = null;
  silentMs: number | null = null;

  /** @param device null where the model has only one */
  constructor(readonly device: DeviceName | null) {}

  get isAtWork(): boolean {
    return !this.isDown && this.fatal === null;
  }

  /** What is wrong. */
  get reasons(): string[] {
    const reasons: string[] = [];
    const ago = performance.now() - this.restartedAt;
    if (this.fatal) reasons.push(this.fatal.message);
    else if (this.lost && this.isDown) reasons.push(`The runtime could not be started again: ${this.lost.message}`);
    else if (this.lost) reasons.push(`The runtime was lost; the next call starts it again: ${this.lost.message}`);
    else if (ago < restartShows) reasons.push(`The runtime was started again ${seconds(ago)} ago.`);
    if (this.silentMs !== null) reasons.push(`The runtime has not answered for ${seconds(this.silentMs)}.`);
    const { device } = this;
    return device ? reasons.map((reason) => `Device ${device.number} (${device.name}): ${reason}`) : reasons;
  }
}

export class HealthMonitor implements RuntimeListener {
  readonly events = new EventEmitter<ModelEvents>();
  #restarts = 0;
  #slowLaunches = 0;
  #runtimes: readonly RuntimeState[] = [new RuntimeState(null)];
  #slow: SlowLaunch | null = null;
  #lastError: HealthError | null = null;

  /** For the statistics. */
  get counters(): { readonly restarts: number; readonly slowLaunches: number } {
    return { restarts: this.#restarts, slowLaunches: this.#slowLaunches };
  }

  lost(error: Error): void {
    this.#wasLost(this.#runtimes[0]!, error);
  }

  restarted(): void {
    this.#wasRestarted(this.#runtimes[0]!);
  }

  silent(milliseconds: number | null): void {
    this.#runtimes[0]!.silentMs = milliseconds;
  }

  /** Listens to the runtime of one of several devices, once all of them are followed. */
  listenerOf(device: DeviceName): RuntimeListener & { readonly state: RuntimeState } {
    const state = new RuntimeState(device);
    return {
      state,
      lost: (error) => this.#wasLost(state, error),
      restarted: () => this.#wasRestarted(state),
      silent: (milliseconds) => {
        state.silentMs = milliseconds;
      },
    };
  }

  /** The model works with these devices. @param listeners of `listenerOf` */
  follow(listeners: readonly { readonly state: RuntimeState }[]): void {
    this.#runtimes = listeners.map(({ state }) => state);
  }

  /** Whether a device is lost for good, by its place among those that are followed. */
  isLost(device: number): boolean {
    return this.#runtimes[device]?.fatal != null;
  }

  #wasLost(state: RuntimeState, error: Error): void {
    if (error instanceof DeviceLostError && error.permanent) state.fatal ??= error;
    // Lost again before it ran again: it cannot be started.
    state.isDown = state.lost !== null;
    state.lost = error;
    state.silentMs = null;
    this.failed(error);
    this.#tell("lost", { error, ...deviceOf(state) });
  }

  #wasRestarted(state: RuntimeState): void {
    const error = state.lost ?? new Error("The runtime was lost.");
    this.#restarts++;
    state.restartedAt = performance.now();
    state.lost = null;
    state.isDown = false;
    this.#tell("restart", { restarts: this.#restarts, error, ...deviceOf(state) });
  }

  slow(launch: SlowLaunch): void {
    this.#slow = launch;
    this.#slowLaunches++;
    this.#tell("slow", launch);
  }

  /** A call has failed, or the runtime was lost. */
  failed(error: unknown): void {
    const { code, message } = error as { code?: unknown; message?: unknown };
    this.#lastError = {
      code: typeof code === "string" ? code : null,
      message: typeof message === "string" ? message : String(error),
      at: Date.now(),
    };
  }

  /**
   * @param running the launch that runs now
   * @param closed why no calls are taken; null where they are
   */
  report(running: SlowLaunch | null, closed: "draining" | "disposed" | null): Health {
    const reasons: string[] = [];
    if (closed === "disposed") reasons.push("The model has been disposed.");
    if (closed === "draining") reasons.push("The model takes no new calls: it ends when those under way are done.");
    for (const runtime of this.#runtimes) reasons.push(...runtime.reasons);
    const isSlow =
      this.#slow !== null &&
      running !== null &&
      running.graph === this.#slow.graph &&
      running.size === this.#slow.size &&
      running.batch === this.#slow.batch &&
      running.milliseconds >= this.#slow.milliseconds;
    if (isSlow) reasons.push(slowText(running));
    return {
      live: this.#runtimes.some(({ fatal }) => fatal === null),
      ready: closed === null && this.#runtimes.some(({ isAtWork }) => isAtWork),
      degraded: reasons.length > 0,
      reasons,
      restarts: this.#restarts,
      lastError: this.#lastError,
      oldestLaunch: running,
    };
  }

  /** An error of a listener must not end what the runtime or a request is doing: it is thrown by itself, as from a timer. */
  #tell<Name extends keyof ModelEvents>(name: Name, event: ModelEvents[Name][0]): void {
    if (this.events.listenerCount(name) === 0) return;
    queueMicrotask(() => (this.events as EventEmitter).emit(name, event));
  }
}

function deviceOf({ device }: RuntimeState): { readonly device?: number } {
  return device ? { device: device.number } : {};
}
