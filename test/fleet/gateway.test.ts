// A server over a fleet: the HTTP API with workers behind it, on a real Redis, in one process. Models draw nothing; what they are asked counts.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { experimental_generateImage as generateImage } from "ai";
import type { FastifyInstance } from "fastify";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { createFlowTurbo } from "../../lib/ai.js";
import { modelsOf, openFleet } from "../../lib/fleet/index.js";
import type { ConnectFleetOptions } from "../../lib/fleet/options.js";
import { type CreateServerOptions, createServer } from "../../lib/server/index.js";
import { sumOf } from "../server/process.js";
import { events, post, type SentEvent } from "../server/support.js";
import { launchChromium, noChromium } from "../support/chromium.js";
import { noRedis } from "../support/redis.js";
import { countingModel, Fleets, until } from "./support.js";

(globalThis as { AI_SDK_LOG_WARNINGS?: boolean }).AI_SDK_LOG_WARNINGS = false;

const fleets = new Fleets();
const prefixOf = () => `g${randomUUID().slice(0, 8)}`;
const gateways: Gateway[] = [];
const body = { prompt: "a fox", num_inference_steps: 10, seed: 7 };

interface Gateway {
  readonly app: FastifyInstance;
  readonly url: string;
  readonly generations: string;
  close(): Promise<void>;
}

async function gatewayOf(
  prefix: string,
  options: Partial<CreateServerOptions> = {},
  connect: Partial<ConnectFleetOptions> = {},
): Promise<Gateway> {
  const fleet = await openFleet({ redis: fleets.redis.url, prefix, allowPaths: false, ...connect });
  const app = await createServer({ models: modelsOf(fleet), drainMs: 2000, logger: false, ...options });
  const url = await app.listen({ host: "127.0.0.1", port: 0 });
  const gateway: Gateway = {
    ...{ app, url, generations: `${url}/v1/images/generations` },
    async close() {
      await app.close();
      await fleet.close();
    },
  };
  gateways.push(gateway);
  return gateway;
}
// biome-ignore lint/suspicious/noExplicitAny: whatever the server sends
const get = async (url: string): Promise<any> => (await fetch(url)).json();
const idsOf = async ({ url }: Gateway): Promise<string[]> =>
  (await get(`${url}/v1/models`)).data.map(({ id }: { id: string }) => id);
const metricsOf = async ({ url }: Gateway) => (await fetch(`${url}/metrics`)).text();
const isReady = async ({ url }: Gateway) => (await fetch(`${url}/readyz`)).status === 200;
const png = (side: number, colour: string) =>
  sharp({ create: { width: side, height: side, channels: 3, background: colour } })
    .png()
    .toBuffer();

describe.skipIf(noRedis)(`a gateway${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  beforeAll(() => fleets.start());
  afterAll(() => Promise.all(gateways.map((gateway) => gateway.close())));

  it("draws with the workers that there are, each request once", async () => {
    const prefix = prefixOf();
    const models = [countingModel({ stepMs: 5 }), countingModel({ stepMs: 5 })];
    for (const model of models) await fleets.worker(prefix, model, { take: 1 });
    const gateway = await gatewayOf(prefix);
    expect(await isReady(gateway)).toBe(true);
    expect(await get(`${gateway.url}/v1/models/stub`)).toMatchObject({
      ...{ id: "stub", native_size: "64x64", has_refiner: true },
    });
    const answers = await Promise.all(
      [1, 2, 3, 4].map((seed) => post(gateway.generations, { ...body, seed, n: 2, output_format: "webp" })),
    );
    for (const [index, { status, body }] of answers.entries()) {
      expect(status, JSON.stringify(body)).toBe(200);
      expect(body).toMatchObject({ model: "stub", seeds: [index + 1, index + 2], size: "64x64", blocks: "H1P9" });
      const { format } = await sharp(Buffer.from(body.data[1].b64_json, "base64")).metadata();
      expect(format).toBe("webp");
    }
    expect(models.flatMap(({ asked }) => asked)).toHaveLength(4);
    for (const { asked } of models) expect(asked.length).toBeGreaterThan(0);
  });

  it("edits: pictures reach the worker byte by byte", async () => {
    const [prefix, model] = [prefixOf(), countingModel()];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const [image, mask] = [await png(64, "red"), await png(64, "white")];
    const form = new FormData();
    form.set("prompt", "a fox");
    form.set("strength", "0.5");
    form.set("image", new Blob([new Uint8Array(image)], { type: "image/png" }), "image.png");
    const response = await fetch(`${gateway.url}/v1/images/edits`, { method: "POST", body: form });
    const { usage } = (await response.json()) as { usage: { input_tokens_details: { image_tokens: number } } };
    expect([response.status, usage.input_tokens_details.image_tokens]).toEqual([200, 64]);
    expect(model.asked[0]).toMatchObject({ prompt: "a fox", strength: 0.5, allowPaths: false });
    expect(Buffer.from(model.asked[0]!.image as Uint8Array)).toEqual(image);
    const refused = await post(`${gateway.url}/v1/images/edits`, {
      prompt: "a fox",
      image: image.toString("base64"),
      mask: mask.toString("base64"),
    });
    // What is refused without a worker's help is refused as ever.
    expect([refused.status, refused.body.error.param]).toEqual([400, "mask"]);
  });

  it("streams partial pictures, and what is drawn", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 10 })];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const response = await fetch(gateway.generations, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, stream: true, partial_images: 3, preview: "fast" }),
    });
    expect(response.headers.get("content-type")).toContain("text/event-stream");
    const sent: SentEvent[] = [];
    for await (const event of events(response.body!)) sent.push(event);
    expect(sent.map(({ event }) => event)).toEqual([
      ...Array(3).fill("image_generation.partial_image"),
      "image_generation.completed",
    ]);
    expect(sent.map(({ data }) => data.partial_image_index)).toEqual([0, 1, 2, undefined]);
    const { width } = await sharp(Buffer.from(sent[1]!.data.b64_json, "base64")).metadata();
    expect(width).toBe(64);
    expect(sent.at(-1)!.data).toMatchObject({ seeds: [7], size: "64x64" });
  });

  it("keeps jobs, tells of their steps, and cancels them within a step", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 50 })];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const created = await post(`${gateway.url}/v1/jobs`, body);
    expect(created.status).toBe(202);
    const address = `${gateway.url}${created.headers.get("location")}`;
    const sent: SentEvent[] = [];
    for await (const event of events((await fetch(`${address}/events`)).body!)) sent.push(event);
    const types = sent.map(({ event }) => event);
    expect(types).toEqual(["job.queued", "job.started", ...Array(10).fill("job.progress"), "job.completed"]);
    expect(await get(address)).toMatchObject({ status: "completed", progress: { step: 10, steps: 10 } });

    const long = await post(`${gateway.url}/v1/jobs`, { ...body, prompt: "a bear", num_inference_steps: 50 });
    const other = `${gateway.url}${long.headers.get("location")}`;
    await until(async () => (await get(other)).progress.step > 0);
    const start = performance.now();
    expect(await (await fetch(other, { method: "DELETE" })).json()).toMatchObject({ status: "cancelled" });
    await until(() => model.aborted.length === 1);
    expect(performance.now() - start).toBeLessThan(1000);
  });

  it("stops the work of a client that hangs up", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 50 })];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const leaving = new AbortController();
    const answer = post(gateway.generations, { ...body, num_inference_steps: 50 }, {}, leaving.signal);
    await until(() => model.asked.length === 1);
    const start = performance.now();
    leaving.abort();
    await expect(answer).rejects.toThrow();
    await until(() => model.aborted.length === 1);
    expect(performance.now() - start).toBeLessThan(1000);
  });

  it("draws once for one Idempotency-Key", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 5 })];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const { seed: _, ...unseeded } = body;
    const ask = () => post(gateway.generations, unseeded, { "idempotency-key": "once" });
    const [one, other] = await Promise.all([ask(), ask()]);
    expect(one.body.seeds).toEqual(other.body.seeds);
    expect((await ask()).body).toEqual(one.body);
    expect(model.asked).toHaveLength(1);
  });

  it("answers 503 at once while there is no worker, and draws as soon as there is one", async () => {
    const prefix = prefixOf();
    const gateway = await gatewayOf(prefix);
    expect(await isReady(gateway)).toBe(false);
    expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
    expect(await idsOf(gateway)).toEqual([]);
    for (const fields of [{}, { model: "stub" }]) {
      const start = performance.now();
      const { status, headers, body: answer } = await post(gateway.generations, { ...body, ...fields });
      expect([status, answer.error.code]).toEqual([503, "fleet_empty"]);
      expect([headers.get("retry-after"), headers.get("x-should-retry")]).toEqual(["5", "true"]);
      expect(performance.now() - start).toBeLessThan(1000);
    }
    expect((await post(`${gateway.url}/v1/jobs`, body)).status).toBe(503);
    expect((await fetch(`${gateway.url}/v1/models/stub`)).status).toBe(404);
    await fleets.worker(prefix, countingModel());
    // Without waiting for the gateway's next look.
    expect((await post(gateway.generations, body)).status).toBe(200);
  });

  it("lists models as workers come and go; one that there is not is 404 beside others", async () => {
    const prefix = prefixOf();
    const gateway = await gatewayOf(prefix);
    await fleets.worker(prefix, countingModel(), { models: { one: countingModel() } });
    const both = await fleets.worker(prefix, countingModel(), {
      models: { two: countingModel(), one: countingModel() },
    });
    await until(async () => (await idsOf(gateway)).length === 2);
    // That of most workers is the one for requests that name none.
    expect(await idsOf(gateway)).toEqual(["one", "two"]);
    expect((await post(gateway.generations, body)).body.model).toBe("one");
    expect((await post(gateway.generations, { ...body, model: "two" })).body.model).toBe("two");
    const unknown = await post(gateway.generations, { ...body, model: "three" });
    expect([unknown.status, unknown.body.error.code]).toEqual([404, "model_not_found"]);
    expect(unknown.body.error.message).toContain("there is one, two");
    await both.close();
    await until(async () => (await idsOf(gateway)).length === 1);
    expect(await idsOf(gateway)).toEqual(["one"]);
    // It is known, and may have workers again.
    const gone = await post(gateway.generations, { ...body, prompt: "new", model: "two" });
    expect([gone.status, gone.body.error.code]).toEqual([503, "fleet_empty"]);
  });

  it("says when to come again where the queue is full, and where a limit does not fit", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 40, aloneMs: 400 })];
    await fleets.worker(prefix, model, { take: 1 });
    const gateway = await gatewayOf(prefix, {}, { maxQueue: 1 });
    // What it costs is known from here on.
    expect((await post(gateway.generations, body)).status).toBe(200);
    const asks = Array.from({ length: 6 }, (_, seed) => post(gateway.generations, { ...body, seed: 100 + seed }));
    const answers = await Promise.all(asks);
    const refused = answers.filter(({ status }) => status === 429);
    expect(refused.length).toBeGreaterThan(0);
    expect(answers.filter(({ status }) => status === 200).length).toBe(answers.length - refused.length);
    for (const { headers, body: answer } of refused) {
      expect(answer.error.code).toBe("queue_full");
      const milliseconds = Number(headers.get("retry-after-ms"));
      expect(milliseconds).toBeGreaterThan(0);
      expect(Number(headers.get("retry-after"))).toBe(Math.max(1, Math.ceil(milliseconds / 1000)));
    }
    // A limit that the others leave no room for: the same in the header. What the kind with a limit costs is known after the first.
    const other = await gatewayOf(prefix);
    expect((await post(other.generations, { ...body, seed: 200, deadline_ms: 60_000 })).status).toBe(200);
    const { fleet } = await fleets.fleet(prefix);
    await until(async () => (await fleet.status()).workers[0]!.models[0]!.prices === 2);
    const before = model.asked.length;
    const busy = [1, 2].map((seed) => post(other.generations, { ...body, seed: 210 + seed }));
    await until(() => model.asked.length > before);
    const late = await post(other.generations, { ...body, seed: 300, deadline_ms: 520 });
    expect([late.status, late.body.error.code, late.body.error.param]).toEqual([429, "deadline", "deadline_ms"]);
    expect(Number(late.headers.get("retry-after-ms"))).toBeGreaterThan(0);
    const hopeless = await post(other.generations, { ...body, seed: 301, deadline_ms: 1 });
    expect([hopeless.status, hopeless.body.error.code]).toEqual([422, "deadline_impossible"]);
    expect(hopeless.headers.get("retry-after")).toBeNull();
    await Promise.all(busy);
    expect(await metricsOf(gateway)).toMatch(
      new RegExp(`flowturbo_requests_refused_total\\{model="stub",reason="queue_full"\\} ${refused.length}\n`),
    );
  });

  it("has metrics that are of the moment, and finite without workers", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 100 })];
    const worker = await fleets.worker(prefix, model, { take: 2 });
    const gateway = await gatewayOf(prefix);
    const value = async (name: string) => sumOf(await metricsOf(gateway), `flowturbo_fleet_${name}`);
    expect(await value("workers")).toBe(1);
    expect(await value("capacity_pictures")).toBe(2);
    expect(await value("pictures")).toBe(0);
    const drawing = post(gateway.generations, body);
    await until(() => model.asked.length === 1);
    await sleep(100);
    expect(await value("pictures")).toBe(1);
    expect((await drawing).status).toBe(200);
    await worker.close();
    expect(await value("workers")).toBe(0);
    expect(await value("backlog_seconds")).toBe(0);
    // Whoever comes now is told to come again, and is a reason to start a worker.
    for (const seed of [1, 2]) expect((await post(gateway.generations, { ...body, seed })).status).toBe(503);
    expect(await value("backlog_seconds")).toBe(120);
    expect(await value("unserved_total")).toBe(2);
    // Another gateway knows the model too, though it has never seen a worker of it.
    const late = await gatewayOf(prefix);
    expect(sumOf(await metricsOf(late), "flowturbo_fleet_workers")).toBe(0);
    expect((await post(late.generations, { ...body, model: "stub", prompt: "new" })).body.error.code).toBe(
      "fleet_empty",
    );
    expect(sumOf(await metricsOf(late), "flowturbo_fleet_unserved_total")).toBe(1);
  });

  it("draws for the provider of the AI SDK", async () => {
    const [prefix, model] = [prefixOf(), countingModel()];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix, { apiKeys: ["secret"] });
    const provider = createFlowTurbo({ baseURL: gateway.url, apiKey: "secret" });
    const { images } = await generateImage({ model: provider.image("stub"), prompt: "a fox", n: 2, seed: 3 });
    expect(images).toHaveLength(2);
    // And with a model of the fleet in place of a server.
    const direct = createFlowTurbo({ model: await fleets.fleet(prefix) });
    expect((await generateImage({ model: direct.image(), prompt: "a fox", seed: 4 })).images).toHaveLength(1);
  });

  it.skipIf(noChromium)(`has the page${noChromium ? `: ${noChromium}` : ""}`, async () => {
    const prefix = prefixOf();
    await fleets.worker(prefix, countingModel({ stepMs: 5 }));
    const gateway = await gatewayOf(prefix);
    const browser = await launchChromium();
    try {
      const page = await browser.newPage();
      await page.goto(gateway.url);
      await page
        .getByRole("textbox", { name: /prompt/i })
        .first()
        .fill("a fox");
      await page.getByRole("button", { name: "Draw", exact: true }).click();
      await page.locator("img[src^='blob:'], img[src^='data:']").first().waitFor();
    } finally {
      await browser.close();
    }
  });

  it("ends as a server does: what is under way is answered", async () => {
    const [prefix, model] = [prefixOf(), countingModel({ stepMs: 30 })];
    await fleets.worker(prefix, model);
    const gateway = await gatewayOf(prefix);
    const drawing = post(gateway.generations, body);
    await until(() => model.asked.length === 1);
    await gateway.close();
    expect((await drawing).status).toBe(200);
  });

  it("says that Redis is away, and goes on when it is back", { timeout: 30_000 }, async () => {
    const prefix = prefixOf();
    await fleets.worker(prefix, countingModel());
    const gateway = await gatewayOf(prefix);
    expect(await isReady(gateway)).toBe(true);
    await fleets.redis.kill();
    try {
      await until(async () => !(await isReady(gateway)));
      expect(await (await fetch(`${gateway.url}/readyz`)).text()).toBe("Redis cannot be reached.\n");
      expect((await fetch(`${gateway.url}/livez`)).status).toBe(200);
      const { status, headers, body: answer } = await post(gateway.generations, body);
      expect([status, answer.error.code, headers.get("retry-after")]).toEqual([503, "redis", "2"]);
      // No old values: whoever scales by them does better by what it does without any.
      const text = await metricsOf(gateway);
      expect(text).not.toMatch(/^flowturbo_fleet_\w+\{/m);
      expect(text).toMatch(/^flowturbo_model_ready\{model="stub"\} 0$/m);
    } finally {
      await fleets.redis.start();
    }
    await until(() => isReady(gateway), 20_000);
    expect((await post(gateway.generations, body)).status).toBe(200);
  });
});
