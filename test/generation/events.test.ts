// Events of a request: their order, handlers that are async, errors and aborts; which messages the runtime's process
// sends for them, and which values it sends at the end.
import { ChildProcess } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { type AcceptEvent, FlowTurbo, type GenerateOptions, type StartEvent, type StepEvent } from "flowturbo";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { RequestEvents } from "../../lib/generation/events.js";
import { Image } from "../../lib/generation/image.js";
import type { FromHost } from "../../lib/runtimes/onnxruntime/protocol.js";

/** A promise that is settled by hand. */
function deferred<T = void>() {
  let settle!: { resolve(value: T): void; reject(error: unknown): void };
  const promise = new Promise<T>((resolve, reject) => {
    settle = { resolve, reject };
  });
  return { promise, ...settle };
}

const step = (index: number, previews: StepEvent["previews"] = []): StepEvent => ({
  ...{ step: index, steps: 10, stage: 0, stages: 1, block: "E", sigma: 0.5, milliseconds: 1, previews, latents: null },
});
const accept: AcceptEvent = { predictedMs: null, place: 0, blocks: "E1", seeds: [1], aloneMs: null, leastMs: null };
const start: StartEvent = { queuedMs: 0, blocks: "E1" };
const picture = new Image(1, 1, new Uint8Array(3));

/** Everything that no promise's owner has seen; the process would end. */
const unhandled: unknown[] = [];
const notice = (reason: unknown) => unhandled.push(reason);
beforeAll(() => void process.on("unhandledRejection", notice));
afterAll(() => void process.off("unhandledRejection", notice));
afterEach(async () => {
  await setImmediate();
  await setImmediate();
  expect(unhandled.splice(0)).toEqual([]);
});

describe("the delivery of events", () => {
  it("is at once for handlers that return nothing", () => {
    const seen: string[] = [];
    const events = new RequestEvents({
      onAccept: () => seen.push("accept"),
      onStart: () => seen.push("start"),
      onStep: ({ step }) => seen.push(`step ${step}`),
    });
    events.send("onAccept", accept);
    events.send("onStart", start);
    events.send("onStep", step(0));
    expect(seen).toEqual(["accept", "start", "step 0"]);
  });

  it("waits for the promise of the handler before, whichever that was", async () => {
    const seen: string[] = [];
    const pending = [deferred(), deferred(), deferred()] as const;
    const handled = (name: string, index: number) => {
      seen.push(`${name} begins`);
      return pending[index]!.promise.then(() => void seen.push(`${name} ends`));
    };
    const events = new RequestEvents({
      onAccept: () => handled("accept", 0),
      onStart: () => handled("start", 1),
      onStep: () => handled("step", 2),
    });
    events.send("onAccept", accept);
    events.send("onStart", start);
    events.send("onStep", step(0));
    const ended = events.around(Promise.resolve("pictures")).then((result) => seen.push(result));
    for (const { resolve } of [...pending].reverse()) {
      // Out of order: the later promises do not exist yet as far as delivery goes.
      await setImmediate();
      expect(seen).toEqual(["accept begins"]);
      if (resolve !== pending[0].resolve) resolve();
    }
    pending[0].resolve();
    await ended;
    expect(seen).toEqual([
      ...["accept begins", "accept ends", "start begins", "start ends", "step begins", "step ends", "pictures"],
    ]);
  });

  it("leaves out no step, but drops the previews of those that are overtaken", async () => {
    const first = deferred();
    const seen: [number, number][] = [];
    const events = new RequestEvents({
      onStep: ({ step, previews }) => {
        seen.push([step, previews.length]);
        return step === 0 ? first.promise : undefined;
      },
    });
    for (let index = 0; index < 5; index++) events.send("onStep", step(index, [picture, picture]));
    first.resolve();
    await events.around(Promise.resolve());
    expect(seen).toEqual([0, 1, 2, 3, 4].map((index) => [index, index === 0 || index === 4 ? 2 : 0]));
  });

  it.each([
    ["throws", (error: Error): unknown => { throw error; }], // biome-ignore format: one line
    ["rejects", (error: Error) => Promise.reject(error)],
    // biome-ignore lint/suspicious/noThenProperty: not every promise is a Promise
    ["returns a thenable that rejects", (error: Error) => ({ then: (_: unknown, no: (error: Error) => void) => no(error) })], // biome-ignore format: one line
  ])("ends with the error of a handler that %s: nothing more is delivered", async (_, fail) => {
    const error = new Error("the handler's own");
    const seen: number[] = [];
    let signal: AbortSignal | undefined;
    const events = new RequestEvents({
      onStep: (event, context) => {
        seen.push(event.step);
        signal = context.signal;
        return event.step === 1 ? fail(error) : undefined;
      },
    });
    const work = deferred();
    const call = events.around(work.promise);
    for (const index of [0, 1, 2]) events.send("onStep", step(index));
    await expect(call).rejects.toBe(error);
    expect(seen).toEqual([0, 1]);
    // What draws follows the signal.
    expect(events.signal.reason).toBe(error);
    expect(signal).toBe(events.signal);
    work.reject(error);
  });

  it("is given up at an abort, even by a handler that never settles", async () => {
    const controller = new AbortController();
    const seen: number[] = [];
    const late = deferred();
    const events = new RequestEvents({
      signal: controller.signal,
      onStep: ({ step }) => {
        seen.push(step);
        return late.promise;
      },
    });
    for (const index of [0, 1, 2]) events.send("onStep", step(index));
    const call = events.around(Promise.resolve("drawn"));
    controller.abort("enough");
    await expect(call).rejects.toBe("enough");
    // It has nobody left to tell.
    late.reject(new Error("too late"));
    await setImmediate();
    events.send("onStep", step(3));
    expect(seen).toEqual([0]);
  });

  it("tells a handler at work that the call has failed", async () => {
    const error = new Error("a launch failed");
    let told: unknown;
    const events = new RequestEvents({
      onStep: (_, { signal }) =>
        new Promise<void>((resolve) =>
          signal.addEventListener("abort", () => {
            told = signal.reason;
            resolve();
          }),
        ),
    });
    events.send("onStep", step(0));
    await expect(events.around(Promise.reject(error))).rejects.toBe(error);
    expect(told).toBe(error);
  });

  it("does not abort the signal of a call that ends well, and follows the caller's no longer", async () => {
    const controller = new AbortController();
    const events = new RequestEvents({ signal: controller.signal });
    await events.around(Promise.resolve());
    controller.abort();
    expect(events.signal.aborted).toBe(false);
  });
});

let cache: string;
let model: FlowTurbo;
beforeAll(async () => {
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-events-"));
  model = await FlowTurbo.load(undefined, { cache, measureCosts: false });
});
afterAll(async () => {
  await model.dispose();
  rmSync(cache, { recursive: true, force: true });
});
const request = { prompt: "a red circle", width: 32, height: 32, sampler: "euler", seed: 5 } as const;

describe("generate()", () => {
  it("says that a request was accepted, that it has started, and each step", async () => {
    const seen: string[] = [];
    let accepted: AcceptEvent | undefined;
    let started: StartEvent | undefined;
    const before = model.stats().requests.accepted;
    const result = await model.generate({
      ...{ ...request, prompt: ["a red circle", "a blue square"], steps: 2 },
      onAccept: (event) => {
        accepted = event;
        expect(model.stats().requests.accepted).toBe(before + 1);
        seen.push("accept");
      },
      onStart: (event) => {
        started = event;
        seen.push("start");
      },
      onStep: ({ step }) => seen.push(`step ${step}`),
    });
    expect(seen).toEqual(["accept", "start", "step 0", "step 1"]);
    expect(accepted).toEqual({
      ...{ predictedMs: null, place: 0, blocks: "E2", seeds: [5, 6] },
      ...{ aloneMs: null, leastMs: null },
    });
    expect(started).toEqual({ queuedMs: result.timings.queue, blocks: "E2" });
    expect([result.blocks, result.seeds]).toEqual(["E2", [5, 6]]);
  });

  it("names the place of each request in the queue, and the time that it will take", async () => {
    await using narrow = await FlowTurbo.load(undefined, { cache, maxBatch: 1, measureCosts: false });
    await narrow.profile({ sizes: [{ width: 32, height: 32 }], batches: [1], rounds: 3 });
    // Texts that are known already: reading them could take turns that overtake one another.
    await narrow.generate({ ...request, steps: 1, guidanceScale: 2 });
    const places: number[] = [];
    const predicted: (number | null)[] = [];
    const order: string[] = [];
    const call = (name: string, priority = 0) =>
      narrow.generate({
        // Long enough that none ends before all are accepted.
        ...{ ...request, steps: 40, guidanceScale: 2, priority },
        onAccept: ({ place, predictedMs }) => {
          places.push(place);
          predicted.push(predictedMs);
        },
        onStart: ({ queuedMs }) => {
          order.push(name);
          expect(queuedMs).toBeGreaterThanOrEqual(0);
        },
      });
    // Two at a time may work: the third waits first, the fifth goes before the other two that wait.
    const names = ["a", "b", "c", "d"];
    await Promise.all([...names.map((name) => call(name)), call("urgent", 5)]);
    expect(places).toEqual([0, 0, 1, 2, 1]);
    expect(order).toEqual(["a", "b", "urgent", "c", "d"]);
    const times = predicted.map((time) => time!);
    for (const [index, time] of times.slice(0, 4).entries()) expect(time).toBeGreaterThan(times[index - 1] ?? 0);
    // By priority it goes before all that wait.
    expect(times[4]).toBeLessThan(times[3]!);
  });

  it("names the schedule that a time limit has chosen", async () => {
    await using narrow = await FlowTurbo.load(undefined, { cache, maxBatch: 1, measureCosts: false });
    const schedules: string[] = [];
    const { blocks } = await narrow.generate({
      ...{ ...request, sampler: undefined, deadlineMs: 60_000, ladder: ["H1P2", "H1"] },
      onAccept: (event) => {
        schedules.push(event.blocks);
        expect(event.predictedMs).toBeGreaterThan(0);
      },
      onStart: (event) => schedules.push(event.blocks),
    });
    expect(schedules).toEqual(["H1P2", blocks]);
  });

  it("has no event for a request that is refused", async () => {
    const seen = vi.fn();
    const handlers = { onAccept: seen, onStart: seen, onStep: seen };
    await model.generate({ ...request, steps: 1 });
    await expect(model.generate({ ...request, steps: 2, deadlineMs: 0.001, ...handlers })).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE",
    });
    await expect(model.generate({ ...request, steps: 0, ...handlers })).rejects.toMatchObject({ option: "steps" });
    expect(seen).not.toHaveBeenCalled();
  });

  it("draws on while a handler is busy, and resolves after it", async () => {
    const last = deferred();
    const seen: number[] = [];
    let resolved = false;
    const before = model.stats().requests.completed;
    const call = model.generate({
      ...{ ...request, steps: 5, preview: "fast" },
      onStep: ({ step, previews }) => {
        seen.push(step);
        expect(previews).toHaveLength(step === 0 || step === 4 ? 1 : 0);
        return step === 0 ? last.promise : undefined;
      },
    });
    void call.then(() => {
      resolved = true;
    });
    await vi.waitFor(() => expect(model.stats().requests.completed).toBe(before + 1), { timeout: 30_000 });
    await setImmediate();
    expect([seen, resolved]).toEqual([[0], false]);
    last.resolve();
    expect((await call).images).toHaveLength(1);
    expect(seen).toEqual([0, 1, 2, 3, 4]);
  });

  it.each(["onAccept", "onStart", "onStep"] as const)(
    "ends with what %s throws or rejects with; others are drawn",
    async (name) => {
      for (const isAsync of [false, true]) {
        const error = new Error("the caller's own");
        const seen = vi.fn();
        const handler = () => {
          if (isAsync) return Promise.reject(error);
          throw error;
        };
        const handlers = { onAccept: seen, onStart: seen, onStep: seen, [name]: handler };
        const call = model.generate({ ...request, steps: 500, reports: "each", ...handlers });
        const other = model.generate({ ...request, steps: 2 });
        await expect(call).rejects.toBe(error);
        expect((await other).images).toHaveLength(1);
        await vi.waitFor(() => expect(model.stats().running.requests).toBe(0), { timeout: 30_000 });
        expect(seen).toHaveBeenCalledTimes(["onAccept", "onStart", "onStep"].indexOf(name));
      }
      // 500 steps were not drawn.
      expect(model.stats().launches.count).toBeLessThan(400);
    },
  );

  it("rejects at once for an abort, while a handler never settles", async () => {
    const controller = new AbortController();
    const call = model.generate({
      ...{ ...request, steps: 2, signal: controller.signal },
      onStep: (_, { signal }) => {
        expect(signal.aborted).toBe(false);
        controller.abort("enough");
        expect(signal.reason).toBe("enough");
        return new Promise(() => {});
      },
    });
    await expect(call).rejects.toBe("enough");
  });

  it("rejects after timeoutMs, while a handler never settles", async () => {
    let signal: AbortSignal | undefined;
    const call = model.generate({
      ...{ ...request, steps: 1, timeoutMs: 1500 },
      onStep: (_, options) => {
        signal = options.signal;
        return new Promise(() => {});
      },
    });
    const error = await call.catch((reason) => reason);
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_TIMEOUT" });
    // On a machine that is busy the step may not have come in time.
    if (signal) expect(signal.reason).toBe(error);
  });

  it("may be disposed by a handler that waits for it", async () => {
    const other = await FlowTurbo.load(undefined, { cache, measureCosts: false });
    const { images } = await other.generate({ ...request, steps: 2, onStep: () => other.dispose() });
    expect(images).toHaveLength(1);
  });
});

describe("the runtime's process", () => {
  /** What it sends while a picture is drawn. @param onMessage called before the message is handled */
  async function messagesOf(options: GenerateOptions, onMessage: (message: FromHost) => unknown = () => {}) {
    // Texts that are known, and a template: the only messages are those of the picture.
    await model.generate(options);
    const messages: FromHost[] = [];
    const emit = vi.spyOn(ChildProcess.prototype, "emit").mockImplementation(function (
      this: ChildProcess,
      event: string | symbol,
      ...values: unknown[]
    ) {
      if (event === "message") {
        messages.push(values[0] as FromHost);
        onMessage(values[0] as FromHost);
      }
      return original.call(this, event, ...values);
    });
    try {
      return { result: await model.generate(options), messages };
    } finally {
      emit.mockRestore();
    }
  }
  const original = ChildProcess.prototype.emit as (event: string | symbol, ...values: unknown[]) => boolean;
  const launched = (messages: readonly FromHost[]) => messages.filter(({ type }) => type === "launched");
  const long = { ...request, width: 16, height: 16, steps: 24 };

  it("reports each launch as soon as it is done, if somebody watches", async () => {
    const log: ("launched" | number)[] = [];
    const watched = { ...long, reports: "each", onStep: ({ step }: StepEvent) => log.push(step) } as const;
    const { messages } = await messagesOf(watched, ({ type }) => type === "launched" && log.push(type));
    // 24 steps and the decoder, each in a message of its own, which the step's event follows.
    expect(launched(messages)).toHaveLength(25);
    for (const message of launched(messages)) expect(message).toMatchObject({ reports: [{}] });
    const steps = Array.from({ length: 24 }, (_, index) => ["launched", index]).flat();
    expect(log.slice(24)).toEqual([...steps, "launched"]);
  });

  it("reports several together if nobody does", async () => {
    // A lone job is one submission where its costs are known: otherwise each ends with its reports.
    await model.profile({ sizes: [{ width: 16, height: 16 }], batches: [1], rounds: 3 });
    const onStep = vi.fn();
    const plain = await messagesOf({ ...long, onStep });
    expect(plain.messages.filter(({ type }) => type === "done")).toHaveLength(1);
    expect(onStep).toHaveBeenCalledTimes(48);
    expect(launched(plain.messages).length).toBeLessThan(24);
    // Without a handler nobody watches, whatever is asked for.
    const unwatched = await messagesOf({ ...long, reports: "each" });
    expect(launched(unwatched.messages).length).toBeLessThan(24);
  });

  it("reports each launch by default where there are previews", async () => {
    const onStep = vi.fn();
    const { messages } = await messagesOf({ ...long, steps: 4, preview: "fast", onStep });
    // Steps and previews in turn, and the decoder.
    const reports = messages.flatMap((message) => ("reports" in message ? [message.reports] : []));
    expect(reports.flat()).toHaveLength(9);
    for (const each of reports) expect(each.length).toBeLessThanOrEqual(1);
    expect(onStep).toHaveBeenCalledTimes(8);
  });

  it("sends no value but the picture, unless others are asked for", async () => {
    const results = (messages: readonly FromHost[]) =>
      messages.flatMap((message) => (message.type === "done" ? Object.values(message.results) : []));
    const plain = await messagesOf({ ...request, steps: 2, include: [] });
    expect(results(plain.messages).map(({ shape }) => shape)).toEqual([[1, 3, 32, 32]]);
    expect([plain.result.latents, plain.result.pixels]).toEqual([null, null]);
    expect(plain.result.images[0]!.data).toHaveLength(3 * 32 * 32);
    expect(plain.result.images[0]!.data.buffer.byteLength).toBe(3 * 32 * 32);

    const both = await messagesOf({ ...request, steps: 2, include: ["latents", "pixels"] });
    expect(results(both.messages)).toHaveLength(2);
    expect(both.result.images[0]!.data).toEqual(plain.result.images[0]!.data);
    expect(both.result.pixels!.shape).toEqual([1, 3, 32, 32]);

    // What is kept holds none of the memory of what is not.
    for (const count of [1, 2]) {
      const { result } = await messagesOf({ ...request, steps: 2, count, include: ["latents"] });
      expect(result.pixels).toBeNull();
      expect(result.latents!.shape[0]).toBe(count);
      expect(result.latents!.data.buffer.byteLength).toBe(result.latents!.data.byteLength);
    }
  });
});
