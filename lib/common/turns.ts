/**
 * Long work on the event loop in short slices. Whatever a caller's input makes long (text, noise, pixels) asks `rest()`
 * every fraction of a millisecond, and waits where it gets a promise. The slice belongs to the event loop and not to one
 * piece of work: a hundred requests at once must not take a hundred slices between two turns.
 */

import { setImmediate } from "node:timers";

/** Milliseconds of work between two turns of the event loop. */
const slice = 5;

/** When work began in the present turn of the event loop. */
let began: number | null = null;
/** Ends when all that wait have had their turn. */
let line: Promise<void> = Promise.resolve();

/** What to wait for where the present slice is used up; undefined where there is time left. */
export function rest(): Promise<void> | undefined {
  const now = performance.now();
  if (began === null) {
    began = now;
    setImmediate(() => {
      began = null;
    });
    return undefined;
  }
  if (now - began < slice) return undefined;
  // One after another: immediates that are set during a turn of the loop come in the next one.
  line = line.then(() => new Promise<void>((resolve) => setImmediate(resolve)));
  return line;
}
