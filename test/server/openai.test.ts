// OpenAI's own package against the server: what it sends is taken, and what it gets has the types that it promises.
import OpenAI, {
  APIUserAbortError,
  AuthenticationError,
  BadRequestError,
  NotFoundError,
  RateLimitError,
  toFile,
} from "openai";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { heldModel, serverOf, startServer, type TestServer } from "./support.js";

let server: TestServer;
let client: OpenAI;

beforeAll(async () => {
  server = await startServer({ apiKeys: ["key-of-the-test"] });
  client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "key-of-the-test", maxRetries: 0 });
}, 60_000);
afterAll(() => server.close());

/** Fields that OpenAI's API does not have go along with its own. */
const quick = { num_inference_steps: 4, guidance_scale: 2, seed: 7 } as object;
const pixelsOf = async (b64: string) => {
  const { data, info } = await sharp(Buffer.from(b64, "base64"))
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true });
  return { data, width: info.width, height: info.height, channels: info.channels };
};

describe("generate", () => {
  it("gives the picture that the library draws, with seeds, blocks, timings and usage beside it", async () => {
    const response = await client.images.generate({ prompt: "a red circle", n: 2, ...quick });
    const drawn = await server.model.generate({
      prompt: "a red circle",
      count: 2,
      steps: 4,
      guidanceScale: 2,
      seed: 7,
    });
    expect(response.data).toHaveLength(2);
    for (const [index, { b64_json }] of response.data!.entries()) {
      const { data, width, height } = await pixelsOf(b64_json!);
      expect([width, height]).toEqual([64, 64]);
      expect(Buffer.compare(data, Buffer.from(drawn.images[index]!.data))).toBe(0);
    }
    expect(Math.abs(response.created - Date.now() / 1000)).toBeLessThan(60);
    expect(response).toMatchObject({ size: "64x64", quality: "low", output_format: "png", background: "opaque" });
    expect(response).toMatchObject({
      model: "shapes",
      seeds: [7, 8],
      blocks: drawn.blocks,
      warnings: [],
      deadline: null,
    });
    const { timings } = response as unknown as { timings: { steps: number[]; total: number } };
    expect(timings.steps).toHaveLength(4);
    expect(timings.total).toBeGreaterThan(timings.steps.reduce((sum, step) => sum + step, 0) / 2);
    // 64 × 64 pixels are 16 × 16 latents, of which the transformer sees patches of 2 × 2.
    expect(response.usage).toMatchObject({ output_tokens: 2 * 64, input_tokens_details: { image_tokens: 0 } });
    expect(response.usage!.input_tokens_details.text_tokens).toBeGreaterThanOrEqual(3);
    expect(response.usage!.total_tokens).toBe(response.usage!.input_tokens + 128);
  });

  it("takes quality, size, format and compression", async () => {
    const response = await client.images.generate({
      ...{
        prompt: "a blue square",
        quality: "low",
        size: "128x64" as never,
        output_format: "webp",
        output_compression: 40,
      },
      ...{ response_format: "b64_json", background: "auto", user: "somebody", model: "shapes" },
    });
    expect(response).toMatchObject({ size: "128x64", quality: "low", output_format: "webp" });
    const file = Buffer.from(response.data![0]!.b64_json!, "base64");
    expect(await sharp(file).metadata()).toMatchObject({ format: "webp", width: 128, height: 64 });
    expect((response as never as { timings: { steps: number[] } }).timings.steps).toHaveLength(6);
    const fine = await client.images.generate({
      ...{
        prompt: "a blue square",
        output_format: "webp",
        output_compression: 100,
        size: "128x64" as never,
        quality: "low",
      },
      seed: (response as never as { seeds: number[] }).seeds[0],
    } as never);
    expect(Buffer.from((fine as never as typeof response).data![0]!.b64_json!, "base64").length).toBeGreaterThan(
      file.length,
    );
  });

  it.each(["png", "jpeg", "webp"] as const)("writes %s", async (output_format) => {
    const { data } = await client.images.generate({ prompt: "a red circle", output_format, ...quick });
    expect((await sharp(Buffer.from(data![0]!.b64_json!, "base64")).metadata()).format).toBe(output_format);
  });
});

describe("edit", () => {
  const original = () =>
    sharp({ create: { width: 64, height: 64, channels: 3, background: "#2050a0" } })
      .png()
      .toBuffer();
  /** The right half is transparent, which is painted. */
  const mask = async () => {
    const data = Buffer.alloc(64 * 64 * 4, 255);
    for (let row = 0; row < 64; row++)
      for (let column = 32; column < 64; column++) data[4 * (64 * row + column) + 3] = 0;
    return sharp(data, { raw: { width: 64, height: 64, channels: 4 } })
      .png()
      .toBuffer();
  };

  it("paints where the mask is transparent, and keeps the rest pixel for pixel", async () => {
    const response = await client.images.edit({
      image: await toFile(await original(), "original.png", { type: "image/png" }),
      mask: await toFile(await mask(), "mask.png", { type: "image/png" }),
      prompt: "a red circle",
      ...quick,
    });
    const before = await pixelsOf((await original()).toString("base64"));
    const after = await pixelsOf(response.data![0]!.b64_json!);
    const changed = { left: 0, right: 0 };
    for (let index = 0; index < before.data.length; index++)
      if (before.data[index] !== after.data[index]) changed[Math.floor(index / 3) % 64 < 32 ? "left" : "right"]++;
    expect(changed.left).toBe(0);
    expect(changed.right).toBeGreaterThan(1000);
    expect(response.usage).toMatchObject({ input_tokens_details: { image_tokens: 64 } });
  });

  it("takes a list of one picture, and streams", async () => {
    const stream = await client.images.edit({
      image: [await toFile(await original(), "original.png", { type: "image/png" })],
      prompt: "a red circle",
      stream: true,
      partial_images: 1,
      ...quick,
      ...({ strength: 0.9 } as object),
    });
    const types: string[] = [];
    for await (const event of stream) types.push(event.type);
    expect(types).toEqual(["image_edit.partial_image", "image_edit.completed"]);
  });

  it("refuses a mask of another size, one without alpha, and what is no picture, by name", async () => {
    const image = await toFile(await original(), "original.png", { type: "image/png" });
    const small = await toFile(
      await sharp(await mask())
        .resize(32, 32)
        .png()
        .toBuffer(),
      "mask.png",
    );
    const opaque = await toFile(await original(), "mask.png");
    const noise = await toFile(Buffer.from("not a picture"), "image.png");
    const edit = (files: Partial<Parameters<OpenAI["images"]["edit"]>[0]>) =>
      client.images.edit({ image, prompt: "a red circle", ...files } as never);
    await expect(edit({ mask: small })).rejects.toMatchObject({
      status: 400,
      param: "mask",
      message: expect.stringContaining("64x64"),
    });
    await expect(edit({ mask: opaque })).rejects.toMatchObject({
      status: 400,
      param: "mask",
      message: expect.stringContaining("alpha"),
    });
    await expect(edit({ image: noise })).rejects.toMatchObject({ status: 400, param: "image" });
    await expect(edit({ image: [image, image] })).rejects.toMatchObject({ status: 400, param: "image" });
  });
});

describe("stream", () => {
  it("gives as many partial pictures as were asked for, at the picture's size, then the picture", async () => {
    const stream = await client.images.generate({
      ...{ prompt: "a red circle", stream: true, partial_images: 3, num_inference_steps: 8, seed: 7 },
    } as OpenAI.ImageGenerateParamsStreaming);
    const seen: OpenAI.ImageGenStreamEvent[] = [];
    for await (const event of stream) seen.push(event);
    expect(seen.map(({ type }) => type)).toEqual([
      ...Array<string>(3).fill("image_generation.partial_image"),
      "image_generation.completed",
    ]);
    const partials = seen.slice(0, 3) as OpenAI.ImageGenPartialImageEvent[];
    expect(partials.map(({ partial_image_index }) => partial_image_index)).toEqual([0, 1, 2]);
    const final = await pixelsOf((seen[3] as OpenAI.ImageGenCompletedEvent).b64_json);
    let before = Number.POSITIVE_INFINITY;
    for (const partial of partials) {
      expect(partial).toMatchObject({ size: "64x64", output_format: "png", background: "opaque" });
      const { data, width } = await pixelsOf(partial.b64_json);
      expect(width).toBe(64);
      // Each comes nearer to the picture.
      let distance = 0;
      for (const [index, value] of data.entries()) distance += (value - final.data[index]!) ** 2;
      expect(distance).toBeLessThan(before);
      expect(distance).toBeGreaterThan(0);
      before = distance;
    }
    expect(seen[3]).toMatchObject({ usage: { output_tokens: 64 }, seeds: [7] });
  });

  it("gives one event for each of several pictures, and no partial ones unless they are asked for", async () => {
    const stream = await client.images.generate({
      prompt: "a red circle",
      n: 2,
      stream: true,
      ...quick,
    } as OpenAI.ImageGenerateParamsStreaming);
    const seen: (OpenAI.ImageGenStreamEvent & { image_index?: number })[] = [];
    for await (const event of stream) seen.push(event);
    expect(seen.map(({ type, image_index }) => [type, image_index])).toEqual([
      ["image_generation.completed", 0],
      ["image_generation.completed", 1],
    ]);
  });

  it("refuses with a status before it begins", async () => {
    const refused = client.images.generate({ prompt: "a red circle", stream: true, partial_images: 4 });
    await expect(refused).rejects.toMatchObject({ status: 400, param: "partial_images" });
    await expect(refused).rejects.toBeInstanceOf(BadRequestError);
  });
});

describe("abort", () => {
  it("stops the work within a step", async () => {
    const controller = new AbortController();
    const before = server.model.stats();
    const asked = client.images.generate({ prompt: "a red circle", num_inference_steps: 50 } as never, {
      signal: controller.signal,
    });
    asked.catch(() => {});
    await expect.poll(() => server.model.stats().running.requests, { interval: 5 }).toBe(1);
    controller.abort();
    await expect(asked).rejects.toBeInstanceOf(APIUserAbortError);
    await expect.poll(() => server.model.stats().requests.aborted).toBe(before.requests.aborted + 1);
    await expect.poll(() => server.model.stats().running.requests).toBe(0);
    // Each step is a launch; the text may have had three.
    expect(server.model.stats().launches.count - before.launches.count).toBeLessThan(45);
    await expect.poll(() => server.log.some((line) => line.includes('"status":499'))).toBe(true);
  });

  it("stops a stream that is left", async () => {
    const before = server.model.stats().requests.aborted;
    const stream = await client.images.generate({
      ...{ prompt: "a red circle", stream: true, partial_images: 3, num_inference_steps: 50 },
    } as OpenAI.ImageGenerateParamsStreaming);
    for await (const _ of stream) break;
    await expect.poll(() => server.model.stats().requests.aborted).toBe(before + 1);
  });
});

describe("models", () => {
  it("lists them and finds one", async () => {
    const ids: string[] = [];
    for await (const { id, object, owned_by } of client.models.list()) {
      expect([object, owned_by]).toEqual(["model", "flowturbo"]);
      ids.push(id);
    }
    expect(ids).toEqual(["shapes"]);
    expect(await client.models.retrieve("shapes")).toMatchObject({ id: "shapes", native_size: "64x64" });
    await expect(client.models.retrieve("gpt-image-1")).rejects.toMatchObject({ status: 404, code: "model_not_found" });
    await expect(client.images.generate({ prompt: "x", model: "gpt-image-1" })).rejects.toBeInstanceOf(NotFoundError);
  });
});

describe("errors", () => {
  it("have types: a wrong key, wrong fields, a queue that is full", async () => {
    const other = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "wrong", maxRetries: 0 });
    await expect(other.images.generate({ prompt: "x" })).rejects.toBeInstanceOf(AuthenticationError);
    await expect(client.images.generate({ prompt: "x", background: "transparent" })).rejects.toMatchObject({
      ...{ status: 400, param: "background", code: "unsupported_value", type: "invalid_request_error" },
    });
    await expect(client.images.generate({ prompt: "x", response_format: "url" })).rejects.toMatchObject({
      param: "response_format",
    });
    await expect(client.images.generate({ prompt: "x", style: "vivid" } as never)).rejects.toMatchObject({
      param: "style",
    });
    await expect(client.images.generate({ prompt: "x", n: 11 })).rejects.toMatchObject({ status: 400, param: "n" });
    await expect(client.images.generate({ prompt: "x", size: "65x64" as never })).rejects.toMatchObject({
      status: 400,
      param: "size",
    });
  });

  it("does not try again what will fail again, and tries again what may not", async () => {
    let calls = 0;
    const counting = new OpenAI({
      ...{ baseURL: `${server.url}/v1`, apiKey: "key-of-the-test", maxRetries: 2 },
      fetch: (url, init) => {
        calls++;
        return fetch(url, init);
      },
    });
    // No schedule fits in a tenth of a millisecond: 422 would not be tried again anyway, 409 would.
    await expect(counting.images.generate({ prompt: "x", deadline_ms: 0.1 } as never)).rejects.toMatchObject({
      status: 422,
    });
    expect(calls).toBe(1);
    const again = { idempotencyKey: "one" };
    await counting.images.generate({ prompt: "x", ...quick }, { headers: { "idempotency-key": again.idempotencyKey } });
    calls = 0;
    const reused = counting.images.generate(
      { prompt: "y", ...quick },
      { headers: { "idempotency-key": again.idempotencyKey } },
    );
    await expect(reused).rejects.toMatchObject({ status: 409 });
    expect(calls).toBe(1);
  });

  it("is told when there will be room, and has it then", async () => {
    const small = await startServer({}, { maxQueue: 1, maxBatch: 1 });
    try {
      const waiting = new OpenAI({ baseURL: `${small.url}/v1`, apiKey: "none", maxRetries: 0 });
      const ask = () => waiting.images.generate({ prompt: "a red circle", num_inference_steps: 20 } as never);
      await ask();
      const accepted = [ask(), ask(), ask()];
      // Two are drawn at a time, one waits.
      await expect.poll(() => small.model.stats().queue.waiting, { interval: 2 }).toBe(1);
      const refused = (await ask().catch((error: unknown) => error)) as RateLimitError;
      expect(refused).toBeInstanceOf(RateLimitError);
      expect(refused).toMatchObject({ code: "queue_full", type: "rate_limit_error" });
      const wait = Number(refused.headers.get("retry-after-ms"));
      expect(wait).toBeGreaterThan(0);
      expect(Number(refused.headers.get("retry-after"))).toBe(Math.max(1, Math.ceil(wait / 1000)));
      expect(refused.headers.get("x-should-retry")).toBe("true");
      // Who waits as long as told is accepted; on a machine that has become slower meanwhile, the second time.
      const patient = new OpenAI({ baseURL: `${small.url}/v1`, apiKey: "none", maxRetries: 1 });
      await new Promise((resolve) => setTimeout(resolve, wait));
      await patient.images.generate({ prompt: "a red circle", num_inference_steps: 20 } as never);
      await Promise.all(accepted);
    } finally {
      await small.close();
    }
  });

  it("comes as an event once the stream has begun", async () => {
    const held = heldModel(server.model);
    const failing = await serverOf({
      shapes: new Proxy(held, {
        get: (target, name) =>
          name === "generate"
            ? async (options: { onAccept?: (event: unknown) => void }) => {
                options.onAccept?.({ place: 0, predictedMs: null, blocks: "E1", seeds: [1] });
                throw new Error("secret of the server");
              }
            : Reflect.get(target, name),
      }),
    });
    try {
      const other = new OpenAI({ baseURL: `${failing.url}/v1`, apiKey: "none", maxRetries: 0 });
      const stream = await other.images.generate({ prompt: "x", stream: true });
      const read = async () => {
        for await (const _ of stream);
      };
      const error = await read().catch((reason: unknown) => reason as Error);
      expect(error).toBeInstanceOf(OpenAI.APIError);
      expect(error!.message).toContain("Internal error");
      expect(error!.message).not.toContain("secret");
    } finally {
      await failing.close();
    }
  });
});
