// Tables of costs that are wrong: learned beside busy neighbours, or long ago. On a simulated device.
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { type CostEntry, entryOf } from "../../lib/serving/costs.js";
import type { CostStore } from "../../lib/serving/store.js";
import {
  capacityOf,
  elapse,
  MemoryStore,
  milliseconds,
  type Simulation,
  simulate,
  sleep,
  virtualTime,
} from "./timed.js";

beforeEach(virtualTime);
afterEach(() => {
  vi.useRealTimers();
});

const batches = [1, 2, 4, 8];
const asked = { ladder: ["H1P7R2"] };
const day = 24 * 3600_000;

/** What the launches take, measured some days ago, or otherwise as `wrong` says. */
function table(wrong: (graph: string, batch: number) => number | readonly number[] | undefined, days = 2): CostEntry[] {
  return Object.entries(milliseconds).flatMap(([graph, cost]) =>
    batches.map((batch) => {
      const values = [wrong(graph, batch) ?? cost(batch)].flat();
      return entryOf(graph, batch, "4x4", values, Date.now() - days * day);
    }),
  );
}
const right = () => table(() => undefined);
const times = (factor: number, ...those: number[]) =>
  table((graph, batch) => (those.includes(batch) ? factor * milliseconds[graph]!(batch) : undefined));

/** One request, and time in which nothing happens. */
async function rest({ ask }: Simulation): Promise<void> {
  await elapse(ask(asked));
  await elapse(sleep(20_000));
}
const capacity = (entries: CostEntry[], background: boolean) => {
  const simulation = simulate(entries, { background });
  return { simulation, of: () => capacityOf(simulation, asked, 200) };
};

it.each([
  ["the largest batch", () => times(3, 8)],
  ["all but the smallest", () => times(2.5, 2, 4, 8)],
  ["the middle ones", () => times(2, 2, 4)],
])("a table that is wrong about %s costs no throughput once the model has been idle", async (_, wrong) => {
  const best = await capacity(right(), false).of();
  const { simulation, of } = capacity(wrong(), true);
  await rest(simulation);
  expect((await of()) / best).toBeGreaterThan(0.97);
});

it.each([
  ["too cheap", () => times(0.4, 8), 8, 8],
  ["too cheap, though a larger one would be better", () => times(0.4, 4), 4, 8],
  ["too dear, and is launched all the same", () => times(1.9, 1), 1, 8],
])("a batch that the table has as %s is corrected by launches, under load", async (_, wrong, batch, together) => {
  const simulation = simulate(wrong());
  // Callers in turns together and alone: what is launched differs, so that entries can be compared.
  for (let round = 0; round < 40; round++) {
    await capacityOf(simulation, asked, together, together);
    await capacityOf(simulation, asked, 1, 1);
  }
  const { costs } = simulation.service;
  const launched = batches.filter((each) => (simulation.runtime.batches.get(`predict.guidance x ${each}`) ?? 0) >= 20);
  expect(launched).toContain(batch);
  expect(launched.length).toBeGreaterThan(1);
  for (const each of launched) {
    const estimate = costs.estimate("predict.guidance", "4x4", each)!;
    expect(estimate / milliseconds["predict.guidance"]!(each), `batch ${each}`).toBeGreaterThan(0.85);
    expect(estimate / milliseconds["predict.guidance"]!(each), `batch ${each}`).toBeLessThan(1.2);
  }
});

it("an entry whose runs differed much, or that is old, is measured again while the model is idle, others are not", async () => {
  const spread = [10, 14, 22, 30, 40];
  for (const [days, wide] of [
    [2, "predict.guidance"],
    [40, null],
  ] as const) {
    const entries = table((graph, batch) => (graph === wide && batch === 2 ? spread : undefined), days);
    const simulation = simulate(entries, { background: true });
    await rest(simulation);
    const { costs } = simulation.service;
    for (const graph of Object.keys(milliseconds))
      for (const batch of batches) {
        const { at, low, high, milliseconds: median } = costs.get(graph, "4x4", batch)!;
        const isFresh = days === 40 || graph === wide;
        expect(Date.now() - at < day, `${graph} x ${batch}`).toBe(isFresh);
        expect((high - low) / median).toBeLessThan(0.4);
      }
  }
});

it("one that cannot be measured well is tried again ever more rarely, and the better measurement stays", async () => {
  const simulation = simulate(
    table((_, batch) => (batch === 2 ? [10, 14, 22, 30, 40] : undefined)),
    { background: true, noise: 0.5 },
  );
  const { costs } = simulation.service;
  const runs: number[] = [];
  for (let hour = 0; hour < 48; hour++) {
    await elapse(simulation.ask(asked));
    await elapse(sleep(3600_000));
    runs.push(simulation.runtime.measured);
  }
  // One run that is not counted and seven that are, of three graphs at four batches, each time.
  const attempts = runs.at(-1)! / (8 * 12);
  expect(attempts).toBeGreaterThan(1);
  expect(attempts).toBeLessThanOrEqual(8);
  expect(costs.entries.filter(({ graph }) => graph !== "host").length).toBe(12);
});

it("a reset forgets the table here and on disk, and one of another process is noticed when idle", async () => {
  const store = new MemoryStore();
  const options = { background: true, store: store as unknown as CostStore };
  const here = simulate(right(), options);
  const there = simulate(right(), options);
  await elapse(sleep(1000));
  await elapse(here.service.reset());
  expect(here.service.costs.entries).toEqual([]);
  expect(store.entries).toEqual([]);
  const since = Date.now();
  await rest(there);
  expect(there.service.costs.entries).toEqual([]);
  // What the next request needs is measured again.
  await rest(there);
  const { entries } = there.service.costs;
  expect(entries.length).toBeGreaterThan(0);
  for (const { at } of entries) expect(at).toBeGreaterThanOrEqual(since);
});
