/**
 * A stream of server-sent events to one client. What is written waits in the client's own buffer, so that a slow reader delays nobody; when
 * the buffer is full, pictures that the next one replaces are dropped. A client that takes nothing at all is cut off.
 */

import type { FastifyReply } from "fastify";
import { whenOver } from "./endings.js";

export interface EventStreamOptions {
  /** Milliseconds between two comments that keep the connection open. */
  readonly keepAliveMs?: number;
  /** Bytes that may wait before partial pictures are dropped. */
  readonly maxWaiting?: number;
  /** Milliseconds without a byte taken, though some wait, after which the connection is closed. */
  readonly stuckMs?: number;
  /** Told of each event that is dropped. */
  readonly onDrop?: () => void;
}

export class EventStream {
  readonly #raw: FastifyReply["raw"];
  readonly #options: Required<EventStreamOptions>;
  readonly #timer: NodeJS.Timeout;
  /** When the client last took something, or owed nothing. */
  #takenAt = performance.now();
  #writtenAt = performance.now();
  #waiting = 0;
  #isOver = false;

  constructor(reply: FastifyReply, options: EventStreamOptions = {}) {
    this.#options = { keepAliveMs: 15_000, maxWaiting: 2 ** 20, stuckMs: 60_000, onDrop: () => {}, ...options };
    reply.hijack();
    this.#raw = reply.raw;
    const headers = Object.entries(reply.getHeaders()).filter(([, value]) => value !== undefined);
    this.#raw.writeHead(200, {
      ...(Object.fromEntries(headers) as Record<string, string>),
      "content-type": "text/event-stream; charset=utf-8",
      "cache-control": "no-cache, no-transform",
      // A proxy that gathers answers would hold the events back.
      "x-accel-buffering": "no",
    });
    this.#raw.flushHeaders();
    // A connection that breaks is an event of its own: `close`.
    this.#raw.on("error", () => {});
    const { keepAliveMs, stuckMs } = this.#options;
    this.#timer = setInterval(() => this.#check(), Math.min(keepAliveMs, stuckMs) / 3);
    whenOver(reply.request.raw, this.#raw, () => this.#stop());
  }

  /** @param event its name, its data, its id where the stream can be resumed, and whether a later event makes up for it */
  send(event: { type: string; data: unknown; id?: number; isDroppable?: boolean }): void {
    if (this.#isOver || this.#raw.destroyed) return;
    if (event.isDroppable && this.#raw.writableLength > this.#options.maxWaiting) {
      this.#options.onDrop();
      return;
    }
    const id = event.id === undefined ? "" : `id: ${event.id}\n`;
    // JSON has no line breaks, so that one line holds it.
    this.#write(`${id}event: ${event.type}\ndata: ${JSON.stringify(event.data)}\n\n`);
  }

  /** Ends the stream after what was sent. */
  end(): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#raw.end();
  }

  #write(text: string): void {
    this.#raw.write(text);
    this.#writtenAt = performance.now();
  }

  #check(): void {
    const now = performance.now();
    const { keepAliveMs, stuckMs } = this.#options;
    const waiting = this.#raw.writableLength;
    if (waiting === 0 || waiting < this.#waiting) this.#takenAt = now;
    this.#waiting = waiting;
    if (now - this.#takenAt > stuckMs) this.#raw.destroy();
    // Who takes nothing needs no more to take.
    else if (!this.#isOver && waiting === 0 && now - this.#writtenAt >= keepAliveMs) this.#write(": keep-alive\n\n");
  }

  #stop(): void {
    this.#isOver = true;
    clearInterval(this.#timer);
  }
}
