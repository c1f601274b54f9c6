// Texts of their own for each text encoder, hidden states of other layers, weights of parts, and embeddings in place of texts, against
// diffusers' and compel's results (test/fixtures/README.md), through the public API of the built package.
import {
  FlowTurbo,
  type GenerateOptions,
  OptionError,
  type PromptEmbeds,
  requestFromJson,
  requestToJson,
} from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { fixture, fixtureNames, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const prompt = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const [first, second] = prompt as [string, string];
const negativePrompt = "blurry, low quality";
/** Those of generate/weighting.py. */
const weighted = [
  "a (red)1.4 circle above a small blue square",
  "a red circle above a (small blue)0.5 square",
  "a ((red)1.2 circle)1.5 above a (small)0.3 blue++ square--",
  "a (red)0 circle \\(round\\) (on a green background)0.8",
];
const small = { height: 48, width: 32, maxSequenceLength: 32 };

const runs: Record<string, Partial<GenerateOptions>> = {
  prompts: {
    ...{ prompt2: second, prompt3: "green" },
    ...{ negativePrompt2: "a dog", negativePrompt3: "yellow triangle" },
  },
  clip_skip_1: { clipSkip: 1 },
  clip_skip_2: { clipSkip: 2 },
};

describe.each(fixtureNames)("%s", (name) => {
  const hasT5 = name !== "sd3";
  let model: FlowTurbo;
  beforeAll(async () => {
    model = await FlowTurbo.load(fixture(name, "model"), { measureCosts: false });
  });
  afterAll(() => model?.dispose());

  const settings = { ...small, sampler: "euler", steps: 3, negativePrompt } as const;

  it.each(Object.entries(runs))("%s", async (file, options) => {
    const reference = await readAll(fixture(name, `${file}.safetensors`));
    const noise = reference.noise!;
    const all = { ...settings, ...options, prompt: first, noise };
    const result = await withValues(model, all);
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
    expect(result.warnings).toEqual(
      file === "prompts" && !hasT5
        ? ["prompt3", "negativePrompt3"].map((option) => expect.stringMatching(`${option} has no effect`))
        : [],
    );
    // The same in two calls.
    const { steps, sampler, width, height, ...texts } = { ...settings, ...options };
    const promptEmbeds = await model.encode({ ...texts, prompt: first });
    const again = await withValues(model, { steps, sampler, width, height, noise, promptEmbeds });
    expect(again.latents).toEqual(result.latents);
    expect([again.tokens, promptEmbeds.warnings]).toEqual([result.tokens, result.warnings]);
  });

  it("encodes as diffusers does, and draws from diffusers' embeddings", async () => {
    const expected = await readAll(fixture(name, "embeds.safetensors"));
    const embeds = await model.encode({ prompt, negativePrompt, maxSequenceLength: 32 });
    const names = {
      ...{ promptEmbeds: "prompt_embeds", negativePromptEmbeds: "negative_prompt_embeds" },
      ...{ pooledPromptEmbeds: "pooled", negativePooledPromptEmbeds: "negative_pooled" },
    } as const;
    for (const [own, theirs] of Object.entries(names))
      expect(relativeError(embeds[own as keyof typeof names]!, expected[theirs]!), own).toBeLessThan(1e-5);
    const promptEmbeds = Object.fromEntries(
      Object.entries(names).map(([own, theirs]) => [own, expected[theirs]!]),
    ) as unknown as PromptEmbeds;
    const reference = await readAll(fixture(name, "euler_128x96_b2.safetensors"));
    const options = { sampler: "euler", steps: 4, guidanceScale: 3, height: 128, width: 96 } as const;
    const result = await withValues(model, { ...options, promptEmbeds, noise: reference.noise! });
    expect(relativeError(result.latents, reference.latents!)).toBeLessThan(1e-5);
    expect(relativeError(result.pixels, reference.image!)).toBeLessThan(1e-5);
    expect(result.tokens.text).toBe(0);
    for (const { parameters } of result.images) {
      expect(parameters).toMatchObject({ promptEmbeds: true, steps: 4 });
      for (const option of ["prompt", "negativePrompt", "maxSequenceLength"])
        expect(parameters).not.toHaveProperty(option);
    }
    // Without guidance nothing is needed of a negative prompt.
    const { negativePromptEmbeds: _, negativePooledPromptEmbeds: __, ...own } = promptEmbeds;
    const unguided = { ...small, maxSequenceLength: undefined, steps: 2, seed: 1, guidanceScale: 1, count: 2 };
    const four = await withValues(model, { ...unguided, promptEmbeds: own });
    const texts = await withValues(model, { ...unguided, prompt, maxSequenceLength: 32 });
    expect(four.images).toHaveLength(4);
    expect(relativeError(four.latents, texts.latents)).toBeLessThan(1e-5);
  });

  it("weighs parts of prompts as compel does", async () => {
    const expected = await readAll(fixture(name, "weighting.safetensors"));
    for (const texts of [weighted, weighted.map(withColons)]) {
      const { promptEmbeds, pooledPromptEmbeds, warnings } = await model.encode({
        ...{ prompt: texts, maxSequenceLength: 32, promptWeighting: true },
      });
      expect(relativeError(promptEmbeds, expected.prompt_embeds!)).toBeLessThan(1e-5);
      expect(relativeError(pooledPromptEmbeds, expected.pooled!)).toBeLessThan(1e-5);
      if (!hasT5) expect(warnings).toEqual([]);
    }
    // Without the option, parentheses are text.
    const plain = await model.encode({ prompt: weighted, maxSequenceLength: 32 });
    expect(relativeError(plain.promptEmbeds, expected.prompt_embeds!)).toBeGreaterThan(0.01);
  });

  it("names what each encoder cut of its own text", async () => {
    const long = (what: string) => `${`${what} `.repeat(100)}end`;
    const { warnings } = await model.generate({
      ...{ ...small, steps: 1, guidanceScale: 1, seed: 1 },
      ...{ prompt: long("red"), prompt2: long("blue"), prompt3: long("green") },
    });
    const own = [/"red .* clip_l takes.*"red/, /"blue .* clip_g takes.*"blue/];
    if (hasT5) own.push(/"green .* 32 tokens that t5 takes.*"green/);
    else own.push(/prompt3 has no effect/);
    expect(warnings).toEqual(own.map((pattern) => expect.stringMatching(pattern)));
    if (!hasT5) return;
    // T5 takes more, as far as it is asked for.
    const more = await model.encode({ prompt: "red", prompt3: long("green"), maxSequenceLength: 512 });
    expect([more.warnings, more.promptEmbeds.shape[1]]).toEqual([[], 77 + 512]);
  });

  it("what does not fit is named", async () => {
    const embeds = await model.encode({ prompt: "x", maxSequenceLength: 4 });
    const { negativePromptEmbeds, negativePooledPromptEmbeds, ...positive } = embeds;
    const spoilt = float32(embeds.promptEmbeds.shape, embeds.promptEmbeds.data.slice().fill(Number.NaN, 7, 8));
    const most = { sd3: 2, medium: 2, large: 2 }[name];
    const refused: [Partial<GenerateOptions>, string, RegExp][] = [
      [
        { prompt: undefined },
        "prompt",
        /Expected a string or a non-empty array of strings for prompt but received undefined/,
      ],
      [
        { prompt2: ["x", "y"] },
        "prompt2",
        /Expected one text, or 1 \(one for each prompt\), for prompt2 but received 2/,
      ],
      [{ negativePrompt3: ["x", "y"] }, "negativePrompt3", /one negative prompt, or 1/],
      [{ clipSkip: most + 1 }, "clipSkip", new RegExp(`at most ${most} for clipSkip but received ${most + 1}`)],
      [{ clipSkip: -1 }, "clipSkip", /whole number of at least 0/],
      [{ prompt: "a (b", promptWeighting: true }, "prompt", /option prompt has a "\(" that no "\)" closes; write \\\(/],
      [{ prompt2: "a) b", promptWeighting: true }, "prompt2", /a "\)" at character 2 that no "\(" opens/],
      [
        { negativePrompt: "(a:101)", promptWeighting: true },
        "negativePrompt",
        /the weight 101; weights are numbers from 0 to 100/,
      ],
      [{ promptEmbeds: embeds }, "prompt", /prompt says how texts are encoded.*leave out one/],
      [{ prompt: undefined, promptEmbeds: embeds, clipSkip: 1 }, "clipSkip", /encoded already/],
      [{ prompt: undefined, promptEmbeds: embeds, negativePrompt: "" }, "negativePrompt", /encoded already/],
      [{ prompt: undefined, promptEmbeds: embeds, maxSequenceLength: 4 }, "maxSequenceLength", /encoded already/],
      [
        { prompt: undefined, promptEmbeds: positive },
        "promptEmbeds",
        /Guidance needs promptEmbeds.negativePromptEmbeds/,
      ],
      [{ prompt: undefined, promptEmbeds: { ...positive, negativePromptEmbeds } }, "promptEmbeds", /both or neither/],
      [
        { prompt: undefined, promptEmbeds: { ...embeds, promptEmbeds: spoilt } },
        "promptEmbeds",
        /finite values for promptEmbeds.promptEmbeds/,
      ],
      [
        { prompt: undefined, promptEmbeds: { ...embeds, pooledPromptEmbeds: float32([1, 3], new Float32Array(3)) } },
        ...(["promptEmbeds", /shape \[1, \d+\] for promptEmbeds.pooledPromptEmbeds but received \[1, 3\]/] as const),
      ],
      [
        {
          prompt: undefined,
          promptEmbeds: { ...embeds, promptEmbeds: float32([1, 77, 96], new Float32Array(77 * 96)) },
        },
        ...(["promptEmbeds", /\[prompts, 78 to 589 tokens, 96\].*received \[1, 77, 96\]/] as const),
      ],
      [
        { prompt: undefined, promptEmbeds: { promptEmbeds: embeds.promptEmbeds } as never },
        "promptEmbeds",
        /embeddings as encode/,
      ],
    ];
    for (const [options, option, message] of refused) {
      const error = await model
        .generate({ prompt: "x", ...small, maxSequenceLength: undefined, ...options })
        .catch((reason) => reason);
      expect(error).toBeInstanceOf(OptionError);
      expect(error).toMatchObject({ option, message: expect.stringMatching(message) });
    }
    await expect(model.encode({} as never)).rejects.toThrow(/Expected a string .* for prompt but received undefined/);
    await expect(model.encode({ prompt: "x", steps: 3 } as never)).rejects.toThrow(/encode\(\) has no option "steps"/);
  });

  it("a picture says how it was made, and is drawn again from it", async () => {
    const options: GenerateOptions = {
      ...{ ...small, steps: 2, seed: 3, negativePrompt, negativePrompt2: "a dog", clipSkip: 1, promptWeighting: true },
      ...{ prompt, prompt2: ["a (red:1.5) dog", "a cat"], metadata: "parameters" as const },
    };
    const { images } = await model.generate(options);
    expect(images[1]!.parameters).toMatchObject({
      ...{
        prompt: second,
        prompt2: "a cat",
        negativePrompt,
        negativePrompt2: "a dog",
        clipSkip: 1,
        promptWeighting: true,
      },
    });
    const [again] = (await model.generate({ ...(images[1]!.parameters as GenerateOptions) })).images;
    expect(again!.data).toEqual(images[1]!.data);
    const unguided = (await model.generate({ ...options, guidanceScale: 1 })).images[0]!.parameters;
    expect(Object.keys(unguided).filter((key) => /negative/.test(key))).toEqual([]);
    expect(images[0]!.parameters).not.toHaveProperty("prompt3");
  });

  it("embeddings go with a request as JSON", async () => {
    const promptEmbeds = await model.encode({ prompt, maxSequenceLength: 4 });
    const json = JSON.parse(JSON.stringify(await requestToJson({ promptEmbeds })));
    expect(requestFromJson(json).promptEmbeds).toEqual(promptEmbeds);
  });

  it("an abort ends encoding, and a model that is disposed encodes nothing", async () => {
    const controller = new AbortController();
    const call = model.encode({ prompt: `new ${name}`, signal: controller.signal });
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(call).rejects.toBe(reason);
    const other = await FlowTurbo.load(fixture(name, "model"), { measureCosts: false });
    await other.dispose();
    await expect(other.encode({ prompt: "x" })).rejects.toMatchObject({ code: "ERR_FLOWTURBO_DISPOSED" });
  });
});

/** compel's way of writing a weight as the other one. */
function withColons(text: string): string {
  return text.replaceAll(/([^\\])\)(\d+(?:\.\d+)?)/g, "$1:$2)");
}
