/** `flowturbo pull` and models by name as processes of their own: at the same time, killed, interrupted, and drawn with. */

import { spawn } from "node:child_process";
import { mkdir, readdir, readFile, stat } from "node:fs/promises";
import path from "node:path";
import { expect, test } from "vitest";
import { cli } from "../cli/support.js";
import { digestOf } from "./fake-hub.js";
import { bytes, cacheOf, home, hub, modelFiles, name, smallModel, transformer } from "./support.js";

function start(args: readonly string[], env: Record<string, string> = {}) {
  const none = {
    HF_TOKEN: "",
    HUGGING_FACE_HUB_TOKEN: "",
    HF_HUB_CACHE: "",
    HUGGINGFACE_HUB_CACHE: "",
    HF_TOKEN_PATH: "",
  };
  const all = { ...process.env, ...none, HF_ENDPOINT: hub.url, HF_HOME: home, ...env };
  const child = spawn(process.execPath, [cli, ...args], { cwd: home, env: all, stdio: ["ignore", "pipe", "pipe"] });
  const text = { stdout: "", stderr: "" };
  for (const name of ["stdout", "stderr"] as const) child[name].on("data", (chunk) => (text[name] += chunk));
  const finished = new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) =>
    child.on("close", (code) => resolve({ code, ...text })),
  );
  return { child, finished };
}

const incomplete = (data: Buffer) =>
  path.join(home, "hub/models--owner--model/blobs", `${digestOf(transformer, data)}.incomplete`);

/** Of a kind that the commands take, without text encoders. */
function acceptedModel(data: Buffer): Map<string, Buffer> {
  const none = ["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"];
  const index = {
    ...Object.fromEntries(none.map((part) => [part, [null, null]])),
    _class_name: "StableDiffusion3Pipeline",
    transformer: ["diffusers", "SD3Transformer2DModel"],
    vae: ["diffusers", "AutoencoderKL"],
    scheduler: ["diffusers", "FlowMatchEulerDiscreteScheduler"],
  };
  return smallModel(data)
    .set("model_index.json", Buffer.from(JSON.stringify(index)))
    .set("vae/config.json", Buffer.from("{}"))
    .set("vae/diffusion_pytorch_model.safetensors", bytes(100, 7))
    .set("scheduler/scheduler_config.json", Buffer.from("{}"));
}

/** Until so many bytes of the transformer are there. */
async function untilThere(data: Buffer, least: number): Promise<void> {
  for (const start = performance.now(); ; ) {
    if (performance.now() - start > 20_000) throw new Error("Nothing is downloaded.");
    const size = await stat(incomplete(data)).then(
      (found) => found.size,
      () => 0,
    );
    if (size >= least) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

async function expectWhole(data: Buffer): Promise<void> {
  const cache = await cacheOf();
  expect(Object.keys(cache).filter((file) => /incomplete|tmp/.test(file))).toEqual([]);
  expect((await readFile(incomplete(data).replace(".incomplete", ""))).equals(data)).toBe(true);
  expect(await readdir(path.join(home, "hub/.locks/models--owner--model"))).toEqual([]);
}

test("two processes download a model once, and both have it", async () => {
  const data = bytes(200_000);
  hub.add(name, { files: acceptedModel(data) });
  hub.faults.set(transformer, () => ({ slowly: { bytes: 20_000, ms: 60 } }));
  const [first, second] = await Promise.all([start(["pull", name]).finished, start(["pull", name]).finished]);
  expect([first.code, second.code], first.stderr + second.stderr).toEqual([0, 0]);
  expect(first.stdout).toBe(second.stdout);
  expect(first.stdout).toMatch(/^\/.*models--owner--model\/snapshots\/[0-9a-f]{40}\n$/);
  expect(hub.requestsFor(transformer).length).toBe(1);
  await expectWhole(data);
});

test("a process that is killed leaves what the next one goes on with, also one that waits for it", async () => {
  const data = bytes(400_000);
  hub.add(name, { files: acceptedModel(data) });
  hub.faults.set(transformer, (nth) => (nth === 1 ? { slowly: { bytes: 20_000, ms: 40 } } : undefined));
  const { child, finished } = start(["pull", name]);
  await untilThere(data, 60_000);
  const waiting = start(["pull", name, "--json"]);
  await untilThere(data, 100_000);
  child.kill("SIGKILL");
  await finished;
  const { code, stdout, stderr } = await waiting.finished;
  expect(code, stderr).toBe(0);
  expect(JSON.parse(stdout)).toMatchObject({ model: name, revision: "main", files: 6 });
  const ranges = hub.requestsFor(transformer).map(({ range }) => Number(range?.match(/^bytes=(\d+)-$/)?.[1]));
  expect(ranges.length).toBe(2);
  expect(ranges[1]).toBeGreaterThanOrEqual(100_000);
  await expectWhole(data);
});

test("Ctrl-C ends it with 130, and the same command goes on", async () => {
  const data = bytes(400_000);
  hub.add(name, { files: acceptedModel(data) });
  hub.faults.set(transformer, (nth) => (nth === 1 ? { slowly: { bytes: 20_000, ms: 40 } } : undefined));
  const { child, finished } = start(["pull", name]);
  await untilThere(data, 60_000);
  child.kill("SIGINT");
  expect((await finished).code).toBe(130);
  expect((await start(["pull", name]).finished).code).toBe(0);
  expect(hub.requestsFor(transformer).length).toBe(2);
  expect(hub.requestsFor(transformer)[1]!.range).toMatch(/^bytes=\d{5,}-$/);
  await expectWhole(data);
});

test("what is wrong is said, with the exit code of its kind", async () => {
  hub.add(name, { files: smallModel(), access: "gated" });
  const runs = [
    ["pull", name],
    ["pull", "not-a-name"],
    ["pull", `${name}@../x`],
    ["generate", "x", "--model", "a/b/c"],
  ];
  const [gated, wrong, outside, absent] = await Promise.all(runs.map((args) => start(args).finished));
  expect([gated!.code, gated!.stderr]).toEqual([1, expect.stringMatching(/^error: owner\/model is gated.*HF_TOKEN/)]);
  for (const { code, stderr } of [wrong!, outside!])
    expect([code, stderr]).toEqual([2, expect.stringMatching(/Expected a model of the hub, as owner\/name/)]);
  expect([absent!.code, absent!.stderr]).toEqual([1, expect.stringMatching(/does not exist.*owner\/name/)]);
});

test("a picture is drawn with a model by its name, and again without the hub", async () => {
  hub.add(name, { files: await modelFiles() });
  await mkdir(path.join(home, "cache"));
  const args = ["generate", "a cat", "--model", name, "--steps", "1", "--width", "64", "--height", "64", "--seed", "1"];
  const draw = (out: string, env = {}) =>
    start([...args, "--runtime", "onnxruntime", "--cache", path.join(home, "cache"), "--out", out], env).finished;
  const online = await draw("1.png");
  expect(online.code, online.stderr).toBe(0);
  const asked = hub.seen.length;
  const offline = await draw("2.png", { HF_HUB_OFFLINE: "1" });
  expect(offline.code, offline.stderr).toBe(0);
  expect(hub.seen.length).toBe(asked);
  await hub.stop();
  const away = await draw("3.png");
  expect([away.code, away.stderr]).toEqual([0, expect.stringMatching(/^warning: .*The copy in the cache is used/)]);
  const [first, second] = await Promise.all(["1.png", "2.png"].map((file) => readFile(path.join(home, file))));
  expect(first!.equals(second!)).toBe(true);
});

test("compile takes a name, and refuses a model of another kind before its weights are downloaded", async () => {
  const files = await modelFiles();
  hub.add(name, { files });
  const other = new Map(files).set("model_index.json", Buffer.from('{"_class_name":"FluxPipeline"}'));
  hub.add("owner/flux", { files: other });
  const flux = await start(["compile", "--model", "owner/flux"]).finished;
  expect([flux.code, flux.stderr]).toEqual([1, expect.stringContaining("FluxPipeline")]);
  expect(hub.requestsFor(transformer)).toEqual([]);
  // Without TensorRT it ends there, with the model in the cache.
  const compiled = await start(["compile", "--model", name, "--runtime", "tensorrt", "--tensorrt-dir", home]).finished;
  expect([compiled.code, compiled.stderr]).toEqual([1, expect.stringContaining("TensorRT")]);
  expect(hub.requestsFor(transformer).length).toBe(1);
});
