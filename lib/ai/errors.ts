/**
 * Errors as the AI SDK knows them. It tells its errors by symbols of the global registry, so that several versions of its packages
 * can live in one process; an error with these symbols is one of them, without importing a package that may not be there.
 */

import { RemoteError } from "../clients/remote.js";
import { clipped, messageOf } from "../common/text.js";
import { errorTable, FlowTurboError } from "../errors.js";

const isSdkError = Symbol.for("vercel.ai.error");

abstract class SdkError extends Error {
  constructor(name: string, message: string, cause?: unknown) {
    super(message, { cause });
    this.name = name;
    for (const symbol of [isSdkError, Symbol.for(`vercel.ai.error.${name}`)])
      Object.defineProperty(this, symbol, { value: true });
  }
}

/** As `APICallError` of the AI SDK: `generateImage` tries again where `isRetryable` holds, after what `responseHeaders` says. */
export class CallError extends SdkError {
  readonly url: string;
  readonly requestBodyValues: unknown;
  readonly statusCode: number | undefined;
  readonly responseHeaders: Record<string, string> | undefined;
  readonly responseBody: string | undefined;
  readonly isRetryable: boolean;
  readonly data: unknown;

  constructor(message: string, fields: Omit<CallError, "name" | "message" | "stack">) {
    super("AI_APICallError", message, fields.cause);
    this.url = fields.url;
    this.requestBodyValues = fields.requestBodyValues;
    this.statusCode = fields.statusCode;
    this.responseHeaders = fields.responseHeaders;
    this.responseBody = fields.responseBody;
    this.isRetryable = fields.isRetryable;
    this.data = fields.data;
  }
}

/** As `NoSuchModelError` of the AI SDK. */
export class NoModelError extends SdkError {
  readonly modelId: string;
  readonly modelType: string;

  constructor(modelId: string, modelType: string, message: string) {
    super("AI_NoSuchModelError", message);
    this.modelId = modelId;
    this.modelType = modelType;
  }
}

/** As `InvalidArgumentError` of the AI SDK. */
export class ArgumentError extends SdkError {
  readonly argument: string;

  constructor(argument: string, message: string, cause?: unknown) {
    super("AI_InvalidArgumentError", message, cause);
    this.argument = argument;
  }
}

/** What `generateImage` is to throw: an error of this package as a `CallError`, and an abort's reason, or any other, as it is. */
export function callError(error: unknown, url: string, requestBodyValues: unknown): unknown {
  if (error instanceof RemoteError)
    return new CallError(error.message, {
      ...{ url: error.url, requestBodyValues: error.request, statusCode: error.status ?? undefined },
      ...{ responseHeaders: { ...error.headers }, responseBody: error.body ?? undefined },
      ...{ isRetryable: error.isRetryable, data: error.error && { error: error.error }, cause: error.cause },
    });
  if (!(error instanceof FlowTurboError)) return error;
  const { status, retryable } = errorTable[error.code];
  // Errors that say when to try again have the time in one field.
  const { retryAfterMs, option } = error as { retryAfterMs?: number | null; option?: string };
  return new CallError(clipped(messageOf(error), 2000), {
    ...{ url, requestBodyValues, statusCode: status, responseBody: undefined, isRetryable: retryable, cause: error },
    responseHeaders: typeof retryAfterMs === "number" ? { "retry-after-ms": String(retryAfterMs) } : undefined,
    data: { error: { message: error.message, param: option ?? null, code: error.code } },
  });
}
