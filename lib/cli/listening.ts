/** What commands that listen at a port have in common. */

import { onAbort } from "../common/abort.js";
import { FlowTurboError, OptionError } from "../errors.js";

/** Resolves as soon as one of the signals has aborted. */
export function untilEnd(...signals: readonly AbortSignal[]): Promise<void> {
  return new Promise((resolve) => {
    for (const signal of signals) onAbort(signal, resolve);
  });
}

/** What to say of a port that cannot be listened at. @param flag that names it */
export function portError(flag: string, host: string, port: number, error: NodeJS.ErrnoException): Error {
  if (error instanceof FlowTurboError) return error;
  const { code, message } = error;
  const reason = code === "EADDRINUSE" ? `another program listens there; choose another ${flag}` : message;
  return new OptionError("port", `Cannot listen at ${host}:${port}: ${reason}.`);
}
