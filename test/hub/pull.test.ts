/** Downloads into the cache, from a hub that behaves and from one that does not. */

import { createHash } from "node:crypto";
import fs, { existsSync } from "node:fs";
import { chmod, mkdir, readdir, readFile, rm, stat, symlink, utimes, writeFile } from "node:fs/promises";
import { syncBuiltinESMExports } from "node:module";
import path from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { HubError } from "../../lib/errors.js";
import { type DownloadProgress, locateModel } from "../../lib/hub/index.js";
import { commitOf, digestOf } from "./fake-hub.js";
import {
  bytes,
  cacheOf,
  home,
  hub,
  modelFiles,
  name,
  pullModel,
  settingsOf,
  smallModel,
  transformer,
} from "./support.js";

const blob = (digest: string) => path.join(home, "hub/models--owner--model/blobs", digest);

/** The HubError of a call that fails. */
async function refused(call: Promise<unknown>): Promise<HubError> {
  const error = await call.then(
    () => null,
    (error) => error,
  );
  expect(error).toBeInstanceOf(HubError);
  return error;
}

describe("a model", () => {
  test("lies in the cache as huggingface_hub lays it out, opens, and is not downloaded again", async () => {
    const files = await modelFiles();
    for (const part of ["tokenizer", "tokenizer_2"]) files.set(`${part}/added_tokens.json`, Buffer.from("{}"));
    files.set("README.md", Buffer.from("# A model"));
    files.set("transformer/diffusion_pytorch_model.bin", bytes(100));
    files.set("sd3.safetensors", bytes(100));
    const commit = hub.add(name, { files });
    hub.pageSize = 5;
    const seen: DownloadProgress[] = [];
    const pulled = await pullModel(name, { onDownload: (progress) => seen.push(progress) });

    const taken = [...files].filter(([file]) => !/README|\.bin$|^sd3/.test(file));
    const total = taken.reduce((sum, [, { length }]) => sum + length, 0);
    expect(pulled).toMatchObject({ commit, files: taken.length, bytes: total });
    expect(pulled.path).toBe(path.join(home, "hub/models--owner--model/snapshots", commit));
    const expected: Record<string, string | null> = { "refs/main": null };
    for (const [file, data] of taken) {
      const digest = digestOf(file, data);
      expected[`blobs/${digest}`] = null;
      expected[`snapshots/${commit}/${file}`] = `${file.includes("/") ? "../" : ""}../../blobs/${digest}`;
      expect((await readFile(path.join(pulled.path, file))).equals(data), file).toBe(true);
    }
    expect(await cacheOf()).toEqual(Object.fromEntries(Object.entries(expected).sort()));
    expect(await readFile(path.join(home, "hub/models--owner--model/refs/main"), "utf8")).toBe(commit);
    expect(await readdir(path.join(home, "hub/.locks/models--owner--model"))).toEqual([]);

    // The same contents under two names are downloaded once.
    const distinct = new Set(taken.map(([file, data]) => digestOf(file, data)));
    expect(distinct.size).toBeLessThan(taken.length);
    const contents = hub.seen.filter(({ host, path: asked }) => host === "cdn" || /resolve.*\.(json|txt)$/.test(asked));
    expect(contents.length).toBe(distinct.size);
    expect(seen.at(-1)).toEqual({ done: total, total, files: [] });

    const before = hub.seen.length;
    expect(await pullModel()).toMatchObject({ path: pulled.path, downloaded: 0, bytes: total });
    expect(hub.seen.slice(before).every(({ path: asked }) => asked.startsWith("/api/"))).toBe(true);
    const opened = await openCheckpoint(pulled.path);
    expect(opened.transformer.weights.names.length).toBeGreaterThan(10);
  });

  test("whose JSON files begin with a byte order mark is downloaded whole", async () => {
    const files = smallModel();
    const shard = "transformer/diffusion_pytorch_model-00001-of-00001.safetensors";
    files.set(shard, files.get(transformer)!);
    files.delete(transformer);
    const index = JSON.stringify({ weight_map: { x: path.basename(shard) } });
    files.set("transformer/diffusion_pytorch_model.safetensors.index.json", Buffer.from(index));
    for (const [file, data] of files)
      if (file.endsWith(".json")) files.set(file, Buffer.concat([Buffer.from("\ufeff"), data]));
    hub.add(name, { files });
    expect(await pullModel()).toMatchObject({ files: files.size });
  });

  test("of an unknown kind is refused before anything but model_index.json is downloaded", async () => {
    hub.add(name, { files: smallModel() });
    const checkIndex = async (file: string) => {
      expect(JSON.parse(await readFile(file, "utf8"))._class_name).toBe("StableDiffusion3Pipeline");
      throw new Error("another kind");
    };
    await expect(pullModel(name, { checkIndex })).rejects.toThrow("another kind");
    expect(hub.requestsFor(transformer)).toEqual([]);
    expect(await cacheOf()).not.toHaveProperty("refs/main");
  });

  test("without model_index.json is refused, with the names of its single files, which can be had", async () => {
    const files = new Map([["sd3.safetensors", bytes(1000)]]);
    const commit = hub.add(name, { files });
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual(["layout", expect.stringContaining("it has sd3.safetensors")]);
    const { path: file } = await pullModel(`${name}/sd3.safetensors`);
    expect(file.endsWith(`snapshots/${commit}/sd3.safetensors`)).toBe(true);
    expect((await readFile(file)).equals(bytes(1000))).toBe(true);
    expect((await refused(pullModel(`${name}/other.safetensors`))).message).toContain(
      "lacks the file other.safetensors",
    );
  });

  test("that lacks a part or a shard is refused before its weights are downloaded", async () => {
    const files = smallModel();
    files.delete(transformer);
    files.set(
      "transformer/diffusion_pytorch_model.safetensors.index.json",
      Buffer.from('{"weight_map":{"x":"a.safetensors"}}'),
    );
    hub.add(name, { files });
    expect((await refused(pullModel())).message).toContain("lacks the file transformer/a.safetensors");
    files.set("transformer/a.safetensors", bytes(10));
    files.set("model_index.json", Buffer.from('{"transformer":["d","T"],"vae":["d","V"]}'));
    expect((await refused(pullModel())).message).toContain("lacks the folder vae");
    files.set("model_index.json", Buffer.from("<html>"));
    expect((await refused(pullModel())).message).toContain("no JSON");
    expect(hub.requestsFor("transformer/a.safetensors")).toEqual([]);
  });

  test("comes in shards that its index names, and in no others", async () => {
    const files = smallModel();
    files.delete(transformer);
    const map = { x: "a-1.safetensors", y: "a-2.safetensors" };
    files.set(
      "transformer/diffusion_pytorch_model.safetensors.index.json",
      Buffer.from(JSON.stringify({ weight_map: map })),
    );
    for (const each of ["a-1", "a-2", "a-3"])
      files.set(`transformer/${each}.safetensors`, bytes(500, each.charCodeAt(2)));
    const commit = hub.add(name, { files });
    await pullModel();
    const links = Object.keys(await cacheOf()).filter((file) => file.startsWith(`snapshots/${commit}/transformer/a-`));
    expect(links.map((file) => path.basename(file))).toEqual(["a-1.safetensors", "a-2.safetensors"]);
  });
});

describe("a revision", () => {
  test("is a branch, a tag, a pull request or a commit; a branch that moved is followed", async () => {
    const old = smallModel(bytes(1000, 2));
    const files = smallModel(bytes(1000, 3));
    const [before, now] = [commitOf(old), commitOf(files)];
    hub.add(name, { files, commits: { [before]: old }, refs: { "v1.0": before, "refs/pr/1": before } });
    for (const [revision, commit] of [
      ["main", now],
      ["v1.0", before],
      ["refs/pr/1", before],
      [before, before],
    ] as const) {
      const pulled = await pullModel(`${name}@${revision}`);
      expect(pulled.commit, revision).toBe(commit);
      expect(
        (await readFile(path.join(pulled.path, transformer))).equals((commit === now ? files : old).get(transformer)!),
      ).toBe(true);
    }
    const refs = Object.keys(await cacheOf()).filter((file) => file.startsWith("refs/"));
    expect(refs).toEqual(["refs/main", "refs/refs/pr/1", "refs/v1.0"]);

    const next = hub.add(name, { files: smallModel(bytes(1000, 4)) });
    expect((await pullModel()).commit).toBe(next);
    expect(await readFile(path.join(home, "hub/models--owner--model/refs/main"), "utf8")).toBe(next);
    const error = await refused(pullModel(`${name}@v2`));
    expect([error.reason, error.message]).toEqual(["no_revision", expect.stringContaining('"v2"')]);
  });
});

describe("a download that breaks", () => {
  const data = bytes(300_000);
  const model = () => hub.add(name, { files: smallModel(data) });
  const ranges = () => hub.requestsFor(transformer).map(({ range }) => range);
  const arrived = async () => (await readFile(blob(digestOf(transformer, data)))).equals(data);

  test("goes on where it was, again and again", async () => {
    model();
    hub.faults.set(transformer, (nth) => (nth <= 8 ? { breakAfter: 20_000 } : undefined));
    await pullModel();
    expect(await arrived()).toBe(true);
    // What was sent before the break may have come in part; no byte is asked for twice.
    const starts = ranges().map((range) => Number(range?.match(/^bytes=(\d+)-$/)?.[1] ?? 0));
    expect(starts.length).toBe(9);
    expect(starts).toEqual([...new Set(starts)].sort((a, b) => a - b));
    expect(starts[0]).toBe(0);
    expect(starts.at(-1)).toBeGreaterThan(0);
  });

  test("goes on in a later call, from what an earlier one left", async () => {
    model();
    hub.faults.set(transformer, (nth) => (nth === 1 ? { breakAfter: 100_000 } : { status: 503 }));
    const error = await refused(pullModel());
    expect([error.reason, error.code]).toEqual(["unreachable", "ERR_FLOWTURBO_HUB_UNREACHABLE"]);
    expect(error.message).toContain("503");
    const left = (await stat(`${blob(digestOf(transformer, data))}.incomplete`)).size;
    expect(left).toBeGreaterThan(0);
    expect(await cacheOf()).not.toHaveProperty("refs/main");
    hub.faults.clear();
    await pullModel();
    expect(ranges().at(-1)).toBe(`bytes=${left}-`);
    expect(await arrived()).toBe(true);
    expect(existsSync(`${blob(digestOf(transformer, data))}.incomplete`)).toBe(false);
  });

  test.each([
    ["a stall", { stallAfter: 50_000 }, 3],
    ["a range that is ignored", { ignoreRange: true }, 2],
    ["a range that begins elsewhere", { wrongRange: true }, 3],
    ["wrong bytes", { wrongBytes: true }, 3],
    ["too many bytes", { extraBytes: 5 }, 3],
  ] as const)("%s is overcome", async (_, fault, requests) => {
    model();
    // From the second request on there is a range.
    hub.faults.set(transformer, (nth) => (nth === 1 ? { breakAfter: 90_000 } : nth === 2 ? fault : undefined));
    const stalls = "stallAfter" in fault;
    await pullModel(name, { settings: { ...(await settingsOf()), ...(stalls && { timeoutMs: 1000 }) } });
    expect(await arrived()).toBe(true);
    // A machine that is busy may take another request for silent.
    if (stalls) expect(ranges().length).toBeGreaterThanOrEqual(requests);
    else expect(ranges().length).toBe(requests);
  });

  test("is an error when the bytes stay wrong, and nothing of them is kept", async () => {
    model();
    hub.faults.set(transformer, () => ({ wrongBytes: true }));
    const error = await refused(pullModel());
    expect([error.reason, error.code]).toEqual(["damaged", "ERR_FLOWTURBO_HUB"]);
    expect(error.message).toContain(transformer);
    expect(hub.requestsFor(transformer).length).toBe(3);
    expect(existsSync(blob(digestOf(transformer, data)))).toBe(false);
    expect(existsSync(`${blob(digestOf(transformer, data))}.incomplete`)).toBe(false);
  });

  test("of which each half is wrong in turn ends all the same", async () => {
    model();
    hub.faults.set(transformer, (nth) => (nth % 2 === 1 ? { breakAfter: 100_000 } : { wrongBytes: true }));
    expect((await refused(pullModel())).reason).toBe("damaged");
    expect(hub.requestsFor(transformer).length).toBe(6);
  });

  test.each([
    ["damaged", (part: Buffer) => Buffer.from(part.map((byte) => byte ^ 1)), 2],
    ["too long", () => Buffer.alloc(400_000), 1],
    ["whole", () => data, 0],
    ["whole and damaged", () => Buffer.from(data.map((byte) => byte ^ 1)), 1],
  ] as const)("leaves what is %s to be found by the next call", async (_, make, requests) => {
    model();
    await mkdir(path.dirname(blob("x")), { recursive: true });
    await writeFile(`${blob(digestOf(transformer, data))}.incomplete`, make(data.subarray(0, 120_000)));
    await pullModel();
    expect(await arrived()).toBe(true);
    expect(hub.requestsFor(transformer).length).toBe(requests);
  });

  test("an ETag in another spelling changes nothing", async () => {
    hub.etag = (digest) => `W/"${digest}"`;
    model();
    await pullModel();
    expect(await arrived()).toBe(true);
  });
});

describe("a hub that is busy", () => {
  test("is asked again when it says so", async () => {
    hub.add(name, { files: smallModel() });
    hub.faults.set("api", (nth) =>
      nth === 1 ? { status: 429, headers: { "retry-after": "1" } } : nth === 3 ? { status: 502 } : undefined,
    );
    hub.faults.set(transformer, (nth) => (nth === 1 ? { status: 429, headers: { "retry-after": "0" } } : undefined));
    const start = performance.now();
    await pullModel();
    expect(performance.now() - start).toBeGreaterThan(990);
    expect(hub.requestsFor(transformer).length).toBe(2);
  });

  test("is asked again when its limit allows, as huggingface.co says it", async () => {
    hub.add(name, { files: smallModel() });
    const limits = ['"api";r=0;t=0', '"api";r=400;t=200'];
    hub.faults.set("api", (nth) =>
      nth <= 2 ? { status: [429, 502][nth - 1]!, headers: { ratelimit: limits[nth - 1]! } } : undefined,
    );
    const start = performance.now();
    await pullModel();
    const took = performance.now() - start;
    expect(took).toBeGreaterThan(990);
    expect(took).toBeLessThan(20_000);
  });

  test("and asks for more patience than anybody has is an error at once", async () => {
    hub.add(name, { files: smallModel() });
    hub.faults.set("api", () => ({ status: 429, headers: { "retry-after": "3600" } }));
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual([
      "unreachable",
      expect.stringContaining("429, to be asked again in 3600 s"),
    ]);
    expect(hub.seen.length).toBe(1);
  });

  test("or is not there, is an error that names it", async () => {
    hub.add(name, { files: smallModel() });
    const settings = { ...(await settingsOf()), endpoint: "http://127.0.0.1:1" };
    const gone = { ...settings, endpoint: hub.url };
    await hub.stop();
    for (const each of [settings, gone]) {
      const error = await refused(pullModel(name, { settings: each }));
      expect(error.reason).toBe("unreachable");
      expect(error.message).toContain(each.endpoint);
    }
  });

  test("gets a new address of a file whose address has expired", async () => {
    hub.add(name, { files: smallModel() });
    hub.faults.set(transformer, (nth) => (nth === 1 ? { status: 403 } : undefined));
    await pullModel();
    expect(hub.seen.filter(({ host, path: asked }) => host === "hub" && asked.endsWith(transformer)).length).toBe(2);
  });
});

describe("a model that not everybody may read", () => {
  test("gated: without a token it is said where to accept, and where a token goes", async () => {
    hub.add(name, { files: smallModel(), access: "gated" });
    const error = await refused(pullModel());
    expect([error.reason, error.repository]).toEqual(["gated", name]);
    for (const said of [`${hub.url}/${name}`, `${hub.url}/settings/tokens`, "HF_TOKEN", path.join(home, "token")])
      expect(error.message).toContain(said);
    expect(error.publicMessage).toBe("The model's files cannot be downloaded.");
    expect(await cacheOf()).toEqual({});
    // huggingface_hub takes a model without it for damaged.
    expect(await readdir(path.join(home, "hub/models--owner--model"))).toContain("snapshots");
  });

  test("gated: with a token whose account has not accepted, its source is said, and never the token", async () => {
    hub.add(name, { files: smallModel(), access: "gated" });
    hub.tokens.add("hf_stranger");
    const error = await refused(pullModel(name, {}, { HF_TOKEN: "hf_stranger" }));
    expect(error.reason).toBe("gated");
    expect(error.message).toContain("token HF_TOKEN has");
    expect(JSON.stringify([error.message, error.stack, error.cause])).not.toContain("hf_stranger");
  });

  test.each(["gated", "private"] as const)(
    "%s: the token of a reader opens it, and goes to the hub alone",
    async (access) => {
      hub.add(name, { files: smallModel(), access });
      hub.pageSize = 2;
      hub.tokens.add("hf_reader");
      hub.readers.add("hf_reader");
      await writeFile(path.join(home, "token"), "hf_reader\n");
      await pullModel();
      const of = (host: string) =>
        hub.seen.filter((each) => each.host === host).map(({ authorization }) => authorization);
      expect(new Set(of("hub"))).toEqual(new Set(["Bearer hf_reader"]));
      expect(of("cdn").length).toBeGreaterThan(0);
      expect(new Set(of("cdn"))).toEqual(new Set([undefined]));
    },
  );

  test("private, or not there: without a token and with one", async () => {
    hub.add(name, { files: smallModel(), access: "private" });
    hub.tokens.add("hf_stranger");
    for (const model of [name, "owner/absent"]) {
      const without = await refused(pullModel(model));
      expect([without.reason, without.message]).toEqual(["not_found", expect.stringContaining("HF_TOKEN")]);
      const error = await refused(pullModel(model, {}, { HF_TOKEN: "hf_stranger" }));
      expect([error.reason, error.message]).toEqual([
        "not_found",
        expect.stringContaining("the token of HF_TOKEN may read it"),
      ]);
    }
  });

  test("a token that the hub does not know", async () => {
    hub.add(name, { files: smallModel() });
    const error = await refused(pullModel(name, {}, { HF_TOKEN: "hf_revoked" }));
    expect([error.reason, error.message]).toEqual([
      "unauthorized",
      expect.stringContaining("does not accept the token of HF_TOKEN"),
    ]);
  });
});

describe("a listing", () => {
  test("is read to its end, also when its pages are named without their host", async () => {
    hub.add(name, { files: smallModel() });
    hub.pageSize = 1;
    hub.relativePages = true;
    expect((await pullModel()).files).toBe(3);
  });
});

describe("a listing that must not be believed", () => {
  test.each([
    "../../evil.json",
    "/etc/evil",
    "transformer/../../../evil",
    "tokenizer\\..\\evil",
    "C:evil",
    "transformer/\0",
  ])("%j is refused, and nothing is written", async (evil) => {
    hub.add(name, { files: smallModel() });
    hub.editListing = (entries) => entries.push({ type: "file", path: evil, size: 1, oid: "0".repeat(40) });
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual(["refused", expect.stringContaining("leaves its folder")]);
    expect(await readdir(home)).toEqual([]);
  });

  test.each([
    ["a hash that is a path", { lfs: { oid: "../../../evil", size: 4, pointerSize: 1 } }],
    ["no size", { size: -1, lfs: undefined }],
    ["no hash", { oid: undefined, lfs: undefined }],
  ])("%s", async (_, change) => {
    hub.add(name, { files: smallModel() });
    hub.editListing = (entries) => Object.assign(entries.find(({ path: each }) => each === transformer)!, change);
    expect((await refused(pullModel())).reason).toBe("refused");
    expect(await readdir(home)).toEqual([]);
  });

  test("a page elsewhere gets no token", async () => {
    hub.add(name, { files: smallModel() });
    hub.tokens.add("hf_known");
    hub.nextPage = `${hub.cdnUrl}/tree`;
    await refused(pullModel(name, {}, { HF_TOKEN: "hf_known" }));
    const elsewhere = hub.seen.filter(({ host }) => host === "cdn");
    expect(elsewhere.length).toBeGreaterThan(0);
    expect(elsewhere.every(({ authorization }) => authorization === undefined)).toBe(true);
  });
});

describe("a call that is aborted", () => {
  test("rejects with the reason, keeps what came, and a later one goes on", async () => {
    const data = bytes(300_000);
    hub.add(name, { files: smallModel(data) });
    hub.faults.set(transformer, (nth) => (nth === 1 ? { slowly: { bytes: 30_000, ms: 30 } } : undefined));
    const controller = new AbortController();
    const reason = new Error("enough");
    const onDownload = ({ files }: DownloadProgress) => {
      if (files.some(({ path: file, done }) => file === transformer && done >= 60_000)) controller.abort(reason);
    };
    await expect(pullModel(name, { signal: controller.signal, onDownload })).rejects.toBe(reason);
    const left = (await stat(`${blob(digestOf(transformer, data))}.incomplete`)).size;
    expect(left).toBeGreaterThanOrEqual(60_000);
    expect(await readdir(path.join(home, "hub/.locks/models--owner--model"))).toEqual([]);
    await pullModel();
    expect(hub.requestsFor(transformer).at(-1)?.range).toBe(`bytes=${left}-`);
    expect((await readFile(blob(digestOf(transformer, data)))).equals(data)).toBe(true);
  });

  test("before it begins, or while it waits for the hub, rejects with the reason too", async () => {
    hub.add(name, { files: smallModel() });
    await expect(pullModel(name, { signal: AbortSignal.abort("at once") })).rejects.toBe("at once");
    expect(hub.seen).toEqual([]);
    hub.faults.set("api", () => ({ status: 429, headers: { "retry-after": "60" } }));
    const controller = new AbortController();
    const pulling = pullModel(name, { signal: controller.signal });
    setTimeout(() => controller.abort("while waiting"), 100);
    await expect(pulling).rejects.toBe("while waiting");
  });
});

describe("calls at the same time", () => {
  test("of one model download each file once, and all of them have it", async () => {
    const data = bytes(200_000);
    hub.add(name, { files: smallModel(data) });
    hub.faults.set(transformer, () => ({ slowly: { bytes: 50_000, ms: 50 } }));
    const pulled = await Promise.all([pullModel(), pullModel(), pullModel()]);
    expect(new Set(pulled.map(({ path: folder }) => folder)).size).toBe(1);
    expect(hub.requestsFor(transformer).length).toBe(1);
    expect(pulled.filter(({ downloaded }) => downloaded >= data.length).length).toBe(1);
  });

  test("one goes on when the one that downloads is aborted", async () => {
    const data = bytes(200_000);
    hub.add(name, { files: smallModel(data) });
    hub.faults.set(transformer, (nth) => (nth === 1 ? { slowly: { bytes: 20_000, ms: 50 } } : undefined));
    const controller = new AbortController();
    const first = pullModel(name, { signal: controller.signal });
    first.catch(() => {});
    while (hub.requestsFor(transformer).length === 0) await new Promise((resolve) => setTimeout(resolve, 10));
    const second = pullModel();
    setTimeout(() => controller.abort("leaves"), 150);
    await expect(first).rejects.toBe("leaves");
    await second;
    expect((await readFile(blob(digestOf(transformer, data)))).equals(data)).toBe(true);
    expect(hub.requestsFor(transformer)[1]?.range).toMatch(/^bytes=\d+-$/);
  });

  test("a lock of a process that is gone, or that nobody has touched for long, is taken over", async () => {
    hub.add(name, { files: smallModel() });
    const folder = path.join(home, "hub/.locks/models--owner--model");
    await mkdir(folder, { recursive: true });
    const { hostname } = await import("node:os");
    const [first, second] = [digestOf(transformer, bytes(40_000)), digestOf("c.json", Buffer.from("{}"))];
    // No process has this number: it is above Linux's limit.
    await writeFile(
      path.join(folder, `${first}.owner`),
      JSON.stringify({ host: hostname(), pid: 2 ** 22 + 1, id: "x" }),
    );
    await writeFile(path.join(folder, `${second}.owner`), JSON.stringify({ host: "elsewhere", pid: 1, id: "y" }));
    const long = new Date(Date.now() - 40_000);
    await utimes(path.join(folder, `${second}.owner`), long, long);
    await pullModel();
    expect(await readdir(folder)).toEqual([]);
  });
});

describe("a disk", () => {
  const original = { symlink: fs.promises.symlink, statfs: fs.promises.statfs, open: fs.promises.open };
  const replace = (with_: Partial<typeof original>) => {
    Object.assign(fs.promises, with_);
    syncBuiltinESMExports();
  };
  afterEach(() => replace(original));
  const failing = (code: string) => Object.assign(new Error(`${code}: it failed`), { code, syscall: "write" });

  test("that has too little room is refused before the weights are downloaded", async () => {
    hub.add(name, { files: smallModel() });
    replace({ statfs: (async () => ({ bavail: 10, bsize: 1000, blocks: 100 })) as never });
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual(["cache", expect.stringMatching(/no room .*HF_HUB_CACHE/)]);
    expect(hub.requestsFor(transformer)).toEqual([]);
  });

  test("that becomes full is an error that says so, and what came is kept", async () => {
    const data = bytes(300_000);
    hub.add(name, { files: smallModel(data) });
    replace({
      open: (async (...of: Parameters<typeof original.open>) => {
        const handle = await original.open(...of);
        const write = handle.write.bind(handle) as (...rest: unknown[]) => Promise<unknown>;
        (handle as { write: unknown }).write = async (...rest: unknown[]) => {
          if ((rest[3] as number) > 100_000) throw failing("ENOSPC");
          return write(...rest);
        };
        return handle;
      }) as never,
    });
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual(["cache", expect.stringContaining("no room")]);
    expect(hub.requestsFor(transformer).length).toBe(1);
    replace(original);
    const left = (await stat(`${blob(digestOf(transformer, data))}.incomplete`)).size;
    expect(left).toBeGreaterThan(0);
    await pullModel();
    expect(hub.requestsFor(transformer).at(-1)?.range).toBe(`bytes=${left}-`);
  });

  test("without links holds the files themselves, once each where it can", async () => {
    const files = smallModel();
    // The same contents twice.
    files.set("schedules.json", Buffer.from("{}"));
    const commit = hub.add(name, { files });
    replace({
      symlink: async () => {
        throw failing("EPERM");
      },
    });
    const { path: folder } = await pullModel();
    const snapshot = Object.entries(await cacheOf()).filter(([file]) => file.startsWith(`snapshots/${commit}`));
    expect(snapshot.length).toBe(4);
    expect(snapshot.every(([, target]) => target === null)).toBe(true);
    for (const [file, data] of files) expect((await readFile(path.join(folder, file))).equals(data), file).toBe(true);
    expect(existsSync(blob(digestOf(transformer, bytes(40_000))))).toBe(false);
    expect(await pullModel()).toMatchObject({ downloaded: 0 });
  });

  test("that is read-only serves what is whole", async () => {
    hub.add(name, { files: smallModel() });
    const { path: folder } = await pullModel();
    await rm(path.join(home, "hub/models--owner--model/refs"), { recursive: true });
    await writeFile(path.join(home, "hub/models--owner--model/refs"), "in the way");
    expect(await pullModel()).toMatchObject({ path: folder, downloaded: 0 });
  });

  test("where the cache cannot be written is an error that names it", async () => {
    hub.add(name, { files: smallModel() });
    await writeFile(path.join(home, "hub"), "a file");
    const error = await refused(pullModel());
    expect([error.reason, error.message]).toEqual(["cache", expect.stringMatching(/cannot be written.*HF_HUB_CACHE/)]);
  });
});

describe("a text in place of a folder", () => {
  const locate = async (text = name, options = {}, env: Record<string, string> = {}) =>
    (await locateModel(text, { settings: await settingsOf(env), ...options })).path;

  test("is a path where there is one, and no name is asked for", async () => {
    const cwd = process.cwd();
    process.chdir(home);
    try {
      await mkdir("owner/model", { recursive: true });
      for (const text of ["owner/model", home, "not a name", "/absent/x/y", "./a/b", "a/b/c"])
        expect(await locate(text)).toBe(text);
      expect(hub.seen).toEqual([]);
    } finally {
      process.chdir(cwd);
    }
  });

  test("is a name: neither a folder nor a model is said of both", async () => {
    const error = await refused(locate("owner/absent"));
    expect(error.message).toContain(path.resolve("owner/absent"));
    expect(error.message).toContain("is no model of");
  });

  test("of a commit that is in the cache asks nobody", async () => {
    const commit = hub.add(name, { files: smallModel() });
    const folder = await locate();
    const before = hub.seen.length;
    expect(await locate(`${name}@${commit}`)).toBe(folder);
    expect(hub.seen.length).toBe(before);
  });

  test.each(["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])(
    "with %s is taken from the cache, or it is said what is missing",
    async (variable) => {
      const files = smallModel();
      const commit = hub.add(name, { files });
      const offline = { [variable]: "1" };
      const nothing = await refused(locate(name, {}, offline));
      expect([nothing.reason, nothing.message]).toEqual(["offline", expect.stringContaining('no revision "main"')]);
      const folder = await locate();
      const before = hub.seen.length;
      expect(await locate(name, {}, offline)).toBe(folder);
      expect(await locate(`${name}@${commit}`, {}, offline)).toBe(folder);
      const other = await refused(locate(name, { variant: "fp16", textEncoder3: false }, offline));
      for (const said of ['no part with the variant "fp16"', `\`flowturbo pull ${name} --variant fp16 --no-t5\``])
        expect(other.message).toContain(said);
      await rm(blob(digestOf(transformer, files.get(transformer)!)));
      const lacking = await refused(locate(name, {}, offline));
      for (const said of ["no weights for transformer", variable, `flowturbo pull ${name}`])
        expect(lacking.message).toContain(said);
      expect((await refused(pullModel(name, {}, offline))).reason).toBe("offline");
      expect(hub.seen.length).toBe(before);
    },
  );

  test("is taken from the cache, with a warning, where the hub is away or shows it no more", async () => {
    hub.add(name, { files: smallModel() });
    const folder = await locate();
    const settings = await settingsOf();
    const copy = { path: folder, warnings: [expect.stringContaining("The copy in the cache is used")] };
    hub.add(name, { files: smallModel(), access: "private" });
    expect(await locateModel(name, { settings })).toEqual(copy);
    hub.faults.set("api", () => ({ status: 500 }));
    expect(await locateModel(name, { settings })).toEqual(copy);
    await hub.stop();
    expect(await locateModel(name, { settings })).toEqual(copy);
  });

  test("a file that was damaged by its size is downloaded again", async () => {
    const files = smallModel();
    hub.add(name, { files });
    await locate();
    const file = blob(digestOf(transformer, files.get(transformer)!));
    await chmod(file, 0o644);
    await writeFile(file, "cut");
    await locate();
    expect(
      createHash("sha256")
        .update(await readFile(file))
        .digest("hex"),
    ).toBe(path.basename(file));
  });

  test("a snapshot of huggingface_hub is taken as it is", async () => {
    const files = smallModel();
    const commit = hub.add(name, { files });
    const root = path.join(home, "hub/models--owner--model");
    for (const [file, data] of files) {
      const [target, link] = [blob(digestOf(file, data)), path.join(root, "snapshots", commit, file)];
      await mkdir(path.dirname(target), { recursive: true });
      await mkdir(path.dirname(link), { recursive: true });
      await writeFile(target, data);
      await symlink(path.relative(path.dirname(link), target), link);
    }
    await mkdir(path.join(root, "refs"));
    await writeFile(path.join(root, "refs/main"), commit);
    expect(await locate()).toBe(path.join(root, "snapshots", commit));
    expect(hub.seen.every(({ path: asked }) => asked.startsWith("/api/"))).toBe(true);
  });
});
