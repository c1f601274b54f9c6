// Cost tables on disk: kept, merged, keyed; damage is as good as absence, and no writer loses what another has written.
import { execFile } from "node:child_process";
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { promisify } from "node:util";
import { build } from "esbuild";
import fc from "fast-check";
import { afterAll, describe, expect, it } from "vitest";
import { type CostEntry, entryOf } from "../../lib/serving/costs.js";
import { CostStore, costKey } from "../../lib/serving/store.js";

const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-costs-"));
afterAll(() => rmSync(cache, { recursive: true, force: true }));

const subject = { model: { layers: 4 }, runtime: { name: "onnxruntime" }, machine: { cpu: "x" } };
const predict = (batch: number, milliseconds: number) => entryOf("predict", batch, "64x64", [milliseconds]);

/** Without the moments of measuring. */
const timeless = (entries: readonly CostEntry[]) => entries.map(({ at: _, ...entry }) => entry);

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
  it("gives back what was written, newer entries in place of older ones, in one file", async () => {
    const store = new CostStore(costKey(subject), cache);
    expect(await store.read()).toEqual([]);
    const [a, b, c] = [predict(1, 1), predict(2, 2), predict(1, 3)];
    await Promise.all([store.write([a], { model: "m" }), store.write([b], { model: "m" })]);
    await store.write([c], { model: "m" });
    expect(timeless(await new CostStore(costKey(subject), cache).read())).toEqual(timeless([c, b]));
    const files = readdirSync(store.folder);
    expect(files).toHaveLength(1);
    const content = JSON.parse(readFileSync(path.join(store.folder, files[0]!), "utf8"));
    expect(content).toMatchObject({ format: 2, model: "m" });
  });

  it("ignores damaged files and those of another key, and leaves them", async () => {
    const store = new CostStore("f".repeat(64), cache);
    mkdirSync(store.folder, { recursive: true });
    const good = { ...predict(1, 1), at: 1 };
    const contents = ["", "{", "[]", JSON.stringify({ format: 2, key: "another", entries: [good] })];
    const foreign = contents.map((_, index) => `${1000 + index}-${"0".repeat(12)}.json`);
    for (const [index, content] of contents.entries()) writeFileSync(path.join(store.folder, foreign[index]!), content);
    mkdirSync(path.join(store.folder, `2000-${"0".repeat(12)}.json`));
    writeFileSync(path.join(store.folder, "notes.txt"), "");
    expect(await store.read()).toEqual([]);
    await store.write([predict(1, 2)], {});
    expect(timeless(await store.read())).toEqual(timeless([predict(1, 2)]));
    expect(readdirSync(store.folder)).toEqual(expect.arrayContaining([...foreign, "notes.txt"]));
  });

  it("writes again what it has read if the folder is gone meanwhile", async () => {
    const store = new CostStore("d".repeat(64), cache);
    await store.write([predict(1, 1)], {});
    rmSync(store.folder, { recursive: true });
    await store.write([predict(1, 1), predict(2, 2)], {});
    expect(timeless(await store.read())).toEqual(timeless([predict(1, 1), predict(2, 2)]));
  });

  it("lies in $XDG_CACHE_HOME, if that is an absolute path", () => {
    const before = process.env.XDG_CACHE_HOME;
    try {
      process.env.XDG_CACHE_HOME = "/somewhere";
      expect(new CostStore("k").folder).toBe("/somewhere/flowturbo/costs/k");
      process.env.XDG_CACHE_HOME = "relative";
      expect(new CostStore("k").folder).toBe(path.join(os.homedir(), ".cache/flowturbo/costs/k"));
    } finally {
      if (before === undefined) delete process.env.XDG_CACHE_HOME;
      else process.env.XDG_CACHE_HOME = before;
    }
  });
});

describe("several stores of one table", () => {
  it("one that has read an entry long ago does not replace a later one", async () => {
    const key = "c".repeat(64);
    await new CostStore(key, cache).write([predict(1, 1), predict(2, 2)], {});
    const stale = new CostStore(key, cache);
    const table = await stale.read();
    await new CostStore(key, cache).write([predict(1, 10)], {});
    // All that it knows, one of it measured again; and once more.
    await stale.write([table[0]!, predict(2, 20)], {});
    await stale.write([table[0]!, predict(2, 20), predict(4, 40)], {});
    expect(timeless(await new CostStore(key, cache).read())).toEqual(
      timeless([predict(1, 10), predict(2, 20), predict(4, 40)]),
    );
  });

  it("one that writes late what it has measured early does not replace what another has measured since", async () => {
    const key = "f".repeat(64);
    const early = { ...predict(1, 1), at: Date.now() - 60_000 };
    const since = predict(1, 2);
    await new CostStore(key, cache).write([since], {});
    await new CostStore(key, cache).write([early, predict(2, 2)], {});
    expect(timeless(await new CostStore(key, cache).read())).toEqual(timeless([since, predict(2, 2)]));
  });

  it("hold at the end the latest entry of each launch, whatever the order of reads and writes", async () => {
    const stores = 3;
    const step = fc.record({
      store: fc.nat(stores - 1),
      batch: fc.option(fc.integer({ min: 1, max: 4 })),
      // Whether the next step begins before the end of this one.
      overlaps: fc.boolean(),
    });
    let run = 0;
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 20 }), async (steps) => {
        const key = `${++run}`.padStart(64, "b");
        const all = Array.from({ length: stores }, () => ({
          store: new CostStore(key, cache),
          table: new Map<number, CostEntry>(),
        }));
        /** Measured for each batch: the latest first, then those at the same time as it. */
        const latest = new Map<number, number[]>();
        let pending: Promise<unknown>[] = [];
        let value = 0;
        for (const { store: index, batch, overlaps } of steps) {
          const { store, table } = all[index]!;
          if (batch === null) {
            // As a process that starts.
            await Promise.all(pending.splice(0));
            for (const entry of await store.read()) table.set(entry.batch, entry);
            continue;
          }
          const entry = predict(batch, ++value);
          table.set(batch, entry);
          latest.set(batch, pending.length > 0 ? [...(latest.get(batch) ?? []), value] : [value]);
          pending.push(store.write([...table.values()], {}));
          if (overlaps) continue;
          await Promise.all(pending);
          pending = [];
        }
        await Promise.all(pending);
        const found = new Map((await new CostStore(key, cache).read()).map((entry) => [entry.batch, entry]));
        expect([...found.keys()].sort()).toEqual([...latest.keys()].sort());
        for (const [batch, values] of latest) expect(values).toContain(found.get(batch)!.milliseconds);
      }),
      { numRuns: 60 },
    );
  });

  it("forget what was measured before a reset, whoever writes it later, and keep what is measured after", async () => {
    const key = "e".repeat(64);
    const [resetting, running, late] = [0, 1, 2].map(() => new CostStore(key, cache)) as [
      CostStore,
      CostStore,
      CostStore,
    ];
    await resetting.write([predict(1, 1), predict(2, 2)], {});
    const table = await running.read();
    /** Measured before the reset, and written after it. */
    const unwritten = predict(4, 4);
    await late.read();
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(await running.lastReset()).toBe(0);
    await resetting.reset({});
    expect(await new CostStore(key, cache).read()).toEqual([]);
    expect(await running.lastReset()).toBeGreaterThan(0);
    await new Promise((resolve) => setTimeout(resolve, 5));
    const fresh = predict(2, 20);
    await running.write([table[0]!, fresh], {});
    await late.write([unwritten], {});
    expect(await late.lastReset()).toBe(await resetting.lastReset());
    // A process that starts now, and the one that has reset.
    for (const store of [new CostStore(key, cache), resetting]) expect(await store.read()).toEqual([fresh]);
    expect(readdirSync(running.folder)).toHaveLength(1);
    await resetting.reset({});
    expect(await new CostStore(key, cache).read()).toEqual([]);
    // On a clock that is behind the reset, what is measured after it counts all the same.
    const behind = { ...predict(1, 5), at: 1 };
    await resetting.write([behind], {});
    expect(timeless(await new CostStore(key, cache).read())).toEqual(timeless([behind]));
  });

  it("in processes that write at the same time lose no entry", async () => {
    const file = path.join(cache, "writer.mjs");
    await build({
      stdin: {
        contents: `
          import { entryOf } from "./lib/serving/costs.ts";
          import { CostStore } from "./lib/serving/store.ts";
          const [writer, key, cache] = process.argv.slice(2);
          const store = new CostStore(key, cache);
          const entries = (await store.read()).filter(({ graph }) => graph !== "shared");
          for (let batch = 1; batch <= 25; batch++) {
            entries.push(entryOf("graph " + writer, batch, "64x64", [batch]));
            // Every writer measures this one.
            entries.unshift(entryOf("shared", 1, "64x64", [1000 * batch + Number(writer) + 1]));
            await store.write(entries, {});
            entries.shift();
          }
        `,
        resolveDir: path.resolve(import.meta.dirname, "../.."),
      },
      ...{ bundle: true, platform: "node", format: "esm", outfile: file, logLevel: "error" },
    });
    const key = "a".repeat(64);
    const writers = [0, 1, 2, 3, 4, 5];
    await Promise.all(writers.map((writer) => promisify(execFile)(process.execPath, [file, `${writer}`, key, cache])));
    const store = new CostStore(key, cache);
    const entries = await store.read();
    const found = entries.map(({ graph, batch }) => `${graph} ${batch}`);
    const expected = writers.flatMap((writer) => Array.from({ length: 25 }, (_, at) => `graph ${writer} ${at + 1}`));
    expect(found.sort()).toEqual([...expected, "shared 1"].sort());
    // The latest time is that of the last write of some writer.
    expect(entries.find(({ graph }) => graph === "shared")!.milliseconds).toBeGreaterThan(25_000);
    // The last writer has merged the others' files.
    expect(readdirSync(store.folder).length).toBeLessThanOrEqual(writers.length);
  });
});
