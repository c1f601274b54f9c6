// LoRAs, ControlNets and their pictures in requests: what the model is asked for, in JSON, forms and jobs, and the refusals, which name the field.
// The model records what it is asked.
import OpenAI, { toFile } from "openai";
import sharp from "sharp";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import type { GenerateOptions, ImageModel } from "../../lib/index.js";
import { stubModel } from "./stub.js";
import { post, serverOf } from "./support.js";

const names = { loras: ["ink", "few-steps"], controlNets: ["canny", "inpainting"] };
let asked: GenerateOptions[] = [];
/** A model that takes every call and remembers it. */
function recording(adapters?: ImageModel["adapters"]): ImageModel {
  const stub = stubModel({ side: 8 });
  const generate: ImageModel["generate"] = (options) => {
    asked.push(options);
    return stub.generate(options);
  };
  return { ...stub, generate, ...(adapters && { adapters }) };
}

let server: Awaited<ReturnType<typeof serverOf>>;
let edges: Buffer;
let photo: Buffer;
let masks: Record<"transparent" | "white" | "opaque", Buffer>;
const at = (path: string) => `${server.url}/v1/${path}`;

beforeAll(async () => {
  const models = { named: recording(names), bare: recording({ loras: [], controlNets: [] }), unknown: recording() };
  server = await serverOf(models, { logger: false, maxControls: 2, maxInputPixels: 10_000 });
  const plain = (width: number, height: number, background: string) =>
    sharp({ create: { width, height, channels: 3, background } })
      .png()
      .toBuffer();
  edges = await plain(48, 32, "#ffffff");
  photo = await plain(64, 64, "#2060a0");
  // The left half is painted.
  const half = { create: { width: 24, height: 32, channels: 4 as const, background: "white" } };
  const place = { left: 0, top: 0 };
  const create = (background: string) => sharp({ create: { width: 48, height: 32, channels: 4, background } });
  masks = {
    transparent: await create("#505050")
      .composite([{ input: half, ...place, blend: "dest-out" }])
      .png()
      .toBuffer(),
    white: await create("black")
      .removeAlpha()
      .composite([{ input: half, ...place }])
      .png()
      .toBuffer(),
    opaque: await create("black")
      .composite([{ input: half, ...place }])
      .png()
      .toBuffer(),
  };
});
afterAll(() => server.close());
beforeEach(() => {
  asked = [];
});

const base64 = (bytes: Uint8Array) => Buffer.from(bytes).toString("base64");
const blob = (bytes: Uint8Array) => new Blob([bytes as never], { type: "image/png" });
const quick = { prompt: "a red circle", num_inference_steps: 3 };
async function form(parts: readonly (readonly [string, string | Blob])[]) {
  const body = new FormData();
  for (const [name, value] of parts) body.append(name, value as string);
  const response = await fetch(at("images/edits"), { method: "POST", body });
  // biome-ignore lint/suspicious/noExplicitAny: whatever the server says
  return { status: response.status, body: (await response.json()) as any };
}
/** Grey values of a mask, as the library reads one without transparency. */
const grey = async (mask: unknown) =>
  (
    await sharp(mask as Buffer)
      .removeAlpha()
      .greyscale()
      .raw()
      .toBuffer()
  ).toString("hex");

const loras = [{ name: "ink", scale: 0.7 }, { name: "few-steps" }];
const interval = { scale: 0.8, start: 0.1, stop: 0.7 };

describe("loras and skip_layers", () => {
  const skipLayers = { layers: [7, 8, 9], scale: 2.5, start: 0.01, stop: 0.3 };

  it.each(["images/generations", "jobs"])("reach the model from JSON: %s", async (path) => {
    const { status } = await post(at(path), { ...quick, loras, skip_layers: skipLayers });
    expect(status).toBe(path === "jobs" ? 202 : 200);
    expect(asked).toHaveLength(1);
    expect(asked[0]).toMatchObject({ loras, skipLayers, allowPaths: false });
    expect(asked[0]).not.toHaveProperty("controls");
  });

  it("are read from forms: as JSON, by places, and as OpenAI's client writes them", async () => {
    const image = ["image", blob(photo)] as const;
    const ways: (readonly [string, string])[][] = [
      [
        ["loras", JSON.stringify(loras)],
        ["skip_layers", JSON.stringify(skipLayers)],
      ],
      [
        ["loras[1][name]", "few-steps"],
        ["loras[0][scale]", "0.7"],
        ["loras[0][name]", "ink"],
        ["skip_layers[layers]", "[7,8,9]"],
        ["skip_layers[scale]", "2.5"],
        ["skip_layers[start]", ".01"],
        ["skip_layers[stop]", "0.3"],
      ],
    ];
    for (const way of ways)
      expect((await form([["prompt", "x"], image, ...way])).status, JSON.stringify(way)).toBe(200);
    const openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
    const picture = await toFile(photo, "a.png", { type: "image/png" });
    await openai.images.edit({ prompt: "x", image: picture, loras, skip_layers: skipLayers } as never);
    expect(asked).toHaveLength(3);
    for (const options of asked) expect(options).toMatchObject({ loras, skipLayers });
  });
});

describe("controls", () => {
  it.each(["images/generations", "jobs"])("reach the model with their pictures from JSON: %s", async (path) => {
    const controls = [
      {
        name: "canny",
        image: `data:image/png;base64,${base64(edges)}`,
        ...interval,
        preprocess: "canny",
        pixel_range: "stability_canny",
      },
      { name: "inpainting", image: base64(photo), mask: base64(masks.white) },
    ];
    const { status, body } = await post(at(path), { ...quick, controls });
    expect(body.error ?? null).toBeNull();
    expect(status).toBe(path === "jobs" ? 202 : 200);
    expect(asked[0]!.controls).toEqual([
      { folder: "canny", image: edges, ...interval, preprocess: "canny", pixelRange: "stability_canny" },
      { folder: "inpainting", image: photo, mask: masks.white },
    ]);
    expect(asked[0]!.allowPaths).toBe(false);
  });

  it("have masks whose transparent parts are painted, or the white ones where nothing is transparent", async () => {
    const expected = await grey(masks.white);
    for (const [kind, mask] of Object.entries(masks)) {
      const controls = [{ name: "inpainting", image: base64(edges), mask: base64(mask) }];
      expect((await post(at("images/generations"), { ...quick, controls })).status).toBe(200);
      expect(await grey(asked.at(-1)!.controls![0]!.mask), kind).toBe(expected);
    }
  });

  it("are read from forms with files: by places, as OpenAI's client writes them, and beside an edit's own", async () => {
    const expected = [
      { folder: "canny", image: edges, ...interval },
      { folder: "inpainting", image: photo, mask: masks.white, scale: 0.5 },
    ];
    const { status, body } = await form([
      ["controls[1][mask]", blob(masks.white)],
      ["prompt", "x"],
      ["controls[0][name]", "canny"],
      ["controls[1][name]", "inpainting"],
      ["controls[0][image]", blob(edges)],
      ["controls[0][scale]", "0.8"],
      ["controls[0][start]", "0.1"],
      ["controls[0][stop]", "0.7"],
      ["controls[1][image]", blob(photo)],
      ["controls[1][scale]", ".5"],
      ["image", blob(photo)],
    ]);
    expect([status, body.error ?? null]).toEqual([200, null]);
    const openai = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: "none", maxRetries: 0 });
    const file = (bytes: Buffer) => toFile(bytes, "a.png", { type: "image/png" });
    await openai.images.edit({
      prompt: "x",
      image: await file(photo),
      controls: [
        { name: "canny", image: await file(edges), ...interval },
        { name: "inpainting", image: await file(photo), mask: await file(masks.white), scale: 0.5 },
      ],
    } as never);
    expect(asked).toHaveLength(2);
    for (const { controls, image } of asked) {
      expect(controls).toEqual(expected);
      expect(image).toEqual(photo);
    }
  });

  it("make a body of a request that edits nothing larger than a megabyte", async () => {
    const noise = Buffer.from(Array.from({ length: 3 * 90 * 90 }, (_, index) => (index * 7919) % 256));
    const raw = await sharp(noise, { raw: { width: 90, height: 90, channels: 3 } })
      .tiff({ compression: "none" })
      .toBuffer();
    // What follows the picture is none of it.
    const large = Buffer.concat([raw, Buffer.alloc(2 ** 20)]);
    const controls = [{ name: "canny", image: base64(large) }];
    expect((await post(at("images/generations"), { ...quick, controls })).status).toBe(200);
    expect(Buffer.compare(asked[0]!.controls![0]!.image as Buffer, large)).toBe(0);
  });

  it("are one run with an Idempotency-Key, and another with another picture", async () => {
    const ask = (picture: Buffer) =>
      post(at("images/generations"), { ...quick, controls: [{ name: "canny", image: base64(picture) }] }, { "idempotency-key": "controls" }); // biome-ignore format: one line
    expect([(await ask(edges)).status, (await ask(edges)).status, (await ask(photo)).status]).toEqual([200, 200, 409]);
    expect(asked).toHaveLength(1);
  });
});

describe("refusals", () => {
  const image = () => base64(edges);
  it.each<[Record<string, unknown>, string, string]>([
    [{ loras: [{ name: "pastel" }] }, "loras.0.name", 'no LoRA "pastel" in this model; it has ink, few-steps.'],
    [{ model: "bare", loras: [{ name: "ink" }] }, "loras.0.name", "it was loaded without any."],
    [{ loras: [{ name: "ink" }, { name: "../ink.safetensors" }] }, "loras.1.name", "no LoRA"],
    [{ loras: [{ scale: 1 }] }, "loras.0.name", "required"],
    [{ loras: [{ name: "ink", scale: 101 }] }, "loras.0.scale", "<=100"],
    [{ loras: [{ name: "ink", file: "x" }] }, "loras.0", "there is no file"],
    [{ loras: ["ink"] }, "loras.0", "expected object"],
    [{ loras: [] }, "loras", ">=1"],
    [{ lora: [{ name: "ink" }] }, "lora", '"loras"'],
    [{ controls: [{ name: "depth", image }] }, "controls.0.name", "it has canny, inpainting."],
    [{ controls: [{ name: "/etc", image }] }, "controls.0.name", "no ControlNet"],
    [{ model: "bare", controls: [{ name: "canny", image }] }, "controls.0.name", "without any"],
    [{ controls: [{ folder: "canny", image }] }, "controls.0.name", "required"],
    [{ controls: [{ name: "canny" }] }, "controls.0.image", "required"],
    [{ controls: Array(3).fill({ name: "canny", image }) }, "controls", "<=2"],
    [{ controls: [{ name: "canny", image, scale: "x" }] }, "controls.0.scale", "number"],
    [{ controls: [{ name: "canny", image, preprocess: "depth" }] }, "controls.0.preprocess", "canny"],
    [{ controls: [{ name: "canny", image: "edges.png" }] }, "controls.0.image", "base64"],
    [{ controls: [{ name: "canny", image: "file:///etc/passwd" }] }, "controls.0.image", "Nothing is fetched"],
    [{ controls: [{ name: "canny", image: "AAAA" }] }, "controls.0.image", "PNG, JPEG"],
    [{ controls: [{ name: "canny", image, mask: "AAAA" }] }, "controls.0.mask", "PNG, JPEG"],
  ])("name the field: %j", async (given, param, words) => {
    const body = JSON.parse(JSON.stringify(given, (_, value) => (typeof value === "function" ? value() : value)));
    for (const path of ["images/generations", "jobs"]) {
      const { status, body: answer } = await post(at(path), { ...quick, ...body });
      expect([status, answer.error.param]).toEqual([400, param]);
      expect(answer.error.message).toContain(words);
    }
    expect(asked).toEqual([]);
  });

  it("are those of pictures: pixels by their headers, and damage", async () => {
    const wide = await sharp({ create: { width: 300, height: 100, channels: 3, background: "red" } })
      .png()
      .toBuffer();
    const ask = async (control: object) =>
      (await post(at("images/generations"), { ...quick, controls: [{ name: "canny", image: image(), ...control }] })).body.error; // biome-ignore format: one line
    expect(await ask({ image: base64(wide) })).toMatchObject({
      param: "controls.0.image",
      message: "Expected at most 10000 pixels for controls.0.image but received 300x100.",
    });
    expect((await ask({ mask: base64(wide) })).param).toBe("controls.0.mask");
    const damaged = masks.transparent.subarray(0, masks.transparent.length - 30);
    expect(await ask({ mask: base64(damaged) })).toMatchObject({
      param: "controls.0.mask",
      message: "The picture for controls.0.mask is damaged.",
    });
  });

  it.each<[readonly (readonly [string, string])[], string]>([
    [
      [
        ["loras[0][name]", "ink"],
        ["loras", "[]"],
      ],
      "loras",
    ],
    [
      [
        ["loras[0][name]", "ink"],
        ["loras[0][name][x]", "y"],
      ],
      "loras",
    ],
    [[["loras[1][name]", "ink"]], "loras"],
    [[["loras[0][__proto__]", "ink"]], "loras.0.name"],
    [[["prompt[x]", "ink"]], "prompt"],
    [[["controls[0][name]", "canny"]], "controls.0.image"],
    [
      [
        ["controls[0][image]", "AAAA"],
        ["controls[0][name]", "canny"],
      ],
      "controls.0.image",
    ],
    [[["nothing[0]", "ink"]], "nothing"],
    [[["loras[", "ink"]], "loras["],
  ])("are those of forms, too: %j", async (texts, param) => {
    const prompt = texts.some(([name]) => name.startsWith("prompt")) ? [] : [["prompt", "x"] as const];
    const { status, body } = await form([...prompt, ["image", blob(photo)], ...texts]);
    expect([status, body.error.param]).toEqual([400, param]);
    expect(asked).toEqual([]);
  });

  it("are those of files where texts belong, and of two files", async () => {
    const start = [["prompt", "x"], ["image", blob(photo)], ["controls[0][name]", "canny"]] as const; // biome-ignore format: one line
    const scale = await form([...start, ["controls[0][scale]", blob(edges)]]);
    expect([scale.status, scale.body.error.param]).toEqual([400, "controls.0.scale"]);
    const lora = await form([...start, ["loras[0][image]", blob(edges)]]);
    expect([lora.status, lora.body.error.param]).toEqual([400, "loras.0.image"]);
    const two = await form([...start, ["controls[0][image]", blob(edges)], ["controls[0][image]", blob(edges)]]);
    expect([two.status, two.body.error.param]).toEqual([400, "controls.0.image"]);
  });
});

it("a model that does not tell its adapters judges the names itself", async () => {
  const controls = [{ name: "anything", image: base64(edges) }];
  const { status } = await post(at("images/generations"), { ...quick, model: "unknown", loras, controls });
  expect(status).toBe(200);
  expect(asked[0]).toMatchObject({ loras, allowPaths: false });
});

it("the list of models has their names, and the document the fields", async () => {
  const { data } = (await (await fetch(at("models"))).json()) as { data: Record<string, unknown>[] };
  expect(data.map(({ loras, control_nets }) => [loras, control_nets])).toEqual([
    [names.loras, names.controlNets],
    [[], []],
    [[], []],
  ]);
  expect(data[0]!.limits).toMatchObject({ max_controls: 2 });
  const document = (await (await fetch(`${server.url}/openapi.json`)).json()) as {
    // biome-ignore lint/suspicious/noExplicitAny: a document of whatever form
    components: { schemas: Record<string, any> };
  };
  const { ImageGeneration, ImageEdit, NewJob, Model } = document.components.schemas;
  for (const { properties } of [ImageGeneration, ImageEdit, NewJob]) {
    expect(properties.controls).toMatchObject({ type: "array", minItems: 1, maxItems: 2 });
    expect(properties.controls.items.required).toEqual(["name", "image"]);
    expect(properties.loras.items.required).toEqual(["name"]);
    expect(properties.skip_layers.required).toEqual(["layers"]);
  }
  expect(Model.required).toEqual(expect.arrayContaining(["loras", "control_nets"]));
  // Words for messages are no keywords of schemas.
  expect(JSON.stringify(document).match(/"(expects|flag|help)":/)).toBeNull();
});
