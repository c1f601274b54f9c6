/**
 * What a client is told when something fails: the envelope of OpenAI's API, with a status, and headers that say whether and when to try
 * again. Messages hold nothing of the server.
 */

import { messageOf } from "../common/text.js";
import { errorTable, FlowTurboError, OptionError, publicMessage } from "../errors.js";
import { fieldOf, withFieldNames } from "./fields.js";

/** The body of an answer that is an error, as OpenAI's API has it. */
export interface ErrorEnvelope {
  readonly error: {
    /** For people. */
    readonly message: string;
    /** `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`. */
    readonly type: string;
    /** The field that is wrong; null if it is none. */
    readonly param: string | null;
    /** For programs, such as `queue_full`; null if there is none. */
    readonly code: string | null;
  };
}

export interface FailureOptions {
  readonly param?: string | null;
  readonly code?: string | null;
  /** Whether the same request may succeed later. Default: false. */
  readonly retryable?: boolean;
  /** Milliseconds after which it may; null where that is not known. */
  readonly retryAfterMs?: number | null;
  /** Further headers. */
  readonly headers?: Readonly<Record<string, string>>;
  /** What is for the log. */
  readonly cause?: unknown;
}

/** An answer that is an error. */
export class Failure extends Error {
  readonly status: number;
  readonly param: string | null;
  readonly code: string | null;
  readonly retryable: boolean;
  readonly retryAfterMs: number | null;
  readonly headers: Readonly<Record<string, string>>;

  constructor(status: number, message: string, options: FailureOptions = {}) {
    super(message, { cause: options.cause });
    this.status = status;
    this.param = options.param ?? null;
    this.code = options.code ?? null;
    this.retryable = options.retryable ?? false;
    this.retryAfterMs = options.retryAfterMs ?? null;
    this.headers = options.headers ?? {};
  }

  get envelope(): ErrorEnvelope {
    const { status, message, param, code } = this;
    const type =
      status === 401
        ? "authentication_error"
        : status === 429
          ? "rate_limit_error"
          : status >= 500
            ? "server_error"
            : "invalid_request_error";
    return { error: { message, type, param, code } };
  }

  /** With those that clients of OpenAI's API go by. */
  get allHeaders(): Record<string, string> {
    const { headers, retryable, retryAfterMs } = this;
    return {
      ...headers,
      "x-should-retry": String(retryable),
      // Whole seconds for those who know no better: rounded up, so that nobody is early.
      ...(retryAfterMs !== null && {
        "retry-after": String(Math.max(1, Math.ceil(retryAfterMs / 1000))),
        "retry-after-ms": String(Math.ceil(retryAfterMs)),
      }),
    };
  }
}

/** A request that is wrong. */
export function invalid(param: string | null, message: string, code = "invalid_value"): Failure {
  return new Failure(400, message, { param, code });
}

/** Nobody waits for the answer any more. */
export class HangUp extends Error {
  constructor() {
    super("The client closed its connection.");
    this.name = "HangUp";
  }
}

/** Milliseconds after which to try again where the error does not know it: a worker may join, and Redis come back, at any time. */
const usualRetryMs: Readonly<Record<string, number>> = {
  ERR_FLOWTURBO_FLEET_EMPTY: 5000,
  ERR_FLOWTURBO_REDIS: 2000,
};

/** Whatever was thrown, as an answer. */
export function failureOf(error: unknown): Failure {
  if (error instanceof Failure) return error;
  const { code, statusCode } = error as { code?: unknown; statusCode?: unknown };
  const row = errorTable[code as keyof typeof errorTable];
  if (error instanceof FlowTurboError && row) {
    const { retryAfterMs = usualRetryMs[error.code] ?? null } = error as { retryAfterMs?: number | null };
    const isOption = error instanceof OptionError;
    return new Failure(row.status, isOption ? withFieldNames(publicMessage(error)) : publicMessage(error), {
      param: isOption ? fieldOf(error.option) : paramOf(error.code),
      code: isOption ? "invalid_value" : codeOf(error.code),
      ...{ retryable: row.retryable, retryAfterMs, cause: error },
    });
  }
  if (typeof statusCode === "number" && statusCode >= 400 && statusCode < 500) {
    // Fastify's own: bodies that are too large, broken or of another type. Others come from hooks of the app around, which word them for
    // clients.
    const isFastifys = typeof code !== "string" || code.startsWith("FST_");
    const known = fastifyMessages[String(code)] ?? "The request is malformed.";
    const message = isFastifys && typeof code === "string" ? known : messageOf(error);
    return new Failure(statusCode, message, { code: "invalid_request" });
  }
  return new Failure(500, publicMessage(error), { code: "internal_error", cause: error });
}

const fastifyMessages: Record<string, string> = {
  FST_ERR_CTP_BODY_TOO_LARGE: "The body is too large.",
  FST_ERR_CTP_EMPTY_JSON_BODY: "Expected a JSON object as the body, but the body is empty.",
  FST_ERR_CTP_INVALID_JSON_BODY: "The body is not valid JSON.",
  FST_ERR_CTP_INVALID_MEDIA_TYPE: "Expected a body of type application/json, or multipart/form-data for edits.",
  FST_ERR_CTP_INVALID_CONTENT_LENGTH: "The body does not have the length that its header content-length says.",
};

/** `ERR_FLOWTURBO_QUEUE_FULL` → `queue_full`. */
function codeOf(code: string): string {
  return code.replace("ERR_FLOWTURBO_", "").toLowerCase();
}

function paramOf(code: string): string | null {
  return code.startsWith("ERR_FLOWTURBO_DEADLINE") ? "deadline_ms" : null;
}
