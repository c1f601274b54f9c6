/**
 * Long work on the event loop in short slices. Whatever a caller's input makes long (text, noise, pixels) asks before each
 * small piece, `if (isDue()) await rest();`. The slice belongs to the event loop and not to one piece of work: a hundred
 * requests at once must not take a hundred slices between two turns. For the same reason it is asked without a wait where
 * there is time: those that waited would all have been told so before the first of them works.
 */

import { setImmediate } from "node:timers";

/** Milliseconds of work between two turns of the event loop. */
const slice = 5;

/** When work began in the present turn of the event loop. */
let began: number | null = null;
/** Ends when all that wait have had their turn. */
let line: Promise<void> = Promise.resolve();

/** Whether the present slice is used up. */
export function isDue(): boolean {
  const now = performance.now();
  if (began === null) {
    began = now;
    setImmediate(() => {
      began = null;
    });
  }
  return now - began >= slice;
}

/** Resolves in a later turn of the event loop; those that wait have one each, in the order in which they came. */
export function rest(): Promise<void> {
  // Immediates that are set during a turn come in the next one.
  line = line.then(() => new Promise<void>((resolve) => setImmediate(resolve)));
  return line;
}
