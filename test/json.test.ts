// The JSON form of requests and results: written, sent as text, read back, nothing lost.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import fc from "fast-check";
import {
  FlowTurbo,
  type GenerateOptions,
  Image,
  OptionError,
  requestFromJson,
  requestToJson,
  resultFromJson,
  resultToJson,
} from "flowturbo";
import { afterAll, describe, expect, it } from "vitest";
import { float32 } from "../lib/common/tensor.js";
import { checkOptions, generateSchema } from "../lib/options.js";

const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-json-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const sent = (json: unknown) => JSON.parse(JSON.stringify(json)) as unknown;
const checked = (options: GenerateOptions) => checkOptions(generateSchema, options, "test");

const tensor = fc
  .array(fc.float({ noNaN: true, noDefaultInfinity: true }), { minLength: 4, maxLength: 4 })
  .map((values) => float32([1, 1, 2, 2], Float32Array.from(values)));
const rgb = fc
  .uint8Array({ minLength: 12, maxLength: 12 })
  .map((data) => ({ width: 2, height: 2, data: new Uint8Array(data) }));
const encoded = fc.uint8Array({ minLength: 1 }).map((data) => new Uint8Array(data));
/** As a request comes back with it: a number where that is exact. */
const seed = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map((value) => (value < 2n ** 53n ? Number(value) : value));
const texts = fc.oneof(fc.string(), fc.array(fc.string(), { minLength: 1 }));
/** Every option but signal, callbacks and allowPaths; `satisfies` holds the list complete. */
const options = fc.record(
  {
    prompt: texts,
    negativePrompt: texts,
    prompt2: texts,
    prompt3: texts,
    negativePrompt2: texts,
    negativePrompt3: texts,
    clipSkip: fc.integer({ min: 0, max: 1000 }),
    promptWeighting: fc.boolean(),
    promptEmbeds: fc.record(
      {
        promptEmbeds: tensor,
        pooledPromptEmbeds: tensor,
        negativePromptEmbeds: tensor,
        negativePooledPromptEmbeds: tensor,
        loras: fc.array(fc.record({ name: fc.constantFrom("a", "b"), scale: fc.constantFrom(-1, 0.7) }), {
          maxLength: 2,
        }),
        tokens: fc.nat(),
        warnings: fc.array(fc.string()),
      },
      { requiredKeys: ["promptEmbeds", "pooledPromptEmbeds"] },
    ),
    width: fc.integer({ min: 1, max: 4096 }),
    height: fc.integer({ min: 1, max: 4096 }),
    sampler: fc.constantFrom("flowturbo" as const, "euler" as const, "heun" as const),
    steps: fc.integer({ min: 1, max: 1000 }),
    quality: fc.constantFrom("fast" as const, "balanced" as const, "best" as const),
    blocks: fc.constantFrom("H1P5R3", "E4"),
    grid: fc.constantFrom("shifted" as const, "diffusers" as const),
    sigmas: fc.constantFrom([1, 0.5], [0.9, 0.4, 0]),
    shift: fc.constantFrom(1, 3.5),
    mu: fc.constantFrom(0.5, -1),
    guidanceScale: fc.oneof(fc.double({ min: 0, max: 1000, noNaN: true }), fc.constant([4.5, 1])),
    guidanceStart: fc.constantFrom(0, 0.25),
    guidanceStop: fc.constantFrom(0.5, 1),
    guidanceMode: fc.constantFrom("cfg" as const, "cfg_zero" as const),
    seed,
    seeds: fc.array(seed, { minLength: 1, maxLength: 4 }),
    skipLayers: fc.record(
      {
        layers: fc.array(fc.integer({ min: 0, max: 37 }), { minLength: 1, maxLength: 4 }),
        scale: fc.constantFrom(0, 2.8),
        start: fc.constantFrom(0, 0.01),
        stop: fc.constantFrom(0.2, 1),
      },
      { requiredKeys: ["layers"] },
    ),
    loras: fc.array(
      fc.record({ name: fc.constantFrom("a", "b"), scale: fc.constantFrom(-1, 0.7) }, { requiredKeys: ["name"] }),
      {
        minLength: 1,
        maxLength: 3,
      },
    ),
    controls: fc.array(
      fc.record(
        {
          folder: fc.constantFrom("canny", "depth"),
          image: fc.oneof(rgb, encoded),
          mask: fc.oneof(rgb, encoded),
          scale: fc.constantFrom(-1, 0.7),
          start: fc.constantFrom(0, 0.25),
          stop: fc.constantFrom(0.5, 1),
          preprocess: fc.constant("canny" as const),
          pixelRange: fc.constantFrom("signed" as const, "stability_canny" as const),
        },
        { requiredKeys: ["folder", "image"] },
      ),
      { minLength: 1, maxLength: 3 },
    ),
    count: fc.integer({ min: 1, max: 1024 }),
    stages: fc.array(
      fc.record({ width: fc.constant(64), height: fc.constant(64), blocks: fc.constant("H1"), sigma: fc.constant(0.5) }), // biome-ignore format: one line
      { minLength: 1 },
    ),
    image: fc.oneof(rgb, encoded),
    mask: fc.oneof(rgb, encoded),
    strength: fc.constantFrom(0.25, 1),
    keepOriginal: fc.boolean(),
    paddingMaskCrop: fc.nat(),
    preview: fc.constantFrom("fast" as const, "decoded" as const),
    previewCount: fc.integer({ min: 1, max: 1000 }),
    stepLatents: fc.boolean(),
    outputType: fc.constantFrom("image" as const, "latent" as const),
    metadata: fc.constantFrom("full" as const, "parameters" as const, false as const),
    noise: fc.oneof(tensor, fc.array(tensor, { minLength: 1, maxLength: 3 })),
    maxSequenceLength: fc.integer({ min: 1, max: 512 }),
    deadlineMs: fc.double({ min: 1, max: 1e6, noNaN: true }),
    timeoutMs: fc.double({ min: 1, max: 1e6, noNaN: true }),
    ladder: fc.array(fc.constantFrom("H1", "H1P2"), { minLength: 1, maxLength: 4 }),
    prefer: fc.constantFrom("admission", "quality"),
    ticket: fc.string({ minLength: 1, maxLength: 256 }),
    priority: fc.integer({ min: -100, max: 100 }),
    pinBatch: fc.integer({ min: 1, max: 256 }),
    include: fc.uniqueArray(fc.constantFrom("latents" as const, "pixels" as const)),
    reports: fc.constantFrom("each" as const, "bunched" as const),
  } satisfies Record<
    Exclude<keyof GenerateOptions, "signal" | "onAccept" | "onStart" | "onStep" | "allowPaths">,
    unknown
  >,
  { requiredKeys: ["prompt"] },
);

describe("a request", () => {
  it("comes back as it was, whatever options it has", async () => {
    await fc.assert(
      fc.asyncProperty(options, async (request) => {
        const handlers = { onAccept: () => {}, onStart: () => {}, onStep: () => {} };
        const json = sent(await requestToJson({ ...request, ...handlers, signal: new AbortController().signal }));
        const back = requestFromJson(json);
        expect(checked(back)).toEqual(checked(request));
      }),
      { numRuns: 300 },
    );
  });

  it("holds a picture by its bytes, not by its path", async () => {
    const file = path.join(folder, "red.png");
    await new Image(8, 8, new Uint8Array(192).fill(200)).toFile(file);
    const json = await requestToJson({ prompt: "x", image: file });
    expect(JSON.stringify(json)).not.toContain("red.png");
    expect(requestFromJson(sent(json)).image).toEqual(new Uint8Array(readFileSync(file)));
    const absent = requestToJson({ prompt: "x", mask: path.join(folder, "absent.png"), image: file });
    await expect(absent).rejects.toThrow(/picture for mask cannot be read.*absent\.png/);
  });

  it("takes a picture of a result, and any other object with its three fields", async () => {
    const data = new Uint8Array(12).fill(7);
    const own = { width: 2, height: 2, data, label: "mine" };
    for (const picture of [new Image(2, 2, data, { prompt: "x" }), own]) {
      const back = requestFromJson(sent(await requestToJson({ prompt: "x", image: picture, mask: picture })));
      expect([back.image, back.mask]).toEqual([0, 0].map(() => ({ width: 2, height: 2, data })));
    }
  });

  it("that cannot be written is refused by the name of the option", async () => {
    const values = new Float32Array(4);
    for (const [noise, shape] of [
      ["without a dtype", { shape: [4], data: values }],
      ["of another shape", { dtype: "float32", shape: [5], data: values }],
      ["of half a row", { dtype: "float32", shape: [2.5], data: values }],
    ] as const)
      await expect(requestToJson({ prompt: "x", noise: shape as never }), noise).rejects.toMatchObject({
        code: "ERR_FLOWTURBO_OPTION",
        option: "noise",
      });
    for (const nothing of [undefined, null, 7])
      await expect(requestToJson(nothing as never)).rejects.toBeInstanceOf(OptionError);
  });

  it("that is wrong is refused by the name of the option", async () => {
    await expect(requestToJson({ prompt: "x", steps: 0 })).rejects.toThrow(/whole number from 1 to 1000 for steps/);
    for (const [json, message] of [
      [{ prompt: 3 }, /request is wrong at prompt/],
      [{ prompt: "x", seed: null }, /wrong at seed: Expected a whole number from 0 to 18446744073709551615, above/],
      [
        { prompt: "x", seeds: ["-1"] },
        /wrong at seeds\.0: Expected a whole number from 0 to 18446744073709551615, above/,
      ],
      [{ prompt: "x", image: "/etc/passwd" }, /wrong at image/],
      [{ prompt: "x", image: { file: "!" } }, /wrong at image/],
      [{ prompt: "x", image: { width: 2, height: 2, data: "AAAA" } }, /wrong at image/],
      [{ prompt: "x", onStep: "run me" }, /wrong.*onStep/],
      [{ prompt: "x", noise: { dtype: "float32", shape: [1], data: "AAAA" } }, /wrong at noise/],
      ["text", /request is wrong/],
    ] as const)
      expect(() => requestFromJson(json)).toThrow(expect.objectContaining({ message: expect.stringMatching(message) }));
    expect(() => requestFromJson({})).toThrow(OptionError);
  });
});

it("a result that cannot be written is refused by the name of the field", () => {
  for (const result of [{}, null, undefined, { images: [null] }])
    expect(() => resultToJson(result as never)).toThrow(OptionError);
  const image = new Image(1, 1, new Uint8Array(3), { strength: Number.NaN });
  expect(() => resultToJson({ images: [image] } as never)).toThrow(/result has no JSON form at images\.0\.parameters/);
});

it("a result comes back as it was, with pictures that can be encoded", async () => {
  await using model = await FlowTurbo.load(undefined, { measureCosts: false });
  const small = { width: 32, height: 32 };
  const image = { ...small, data: new Uint8Array(3 * 32 * 32).fill(100) };
  const mask = { ...small, data: Uint8Array.from({ length: 3 * 32 * 32 }, (_, i) => (i % 2 ? 255 : 0)) };
  const kinds: Partial<GenerateOptions>[] = [
    { blocks: "H1P1", include: [] },
    { blocks: "H1P1", include: ["latents"] },
    { blocks: "H1", deadlineMs: 60_000 },
    {
      stages: [
        { ...small, blocks: "H1", sigma: undefined },
        { width: 64, height: 64, blocks: "E1", sigma: 0.5 },
      ],
    },
    { ...small, steps: 2, image, strength: 0.5 },
    { ...small, steps: 2, image, mask, keepOriginal: false },
    { ...small, blocks: "H1", guidanceScale: 1, noise: float32([2, 3, 8, 8], new Float32Array(384).fill(0.5)) },
  ];
  const include = ["latents", "pixels"] as const;
  for (const kind of kinds) {
    const result = await model.generate({ prompt: "a red circle", count: 2, seed: 3, include, ...kind });
    const back = resultFromJson(sent(resultToJson(result)));
    expect(back).toEqual(result);
    expect(await back.images[1]!.toPNG()).toEqual(await result.images[1]!.toPNG());
  }
  const json = sent(resultToJson(await model.generate({ prompt: "x", ...small, blocks: "H1", include }))) as Wrong;
  for (const [spoil, message] of [
    [(wrong: Wrong) => delete wrong.latents, /result is wrong at latents/],
    [(wrong: Wrong) => Object.assign(wrong.latents!, { data: "AAAA" }), /wrong at latents: the data does not have/],
    [(wrong: Wrong) => Object.assign(wrong.pixels!, { data: "AAA=" }), /wrong at pixels: the data does not have/],
    [
      (wrong: Wrong) => Object.assign(wrong.images[0]!, { data: "AAAA" }),
      /wrong at images\.0: the data does not have 3/,
    ],
  ] as const) {
    const wrong = structuredClone(json);
    spoil(wrong);
    expect(() => resultFromJson(wrong)).toThrow(OptionError);
    expect(() => resultFromJson(wrong)).toThrow(message);
  }
});

interface Wrong {
  latents?: object;
  pixels?: object;
  images: object[];
}
