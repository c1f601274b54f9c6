/**
 * Every error that this package throws on purpose, each with a stable `code`; the table at the end says what a server
 * makes of each. Messages name the thing that is wrong and the remedy; callers branch on `code` or on the class, never on
 * the text. An abort is not among them: an aborted call rejects with `signal.reason`, as the platform's own functions do.
 *
 * A message may name files and folders of this machine. `publicMessage` is the form for clients of a service: it names none,
 * and does not tell whether one exists. An error of the caller's keeps its message there, so whoever throws one that
 * names a path gives both forms; for any other error clients are told its row's sentence, whatever its message says.
 */

/** What an error may be given besides its message. */
export interface FlowTurboErrorOptions extends ErrorOptions {
  /** The message without paths, for clients of a service. Default: the sentence of the code, or the message if the code has none. */
  publicMessage?: string;
}

/** Base class: `instanceof FlowTurboError` holds for every error below. */
export class FlowTurboError extends Error {
  /** Stable; see `errorTable`. */
  readonly code: FlowTurboErrorCode;
  readonly #publicMessage: string | undefined;
  constructor(code: FlowTurboErrorCode, message: string, options?: FlowTurboErrorOptions) {
    super(message, options);
    this.name = new.target.name;
    this.code = code;
    this.#publicMessage = options?.publicMessage;
  }

  /**
   * The message for clients of a service: without any path of this machine, without what its libraries printed, and without
   * a hint whether a file exists.
   */
  get publicMessage(): string {
    const row: ErrorRow | undefined = rows[this.code];
    // A code that a user of this class made up says nothing of the message.
    return this.#publicMessage ?? (row ? (row.sentence ?? this.message) : internal);
  }
}

/** An option or argument is wrong: the caller can correct it. */
export class OptionError extends FlowTurboError {
  /** Its name in the API. */
  readonly option: string;
  constructor(option: string, message: string, options?: FlowTurboErrorOptions) {
    super("ERR_FLOWTURBO_OPTION", message, options);
    this.option = option;
  }
}

/**
 * The installation cannot draw: a package that this one needs is missing or has no binaries for this machine, Node is too
 * old, or a bundler left files out. The message has the remedy.
 */
export class InstallationError extends FlowTurboError {
  /** The package that is meant, such as "sharp"; "node" for Node itself. */
  readonly package: string;
  /** What is wrong. The message is this and the remedy. */
  readonly reason: string;
  /** What to do about it. */
  readonly remedy: string;
  constructor(name: string, reason: string, remedy: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_INSTALLATION", `${reason} ${remedy}`, options);
    this.package = name;
    this.reason = reason;
    this.remedy = remedy;
  }
}

/** The checkpoint folder is incomplete, damaged or of an unsupported kind. */
export class CheckpointError extends FlowTurboError {
  /** The file or folder that is meant. */
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_CHECKPOINT", message, options);
    this.path = path;
  }
}

/**
 * Why a model of the hub cannot be had: `gated`: its licence has to be accepted first; `unauthorized`: the token is not accepted;
 * `not_found`: there is no such model, or it is private; `no_revision`: the model has no such revision; `layout`: it lacks files that are
 * needed, or is of another kind; `offline`: the cache lacks something, and requests are forbidden; `unreachable`: the hub cannot be
 * reached, or is overloaded; `damaged`: what comes is not what the hub's hash says; `cache`: the cache cannot be written, or its disk is
 * full; `refused`: anything else that the hub says, or an address of it that is none.
 */
export type HubReason =
  | "gated"
  | "unauthorized"
  | "not_found"
  | "no_revision"
  | "layout"
  | "offline"
  | "unreachable"
  | "damaged"
  | "cache"
  | "refused";

/**
 * A model of the Hugging Face hub cannot be downloaded. The code is `ERR_FLOWTURBO_HUB_UNREACHABLE` where the same call may succeed later,
 * and goes on where this one stopped.
 */
export class HubError extends FlowTurboError {
  /** `owner/name`; empty where no model is meant. */
  readonly repository: string;
  /** What prevents it; see `HubReason`. */
  readonly reason: HubReason;
  constructor(repository: string, reason: HubReason, message: string, options?: ErrorOptions) {
    super(reason === "unreachable" ? "ERR_FLOWTURBO_HUB_UNREACHABLE" : "ERR_FLOWTURBO_HUB", message, options);
    this.repository = repository;
    this.reason = reason;
  }
}

/** A runtime could not compile or run a graph. */
export class RuntimeError extends FlowTurboError {
  constructor(message: string, options?: ErrorOptions & { code?: FlowTurboErrorCode }) {
    super(options?.code ?? "ERR_FLOWTURBO_RUNTIME", message, options);
  }
}

/** The process that runs the graphs ended by itself (killed, out of memory), or hung and was replaced. The next call starts a fresh one. */
export class RuntimeDiedError extends RuntimeError {
  /** Exit code of the process; null if a signal ended it. */
  readonly exitCode: number | null;
  /** Signal that ended it, such as "SIGKILL", or null. */
  readonly signal: string | null;
  /** Whether the work of this call may be the cause: the process ended, by itself, while it worked on it. */
  readonly duringWork: boolean;
  constructor(message: string, exitCode: number | null, signal: string | null, duringWork = false) {
    super(message, { code: "ERR_FLOWTURBO_RUNTIME_DIED" });
    this.exitCode = exitCode;
    this.signal = signal;
    this.duringWork = duringWork;
  }
}

/**
 * The runtime that was asked for cannot be used on this machine: its library, the driver or a GPU is missing, or too
 * old. The message is the whole diagnosis, with a remedy for each cause; `flowturbo doctor` prints the same.
 */
export class RuntimeUnavailableError extends RuntimeError {
  /** The runtime that was asked for. */
  readonly runtime: string;
  constructor(runtime: string, message: string, options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_RUNTIME_UNAVAILABLE" });
    this.runtime = runtime;
  }
}

/** A graph could not be compiled. */
export class CompileError extends RuntimeError {
  /** Name of the graph whose engine could not be built. */
  readonly graph: string;
  /** Messages of the compiler, one for each line. */
  readonly details: readonly string[];
  constructor(graph: string, message: string, details: readonly string[] = [], options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_COMPILE" });
    this.graph = graph;
    this.details = details;
  }
}

/**
 * Work was refused before it began, since it would not fit into memory; or the GPU's memory ran out at one of its launches,
 * and what could be freed for it was not enough. The next call works in any case.
 */
export class MemoryError extends RuntimeError {
  /**
   * Bytes that it would take, of GPU memory or of this machine's; the message says which. Where memory ran out at a launch:
   * of the one block that could not be had. NaN if that is not known, as often with the runtimes cuda and webgpu.
   */
  readonly needed: number;
  /** Bytes of that memory that there are, or that are free; NaN if that is not known. */
  readonly available: number;
  constructor(message: string, needed: number, available: number) {
    super(message, { code: "ERR_FLOWTURBO_MEMORY" });
    this.needed = needed;
    this.available = available;
  }
}

/** The cache of engines cannot be used: not writable, not this user's, or open to others. */
export class CacheError extends FlowTurboError {
  /** The file or folder that is meant. */
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_CACHE", message, options);
    this.path = path;
  }
}

/** A tensor that must be finite holds NaN or an infinity. */
export class NotFiniteError extends RuntimeError {
  /** The launch that computed it, such as "block 3 of 10 (P, sigma 0.75 to 0.66)". */
  readonly where: string;
  constructor(where: string, message: string) {
    super(message, { code: "ERR_FLOWTURBO_NOT_FINITE" });
    this.where = where;
  }
}

/** The GPU failed at a launch. */
export class LaunchError extends RuntimeError {
  /** Name of the graph that was launched; null if it is not known. */
  readonly graph: string | null;
  /** Messages of TensorRT. */
  readonly details: readonly string[];
  constructor(graph: string | null, message: string, details: readonly string[] = [], options?: ErrorOptions) {
    super(message, { ...options, code: "ERR_FLOWTURBO_LAUNCH" });
    this.graph = graph;
    this.details = details;
  }
}

/**
 * The GPU answers nothing but errors since one of its launches failed, its driver stopped it, or it is gone. A driver gives it
 * back to a new process only, so it depends on where the runtime uses it. The code says which it is:
 * `ERR_FLOWTURBO_DEVICE_RESET` with the runtimes cuda and webgpu, which use it in a process of their own: the next call
 * starts another one, and only the call that was at work fails. `ERR_FLOWTURBO_DEVICE_LOST` with TensorRT, which uses it in this
 * process: every later call fails with this error at once, until this process is restarted.
 */
export class DeviceLostError extends RuntimeError {
  /** Whether it is lost for as long as this process lives. */
  readonly permanent: boolean;
  /** @param options `permanent`: default true */
  constructor(message: string, { permanent = true, ...options }: ErrorOptions & { permanent?: boolean } = {}) {
    super(message, { ...options, code: permanent ? "ERR_FLOWTURBO_DEVICE_LOST" : "ERR_FLOWTURBO_DEVICE_RESET" });
    this.permanent = permanent;
  }
}

/** A result cannot be written where the caller asked for it. */
export class OutputError extends FlowTurboError {
  /** The file or folder that is meant. */
  readonly path: string;
  constructor(path: string, message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_OUTPUT", message, options);
    this.path = path;
  }
}

/**
 * No schedule would be done within the time limit; nothing was drawn. The code says whether that may change:
 * `ERR_FLOWTURBO_DEADLINE` where only the requests of others prevent it, or a machine that has lately been slower than usual;
 * `ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE` where even alone no schedule would fit by the costs as they were measured.
 */
export class DeadlineError extends FlowTurboError {
  /** The limit, in milliseconds from the call. */
  readonly deadlineMs: number;
  /** The least limit that is accepted now, in milliseconds from the call. */
  readonly bestMs: number;
  /** The schedule that would take `bestMs`. */
  readonly blocks: string;
  /**
   * If only the requests of others, or a slower machine, prevent it: when there is expected to be room for this one, beside those who
   * have been told so before, in milliseconds from now. null if it is impossible.
   */
  readonly retryAfterMs: number | null;
  constructor(
    message: string,
    found: { deadlineMs: number; bestMs: number; blocks: string; retryAfterMs: number | null },
  ) {
    super(found.retryAfterMs === null ? "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE" : "ERR_FLOWTURBO_DEADLINE", message);
    this.deadlineMs = found.deadlineMs;
    this.bestMs = found.bestMs;
    this.blocks = found.blocks;
    this.retryAfterMs = found.retryAfterMs;
  }
}

/** The call took longer than its option `timeoutMs`; its work was stopped. */
export class TimeoutError extends FlowTurboError {
  /** The limit, in milliseconds from the call. */
  readonly timeoutMs: number;
  constructor(timeoutMs: number) {
    super(
      "ERR_FLOWTURBO_TIMEOUT",
      `The call was not done within its timeoutMs of ${timeoutMs} ms, and was stopped. Allow more time, or use deadlineMs, which chooses a schedule that fits.`,
    );
    this.timeoutMs = timeoutMs;
  }
}

/** As many requests wait as may. */
export class QueueFullError extends FlowTurboError {
  /** When there is expected to be a place for this one, beside those who have been told so before, in milliseconds from now. */
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

/** The model takes no new calls, since `drain()` was called; those under way are done. Another process may take this one. */
export class DrainingError extends FlowTurboError {
  constructor(what: string) {
    super(
      "ERR_FLOWTURBO_DRAINING",
      `${what} takes no new calls: it ends when those under way are done. Try again elsewhere, or later.`,
    );
  }
}

/** The fleet's Redis cannot be reached, or refuses. What was accepted before goes on when it is back. */
export class RedisError extends FlowTurboError {
  constructor(message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_REDIS", message, options);
  }
}

/** No worker of the fleet takes jobs now: none is there, or all of them drain. */
export class FleetEmptyError extends FlowTurboError {
  constructor(message: string, options?: ErrorOptions) {
    super("ERR_FLOWTURBO_FLEET_EMPTY", message, options);
  }
}

/** A job that two workers of the fleet have ended with. It may be the cause, so no third one takes it. */
export class PoisonousJobError extends FlowTurboError {
  /** Its id in the queue. */
  readonly jobId: string;
  /** The workers that ended while they had it. */
  readonly workers: readonly string[];
  constructor(jobId: string, workers: readonly string[]) {
    super(
      "ERR_FLOWTURBO_POISONOUS_JOB",
      `The job ${jobId} was given up, since the workers ${workers.join(" and ")} ended while they had it. Their logs may say why; other jobs are drawn as before.`,
    );
    this.jobId = jobId;
    this.workers = workers;
  }
}

/** A job of the fleet has a newer format than its workers read: gateways were updated before workers. */
export class FleetFormatError extends FlowTurboError {
  /** Of the job. */
  readonly format: number;
  /** The newest that is read. */
  readonly known: number;
  constructor(format: number, known: number) {
    super(
      "ERR_FLOWTURBO_FLEET_FORMAT",
      `The job has format ${format}, and the workers read up to ${known}. Update the workers before the gateways.`,
    );
    this.format = format;
    this.known = known;
  }
}

/** A line of the table of errors. */
export interface ErrorRow {
  /** Its class. */
  readonly type: abstract new (
    ...args: never[]
  ) => FlowTurboError;
  /** HTTP status that a server answers with. */
  readonly status: number;
  /** Whether the same call may succeed later, without any change. */
  readonly retryable: boolean;
  /** What clients of a service are told in place of the message, which may name paths; null where it names none. */
  readonly sentence: string | null;
}

/** What clients are told of an error that is not of this package. */
const internal = "Internal error.";

const rows = {
  ERR_FLOWTURBO_OPTION: { type: OptionError, status: 400, retryable: false, sentence: null },
  ERR_FLOWTURBO_INSTALLATION: {
    type: InstallationError,
    status: 500,
    retryable: false,
    sentence: "The service is not installed completely.",
  },
  ERR_FLOWTURBO_CHECKPOINT: {
    type: CheckpointError,
    status: 500,
    retryable: false,
    sentence: "The model's files cannot be used.",
  },
  ERR_FLOWTURBO_HUB: {
    type: HubError,
    status: 500,
    retryable: false,
    sentence: "The model's files cannot be downloaded.",
  },
  ERR_FLOWTURBO_HUB_UNREACHABLE: {
    type: HubError,
    status: 503,
    retryable: true,
    sentence: "The model's files cannot be downloaded now. Try again.",
  },
  ERR_FLOWTURBO_RUNTIME: { type: RuntimeError, status: 500, retryable: false, sentence: "The model could not be run." },
  ERR_FLOWTURBO_RUNTIME_DIED: {
    type: RuntimeDiedError,
    status: 503,
    retryable: true,
    sentence: "The process that runs the model ended. Try again.",
  },
  ERR_FLOWTURBO_RUNTIME_UNAVAILABLE: {
    type: RuntimeUnavailableError,
    status: 503,
    retryable: false,
    sentence: "The model cannot be run on this machine.",
  },
  ERR_FLOWTURBO_COMPILE: {
    type: CompileError,
    status: 500,
    retryable: false,
    sentence: "The model could not be compiled.",
  },
  ERR_FLOWTURBO_MEMORY: {
    type: MemoryError,
    status: 503,
    retryable: false,
    sentence: "There is not enough memory for this.",
  },
  ERR_FLOWTURBO_CACHE: {
    type: CacheError,
    status: 500,
    retryable: false,
    sentence: "The cache of compiled models cannot be used.",
  },
  ERR_FLOWTURBO_NOT_FINITE: {
    type: NotFiniteError,
    status: 500,
    retryable: false,
    sentence: "The picture could not be computed: values of the network overflow.",
  },
  ERR_FLOWTURBO_LAUNCH: {
    type: LaunchError,
    status: 500,
    retryable: true,
    sentence: "A launch on the GPU failed. Try again.",
  },
  ERR_FLOWTURBO_DEVICE_LOST: {
    type: DeviceLostError,
    status: 503,
    retryable: false,
    sentence: "The GPU was lost. The service has to be restarted.",
  },
  ERR_FLOWTURBO_DEVICE_RESET: {
    type: DeviceLostError,
    status: 503,
    retryable: true,
    sentence: "The GPU was lost for a moment. Try again.",
  },
  ERR_FLOWTURBO_OUTPUT: { type: OutputError, status: 500, retryable: false, sentence: "A file could not be written." },
  ERR_FLOWTURBO_DEADLINE: { type: DeadlineError, status: 429, retryable: true, sentence: null },
  ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE: { type: DeadlineError, status: 422, retryable: false, sentence: null },
  ERR_FLOWTURBO_TIMEOUT: { type: TimeoutError, status: 504, retryable: true, sentence: null },
  ERR_FLOWTURBO_QUEUE_FULL: { type: QueueFullError, status: 429, retryable: true, sentence: null },
  ERR_FLOWTURBO_DRAINING: {
    type: DrainingError,
    status: 503,
    retryable: true,
    sentence: "The service takes no new calls. Try again.",
  },
  ERR_FLOWTURBO_DISPOSED: {
    type: DisposedError,
    status: 503,
    retryable: false,
    sentence: "The model has been closed.",
  },
  ERR_FLOWTURBO_REDIS: {
    type: RedisError,
    status: 503,
    retryable: true,
    sentence: "The queue of the service cannot be reached. Try again.",
  },
  ERR_FLOWTURBO_FLEET_EMPTY: {
    type: FleetEmptyError,
    status: 503,
    retryable: true,
    sentence: "No worker takes requests now. Try again.",
  },
  ERR_FLOWTURBO_FLEET_FORMAT: {
    type: FleetFormatError,
    status: 503,
    retryable: true,
    sentence: "The service is being updated. Try again.",
  },
  ERR_FLOWTURBO_POISONOUS_JOB: {
    type: PoisonousJobError,
    status: 500,
    retryable: false,
    sentence: "The request was given up, since workers ended while they drew it.",
  },
} as const satisfies Record<string, ErrorRow>;

/** A stable name of what went wrong. */
export type FlowTurboErrorCode = keyof typeof rows;

/** Errors by code. */
export const errorTable: Readonly<Record<FlowTurboErrorCode, ErrorRow>> = rows;

/**
 * What a service may tell its clients of an error, whatever was thrown: `publicMessage` of an error of this package, and one sentence for
 * all others.
 */
export function publicMessage(error: unknown): string {
  return error instanceof FlowTurboError ? error.publicMessage : internal;
}
