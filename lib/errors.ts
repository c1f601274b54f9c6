/**
 * Every error this package throws on purpose, each with a stable `code`. Messages name the thing that is wrong and
 * the remedy; callers branch on `code` or on the class, never on the text. An abort is not among them: an aborted
 * call rejects with `signal.reason`, as the platform's own functions do.
 */

export type FlowTurboErrorCode =
  | "ERR_FLOWTURBO_OPTION"
  | "ERR_FLOWTURBO_CHECKPOINT"
  | "ERR_FLOWTURBO_RUNTIME"
  | "ERR_FLOWTURBO_RUNTIME_DIED"
  | "ERR_FLOWTURBO_RUNTIME_UNAVAILABLE"
  | "ERR_FLOWTURBO_COMPILE"
  | "ERR_FLOWTURBO_MEMORY"
  | "ERR_FLOWTURBO_CACHE"
  | "ERR_FLOWTURBO_NOT_FINITE"
  | "ERR_FLOWTURBO_LAUNCH"
  | "ERR_FLOWTURBO_DEVICE_LOST"
  | "ERR_FLOWTURBO_OUTPUT"
  | "ERR_FLOWTURBO_DEADLINE"
  | "ERR_FLOWTURBO_QUEUE_FULL"
  | "ERR_FLOWTURBO_DISPOSED";

/** Base class: `instanceof FlowTurboError` holds for every error below. */
export class FlowTurboError extends Error {
  readonly code: FlowTurboErrorCode;
  constructor(code: FlowTurboErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = new.target.name;
    this.code = code;
  }
}

/** An option or argument is wrong: the caller can correct it. `option` is its name in the API. */
export class OptionError extends FlowTurboError {
  readonly option: string;
  constructor(option: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_OPTION", message, options);
    this.option = option;
  }
}

/** The checkpoint folder is incomplete, damaged or of an unsupported kind. `path` is the file or folder meant. */
export class CheckpointError extends FlowTurboError {
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_CHECKPOINT", message, options);
    this.path = path;
  }
}

/** A runtime could not compile or run a graph. */
export class RuntimeError extends FlowTurboError {
  constructor(message: string, options?: ErrorOptions & { code?: FlowTurboErrorCode }) {
    super(options?.code ?? "ERR_FLOWTURBO_RUNTIME", message, options);
  }
}

/** The process that runs the graphs ended by itself (killed, out of memory). The next call starts a fresh one. */
export class RuntimeDiedError extends RuntimeError {
  readonly exitCode: number | null;
  readonly signal: string | null;
  constructor(message: string, exitCode: number | null, signal: string | null) {
    super(message, { code: "ERR_FLOWTURBO_RUNTIME_DIED" });
    this.exitCode = exitCode;
    this.signal = signal;
  }
}

/**
 * The runtime that was asked for cannot be used on this machine: its library, the driver or a GPU is missing, or too
 * old. The message is the whole diagnosis, with a remedy for each cause; `flowturbo doctor` prints the same.
 */
export class RuntimeUnavailableError extends RuntimeError {
  readonly runtime: string;
  constructor(runtime: string, message: string, options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_RUNTIME_UNAVAILABLE" });
    this.runtime = runtime;
  }
}

/** A graph could not be compiled. `graph` is its name; `details` are the compiler's own words, line by line. */
export class CompileError extends RuntimeError {
  readonly graph: string;
  readonly details: readonly string[];
  constructor(graph: string, message: string, details: readonly string[] = [], options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_COMPILE" });
    this.graph = graph;
    this.details = details;
  }
}

/** Work was refused before it began, since it would not fit into memory. Both numbers are bytes. */
export class MemoryError extends RuntimeError {
  readonly needed: number;
  readonly available: number;
  constructor(message: string, needed: number, available: number) {
    super(message, { code: "ERR_FLOWTURBO_MEMORY" });
    this.needed = needed;
    this.available = available;
  }
}

/** The cache of engines cannot be used: not writable, not this user's, or open to others. */
export class CacheError extends FlowTurboError {
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_CACHE", message, options);
    this.path = path;
  }
}

/** A tensor that must be finite holds NaN or an infinity; `where` names the launch that produced it. */
export class NotFiniteError extends RuntimeError {
  readonly where: string;
  constructor(where: string, message: string) {
    super(message, { code: "ERR_FLOWTURBO_NOT_FINITE" });
    this.where = where;
  }
}

/** The GPU failed at a launch. `graph` is the one launched, if it is known; `details` are TensorRT's own words. */
export class LaunchError extends RuntimeError {
  readonly graph: string | null;
  readonly details: readonly string[];
  constructor(graph: string | null, message: string, details: readonly string[] = [], options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_LAUNCH" });
    this.graph = graph;
    this.details = details;
  }
}

/** The GPU answers nothing but errors since one of its launches failed. The next call starts on it anew. */
export class DeviceLostError extends RuntimeError {
  constructor(message: string, options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_DEVICE_LOST" });
  }
}

/** A result cannot be written where the caller asked for it. */
export class OutputError extends FlowTurboError {
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_OUTPUT", message, options);
    this.path = path;
  }
}

/**
 * No schedule would be done within the time limit; nothing was drawn. Milliseconds count from the call. What would have
 * been possible is in `bestMs`, with the schedule that it takes; a limit of at least that much is accepted now.
 */
export class DeadlineError extends FlowTurboError {
  readonly deadlineMs: number;
  readonly bestMs: number;
  /** The schedule that would take `bestMs`. */
  readonly blocks: string;
  /** If it is only for others' requests: when the same limit may be met, in milliseconds from now. Else null. */
  readonly retryAfterMs: number | null;
  constructor(
    message: string,
    found: { deadlineMs: number; bestMs: number; blocks: string; retryAfterMs: number | null },
  ) {
    super("ERR_FLOWTURBO_DEADLINE", message);
    this.deadlineMs = found.deadlineMs;
    this.bestMs = found.bestMs;
    this.blocks = found.blocks;
    this.retryAfterMs = found.retryAfterMs;
  }
}

/** As many requests wait as may. One of them is expected to have left the queue in `retryAfterMs`. */
export class QueueFullError extends FlowTurboError {
  readonly retryAfterMs: number;
  /** Requests that wait. */
  readonly waiting: number;
  constructor(message: string, waiting: number, retryAfterMs: number) {
    super("ERR_FLOWTURBO_QUEUE_FULL", message);
    this.waiting = waiting;
    this.retryAfterMs = retryAfterMs;
  }
}

/** The model was disposed before or during the call. */
export class DisposedError extends FlowTurboError {
  constructor(what: string) {
    super("ERR_FLOWTURBO_DISPOSED", `${what} has been disposed; load it again before using it.`);
  }
}
