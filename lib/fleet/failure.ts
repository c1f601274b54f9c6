/** Errors on their way from a worker to those who wait for a job: of the same class, with the same fields and messages. */

import { messageOf } from "../common/text.js";
import { errorTable, FlowTurboError, type FlowTurboErrorCode, publicMessage, RuntimeError } from "../errors.js";

/** An error as JSON. */
export interface FailureJson {
  readonly code: string | null;
  readonly message: string;
  readonly publicMessage: string;
  /** What its class has besides. */
  readonly fields: Readonly<Record<string, unknown>>;
}

export function failureToJson(error: unknown): FailureJson {
  const isOwn = error instanceof FlowTurboError;
  const { name: _, code: __, cause: ___, ...fields } = isOwn ? (error as unknown as Record<string, unknown>) : {};
  return {
    code: isOwn ? error.code : null,
    message: messageOf(error),
    publicMessage: publicMessage(error),
    fields,
  };
}

/** Any text is answered with an error that can be thrown. */
export function failureFromJson(json: unknown): FlowTurboError {
  const { code, message, publicMessage: shown, fields } = (json ?? {}) as Partial<FailureJson>;
  if (typeof code !== "string" || !Object.hasOwn(errorTable, code))
    return new RuntimeError(`A worker of the fleet failed: ${String(message)}`);
  const known = code as FlowTurboErrorCode;
  const options = typeof shown === "string" ? { publicMessage: shown } : {};
  // Its own constructor would write the message anew, from what is not here any more.
  const error: FlowTurboError = Reflect.construct(
    FlowTurboError,
    [known, String(message), options],
    errorTable[known].type,
  );
  // NaN has no JSON.
  for (const [name, value] of Object.entries(fields ?? {}))
    if (!(name in error)) Object.defineProperty(error, name, { value: value ?? null, enumerable: true });
  return error;
}
