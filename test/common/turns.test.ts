// Slices of the event loop: long work gives it a turn every few milliseconds, however many do such work at once.
import { describe, expect, it } from "vitest";
import { isDue, rest } from "../../lib/common/turns.js";

/** Works for some milliseconds. */
function work(milliseconds: number): void {
  const until = performance.now() + milliseconds;
  while (performance.now() < until);
}

describe("slices", () => {
  it("is due when the slice is used up, until the next turn of the event loop", async () => {
    await new Promise((resolve) => setImmediate(resolve));
    expect([isDue(), isDue()]).toEqual([false, false]);
    work(8);
    expect(isDue()).toBe(true);
    await Promise.resolve();
    expect(isDue()).toBe(true);
    await rest();
    expect(isDue()).toBe(false);
  });

  it("lets all that wait have a turn of the event loop each", async () => {
    await new Promise((resolve) => setImmediate(resolve));
    // In which turn of the event loop each piece of work was done.
    let turn = 0;
    let done = false;
    const count = () => {
      turn++;
      if (!done) setImmediate(count);
    };
    setImmediate(count);
    const pieces: number[] = [];
    const long = async () => {
      for (let piece = 0; piece < 5; piece++) {
        if (isDue()) await rest();
        work(8);
        pieces.push(turn);
      }
    };
    await Promise.all([long(), long(), long(), long()]);
    done = true;
    // Each piece takes more than a slice: no turn has more than the waiting one and a newcomer.
    const most = Math.max(...pieces.map((each) => pieces.filter((other) => other === each).length));
    expect(pieces.length).toBe(20);
    expect(most).toBeLessThanOrEqual(2);
  });
});
