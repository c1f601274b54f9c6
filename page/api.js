/**
 * Calls of the server: JSON, errors as the envelope says them, the API key, and the events of a job. Events are read by fetch,
 * since an EventSource cannot send a key.
 */

/**
 * An answer that is an error, or none at all: the HTTP status (0 without an answer), the field that is wrong, and the milliseconds until
 * the same call may succeed, or null.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfterMs = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfterMs });
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
    const timer = setTimeout(resolve, milliseconds);
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    signal?.addEventListener("abort", stop, { once: true });
  });
}

async function errorOf(response) {
  const { status, headers } = response;
  const { error } = await response.json().catch(() => ({}));
  const wait = headers.get("retry-after-ms");
  const message = error?.message ?? `The server answered with status ${status}.`;
  return new ApiError(message, { status, param: error?.param, retryAfterMs: wait && Number(wait) });
}

/**
 * Reads text/event-stream (HTML standard, 9.2.6) from bytes.
 * @param onBytes called when some have come
 * @yields { id, data } of each event; id is the last one that was sent, "" if none was
 */
async function* serverSentEvents(reader, onBytes) {
  const decoder = new TextDecoder();
  let rest = "";
  let id = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    onBytes();
    const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length > 0) yield { id, data: data.join("\n") };
        data = [];
        continue;
      }
      const [, name, text = ""] = line.match(/^([^:]*)(?:: ?(.*))?$/s);
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

  /** Asks for a key, and keeps it until the tab is closed. Resolves with whether there is a new one. */
  #ask(message) {
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
      const response = await fetch(path, {
        ...init,
        signal,
        headers: { ...headers, ...(key !== null && { authorization: `Bearer ${key}` }) },
        cache: "no-store",
      }).catch(() => {
        signal?.throwIfAborted();
        throw new ApiError("The server does not answer. Is it running, and is there a connection to it?");
      });
      if (response.ok) return response;
      const error = await errorOf(response);
      if (error.status !== 401) throw error;
      const message = key === null ? error.message : "The server does not know this key.";
      // Another call may have got one meanwhile.
      if (this.#key === key && !(await this.#ask(message))) throw error;
    }
  }

  /** The JSON of an answer. @throws as fetch() */
  async json(path, { body, headers, ...init } = {}) {
    if (body !== undefined) {
      init = { method: "POST", body: JSON.stringify(body) };
      headers = { "content-type": "application/json", ...headers };
    }
    const response = await this.fetch(path, { ...init, headers });
    return response.json().catch(() => {
      throw new ApiError("The answer of the server broke off.");
    });
  }

  /**
   * The events of a stream, which is opened again after the last event that came if the connection is lost.
   * @param isLast whether an event ends the stream
   * @param onLost called when the connection is lost
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
        for await (const { id, data } of serverSentEvents(response.body.getReader(), heard)) {
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
      onLost();
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
