// The tracing channels, with real subscribers: what they get, in which order, and what a call costs without any.
import { AsyncLocalStorage } from "node:async_hooks";
import diagnostics from "node:diagnostics_channel";
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import {
  FlowTurbo,
  type GenerateTrace,
  type LaunchTrace,
  type QueueTrace,
  resultToJson,
  withTraceparent,
} from "flowturbo";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";

let cache: string;
let model: FlowTurbo;
beforeAll(async () => {
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-traces-"));
  model = await FlowTurbo.load(undefined, { cache, measureCosts: false, maxBatch: 1 });
});
afterAll(async () => {
  await model.dispose();
  rmSync(cache, { recursive: true, force: true });
});
const request = { prompt: "a red circle", width: 32, height: 32, sampler: "euler", seed: 5, steps: 2 } as const;

const phases = ["start", "end", "asyncStart", "asyncEnd", "error"] as const;
type Phase = (typeof phases)[number];
interface Message<Context> {
  readonly phase: Phase;
  readonly context: Context;
  /** Its fields when it was published: later ones are added to the same object. */
  readonly fields: readonly string[];
}

const undo: (() => void)[] = [];
afterEach(() => {
  for (const each of undo.splice(0)) each();
});
/** Everything that is published on a channel until the test ends. */
function subscribed<Context extends object>(name: string): Message<Context>[] {
  const seen: Message<Context>[] = [];
  const channel = diagnostics.tracingChannel<unknown, Context>(name);
  const subscribers = Object.fromEntries(
    phases.map((phase) => [
      phase,
      (context: object) =>
        seen.push({
          phase,
          context: context as Context,
          fields: Object.entries(context).flatMap(([key, value]) => (value === undefined ? [] : [key])),
        }),
    ]),
  ) as never;
  channel.subscribe(subscribers);
  undo.push(() => channel.unsubscribe(subscribers));
  return seen;
}
const phasesOf = (seen: readonly Message<unknown>[]) => seen.map(({ phase }) => phase);
const traced = ["start", "end", "asyncStart", "asyncEnd"];
const failed = ["start", "end", "error", "asyncStart", "asyncEnd"];

describe("a call that is traced", () => {
  it("has a context that is filled in as it goes on, for its queue and its launches too", async () => {
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const queued = subscribed<QueueTrace>("flowturbo:queue");
    const launches = subscribed<LaunchTrace>("flowturbo:launch");
    const options = { ...request, prompt: ["a red circle", "a blue square"], preview: "fast" } as const;
    const result = await model.generate({ ...options, onStep: () => {} });

    expect(phasesOf(calls)).toEqual(traced);
    const [{ context, fields }] = calls as [Message<GenerateTrace>];
    expect(fields).toEqual(["operation", "model", "runtime", "traceparent", "options"]);
    expect(context).toMatchObject({
      ...{ operation: "generate_content", model: "shapes", runtime: "onnxruntime", traceparent: null, options },
      ...{ pictures: 2, seeds: [5, 6], width: 32, height: 32, steps: 2, blocks: "E2" },
    });
    expect(context.result).toBe(result);
    for (const message of calls) expect(message.context).toBe(context);

    expect(phasesOf(queued)).toEqual(traced);
    expect(queued[0]!.context).toMatchObject({ place: 0, predictedMs: null });
    expect(queued[0]!.fields).not.toContain("queuedMs");
    expect(queued[3]!.context.queuedMs).toBe(result.timings.queue);

    // Start and end at once, for each launch: of the texts, the steps with their previews, and the decoder.
    expect(phasesOf(launches)).toEqual(launches.map((_, index) => (index % 2 === 0 ? "start" : "end")));
    const made = launches.filter(({ phase }) => phase === "end").map((each) => each.context);
    for (const { generate, milliseconds, rows, batch } of made) {
      expect(generate).toBe(context);
      expect(milliseconds).toBeGreaterThan(0);
      expect([rows, batch]).toEqual([1, 1]);
    }
    const counts: Record<string, number> = {};
    for (const { graph, size } of made) counts[`${graph}@${size}`] = (counts[`${graph}@${size}`] ?? 0) + 1;
    expect(counts).toMatchObject({ "predict.guidance@32x32": 4, "preview.guidance@32x32": 4, "vae_decoder@32x32": 2 });
    // Two prompts and the empty negative prompt, for each text encoder.
    for (const name of ["clip_l", "clip_g", "t5"])
      expect(Object.entries(counts).find(([key]) => key.startsWith(`${name}@`))).toEqual([expect.stringMatching(/^\w+@\d+ tokens$/), 3]); // biome-ignore format: one line
  });

  it("has a queue until its turn comes, behind another", async () => {
    const queued = subscribed<QueueTrace>("flowturbo:queue");
    const work = [1, 2, 3].map((seed) => model.generate({ ...request, seed, steps: 8 }));
    const results = await Promise.all(work);
    const ends = queued.filter(({ phase }) => phase === "asyncEnd").map((each) => each.context);
    expect(ends.map(({ place }) => place)).toEqual([0, 0, 1]);
    expect(ends.map(({ queuedMs }) => queuedMs)).toEqual(results.map(({ timings }) => timings.queue));
    // Nobody listened for calls, and yet each queue has its call.
    expect(ends.map(({ generate }) => generate.seeds)).toEqual([[1], [2], [3]]);
  });

  it("shares launches, whose rows and padding are told to each call", async () => {
    const launches = subscribed<LaunchTrace>("flowturbo:launch");
    await using wide = await FlowTurbo.load(undefined, { cache, measureCosts: false, pinBatch: 4 });
    await wide.generate({ ...request, count: 3 });
    const steps = launches.filter(({ phase, context }) => phase === "end" && context.graph === "predict.guidance");
    expect(steps.map(({ context: { rows, batch } }) => [rows, batch])).toEqual([
      [3, 4],
      [3, 4],
    ]);
  });

  it.each([
    ["is refused", { steps: 0 }, { option: "steps" }],
    ["cannot be in time", { deadlineMs: 0.001 }, { code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE" }],
  ])("that %s ends with its error, and never waits", async (_, options, error) => {
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const queued = subscribed<QueueTrace>("flowturbo:queue");
    await model.generate({ ...request, steps: 1 });
    calls.length = 0;
    queued.length = 0;
    const rejected = await model.generate({ ...request, ...options }).catch((reason) => reason);
    expect(rejected).toMatchObject(error);
    expect(phasesOf(calls)).toEqual(failed);
    expect(calls[2]!.context.error).toBe(rejected);
    expect(queued).toEqual([]);
  });

  it("that is aborted ends with the reason, where it waits and where it is drawn", async () => {
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const queued = subscribed<QueueTrace>("flowturbo:queue");
    const controller = new AbortController();
    const long = { ...request, steps: 1000 };
    const aborted = [0, 1, 2].map((seed) => model.generate({ ...long, seed, signal: controller.signal }));
    while (queued.filter(({ phase }) => phase === "start").length < 3) await new Promise((done) => setTimeout(done, 5));
    const reason = new Error("enough");
    controller.abort(reason);
    expect((await Promise.allSettled(aborted)).map((each) => each.status)).toEqual([
      "rejected",
      "rejected",
      "rejected",
    ]);
    await new Promise((done) => setTimeout(done, 20));
    for (const messages of [calls, queued]) {
      const errors = messages.filter(({ phase }) => phase === "error");
      expect(errors).toHaveLength(messages === calls ? 3 : 1);
      for (const { context } of errors) expect(context.error).toBe(reason);
    }
    // It goes on as before.
    expect((await model.generate(request)).images).toHaveLength(1);
  });

  it("is the context that stores are bound to, so that handlers of its events find it", async () => {
    const storage = new AsyncLocalStorage<string>();
    const { start } = diagnostics.tracingChannel("flowturbo:generate");
    start.bindStore(storage, (context) => `call of ${(context as GenerateTrace).model}`);
    undo.push(() => start.unbindStore(storage));
    const found: unknown[] = [];
    await model.generate({ ...request, onAccept: () => found.push(storage.getStore()) });
    expect(found).toEqual(["call of shapes"]);
    expect(storage.getStore()).toBeUndefined();
  });

  it("draws the same picture, and its handlers get the same events", async () => {
    const seen: string[] = [];
    const drawn = async () => {
      const events: string[] = [];
      const { images } = await model.generate({
        ...request,
        steps: 3,
        onAccept: () => events.push("accept"),
        onStart: () => events.push("start"),
        onStep: ({ step }) => events.push(`step ${step}`),
      });
      seen.push(events.join());
      return images[0]!.data;
    };
    const plain = await drawn();
    for (const name of ["generate", "queue", "launch"]) subscribed(`flowturbo:${name}`);
    expect(await drawn()).toEqual(plain);
    expect(seen).toEqual(new Array(2).fill("accept,start,step 0,step 1,step 2"));
  });

  it("has no context where nobody has subscribed: its options are not even looked at", async () => {
    const { start } = diagnostics.tracingChannel("flowturbo:generate");
    expect(start.hasSubscribers).toBe(false);
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const stream = model.generateStream(request);
    expect(phasesOf(calls)).toEqual(["start", "end"]);
    for await (const _ of stream);
    for (const each of undo.splice(0)) each();
    calls.length = 0;
    expect(resultToJson(await model.generate(request))).toHaveProperty("tokens");
    expect(calls).toEqual([]);
  });
});

describe("withTraceparent()", () => {
  const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

  it("names the request that is answered, in calls that are made at any time while it is", async () => {
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const other = traceparent.replace("0af7", "1af7");
    await Promise.all([
      withTraceparent(traceparent, async () => {
        await new Promise((done) => setTimeout(done, 5));
        await model.generate({ ...request, seed: 1 });
        await withTraceparent(null, () => model.generate({ ...request, seed: 3 }));
      }),
      withTraceparent(other, () => model.generate({ ...request, seed: 2 })),
      model.generate({ ...request, seed: 4 }),
    ]);
    const found = new Map(calls.map(({ context }) => [context.seeds![0], context.traceparent]));
    expect(Object.fromEntries(found)).toEqual({ 1: traceparent, 2: other, 3: null, 4: null });
  });

  it.each([
    ["a later version, with more", `01${traceparent.slice(2)}-more`, true],
    ["nothing", "", false],
    ["undefined", undefined, false],
    ["another text", "hello", false],
    ["version ff", `ff${traceparent.slice(2)}`, false],
    ["a trace id of zeros", `00-${"0".repeat(32)}-b7ad6b7169203331-01`, false],
    ["a span id of zeros", `00-0af7651916cd43dd8448eb211c80319c-${"0".repeat(16)}-01`, false],
    ["upper case", traceparent.toUpperCase(), false],
    ["two headers as one", `${traceparent},${traceparent}`, false],
  ])("takes %s as W3C's trace context says", async (_, value, isTaken) => {
    const calls = subscribed<GenerateTrace>("flowturbo:generate");
    const returned = await withTraceparent(value, () => model.generate({ ...request, steps: 1 }));
    expect(returned.images).toHaveLength(1);
    expect(calls[0]!.context.traceparent).toBe(isTaken ? value : null);
  });
});
