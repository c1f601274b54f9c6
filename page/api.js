/**
 * Calls of the server: JSON, errors as the envelope says them, the API key, and the events of a job. Events are read by fetch,
 * since an EventSource cannot send a key.
 */

/** An answer that is an error, or none at all. */
export class ApiError extends Error {
  /** HTTP status; 0 if there was no answer. */
  status;
  /** The field that is wrong, or null. */
  param;
  /** Milliseconds until the same call may succeed, or null. */
  retryAfterMs;

  constructor(message, { status = 0, param = null, retryAfterMs = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.retryAfterMs = retryAfterMs;
  }
}

/** Milliseconds that a stream may be silent until it counts as lost. The server sends comments more often. */
const longestSilence = 60_000;
/** How often in a row a stream is opened again without any event. */
const mostAttempts = 8;

/** Resolves after some milliseconds; rejects with the signal's reason. */
export function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const end = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, milliseconds);
    signal?.addEventListener("abort", end, { once: true });
  });
}

/** A name for one attempt of a call. Not crypto.randomUUID, which plain http has only on localhost. */
export function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What the answer says about waiting, in milliseconds; null if nothing. */
function retryAfter({ headers }) {
  const exact = headers.get("retry-after-ms");
  const seconds = headers.get("retry-after");
  const milliseconds = exact !== null ? Number(exact) : seconds !== null ? 1000 * Number(seconds) : Number.NaN;
  return Number.isFinite(milliseconds) ? Math.max(0, milliseconds) : null;
}

async function errorOf(response) {
  const { status } = response;
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered with status ${status}.`;
  return new ApiError(message, { status, param: body?.error?.param ?? null, retryAfterMs: retryAfter(response) });
}

/**
 * Reads text/event-stream (HTML standard, 9.2.6) from bytes.
 * @yields { id, data } of each event; id is the last one that was sent, "" if none was
 */
export async function* serverSentEvents(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  let id = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length > 0) yield { id, data: data.join("\n") };
        data = [];
        continue;
      }
      const colon = line.indexOf(":");
      const name = colon < 0 ? line : line.slice(0, colon);
      const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (name === "data") data.push(text);
      else if (name === "id") id = text;
    }
  }
}

export class Api {
  #askKey;
  #key = sessionStorage.getItem("flowturbo.key");
  /** One question at a time, however many calls wait for its answer. */
  #question = null;

  /** @param askKey resolves with the key that a person gave for a message, or null */
  constructor(askKey) {
    this.#askKey = askKey;
  }

  get hasKey() {
    return this.#key !== null;
  }

  /** Asks for a key, and keeps it until the tab is closed. Resolves with whether there is a new one. */
  askKey(message) {
    this.#question ??= this.#askKey(message)
      .then((key) => {
        if (key === null) return false;
        this.#key = key;
        sessionStorage.setItem("flowturbo.key", key);
        return true;
      })
      .finally(() => {
        this.#question = null;
      });
    return this.#question;
  }

  /** A response with a status of success. @throws ApiError, or the signal's reason */
  async fetch(path, { headers, signal, ...init } = {}) {
    for (;;) {
      const key = this.#key;
      const authorization = key === null ? {} : { authorization: `Bearer ${key}` };
      const response = await fetch(path, {
        ...init,
        signal: signal ?? null,
        headers: { ...headers, ...authorization },
        cache: "no-store",
      }).catch(() => {
        signal?.throwIfAborted();
        throw new ApiError("The server does not answer. Is it running, and is there a connection to it?");
      });
      if (response.ok) return response;
      const error = await errorOf(response);
      // Another call may have got a key meanwhile.
      if (error.status !== 401 || (this.#key === key && !(await this.askKey(error.message)))) throw error;
    }
  }

  /** The JSON of an answer. @throws as fetch() */
  async json(path, { body, headers, ...init } = {}) {
    const sent = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const type = body === undefined ? {} : { "content-type": "application/json" };
    const response = await this.fetch(path, { ...sent, ...init, headers: { ...type, ...headers } });
    return response.json().catch(() => {
      throw new ApiError("The answer of the server broke off.");
    });
  }

  /**
   * The events of a stream, which is opened again after the last event that came if the connection is lost.
   * @param isLast whether an event ends the stream
   * @param onLost called with whether the connection is lost now
   * @yields the data of each event
   * @throws ApiError if it cannot be opened, or the signal's reason
   */
  async *events(path, { signal, isLast, onLost }) {
    let last = "";
    let failures = 0;
    for (;;) {
      const silence = new AbortController();
      const either = AbortSignal.any([signal, silence.signal]);
      let timer = 0;
      const heard = () => {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), longestSilence);
      };
      try {
        heard();
        const response = await this.fetch(path, {
          signal: either,
          headers: { accept: "text/event-stream", ...(last !== "" && { "last-event-id": last }) },
        });
        const reader = response.body.getReader();
        const counted = {
          async read() {
            const chunk = await reader.read();
            heard();
            return chunk;
          },
        };
        for await (const { id, data } of serverSentEvents(counted)) {
          if (failures > 0) onLost(false);
          failures = 0;
          last = id;
          const event = JSON.parse(data);
          yield event;
          if (isLast(event)) return;
        }
      } catch (error) {
        signal.throwIfAborted();
        // What the server refuses, it refuses again, except while it is not ready or there is no answer at all.
        if (error instanceof ApiError && error.status !== 0 && error.status !== 503) throw error;
      } finally {
        clearTimeout(timer);
        silence.abort();
      }
      failures += 1;
      if (failures > mostAttempts) throw new ApiError("The connection to the server is lost.");
      onLost(true);
      await sleep(Math.min(8000, 250 * 2 ** failures), signal);
    }
  }

  /** Resolves when the server is ready. */
  async ready(signal) {
    for (let wait = 500; ; wait = Math.min(5000, 1.5 * wait)) {
      const response = await fetch("readyz", { signal, cache: "no-store" }).catch(() => null);
      if (response?.ok) return;
      await sleep(wait, signal);
    }
  }
}
