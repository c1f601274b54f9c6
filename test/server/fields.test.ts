// Fields that OpenAI does not have, against the options of `generate` that they become: the same pictures, in JSON, forms and jobs; and the
// refusals, which name the field.
import type { GenerateOptions } from "flowturbo";
import OpenAI, { toFile } from "openai";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { withFieldNames } from "../../lib/server/fields.js";
import { events, post, quick, startServer, type TestServer } from "./support.js";

let server: TestServer;
const at = (path: string) => `${server.url}/v1/${path}`;
const generations = () => at("images/generations");
const edits = () => at("images/edits");

beforeAll(async () => {
  server = await startServer({ maxSteps: 30, maxImages: 4, maxSize: { width: 128, height: 128 } });
}, 60_000);
afterAll(() => server.close());

const { seed: _, ...unseeded } = quick;
const direct = (options: Partial<GenerateOptions>) =>
  server.model.generate({ prompt: quick.prompt, steps: 3, guidanceScale: 2, seed: 7, ...options });
const rgb = async (b64: string) => {
  const { data, info } = await sharp(Buffer.from(b64, "base64"))
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true });
  return { width: info.width, height: info.height, data };
};
type Answered = { data: { b64_json: string }[]; seeds: unknown[]; size: string };
/** That an answer has the pictures that `generate` draws. */
async function expectDrawn(answer: Answered, options: Partial<GenerateOptions>): Promise<void> {
  const { images, width, height } = await direct(options);
  expect(answer.size).toBe(`${width}x${height}`);
  expect(answer.data).toHaveLength(images.length);
  for (const [index, { b64_json }] of answer.data.entries()) {
    const { data, ...size } = await rgb(b64_json);
    expect(size).toEqual({ width, height });
    expect(Buffer.compare(data, Buffer.from(images[index]!.data))).toBe(0);
  }
}
async function form(fields: Record<string, string | readonly string[] | Blob>, url = edits()) {
  const body = new FormData();
  for (const [name, values] of Object.entries(fields)) for (const value of [values].flat()) body.append(name, value as string); // biome-ignore format: one line
  const response = await fetch(url, { method: "POST", body });
  return { status: response.status, body: (await response.json()) as Answered & { error: { param: string } } };
}

/** A wide picture, and a mask in OpenAI's meaning and in the library's: a square of it is painted. */
async function maskedPicture(width = 160, height = 96) {
  const hole = { left: 100, top: 20, size: 24 };
  const { size } = hole;
  const image = await sharp({ create: { width, height, channels: 3, background: "#2060a0" } })
    .composite([
      { input: { create: { width: 40, height: 40, channels: 3, background: "#e0c040" } }, left: 90, top: 12 },
    ])
    .png()
    .toBuffer();
  const cut = { create: { width: size, height: size, channels: 4 as const, background: "white" } };
  const transparent = await sharp({ create: { width, height, channels: 4, background: "white" } })
    .composite([{ input: cut, left: hole.left, top: hole.top, blend: "dest-out" }])
    .png()
    .toBuffer();
  const white = await sharp({ create: { width, height, channels: 3, background: "black" } })
    .composite([{ input: cut, left: hole.left, top: hole.top }])
    .png()
    .toBuffer();
  return { image, transparent, white, hole };
}
const blob = (bytes: Uint8Array) => new Blob([bytes as never], { type: "image/png" });

describe("seeds", () => {
  const seeds = [12, "6687881544318117707", 3];

  it("are one for each picture, of 64 bits too", async () => {
    const { status, body } = await post(generations(), { ...unseeded, n: 3, seeds });
    expect(status).toBe(200);
    expect(body.seeds).toEqual(seeds);
    await expectDrawn(body, { seed: undefined, seeds, count: 3 });
    // Each is the picture that its seed draws alone.
    const alone = await post(generations(), { ...unseeded, seed: seeds[1] });
    expect((await rgb(alone.body.data[0].b64_json)).data).toEqual((await rgb(body.data[1].b64_json)).data);
  });

  it("are read from forms, as JSON and as seeds[], which OpenAI's client sends", async () => {
    const image = await sharp({ create: { width: 64, height: 64, channels: 3, background: "#808080" } })
      .png()
      .toBuffer();
    const plain = { ...unseeded, strength: 0.8 };
    const texts = Object.fromEntries(Object.entries(plain).map(([name, value]) => [name, String(value)]));
    const options = { image, strength: 0.8, seed: undefined, count: 2 };
    const answers = [
      await form({ ...texts, n: "2", seeds: '[7, "18446744073709551615"]', image: blob(image) }),
      await form({ ...texts, n: "2", "seeds[]": ["7", "18446744073709551615"], image: blob(image) }),
    ];
    for (const { status, body } of answers) {
      expect(status).toBe(200);
      await expectDrawn(body, { ...options, seeds: [7, 2n ** 64n - 1n] });
    }
    const one = await form({ ...texts, "seeds[]": "9", image: blob(image) });
    expect(one.body.seeds).toEqual([9]);
    const openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
    const sent = await openai.images.edit({
      ...{ ...plain, n: 2, seeds: [7, 8] },
      image: await toFile(image, "a.png", { type: "image/png" }),
    } as never);
    await expectDrawn(sent as never, { ...options, seeds: [7, 8] });
  });

  it.each([
    [{ "seeds[]": ["1", "x"] }, "seeds.1"],
    [{ "seeds[]": ["1", "2", "3", "4", "5"] }, "seeds"],
    [{ seeds: ["1", "2"] }, "seeds"],
    [{ seeds: "1,2" }, "seeds"],
    [{ seeds: "[1]", "seeds[]": "2" }, "seeds"],
    [{ "prompt[]": ["a", "b"] }, "prompt"],
    [{ "n[]": ["1", "2"] }, "n"],
  ] as [Record<string, string[]>, string][])("of forms are refused by name: %j", async (fields, param) => {
    const { image } = await maskedPicture();
    const given = "prompt[]" in fields ? fields : { prompt: "x", ...fields };
    const { status, body } = await form({ ...given, image: blob(image) });
    expect([status, body.error.param]).toEqual([400, param]);
  });

  it("are those of a job's events and result, and of one run with an Idempotency-Key", async () => {
    const before = server.model.stats().requests.completed;
    const ask = (given: unknown[], url = at("jobs")) =>
      post(url, { ...unseeded, n: given.length, seeds: given }, { "idempotency-key": "seeds" });
    const [first, second] = await Promise.all([ask(seeds), ask(seeds)]);
    expect([first.status, second.body.id]).toEqual([202, first.body.id]);
    const found: unknown[] = [];
    const { body } = await fetch(`${at("jobs")}/${first.body.id}/events`);
    for await (const { event, data } of events(body!)) {
      if (event === "job.queued") found.push(data.seeds);
      if (event === "job.completed") found.push(data.job.result.seeds);
    }
    expect(found).toEqual([seeds, seeds]);
    expect(server.model.stats().requests.completed).toBe(before + 1);
    // Their order is part of the request.
    expect((await ask([...seeds].reverse())).body.error.code).toBe("idempotency_key_reused");
    const drawn = await ask(seeds, generations());
    expect((await ask([...seeds].reverse(), generations())).status).toBe(409);
    expect((await ask(seeds, generations())).body).toEqual(drawn.body);
  });
});

describe("padding_mask_crop", () => {
  it("draws what surrounds the mask, and keeps the picture's size", async () => {
    const { image, transparent, white, hole } = await maskedPicture();
    const fields = { ...quick, n: 2, padding_mask_crop: 8 };
    const options = { image, mask: white, strength: 1, count: 2, paddingMaskCrop: 8 };
    const json = { ...fields, image: image.toString("base64"), mask: transparent.toString("base64") };
    const { status, body } = await post(edits(), json);
    expect(status).toBe(200);
    expect(body.size).toBe("160x96");
    await expectDrawn(body, options);
    // Only the hole differs from the original.
    const [drawn, original] = [
      (await rgb(body.data[0].b64_json)).data,
      await sharp(image).removeAlpha().raw().toBuffer(),
    ];
    const changed = new Set<boolean>();
    for (let pixel = 0; pixel < 160 * 96; pixel++) {
      const [x, y] = [(pixel % 160) - hole.left, Math.floor(pixel / 160) - hole.top];
      const isInside = x >= 0 && y >= 0 && x < hole.size && y < hole.size;
      if ([0, 1, 2].some((c) => drawn[3 * pixel + c] !== original[3 * pixel + c])) changed.add(isInside);
    }
    expect([...changed]).toEqual([true]);
    const texts = Object.fromEntries(Object.entries(fields).map(([name, value]) => [name, String(value)]));
    const sent = await form({ ...texts, image: blob(image), mask: blob(transparent) });
    expect(sent.body.data).toEqual(body.data);
    await expectDrawn((await post(edits(), { ...json, size: "96x64", keep_original: false })).body, {
      ...options,
      ...{ width: 96, height: 64, keepOriginal: false },
    });
    const streamed = await fetch(edits(), {
      ...{ method: "POST", headers: { "content-type": "application/json" } },
      body: JSON.stringify({ ...json, n: 1, stream: true, partial_images: 1 }),
    });
    const sizes: string[] = [];
    for await (const { data } of events(streamed.body!)) sizes.push(data.size);
    // A partial picture is what is drawn.
    expect(sizes).toEqual(["64x64", "160x96"]);
    const job = await post(at("jobs"), json);
    const view = async () =>
      (await fetch(`${at("jobs")}/${job.body.id}`)).json() as Promise<{ status: string; result: Answered }>;
    await expect.poll(async () => (await view()).status).toBe("completed");
    expect((await view()).result.data).toEqual(body.data);
  });

  it("takes a picture as large as those that the server answers together, and no larger", async () => {
    // Four pictures of 128 × 128.
    const { image, transparent } = await maskedPicture(256, 256);
    const json = {
      ...{ ...quick, padding_mask_crop: 4 },
      ...{ image: image.toString("base64"), mask: transparent.toString("base64") },
    };
    expect((await post(edits(), json)).body.size).toBe("256x256");
    const { status, body } = await post(edits(), { ...json, n: 2 });
    expect([status, body.error.param]).toEqual([400, "image"]);
    expect(body.error.message).toMatch(/at most 32768 pixels .* padding_mask_crop.* 256x256.* smaller n/);
  });

  it.each([
    [{ mask: null }, "padding_mask_crop", "give image and mask"],
    [{ padding_mask_crop: -1 }, "padding_mask_crop", "0"],
    [{ padding_mask_crop: 2.5 }, "padding_mask_crop", "int"],
    [{ mask: null, padding_mask_crop: null, keep_original: true }, "keep_original", "give image and mask"],
  ] as [Record<string, unknown>, string, string][])("is refused by name: %j", async (given, param, words) => {
    const { image, transparent } = await maskedPicture();
    const pictures = { image: image.toString("base64"), mask: transparent.toString("base64") };
    const { status, body } = await post(edits(), { ...quick, ...pictures, padding_mask_crop: 8, ...given });
    expect([status, body.error.param]).toEqual([400, param]);
    expect(body.error.message).toContain(words);
    if (given.mask !== null) return;
    const job = await post(at("jobs"), { ...quick, padding_mask_crop: 8, ...given });
    expect([job.status, job.body.error.param]).toEqual([400, param]);
  });
});

describe("what says how steps are made", () => {
  it.each<[Record<string, unknown>, Partial<GenerateOptions>]>([
    [{ guidance_scale: [1, 2, 3] }, { guidanceScale: [1, 2, 3] }],
    [
      { guidance_start: 0.4, guidance_stop: 0.9 },
      { guidanceStart: 0.4, guidanceStop: 0.9 },
    ],
    [{ guidance_mode: "cfg_zero" }, { guidanceMode: "cfg_zero" }],
    [{ grid: "karras" }, { grid: "karras" }],
    [
      { skip_layers: { layers: [1, 3], scale: 1.5, start: 0.1, stop: 0.9 } },
      { skipLayers: { layers: [1, 3], scale: 1.5, start: 0.1, stop: 0.9 } },
    ],
    [
      { sigmas: [1, 0.8, 0.3], num_inference_steps: null, shift: 2 },
      { sigmas: [1, 0.8, 0.3], steps: undefined, shift: 2 },
    ],
    [
      { shift: 5, sampler: "euler" },
      { shift: 5, sampler: "euler" },
    ],
  ])("draws what generate does: %j", async (fields, options) => {
    const { status, body } = await post(generations(), { ...quick, ...fields });
    expect(body.error).toBeUndefined();
    expect(status).toBe(200);
    await expectDrawn(body, options);
    // Without it another picture is drawn: it has an effect.
    const without = await post(generations(), quick);
    expect(without.body.data).not.toEqual(body.data);
  });

  it("is read from forms", async () => {
    const { image } = await maskedPicture(64, 64);
    const texts = { prompt: "a red circle", seed: "7", guidance_start: "0.4", "sigmas[]": ["1", "0.8", ".3"] };
    const { body } = await form({ ...texts, guidance_scale: "[2, 2, 1]", strength: "1", image: blob(image) });
    const options = { sigmas: [1, 0.8, 0.3], guidanceScale: [2, 2, 1], guidanceStart: 0.4 };
    await expectDrawn(body, { ...options, steps: undefined, image, strength: 1 });
  });
});

describe("refusals", () => {
  it.each([
    [{ seed: 1, seeds: [1] }, "seeds", "leave out one"],
    [{ seeds: [1, 2] }, "seeds", "n (1), but received 2"],
    [{ n: 3, seeds: [1, 2] }, "seeds", "Give 3, or change n"],
    [{ seeds: [] }, "seeds", ">=1"],
    [{ n: 4, seeds: [1, 2, 3, 4, 5] }, "seeds", "<=4"],
    [{ seeds: [-1] }, "seeds.0", "0 to 18446744073709551615"],
    [{ n: 2, seeds: [1, 2 ** 53] }, "seeds.1", "as text of digits"],
    [{ seeds: ["18446744073709551616"] }, "seeds.0", "18446744073709551615"],
    [{ seeds: 7 }, "seeds", "array"],
    [{ seeds: Array(2000).fill("x") }, "seeds", "<=4"],
    [{ padding_mask_crop: 8 }, "padding_mask_crop", "no field"],
    [{ paddingMaskCrop: 8 }, "paddingMaskCrop", "There are"],
    [{ guidance_scale: [1, 2] }, "guidance_scale", "one guidance scale, or 3"],
    [{ guidance_scale: [] }, "guidance_scale", ">=1"],
    [{ guidance_start: 0.9, guidance_stop: 0.1 }, "guidance_start", "guidance_start (0.9) below guidance_stop (0.1)"],
    [{ guidance_start: 2 }, "guidance_start", "1"],
    [{ guidance_mode: "pag" }, "guidance_mode", "cfg_zero"],
    [{ grid: "exact" }, "grid", "karras"],
    [{ grid: "karras", sigmas: [1, 0.8, 0.3] }, "sigmas", "leave out one"],
    [{ sigmas: [0.5, 1] }, "sigmas", "falling"],
    [{ sigmas: [1, 0.5] }, "sigmas", "Expected 3 sigmas"],
    [{ sigmas: Array.from({ length: 31 }, (_, index) => 1 - index / 40) }, "sigmas", "<=30"],
    [{ shift: 0 }, "shift", "0.01"],
    [{ mu: 1 }, "mu", "use_dynamic_shifting"],
    [{ skip_layers: [1] }, "skip_layers", "expected object"],
    [{ skip_layers: { layers: [] } }, "skip_layers.layers", ">=1"],
    [{ skip_layers: { scale: 2 } }, "skip_layers.layers", "required"],
    [{ skip_layers: { layers: [1], stop: 2 } }, "skip_layers.stop", "<=1"],
    [{ skip_layers: { layers: [1], end: 1 } }, "skip_layers", "there is no end"],
    [{ skip_layers: { layers: [9], stop: 1 } }, "skip_layers", "from 0 to 4 for skip_layers.layers"],
    [
      { skip_layers: { layers: [1], stop: 1 }, guidance_scale: 1 },
      "skip_layers",
      "guidance_scale above 1, or leave out skip_layers",
    ],
    [{ skipLayers: { layers: [1] } }, "skipLayers", "skip_layers"],
  ])("name the field: %j", async (given, param, words) => {
    const { status, body } = await post(generations(), { ...unseeded, ...given });
    expect([status, body.error.param]).toEqual([400, param]);
    expect(body.error.message).toContain(words);
    expect(body.error.code).toMatch(/^(invalid_value|unknown_parameter|missing_required_parameter)$/);
  });

  it("say fields where the library says options, and nothing else", () => {
    expect(withFieldNames("Expected guidanceStart below guidanceStop; prompt2, negativePrompt3.")).toBe(
      "Expected guidance_start below guidance_stop; prompt_2, negative_prompt_3.",
    );
    expect(withFieldNames("Expected skipLayers.layers, or a name for controls[2].folder; the folder is none.")).toBe(
      "Expected skip_layers.layers, or a name for controls[2].name; the folder is none.",
    );
    const other = "H1P2 toString hasOwnProperty constructor 64x64 steps count ImageModel myClipSkip cfg_zero";
    expect(withFieldNames(other)).toBe(other);
  });
});

it("the document has both, with their limits", async () => {
  const document = (await (await fetch(`${server.url}/openapi.json`)).json()) as {
    // biome-ignore lint/suspicious/noExplicitAny: a document of whatever form
    components: { schemas: Record<string, any> };
    // biome-ignore lint/suspicious/noExplicitAny: a document of whatever form
    paths: Record<string, any>;
  };
  const { ImageGeneration, ImageEdit, NewJob } = document.components.schemas;
  for (const { properties } of [ImageGeneration, ImageEdit, NewJob]) {
    expect(properties.seeds).toMatchObject({ type: "array", minItems: 1, maxItems: 4 });
    expect(properties.seeds.items.anyOf).toEqual(properties.seed.anyOf);
  }
  for (const { properties } of [ImageEdit, NewJob])
    expect(properties.padding_mask_crop).toMatchObject({ type: "integer", minimum: 0 });
  expect(ImageGeneration.properties).not.toHaveProperty("padding_mask_crop");
  const formed = document.paths["/v1/images/edits"].post.requestBody.content["multipart/form-data"].schema.properties;
  expect(Object.keys(formed)).toEqual(expect.arrayContaining(["seeds", "padding_mask_crop"]));
});
