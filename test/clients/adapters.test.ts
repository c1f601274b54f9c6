// LoRAs, ControlNets and skip-layer guidance through the AI SDK, a server, and the Model Context Protocol: what the model is asked for. The
// model records what it is asked.
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { APICallError, InvalidArgumentError } from "@ai-sdk/provider";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { InMemoryTransport } from "@modelcontextprotocol/sdk/inMemory.js";
import { generateImage } from "ai";
import sharp from "sharp";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { readOptions } from "../../lib/ai/options.js";
import { createFlowTurbo, type FlowTurboImageOptions } from "../../lib/ai.js";
import { adapterNames } from "../../lib/cli/adapters.js";
import { localDrawer } from "../../lib/clients/local.js";
import { FlowTurbo, type GenerateOptions, type ImageModel } from "../../lib/index.js";
import { createMcpServer } from "../../lib/mcp/server.js";
import { toolSchemas } from "../../lib/mcp/tools.js";
import { createServer } from "../../lib/server/index.js";
import { stubModel } from "../server/stub.js";
import { fixture } from "../support/fixtures.js";
import { original, pixelsIn, pixelsOf, transparentMask, whiteMask } from "./pictures.js";

(globalThis as { AI_SDK_LOG_WARNINGS?: boolean }).AI_SDK_LOG_WARNINGS = false;

const adapters = { loras: ["ink", "few-steps"], controlNets: ["canny", "inpainting"] };
let asked: GenerateOptions[] = [];
const stub = stubModel({ side: 8 });
const model: ImageModel = {
  ...{ ...stub, adapters },
  generate: (options) => {
    asked.push(options);
    return stub.generate(options);
  },
};

let app: Awaited<ReturnType<typeof createServer>>;
let baseURL: string;
let folder: string;
let edges: Buffer;
let mask: Buffer;
beforeAll(async () => {
  app = await createServer({ models: { stub: model }, warm: [], page: false, logger: false });
  baseURL = await app.listen({ port: 0 });
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-controls-"));
  edges = await original();
  mask = await transparentMask();
});
afterAll(async () => {
  await app.close();
  rmSync(folder, { recursive: true, force: true });
});
beforeEach(() => {
  asked = [];
});

const skipLayers = { layers: [7, 8, 9], scale: 2.5, start: 0.01, stop: 0.3 };
const loras = [{ name: "ink", scale: 0.7 }, { name: "few-steps" }];
const interval = { scale: 0.8, start: 0.1, stop: 0.7 };
/** That the model was asked for all of it once, the mask white where it is painted. */
async function expectAsked(): Promise<void> {
  expect(asked).toHaveLength(1);
  const { controls, ...options } = asked[0]!;
  expect(options).toMatchObject({ loras, skipLayers, allowPaths: false });
  const [canny, inpainting] = controls!;
  expect({ ...canny, image: Buffer.from(canny!.image as Uint8Array) }).toEqual({
    ...{ folder: "canny", image: edges, preprocess: "canny", pixelRange: "stability_canny" },
    ...interval,
  });
  expect(inpainting).toMatchObject({ folder: "inpainting", image: expect.anything() });
  const read = await sharp(inpainting!.mask as Buffer)
    .greyscale()
    .raw()
    .toBuffer();
  const expected = await sharp(await whiteMask())
    .greyscale()
    .raw()
    .toBuffer();
  expect(Buffer.compare(read, expected)).toBe(0);
}

describe("the AI SDK", () => {
  const flowturbo = () =>
    ({
      ...{ numInferenceSteps: 3, loras, skipLayers },
      controls: [
        {
          name: "canny",
          image: `data:image/png;base64,${edges.toString("base64")}`,
          ...interval,
          preprocess: "canny",
          pixelRange: "stability_canny",
        },
        { name: "inpainting", image: edges.toString("base64"), mask: mask.toString("base64") },
      ],
    }) satisfies FlowTurboImageOptions;

  it.each([
    ["in this process", () => createFlowTurbo({ model })],
    ["at a server", () => createFlowTurbo({ baseURL })],
  ])("passes all of it on: %s", async (_, provider) => {
    await generateImage({ model: provider().image(), prompt: "x", providerOptions: { flowturbo: flowturbo() } });
    await expectAsked();
  });

  it("says which picture a mask of a control is", async () => {
    const [canny] = flowturbo().controls;
    const controls = [{ ...canny!, mask: Buffer.from("no picture").toString("base64") }];
    const draw = (provider: ReturnType<typeof createFlowTurbo>) =>
      generateImage({ model: provider.image(), prompt: "x", providerOptions: { flowturbo: { controls } } }).then(
        () => expect.fail("no error"),
        (error: unknown) => error,
      );
    for (const provider of [createFlowTurbo({ model }), createFlowTurbo({ baseURL })]) {
      const error = await draw(provider);
      expect(APICallError.isInstance(error) && error.statusCode).toBe(400);
      expect(error).toMatchObject({ message: expect.stringMatching(/controls\.0\.mask|mask of a control/) });
      // Errors are printed: they hold no pictures.
      expect(JSON.stringify((error as APICallError).requestBodyValues).length).toBeLessThan(2000);
    }
    expect(asked).toEqual([]);
  });

  it.each<[string, unknown, RegExp]>([
    ["loras", [{ name: "a", file: "b" }], /Expected an array of 1 to 64 of \{ name, scale\? \}/],
    ["loras", [], /for providerOptions\.flowturbo\.loras but received/],
    ["skipLayers", [7, 8, 9], /\{ layers, scale\?, start\?, stop\? \}/],
    ["controls", [{ name: "canny" }], /up to 8 of \{ name, image, .*base64 or data: URLs, for providerOptions/],
    ["controls", [{ folder: "canny", image: "AAAA" }], /up to 8/],
    ["controls", [{ name: "canny", image: "./edges.png" }], /up to 8/],
    ["controls", Array(9).fill({ name: "canny", image: "AAAA" }), /up to 8/],
    ["lora", [], /Did you mean loras\?/],
    ["controlnet", [], /Did you mean controls\?/],
    ["skip_layers", {}, /Did you mean skipLayers\?/],
    ["skip_guidance_layers", {}, /Did you mean skipLayers\?/],
  ])("refuses what is wrong: %s %j", (name, value, message) => {
    try {
      readOptions({ [name]: value });
    } catch (error) {
      expect(InvalidArgumentError.isInstance(error)).toBe(true);
      return expect((error as Error).message).toMatch(message);
    }
    expect.fail("no error");
  });
});

describe("the Model Context Protocol", () => {
  let client: Client;
  beforeAll(async () => {
    const ending = new AbortController();
    const server = await createMcpServer({
      ...{ drawer: localDrawer(() => model), model: "stub", adapters, outputs: null, format: "png" },
      signal: ending.signal,
    });
    client = new Client({ name: "test", version: "1" });
    const [ours, theirs] = InMemoryTransport.createLinkedPair();
    await Promise.all([server.connect(theirs), client.connect(ours)]);
    writeFileSync(path.join(folder, "edges.png"), edges);
    writeFileSync(path.join(folder, "mask.png"), mask);
  });
  afterAll(() => client.close());

  it.each(["generate", "edit"])("passes all of it on, with pictures by their paths: %s", async (name) => {
    const controls = [
      {
        name: "canny",
        image: path.join(folder, "edges.png"),
        ...interval,
        preprocess: "canny",
        pixel_range: "stability_canny",
      },
      { name: "inpainting", image: edges.toString("base64"), mask: path.join(folder, "mask.png") },
    ];
    const given = { prompt: "x", steps: 3, loras, skip_layers: skipLayers, controls };
    const image = name === "edit" && { image: path.join(folder, "edges.png") };
    const { isError, content } = await client.callTool({ name, arguments: { ...given, ...image } });
    expect([isError, content]).toEqual([undefined, expect.anything()]);
    await expectAsked();
  });

  it("says which file of a control cannot be read", async () => {
    const controls = [{ name: "canny", image: "/no/such.png" }];
    const { isError, content } = await client.callTool({ name: "generate", arguments: { prompt: "x", controls } });
    expect(isError).toBe(true);
    expect((content as { text: string }[])[0]!.text).toMatch(
      /"\/no\/such.png" for controls\[0\]\.image cannot be read/,
    );
    expect(asked).toEqual([]);
  });

  it("tells the names, and has no fields for what there is none of", async () => {
    const { tools } = await client.listTools();
    // Words for messages are no keywords of schemas.
    expect(JSON.stringify(tools).match(/"(expects|flag|help)":/)).toBeNull();
    for (const { inputSchema } of tools) {
      const { loras: ofLoras, controls } = inputSchema.properties as Record<string, { description: string }>;
      expect(ofLoras!.description).toMatch(/Names: "ink", "few-steps"\.$/);
      expect(controls!.description).toMatch(/Names: "canny", "inpainting"\.$/);
    }
    const fields = (names: Parameters<typeof toolSchemas>[2]) => {
      const { generate } = toolSchemas("x", false, names);
      return ["loras", "controls", "skip_layers"].filter(
        (name) =>
        generate.input.safeParse({ prompt: "x", [name]: name === "skip_layers" ? { layers: [1] } : [{ name: "a", image: "b" }].map(({ image, ...rest }) => (name === "controls" ? { ...rest, image } : rest)) }).success, // biome-ignore format: one line
      );
    };
    expect(fields(null)).toEqual(["loras", "controls", "skip_layers"]);
    expect(fields({ loras: [], controlNets: [] })).toEqual(["skip_layers"]);
    expect(fields({ loras: ["a"], controlNets: [] })).toEqual(["loras", "skip_layers"]);
  });

  it("knows the names of the flags before anything is loaded", async () => {
    const given = [
      { file: "./a/ink.safetensors", dynamic: true },
      { file: "b.safetensors", name: "few", dynamic: true },
      { file: "merged.safetensors" },
      { file: "./styles/pastel/pytorch_lora_weights.safetensors", dynamic: true },
    ];
    const controlNets = [{ folder: "./nets/canny/" }, { folder: "x", name: "depth" }];
    expect(await adapterNames({ loras: given, controlNets })).toEqual({
      loras: ["ink", "few", "pastel"],
      controlNets: ["canny", "depth"],
    });
    expect(await adapterNames({})).toEqual({ loras: [], controlNets: [] });
  });
});

it("a model with a LoRA and a ControlNet draws the same for all of them", async () => {
  const file = fixture("sd3", "adapters/lora_a.safetensors");
  const real = await FlowTurbo.load(fixture("sd3", "model"), {
    loras: [{ file, name: "ink", dynamic: true }],
    controlNets: [{ folder: fixture("sd3", "controlnet"), name: "lines" }],
    measureCosts: false,
  });
  expect(real.adapters).toEqual({ loras: ["ink"], controlNets: ["lines"] });
  const server = await createServer({ models: { real }, warm: [], page: false, logger: false });
  try {
    const address = await server.listen({ port: 0 });
    const shared = { loras: [{ name: "ink", scale: 0.7 }], quality: "fast" as const, guidanceScale: 3 };
    const own = { prompt: "a red circle", seed: 7, width: 64, height: 64, maxSequenceLength: 32 };
    const control = { scale: 0.8, stop: 0.7 };
    const expected = await real.generate({
      ...{ ...own, ...shared },
      controls: [{ folder: "lines", image: edges, ...control }],
    });
    const controls = [{ name: "lines", image: edges.toString("base64"), ...control }];
    for (const provider of [createFlowTurbo({ model: real }), createFlowTurbo({ baseURL: address })]) {
      const flowturbo = { ...shared, controls, maxSequenceLength: 32 };
      const call = { model: provider.image(), prompt: own.prompt, seed: 7, size: "64x64" as const };
      const { image } = await generateImage({ ...call, providerOptions: { flowturbo } });
      expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[0]!));
      // Each has an effect, and a path is no name.
      const { image: plain } = await generateImage({ ...call, providerOptions: { flowturbo: { ...flowturbo, loras: undefined } } }); // biome-ignore format: one line
      expect(await pixelsOf(plain.uint8Array)).not.toEqual(pixelsIn(expected.images[0]!));
      const named = [{ ...controls[0]!, name: fixture("sd3", "controlnet_own") }];
      const refused = await generateImage({ ...call, providerOptions: { flowturbo: { ...flowturbo, controls: named } } }).catch((reason) => reason); // biome-ignore format: one line
      expect(APICallError.isInstance(refused) && refused.statusCode).toBe(400);
      expect(refused.message).toMatch(/There is no ControlNet/);
    }
  } finally {
    await server.close();
    await real.dispose();
  }
}, 60_000);

it("skip-layer guidance draws what the library draws, in this process", async () => {
  const shapes = await FlowTurbo.load(undefined, { measureCosts: false });
  try {
    const options = { skipLayers: { layers: [1, 3], scale: 1.5, stop: 0.9 }, guidanceScale: 2 };
    const { image } = await generateImage({
      ...{ model: createFlowTurbo({ model: shapes }).image(), prompt: "a red circle", seed: 7 },
      providerOptions: { flowturbo: { ...options, numInferenceSteps: 3 } },
    });
    const plain = { prompt: "a red circle", seed: 7, steps: 3 };
    const expected = await shapes.generate({ ...plain, ...options });
    expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[0]!));
    const without = await shapes.generate({ ...plain, guidanceScale: 2 });
    expect(without.images[0]!.data).not.toEqual(expected.images[0]!.data);
  } finally {
    await shapes.dispose();
  }
});
