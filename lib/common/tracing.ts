/**
 * Node's tracing channels (`node:diagnostics_channel`): what other people's tracers and metrics subscribe to, without this package knowing
 * them. Nothing is published, and no context is made, where nobody has subscribed. Where a platform has no tracing channels there is no
 * tracing.
 *
 * Besides, the W3C trace context that a server has received, on its way to the calls that are made while its request is answered.
 */

import { AsyncLocalStorage } from "node:async_hooks";
// Not by name: a platform that lacks it could not load this file.
import diagnostics from "node:diagnostics_channel";

/** What is under way, and ends once. */
export interface Span {
  /** It has ended well. */
  end(): void;
  /** It has ended with an error. */
  fail(error: unknown): void;
}

/** One tracing channel: `tracing:<name>:start`, `:end`, `:asyncStart`, `:asyncEnd` and `:error`. */
export class Tracing<Context extends object> {
  readonly #channels: diagnostics.TracingChannel<unknown, Context> | null;

  constructor(name: string) {
    this.#channels = diagnostics.tracingChannel?.<unknown, Context>(name) ?? null;
  }

  /** Of any of its channels. A TracingChannel says so by itself only in later versions of Node 20. */
  get hasSubscribers(): boolean {
    if (!this.#channels) return false;
    const { start, end, asyncStart, asyncEnd, error } = this.#channels;
    return (
      start.hasSubscribers ||
      end.hasSubscribers ||
      asyncStart.hasSubscribers ||
      asyncEnd.hasSubscribers ||
      error.hasSubscribers
    );
  }

  /** Traces work, as `TracingChannel.tracePromise`: the context gets its `result` or its `error`. */
  around<T>(context: Context, work: () => Promise<T>): Promise<T> {
    if (!this.#channels) return work();
    return this.#channels.tracePromise(work, context) as Promise<T>;
  }

  /** Traces what ends elsewhere. */
  begin(context: Context): Span {
    let span: Span = { end: () => {}, fail: () => {} };
    const ending = new Promise<void>((resolve, reject) => {
      span = { end: () => resolve(), fail: reject };
    });
    this.around(context, () => ending).catch(() => {});
    return span;
  }

  /** Traces what is over already: start and end follow each other. */
  over(context: Context): void {
    this.#channels?.traceSync(() => {}, context);
  }
}

const received = new AsyncLocalStorage<string | null>();

/** Version 00 of the header `traceparent`, and what later versions must begin with. Ids of zeros and version ff are no ids and no version. */
const form = /^(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?=$|-)/;

/**
 * Calls `fn` with the trace context of a request that is being answered: calls of `generate` in it, whenever they are made, name it to those
 * who trace them (`GenerateTrace.traceparent`).
 * @param traceparent the W3C header `traceparent`; one that is malformed counts as none, as that standard says
 * @returns what `fn` returns
 */
export function withTraceparent<T>(traceparent: string | null | undefined, fn: () => T): T {
  const context = traceparent && form.test(traceparent) ? traceparent : null;
  // In Node 20 and 22 every promise of the process costs more from the first context on: none is made to say that there is none.
  return context === currentTraceparent() ? fn() : received.run(context, fn);
}

/** The trace context that was received, or null. */
export function currentTraceparent(): string | null {
  return received.getStore() ?? null;
}
