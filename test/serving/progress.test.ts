// What of a request's work counts as done: in units of its price, once, and with the units of today.
import { afterEach, describe, expect, it, vi } from "vitest";
import { RuntimeDiedError, RuntimeError } from "../../lib/errors.js";
import { entryOf } from "../../lib/serving/costs.js";
import { Progress } from "../../lib/serving/progress.js";
import { conditionOf, programOf } from "./programs.js";
import { elapse, milliseconds, simulate, sleep, type TimedRuntime, virtualTime } from "./timed.js";

/** Two launches of the predictor, two of the refiner, two of the predictor, the decoder. */
const row = programOf({ blocks: "H1R2H1", side: 2, seed: 0, guidanceScale: 4 }, conditionOf(1, true));
const units = (predict: number) =>
  new Map([
    ["predict.guidance@4x4", predict],
    ["refine.guidance@4x4", 3],
    ["vae_decoder@4x4", 5],
  ]);
const whole = (predict: number) => 4 * predict + 2 * 2 * 3 + 5;

function launches(): number {
  return row.instructions.filter(({ op }) => op === "launch").length;
}

it("each launch of each row counts once, in its unit", () => {
  const progress = new Progress(units(10));
  const run = progress.begin([row, row]);
  let before = 0;
  for (let index = 0; index < launches(); index++)
    for (const each of [0, 1]) {
      expect(progress.made(run, each, index)).toBe(false);
      expect(progress.done).toBeGreaterThan(before);
      before = progress.done;
    }
  expect(progress.done).toBeCloseTo(2 * whole(10), 9);
  expect(progress.made(run, 0, launches() - 1)).toBe(true);
  expect(progress.done).toBeCloseTo(2 * whole(10), 9);
});

it("other units change what has been done, too", () => {
  const progress = new Progress(units(10));
  const run = progress.begin([row]);
  progress.made(run, 0, 1);
  expect(progress.done).toBe(20);
  progress.priced(units(30));
  expect(progress.done).toBe(60);
  for (let index = 2; index < launches(); index++) progress.made(run, 0, index);
  expect(progress.done).toBeCloseTo(whole(30), 9);
});

it("a row that begins again counts again, others do not", () => {
  const progress = new Progress(units(10));
  const first = progress.begin([row]);
  progress.made(first, 0, 1);
  const second = progress.begin([row]);
  progress.made(second, 0, 2);
  progress.again(second, 0);
  expect(progress.done).toBe(20);
  // The launches before it have been repeated without a report.
  progress.made(second, 0, 3);
  expect(progress.done).toBe(20 + 20 + 2 * 3);
  for (let index = 4; index < launches(); index++) progress.made(second, 0, index);
  expect(progress.done).toBeCloseTo(20 + whole(10), 9);
});

describe("what is left of a request that was accepted", () => {
  afterEach(() => {
    vi.useRealTimers();
  });

  /** Milliseconds that one more request is predicted to take, some time after the others have been accepted. */
  async function predicted(
    known: readonly string[],
    after: number,
    { requests = 1, failure = null }: { requests?: number; failure?: TimedRuntime["failure"] } = {},
  ) {
    virtualTime();
    const entries = known.flatMap((graph) =>
      [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [milliseconds[graph]!(batch)])),
    );
    const { ask, runtime } = simulate(entries, { noise: 0 });
    // 22 launches of 10 ms and one of 5 ms; then 3 of 10 ms and one of 5 ms.
    const others = Array.from({ length: requests }, () => ask({ ladder: ["H1P20"] }));
    await elapse(sleep(after));
    if (failure) {
      // The launch that runs ends a little later.
      runtime.failure = failure;
      await elapse(sleep(10));
    }
    const next = await elapse(ask({ ladder: ["H1P1"] }));
    await elapse(Promise.all(others));
    return next.predictedMs!;
  }

  it("is right though its costs were not known when it was accepted", async () => {
    const all = Object.keys(milliseconds);
    expect(await predicted(all, 106)).toBeCloseTo(125 + 35, -1);
    const others = all.filter((graph) => graph !== "predict.guidance");
    expect(await predicted(others, 106)).toBeCloseTo(125 + 35, -1);
  });

  it("is all of it when the runtime was lost", async () => {
    const failure = { error: new RuntimeDiedError("It was killed.", null, "SIGKILL"), lost: true };
    expect(await predicted(Object.keys(milliseconds), 106, { failure })).toBeCloseTo(225 + 35, -1);
  });

  it("is all of each when a launch that they shared has failed", async () => {
    const others = { requests: 2, failure: { error: new RuntimeError("The launch failed."), lost: false } };
    expect(await predicted(Object.keys(milliseconds), 106, others)).toBeCloseTo(225 + 225 + 35, -1);
  });
});
