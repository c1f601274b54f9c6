// The binaries of onnxruntime-node: what is said where there are none for a platform, and removing those of the others.
import { spawnSync } from "node:child_process";
import {
  chmodSync,
  cpSync,
  existsSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { InstallationError } from "../../lib/errors.js";
import { whyBroken, whyUnsupported } from "../../lib/runtimes/onnxruntime/binaries.js";
import { findPrunable, onnxRuntimeFolder, prune } from "../../lib/runtimes/onnxruntime/prune.js";
import { root } from "../support/fixtures.js";

const linux = { os: "linux", cpu: "x64", libc: "glibc" } as const;

describe("a platform without binaries", () => {
  it("is named with what to do", () => {
    expect(whyUnsupported({ ...linux, libc: "musl" })!.reason).toMatch(/no binaries for Linux with musl.*Alpine/);
    expect(whyUnsupported({ ...linux, libc: "musl" })!.remedy).toMatch(/glibc/);
    expect(whyUnsupported({ os: "darwin", cpu: "x64", libc: null })!.reason).toMatch(/Intel Macs/);
    expect(whyUnsupported({ os: "freebsd", cpu: "x64", libc: null })!.reason).toMatch(/freebsd-x64/);
    expect(whyUnsupported({ ...linux, cpu: "riscv64" })!.remedy).toMatch(/linux-x64/);
  });

  it("is none of those that onnxruntime-node has a folder for", async () => {
    const binaries = path.join(await onnxRuntimeFolder(), "bin/napi-v6");
    const platforms = readdirSync(binaries).flatMap((os) =>
      readdirSync(path.join(binaries, os)).map((cpu) => ({ os, cpu, libc: null })),
    );
    expect(platforms.length).toBeGreaterThan(0);
    for (const platform of platforms) expect(whyUnsupported(platform)).toBe(null);
    // In an installation that was not pruned, the table has no platform too many either.
    if (platforms.length > 1) expect(platforms).toContainEqual({ os: "darwin", cpu: "arm64", libc: null });
    expect(platforms.some(({ os, cpu }) => os === "darwin" && cpu === "x64")).toBe(false);
  });

  it("comes before what the attempt to load them said", () => {
    const message =
      "Cannot find module '../bin/napi-v6/darwin/x64/onnxruntime_binding.node'\nRequire stack:\n- /a/b.js";
    const found = whyBroken(message, { os: "darwin", cpu: "x64", libc: null });
    expect(found.reason).toMatch(/Intel Macs \(darwin-x64\) \(Cannot find module .*\)\.$/);
    expect(found.reason).not.toContain("\n");
    expect(whyBroken(message, linux).reason).toMatch(/lacks its binaries for linux-x64/);
    expect(whyBroken(message, linux).remedy).toMatch(/npm install/);
    expect(whyBroken("Cannot find package 'onnxruntime-node'", linux).remedy).toMatch(/ONNXRUNTIME_NODE_INSTALL=skip/);
  });
});

/** Runs a module that finds another platform than there is. */
function onPlatform(platform: { os: string; cpu: string; musl?: boolean }, code: string) {
  const preload = `
    import fs from "node:fs";
    import { syncBuiltinESMExports } from "node:module";
    const define = (name, value) => Object.defineProperty(process, name, { value });
    define("platform", ${JSON.stringify(platform.os)});
    define("arch", ${JSON.stringify(platform.cpu)});
    const { readFileSync } = fs;
    if (${platform.musl === true})
      fs.readFileSync = (file, ...rest) =>
        file === "/proc/self/maps" ? "7f00-7f01 r-xp 0 08:01 1 /lib/ld-musl-x86_64.so.1\\n" : readFileSync(file, ...rest);
    syncBuiltinESMExports();`;
  return spawnSync(
    process.execPath,
    [`--import=data:text/javascript,${encodeURIComponent(preload)}`, "--input-type=module", "--eval", code],
    { cwd: root, encoding: "utf8" },
  );
}
const loading = (options: object, folder?: string) => `
  import { FlowTurbo } from ${JSON.stringify(path.join(root, "dist/index.js"))};
  console.log("imported");
  const model = await FlowTurbo.load(${folder ? JSON.stringify(folder) : "undefined"}, ${JSON.stringify(options)})
    .catch((error) => console.log(error.code, error.package, error.message));
  await model?.dispose();`;

describe("a process on a platform without binaries", () => {
  it.each([
    ["an Intel Mac", { os: "darwin", cpu: "x64" }, "Intel Macs \\(darwin-x64\\)"],
    ["Alpine", { os: "linux", cpu: "x64", musl: true }, "Linux with musl, such as Alpine"],
    ["FreeBSD", { os: "freebsd", cpu: "x64" }, "freebsd-x64"],
  ])("is told so on import, once, and by load() before anything else: %s", (_, platform, what) => {
    for (const options of [{ runtime: "onnxruntime" }, {}])
      for (const folder of [undefined, "/nowhere"]) {
        const { stdout, stderr } = onPlatform(platform, loading(options, folder));
        const named = `onnxruntime-node has no binaries for ${what}\\.`;
        expect(stderr.match(new RegExp(`\\[FLOWTURBO_PLATFORM\\] FlowTurboWarning: ${named}`, "g"))).toHaveLength(1);
        expect(stdout).toMatch(new RegExp(`^imported\nERR_FLOWTURBO_INSTALLATION onnxruntime-node ${named}`));
      }
  });

  it("is none on this one", () => {
    const { stdout, stderr } = onPlatform({ os: process.platform, cpu: process.arch }, loading({}));
    expect([stdout, stderr]).toEqual(["imported\n", ""]);
  });
});

describe("pruning", () => {
  let folder: string;
  const file = (...parts: string[]) => path.join(folder, ...parts);
  const write = (name: string, bytes: number) => {
    mkdirSync(path.dirname(file(name)), { recursive: true });
    writeFileSync(file(name), Buffer.alloc(bytes));
  };
  beforeEach(() => {
    folder = mkdtempSync(path.join(tmpdir(), "flowturbo-prune-"));
    for (const platform of ["darwin/arm64", "linux/arm64", "linux/x64", "win32/x64"])
      write(`bin/napi-v6/${platform}/onnxruntime_binding.node`, 100);
    write("bin/napi-v6/linux/x64/libonnxruntime_providers_cuda.so", 7);
    write("dist/index.js", 10);
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  it("removes other platforms, and all of this one stays", async () => {
    const found = await findPrunable(folder, linux);
    expect(found).toEqual({
      folder,
      paths: ["bin/napi-v6/darwin", "bin/napi-v6/linux/arm64", "bin/napi-v6/win32"],
      bytes: 300,
      linkedBytes: 0,
    });
    await prune(found);
    expect(readdirSync(folder, { recursive: true, encoding: "utf8" }).filter((name) => /\.\w+$/.test(name)).sort()).toEqual([
      "bin/napi-v6/linux/x64/libonnxruntime_providers_cuda.so",
      "bin/napi-v6/linux/x64/onnxruntime_binding.node",
      "dist/index.js",
    ]); // biome-ignore format: one list
    const again = await findPrunable(folder, linux);
    expect(again).toEqual({ folder, paths: [], bytes: 0, linkedBytes: 0 });
    await prune(again);
  });

  it("refuses to leave nothing", async () => {
    for (const platform of [
      { ...linux, libc: "musl" as const },
      { os: "darwin", cpu: "x64", libc: null },
    ])
      await expect(findPrunable(folder, platform)).rejects.toThrow(InstallationError);
    // A folder from which the binary is gone, too.
    rmSync(file("bin/napi-v6/linux/x64/onnxruntime_binding.node"));
    await expect(findPrunable(folder, linux)).rejects.toThrow(/no binaries for linux-x64/);
    rmSync(file("bin/napi-v6/linux/x64"), { recursive: true });
    await expect(findPrunable(folder, linux)).rejects.toThrow(/no binaries for linux-x64/);
    rmSync(file("bin"), { recursive: true });
    await expect(findPrunable(folder, linux)).rejects.toThrow(/no binaries for linux-x64/);
  });

  it("follows no link out of the folder", async () => {
    const outside = mkdtempSync(path.join(tmpdir(), "flowturbo-outside-"));
    try {
      writeFileSync(path.join(outside, "kept"), "1");
      symlinkSync(outside, file("bin/napi-v6/freebsd"));
      symlinkSync(outside, file("bin/napi-v6/win32/arm64"));
      await prune(await findPrunable(folder, linux));
      expect(existsSync(file("bin/napi-v6/freebsd"))).toBe(false);
      expect(existsSync(file("bin/napi-v6/win32"))).toBe(false);
      expect(readdirSync(outside)).toEqual(["kept"]);
      // Nor where a folder on the way is one.
      cpSync(file("bin"), path.join(outside, "bin"), { recursive: true });
      mkdirSync(path.join(outside, "bin/napi-v6/win32"));
      rmSync(file("bin"), { recursive: true });
      symlinkSync(path.join(outside, "bin"), file("bin"));
      await expect(findPrunable(folder, linux)).rejects.toThrow(/is no folder but a link/);
      expect(readdirSync(path.join(outside, "bin/napi-v6"))).toContain("win32");
    } finally {
      rmSync(outside, { recursive: true });
    }
  });

  it("says how much is hard links, whose files others keep", async () => {
    linkSync(file("bin/napi-v6/win32/x64/onnxruntime_binding.node"), file("store"));
    const found = await findPrunable(folder, linux);
    expect([found.bytes, found.linkedBytes]).toEqual([300, 100]);
    await prune(found);
    expect(existsSync(file("store"))).toBe(true);
  });

  it("refuses a folder that all projects share", async () => {
    const shared = file("store/v11/links/@/onnxruntime-node/1.30.0/abc/node_modules/onnxruntime-node");
    cpSync(file("bin"), path.join(shared, "bin"), { recursive: true });
    await expect(findPrunable(shared, linux)).rejects.toThrow(/shared by all projects/);
  });

  it("says what it could not remove, and that it can be run again", async () => {
    const found = await findPrunable(folder, linux);
    const busy = Object.assign(new Error("EBUSY: busy"), { code: "EBUSY" });
    const remove: typeof rm = (name, options) =>
      String(name).endsWith("win32") ? Promise.reject(busy) : rm(name, options);
    await expect(prune(found, remove)).rejects.toMatchObject({
      code: "ERR_FLOWTURBO_INSTALLATION",
      message: expect.stringMatching(/win32 cannot be removed \(EBUSY\); others may have been.*Run it again/),
    });
    const left = await findPrunable(folder, linux);
    expect(left.paths).toEqual(["bin/napi-v6/win32"]);
    await prune(left);
    expect(await findPrunable(folder, linux)).toMatchObject({ paths: [] });
  });

  it("removes nothing where it may not write", () => {
    // root may write everywhere: another user then, in a process of its own.
    const isRoot = process.getuid?.() === 0;
    chmodSync(folder, 0o755);
    if (!isRoot) chmodSync(file("bin/napi-v6/win32/x64"), 0o555);
    const script = `
      const fs = require("node:fs");
      ${isRoot ? "process.setgid(65534); process.setuid(65534);" : ""}
      process.chdir("/");
      import(${JSON.stringify(path.join(folder, "prune.mjs"))})
        .then(({ run }) => run(${JSON.stringify(folder)}))
        .catch((error) => console.log(error.code, error.message));`;
    const esbuild = spawnSync(
      path.join(root, "node_modules/.bin/esbuild"),
      ["lib/runtimes/onnxruntime/prune.ts", "--bundle", "--platform=node", "--format=esm", `--outfile=${file("module.mjs")}`],
      { cwd: root, encoding: "utf8" },
    ); // biome-ignore format: one command
    expect(esbuild.status, esbuild.stderr).toBe(0);
    writeFileSync(
      file("prune.mjs"),
      `import { findPrunable, prune } from "./module.mjs";
       export const run = async (folder) => prune(await findPrunable(folder, ${JSON.stringify(linux)}));`,
    );
    const { stdout, stderr } = spawnSync(process.execPath, ["-e", script], { encoding: "utf8" });
    if (!isRoot) chmodSync(file("bin/napi-v6/win32/x64"), 0o755);
    expect(stdout, stderr).toMatch(/^ERR_FLOWTURBO_INSTALLATION .* cannot be written \(EACCES\)/);
    for (const platform of ["darwin/arm64", "linux/arm64", "win32/x64"])
      expect(existsSync(file("bin/napi-v6", platform, "onnxruntime_binding.node")), platform).toBe(true);
  });
});
