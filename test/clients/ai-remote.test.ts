// The provider for the AI SDK against a server, over HTTP.
import { once } from "node:events";
import { createServer as createHttpServer, type RequestListener, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { APICallError } from "@ai-sdk/provider";
import { generateImage } from "ai";
import type { FastifyInstance } from "fastify";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { createFlowTurbo } from "../../lib/ai.js";
import { FlowTurbo, type GenerateOptions } from "../../lib/index.js";
import { createServer } from "../../lib/server/index.js";
import {
  expectTextOptions,
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
let app: FastifyInstance;
let baseURL: string;
beforeAll(async () => {
  model = await FlowTurbo.load(undefined, { measureCosts: false });
  app = await createServer({
    models: { shapes: model },
    apiKeys: ["secret"],
    maxImages: 3,
    page: false,
    logger: false,
  });
  baseURL = await app.listen({ port: 0 });
  await vi.waitFor(async () => expect((await fetch(`${baseURL}/readyz`)).status).toBe(200), 30_000);
});
afterAll(async () => {
  await app.close();
  await model.dispose();
});
afterEach(() => vi.unstubAllEnvs());

const few = { numInferenceSteps: 3, guidanceScale: 2 };
const provider = () => createFlowTurbo({ baseURL, apiKey: "secret" });
const draw = (options: Partial<Parameters<typeof generateImage>[0]> = {}, from = provider().image()) =>
  generateImage({ model: from, prompt: "a red circle", seed: 7, providerOptions: { flowturbo: few }, ...options });
const direct = (options: Partial<GenerateOptions> = {}) =>
  model.generate({ prompt: "a red circle", steps: 3, guidanceScale: 2, seed: 7, ...options });
const failure = (call: Promise<unknown>): Promise<APICallError> =>
  call.then(
    () => expect.fail("no error"),
    (error) => {
      if (!APICallError.isInstance(error)) throw error;
      return error;
    },
  );

describe("a server", () => {
  it("draws what the model draws, more pictures than it takes in one request too", async () => {
    const { images, providerMetadata, responses, usage } = await draw({ n: 4 });
    const expected = await direct({ count: 4 });
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[index]!));
    expect(providerMetadata.flowturbo?.images).toMatchObject(
      expected.seeds.map((seed) => ({ seed, blocks: expected.blocks, evaluations: expected.evaluations })),
    );
    expect(responses[0]!.headers).toHaveProperty("x-request-id");
    expect(usage.outputTokens).toBe(4 * expected.tokens.image);
  });

  it("is told all options", async () => {
    const flowturbo = {
      ...{ quality: "fast", negativePrompt: "blue", guidanceScale: 2 },
      ...{ outputFormat: "webp", outputCompression: 80 },
    } as const;
    const { image, warnings } = await draw({ aspectRatio: "16:9", providerOptions: { flowturbo } });
    expect(image.mediaType).toBe("image/webp");
    const expected = await direct({
      ...{ steps: undefined, quality: "fast", negativePrompt: "blue", width: 80, height: 48 },
    });
    const file = await expected.images[0]!.encode("webp", { quality: 80 });
    expect(await pixelsOf(image.uint8Array)).toEqual(await pixelsOf(file));
    expect(warnings).toMatchObject([{ type: "compatibility", feature: "aspectRatio" }]);
    const euler = await draw({ providerOptions: { flowturbo: { ...few, sampler: "euler" } } });
    const expectedEuler = await direct({ sampler: "euler" });
    expect(await pixelsOf(euler.image.uint8Array)).toEqual(pixelsIn(expectedEuler.images[0]!));
    const blocks = await draw({ providerOptions: { flowturbo: { blocks: "H1P2", guidanceScale: 2 } } });
    const expectedBlocks = await direct({ steps: undefined, blocks: "H1P2" });
    expect(await pixelsOf(blocks.image.uint8Array)).toEqual(pixelsIn(expectedBlocks.images[0]!));
    const staged = [
      { width: 64, height: 64, blocks: "H1P1" },
      { width: 128, height: 128, blocks: "H1", sigma: 0.5 },
    ];
    const large = await draw({ providerOptions: { flowturbo: { stages: staged, guidanceScale: 2 } } });
    const expectedLarge = await direct({ steps: undefined, stages: staged });
    expect(await pixelsOf(large.image.uint8Array)).toEqual(pixelsIn(expectedLarge.images[0]!));
  });

  it("is told how texts are encoded", () =>
    expectTextOptions(async (name) => {
      const own = name === null ? {} : { [name]: textOptions[name] };
      return (await draw({ prompt: textPrompt, providerOptions: { flowturbo: { ...few, ...own } } })).image.uint8Array;
    }, direct));

  it("draws a seed for each picture, of more than it takes in one request too", async () => {
    const seeds = [9, "6687881544318117707", 3, 1];
    const providerOptions = { flowturbo: { ...few, seeds } };
    const { images, providerMetadata } = await draw({ n: 4, seed: undefined, providerOptions } as object);
    const expected = await direct({ seed: undefined, seeds, count: 4 });
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn(expected.images[index]!));
    expect(providerMetadata.flowturbo?.images).toMatchObject(seeds.map((seed) => ({ seed })));
  });

  it("draws what surrounds a mask", async () => {
    const { image, mask } = await widePicture();
    const providerOptions = { flowturbo: { ...few, paddingMaskCrop: 8 } };
    const edited = await draw({ prompt: { images: [image], text: "a red circle", mask }, providerOptions });
    const expected = await direct({ image, mask, strength: 1, paddingMaskCrop: 8 });
    expect(await pixelsOf(edited.image.uint8Array)).toEqual(pixelsIn(expected.images[0]!));
    expect(expected).toMatchObject({ width: 128, height: 64 });
  });

  it.each([
    ["white", whiteMask],
    ["transparent", transparentMask],
  ])("edits where the mask is %s", async (_, mask) => {
    const image = await original();
    const edited = await draw({ prompt: { images: [image], text: "a red circle", mask: await mask() } });
    const expected = await direct({ image, mask: await whiteMask(), strength: 1 });
    expect(await pixelsOf(edited.image.uint8Array)).toEqual(pixelsIn(expected.images[0]!));
  });

  it("ends the work when the call is aborted", async () => {
    const controller = new AbortController();
    const before = model.stats().requests.aborted;
    const call = draw({
      ...{ abortSignal: controller.signal, size: "256x256" },
      providerOptions: { flowturbo: { numInferenceSteps: 50 } },
    });
    call.catch(() => {});
    await expect.poll(() => model.stats().running.requests).toBe(1);
    controller.abort();
    await expect(call).rejects.toMatchObject({ name: "AbortError" });
    await expect.poll(() => model.stats().running.requests).toBe(0);
    expect(model.stats().requests.aborted).toBe(before + 1);
  });

  it("names what is wrong, and is asked once", async () => {
    const error = await failure(draw({ size: "60x64" }));
    expect(error).toMatchObject({
      ...{ statusCode: 400, isRetryable: false, url: `${baseURL}/v1/images/generations` },
      ...{ requestBodyValues: { prompt: "a red circle", size: "60x64" }, data: { error: { param: "size" } } },
    });
    expect(error.responseHeaders).toHaveProperty("x-request-id");
    expect(error.responseBody).toContain("size");
    expect((await failure(draw({}, provider().image("flux")))).statusCode).toBe(404);
  });

  it("wants a key, which may be in the environment", async () => {
    vi.stubEnv("FLOWTURBO_API_KEY", "");
    const bare = createFlowTurbo({ baseURL: `${baseURL}/v1/` });
    expect(await failure(draw({}, bare.image()))).toMatchObject({ statusCode: 401, isRetryable: false });
    vi.stubEnv("FLOWTURBO_API_KEY", "secret");
    const { image } = await draw({}, createFlowTurbo({ baseURL: `${baseURL}/v1/` }).image("shapes"));
    expect(await pixelsOf(image.uint8Array)).toEqual(pixelsIn((await direct()).images[0]!));
  });
});

describe("a server that does not draw", () => {
  const servers: Server[] = [];
  const serving = async (listener: RequestListener) => {
    const server = createHttpServer(listener).listen(0, "127.0.0.1");
    servers.push(server);
    await once(server, "listening");
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}/proxy`;
  };
  afterEach(() => {
    for (const server of servers.splice(0)) server.close();
  });
  const answer = { error: { message: "Later.", type: "rate_limit_error", param: null, code: "queue_full" } };

  it("is asked again after the time that it names", async () => {
    const paths: string[] = [];
    const url = await serving((request, response) => {
      paths.push(`${request.method} ${request.url} ${request.headers["x-mine"]} ${request.headers["user-agent"]}`);
      response.writeHead(429, { "retry-after-ms": "20", "retry-after": "9" }).end(JSON.stringify(answer));
    });
    const start = performance.now();
    const from = createFlowTurbo({ baseURL: url, headers: { "x-mine": "yes" } }).image();
    const error = await draw({ maxRetries: 2, headers: { "x-other": "1" } }, from).catch((reason) => reason);
    expect(error.errors).toHaveLength(3);
    expect(APICallError.isInstance(error.lastError) && error.lastError.message).toBe("Later.");
    expect(performance.now() - start).toBeLessThan(1900);
    expect(paths).toHaveLength(3);
    expect(paths[0]).toMatch(/^POST \/proxy\/v1\/images\/generations yes ai\/\S+ flowturbo\/\d/);
  });

  it.each([
    [500, "true", true],
    [500, "false", false],
    [503, undefined, true],
    [409, undefined, false],
    [409, "true", true],
  ])("status %s with x-should-retry %s: retryable %s", async (status, told, expected) => {
    const url = await serving((_, response) => {
      response.writeHead(status, told ? { "x-should-retry": told } : {}).end("<h1>Sorry</h1>");
    });
    const error = await failure(draw({ maxRetries: 0 }, createFlowTurbo({ baseURL: url }).image()));
    expect(error).toMatchObject({ statusCode: status, isRetryable: expected, responseBody: "<h1>Sorry</h1>" });
    expect(error.message).toContain("Sorry");
  });

  it("is something else", async () => {
    const url = await serving((_, response) => response.end("<h1>Hello</h1>"));
    const error = await failure(draw({}, createFlowTurbo({ baseURL: url }).image()));
    expect(error.message).toContain("Is it the address of `flowturbo serve`?");
  });

  it("is not there", async () => {
    const url = await serving(() => {});
    servers[0]!.close();
    await once(servers[0]!, "close");
    const error = await failure(draw({ maxRetries: 0 }, createFlowTurbo({ baseURL: url }).image()));
    expect(error).toMatchObject({ statusCode: undefined, isRetryable: true });
    expect(error.message).toMatch(/cannot be reached: .*ECONNREFUSED.*flowturbo serve/);
  });

  it("is asked through the given fetch", async () => {
    const asked: string[] = [];
    const fetch: typeof globalThis.fetch = async (input, init) => {
      asked.push(`${init?.method} ${input}`);
      return globalThis.fetch(String(input).replace("http://nowhere", baseURL), init);
    };
    const from = createFlowTurbo({ baseURL: "http://nowhere", apiKey: "secret", fetch }).image();
    await draw({}, from);
    expect(asked).toEqual(["POST http://nowhere/v1/images/generations"]);
  });
});
