/**
 * A call of `generate` that is iterated over: its events and then its result, in order. Any model can offer this over its own `generate`. The
 * call starts at once and never waits for who reads, as with handlers: events wait here, and of the step events that wait only the newest
 * keeps its previews and latents. Written without a generator: the `return` of one would wait for a `next` that is pending.
 */

import { following } from "../common/abort.js";
import type { GenerateEvent, GenerateOptions, GenerateResult, GenerateStream, ImageModel } from "../model.js";
import { checkOptions, generateSchema } from "../options.js";
import { overtaken } from "./events.js";

type Next = IteratorResult<GenerateEvent, undefined>;
const over: Next = { done: true, value: undefined };

/** For whoever follows the call's signal; nobody gets it as an error. */
const leftReason = () => new DOMException("The stream was left before its end.", "AbortError");

/** `ImageModel.generateStream` over a model's `generate`. */
export function generateStream(generate: ImageModel["generate"], options: GenerateOptions): GenerateStream {
  return new Stream(generate, options);
}

class Stream implements GenerateStream {
  readonly #controller: AbortController;
  /** Resolves when the call has ended, however it did. */
  readonly #ended: Promise<void>;
  readonly #waiting: GenerateEvent[] = [];
  readonly #readers: { resolve(next: Next): void; reject(error: unknown): void }[] = [];
  /** What the call failed with, until somebody has been told. */
  #failure: { readonly error: unknown } | null = null;
  /** Whether nothing comes after what waits. */
  #isOver = false;

  constructor(generate: ImageModel["generate"], options: GenerateOptions) {
    const { controller, unfollow } = following(options?.signal instanceof AbortSignal ? options.signal : undefined);
    this.#controller = controller;
    this.#ended = this.#call(generate, options).then(
      (result) => this.#end({ type: "result", result }),
      (error) => this.#fail(error),
    );
    void this.#ended.then(unfollow);
  }

  next(): Promise<Next> {
    const event = this.#waiting.shift();
    if (event) return Promise.resolve({ done: false, value: event });
    if (this.#failure) {
      const { error } = this.#failure;
      this.#failure = null;
      return Promise.reject(error);
    }
    if (this.#isOver) return Promise.resolve(over);
    return new Promise((resolve, reject) => this.#readers.push({ resolve, reject }));
  }

  async return(): Promise<Next> {
    this.#isOver = true;
    this.#waiting.length = 0;
    this.#tellOver();
    this.#controller.abort(leftReason());
    await this.#ended;
    this.#failure = null;
    return over;
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }

  async #call(generate: ImageModel["generate"], options: GenerateOptions): Promise<GenerateResult> {
    // Handlers that are no functions would be called below.
    checkOptions(generateSchema, options, "generateStream()");
    const { onAccept, onStart, onStep } = options;
    return generate({
      ...options,
      signal: this.#controller.signal,
      onAccept: (event, context) => {
        this.#add({ type: "accept", ...event });
        return onAccept?.(event, context);
      },
      onStart: (event, context) => {
        this.#add({ type: "start", ...event });
        return onStart?.(event, context);
      },
      onStep: (event, context) => {
        this.#add({ type: "step", ...event });
        return onStep?.(event, context);
      },
    });
  }

  #add(event: GenerateEvent): void {
    if (this.#isOver) return;
    const reader = this.#readers.shift();
    if (reader) {
      reader.resolve({ done: false, value: event });
      return;
    }
    const last = this.#waiting.at(-1);
    if (event.type === "step" && last?.type === "step") this.#waiting[this.#waiting.length - 1] = overtaken(last);
    this.#waiting.push(event);
  }

  #end(result: GenerateEvent): void {
    this.#add(result);
    this.#isOver = true;
    this.#tellOver();
  }

  #fail(error: unknown): void {
    const reader = this.#readers.shift();
    if (reader) reader.reject(error);
    else if (!this.#isOver) this.#failure = { error };
    this.#isOver = true;
    this.#tellOver();
  }

  /** To whoever waits for an event that will not come. */
  #tellOver(): void {
    for (const { resolve } of this.#readers.splice(0)) resolve(over);
  }
}
