// `flowturbo mcp` as a process, spoken to by the protocol's own client. Pictures are compared with what the library draws.
import { type ChildProcess, spawn } from "node:child_process";
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import type { Progress } from "@modelcontextprotocol/sdk/types.js";
import type { FastifyInstance } from "fastify";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { FlowTurbo, type GenerateOptions } from "../../lib/index.js";
import { createServer } from "../../lib/server/index.js";
import { root } from "../support/fixtures.js";
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

const command = path.join(root, "bin/flowturbo.js");
let model: FlowTurbo;
let folder: string;
beforeAll(async () => {
  model = await FlowTurbo.load(undefined, { measureCosts: false });
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-mcp-"));
});
afterAll(async () => {
  await model.dispose();
  rmSync(folder, { recursive: true, force: true });
});

const direct = (options: Partial<GenerateOptions> = {}) =>
  model.generate({ prompt: "a red circle", steps: 3, guidanceScale: 2, seed: 7, ...options });
const few = { prompt: "a red circle", steps: 3, guidance_scale: 2, seed: 7 };

const clients: Client[] = [];
afterAll(() => Promise.all(clients.map((client) => client.close())));

async function connect(...flags: string[]): Promise<Client> {
  const client = new Client({ name: "test", version: "1" });
  const args = [command, "mcp", ...flags];
  await client.connect(new StdioClientTransport({ command: process.execPath, args, stderr: "inherit", cwd: folder }));
  clients.push(client);
  return client;
}

interface Result {
  readonly isError?: boolean;
  readonly images: Buffer[];
  readonly mimeTypes: string[];
  readonly text: string;
  readonly structured: Record<string, unknown> & { files: string[]; seeds: number[] };
}

async function call(
  client: Client,
  name: string,
  given: Record<string, unknown>,
  options: Parameters<Client["callTool"]>[2] = {},
): Promise<Result> {
  const { content, isError, structuredContent } = await client.callTool({ name, arguments: given }, undefined, options);
  const parts = content as { type: string; data: string; mimeType: string; text: string }[];
  const images = parts.filter(({ type }) => type === "image");
  return {
    isError: isError === true,
    images: images.map(({ data }) => Buffer.from(data, "base64")),
    mimeTypes: images.map(({ mimeType }) => mimeType),
    text: parts.find(({ type }) => type === "text")?.text ?? "",
    structured: structuredContent as Result["structured"],
  };
}

/** What both kinds of server do; `busy` says how many requests their model works on, where the test can know. */
function draws(client: () => Client, busy: (() => number) | null) {
  it("lists two tools with descriptions of all they take", async () => {
    const { tools } = await client().listTools();
    expect(tools.map(({ name }) => name)).toEqual(["generate", "edit"]);
    for (const { inputSchema, outputSchema } of tools) {
      expect(inputSchema.required).toContain("prompt");
      expect(inputSchema.additionalProperties).toBe(false);
      for (const field of Object.values(inputSchema.properties!))
        expect((field as { description?: string }).description).toMatch(/\.$/);
      expect(outputSchema?.properties).toHaveProperty("seeds");
    }
    expect(tools[1]!.inputSchema.required).toContain("image");
  });

  it("draws what the library draws", async () => {
    const { images, mimeTypes, text, structured } = await call(client(), "generate", { ...few, count: 2 });
    const expected = await direct({ count: 2 });
    expect(mimeTypes).toEqual(["image/png", "image/png"]);
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image)).toEqual(pixelsIn(expected.images[index]!));
    expect(structured).toMatchObject({
      ...{ seeds: [7, 8], blocks: expected.blocks, width: 64, height: 64, steps: 3, model: "shapes" },
      ...{ warnings: [], files: [] },
    });
    expect(JSON.parse(text)).toEqual(structured);
  });

  it("takes all options", async () => {
    const options = { negative_prompt: "blue", size: "48x80", sampler: "euler", output_format: "webp" };
    const { images, mimeTypes } = await call(client(), "generate", { ...few, ...options });
    const expected = await direct({ negativePrompt: "blue", width: 48, height: 80, sampler: "euler" });
    expect(mimeTypes).toEqual(["image/webp"]);
    expect(await pixelsOf(images[0]!)).toEqual(await pixelsOf(await expected.images[0]!.encode("webp")));
  });

  it("takes what says how texts are encoded", () => {
    const fields = {
      ...{ negativePrompt: "negative_prompt", prompt2: "prompt_2", prompt3: "prompt_3", clipSkip: "clip_skip" },
      ...{ negativePrompt2: "negative_prompt_2", negativePrompt3: "negative_prompt_3" },
      ...{ promptWeighting: "prompt_weighting", maxSequenceLength: "max_sequence_length" },
    };
    return expectTextOptions(async (name) => {
      const own = name === null ? {} : { [fields[name]]: textOptions[name] };
      return (await call(client(), "generate", { ...few, prompt: textPrompt, ...own })).images[0]!;
    }, direct);
  });

  it("draws a seed for each picture, of 64 bits too", async () => {
    const seeds = [9, "6687881544318117707"];
    const { images, structured } = await call(client(), "generate", { ...few, seed: undefined, count: 2, seeds });
    const expected = await direct({ seed: undefined, seeds, count: 2 });
    expect(structured.seeds).toEqual(seeds);
    for (const [index, image] of images.entries())
      expect(await pixelsOf(image)).toEqual(pixelsIn(expected.images[index]!));
  });

  it("draws what surrounds a mask", async () => {
    const { image, mask } = await widePicture();
    const given = { ...few, image: image.toString("base64"), padding_mask_crop: 8 };
    const edited = await call(client(), "edit", { ...given, mask: mask.toString("base64") });
    const expected = await direct({ image, mask, strength: 1, paddingMaskCrop: 8 });
    expect(await pixelsOf(edited.images[0]!)).toEqual(pixelsIn(expected.images[0]!));
    expect(edited.structured).toMatchObject({ width: 128, height: 64 });
    const refused = await call(client(), "edit", given);
    expect([refused.isError, refused.text]).toEqual([true, expect.stringMatching(/padding_mask_crop .* give mask/)]);
  });

  it("edits a file and base64 where a mask says", async () => {
    const [image, white, transparent] = await Promise.all([original(), whiteMask(), transparentMask()]);
    writeFileSync(path.join(folder, "original.png"), image);
    writeFileSync(path.join(folder, "mask"), white);
    const expected = pixelsIn((await direct({ image, mask: white, strength: 0.9 })).images[0]!);
    for (const [source, mask] of [
      [path.join(folder, "original.png"), path.join(folder, "mask")],
      ["original.png", transparent.toString("base64")],
      [image.toString("base64"), `data:image/png;base64,${transparent.toString("base64")}`],
    ]) {
      const edited = await call(client(), "edit", { ...few, image: source, mask, strength: 0.9 });
      expect(edited.text).toContain("seeds");
      expect(await pixelsOf(edited.images[0]!)).toEqual(expected);
    }
    const whole = await call(client(), "edit", { ...few, image: "original.png" });
    expect(await pixelsOf(whole.images[0]!)).toEqual(pixelsIn((await direct({ image })).images[0]!));
  });

  it("tells of each step", async () => {
    const told: Progress[] = [];
    await call(client(), "generate", few, { onprogress: (progress) => void told.push(progress) });
    expect(told.map(({ progress, total }) => [progress, total])).toEqual([
      [1, 3],
      [2, 3],
      [3, 3],
    ]);
  });

  it("stops when a call is cancelled", async () => {
    for (const onprogress of [() => {}, undefined]) {
      const controller = new AbortController();
      const slow = { ...few, steps: 50, size: "256x256" };
      const options = { signal: controller.signal, ...(onprogress && { onprogress }) };
      const drawing = call(client(), "generate", slow, options);
      drawing.catch(() => {});
      if (busy) await expect.poll(busy, { timeout: 10_000 }).toBe(1);
      else await new Promise((resolve) => setTimeout(resolve, 500));
      controller.abort("seen enough");
      await expect(drawing).rejects.toThrow("seen enough");
      if (busy) await expect.poll(busy, { timeout: 10_000 }).toBe(0);
    }
    expect((await call(client(), "generate", few)).images).toHaveLength(1);
  });

  it.each([
    [{ ...few, stepps: 3 }, /stepps/],
    [{ ...few, steps: "3" }, /steps/],
    [{ ...few, size: "60x64" }, /60/],
    [{ ...few, size: "large" }, /1024x768/],
    [{ ...few, quality: "fast" }, /quality|steps/],
    [{ steps: 3 }, /prompt/],
    [{ ...few, seeds: [1] }, /Both seeds and seed /],
    [{ ...few, seed: undefined, seeds: [1, 2] }, /as many seeds as pictures, 1 .* received 2.* change count/],
    [{ ...few, padding_mask_crop: 8 }, /padding_mask_crop/],
    [{ ...few, clip_skip: -1 }, /clip_skip/],
  ])("answers errors that name what is wrong: %j", async (given, message) => {
    const { isError, text } = await call(client(), "generate", given);
    expect(isError).toBe(true);
    expect(text).toMatch(message);
  });

  it.each([
    [{ image: "nowhere.png" }, /"nowhere.png" for image cannot be read: ENOENT.*absolute path/],
    [{ image: "." }, /it is no file/],
    [{ image: "http://127.0.0.1/a.png" }, /Nothing is downloaded/],
    [{ image: "data:image/png;base64,AAAA" }, /data: URL of a picture/],
    [{ image: "original.png", mask: "no.png" }, /for mask cannot be read/],
  ])("answers errors of pictures: %j", async (given, message) => {
    const { isError, text } = await call(client(), "edit", { ...few, ...given });
    expect(isError).toBe(true);
    expect(text).toMatch(message);
  });
}

describe("flowturbo mcp", () => {
  let client: Client;
  beforeAll(async () => {
    client = await connect();
  });
  draws(() => client, null);

  it("has no save_to without a folder", async () => {
    const { isError, text } = await call(client, "generate", { ...few, save_to: "a.png" });
    expect(isError).toBe(true);
    expect(text).toContain("save_to");
  });
});

describe("flowturbo mcp --url", () => {
  let client: Client;
  let app: FastifyInstance;
  let address: string;
  beforeAll(async () => {
    app = await createServer({ models: { shapes: model }, apiKeys: ["secret"], page: false, logger: false });
    address = await app.listen({ port: 0 });
    await vi.waitFor(async () => expect((await fetch(`${address}/readyz`)).status).toBe(200), 30_000);
    client = await connect("--url", address, "--api-key", "secret");
  });
  afterAll(() => app.close());
  draws(
    () => client,
    () => model.stats().running.requests,
  );

  it("hands on the server's refusals", async () => {
    const stranger = await connect("--url", address, "--api-key", "wrong");
    const { isError, text } = await call(stranger, "generate", few);
    expect(isError).toBe(true);
    expect(text).toMatch(/key/i);
  });

  it("says so where there is no server", async () => {
    const { isError, text } = await call(await connect("--url", "http://127.0.0.1:9"), "generate", few);
    expect(isError).toBe(true);
    expect(text).toMatch(/cannot be reached.*flowturbo serve/);
  });
});

describe("flowturbo mcp --out-dir", () => {
  let client: Client;
  let pictures: string;
  beforeAll(async () => {
    pictures = path.join(folder, "pictures");
    client = await connect("--out-dir", pictures, "--format", "jpeg");
  });
  const save = (save_to: string, more: object = {}) => call(client, "generate", { ...few, save_to, ...more });

  it("writes where it is asked to, in the format of the name", async () => {
    const { structured, images, mimeTypes } = await save("pets/cat.png");
    expect(structured.files).toEqual([path.join(pictures, "pets/cat.png")]);
    expect(mimeTypes).toEqual(["image/png"]);
    expect(readFileSync(structured.files[0]!)).toEqual(images[0]);
    const several = await save("two.webp", { count: 2 });
    expect(several.structured.files.map((file) => path.basename(file))).toEqual(["two-0.webp", "two-1.webp"]);
    const named = await save("pets/", { count: 2 });
    expect(named.structured.files.map((file) => path.relative(pictures, file))).toEqual([
      path.join("pets", "flowturbo-7.jpg"),
      path.join("pets", "flowturbo-8.jpg"),
    ]);
    expect((await call(client, "generate", few)).mimeTypes).toEqual(["image/jpeg"]);
  });

  it("replaces no file", async () => {
    const before = readFileSync(path.join(pictures, "pets/cat.png"));
    const { isError, text } = await save("pets/cat.png", { seed: 8 });
    expect(isError).toBe(true);
    expect(text).toContain("there is such a file already");
    expect(readFileSync(path.join(pictures, "pets/cat.png"))).toEqual(before);
  });

  it("stays in its folder", async () => {
    const outside = path.join(folder, "outside");
    mkdirSync(outside);
    symlinkSync(outside, path.join(pictures, "link"));
    for (const place of [
      "../cat.png",
      path.join(outside, "cat.png"),
      "pets/../../cat.png",
      "link/cat.png",
      "link/a/cat.png",
    ]) {
      const { isError, text } = await save(place);
      expect(isError, place).toBe(true);
      expect(text).toMatch(/inside the folder of pictures|leads out of the folder/);
    }
    expect(readdirSync(outside)).toEqual([]);
    expect(existsSync(path.join(folder, "cat.png"))).toBe(false);
    expect((await save("cat.gif")).text).toContain(".png");
  });
});

describe("the process", () => {
  const started: ChildProcess[] = [];
  afterEach(() => {
    for (const child of started.splice(0)) child.kill("SIGKILL");
  });

  function start(...flags: string[]) {
    const child = spawn(process.execPath, [command, "mcp", ...flags], { stdio: "pipe", cwd: folder });
    started.push(child);
    const output = { stdout: "", stderr: "" };
    child.stdout.on("data", (text) => {
      output.stdout += text;
    });
    child.stderr.on("data", (text) => {
      output.stderr += text;
    });
    const send = (message: object) => child.stdin.write(`${JSON.stringify({ jsonrpc: "2.0", ...message })}\n`);
    const ended = new Promise((resolve) => child.once("close", (code, signal) => resolve(code ?? signal)));
    const answered = (id: number) =>
      vi.waitFor(() => expect(output.stdout).toContain(`"id":${id}`), { timeout: 30_000, interval: 20 });
    const clientInfo = { name: "test", version: "1" };
    send({ id: 1, method: "initialize", params: { protocolVersion: "2025-06-18", capabilities: {}, clientInfo } });
    send({ method: "notifications/initialized" });
    const draw = (id: number, given: object) =>
      send({ id, method: "tools/call", params: { name: "generate", arguments: { ...few, ...given } } });
    return { child, output, ended, answered, draw };
  }

  const idle = async ({ answered }: ReturnType<typeof start>) => answered(1);
  const drawn = async ({ answered, draw }: ReturnType<typeof start>) => {
    draw(2, {});
    await answered(2);
  };
  const drawing = async (running: ReturnType<typeof start>) => {
    await drawn(running);
    running.draw(3, { steps: 1000, size: "256x256" });
    await new Promise((resolve) => setTimeout(resolve, 300));
  };
  const loading = async ({ answered, draw }: ReturnType<typeof start>) => {
    await answered(1);
    draw(2, {});
  };

  it.each([
    ["idle", idle],
    ["loading", loading],
    ["after a picture", drawn],
    ["at work", drawing],
  ])("ends with code 0 at the end of stdin, and has written nothing but the protocol: %s", async (_, reach) => {
    const running = start();
    await reach(running);
    running.child.stdin!.end();
    expect(await running.ended).toBe(0);
    const lines = running.output.stdout.trim().split("\n");
    for (const line of lines) expect(JSON.parse(line)).toHaveProperty("jsonrpc", "2.0");
    expect(running.output.stderr).toBe("");
  });

  it.each(["SIGTERM", "SIGINT"] as const)("ends with code 0 after %s, at work too", async (signal) => {
    const running = start();
    await drawing(running);
    running.child.kill(signal);
    expect(await running.ended).toBe(0);
    expect(running.output.stderr).toBe("");
  });

  it.each([
    [["--format", "gif"], "--format"],
    [["--runtime", "cpu"], "runtime"],
    [["--api-key", "x"], "--url"],
    [["--url", "localhost"], "http://127.0.0.1:7860"],
    [["--url", "http://127.0.0.1:9", "--threads", "2"], "--threads"],
    [["--colour", "red"], "--colour"],
  ])("refuses flags that are wrong: %j", async (flags, message) => {
    const { ended, output } = start(...flags);
    expect(await ended).toBe(2);
    expect(output.stderr).toContain(message);
    expect(output.stdout).toBe("");
  });

  it("names the package to install where the protocol's is missing", async () => {
    const bare = path.join(folder, "bare");
    mkdirSync(path.join(bare, "node_modules"), { recursive: true });
    for (const part of ["bin", "dist", "package.json"])
      cpSync(path.join(root, part), path.join(bare, part), { recursive: true });
    const modules = realpathSync(path.join(root, "node_modules"));
    for (const name of readdirSync(modules))
      if (name !== "@modelcontextprotocol")
        symlinkSync(path.join(modules, name), path.join(bare, "node_modules", name));
    const child = spawn(process.execPath, [path.join(bare, "bin/flowturbo.js"), "mcp"], { stdio: "pipe" });
    started.push(child);
    let text = "";
    child.stderr.on("data", (chunk) => {
      text += chunk;
    });
    expect(await new Promise((resolve) => child.once("close", resolve))).toBe(1);
    expect(text).toContain("npm install @modelcontextprotocol/sdk");
  });

  it("answers with what is wrong of a checkpoint, again and again", async () => {
    const running = start("--model", path.join(folder, "nothing"));
    running.draw(2, {});
    await running.answered(2);
    running.draw(3, {});
    await running.answered(3);
    expect(running.output.stdout.match(/"isError":true/g)).toHaveLength(2);
    expect(running.output.stdout).toContain("model_index.json");
  });
});
