/**
 * One drawing on the server, from the request to its end: sent again where waiting helps, followed by its events, cancelled.
 * It shows nothing: what happens is told to `onChange`.
 */

import { ApiError, sleep } from "./api.js";

/** Milliseconds between two questions about the place in the queue, which has no events of its own. */
const placeInterval = 2000;
/** How often a request is sent again where the server was not ready, or did not answer. */
const mostAttempts = 4;

const isEnd = ({ type }) => /^job\.(completed|failed|cancelled)$/.test(type);

const newName = () => `${Date.now()}-${Math.random()}`;

/** A job that was cancelled by the person. */
export class Cancelled extends Error {}

export class Job {
  #api;
  #onChange;
  #onId;
  #stopWaiting = new AbortController();
  #stopStream = new AbortController();
  /** Its name on the server, or null. */
  id = null;

  /**
   * @param onChange called with what happened: an event of the server, or { type: "waiting" | "loading" | "lost", … }
   * @param onId called with its name, once it has one
   */
  constructor(api, { onChange, onId }) {
    this.#api = api;
    this.#onChange = onChange;
    this.#onId = onId;
  }

  /** Draws. Resolves with the answer. @throws ApiError, Cancelled */
  async draw(request) {
    const { id } = await this.#send(request);
    return this.follow(id);
  }

  /** Follows a job that is on the server, from its beginning. Resolves as draw(). */
  async follow(id) {
    this.id = id;
    this.#onId(id);
    if (this.#stopWaiting.signal.aborted) await this.cancel();
    const stop = this.#stopStream.signal;
    const places = new AbortController();
    const onLost = () => this.#onChange({ type: "lost" });
    try {
      const path = `${this.#path()}/events`;
      for await (const event of this.#api.events(path, { signal: stop, isLast: isEnd, onLost })) {
        // The events tell what is wrong.
        if (event.type === "job.queued") this.#askPlace(places.signal).catch(() => {});
        else places.abort();
        this.#onChange(event);
        if (event.type === "job.cancelled") throw new Cancelled();
        if (event.type === "job.failed") throw new ApiError(event.error.message, { status: 500, ...event.error });
        if (event.type === "job.completed") return event.job.result ?? (await this.#api.json(this.#path())).result;
      }
    } catch (error) {
      if (stop.aborted) throw new Cancelled();
      throw error;
    } finally {
      places.abort();
    }
    throw new ApiError("The events of the drawing broke off.");
  }

  /** Stops it as soon as possible. @throws ApiError if the server refuses */
  async cancel() {
    this.#stopWaiting.abort(new Cancelled());
    // A request under way is cancelled when it has a name.
    if (this.id === null) return;
    const { status } = await this.#api.json(this.#path(), { method: "DELETE" });
    if (status === "cancelled") this.#stopStream.abort();
  }

  #path() {
    return `v1/jobs/${encodeURIComponent(this.id)}`;
  }

  async #send(request) {
    const { signal } = this.#stopWaiting;
    let waited = false;
    let name = newName();
    for (let attempt = 1; ; attempt += 1) {
      signal.throwIfAborted();
      try {
        // With a name of its own, a request whose answer was lost is not drawn twice.
        const headers = { "idempotency-key": name };
        return await this.#api.json("v1/jobs", { body: request, headers });
      } catch (error) {
        signal.throwIfAborted();
        if (error.status === 429 && error.retryAfterMs !== null && !waited) {
          waited = true;
          await this.#wait(error);
        } else if (error.status === 503 && error.retryAfterMs !== null && attempt < mostAttempts) {
          this.#onChange({ type: "loading", message: error.message });
          await sleep(error.retryAfterMs, signal);
          await this.#api.ready(signal);
        } else if (error.status === 0 && attempt < mostAttempts) {
          this.#onChange({ type: "lost" });
          await sleep(500 * 2 ** attempt, signal);
          continue;
        } else throw error;
        name = newName();
      }
    }
  }

  async #wait({ message, retryAfterMs }) {
    const until = Date.now() + retryAfterMs;
    for (let left = retryAfterMs; left > 0; left = until - Date.now()) {
      this.#onChange({ type: "waiting", message, left });
      await sleep(Math.min(1000, left), this.#stopWaiting.signal);
    }
  }

  async #askPlace(signal) {
    for (;;) {
      await sleep(placeInterval, signal);
      const { place, predicted_ms } = await this.#api.json(this.#path(), { signal });
      if (place !== null) this.#onChange({ type: "job.queued", place, predicted_ms });
    }
  }
}
