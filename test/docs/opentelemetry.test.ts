// examples/opentelemetry.js with OpenTelemetry's own SDK: names, parents, times and statuses of the spans.
import { AsyncLocalStorage } from "node:async_hooks";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { type Context, type ContextManager, context, ROOT_CONTEXT, SpanKind, SpanStatusCode, type Tracer, trace as traces } from "@opentelemetry/api"; // biome-ignore format: one line
import { BasicTracerProvider, InMemorySpanExporter, type ReadableSpan, SimpleSpanProcessor } from "@opentelemetry/sdk-trace-base"; // biome-ignore format: one line
import { FlowTurbo, withTraceparent } from "flowturbo";
import { afterAll, afterEach, beforeAll, beforeEach, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

/** What @opentelemetry/context-async-hooks does, as far as it is needed here. */
class Contexts implements ContextManager {
  readonly #storage = new AsyncLocalStorage<Context>();
  active = () => this.#storage.getStore() ?? ROOT_CONTEXT;
  with: ContextManager["with"] = (active, fn, self, ...args) => this.#storage.run(active, () => fn.apply(self!, args));
  bind: ContextManager["bind"] = (_, target) => target;
  enable = () => this;
  disable = () => this;
}

const exporter = new InMemorySpanExporter();
const provider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] });
const tracer = provider.getTracer("test");
let cache: string;
let model: FlowTurbo;
let start: (tracer?: Tracer) => () => void;
let stop: () => void;
beforeAll(async () => {
  context.setGlobalContextManager(new Contexts());
  const file = path.join(root, "examples/opentelemetry.js");
  ({ trace: start } = await import(pathToFileURL(file).href));
  cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-opentelemetry-"));
  model = await FlowTurbo.load(undefined, { cache, measureCosts: false, maxBatch: 1 });
});
afterAll(async () => {
  await model.dispose();
  context.disable();
  rmSync(cache, { recursive: true, force: true });
});
beforeEach(() => {
  exporter.reset();
  stop = start(tracer);
});
afterEach(() => stop());

const request = { prompt: "a red circle", width: 32, height: 32, sampler: "euler", seed: 5, steps: 2 } as const;
const of = (name: string) => exporter.getFinishedSpans().filter((span) => span.name === name);
const milliseconds = ([seconds, nanoseconds]: readonly [number, number]) => 1000 * seconds + nanoseconds / 1e6;
const lengthOf = ({ duration }: ReadableSpan) => milliseconds(duration);

it("makes a span of a call, and children of its queue and launches", async () => {
  const before = Date.now();
  const result = await model.generate({ ...request, prompt: ["a red circle", "a blue square"] });
  const after = Date.now();
  const [call] = of("generate_content shapes");
  expect(call).toMatchObject({ kind: SpanKind.INTERNAL, status: { code: SpanStatusCode.UNSET } });
  expect(call!.parentSpanContext).toBeUndefined();
  expect(call!.attributes).toEqual({
    "gen_ai.operation.name": "generate_content",
    "gen_ai.provider.name": "flowturbo",
    "gen_ai.request.model": "shapes",
    "gen_ai.output.type": "image",
    "gen_ai.request.seed": 5,
    "gen_ai.request.choice.count": 2,
    "gen_ai.usage.input_tokens": result.tokens.text,
    "gen_ai.usage.output_tokens": 2 * result.tokens.image,
    ...{ "flowturbo.pictures": 2, "flowturbo.width": 32, "flowturbo.height": 32, "flowturbo.steps": 2 },
    ...{ "flowturbo.blocks": "E2", "flowturbo.runtime": "onnxruntime" },
  });
  expect(milliseconds(call!.startTime)).toBeGreaterThanOrEqual(before - 1);
  expect(milliseconds(call!.endTime)).toBeLessThanOrEqual(after + 1);

  const children = exporter.getFinishedSpans().filter((span) => span !== call);
  for (const span of children) {
    expect(span.parentSpanContext!.spanId).toBe(call!.spanContext().spanId);
    expect(span.spanContext().traceId).toBe(call!.spanContext().traceId);
    expect(milliseconds(span.startTime)).toBeGreaterThanOrEqual(milliseconds(call!.startTime) - 2);
    expect(milliseconds(span.endTime)).toBeLessThanOrEqual(milliseconds(call!.endTime) + 2);
  }
  expect(of("queue")).toHaveLength(1);
  expect(of("queue")[0]!.attributes).toEqual({ "flowturbo.queue.place": 0 });
  const steps = of("launch predict.guidance");
  expect(steps).toHaveLength(4);
  expect(steps[0]!.attributes).toEqual({ "flowturbo.size": "32x32", "flowturbo.batch": 1, "flowturbo.rows": 1 });
  // As long as the launches took, one after another.
  const total = steps.reduce((sum, span) => sum + lengthOf(span), 0);
  expect(total).toBeCloseTo(
    result.timings.steps.reduce((sum, each) => sum + each, 0),
    3,
  );
  for (const [index, span] of steps.entries())
    if (index > 0) expect(milliseconds(span.startTime)).toBeGreaterThan(milliseconds(steps[index - 1]!.startTime));
  expect(of("launch vae_decoder")).toHaveLength(2);
});

it("hangs it under the request that is answered, or the active span", async () => {
  const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
  await withTraceparent(traceparent, () => model.generate(request));
  const [remote] = of("generate_content shapes");
  expect(remote!.spanContext().traceId).toBe("0af7651916cd43dd8448eb211c80319c");
  expect(remote!.parentSpanContext).toMatchObject({ spanId: "b7ad6b7169203331", isRemote: true, traceFlags: 1 });
  expect(of("launch vae_decoder")[0]!.spanContext().traceId).toBe("0af7651916cd43dd8448eb211c80319c");

  exporter.reset();
  const parent = tracer.startSpan("a request");
  await context.with(traces.setSpan(context.active(), parent), () => model.generate(request));
  expect(of("generate_content shapes")[0]!.parentSpanContext!.spanId).toBe(parent.spanContext().spanId);

  // A caller who does not sample: nothing is exported.
  exporter.reset();
  await withTraceparent(traceparent.replace(/1$/, "0"), () => model.generate(request));
  expect(exporter.getFinishedSpans()).toEqual([]);
});

it("ends spans of calls that fail with their error's code, and no message", async () => {
  await expect(model.generate({ ...request, steps: 0 })).rejects.toThrow();
  await expect(model.generate({ ...request, steps: 1000, timeoutMs: 30 })).rejects.toThrow();
  const controller = new AbortController();
  const calls = [1, 2, 3].map((seed) => model.generate({ ...request, seed, steps: 1000, signal: controller.signal }));
  await new Promise((done) => setTimeout(done, 100));
  controller.abort();
  await Promise.allSettled(calls);
  await new Promise((done) => setTimeout(done, 20));
  const found = of("generate_content shapes");
  expect(found.map(({ attributes }) => attributes["error.type"])).toEqual([
    ...["ERR_FLOWTURBO_OPTION", "ERR_FLOWTURBO_TIMEOUT", "AbortError", "AbortError", "AbortError"],
  ]);
  for (const { status } of found) expect(status).toEqual({ code: SpanStatusCode.ERROR });
  // The third waited.
  const waited = of("queue").filter(({ status }) => status.code === SpanStatusCode.ERROR);
  expect(waited).toHaveLength(1);
});

it("ends, and is short enough to be copied", async () => {
  stop();
  await model.generate(request);
  expect(exporter.getFinishedSpans()).toEqual([]);
  const file = readFileSync(path.join(root, "examples/opentelemetry.js"), "utf8");
  expect([...file.matchAll(/from "([^"]+)"/g)].map(([, name]) => name)).toEqual([
    ...["node:diagnostics_channel", "@opentelemetry/api"],
  ]);
  expect(file.split("\n").length).toBeLessThan(130);
});
