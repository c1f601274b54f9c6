// Text conditions against transformers' (the fixtures' embeds.safetensors), and what the cache and the limits do.
import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { type Prompt, PromptEncoder, promptOf } from "../../lib/generation/text.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { fixture, fixtureNames, readAll, relativeError, root } from "../support/fixtures.js";

const prompts = ["a red circle above a small blue square", "the photo of a café, 3 dogs & a cat's bowl!"];
const negative = "blurry, low quality";

describe.each(fixtureNames)("PromptEncoder on %s", (name) => {
  let graphs: GraphLibrary;
  let runtime: OnnxRuntime;
  let encoder: PromptEncoder;
  let programs = 0;
  beforeAll(async () => {
    const checkpoint = await openCheckpoint(fixture(name, "model"));
    graphs = new GraphLibrary(checkpoint);
    runtime = new OnnxRuntime({ weights: "lazy", host: new URL(`file://${root}/dist/onnxruntime-host.js`) });
    for (const { graph } of graphs.essential) runtime.add(graph);
    encoder = new PromptEncoder(graphs);
  });
  afterAll(() => runtime.dispose());

  const encode = async (texts: (string | Prompt)[], pin: number | null = null) => {
    const prompts = texts.map((text) => (typeof text === "string" ? promptOf(text) : text));
    const prepared = await encoder.prepare(prompts, 32, pin);
    const pending = await encoder.pending(prepared);
    const missing = [...pending.missing.values()];
    for (const { graph } of missing) if (!runtime.has(graph)) runtime.add(graphs.get(graph));
    programs += missing.length;
    const results = await Promise.all(missing.map(({ program }) => runtime.run(program)));
    return encoder.encoded(prepared, pending, results);
  };

  it("gives transformers' embeddings", async () => {
    const expected = await readAll(fixture(name, "embeds.safetensors"));
    const positive = encoder.stack(await encode(prompts));
    expect(relativeError(positive.context, expected.prompt_embeds!)).toBeLessThan(1e-4);
    expect(relativeError(positive.pooled, expected.pooled!)).toBeLessThan(1e-4);
    const against = encoder.stack(await encode([negative, negative]));
    expect(relativeError(against.context, expected.negative_prompt_embeds!)).toBeLessThan(1e-4);
    expect(relativeError(against.pooled, expected.negative_pooled!)).toBeLessThan(1e-4);
  });

  it("counts the tokens of the encoder that reads most, without padding, as transformers' ids have them", async () => {
    const ids: Record<string, Record<string, number[]>> = JSON.parse(
      readFileSync(fixture(name, "token_ids.json"), "utf8"),
    );
    const texts = Object.keys(ids.tokenizer_1!);
    const counts = texts.map((text) =>
      Math.max(
        ...Object.entries(ids).map(([tokenizer, all]) => {
          // What comes after the first end of text is padding; each of these was cut or padded to its length.
          const end = tokenizer === "tokenizer_3" ? 1 : 606;
          return all[text]!.indexOf(end) + 1;
        }),
      ),
    );
    expect(Math.min(...counts)).toBe(2);
    expect((await encode(texts)).map(({ tokens }) => tokens)).toEqual(counts);
    // From the cache.
    expect((await encode(texts)).map(({ tokens }) => tokens)).toEqual(counts);
  });

  const encoders = name === "sd3" ? 2 : 3;

  it("encodes a text once with each encoder", async () => {
    await encode([...prompts, negative]);
    let before = programs;
    await encode([negative, prompts[1]!, prompts[0]!, negative]);
    expect(programs).toBe(before);
    await encode([negative, "something new"]);
    expect(programs).toBe(before + encoders);
    // Other texts beside it, or the same in another place, are no reason to encode it again.
    const { texts } = promptOf("something new");
    const mixed = { texts: { ...texts, prompt2: promptOf(negative).texts.prompt2 }, clipSkip: 0 };
    before = programs;
    const [one] = await encode([mixed]);
    expect(programs).toBe(before);
    await encode([{ ...mixed, texts: { ...mixed.texts, prompt3: promptOf("for T5 alone").texts.prompt3 } }]);
    expect(programs).toBe(before + (name === "sd3" ? 0 : 1));
    // Only CLIP has other hidden states; its pooled embeddings are the same.
    before = programs;
    const [skipped] = await encode([{ ...mixed, clipSkip: 1 }]);
    expect(programs).toBe(before + 2);
    expect(skipped!.pooled).toEqual(one!.pooled);
    const of = (values: Float32Array) => float32([values.length], values);
    expect(relativeError(of(skipped!.context), of(one!.context))).toBeGreaterThan(0.01);
    // Every value is a text of its own, and all have one graph: it holds the encoder's weights once more.
    const skips = [
      { ...mixed, clipSkip: 2 },
      { ...mixed, clipSkip: 1 },
    ];
    const [further, again] = await encode(skips);
    expect(programs).toBe(before + 4);
    expect(again!.context).toEqual(skipped!.context);
    expect(relativeError(of(further!.context), of(skipped!.context))).toBeGreaterThan(0.01);
    expect(encoder.graphs.filter((graph) => graph.startsWith("clip"))).toHaveLength(4);
  });

  it("encodes anew for launches that are pinned to another batch", async () => {
    await encode(["pinned or not"]);
    const before = programs;
    const { programs: anew } = await encoder.prepare(["pinned or not", "pinned or not"].map(promptOf), 32, 4);
    expect([...anew.values()].map(({ text }) => text)).toEqual(new Array(encoders).fill("pinned or not"));
    for (const pin of [4, 4, 2, null]) await encode(["pinned or not"], pin);
    expect(programs).toBe(before + 2 * encoders);
  });

  it("asks the cache again when its turn comes: another request may have encoded the same meanwhile", async () => {
    const waiting = await encoder.prepare(["the same for two", prompts[0]!].map(promptOf), 32);
    expect(waiting.programs.size).toBe(encoders);
    const [first] = await encode(["the same for two"]);
    const pending = await encoder.pending(waiting);
    expect([...pending.missing.keys()]).toEqual([]);
    expect((await encoder.encoded(waiting, pending, []))[0]).toEqual(first);
  });

  it("says what it had to cut", async () => {
    const [short, long] = await encode(["short", `${"very ".repeat(100)}long`]);
    expect(short!.warnings).toEqual([]);
    expect(long!.warnings.length).toBe(name === "sd3" ? 2 : 3);
    expect(long!.warnings[0]).toMatch(/longer than the 77 tokens/);
    // The text that was cut is quoted in short, however long it is.
    const [endless] = await encode([`a ${"very ".repeat(1e5)}long`]);
    expect(endless!.warnings).toHaveLength(long!.warnings.length);
    for (const warning of endless!.warnings) expect(warning).toMatch(/^.{100,300}very very.*\.\.\."\.$/);
  });
});
