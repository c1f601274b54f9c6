// The choice among candidates for a time limit, and how much a prediction leaves free.
import fc from "fast-check";
import { describe, expect, it, vi } from "vitest";
import { chooseCandidate, deadlineMargin, limitFor, Margin } from "../../lib/serving/deadline.js";

describe("chooseCandidate", () => {
  const candidates = [
    { text: "H1P9", milliseconds: 300, own: 250 },
    { text: "H1P5", milliseconds: 200, own: 150 },
    { text: "H1P1", milliseconds: 100, own: 50 },
  ];

  it("takes the first that fits with 15 % to spare, and says why", () => {
    expect(chooseCandidate(candidates, 1000)).toEqual({
      candidate: 0,
      predictedMs: 300,
      reason: "H1P9 is predicted to take 300 ms of 1000 ms, and is the richest of 3 schedules.",
    });
    expect(chooseCandidate(candidates, 344)).toEqual({
      candidate: 1,
      predictedMs: 200,
      reason:
        "H1P5 is predicted to take 200 ms of 344 ms, and is the richest of 3 schedules that fits; H1P9 would need 345 ms.",
    });
    expect(chooseCandidate(candidates, 115)!.candidate).toBe(2);
    expect(chooseCandidate(candidates, 114)).toBeNull();
    expect(chooseCandidate([candidates[2]!], 200)!.reason).toBe("H1P1 is predicted to take 100 ms of 200 ms.");
  });

  it("takes the richest that leaves room, where none does the cheapest that fits, and says that the load is why", () => {
    expect(chooseCandidate(candidates, 1000, 1.1, 250)!.candidate).toBe(0);
    expect(chooseCandidate(candidates, 1000, 1.1, 200)).toEqual({
      candidate: 1,
      predictedMs: 200,
      reason:
        "H1P5 is predicted to take 200 ms of 1000 ms; H1P9 would fit too, but leave no room for the requests that are expected at the present load.",
    });
    for (const room of [0, -1000]) expect(chooseCandidate(candidates, 1000, 1.1, room)!.candidate).toBe(2);
    expect(chooseCandidate(candidates.slice(0, 2), 1000, 1.1, 0)!.candidate).toBe(1);
    expect(chooseCandidate(candidates, 329, 1.1, 300)!.candidate).toBe(1);
    // The last need not be the cheapest.
    const cheap = { text: "H4", milliseconds: 90, own: 60 };
    expect(chooseCandidate([...candidates, cheap], 1000, 1.1, 0)!.candidate).toBe(2);
  });

  it("never takes one that does not fit, nor a later one than the first that does", () => {
    const times = fc.array(fc.double({ min: 0.1, max: 1e6, noNaN: true }), { minLength: 1, maxLength: 12 });
    fc.assert(
      fc.property(times, fc.double({ min: 0, max: 1e6, noNaN: true }), (milliseconds, limit) => {
        const choice = chooseCandidate(
          milliseconds.map((time, index) => ({ text: `H${index + 1}`, milliseconds: time, own: time })),
          limit,
        );
        const fits = milliseconds.map((time) => limitFor(time) <= limit);
        expect(choice?.candidate ?? -1).toBe(fits.indexOf(true));
      }),
    );
  });

  it("accepts the limit that it names", () => {
    fc.assert(
      fc.property(fc.double({ min: 0.1, max: 1e6, noNaN: true }), (milliseconds) => {
        expect(
          chooseCandidate([{ text: "H1", milliseconds, own: milliseconds }], limitFor(milliseconds)),
        ).not.toBeNull();
      }),
    );
  });
});

describe("Margin", () => {
  it("is the usual one where promises are kept", () => {
    const margin = new Margin();
    for (let i = 0; i < 1000; i++) margin.observe(false, 0);
    expect(margin.value).toBe(deadlineMargin);
  });

  it("grows with promises that are broken, within bounds", () => {
    const margin = new Margin();
    margin.observe(true, performance.now());
    expect(margin.value).toBeGreaterThan(deadlineMargin);
    for (let i = 0; i < 1000; i++) margin.observe(true, performance.now());
    expect(margin.value).toBeLessThan(3);
  });

  it("comes to where 99 % are kept, on a machine whose times vary more than the usual margin allows", () => {
    const margin = new Margin();
    let late = 0;
    let state = 1;
    const random = () => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return (state + 0.5) / 2 ** 32;
    };
    for (let i = 0; i < 8000; i++) {
      // Real over predicted time: log-normal, 95 % below 1.64, 99 % below 2.01.
      const ratio = Math.exp(0.3 * Math.sqrt(-2 * Math.log(random())) * Math.cos(2 * Math.PI * random()));
      const isLate = ratio > margin.value;
      if (i >= 200 && isLate) late++;
      margin.observe(isLate, performance.now());
    }
    expect(late / 7800).toBeLessThan(0.01);
    expect(late / 7800).toBeGreaterThan(0.001);
  });

  it("grows once for all that one incident made late", () => {
    const margin = new Margin();
    const before = performance.now() - 1;
    for (let i = 0; i < 20; i++) margin.observe(true, before);
    expect(margin.value).toBeCloseTo(deadlineMargin + 0.15, 6);
    margin.observe(true, performance.now());
    expect(margin.value).toBeCloseTo(deadlineMargin + 0.3, 6);
  });

  it("goes back to the usual one with time, while no promise ends", () => {
    vi.useFakeTimers({ toFake: ["performance"] });
    try {
      const margin = new Margin();
      for (let i = 0; i < 20; i++) margin.observe(true, performance.now());
      const excess = margin.value - deadlineMargin;
      expect(margin.after(35_000) - deadlineMargin).toBeCloseTo(excess / 2, 6);
      vi.advanceTimersByTime(65_000);
      expect(margin.value - deadlineMargin).toBeCloseTo(excess / 4, 6);
      vi.advanceTimersByTime(300_000);
      expect(margin.value).toBe(deadlineMargin);
    } finally {
      vi.useRealTimers();
    }
  });
});
