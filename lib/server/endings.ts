/**
 * When an answer is over: it was sent, or its connection is closed. Requests may be sent without waiting for answers; all but the first of
 * those answers have no connection yet, and hear nothing when it is closed. So each connection has one listener, for all of them.
 */

import type { IncomingMessage, ServerResponse } from "node:http";
import type { Socket } from "node:net";

const waiting = new WeakMap<Socket, Set<() => void>>();

/** Calls `listener` once, when the answer is over. @returns undoes that */
export function whenOver(request: IncomingMessage, answer: ServerResponse, listener: () => void): () => void {
  const { socket } = request;
  const listeners = listenersOf(socket);
  const forget = () => {
    answer.off("close", end);
    listeners.delete(end);
  };
  const end = () => {
    forget();
    listener();
  };
  answer.once("close", end);
  listeners.add(end);
  if (socket.destroyed) end();
  return forget;
}

function listenersOf(socket: Socket): Set<() => void> {
  const known = waiting.get(socket);
  if (known) return known;
  const listeners = new Set<() => void>();
  waiting.set(socket, listeners);
  socket.once("close", () => {
    for (const listener of [...listeners]) listener();
  });
  return listeners;
}
