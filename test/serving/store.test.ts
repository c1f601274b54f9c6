// Cost tables on disk: kept, merged, keyed; damage is as good as absence.
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { entryOf } from "../../lib/serving/costs.js";
import { CostStore, costKey } from "../../lib/serving/store.js";

const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-costs-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const subject = { model: { layers: 4 }, runtime: { name: "onnxruntime" }, machine: { cpu: "x" } };

describe("costKey", () => {
  it("depends on the model, the runtime and the machine, and on nothing else", () => {
    expect(costKey({ ...subject, path: "/elsewhere" } as typeof subject)).toBe(costKey(subject));
    const others = [
      { ...subject, model: { layers: 5 } },
      { ...subject, runtime: { name: "tensorrt" } },
      { ...subject, machine: { cpu: "y" } },
    ];
    expect(new Set([subject, ...others].map(costKey)).size).toBe(4);
  });
});

describe("CostStore", () => {
  it("gives back what was written, newer entries in place of older ones, and leaves no other file", async () => {
    const store = new CostStore(costKey(subject), folder);
    expect(await store.read()).toEqual([]);
    const [a, b, c] = [
      entryOf("predict", 1, "64x64", [1]),
      entryOf("predict", 2, "64x64", [2]),
      entryOf("predict", 1, "64x64", [3]),
    ];
    await Promise.all([store.write([a], { model: "m" }), store.write([b], { model: "m" })]);
    await store.write([c], { model: "m" });
    expect(await new CostStore(costKey(subject), folder).read()).toEqual([c, b]);
    expect(JSON.parse(readFileSync(store.file, "utf8"))).toMatchObject({ format: 1, model: "m" });
    expect(readdirSync(path.dirname(store.file))).toEqual([path.basename(store.file)]);
  });

  it("takes a damaged file, or one of another key, for none, and replaces it", async () => {
    const store = new CostStore("f".repeat(64), folder);
    mkdirSync(path.dirname(store.file), { recursive: true });
    const good = entryOf("predict", 1, "64x64", [1]);
    for (const content of ["", "{", "[]", JSON.stringify({ format: 1, key: "another", entries: [good] })]) {
      writeFileSync(store.file, content);
      expect(await store.read()).toEqual([]);
    }
    await store.write([good], {});
    expect(await store.read()).toEqual([good]);
  });

  it("lies in $XDG_CACHE_HOME, if that is an absolute path", () => {
    const before = process.env.XDG_CACHE_HOME;
    try {
      process.env.XDG_CACHE_HOME = "/somewhere";
      expect(new CostStore("k").file).toBe("/somewhere/flowturbo/costs/k.json");
      process.env.XDG_CACHE_HOME = "relative";
      expect(new CostStore("k").file).toBe(path.join(os.homedir(), ".cache/flowturbo/costs/k.json"));
    } finally {
      if (before === undefined) delete process.env.XDG_CACHE_HOME;
      else process.env.XDG_CACHE_HOME = before;
    }
  });
});
