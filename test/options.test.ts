// What options may be that no one of good will gives: an error that names the option, in little time.

import { describe, expect, it } from "vitest";
import { OptionError } from "../lib/errors.js";
import { requestFromJson } from "../lib/json.js";
import { checkOptions, compileSchema, generateSchema, profileSchema } from "../lib/options.js";

const check = (options: object) => checkOptions(generateSchema, { prompt: "x", ...options }, "generate()");
const refusal = (options: object) => {
  try {
    check(options);
  } catch (error) {
    return error as OptionError;
  }
  throw new Error("nothing was refused");
};
const circular: Record<string, unknown> = { name: "me" };
circular.self = circular;

describe("a value of the wrong kind", () => {
  it.each([
    ["a bigint", "steps", 1n, /for steps but received 1n\.$/],
    ["a symbol", "seed", Symbol("s"), /for seed but received Symbol\(s\)\.$/],
    ["a function", "seed", () => 1, /received a function\.$/],
    ["a string", "steps", "4", /received "4"\.$/],
    ["a long string", "seed", "4".repeat(1e6), /received "4{76}\.\.\.\.$/],
    ["an object that holds itself", "seed", circular, /for seed but received .*name: 'me'/],
    ["an object whose toJSON() throws", "seed", { toJSON: () => JSON.parse("{") }, /for seed but received/],
    ["an object with a long one", "seed", { in: Object.fromEntries(new Array(1e5).entries()) }, /{ in: \[Object\] }/],
    ["a list with a bigint", "ladder", [1n], /for ladder\[0\] but received 1n\.$/],
    ["floats for noise", "noise", new Float32Array(4), /tensor .* for noise but received Float32Array\(4\)/],
    ["many floats for noise", "noise", new Float32Array(1e7), /for noise but received Float32Array\(10000000\)/],
    ["bytes for a prompt", "prompt", new Uint8Array(3), /for prompt but received Uint8Array\(3\)/],
    ["a buffer for stages", "stages", Buffer.from("abc"), /for stages but received .*Buffer/],
    ["bytes for include", "include", new Uint8Array(3), /for include but received Uint8Array\(3\)/],
  ])("is named: %s", (_, option, value, message) => {
    const error = refusal({ [option]: value });
    expect(error).toBeInstanceOf(OptionError);
    expect(error.option).toBe(option);
    expect(error.message).toMatch(message);
    expect(error.message.length).toBeLessThan(400);
  });

  const control = { folder: "lines", image: "a.png" };
  it.each([
    [
      "controls",
      [control, { ...control, scale: 1e6 }],
      "Expected a number from -100 to 100 for controls[1].scale but received 1000000.",
    ],
    ["controls", [{ ...control, start: 1.2 }], "Expected a number from 0 to 1 for controls[0].start but received 1.2."],
    [
      "controls",
      [{ ...control, preprocess: "depth" }],
      'Expected "canny" for controls[0].preprocess but received "depth".',
    ],
    [
      "controls",
      [{ folder: "lines" }],
      /^Expected the path of a picture, .* for controls\[0\]\.image but received undefined\.$/,
    ],
    [
      "controls",
      [{ ...control, strength: 1 }],
      /^controls\[0\] has no field "strength"; it has folder, image, .*pixelRange\.$/,
    ],
    ["controls", [null], /^Expected an array of 1 to 8 of \{ folder, .* for controls but received \[ null \]\.$/],
    ["controls", [], /^Expected an array of 1 to 8 of .* but received \[\]\.$/],
    ["loras", [], /^Expected an array of 1 to 64 of \{ name, scale\? \}, .* for loras but received \[\]\.$/],
    ["loras", new Array(65).fill({ name: "ink" }), /^Expected an array of 1 to 64 of .* for loras but received /],
    ["skipLayers", { layers: [1], scale: -1 }, "Expected a number from 0 to 100 for skipLayers.scale but received -1."],
    [
      "skipLayers",
      { layers: [1.5] },
      /^Expected a list of numbers of blocks .* for skipLayers\.layers but received \[ 1\.5 \]\.$/,
    ],
    ["skipLayers", { layers: [1], end: 1 }, 'skipLayers has no field "end"; it has layers, scale, start, stop.'],
    [
      "stages",
      [{ width: 64, height: 64, blocks: "E", upscale: "x" }],
      'Expected "pixels" or "latents" for stages[0].upscale but received "x".',
    ],
  ])("is named by the field that is wrong: %s %j", (option, value, message) => {
    const error = refusal({ [option]: value });
    expect(error.option).toBe(option);
    if (typeof message === "string") expect(error.message).toBe(message);
    else expect(error.message).toMatch(message);
  });

  it("is named where an option of another function is a list", () => {
    for (const [schema, option] of [
      [profileSchema, "sizes"],
      [profileSchema, "batches"],
      [compileSchema, "targets"],
      [compileSchema, "features"],
    ] as const)
      expect(() => checkOptions(schema, { [option]: new Float32Array(4) }, "test")).toThrow(
        expect.objectContaining({ code: "ERR_FLOWTURBO_OPTION", option }),
      );
  });

  it.each([12, "16"])("is refused with the numbers that there are, which are no strings: %j", (lorasRank) => {
    expect(() => checkOptions(compileSchema, { lorasRank }, "test")).toThrow(
      `Expected 8, 16, 32, 64 or 128 for lorasRank but received ${JSON.stringify(lorasRank)}.`,
    );
  });

  it("is left as it is", () => {
    const [stages, prompt] = [{}, ["a"]];
    refusal({ stages });
    check({ prompt });
    expect([Object.isFrozen(stages), Object.isFrozen(prompt)]).toEqual([false, false]);
  });
});

describe("a list or an object that is absurdly long", () => {
  let reads = 0;
  /** Counts what is read of it: each entry has an issue otherwise, which takes seconds and gigabytes. */
  const counted = <T extends object>(value: T): T =>
    new Proxy(value, {
      get(target, key, receiver) {
        reads++;
        return Reflect.get(target, key, receiver);
      },
    });
  const zeros = counted(new Array(4e6).fill(0));
  const fields = counted(Object.fromEntries(Array.from({ length: 1e5 }, (_, i) => [`name${i}`, 0])));
  const cases: [string, object, RegExp][] = [
    ["prompt", { prompt: zeros }, /at most 1024 entries for prompt but received 4000000\./],
    ["negativePrompt", { negativePrompt: zeros }, /entries for negativePrompt/],
    ["stages", { stages: zeros }, /entries for stages/],
    ["noise", { noise: zeros }, /entries for noise/],
    ["noise", { noise: { dtype: "float32", shape: zeros, data: "" } }, /at most 16 dimensions in a shape of noise/],
    ["noise", { noise: [{ dtype: "float32", shape: zeros, data: "" }] }, /dimensions in a shape of noise/],
    ["promptEmbeds", { promptEmbeds: { warnings: zeros } }, /entries for promptEmbeds.warnings/],
    [
      "promptEmbeds",
      { promptEmbeds: { pooledPromptEmbeds: { shape: zeros } } },
      /dimensions in a shape of promptEmbeds/,
    ],
    ["ladder", { ladder: zeros }, /entries for ladder/],
    ["seed", { seed: zeros }, /entries for seed/],
    ["options", fields, /at most 1000 options but received/],
    ["image", { image: fields }, /at most 1000 fields for image/],
    ["noise", { noise: fields }, /at most 1000 fields for noise/],
    ["stages", { stages: [fields] }, /at most 1000 fields for stages/],
  ];

  it.each(cases)("%s is refused before its entries are read", (option, options, message) => {
    const request = counted({ prompt: "x", ...options });
    for (const refuse of [() => check(options), () => requestFromJson(request)]) {
      reads = 0;
      expect(refuse).toThrow(expect.objectContaining({ option, message: expect.stringMatching(message) }));
      // `check` itself reads each of the options once.
      expect(reads).toBeLessThan(5000 + Object.keys(options).length);
    }
  });

  it("is no request either", () => {
    for (const json of [zeros, "x".repeat(1e7)]) expect(() => requestFromJson(json)).toThrow(OptionError);
    expect(() => check(zeros)).toThrow(OptionError);
  });

  it("of names that are no options has a short message", () => {
    const many = Object.fromEntries(Array.from({ length: 900 }, (_, i) => [`name${i}`, 0]));
    for (const refuse of [() => check(many), () => requestFromJson({ prompt: "x", ...many })])
      expect(refuse).toThrow(expect.objectContaining({ message: expect.stringMatching(/^.{20,2000}$/) }));
  });

  it("is one that is not too long by what a call may have", () => {
    expect(check({ prompt: new Array(1024).fill("x") }).prompt).toHaveLength(1024);
  });
});

it("a schedule is bounded wherever there is one", () => {
  const blocks = "H".repeat(6e6);
  for (const options of [{ blocks }, { ladder: [blocks] }, { stages: [{ width: 64, height: 64, blocks }] }]) {
    expect(refusal(options)).toBeInstanceOf(OptionError);
    expect(() => requestFromJson({ prompt: "x", ...options })).toThrow(OptionError);
  }
});
