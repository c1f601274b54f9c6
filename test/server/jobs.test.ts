// Jobs: asked for, read, come back to, cancelled, told of, and forgotten.
import { once } from "node:events";
import http from "node:http";
import type { AddressInfo } from "node:net";
import type { ImageModel } from "flowturbo";
import OpenAI from "openai";
import sharp from "sharp";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { events, heldModel, post, quick, type SentEvent, serverOf, startServer, type TestServer } from "./support.js";

let server: TestServer;
let model: ImageModel;
const jobs = (url = server.url) => `${url}/v1/jobs`;
// biome-ignore lint/suspicious/noExplicitAny: whatever the server sends
const get = async (url: string, headers = {}): Promise<any> => (await fetch(url, { headers })).json();
const over = async (id: string, url = server.url) => {
  await expect
    .poll(async () => (await get(`${jobs(url)}/${id}`)).status, { timeout: 20_000 })
    .not.toMatch(/queued|in_progress/);
  return get(`${jobs(url)}/${id}`);
};
const readAll = async (id: string, after?: number, url = server.url): Promise<SentEvent[]> => {
  const headers = after === undefined ? {} : { "last-event-id": String(after) };
  const response = await fetch(`${jobs(url)}/${id}/events`, { headers });
  const all: SentEvent[] = [];
  for await (const event of events(response.body!)) all.push(event);
  return all;
};

beforeAll(async () => {
  server = await startServer();
  ({ model } = server);
}, 60_000);
afterAll(() => server.close());

describe("a job", () => {
  it("is accepted at once, and its result is that of a generation", async () => {
    const { status, headers, body } = await post(jobs(), { ...quick, n: 2 });
    expect(status).toBe(202);
    expect(headers.get("location")).toBe(`/v1/jobs/${body.id}`);
    expect(body).toMatchObject({ object: "job", model: "shapes", result: null, error: null, expires_at: null });
    expect(["queued", "in_progress"]).toContain(body.status);
    const done = await over(body.id);
    expect(done).toMatchObject({
      status: "completed",
      place: null,
      predicted_ms: null,
      progress: { step: 3, steps: 3 },
    });
    expect(done.expires_at).toBeGreaterThan(done.completed_at);
    const same = await post(`${server.url}/v1/images/generations`, { ...quick, n: 2 });
    expect(done.result.data).toEqual(same.body.data);
    expect(done.result).toMatchObject({ seeds: [7, 8], blocks: same.body.blocks, usage: same.body.usage });
  });

  it("has events from the queue to the pictures, in order, with small previews", async () => {
    const { body } = await post(jobs(), { ...quick, num_inference_steps: 6, partial_images: 100, preview: "fast" });
    const all = await readAll(body.id);
    expect(all.map(({ id }) => Number(id))).toEqual([...all.keys()].map((index) => Number(all[0]!.id) + index));
    const types = all.map(({ event }) => event);
    expect(types[0]).toBe("job.queued");
    expect(types.filter((type) => type === "job.progress")).toHaveLength(6);
    expect(types.filter((type) => type === "job.partial_image").length).toBeGreaterThan(2);
    expect(types.at(-1)).toBe("job.completed");
    for (const { event, data } of all) expect(data.type).toBe(event);
    expect(all[0]!.data).toMatchObject({ seeds: [7], place: expect.any(Number) });
    const { b64_json } = all.find(({ event }) => event === "job.partial_image")!.data;
    // One pixel for each latent.
    expect(await sharp(Buffer.from(b64_json, "base64")).metadata()).toMatchObject({ width: 16, height: 16 });
    const last = all.at(-1)!.data.job;
    expect(last).toMatchObject({ id: body.id, status: "completed" });
    expect(last.result.data).toHaveLength(1);
  });

  it("is read on after Last-Event-ID, while it runs and when it is over", async () => {
    const held = heldModel(model);
    const own = await serverOf({ shapes: held });
    try {
      // Accepted only when it is let go: it is asked for first, and read when it is there.
      const asked = post(jobs(own.url), { ...quick, num_inference_steps: 8 });
      held.release();
      const { body } = await asked;
      const first = await fetch(`${jobs(own.url)}/${body.id}/events`);
      const before: SentEvent[] = [];
      for await (const event of events(first.body!)) {
        before.push(event);
        // The connection breaks here.
        if (event.event === "job.progress") break;
      }
      const at = Number(before.at(-1)!.id);
      const after = await readAll(body.id, at, own.url);
      expect(Number(after[0]!.id)).toBe(at + 1);
      const progress = [...before, ...after]
        .filter(({ event }) => event === "job.progress")
        .map(({ data }) => data.step);
      expect(progress).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
      const again = await readAll(body.id, Number(after.at(-1)!.id) - 1, own.url);
      expect(again.map(({ event }) => event)).toEqual(["job.completed"]);
      expect(await readAll(body.id, Number(after.at(-1)!.id), own.url)).toEqual([]);
      const wrong = await fetch(`${jobs(own.url)}/${body.id}/events`, { headers: { "last-event-id": "x" } });
      expect(wrong.status).toBe(400);
    } finally {
      await own.close();
    }
  });

  it("is cancelled within a step, and says so to those who read it", async () => {
    const before = model.stats();
    const { body } = await post(jobs(), { ...quick, num_inference_steps: 50 });
    const reading = readAll(body.id);
    await expect
      .poll(async () => (await get(`${jobs()}/${body.id}`)).progress.step, { interval: 5 })
      .toBeGreaterThan(0);
    const response = await fetch(`${jobs()}/${body.id}`, { method: "DELETE" });
    expect(response.status).toBe(200);
    expect(await response.json()).toMatchObject({ status: "cancelled" });
    const all = await reading;
    expect(all.at(-1)).toMatchObject({ event: "job.cancelled", data: { job: { status: "cancelled", result: null } } });
    expect(model.stats().requests.aborted).toBe(before.requests.aborted + 1);
    expect(all.filter(({ event }) => event === "job.progress").length).toBeLessThan(50);
    // Twice is the same.
    expect((await fetch(`${jobs()}/${body.id}`, { method: "DELETE" })).status).toBe(200);
  });

  it("goes on when nobody is connected, and edits", async () => {
    const image = await sharp({ create: { width: 64, height: 64, channels: 3, background: "blue" } })
      .png()
      .toBuffer();
    const { body } = await post(jobs(), { ...quick, image: image.toString("base64"), strength: 0.9 });
    const done = await over(body.id);
    expect(done.status).toBe("completed");
    expect(done.result.usage.input_tokens_details.image_tokens).toBe(64);
  });

  it("is refused as a generation is, before it is a job", async () => {
    for (const [given, param] of [
      [{ stream: true }, "stream"],
      [{ partial_images: 101 }, "partial_images"],
      [{ n: 99 }, "n"],
    ] as const) {
      const { status, body } = await post(jobs(), { ...quick, ...given });
      expect([status, body.error.param]).toEqual([400, param]);
    }
    const impossible = await post(jobs(), { prompt: "x", deadline_ms: 0.01 });
    expect([impossible.status, impossible.body.error.code]).toEqual([422, "deadline_impossible"]);
  });

  it("says its place and when its pictures are expected while it waits", async () => {
    const small = await startServer({}, { maxBatch: 1, maxQueue: 2 });
    try {
      await post(`${small.url}/v1/images/generations`, { ...quick, num_inference_steps: 30 });
      const ask = () => post(jobs(small.url), { ...quick, num_inference_steps: 30 });
      const asked = [await ask(), await ask(), await ask(), await ask()];
      expect(asked.map(({ status }) => status)).toEqual([202, 202, 202, 202]);
      const [, , third, fourth] = asked.map(({ body }) => body.id);
      expect(await get(`${jobs(small.url)}/${third}`)).toMatchObject({
        status: "queued",
        place: 1,
        predicted_ms: expect.any(Number),
      });
      expect(await get(`${jobs(small.url)}/${fourth}`)).toMatchObject({ status: "queued", place: 2 });
      const refused = await ask();
      expect([refused.status, refused.body.error.code]).toEqual([429, "queue_full"]);
      const metrics = await (await fetch(`${small.url}/metrics`)).text();
      expect(metrics).not.toContain('flowturbo_jobs_total{status="failed"}');
      expect(Number(refused.headers.get("retry-after-ms"))).toBeGreaterThan(0);
      // The third goes: the fourth moves up.
      await fetch(`${jobs(small.url)}/${third}`, { method: "DELETE" });
      await expect.poll(async () => (await get(`${jobs(small.url)}/${fourth}`)).place).toBeLessThanOrEqual(1);
    } finally {
      await small.close();
    }
  });

  it("is one for requests with the same Idempotency-Key", async () => {
    const ask = (seed = 3) => post(jobs(), { ...quick, seed }, { "idempotency-key": "job" });
    const [one, two] = await Promise.all([ask(), ask()]);
    expect(two.body.id).toBe(one.body.id);
    expect((await ask(4)).status).toBe(409);
    await over(one.body.id);
    expect((await ask()).body).toMatchObject({ id: one.body.id, status: "completed" });
  });

  it("belongs to the key that it was asked for with", async () => {
    const own = await serverOf({ shapes: model }, { apiKeys: ["one", "two"] });
    try {
      const { body } = await post(jobs(own.url), quick, { authorization: "Bearer one" });
      const as = (key: string) => fetch(`${jobs(own.url)}/${body.id}`, { headers: { authorization: `Bearer ${key}` } });
      expect((await as("one")).status).toBe(200);
      expect((await as("two")).status).toBe(404);
    } finally {
      await own.close();
    }
  });

  it("is forgotten after its time, or when there are too many", async () => {
    const own = await serverOf({ shapes: model }, { keepJobsMs: 1000, keepJobs: 2 });
    try {
      const ids: string[] = [];
      for (let index = 0; index < 3; index++) {
        const { body } = await post(jobs(own.url), { ...quick, seed: index });
        ids.push(body.id);
        await expect.poll(async () => (await get(`${jobs(own.url)}/${body.id}`)).status).toBe("completed");
      }
      expect((await fetch(`${jobs(own.url)}/${ids[0]}`)).status).toBe(404);
      expect((await fetch(`${jobs(own.url)}/${ids[2]}`)).status).toBe(200);
      await expect.poll(async () => (await fetch(`${jobs(own.url)}/${ids[2]}`)).status, { timeout: 5000 }).toBe(404);
      expect(((await get(`${jobs(own.url)}/${ids[2]}`)) as { error: { code: string } }).error.code).toBe(
        "job_not_found",
      );
    } finally {
      await own.close();
    }
  });

  it("fails with the error of its run, and is logged without its prompt", async () => {
    const failing = new Proxy(model, {
      get: (target, name) =>
        name === "generate"
          ? async (options: Parameters<ImageModel["generate"]>[0]) => {
              options.onAccept?.(
                { place: 0, predictedMs: 5, blocks: "E1", seeds: [1], aloneMs: 5, leastMs: 5 },
                { signal: options.signal! },
              );
              throw new Error("secret of the server");
            }
          : Reflect.get(target, name),
    });
    const own = await serverOf({ shapes: failing });
    try {
      const { body } = await post(jobs(own.url), quick);
      const all = await readAll(body.id, undefined, own.url);
      expect(all.at(-1)).toMatchObject({
        event: "job.failed",
        data: { error: { code: "internal_error", message: "Internal error." }, job: { status: "failed" } },
      });
      expect(JSON.stringify(all)).not.toContain("secret");
      expect(own.log.join("")).toContain("secret of the server");
      expect(own.log.join("")).not.toContain(quick.prompt);
    } finally {
      await own.close();
    }
  });
});

describe("webhooks", () => {
  const secret = `whsec_${Buffer.from("a secret of twenty-four bytes").toString("base64")}`;
  let receiver: http.Server;
  let statuses: number[] = [];
  const received: { headers: http.IncomingHttpHeaders; body: string }[] = [];
  const address = () => `http://127.0.0.1:${(receiver.address() as AddressInfo).port}/hook`;

  beforeAll(async () => {
    receiver = http.createServer(async (request, response) => {
      const chunks = await request.toArray();
      received.push({ headers: request.headers, body: Buffer.concat(chunks).toString() });
      response.writeHead(statuses.shift() ?? 204, { location: "http://example.org/" }).end();
    });
    receiver.listen(0, "127.0.0.1");
    await once(receiver, "listening");
  });
  afterAll(() => void receiver.close());
  afterEach(() => {
    received.length = 0;
    statuses = [];
    vi.useRealTimers();
  });

  it("are signed as OpenAI's package expects, sent again when they are not taken, and hold no picture", async () => {
    statuses = [500];
    const own = await serverOf({ shapes: model }, { webhooks: { hosts: ["127.0.0.1"], secret } });
    try {
      const { body, status } = await post(jobs(own.url), { ...quick, webhook: address() });
      expect(status).toBe(202);
      await expect.poll(() => received.length, { timeout: 10_000 }).toBe(2);
      expect(received[1]!.headers["webhook-id"]).toBe(received[0]!.headers["webhook-id"]);
      const client = new OpenAI({ apiKey: "none", webhookSecret: secret });
      const event = (await client.webhooks.unwrap(received[1]!.body, received[1]!.headers as never)) as never as {
        type: string;
        data: { id: string; status: string; result?: unknown };
      };
      expect(event).toMatchObject({ type: "job.completed", data: { id: body.id, status: "completed" } });
      expect(event.data.result).toBeUndefined();
      await expect(client.webhooks.unwrap(`${received[1]!.body} `, received[1]!.headers as never)).rejects.toThrow(
        /signature/i,
      );
    } finally {
      await own.close();
    }
  });

  it("go only to hosts that were named, never further, and are refused where there are none", async () => {
    const none = await post(jobs(), { ...quick, webhook: address() });
    expect([none.status, none.body.error.param]).toEqual([400, "webhook"]);
    statuses = [302, 410];
    const own = await serverOf({ shapes: model }, { webhooks: { hosts: ["127.0.0.1"], secret } });
    try {
      for (const webhook of [
        "http://localhost:1/",
        "http://169.254.169.254/latest",
        "http://a:b@127.0.0.1/",
        "file:///etc/passwd",
        "x",
      ]) {
        const refused = await post(jobs(own.url), { ...quick, webhook });
        expect([webhook, refused.status, refused.body.error.param]).toEqual([webhook, 400, "webhook"]);
      }
      await post(jobs(own.url), { ...quick, webhook: address() });
      // A redirect is not followed, and counts as not taken; 410 ends it.
      await expect.poll(() => received.length, { timeout: 10_000 }).toBe(2);
      await expect.poll(() => own.log.some((line) => line.includes("webhook of a job was not taken"))).toBe(true);
    } finally {
      await own.close();
    }
  });
});
