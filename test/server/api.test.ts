// What the server takes and refuses, and what it says of itself.
import { once } from "node:events";
import { readFileSync } from "node:fs";
import http from "node:http";
import net from "node:net";
import Fastify from "fastify";
import { FlowTurbo, type ImageModel } from "flowturbo";
import { imageServer } from "flowturbo/server";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { events, heldModel, post, quick, serverOf, startServer, type TestServer } from "./support.js";

let server: TestServer;
let model: ImageModel;
const generations = () => `${server.url}/v1/images/generations`;
const edits = () => `${server.url}/v1/images/edits`;

beforeAll(async () => {
  server = await startServer({ maxSteps: 30, maxImages: 4, maxSize: { width: 128, height: 128 } });
  ({ model } = server);
}, 60_000);
afterAll(() => server.close());

const picture = (width = 64, height = 64) =>
  sharp({ create: { width, height, channels: 3, background: "#808080" } })
    .png()
    .toBuffer();

describe("fields", () => {
  it.each([
    [{ promt: "x" }, "promt", '"prompt"'],
    [{ prompt: "x", negativePrompt: "y" }, "negativePrompt", '"negative_prompt"'],
    [{ prompt: "x", num_inference_step: 3 }, "num_inference_step", '"num_inference_steps"'],
    [{ prompt: "x", guidance: 3, zzzzzzzz: 1 }, "guidance", "There are"],
    [{ prompt: "x", moderation: "low" }, "moderation", "not supported"],
    [{}, "prompt", "required"],
    [{ prompt: "" }, "prompt", "prompt"],
    [{ prompt: 5 }, "prompt", "string"],
    [{ prompt: "x", n: 0 }, "n", ">=1"],
    [{ prompt: "x", n: 5 }, "n", "<=4"],
    [{ prompt: "x", n: 1.5 }, "n", "int"],
    [{ prompt: "x", size: "64" }, "size", "auto"],
    [{ prompt: "x", size: "64x65" }, "size", "multiple"],
    [{ prompt: "x", size: "256x128" }, "size", "16384"],
    [{ prompt: "x", quality: "ultra" }, "quality", "low"],
    [{ prompt: "x", output_format: "gif" }, "output_format", "png"],
    [{ prompt: "x", output_compression: 50 }, "output_compression", "png"],
    [{ prompt: "x", output_format: "jpeg", output_compression: 101 }, "output_compression", "100"],
    [{ prompt: "x", stream: true, partial_images: 4 }, "partial_images", "3"],
    [{ prompt: "x", partial_images: 2 }, "partial_images", "stream"],
    [{ prompt: "x", preview: "fast" }, "preview", "partial_images"],
    [{ prompt: "x", num_inference_steps: 31 }, "num_inference_steps", "30"],
    [{ prompt: "x", blocks: "H31" }, "blocks", "30"],
    [{ prompt: "x", blocks: "H2Q" }, "blocks", "Q"],
    [{ prompt: "x", quality: "low", blocks: "H2" }, "blocks", "leave out one"],
    [{ prompt: "x", quality: "low", num_inference_steps: 2 }, "num_inference_steps", "leave out one"],
    [
      {
        prompt: "x",
        stages: [
          { width: 64, height: 64, blocks: "H20" },
          { width: 64, height: 64, blocks: "H11" },
        ],
      },
      "stages",
      "30",
    ],
    [{ prompt: "x", stages: [{ width: 512, height: 64, blocks: "H2" }] }, "stages", "16384"],
    [{ prompt: "x", stages: [{ width: 64, height: 64, blocks: "H2", sigm: 1 }] }, "stages.0", "sigm"],
    [{ prompt: "x", guidance_scale: -1 }, "guidance_scale", "0"],
    [{ prompt: "x", seed: -1 }, "seed", "0"],
    [{ prompt: "x", sampler: "ddim" }, "sampler", "flowturbo"],
    [{ prompt: "x", strength: 0.5 }, "strength", "no field"],
    [{ prompt: "x", deadline_ms: 0 }, "deadline_ms", "0"],
    [{ prompt: "x", background: "transparent" }, "background", "opaque"],
    [{ prompt: "x", response_format: "url" }, "response_format", "b64_json"],
  ])("refuses %j and names it", async (body, param, words) => {
    const refused = await post(generations(), body);
    expect(refused.status).toBe(400);
    expect(refused.body.error).toMatchObject({ param, type: "invalid_request_error" });
    expect(refused.body.error.message).toContain(words);
    expect(refused.headers.get("x-should-retry")).toBe("false");
    expect(refused.headers.get("x-request-id")).toMatch(/^[\w-]{36}$/);
  });

  it("takes null for what is left out, as OpenAI's types do", async () => {
    const { status, body } = await post(generations(), { ...quick, n: null, size: null, quality: null, stream: null });
    expect(status).toBe(200);
    expect(body.size).toBe("64x64");
  });

  it("draws blocks, samplers and stages", async () => {
    const blocks = await post(generations(), { prompt: "x", blocks: "H1P2", guidance_scale: 2, negative_prompt: "y" });
    expect(blocks.body).toMatchObject({ blocks: "H1P2", evaluations: { predictor: 4 } });
    const sampled = await post(generations(), { prompt: "x", sampler: "euler", num_inference_steps: 3 });
    expect(sampled.body.blocks).toBe("E3");
    const staged = await post(generations(), {
      prompt: "x",
      stages: [
        { width: 64, height: 64, blocks: "H1P1" },
        { width: 128, height: 128, blocks: "H1", sigma: 0.5 },
      ],
    });
    expect(staged.body).toMatchObject({ size: "128x128", blocks: "H1P1 H1" });
  });

  it("chooses a schedule for a time limit, and the server's own limit for those who name none", async () => {
    await post(generations(), { prompt: "x", deadline_ms: 60_000 });
    const { body } = await post(generations(), { prompt: "x", deadline_ms: 60_000 });
    expect(body.deadline).toMatchObject({ deadlineMs: 60_000, blocks: body.blocks });
    const limited = await serverOf({ shapes: model }, { deadlineMs: 50_000 });
    try {
      const own = await post(`${limited.url}/v1/images/generations`, { prompt: "x" });
      expect(own.body.deadline.deadlineMs).toBe(50_000);
      const tight = await post(`${limited.url}/v1/images/generations`, { prompt: "x", deadline_ms: 0.01 });
      expect(tight.status).toBe(422);
      expect(tight.body.error).toMatchObject({ code: "deadline_impossible", param: "deadline_ms" });
    } finally {
      await limited.close();
    }
  });
});

describe("edits", () => {
  it("take JSON with base64, a data: URL, or OpenAI's images", async () => {
    const file = (await picture()).toString("base64");
    const url = `data:image/png;base64,${file}`;
    const answers = [];
    for (const given of [{ image: file }, { image: url }, { image: [file] }, { images: [{ image_url: url }] }]) {
      const { status, body } = await post(edits(), { ...quick, strength: 0.8, ...given });
      expect(status).toBe(200);
      answers.push(body.data[0].b64_json);
    }
    expect(new Set(answers).size).toBe(1);
    // The library draws the same.
    const { images } = await model.generate({
      prompt: quick.prompt,
      image: await picture(),
      strength: 0.8,
      steps: 3,
      guidanceScale: 2,
      seed: 7,
    });
    const drawn = await sharp(Buffer.from(answers[0], "base64")).removeAlpha().raw().toBuffer();
    expect(Buffer.compare(drawn, Buffer.from(images[0]!.data))).toBe(0);
  });

  it("draw as many pixels as the model was trained for, in the picture's proportions", async () => {
    const { body } = await post(edits(), { ...quick, image: (await picture(400, 100)).toString("base64") });
    expect(body.size).toBe("128x32");
  });

  it("make a large original smaller first, and its mask with it", async () => {
    const size = { width: 2400, height: 2400 };
    const large = await sharp({ create: { ...size, channels: 3, background: "#2050a0" } })
      .jpeg()
      .toBuffer();
    // The left half is kept.
    const half = await sharp({
      create: { width: 1200, height: 2400, channels: 4, background: { r: 0, g: 0, b: 0, alpha: 1 } },
    })
      .extend({ right: 1200, background: { r: 0, g: 0, b: 0, alpha: 0 } })
      .png()
      .toBuffer();
    const { status, body } = await post(edits(), {
      ...quick,
      ...{ image: large.toString("base64"), mask: half.toString("base64") },
    });
    expect([status, body.size]).toEqual([200, "64x64"]);
    const drawn = await sharp(Buffer.from(body.data[0].b64_json, "base64")).removeAlpha().raw().toBuffer();
    const [left, right] = [drawn.subarray(0, 3), drawn.subarray(3 * 63, 3 * 64)];
    for (const [index, value] of [0x20, 0x50, 0xa0].entries()) expect(Math.abs(left[index]! - value)).toBeLessThan(4);
    expect([...right].some((value, index) => Math.abs(value - [0x20, 0x50, 0xa0][index]!) > 8)).toBe(true);
  });

  it("read base64 in lines, and millions of blanks in no time", async () => {
    const lines = (await picture()).toString("base64").replace(/.{10}/g, "$&\r\n");
    expect((await post(edits(), { ...quick, strength: 0.8, image: lines })).status).toBe(200);
    const start = performance.now();
    const { status } = await post(edits(), { ...quick, image: `A${" ".repeat(4e6)}!` });
    expect(status).toBe(400);
    // A pattern that tries again at each blank would take hours.
    expect(performance.now() - start).toBeLessThan(30_000);
  });

  it.each([
    [{}, "image", "required"],
    [{ image: "https://example.org/a.png" }, "image", "Nothing is fetched"],
    [{ images: [{ image_url: "file:///etc/passwd" }] }, "image", "Nothing is fetched"],
    [{ image: "/etc/passwd" }, "image", "PNG"],
    [{ image: "%%%" }, "image", "base64"],
    [
      { image: Buffer.from("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>").toString("base64") },
      "image",
      "PNG",
    ],
  ])("refuse %j", async (given, param, words) => {
    const { status, body } = await post(edits(), { ...quick, ...given });
    expect(status).toBe(400);
    expect(body.error.param).toBe(param);
    expect(body.error.message).toContain(words);
  });

  it("read forms: texts become numbers, booleans and lists", async () => {
    const form = new FormData();
    form.set("image[]", new Blob([await picture()]), "a.png");
    for (const [name, value] of Object.entries({
      prompt: "5",
      num_inference_steps: "3",
      seed: "7",
      strength: "0.8",
      n: "2",
    }))
      form.set(name, value);
    const response = await fetch(edits(), { method: "POST", body: form });
    const body = (await response.json()) as { seeds: number[]; data: unknown[] };
    expect(response.status).toBe(200);
    expect(body.seeds).toEqual([7, 8]);
    form.set("n", "two");
    const refused = await fetch(edits(), { method: "POST", body: form });
    expect(await refused.json()).toMatchObject({ error: { param: "n" } });
    form.delete("n");
    form.set("pictur", "1");
    expect(await (await fetch(edits(), { method: "POST", body: form })).json()).toMatchObject({
      error: { param: "pictur" },
    });
    form.delete("pictur");
    form.set("prompt", new Blob(["x"]), "prompt.txt");
    expect(await (await fetch(edits(), { method: "POST", body: form })).json()).toMatchObject({
      error: { param: "prompt" },
    });
  });

  it("refuse a form where JSON is due, and other types", async () => {
    const form = new FormData();
    form.set("prompt", "x");
    expect((await fetch(generations(), { method: "POST", body: form })).status).toBe(415);
    const response = await fetch(generations(), {
      method: "POST",
      body: "prompt=x",
      headers: { "content-type": "text/plain" },
    });
    expect(response.status).toBe(415);
    expect(await response.json()).toMatchObject({ error: { type: "invalid_request_error" } });
  });
});

describe("Idempotency-Key", () => {
  it("makes one run of requests with the same key and body, whenever they come", async () => {
    const before = model.stats().requests.completed;
    const ask = (body: unknown = { ...quick, seed: 11 }) => post(generations(), body, { "idempotency-key": "a" });
    const [first, second] = await Promise.all([ask(), ask()]);
    const third = await ask();
    expect(second.body).toEqual(first.body);
    expect(third.body).toEqual(first.body);
    expect(model.stats().requests.completed).toBe(before + 1);
    const other = await ask({ ...quick, seed: 12 });
    expect(other.status).toBe(409);
    expect(other.body.error.code).toBe("idempotency_key_reused");
    // The order of fields means nothing.
    expect((await ask(Object.fromEntries(Object.entries({ ...quick, seed: 11 }).reverse()))).status).toBe(200);
  });

  it("goes on while one of two clients is there, and starts again after both have left", async () => {
    const held = heldModel(model);
    const own = await serverOf({ shapes: held });
    try {
      const url = `${own.url}/v1/images/generations`;
      const [one, two] = [new AbortController(), new AbortController()];
      const ask = (signal?: AbortSignal) => post(url, quick, { "idempotency-key": "b" }, signal);
      const asked = [ask(one.signal), ask(two.signal)];
      for (const each of asked) each.catch(() => {});
      await expect.poll(() => held.calls).toBe(1);
      one.abort();
      await new Promise((resolve) => setTimeout(resolve, 50));
      const third = ask();
      await new Promise((resolve) => setTimeout(resolve, 50));
      expect(held.calls).toBe(1);
      two.abort();
      held.release();
      expect((await third).status).toBe(200);
      expect(held.calls).toBe(1);
    } finally {
      await own.close();
    }
  });

  it("forgets a run that all have left, and refuses what is no key", async () => {
    const held = heldModel(model);
    const own = await serverOf({ shapes: held });
    try {
      const url = `${own.url}/v1/images/generations`;
      const leaving = new AbortController();
      const asked = post(url, quick, { "idempotency-key": "c" }, leaving.signal);
      asked.catch(() => {});
      await expect.poll(() => held.calls).toBe(1);
      leaving.abort();
      await expect.poll(() => own.log.some((line) => line.includes('"status":499'))).toBe(true);
      held.release();
      expect((await post(url, quick, { "idempotency-key": "c" })).status).toBe(200);
      expect(held.calls).toBe(2);
      expect((await post(url, quick, { "idempotency-key": "x".repeat(256) })).status).toBe(400);
    } finally {
      await own.close();
    }
  });
});

describe("keys", () => {
  it("are needed for all but probes, page and document", async () => {
    const own = await serverOf({ shapes: model }, { apiKeys: ["first", "second"] });
    try {
      for (const path of ["/v1/models", "/v1/models/shapes", "/v1/jobs/x", "/metrics"]) {
        const response = await fetch(own.url + path);
        expect([path, response.status]).toEqual([path, 401]);
        expect(response.headers.get("www-authenticate")).toBe("Bearer");
        expect(await response.json()).toMatchObject({ error: { code: "invalid_api_key" } });
      }
      for (const path of ["/", "/livez", "/readyz", "/openapi.json"])
        expect((await fetch(own.url + path)).status).toBe(200);
      for (const [key, status] of [
        ["first", 200],
        ["second", 200],
        ["firs", 401],
        ["firstsecond", 401],
        ["", 401],
      ] as const)
        expect((await fetch(`${own.url}/v1/models`, { headers: { authorization: `Bearer ${key}` } })).status).toBe(
          status,
        );
      expect(own.log.join("")).not.toContain("second");
    } finally {
      await own.close();
    }
  });
});

describe("what the server says of itself", () => {
  it("has an OpenAPI document made of what it checks with", async () => {
    const document = (await (await fetch(`${server.url}/openapi.json`)).json()) as never as {
      openapi: string;
      paths: Record<string, unknown>;
      components: {
        schemas: Record<string, { properties: Record<string, { maximum?: number }>; additionalProperties: boolean }>;
      };
    };
    expect(document.openapi).toBe("3.1.0");
    expect(Object.keys(document.paths)).toContain("/v1/images/edits");
    const { properties, additionalProperties } = document.components.schemas.ImageGeneration!;
    expect(additionalProperties).toBe(false);
    expect(properties.n!.maximum).toBe(4);
    expect(properties.num_inference_steps!.maximum).toBe(30);
  });

  it("has metrics of queue, refusals, phases, launches, event loop and memory", async () => {
    await post(generations(), quick);
    const text = await (await fetch(`${server.url}/metrics`)).text();
    const value = (line: string) =>
      Number(text.match(new RegExp(`^${line.replace(/[{}"+]/g, "\\$&")} (\\S+)$`, "m"))?.[1]);
    const { requests, launches } = model.stats();
    expect(value('flowturbo_requests_total{model="shapes",outcome="completed"}')).toBe(requests.completed);
    expect(value('flowturbo_queue_waiting{model="shapes"}')).toBe(0);
    expect(value('flowturbo_requests_refused_total{model="shapes",reason="queue_full"}')).toBe(0);
    expect(value('flowturbo_launch_rows_bucket{model="shapes",le="+Inf"}')).toBe(launches.count);
    expect(value('flowturbo_launch_rows_sum{model="shapes"}')).toBe(launches.rows);
    expect(value('flowturbo_phase_seconds_count{model="shapes",phase="decode"}')).toBeGreaterThan(0);
    expect(value('flowturbo_step_seconds_count{model="shapes"}')).toBeGreaterThan(0);
    expect(value("flowturbo_runs_open")).toBe(0);
    expect(text).toContain("# TYPE flowturbo_launch_seconds histogram");
    expect(text).toContain("nodejs_eventloop_lag_seconds");
    expect(text).toContain("process_resident_memory_bytes");
    // Prometheus reads a name's lines as one family: each has one TYPE.
    const types = [...text.matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name);
    expect(new Set(types).size).toBe(types.length);
  });

  it("is not ready before its models are loaded and have drawn, and draws with none that is not", async () => {
    let finish = (_: ImageModel) => {};
    const loading = new Promise<ImageModel>((resolve) => {
      finish = resolve;
    });
    const held = heldModel(model);
    let isReady = false;
    const own = await serverOf(
      { late: loading },
      {
        warm: [{ width: 64, height: 64 }],
        onReady: () => {
          isReady = true;
        },
      },
    );
    try {
      const ready = await fetch(`${own.url}/readyz`);
      expect([ready.status, await ready.text()]).toEqual([503, "The model late is loading.\n"]);
      expect((await fetch(`${own.url}/livez`)).status).toBe(200);
      const refused = await post(`${own.url}/v1/images/generations`, quick);
      expect([refused.status, refused.body.error.code, refused.headers.get("retry-after")]).toEqual([
        503,
        "model_loading",
        "1",
      ]);
      finish(held);
      await expect.poll(() => held.calls).toBe(1);
      expect(await (await fetch(`${own.url}/readyz`)).text()).toBe("The model late is warming up.\n");
      held.release();
      await expect.poll(async () => (await fetch(`${own.url}/readyz`)).status).toBe(200);
      expect(isReady).toBe(true);
    } finally {
      await own.close();
    }
  });

  it("says that a model could not be loaded, and nothing of the server", async () => {
    let reason: Error | null = null;
    const own = await serverOf(
      { broken: FlowTurbo.load("/nowhere/secret"), shapes: model },
      {
        onReady: (error) => {
          reason = error;
        },
      },
    );
    try {
      await expect.poll(() => reason).toBeInstanceOf(Error);
      const text = await (await fetch(`${own.url}/readyz`)).text();
      expect(text).toContain("broken");
      expect(text).not.toContain("secret");
      expect((await post(`${own.url}/v1/images/generations`, { ...quick, model: "broken" })).status).toBe(503);
      expect((await post(`${own.url}/v1/images/generations`, { ...quick, model: "shapes" })).status).toBe(200);
    } finally {
      await own.close();
    }
  });

  it("logs a line for each answer, with ids and without prompts, keys or pictures", async () => {
    const own = await serverOf({ shapes: model }, { apiKeys: ["secret-key"] });
    try {
      const trace = "0af7651916cd43dd8448eb211c80319c";
      const headers = {
        authorization: "Bearer secret-key",
        "x-request-id": "from-the-proxy",
        traceparent: `00-${trace}-b7ad6b7169203331-01`,
      };
      const prompt = `a secret prompt ${"word ".repeat(400)}`;
      const { headers: answered, body } = await post(
        `${own.url}/v1/images/generations`,
        { ...quick, prompt, user: "u-17" },
        headers,
      );
      expect(answered.get("x-request-id")).toBe("from-the-proxy");
      // The end of the prompt is ignored: its client is told, the log is not.
      expect(body.warnings.join()).toContain("a secret prompt");
      const find = () =>
        own.log
          .map((line) => JSON.parse(line))
          .find(({ route, status }) => route === "/v1/images/generations" && status === 200);
      await expect.poll(find).toMatchObject({
        method: "POST",
        reqId: "from-the-proxy",
        trace_id: trace,
        model: "shapes",
        pictures: 1,
        user: "u-17",
        key: 1,
      });
      const log = own.log.join("");
      expect(log).not.toContain("secret");
      expect(log).not.toContain(body.data[0].b64_json.slice(0, 40));
    } finally {
      await own.close();
    }
  });

  it("refuses other methods and addresses in the same envelope", async () => {
    const put = await fetch(generations(), { method: "PUT" });
    expect([put.status, put.headers.get("allow")]).toEqual([405, "POST"]);
    const nowhere = await fetch(`${server.url}/v1/nowhere`);
    expect([nowhere.status, ((await nowhere.json()) as { error: { code: string } }).error.code]).toEqual([
      404,
      "not_found",
    ]);
    const spoiled = await fetch(generations(), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: "{",
    });
    expect([spoiled.status, ((await spoiled.json()) as { error: { message: string } }).error.message]).toEqual([
      400,
      "The body is not valid JSON.",
    ]);
  });
});

describe("streams", () => {
  it("send previews of one pixel a latent as large as the picture, one picture after the other", async () => {
    const response = await fetch(generations(), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        ...quick,
        n: 2,
        num_inference_steps: 6,
        stream: true,
        partial_images: 2,
        preview: "fast",
      }),
    });
    expect(response.headers.get("content-type")).toContain("text/event-stream");
    const partials = [];
    for await (const { event, data } of events(response.body!))
      if (event.endsWith("partial_image")) partials.push(data);
    expect(partials.map(({ partial_image_index, image_index }) => [partial_image_index, image_index])).toEqual([
      [0, 0],
      [0, 1],
      [1, 0],
      [1, 1],
    ]);
    for (const { b64_json } of partials)
      expect(await sharp(Buffer.from(b64_json, "base64")).metadata()).toMatchObject({ width: 64, height: 64 });
  });
});

describe("browsers", () => {
  it("may call from the origins that were named", async () => {
    const own = await serverOf({ shapes: model }, { cors: ["https://good.example"], apiKeys: ["k"] });
    try {
      const ask = (origin: string) =>
        fetch(`${own.url}/v1/images/generations`, {
          method: "OPTIONS",
          headers: {
            origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
          },
        });
      const good = await ask("https://good.example");
      expect(good.status).toBeLessThan(300);
      expect(good.headers.get("access-control-allow-origin")).toBe("https://good.example");
      expect((await ask("https://bad.example")).headers.get("access-control-allow-origin")).not.toBe(
        "https://bad.example",
      );
      const refused = await fetch(`${own.url}/v1/models`, { headers: { origin: "https://good.example" } });
      expect([refused.status, refused.headers.get("access-control-allow-origin")]).toEqual([
        401,
        "https://good.example",
      ]);
    } finally {
      await own.close();
    }
  });

  it("get a page with a policy that allows nothing but its own files", async () => {
    const page = await fetch(`${server.url}/`);
    expect(page.headers.get("content-type")).toContain("text/html");
    expect(page.headers.get("content-security-policy")).toContain("default-src 'none'; script-src 'self'");
    const html = await page.text();
    expect(html).not.toMatch(/<script(?![^>]*src)|style="|\son\w+="/);
    for (const [, file] of html.matchAll(/(?:src|href)="([^"#:]+)"/g))
      expect((await fetch(`${server.url}/${file}`)).status).toBe(200);
    const again = await fetch(`${server.url}/`, { headers: { "if-none-match": page.headers.get("etag")! } });
    expect(again.status).toBe(304);
  });
});

describe("the plugin", () => {
  it("is part of an app of somebody else's, under a prefix", async () => {
    const app = Fastify();
    app.get("/own", async () => "own");
    await app.register(imageServer, { prefix: "/pictures", models: { shapes: model }, warm: [], page: false });
    try {
      expect((await app.inject("/own")).body).toBe("own");
      expect((await app.inject("/pictures/v1/models")).json().data).toHaveLength(1);
      const drawn = await app.inject({ method: "POST", url: "/pictures/v1/images/generations", payload: quick });
      expect(drawn.statusCode).toBe(200);
      expect((await app.inject("/pictures/")).statusCode).toBe(404);
      const job = await app.inject({ method: "POST", url: "/pictures/v1/jobs", payload: quick });
      expect(job.headers.location).toBe(`/pictures/v1/jobs/${job.json().id}`);
    } finally {
      await app.close();
    }
  });

  it("answers errors of hooks around it as they are worded, in its own envelope", async () => {
    const app = Fastify();
    app.addHook("onRequest", async (request) => {
      if (request.headers.cookie === undefined)
        throw Object.assign(new Error("Log in first."), { statusCode: 403, code: "NO_COOKIE" });
    });
    await app.register(imageServer, { models: { shapes: model }, warm: [], page: false });
    try {
      const refused = await app.inject({ method: "POST", url: "/v1/images/generations", payload: quick });
      expect([refused.statusCode, refused.json().error.message]).toEqual([403, "Log in first."]);
      const headers = { cookie: "a=b" };
      const drawn = await app.inject({ method: "POST", url: "/v1/images/generations", payload: quick, headers });
      expect(drawn.statusCode).toBe(200);
    } finally {
      await app.close();
    }
  });

  it.each([
    [{ models: {} }, "models"],
    [{ maxSteps: 0 }, "maxSteps"],
    [{ maxSize: { width: 0, height: 1 } }, "maxSize"],
    [{ webhooks: { hosts: ["a"], secret: "short" } }, "webhooks"],
    [{ drain: 5 }, "drain"],
  ])("refuses %j", async (options, option) => {
    const app = Fastify();
    await expect(async () =>
      app.register(imageServer, { models: { shapes: model }, ...options } as never),
    ).rejects.toMatchObject({ option });
    await app.close();
  });
});

it("answers what was sent over one connection without waiting", async () => {
  const { port } = new URL(server.url);
  const socket = net.connect(Number(port), "127.0.0.1");
  const request = "GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n";
  socket.write(request.repeat(3));
  let text = "";
  for await (const [chunk] of (async function* () {
    while (text.split("HTTP/1.1 200").length < 4) yield await once(socket, "data");
  })())
    text += chunk;
  socket.destroy();
  expect(text.split("HTTP/1.1 200")).toHaveLength(4);
});

it("knows its own version", async () => {
  const { version } = JSON.parse(readFileSync(new URL("../../package.json", import.meta.url), "utf8"));
  const response = await new Promise<http.IncomingMessage>((resolve) =>
    http.get(`${server.url}/openapi.json`, resolve),
  );
  const chunks = await response.toArray();
  expect(JSON.parse(Buffer.concat(chunks).toString()).info.version).toBe(version);
});
