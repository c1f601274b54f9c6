// The published JSON Schemas, judged by another validator: they accept and refuse what requestFromJson does.
import { execFileSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { Ajv } from "ajv";
import { Ajv2020 } from "ajv/dist/2020.js";
import * as published from "flowturbo/schema";
import { describe, expect, it } from "vitest";
import { float32 } from "../lib/common/tensor.js";
import { Image } from "../lib/generation/image.js";
import { requestFromJson, requestToJson, resultFromJson, resultToJson } from "../lib/json.js";
import type { GenerateResult } from "../lib/model.js";
import { generateSchema, optionMeta } from "../lib/options.js";
import * as sources from "../lib/schema.js";
import { root } from "./support/fixtures.js";

const { requestJsonSchema, resultJsonSchema } = published;
const ajv = new Ajv2020({ strict: true, allowUnionTypes: true });
const isRequest = ajv.compile(requestJsonSchema);
const isResult = ajv.compile(resultJsonSchema);
const properties = requestJsonSchema.properties as Record<string, { description?: string; default?: unknown }>;

function isTaken(json: unknown): boolean {
  try {
    requestFromJson(json);
    return true;
  } catch {
    return false;
  }
}

describe("flowturbo/schema", () => {
  it("has the values that its source has, and no more", () => {
    expect(JSON.stringify(published)).toBe(JSON.stringify(sources));
    expect(Object.keys(published).sort()).toEqual(["requestJsonSchema", "resultJsonSchema"]);
    expect(requestJsonSchema.$schema).toBe("https://json-schema.org/draft/2020-12/schema");
  });

  it("loads no native library, no package and nothing of Node", () => {
    const dist = path.join(root, "dist");
    const importsOf = (file: string): string[] =>
      [
        ...readFileSync(path.join(dist, file), "utf8").matchAll(
          /^(?:import|export)\b[^;]*?"([^"]+)";|import\("([^"]+)"\)/gm,
        ),
      ].map(([, name, dynamic]) => name ?? dynamic!);
    const seen = new Set<string>();
    const visit = (file: string) => {
      if (seen.has(file)) return;
      seen.add(file);
      for (const name of importsOf(file)) {
        expect(name, file).toMatch(/^\.\/chunk-\w+\.js$/);
        visit(name.slice(2));
      }
    };
    visit("schema.js");
    // What is looked for is found where it is.
    const all = readdirSync(dist).filter((name) => name.endsWith(".js"));
    expect(all.flatMap(importsOf).some((name) => !name.startsWith("."))).toBe(true);

    // In a process that can load no addon, as sharp's.
    const imported = (name: string) =>
      execFileSync(
        process.execPath,
        [
          ...["--input-type=module", "--eval"],
          `process.dlopen = () => { throw new Error("an addon"); };
           await import(${JSON.stringify(name)}).then(() => console.log("yes"), () => console.log("no"));`,
        ],
        { cwd: root, encoding: "utf8" },
      ).trim();
    expect([imported("flowturbo/schema"), imported("sharp")]).toEqual(["yes", "no"]);
  });

  it("is taken by a validator of draft 7, too, without its $schema", () => {
    for (const { $schema, ...schema } of [requestJsonSchema, resultJsonSchema]) {
      const validate = new Ajv({ strict: true, allowUnionTypes: true }).compile(schema);
      expect([validate({}), typeof $schema]).toEqual([false, "string"]);
    }
  });

  it("is declared, with a comment for everything", () => {
    expect(readdirSync(path.join(root, "dist"))).toContain("schema.d.ts");
    const text = readFileSync(path.join(root, "dist/schema.d.ts"), "utf8");
    for (const declared of [
      "interface JsonSchema",
      "declare const requestJsonSchema",
      "declare const resultJsonSchema",
    ])
      expect(text).toMatch(new RegExp(`\\*/\\n${declared}`));
  });
});

/** Options that no JSON has. */
const ofTheProcess = ["signal", "onAccept", "onStart", "onStep", "allowPaths"];

describe("the schema of a request", () => {
  it("has every option but those of the same process, each with its description, its default and no word for flags", () => {
    const own = Object.keys(generateSchema.shape).filter((name) => !ofTheProcess.includes(name));
    expect(Object.keys(properties).sort()).toEqual(own.sort());
    const filled = requestFromJson({ prompt: "x" }) as unknown as Record<string, unknown>;
    for (const [name, property] of Object.entries(properties)) {
      expect(property.description, name).toMatch(/\w{3}/);
      expect(property.description, name).not.toMatch(/--|the path/);
      if (name !== "prompt") expect(property.default, name).toEqual(filled[name]);
    }
    const keywords = new Set(JSON.stringify(requestJsonSchema).match(/"\w+":/g));
    for (const ours of Object.keys(optionMeta(generateSchema.shape.keepOriginal)).filter(
      (key) => key !== "description",
    ))
      expect(keywords).not.toContain(`"${ours}":`);
  });

  const tensor = (shape: number[], bytes: number) => ({
    dtype: "float32",
    shape,
    data: Buffer.alloc(bytes).toString("base64"),
  });
  const rgb = { width: 1, height: 1, data: "AAAA" };
  const stage = { width: 64, height: 64, blocks: "H1" };
  /** Values that some option takes and others refuse. */
  const values: unknown[] = [
    ...[
      null,
      true,
      false,
      0,
      -0,
      1,
      -1,
      2,
      0.5,
      1.5,
      64,
      100,
      101,
      -100,
      -101,
      255,
      256,
      257,
      512,
      513,
      1000,
      1001,
      1024,
      1025,
    ],
    ...[2 ** 31, 2 ** 31 + 1, 2 ** 53 - 4097, 2 ** 53 - 4096, 2 ** 53 - 1, 2 ** 53, 1e300, 1e-300],
    ...[
      "",
      "x",
      "full",
      "parameters",
      "false",
      "euler",
      "heun",
      "flowturbo",
      "Euler",
      "shifted",
      "diffusers",
      "fast",
      "latent",
      "6687881544318117707",
      ["6687881544318117707", 7],
      "decoded",
      "H1P9",
      "cfg_zero",
      "balanced",
      "karras",
    ],
    ...[
      "AAAA",
      "A",
      "AA==",
      "AA=",
      "1",
      "/etc/passwd",
      "each",
      "bunched",
      "quality",
      ["latents"],
      ["pixels", "latents"],
      ["rgb"],
      [1, 0.5, 0],
      [0.5, 2000],
    ],
    ...[[], [""], ["x", "y"], [1], [null], [[]], Array(64).fill("H1"), Array(65).fill("H1")],
    ...[
      {},
      { file: "AAAA" },
      { file: "" },
      { file: "A" },
      { file: "!" },
      { file: 1 },
      { file: "AAAA", more: 1 },
      { path: "/etc/passwd" },
    ],
    ...[
      rgb,
      { ...rgb, width: 0 },
      { ...rgb, width: 1.5 },
      { ...rgb, more: 1 },
      { ...rgb, parameters: {} },
      { width: 1, height: 1 },
    ],
    ...[
      [stage],
      [stage, { ...stage, sigma: 0.5 }],
      [{ ...stage, sigma: null }],
      [{ ...stage, more: 1 }],
      [{ width: 64 }],
      stage,
    ],
    ...[
      { layers: [7, 8, 9] },
      { layers: [0], scale: 2.8, start: 0, stop: 1 },
      { layers: [1], stop: 2 },
      { layers: [1.5] },
      { layers: [], scale: 1 },
      { layers: [1], more: 1 },
      { scale: 1 },
    ],
    ...[
      [{ name: "ink" }, { name: "b", scale: -1 }],
      [{ name: "" }],
      [{ name: "ink", file: "a.safetensors" }],
      [{ name: "ink", scale: 101 }],
      [{ folder: "canny", image: { file: "AAAA" }, scale: 0.8, start: 0, stop: 0.7, preprocess: "canny" }],
      [{ folder: "a", image: rgb, mask: { file: "AAAA" }, pixelRange: "stability_canny" }],
      [{ folder: "canny", image: "/etc/passwd" }],
      [{ folder: "canny" }],
      [{ image: rgb }],
      [{ folder: "canny", image: rgb, preprocess: "depth" }],
      [{ folder: "canny", image: rgb, more: 1 }],
    ],
    ...[
      tensor([1], 4),
      [tensor([1], 4), tensor([2, 1], 8)],
      tensor([0], 0),
      tensor([], 4),
      { ...tensor([1], 4), dtype: "float16" },
    ],
    ...[
      { promptEmbeds: tensor([1], 4), pooledPromptEmbeds: tensor([1], 4), tokens: 3, warnings: [""] },
      { promptEmbeds: tensor([1], 4), pooledPromptEmbeds: tensor([1], 4), negativePromptEmbeds: null },
      { promptEmbeds: tensor([1], 4) },
      { ...tensor([1], 4), shape: [-1] },
      { ...tensor([1], 4), shape: [0.5] },
      { ...tensor([1], 4), more: 1 },
    ],
  ];

  it("agrees with requestFromJson on each option and many values", () => {
    const taken: Record<string, number> = {};
    for (const name of [...Object.keys(properties), ...ofTheProcess, "model", "__proto__"])
      for (const value of values) {
        const json = JSON.parse(`{ "prompt": "x", ${JSON.stringify(name)}: ${JSON.stringify(value)} }`);
        const expected = isTaken(json);
        expect(isRequest(json), `${name}: ${JSON.stringify(value)}`).toBe(expected);
        taken[name] ??= 0;
        if (expected) taken[name]++;
      }
    // Both sets have members, for every option.
    for (const name of Object.keys(properties)) {
      expect(taken[name], name).toBeGreaterThan(0);
      expect(taken[name], name).toBeLessThan(values.length);
    }
    expect([taken.signal, taken.onStep, taken.allowPaths, taken.model]).toEqual([0, 0, 0, 0]);
  });

  it("agrees with it on whole requests", async () => {
    for (const json of [...values, {}, { negativePrompt: "x" }, [{ prompt: "x" }]])
      expect(isRequest(json), JSON.stringify(json)).toBe(isTaken(json));
    const picture = new Image(2, 2, new Uint8Array(12));
    for (const request of [
      { prompt: "x" },
      { prompt: ["x", "y"], negativePrompt: ["", "z"], count: 2, seed: 7, metadata: false, priority: -3 } as const,
      { prompt: "x", image: await picture.toPNG(), mask: picture, strength: 0.5, keepOriginal: false },
      { prompt: "x", noise: float32([1, 1, 2, 2], new Float32Array(4)), deadlineMs: 10.5, ladder: ["H1"] },
      { prompt: "x", stages: [stage, { ...stage, sigma: 0.5 }] },
      {
        promptEmbeds: {
          promptEmbeds: float32([1], new Float32Array(1)),
          pooledPromptEmbeds: float32([], new Float32Array(1)),
        },
      },
    ]) {
      const json = JSON.parse(JSON.stringify(await requestToJson(request)));
      expect([isRequest(json), isTaken(json)]).toEqual([true, true]);
    }
  });

  it("leaves to requestFromJson how many bytes a size asks for, as it says", () => {
    for (const json of [
      { prompt: "x", image: { width: 2, height: 2, data: "AAAA" } },
      { prompt: "x", noise: tensor([2], 4) },
    ])
      expect([isRequest(json), isTaken(json)]).toEqual([true, false]);
  });
});

it("the schema of a result agrees with resultFromJson", () => {
  const tensor = float32([1, 1, 2, 2], new Float32Array(4));
  const result: GenerateResult = {
    images: [new Image(1, 1, new Uint8Array(3), { prompt: "x", stages: [{ width: 1 }], none: null })],
    ...{ latents: tensor, pixels: tensor, seeds: [1], width: 1, height: 1, blocks: "H1", sigmas: [1, 0] },
    stages: [{ width: 1, height: 1, blocks: "H1", sigmas: [1, 0] }],
    evaluations: { predictor: 2, refiner: 0, rows: 4 },
    tokens: { text: 5, image: 1 },
    timings: { load: 1, queue: 1, encode: 1, steps: [1], upscale: 1, edit: 1, decode: 1, total: 1 },
    deadline: null,
    warnings: [],
  };
  const json = JSON.parse(JSON.stringify(resultToJson(result)));
  expect(isResult(json), JSON.stringify(isResult.errors)).toBe(true);
  for (const name of Object.keys(json))
    for (const value of [undefined, null, 1, "x", [1], {}]) {
      const wrong = JSON.parse(JSON.stringify({ ...json, [name]: value }));
      let isRead = true;
      try {
        resultFromJson(wrong);
      } catch {
        isRead = false;
      }
      expect(isResult(wrong), `${name}: ${JSON.stringify(value)}`).toBe(isRead);
    }
});
