// What a gateway promises, and to whom it says when to come again, with workers that draw: a real model each, whose launches wait in place of computing.
import { setTimeout as sleep } from "node:timers/promises";
import { experimental_generateImage as generateImage } from "ai";
import type { FastifyInstance } from "fastify";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { createFlowTurbo } from "../../lib/ai.js";
import { type Fleet, modelsOf, openFleet } from "../../lib/fleet/index.js";
import type { FlowTurbo } from "../../lib/flowturbo.js";
import { createServer } from "../../lib/server/index.js";
import { events, post } from "../server/support.js";
import { noRedis } from "../support/redis.js";
import { loadWaiting } from "../support/waiting.js";
import { Fleets, until } from "./support.js";

const fleets = new Fleets();
const prefix = "promises";
const maxQueue = 4;
const body = { prompt: "a red circle", num_inference_steps: 8, guidance_scale: 1, model: "stub" };

describe.skipIf(noRedis)(`a gateway with workers that draw${noRedis ? ` (skipped: ${noRedis})` : ""}`, () => {
  const models: FlowTurbo[] = [];
  let fleet: Fleet;
  let app: FastifyInstance;
  let url: string;
  let seed = 0;
  const ask = (more: Record<string, unknown> = {}) =>
    post(`${url}/v1/images/generations`, { ...body, seed: seed++, ...more });
  /** Callers that fill both workers, and the queue. Resolves when they wait. */
  const load = async (count: number, more: Record<string, unknown> = {}) => {
    // What a gateway knows of the workers may be 50 ms old.
    await sleep(100);
    const calls = Array.from({ length: count }, async () => {
      const answer = await ask(more);
      expect(answer.status, JSON.stringify(answer.body)).toBe(200);
      return answer;
    });
    await until(async () => (await fleet.status()).models[0]!.waiting >= Math.min(maxQueue, count - 2));
    return calls;
  };

  beforeAll(async () => {
    await fleets.start();
    // A picture is some 600 ms of the one and 900 ms of the other.
    for (const speed of [1.5, 1])
      models.push(await loadWaiting({ msPerLaunch: 80, msPerRow: 20, maxBatch: 1, sizes: [], speed }));
    for (const model of models) await fleets.worker(prefix, model, { take: 1 });
    fleet = await openFleet({ redis: fleets.redis.url, prefix, maxQueue, allowPaths: false });
    app = await createServer({ models: modelsOf(fleet), drainMs: 2000, logger: false });
    url = await app.listen({ host: "127.0.0.1", port: 0 });
    // What this kind takes is known from here on, with a limit and without.
    await Promise.all([ask(), ask()]);
    await Promise.all([ask({ deadline_ms: 60_000 }), ask({ deadline_ms: 60_000 })]);
  }, 60_000);
  afterAll(async () => {
    await app?.close();
    await fleet?.close();
    for (const model of models) await model.dispose();
  });

  it("draws those who come again when they were told to", { timeout: 60_000 }, async () => {
    const answers = await Promise.all(
      Array.from({ length: 12 }, async () => {
        const mine = { seed: seed++ };
        for (let refusals = 0; ; refusals++) {
          const { status, headers, body } = await ask(mine);
          if (status === 200) return refusals;
          expect([status, body.error.code]).toEqual([429, "queue_full"]);
          await sleep(Number(headers.get("retry-after-ms")));
        }
      }),
    );
    expect(answers.filter((refusals) => refusals > 0).length).toBeGreaterThan(2);
    expect(Math.max(...answers)).toBeLessThan(3);
  });

  it("keeps limits that it has accepted, whoever else is served, and says when others fit", async () => {
    const busy = await load(5);
    const promised = await ask({ deadline_ms: 6000 });
    expect([promised.status, promised.body.deadline?.deadlineMs]).toEqual([200, 6000]);
    expect(promised.body.deadline.actualMs).toBeLessThan(6000);
    await Promise.all(busy);

    const others = await load(4, { deadline_ms: 8000 });
    const deadline_ms = 1100;
    // Who asks for the same again is the same caller.
    const mine = { seed: seed++, deadline_ms };
    const late = await ask(mine);
    expect([late.status, late.body.error.code]).toEqual([429, "deadline"]);
    const told = Number(late.headers.get("retry-after-ms"));
    expect(told).toBeGreaterThan(0);
    await sleep(told);
    let drawn = await ask(mine);
    // Where this machine is slower than it was, the others are not done yet.
    for (let again = 0; again < 2 && drawn.status === 429; again++) {
      await sleep(Number(drawn.headers.get("retry-after-ms")));
      drawn = await ask(mine);
    }
    expect(drawn.status, JSON.stringify(drawn.body)).toBe(200);
    expect(drawn.body.deadline.actualMs).toBeLessThan(deadline_ms);
    for (const answer of await Promise.all(others)) {
      expect(answer.status).toBe(200);
      expect(answer.body.deadline.actualMs).toBeLessThan(8000);
    }
  });

  it("draws the more urgent first", async () => {
    const ended: string[] = [];
    const named = (name: string, call: Promise<unknown>) => call.then(() => ended.push(name));
    const usual = (await load(5)).map((call) => named("usual", call));
    const { prompt, num_inference_steps: steps, guidance_scale: guidanceScale } = body;
    const request = { prompt, steps, guidanceScale, seed: seed++, priority: 5 };
    const urgent = named("urgent", fleet.model("stub").generate(request));
    await Promise.all([...usual, urgent]);
    expect(ended).toHaveLength(6);
    // Two were at work before it came.
    expect(ended.indexOf("urgent")).toBeLessThan(3);
  });

  it("is used by the AI SDK, and streams what a worker draws", async () => {
    const flowturbo = createFlowTurbo({ baseURL: url });
    const { images } = await generateImage({ model: flowturbo.image("stub"), prompt: "a red circle", seed: 7, n: 2 });
    const [alone] = (await models[0]!.generate({ prompt: "a red circle", seed: 7, count: 2 })).images;
    const pixels = await sharp(images[0]!.uint8Array).removeAlpha().raw().toBuffer();
    expect(pixels.equals(Buffer.from(alone!.data))).toBe(true);
    const response = await fetch(`${url}/v1/images/generations`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...body, seed: 7, stream: true, partial_images: 2 }),
    });
    const sent: string[] = [];
    for await (const { event } of events(response.body!)) sent.push(event);
    expect(sent).toEqual([
      "image_generation.partial_image",
      "image_generation.partial_image",
      "image_generation.completed",
    ]);
  });
});
