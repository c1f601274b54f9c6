// The simulated fleet of bench/fleet: nothing is lost, work is conserved, and promises are kept where nothing is uncertain.
import { describe, expect, it } from "vitest";
import { type Setting, simulate, usualSetting } from "../../bench/fleet/fleet.js";

const tiny: Setting = { ...usualSetting, workers: 12, requests: 500 };
/** What is decided by is the state of the moment, launches take what they are said to, and every size is ready. */
const certain: Partial<Setting> = { ageMs: null, gateways: 1, noise: 0, coldMs: 0 };

const settings: Record<string, Partial<Setting>> = {
  usual: {},
  bursts: { arrivals: "bursts", load: 1.2 },
  "many gateways with old copies": { gateways: 8, ageMs: 200, load: 1.2, allLimited: true },
  "several queues": { shards: 4, load: 0.95 },
  "workers that ask while they have room": { aheadMs: Number.POSITIVE_INFINITY, load: 0.95 },
  "a short queue": { maxQueue: 5, load: 1.2 },
};

describe("a simulated fleet", () => {
  it.each(Object.entries(settings))("loses nothing: %s", (_, change) => {
    const { totals, utilisation, promised, kept, rowsPerLaunch } = simulate({ ...tiny, ...change });
    expect(totals.requests).toBe(tiny.requests);
    expect(totals.accepted + totals.refused).toBe(totals.requests);
    expect(totals.finished).toBe(totals.accepted);
    // Each row of each launch is run once, and workers are busy for as long as their launches take.
    expect(totals.rows).toBe(totals.rowsWanted);
    expect(totals.busyMs).toBeCloseTo(totals.launchedMs, 3);
    expect(utilisation).toBeGreaterThan(0.3);
    expect(utilisation).toBeLessThanOrEqual(1 + 1e-9);
    expect(rowsPerLaunch).toBeGreaterThanOrEqual(1);
    expect(kept).toBeLessThanOrEqual(promised);
  });

  it.each([0.8, 1.2])("keeps 99 of 100 promises at load %d where nothing is uncertain", (load) => {
    const { promised, kept } = simulate({ ...tiny, ...certain, load, requests: 1000 });
    expect(promised).toBeGreaterThan(300);
    expect(kept / promised).toBeGreaterThanOrEqual(0.99);
  });

  it("is the same for the same seed, but for the processor's time", () => {
    const of = (seed: number) => {
      const { admission, ...outcome } = simulate({ ...tiny, seed });
      return outcome;
    };
    expect(of(1)).toEqual(of(1));
    expect(of(1)).not.toEqual(of(2));
  });
});
