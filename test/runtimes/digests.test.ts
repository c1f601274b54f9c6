// Digests of weight files: one reading for all that ask at the same time, whatever becomes of each of them.
import { createHash } from "node:crypto";
import {
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { FileVersion } from "../../lib/common/files.js";
import { CheckpointError } from "../../lib/errors.js";
import { DigestMemory } from "../../lib/runtimes/tensorrt/digests.js";

let folder: string;
beforeAll(() => {
  folder = realpathSync(mkdtempSync(path.join(tmpdir(), "flowturbo-digests-")));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** A file several times as long as what is read at a time. */
function weights(name: string, megabytes = 12): { version: FileVersion; sha256: string } {
  const file = path.join(folder, name);
  const bytes = Buffer.alloc(megabytes * 2 ** 20, name);
  writeFileSync(file, bytes);
  const { size, mtimeMs } = statSync(file);
  return { version: { file, size, mtimeMs }, sha256: createHash("sha256").update(bytes).digest("hex") };
}
const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

describe("a digest that several ask for", () => {
  it("is not lost for the others when the first is aborted", async () => {
    const { version, sha256 } = weights("first");
    const memory = new DigestMemory(folder);
    const controller = new AbortController();
    const reason = new Error("only mine");
    const reported: number[] = [];
    const first = rejection(
      memory.digest(version, { signal: controller.signal, onBytes: () => controller.abort(reason) }),
    );
    const second = memory.digest(version, { onBytes: (bytes) => reported.push(bytes) });
    const third = memory.digest(version, { signal: new AbortController().signal });
    expect(await first).toBe(reason);
    expect((await second).sha256).toBe(sha256);
    expect((await third).sha256).toBe(sha256);
    // All of them are told how far it is.
    expect(reported.at(-1)).toBe(version.size);
  });

  it("is not lost for the others when the listener of one throws, which ends its own call", async () => {
    const { version, sha256 } = weights("listener");
    const memory = new DigestMemory(folder);
    const own = new Error("a listener's own");
    let reports = 0;
    const onBytes = () => {
      reports++;
      throw own;
    };
    const first = rejection(memory.digest(version, { onBytes }));
    const second = memory.digest(version);
    expect(await first).toBe(own);
    expect((await second).sha256).toBe(sha256);
    expect(reports).toBe(1);
    expect(await rejection(memory.digest(version, { onBytes }))).toBe(own);
  });

  it("is read once", async () => {
    const { version, sha256 } = weights("once");
    const memory = new DigestMemory(folder);
    let reports = 0;
    const ask = () => memory.digest(version, { onBytes: () => void reports++ });
    const all = await Promise.all([ask(), ask(), ask()]);
    expect(all.map((digest) => digest.sha256)).toEqual([sha256, sha256, sha256]);
    // Three blocks, told to each.
    expect(reports).toBe(9);
  });

  it("is stopped when all are aborted, and read again for the next", async () => {
    const { version, sha256 } = weights("all");
    const memory = new DigestMemory(folder);
    const controllers = [new AbortController(), new AbortController()];
    let reports = 0;
    const onBytes = () => {
      reports++;
      for (const controller of controllers) controller.abort("enough");
    };
    const asked = controllers.map(({ signal }) => rejection(memory.digest(version, { signal, onBytes })));
    expect(await Promise.all(asked)).toEqual(["enough", "enough"]);
    expect(reports).toBeLessThan(3);
    expect((await memory.digest(version)).sha256).toBe(sha256);
    expect(await rejection(memory.digest(version, { signal: AbortSignal.abort("before") }))).toBe("before");
  });

  it("is refused only for those that expect another version of the file", async () => {
    const { version, sha256 } = weights("versions");
    const memory = new DigestMemory(folder);
    const old = rejection(memory.digest({ ...version, mtimeMs: version.mtimeMs - 1 }));
    const present = memory.digest(version);
    expect(await old).toBeInstanceOf(CheckpointError);
    expect((await present).sha256).toBe(sha256);
  });
});

describe("the memory of digests", () => {
  /** Settled files are remembered: those that have not changed for two seconds. */
  const settled = async (name: string) => {
    const { version, ...rest } = weights(name, 1);
    const past = new Date(Date.now() - 60_000);
    utimesSync(version.file, past, past);
    while (Date.now() - statSync(version.file).ctimeMs < 2050) await new Promise((resolve) => setTimeout(resolve, 100));
    return { version: { ...version, mtimeMs: statSync(version.file).mtimeMs }, ...rest };
  };

  const kept = (folder: string) =>
    readdirSync(folder).map((name) => JSON.parse(readFileSync(path.join(folder, name), "utf8")).sha256 as string);

  it("keeps all that end at the same time, of several memories as of several processes; leaves no other file", async () => {
    const own = mkdtempSync(path.join(folder, "memory-"));
    const files = await Promise.all(["a", "b", "c", "d"].map(settled));
    // What they have in common is the folder: nothing in memory.
    const memories = files.map(() => new DigestMemory(own));
    await Promise.all(
      memories.map((memory, index) =>
        Promise.all([files[index]!, files[(index + 1) % 4]!].map(({ version }) => memory.digest(version))),
      ),
    );
    for (const name of readdirSync(own)) expect(name).toMatch(/^digest-[0-9a-f]{32}\.json$/);
    expect(kept(own).sort()).toEqual(files.map(({ sha256 }) => sha256).sort());
    for (const name of readdirSync(own)) expect(statSync(path.join(own, name)).mode & 0o777).toBe(0o600);
    // Another one reads them from there, and not the files.
    let reports = 0;
    const again = new DigestMemory(own);
    for (const { version, sha256 } of files)
      expect((await again.digest(version, { onBytes: () => void reports++ })).sha256).toBe(sha256);
    expect(reports).toBe(0);
  });

  it.each(["{", '{"identity":"another","sha256":"0"}', "null"])(
    "reads a file again whose memory is %s",
    async (text) => {
      const own = mkdtempSync(path.join(folder, "damaged-"));
      const { version, sha256 } = await settled("e");
      await new DigestMemory(own).digest(version);
      const [name] = readdirSync(own);
      writeFileSync(path.join(own, name!), text);
      expect((await new DigestMemory(own).digest(version)).sha256).toBe(sha256);
      expect(kept(own)).toEqual([sha256]);
    },
  );
});
