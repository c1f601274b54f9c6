/** Requests that fail for a while: which are repeated, after how long, and how often. */

import { onAbort } from "../common/abort.js";
import type { HubSettings } from "./settings.js";

/** A server that asks for more patience than this is told to the caller instead. */
const longestWaitMs = 5 * 60_000;

/** A failure that may be gone at the next try. */
export class TransientError extends Error {
  /**
   * @param reason of the HubError that it becomes when no try is left
   * @param retryAfterMs wait that the server asked for
   * @param progressed whether something of use came before it: then the tries begin anew
   */
  constructor(
    message: string,
    readonly reason: "unreachable" | "damaged" = "unreachable",
    readonly retryAfterMs: number | null = null,
    readonly progressed = false,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** @throws the last TransientError when no try is left; any other error at once; `signal.reason` after an abort */
export async function withRetries<T>(
  { attempts, backoffMs }: Pick<HubSettings, "attempts" | "backoffMs">,
  signal: AbortSignal | undefined,
  work: () => Promise<T>,
): Promise<T> {
  for (let failures = 1; ; failures++)
    try {
      signal?.throwIfAborted();
      return await work();
    } catch (error) {
      if (!(error instanceof TransientError)) throw error;
      if (error.progressed) failures = 1;
      const wait = error.retryAfterMs ?? backoffMs * 2 ** (failures - 1);
      if (failures >= attempts || wait > longestWaitMs) throw error;
      await pause(wait, signal);
    }
}

/**
 * The header Retry-After, in seconds or as a date; null without one that can be read. huggingface.co sends RateLimit instead: with
 * no requests remaining (r), and the seconds until there are more (t).
 */
export function retryAfterOf(headers: Headers): number | null {
  const text = headers.get("retry-after");
  if (text === null) {
    const reset = headers.get("ratelimit")?.match(/;\s*r=0\s*;\s*t=(\d+)/)?.[1];
    // It is rounded down.
    return reset === undefined ? null : 1000 * (Number(reset) + 1);
  }
  const ms = /^\d+(\.\d+)?$/.test(text) ? 1000 * Number(text) : Date.parse(text) - Date.now();
  return Number.isNaN(ms) ? null : Math.max(0, ms);
}

/** @throws `signal.reason` as soon as the signal aborts */
export async function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  signal?.throwIfAborted();
  await new Promise<void>((resolve, reject) => {
    const timer = setTimeout(() => {
      unfollow();
      resolve();
    }, ms);
    const unfollow = onAbort(signal, () => {
      clearTimeout(timer);
      reject(signal!.reason);
    });
  });
}
