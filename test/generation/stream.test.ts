// A call that is iterated over: order, readers that are slow or leave, errors, and what it leaves behind.
import { getEventListeners } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { FlowTurbo, type GenerateEvent, type GenerateOptions, type GenerateResult, generateStream } from "flowturbo";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { Image } from "../../lib/generation/image.js";

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

const picture = new Image(1, 1, new Uint8Array(3));
const result = { images: [picture] } as unknown as GenerateResult;

/** A `generate` that is driven by hand. */
function byHand() {
  const calls: { options: GenerateOptions; end(): void; fail(error: unknown): void }[] = [];
  const generate = (options: GenerateOptions) =>
    new Promise<GenerateResult>((resolve, reject) => {
      calls.push({ options, end: () => resolve(result), fail: reject });
      options.signal!.addEventListener("abort", () => reject(options.signal!.reason));
    });
  const stream = generateStream(generate, { prompt: "x" });
  const { options, ...call } = calls[0]!;
  const step = (index: number) =>
    options.onStep!(
      {
        ...{ step: index, steps: 9, stage: 0, stages: 1, block: "E", sigma: 0.5, milliseconds: 1 },
        previews: [picture],
        latents: float32([1], new Float32Array([index])),
      },
      { signal: options.signal! },
    );
  return { stream, options, step, ...call };
}
const names = (events: readonly GenerateEvent[]) =>
  events.map((event) => (event.type === "step" ? `step ${event.step} (${event.previews.length})` : event.type));
async function all(stream: AsyncIterable<GenerateEvent>): Promise<GenerateEvent[]> {
  const events: GenerateEvent[] = [];
  for await (const event of stream) events.push(event);
  return events;
}

describe("a stream", () => {
  it("starts the call at once, and gives events to readers that wait", async () => {
    const { stream, step, end } = byHand();
    const [first, second, third, fourth] = [stream.next(), stream.next(), stream.next(), stream.next()];
    step(0);
    step(1);
    expect(names([(await first).value!, (await second).value!])).toEqual(["step 0 (1)", "step 1 (1)"]);
    end();
    expect((await third).value).toEqual({ type: "result", result });
    expect(await fourth).toEqual({ done: true, value: undefined });
    expect(await stream.next()).toEqual({ done: true, value: undefined });
  });

  it("keeps previews of the newest step that waits, and of those that were read", async () => {
    const { stream, step, end } = byHand();
    step(0);
    const first = await stream.next();
    for (const index of [1, 2, 3]) step(index);
    end();
    await setImmediate();
    const events = [first.value!, ...(await all(stream))];
    expect(names(events)).toEqual(["step 0 (1)", "step 1 (0)", "step 2 (0)", "step 3 (1)", "result"]);
    const latents = events.map((event) => (event.type === "step" ? (event.latents?.data[0] ?? null) : null));
    expect(latents).toEqual([0, null, null, 3, null]);
  });

  it("throws what the call failed with, once, after the events that came before it", async () => {
    const { stream, step, fail } = byHand();
    const error = new Error("the call's own");
    step(0);
    fail(error);
    await setImmediate();
    expect((await stream.next()).value).toMatchObject({ type: "step" });
    await expect(stream.next()).rejects.toBe(error);
    expect(await stream.next()).toEqual({ done: true, value: undefined });
  });

  it("throws it to one reader that waits; the others are told that it is over", async () => {
    const { stream, fail } = byHand();
    const readers = [stream.next(), stream.next()];
    const error = new Error("the call's own");
    fail(error);
    expect(await Promise.allSettled(readers)).toEqual([
      { status: "rejected", reason: error },
      { status: "fulfilled", value: { done: true, value: undefined } },
    ]);
  });

  it("that nobody reads rejects nothing", async () => {
    byHand().fail(new Error("unseen"));
    await setImmediate();
  });

  it.each(["return", "dispose"] as const)("ends the call at %s, even with a reader that waits", async (how) => {
    const { stream, options, step } = byHand();
    step(0);
    await stream.next();
    const waiting = stream.next();
    if (how === "return") expect(await stream.return()).toEqual({ done: true, value: undefined });
    else await stream[Symbol.asyncDispose]();
    expect(options.signal!.reason).toMatchObject({ name: "AbortError" });
    expect(await waiting).toEqual({ done: true, value: undefined });
    step(1);
    expect(await stream.next()).toEqual({ done: true, value: undefined });
  });

  it("that was left waits until the call has ended", async () => {
    let ended = false;
    const stream = generateStream(
      async ({ signal }) => {
        await new Promise<void>((resolve) => signal!.addEventListener("abort", () => resolve()));
        for (let turn = 0; turn < 5; turn++) await setImmediate();
        ended = true;
        throw signal!.reason;
      },
      { prompt: "x" },
    );
    await stream.return();
    expect(ended).toBe(true);
  });

  it("follows the caller's signal until the call has ended, and calls the caller's handlers", async () => {
    const controller = new AbortController();
    const seen: string[] = [];
    const stream = generateStream(
      async ({ signal, onStep }) => {
        await onStep!({} as never, { signal: signal! });
        return new Promise((_, reject) => signal!.addEventListener("abort", () => reject(signal!.reason)));
      },
      { prompt: "x", signal: controller.signal, onStep: () => seen.push("step") },
    );
    expect((await stream.next()).value).toMatchObject({ type: "step" });
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(stream.next()).rejects.toBe(reason);
    expect(seen).toEqual(["step"]);
    const { signal } = new AbortController();
    await all(generateStream(async () => result, { prompt: "x", signal }));
    await setImmediate();
    expect(getEventListeners(signal, "abort")).toEqual([]);
  });

  it.each([
    ["handlers that are no functions", { prompt: "x", onStep: 5 }, "onStep"],
    ["a signal that is none", { prompt: "x", signal: {} }, "signal"],
    ["no options", undefined, "options"],
  ])("throws for %s at its first event", async (_, options, option) => {
    const generate = vi.fn();
    const stream = generateStream(generate, options as never);
    await expect(stream.next()).rejects.toMatchObject({ code: "ERR_FLOWTURBO_OPTION", option });
    expect(generate).not.toHaveBeenCalled();
  });
});

describe("model.generateStream()", () => {
  let cache: string;
  let model: FlowTurbo;
  beforeAll(async () => {
    cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-stream-"));
    model = await FlowTurbo.load(undefined, { cache, measureCosts: false });
  });
  afterAll(async () => {
    await model.dispose();
    rmSync(cache, { recursive: true, force: true });
  });
  const request = { prompt: "a red circle", width: 32, height: 32, sampler: "euler", seed: 5 } as const;

  it("gives the events of generate(), and its result", async () => {
    const events = await all(model.generateStream({ ...request, steps: 3, preview: "fast", reports: "each" }));
    expect(events.map(({ type }) => type)).toEqual(["accept", "start", "step", "step", "step", "result"]);
    const { images } = await model.generate({ ...request, steps: 3 });
    const last = events.at(-1)!;
    expect(last.type === "result" && last.result.images[0]!.data).toEqual(images[0]!.data);
    expect(events[0]).toMatchObject({ place: 0, blocks: "E3", seeds: [5] });
  });

  it("never waits for a reader that is slow", async () => {
    const before = model.stats().requests.completed;
    const stream = model.generateStream({ ...request, steps: 4, preview: "fast" });
    await stream.next();
    await vi.waitFor(() => expect(model.stats().requests.completed).toBe(before + 1), { timeout: 30_000 });
    await setImmediate();
    expect(names(await all(stream))).toEqual([
      ...["start", "step 0 (0)", "step 1 (0)", "step 2 (0)", "step 3 (1)", "result"],
    ]);
  });

  it("ends the call where the loop is left, and where `await using` goes out of scope", async () => {
    const before = model.stats().requests.aborted;
    for await (const { type } of model.generateStream({ ...request, steps: 1000, reports: "each" }))
      if (type === "step") break;
    await vi.waitFor(() => expect(model.stats().requests.aborted).toBe(before + 1));
    {
      await using stream = model.generateStream({ ...request, steps: 1000 });
      await stream.next();
    }
    await vi.waitFor(() => expect(model.stats().requests.aborted).toBe(before + 2));
    expect(model.stats().running.requests).toBe(0);
  });

  it("throws what generate() rejects with", async () => {
    await expect(all(model.generateStream({ ...request, steps: 0 }))).rejects.toMatchObject({ option: "steps" });
    await expect(all(model.generateStream({ ...request, width: 17 }))).rejects.toMatchObject({ option: "width" });
  });
});
