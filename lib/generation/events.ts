/**
 * The events of one request on their way to its handlers: in order, one at a time. A handler may return a promise; the
 * next event waits for it. Drawing never waits, since its launches are shared with other callers: events wait here
 * instead. Of those that wait only the latest step event keeps its previews and latents, so that a slow handler holds one set of
 * pictures and no more.
 */

import { onAbort, untilAborted } from "../common/abort.js";
import type { AcceptEvent, GenerateOptions, HandlerOptions, StartEvent, StepEvent } from "../model.js";

type Handlers = Pick<GenerateOptions, "onAccept" | "onStart" | "onStep">;
type Delivery =
  | { readonly name: "onAccept"; readonly event: AcceptEvent }
  | { readonly name: "onStart"; readonly event: StartEvent }
  | { readonly name: "onStep"; readonly event: StepEvent };

export class RequestEvents {
  /** The request's own: it aborts with the caller's signal, and with the error of a handler. */
  readonly signal: AbortSignal;
  readonly #controller = new AbortController();
  readonly #handlers: Handlers;
  readonly #unfollow: () => void;
  readonly #waiting: Delivery[] = [];
  /** Whether a handler runs, or its promise is pending. */
  #isBusy = false;
  #idle: (() => void)[] = [];

  constructor({ signal, onAccept, onStart, onStep }: Handlers & { readonly signal?: AbortSignal | undefined }) {
    this.signal = this.#controller.signal;
    this.#handlers = { onAccept, onStart, onStep };
    this.#unfollow = onAbort(signal, () => this.abort(signal!.reason));
  }

  /** Delivers an event, at once or after those before it. Never throws: an error of a handler aborts the request. */
  send<Name extends Delivery["name"]>(name: Name, event: Extract<Delivery, { name: Name }>["event"]): void {
    if (!this.#handlers[name] || this.signal.aborted) return;
    const last = this.#waiting.at(-1);
    if (last?.name === "onStep")
      this.#waiting[this.#waiting.length - 1] = { name: "onStep", event: overtaken(last.event) };
    this.#waiting.push({ name, event } as Delivery);
    if (!this.#isBusy) this.#deliver();
  }

  /**
   * Settles as `work` does, after the handlers of all its events have settled.
   * @throws as soon as it happens: the caller's `signal.reason`, or the error of a handler
   */
  async around<T>(work: Promise<T>): Promise<T> {
    try {
      const result = await untilAborted(work, this.signal);
      await untilAborted(this.#settled(), this.signal);
      return result;
    } catch (error) {
      // A handler that is still at work learns that nobody waits for it.
      this.abort(error);
      throw error;
    } finally {
      this.#unfollow();
    }
  }

  /** Ends the request: gives up what waits. A second reason changes nothing. */
  abort(reason: unknown): void {
    this.#waiting.length = 0;
    this.#controller.abort(reason);
  }

  async #settled(): Promise<void> {
    if (this.#isBusy) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }

  #deliver(): void {
    this.#isBusy = true;
    const options: HandlerOptions = { signal: this.signal };
    while (!this.signal.aborted) {
      const next = this.#waiting.shift();
      if (!next) break;
      try {
        const handler = this.#handlers[next.name] as (event: Delivery["event"], options: HandlerOptions) => unknown;
        const returned = handler(next.event, options);
        if (!isThenable(returned)) continue;
        Promise.resolve(returned).then(
          () => this.#deliver(),
          (error) => this.abort(error),
        );
        return;
      } catch (error) {
        this.abort(error);
      }
    }
    this.#isBusy = false;
    for (const resolve of this.#idle.splice(0)) resolve();
  }
}

/** A step event after which another has come. */
export function overtaken<Event extends StepEvent>(event: Event): Event {
  return event.previews.length > 0 || event.latents ? { ...event, previews: [], latents: null } : event;
}

function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof (value as { then?: unknown } | null | undefined)?.then === "function";
}
