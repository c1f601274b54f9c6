// Who goes first, and that no request waits for ever.
import { afterEach, describe, expect, it, vi } from "vitest";
import { Gate } from "../../lib/common/gate.js";
import { agingMilliseconds, byPriority, comparePriorities, type Priority } from "../../lib/serving/priority.js";

afterEach(() => void vi.restoreAllMocks());

const priority = (sequence: number, extra: Partial<Priority> = {}): Priority => ({
  ...{ level: 0, due: null, arrival: 0, sequence },
  ...extra,
});

describe("comparePriorities", () => {
  it("goes by level, then due moment, then arrival", () => {
    const all = [
      priority(1, { due: 200 }),
      priority(2, { due: 100 }),
      priority(3),
      priority(4),
      priority(5, { level: 1, due: 900 }),
      // Without a time limit a request is due all the same.
      priority(6, { due: 1e6 }),
    ];
    const sorted = [...all].sort((a, b) => comparePriorities(a, b, 0));
    expect(sorted.map(({ sequence }) => sequence)).toEqual([5, 2, 1, 3, 4, 6]);
  });

  it("raises the level of those that wait, so that no entry waits at a gate for ever", async () => {
    let now = 0;
    vi.spyOn(performance, "now").mockImplementation(() => now);
    const gate = new Gate<Priority>({ capacity: 1, compare: byPriority });
    let leave = await gate.enter(priority(0));
    let isServed = false;
    const low = gate.enter(priority(1, { level: -3 })).then((over) => {
      isServed = true;
      over();
    });
    for (let round = 2; !isServed && round < 100; round++) {
      now += 1000;
      const high = gate.enter(priority(round, { level: 3, due: now + 1, arrival: now }));
      leave();
      leave = await Promise.race([high, low.then(() => high)]);
    }
    expect(isServed).toBe(true);
    // Six levels apart.
    expect(now).toBeGreaterThanOrEqual(6 * agingMilliseconds);
    leave();
    await low;
  });
});
