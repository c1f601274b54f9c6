// The provider for the AI SDK over a model of this process, called by the SDK's own generateImage. Pictures are compared with
// what the model draws when it is called directly.
import {
  APICallError,
  type ImageModelV3,
  InvalidArgumentError,
  NoSuchModelError,
  type ProviderV3,
} from "@ai-sdk/provider";
import { createProviderRegistry, generateImage, RetryError } from "ai";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { readOptions } from "../../lib/ai/options.js";
import { parseRatio, sizeOfRatio } from "../../lib/ai/sizes.js";
import { createFlowTurbo, type FlowTurboImageOptions } from "../../lib/ai.js";
import { FlowTurbo, type GenerateOptions, type ImageModel, OptionError, QueueFullError } from "../../lib/index.js";
import {
  expectTextOptions,
  isPainted,
  original,
  pixelsIn,
  pixelsOf,
  textOptions,
  textPrompt,
  transparentMask,
  whiteMask,
  widePicture,
} from "./pictures.js";

(globalThis as { AI_SDK_LOG_WARNINGS?: boolean }).AI_SDK_LOG_WARNINGS = false;

let model: FlowTurbo;
beforeAll(async () => {
  model = await FlowTurbo.load(undefined, { measureCosts: false });
});
afterAll(() => model.dispose());

const few = { numInferenceSteps: 3, guidanceScale: 2 } satisfies FlowTurboImageOptions;
const direct = (options: Partial<GenerateOptions>) =>
  model.generate({ prompt: "a red circle", steps: 3, guidanceScale: 2, ...options });

/** The model with another `generate`. */
const changed = (generate: ImageModel["generate"]): ImageModel =>
  new Proxy<ImageModel>(model, {
    get: (target, name) => {
      const value = name === "generate" ? generate : Reflect.get(target, name, target);
      return typeof value === "function" && name !== "generate" ? value.bind(target) : value;
    },
  });

const provider = () => createFlowTurbo({ model });

const failure = async (call: Promise<unknown>): Promise<unknown> => {
  const outcome = await call.then(
    () => "no error",
    (error: unknown) => error,
  );
  expect(outcome).toBeInstanceOf(Error);
  return outcome;
};

describe("generateImage", () => {
  it("draws what the model draws with the same seed", async () => {
    const { images, providerMetadata, responses, usage, warnings } = await generateImage({
      model: provider().image(),
      prompt: "a red circle",
      n: 2,
      seed: 7,
      providerOptions: { flowturbo: few },
    });
    const expected = await direct({ seed: 7, count: 2 });
    expect(images.map(({ mediaType }) => mediaType)).toEqual(["image/png", "image/png"]);
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[index]!));
    expect(warnings).toEqual([]);
    expect(providerMetadata.flowturbo?.images).toMatchObject(
      expected.seeds.map((seed) => ({
        ...{ seed, blocks: expected.blocks, width: 64, height: 64, deadline: null },
        ...{ evaluations: expected.evaluations },
      })),
    );
    const [{ timings }] = providerMetadata.flowturbo!.images as [{ timings: { steps: number[]; total: number } }];
    expect(timings.steps).toHaveLength(3);
    expect(timings.total).toBeGreaterThan(0);
    expect(responses).toMatchObject([{ modelId: "shapes" }]);
    expect(usage).toEqual({
      inputTokens: expected.tokens.text,
      outputTokens: 2 * expected.tokens.image,
      totalTokens: expected.tokens.text + 2 * expected.tokens.image,
    });
  });

  it("draws a hundred pictures in one call, so that no two have one seed", async () => {
    const seeds: unknown[] = [];
    const counting = changed((options) => {
      seeds.push(options.seed, options.count);
      return direct({ ...options, steps: 1, count: 2 });
    });
    await generateImage({ model: createFlowTurbo({ model: counting }).image(), prompt: "x", n: 100, seed: 5 });
    expect(seeds).toEqual([5, 100]);
  });

  it("passes all options on", async () => {
    let given: GenerateOptions | undefined;
    const spying = changed((options) => {
      given = options;
      return direct({ ...options, ...{ deadlineMs: undefined, stages: undefined, quality: undefined } });
    });
    const flowturbo = {
      ...{ numInferenceSteps: 2, guidanceScale: 1.5, negativePrompt: "blue", sampler: "euler", deadlineMs: 9e5 },
      ...{ outputFormat: "jpeg", outputCompression: 0 },
    } as const;
    const { image } = await generateImage({
      model: createFlowTurbo({ model: spying }).image(),
      ...{ prompt: "a", size: "48x80", seed: 3, providerOptions: { flowturbo } },
    });
    expect(given).toMatchObject({
      ...{ prompt: "a", negativePrompt: "blue", width: 48, height: 80, seed: 3, count: 1, steps: 2 },
      ...{ guidanceScale: 1.5, sampler: "euler", deadlineMs: 9e5 },
    });
    expect(image.mediaType).toBe("image/jpeg");
    expect(() => readOptions({ outputCompression: 50 })).toThrow("The format png has no quality");
    expect(() => readOptions({ outputCompression: 50, outputFormat: "webp" })).not.toThrow();
    expect(await pixelsOf(image.uint8Array)).toMatchObject({ width: 48, height: 80 });
  });

  it("passes on what says how texts are encoded", () =>
    expectTextOptions(
      async (name) => {
        const own = name === null ? {} : { [name]: textOptions[name] };
        const providerOptions = { flowturbo: { ...few, ...own } };
        return (await generateImage({ model: provider().image(), prompt: textPrompt, seed: 7, providerOptions })).image
          .uint8Array;
      },
      (options) => direct({ seed: 7, ...options }),
    ));

  it("draws a seed for each picture, of 64 bits too", async () => {
    const seeds = [9, "6687881544318117707", 3];
    const flowturbo = { ...few, seeds } satisfies FlowTurboImageOptions;
    const call = (more: object) =>
      generateImage({ model: provider().image(), prompt: "a red circle", providerOptions: { flowturbo }, ...more });
    const { images, providerMetadata } = await call({ n: 3 });
    const expected = await direct({ seeds, count: 3 });
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[index]!));
    expect(providerMetadata.flowturbo?.images).toMatchObject(seeds.map((seed) => ({ seed })));
    for (const [more, words] of [
      [{ n: 2 }, "Expected as many seeds as pictures, n (2), for providerOptions.flowturbo.seeds but received 3"],
      [{ n: 3, seed: 7 }, "Both seed and providerOptions.flowturbo.seeds"],
      [{ n: 3, maxImagesPerCall: 2 }, "leave out maxImagesPerCall"],
    ] as const) {
      const error = await failure(call(more));
      expect(InvalidArgumentError.isInstance(error)).toBe(true);
      expect((error as Error).message).toContain(words);
    }
  });

  it("chooses a size of the native area for a ratio, and says where sides cannot have it", async () => {
    const call = (options: object) =>
      generateImage({ model: provider().image(), prompt: "x", providerOptions: { flowturbo: few }, ...options });
    const wide = await call({ aspectRatio: "16:9" });
    expect(await pixelsOf(wide.image.uint8Array)).toMatchObject({ width: 80, height: 48 });
    expect(wide.warnings).toMatchObject([{ type: "compatibility", feature: "aspectRatio" }]);
    const square = await call({ aspectRatio: "1:1" });
    expect(await pixelsOf(square.image.uint8Array)).toMatchObject({ width: 64, height: 64 });
    expect(square.warnings).toEqual([]);
    const both = await call({ aspectRatio: "1:1", size: "48x64" });
    expect(await pixelsOf(both.image.uint8Array)).toMatchObject({ width: 48, height: 64 });
    expect(both.warnings).toMatchObject([{ type: "unsupported", feature: "aspectRatio" }]);
  });

  it("hands the model's warnings on", async () => {
    const { warnings } = await generateImage({
      model: provider().image(),
      prompt: "a red circle ".repeat(300),
      providerOptions: { flowturbo: few },
    });
    const expected = (await direct({ prompt: "a red circle ".repeat(300) })).warnings;
    expect(expected.length).toBeGreaterThan(0);
    expect(warnings).toEqual(expected.map((message) => ({ type: "other", message })));
  });

  it("works through a proxy, as AI SDK 7 wraps models of this version", async () => {
    const wrapped = new Proxy(provider().image(), {});
    const { image } = await generateImage({
      model: wrapped,
      ...{ prompt: "a red circle", seed: 7, providerOptions: { flowturbo: few } },
    });
    expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn((await direct({ seed: 7 })).images[0]!));
  });
});

describe("edits", () => {
  const call = async (mask: Buffer | undefined, images: (Buffer | string)[]) =>
    generateImage({
      model: provider().image(),
      prompt: { images, text: "a red circle", ...(mask && { mask }) },
      seed: 4,
      providerOptions: { flowturbo: { ...few, strength: 0.9 } },
    });

  it.each([
    ["white", whiteMask],
    ["transparent", transparentMask],
  ])("paint where the mask is %s", async (_, mask) => {
    const image = await original();
    const edited = await pixelsOf((await call(await mask(), [image])).image.uint8Array);
    const expected = await direct({ seed: 4, image, mask: await whiteMask(), strength: 0.9 });
    expect(edited).toEqual(pixelsIn(expected.images[0]!));
    const before = await pixelsOf(image);
    const differs = (at: number) => Math.abs(edited.data[at]! - before.data[at]!) > 0;
    const all = Array.from({ length: edited.data.length }, (_, at) => at);
    const kept = all.filter((at) => !isPainted(Math.floor(at / 3) % 64));
    expect(kept.filter(differs)).toEqual([]);
    expect(all.filter(differs).length).toBeGreaterThan(1000);
  });

  it("start from a picture without a mask, also from base64", async () => {
    const image = await original();
    const expected = pixelsIn((await direct({ seed: 4, image, strength: 0.9 })).images[0]!);
    for (const given of [image, image.toString("base64"), `data:image/png;base64,${image.toString("base64")}`])
      expect(await pixelsOf((await call(undefined, [given])).image.uint8Array)).toEqual(expected);
  });

  it("draw a picture of the original's proportions, and with a mask all of the schedule", async () => {
    const wide = await sharp(await original())
      .resize(200, 100, { fit: "fill" })
      .png()
      .toBuffer();
    const mask = await sharp(await whiteMask())
      .resize(200, 100, { fit: "fill" })
      .png()
      .toBuffer();
    const draw = (prompt: { images: Buffer[]; text: string; mask?: Buffer }) =>
      generateImage({ model: provider().image(), prompt, seed: 4, providerOptions: { flowturbo: few } });
    const same = { seed: 4, image: wide, width: 96, height: 48 };
    const plain = await draw({ images: [wide], text: "a red circle" });
    expect(await pixelsOf(plain.image.uint8Array)).toEqual(pixelsIn((await direct(same)).images[0]!));
    const masked = await draw({ images: [wide], text: "a red circle", mask });
    const expected = await direct({ ...same, mask, strength: 1 });
    expect(await pixelsOf(masked.image.uint8Array)).toEqual(pixelsIn(expected.images[0]!));
  });

  it("draw what surrounds a mask, and keep the picture's size", async () => {
    const { image, mask } = await widePicture();
    const draw = (prompt: { images: Buffer[]; text: string; mask?: Buffer }) =>
      generateImage({
        ...{ model: provider().image(), prompt, seed: 4 },
        providerOptions: { flowturbo: { ...few, paddingMaskCrop: 8 } },
      });
    const edited = await pixelsOf((await draw({ images: [image], text: "a red circle", mask })).image.uint8Array);
    const expected = await direct({ seed: 4, image, mask, strength: 1, paddingMaskCrop: 8 });
    expect(edited).toEqual(pixelsIn(expected.images[0]!));
    expect(edited).toMatchObject({ width: 128, height: 64 });
    const refused = await failure(draw({ images: [image], text: "a red circle" }));
    expect(InvalidArgumentError.isInstance(refused)).toBe(true);
    expect((refused as Error).message).toMatch(/flowturbo\.paddingMaskCrop .* prompt\.mask/);
  });

  it("take one picture, and say so of several", async () => {
    const image = await original();
    const { warnings } = await call(undefined, [image, image]);
    expect(warnings).toMatchObject([{ type: "unsupported", feature: "prompt.images" }]);
  });

  it("refuse a mask without a picture, an address and what is no picture", async () => {
    const image = await original();
    const refused = await failure(call(image, []));
    expect(InvalidArgumentError.isInstance(refused)).toBe(true);
    expect(await failure(call(undefined, ["http://127.0.0.1:1/a.png"]))).toMatchObject({
      message: expect.stringContaining("downloads nothing"),
    });
    for (const [mask, name] of [
      [undefined, "image"],
      [Buffer.from("no picture"), "mask"],
    ] as const) {
      const error = await failure(call(mask, [mask ? image : Buffer.from("no picture")]));
      expect(APICallError.isInstance(error) && error.statusCode).toBe(400);
      expect(error).toMatchObject({ isRetryable: false, message: expect.stringContaining(`for ${name}`) });
    }
  });
});

describe("options", () => {
  it.each([
    ["numInferenceStep", "Did you mean numInferenceSteps?"],
    ["num_inference_steps", "Did you mean numInferenceSteps?"],
    ["steps", "Did you mean numInferenceSteps?"],
    ["guidance_scale", "Did you mean guidanceScale?"],
    ["guidence_scale", "Did you mean guidanceScale?"],
    ["zoom", "There are numInferenceSteps, "],
    ["negative_prompt", "Did you mean negativePrompt?"],
    ["prompt_2", "Did you mean prompt2?"],
    ["negative_prompt_3", "Did you mean negativePrompt3?"],
    ["padding_mask_crop", "Did you mean paddingMaskCrop?"],
    ["clip_skip", "Did you mean clipSkip?"],
    ["seed", "It is an argument of generateImage itself: seed."],
    ["mask", "It is an argument of generateImage itself: prompt.mask."],
    ["__proto__x", "There are numInferenceSteps, "],
    ["constructor", "There are numInferenceSteps, "],
  ])("that do not exist are errors: %s", (name, remedy) => {
    const message = `providerOptions.flowturbo has no option "${name}". ${remedy}`;
    expect(() => readOptions({ [name]: 1 })).toThrow(message);
  });

  it.each([
    ["numInferenceSteps", 1.5],
    ["numInferenceSteps", "4"],
    ["quality", "high"],
    ["guidanceScale", -1],
    ["negativePrompt", ["a"]],
    ["prompt2", ["a"]],
    ["negativePrompt3", 1],
    ["clipSkip", -1],
    ["promptWeighting", "yes"],
    ["maxSequenceLength", 513],
    ["seeds", 7],
    ["seeds", []],
    ["seeds", [1, -1]],
    ["seeds", ["18446744073709551616"]],
    ["paddingMaskCrop", -1],
    ["blocks", 3],
    ["sampler", "ddim"],
    ["strength", 0],
    ["deadlineMs", 0],
    ["stages", []],
    ["outputFormat", "gif"],
    ["outputCompression", 101],
  ])("that are wrong are errors: %s %j", (name, value) => {
    expect(() => readOptions({ [name]: value })).toThrow(`for providerOptions.flowturbo.${name} but received`);
  });

  it("are checked once, by an error of the SDK", async () => {
    const error = await failure(
      generateImage({
        model: provider().image(),
        ...{ prompt: "x", providerOptions: { flowturbo: { step: 3 } } },
      }),
    );
    expect(InvalidArgumentError.isInstance(error) && error.argument).toBe("providerOptions");
  });

  it("of sizes: a text that is no size or ratio is refused", async () => {
    for (const wrong of [
      { size: "64" },
      { size: "64x" },
      { aspectRatio: "1" },
      { aspectRatio: "0:1" },
      { aspectRatio: "99:1" },
    ]) {
      const options = { model: provider().image(), prompt: "x", ...wrong } as Parameters<typeof generateImage>[0];
      expect(InvalidArgumentError.isInstance(await failure(generateImage(options))), JSON.stringify(wrong)).toBe(true);
    }
  });

  it("of ratios: no size of multiples of 16 comes nearer at an area that is as near", () => {
    for (const native of [64, 128, 512, 1024].map((side) => ({ width: side, height: side })))
      for (const text of ["1:1", "4:3", "3:4", "16:9", "9:16", "21:9", "3:2", "1:4"]) {
        const ratio = parseRatio(text);
        const wrong = ({ width, height }: { width: number; height: number }) => [
          Math.abs(Math.log(width / height / ratio)),
          Math.abs(Math.log((width * height) / native.width ** 2)),
        ];
        const found = sizeOfRatio(ratio, native);
        const [ofRatio, ofArea] = wrong(found) as [number, number];
        expect((found.width % 16) + (found.height % 16)).toBe(0);
        for (let width = 16; width <= 4096; width += 16)
          for (const height of [16, 0].map((more) => Math.floor(width / ratio / 16) * 16 + more)) {
            if (height === 0) continue;
            const [r, a] = wrong({ width, height }) as [number, number];
            expect(r < ofRatio - 1e-9 && a < ofArea - 1e-9, `${text} of ${native.width}: ${width}x${height}`).toBe(
              false,
            );
          }
        expect(ofArea).toBeLessThan(0.45);
      }
    expect(sizeOfRatio(16 / 9, { width: 1024, height: 1024 })).toEqual({ width: 1360, height: 768 });
  });
});

describe("aborts and errors", () => {
  it("an abort ends the work at once, with its reason", async () => {
    const controller = new AbortController();
    const call = generateImage({
      model: provider().image(),
      ...{ prompt: "x", abortSignal: controller.signal, providerOptions: { flowturbo: { numInferenceSteps: 1000 } } },
    });
    setTimeout(() => controller.abort(), 100);
    const start = performance.now();
    expect(await failure(call)).toMatchObject({ name: "AbortError" });
    expect(performance.now() - start).toBeLessThan(5000);
    await expect.poll(() => model.stats().running.requests + model.stats().queue.waiting).toBe(0);
    const reason = new Error("seen enough");
    const early = generateImage({ model: provider().image(), prompt: "x", abortSignal: AbortSignal.abort(reason) });
    expect(await failure(early)).toBe(reason);
  });

  it("an error of the model is an APICallError, with the row of the table of errors", async () => {
    const error = await failure(generateImage({ model: provider().image(), ...{ prompt: "x", size: "60x64" } }));
    if (!APICallError.isInstance(error)) throw error;
    expect(error.cause).toBeInstanceOf(OptionError);
    expect(error).toMatchObject({
      ...{ name: "AI_APICallError", statusCode: 400, isRetryable: false, url: "flowturbo:in-process" },
      data: { error: { code: "ERR_FLOWTURBO_OPTION", param: "width" } },
      requestBodyValues: { prompt: "x", width: 60, height: 64 },
    });
    expect(error.message).toContain("60");
  });

  it("tries again where that helps, after the time that the error names", async () => {
    let calls = 0;
    const busy = changed((options) => {
      if (++calls < 3) throw new QueueFullError("full", 3, 30);
      return direct({ ...options, steps: 1 });
    });
    const start = performance.now();
    await generateImage({ model: createFlowTurbo({ model: busy }).image(), prompt: "x" });
    expect(calls).toBe(3);
    // The SDK's own delays are 2 and 4 seconds.
    expect(performance.now() - start).toBeLessThan(1900);
  });

  it("gives up at last", async () => {
    const full = changed(() => Promise.reject(new QueueFullError("full", 3, 5)));
    const error = await failure(
      generateImage({ model: createFlowTurbo({ model: full }).image(), ...{ prompt: "x", maxRetries: 1 } }),
    );
    if (!RetryError.isInstance(error)) throw error;
    expect(error.errors).toHaveLength(2);
    expect(error.lastError).toMatchObject({ statusCode: 429, responseHeaders: { "retry-after-ms": "5" } });
  });

  it("hands on what is no error of this package", async () => {
    const odd = new TypeError("odd");
    const broken = changed(() => Promise.reject(odd));
    expect(await failure(generateImage({ model: createFlowTurbo({ model: broken }).image(), prompt: "x" }))).toBe(odd);
  });
});

describe("createFlowTurbo", () => {
  it("is a provider of the SDK's types", () => {
    const typed = provider() satisfies ProviderV3;
    expect((typed.image() satisfies ImageModelV3).specificationVersion).toBe("v3");
    expect(typed("shapes").modelId).toBe("shapes");
  });

  it("has no other kinds of models", () => {
    for (const kind of [
      ...(["languageModel", "embeddingModel", "textEmbeddingModel", "transcriptionModel"] as const),
      ...(["speechModel", "rerankingModel"] as const),
    ]) {
      const act = () => provider()[kind]("shapes");
      expect(act).toThrow("flowturbo has image models only");
      try {
        act();
      } catch (error) {
        expect(NoSuchModelError.isInstance(error) && error.modelId).toBe("shapes");
      }
    }
  });

  it("knows one model by its name only", () => {
    expect(provider().image("shapes").modelId).toBe("shapes");
    expect(() => provider().image("flux")).toThrow('The model that was given is "shapes"');
    expect(() => createFlowTurbo().image("flux")).toThrow("No such imageModel: flux");
  });

  it("is found through a registry", async () => {
    const registry = createProviderRegistry({ flowturbo: provider() });
    const { image } = await generateImage({
      model: registry.imageModel("flowturbo:shapes"),
      ...{ prompt: "a red circle", seed: 7, providerOptions: { flowturbo: few } },
    });
    expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn((await direct({ seed: 7 })).images[0]!));
  });

  it("loads a model once for each id, when it is needed, and again after a failure", async () => {
    const asked: string[] = [];
    let broken = true;
    let disposed = 0;
    const loading = createFlowTurbo({
      model: async (id) => {
        asked.push(id);
        if (broken) throw new OptionError("folder", "not there");
        const loaded = changed((options) => direct({ ...options, steps: 1 }));
        return Object.assign(Object.create(loaded), { dispose: async () => void disposed++ });
      },
    });
    const draw = (id: string) => generateImage({ model: loading.image(id), prompt: "x" });
    expect(asked).toEqual([]);
    expect(await failure(draw("a"))).toMatchObject({ statusCode: 400, message: "not there" });
    broken = false;
    await Promise.all([draw("a"), draw("a"), draw("b")]);
    expect(asked).toEqual(["a", "a", "b"]);
    await loading.dispose();
    expect(disposed).toBe(2);
  });

  it("draws with the embedded model by default, and disposes it", async () => {
    await using embedded = createFlowTurbo();
    const { image } = await generateImage({
      model: embedded.image(),
      ...{ prompt: "a red circle", seed: 7, providerOptions: { flowturbo: few } },
    });
    expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn((await direct({ seed: 7 })).images[0]!));
  });

  it("does not dispose a model that was given", async () => {
    await provider().dispose();
    expect(model.health().ready).toBe(true);
  });

  it("refuses settings that do not exist or are wrong", () => {
    expect(() => createFlowTurbo({ modle: model } as object)).toThrow('no setting "modle"');
    expect(() => createFlowTurbo({ baseURL: "http://a", model } as never)).toThrow('no setting "model"');
    expect(() => createFlowTurbo({ baseURL: "localhost" })).toThrow("Expected an address");
  });
});
