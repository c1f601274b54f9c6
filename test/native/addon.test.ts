// The addons themselves, without any of NVIDIA's libraries: loading, arguments, locks, workers, and the search for the
// libraries with small stand-ins that know nothing but a version.
import { copyFileSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { Worker } from "node:worker_threads";
import { afterEach, expect, it } from "vitest";
import type { NativeError } from "../../lib/runtimes/tensorrt/addon.js";
import { tensorRtKinds } from "../../lib/runtimes/tensorrt/flavours.js";
import { examineTensorRt } from "../../lib/runtimes/tensorrt/libraries.js";
import { loadAddon } from "../support/addon.js";
import { root } from "../support/fixtures.js";
import { cli, describeAddons, standIn, startNode, temporaryFolder } from "./support.js";

const environment = { ...process.env };
afterEach(() => {
  process.env = { ...environment };
});

interface Found {
  readonly name: string;
  readonly reason: string;
  readonly places: readonly { readonly error: string | null }[];
  readonly problems: readonly { readonly cause: string; readonly remedy: string }[];
}
/** What `flowturbo doctor --json` found of runtimes. */
const foundIn = (output: string): Found[] => JSON.parse(output).runtimes;

const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error: NativeError) => error,
  );
const driver = ["libcuda.so.1"].some((name) =>
  ["/usr/lib/x86_64-linux-gnu", "/usr/lib64"].some((folder) => existsSync(path.join(folder, name))),
);

describeAddons("an addon", () => {
  it.each(tensorRtKinds)("for %s says what it was compiled for and refuses what is not there", async (kind) => {
    const addon = loadAddon(kind);
    const { floor, ceiling, headers, flags, ...rest } = addon.describe();
    expect(rest.kind).toBe(kind);
    expect(headers >= floor && headers < ceiling).toBe(true);
    expect(flags).toContain("kTF32");
    const missing = await rejection(addon.open("/nowhere/lib.so", "/nowhere/parser.so").promise);
    expect(missing).toMatchObject({ code: "LIBRARY_NOT_LOADED" });
    expect(missing!.message).toMatch(/nowhere.*No such file/);
    const other = await rejection(addon.open("libm.so.6", "libm.so.6").promise);
    expect(other).toMatchObject({
      code: "LIBRARY_NOT_LOADED",
      message: expect.stringContaining("getInferLibMajorVersion"),
    });
    const cuda = await rejection(addon.cuda().promise);
    if (!driver) expect(cuda).toMatchObject({ code: "NO_DRIVER" });
  });

  it("refuses every wrong argument before it does anything", () => {
    const addon = loadAddon("tensorrt-rtx") as unknown as Record<string, (...values: unknown[]) => unknown>;
    const request = {
      ...{ onnx: new Uint8Array(1), files: [], initializers: [], profiles: [], targets: [], flags: [] },
      ...{ optimizationLevel: -1, workspaceBytes: 0, planPath: "/nowhere/plan", timingsPath: "", logPath: "" },
    };
    const none = () => undefined;
    const build = (change: object) => () => addon.build!("lib", "parser", { ...request, ...change }, none);
    const wrong: (() => unknown)[] = [
      () => addon.open!(),
      () => addon.open!("lib"),
      () => addon.open!(1, 2),
      () => addon.open!("a\0b", "c"),
      () => addon.tryLock!(),
      () => addon.tryLock!({}),
      () => addon.build!(),
      () => addon.build!("lib", "parser"),
      () => addon.build!("lib", "parser", null, none),
      () => addon.build!("lib", "parser", none, none),
      () => addon.build!("lib", "parser", request),
      build({ onnx: "text" }),
      build({ onnx: new Float32Array(4) }),
      build({ onnx: undefined }),
      build({ files: {} }),
      build({ files: [1] }),
      build({ files: [{ path: 1, identity: "" }] }),
      build({ initializers: [{ name: "w", file: 0, offset: 0, length: 1 }] }),
      build({ files: [{ path: "a", identity: "b" }], initializers: [{ name: "w", file: 0, offset: -1, length: 1 }] }),
      build({ files: [{ path: "a", identity: "b" }], initializers: [{ name: "w", file: 0.5, offset: 0, length: 1 }] }),
      build({
        files: [{ path: "a", identity: "b" }],
        initializers: [{ name: "w", file: 0, offset: 0, length: 2 ** 60 }],
      }),
      build({ profiles: [{}] }),
      build({ profiles: [[{ input: "x", dimensions: [0] }]] }),
      build({ profiles: [[{ input: "x", dimensions: [Number.NaN] }]] }),
      build({ profiles: [[{ input: "x", dimensions: ["1"] }]] }),
      build({ profiles: [[{ input: "x", dimensions: new Array(9).fill(1) }]] }),
      build({ targets: ["8.6"] }),
      build({ targets: [-1] }),
      build({ flags: [1] }),
      build({ optimizationLevel: 6 }),
      build({ workspaceBytes: Number.POSITIVE_INFINITY }),
      build({ planPath: null }),
      build({ timingsPath: null }),
      build({ logPath: undefined }),
    ];
    // Arrays that claim more elements than memory could hold.
    const endless = new Array(2 ** 32 - 1);
    for (const field of ["files", "initializers", "profiles", "targets", "flags"])
      wrong.push(build({ [field]: endless }));
    wrong.push(build({ profiles: [endless] }), build({ profiles: [[{ input: "x", dimensions: endless }]] }));
    for (const call of wrong) expect(call, call.toString()).toThrow(/Expected/);
    const throwing = new Proxy(
      {},
      {
        get: () => {
          throw new Error("a getter's own");
        },
      },
    );
    expect(() => addon.build!("lib", "parser", throwing, none)).toThrow("a getter's own");
  });

  it("locks a file among threads and processes, and no lock outlives its process", async () => {
    const addon = loadAddon("tensorrt-rtx");
    const file = path.join(temporaryFolder(), "x.lock");
    const release = addon.tryLock(file)!;
    expect(addon.tryLock(file)).toBeNull();
    expect(loadAddon("tensorrt").tryLock(file)).toBeNull();
    release();
    release();
    expect(existsSync(file)).toBe(false);
    const script = `import { createRequire } from "node:module";
      const addon = createRequire(${JSON.stringify(path.join(root, "package.json"))})(${JSON.stringify(addonFile("tensorrt-rtx"))});
      globalThis.kept = addon.tryLock(${JSON.stringify(file)}); console.log("locked"); setInterval(() => {}, 1000);`;
    const { child, finished } = startNode(["--input-type=module", "-e", script]);
    await new Promise((resolve) => child.stdout!.once("data", resolve));
    expect(addon.tryLock(file)).toBeNull();
    child.kill("SIGKILL");
    await finished;
    addon.tryLock(file)!();
    expect(() => addon.tryLock("/nowhere/x.lock")).toThrow(/Cannot create/);
  });

  it("is loaded, used and left by ten worker threads, some of them ended in the middle", async () => {
    const script = `
      const { parentPort, workerData } = require("node:worker_threads");
      const addons = workerData.files.map((file) => require(file));
      const calls = addons.flatMap((addon) => [addon.cuda().promise, addon.open("/nowhere/a", "/nowhere/b").promise]);
      if (workerData.early) parentPort.postMessage("under way");
      Promise.allSettled(calls).then((all) => parentPort.postMessage(all.filter((one) => one.status === "rejected").length));`;
    const files = tensorRtKinds.map(addonFile);
    const results = await Promise.all(
      Array.from({ length: 10 }, async (_, index) => {
        const early = index % 3 === 0;
        const worker = new Worker(script, { eval: true, workerData: { files, early } });
        const message = await new Promise((resolve, reject) => worker.once("message", resolve).once("error", reject));
        await worker.terminate();
        return message;
      }),
    );
    for (const [index, result] of results.entries())
      expect(result).toEqual(index % 3 === 0 ? "under way" : driver ? 2 : 4);
  });
});

describeAddons("finding the libraries", () => {
  it("tries option, environment, pip and the loader, in this order, and reports each", async () => {
    const option = temporaryFolder();
    process.env.FLOWTURBO_TENSORRT_RTX_DIR = path.join(option, "elsewhere");
    const report = await examineTensorRt("tensorrt-rtx", { folder: option });
    if (report.library) return; // TensorRT-RTX is installed on this machine.
    expect(report.places.map(({ source }) => source)).toEqual(["option", "environment", "pip", "loader"]);
    for (const { error } of report.places) expect(error).toBeTruthy();
    expect(report.problems[0]).toMatchObject({
      prevents: "building",
      cause: "TensorRT-RTX was not found.",
      remedy: expect.stringMatching(/pip install tensorrt-rtx.*FLOWTURBO_TENSORRT_RTX_DIR/),
    });
  });

  it("takes the first that fits, also from the lib folder of an archive", async () => {
    const good = standIn([11, 2, 0, 5]);
    const archive = temporaryFolder();
    mkdirSync(path.join(archive, "lib"));
    for (const name of ["libnvinfer.so.11", "libnvonnxparser.so.11"])
      copyFileSync(path.join(good, name), path.join(archive, "lib", name));
    process.env.FLOWTURBO_TENSORRT_DIR = good;
    const first = await examineTensorRt("tensorrt", { folder: archive });
    expect(first.library).toMatchObject({ version: [11, 2, 0, 5], file: path.join(archive, "lib/libnvinfer.so.11") });
    const second = await examineTensorRt("tensorrt", { folder: temporaryFolder() });
    expect(second.places.map(({ source }) => source)).toEqual(["option", "environment"]);
    expect(second.library?.file).toBe(path.join(good, "libnvinfer.so.11"));
  });

  it.each([
    ["tensorrt", [10, 14, 1, 48], "11.0.0.0", "12.0.0.0"],
    ["tensorrt", [12, 0, 0, 1], "11.0.0.0", "12.0.0.0"],
    ["tensorrt-rtx", [1, 4, 9, 9], "1.5.0.0", "2.0.0.0"],
    ["tensorrt-rtx", [2, 0, 0, 0], "1.5.0.0", "2.0.0.0"],
  ] as const)("refuses %s %s and names the version found and needed", async (kind, version, floor, ceiling) => {
    process.env.PATH = temporaryFolder();
    const folder = standInWithPath(version);
    const report = await examineTensorRt(kind, { folder });
    expect(report.library).toBeNull();
    expect(report.places[0]!.error).toContain(
      `is version ${version.join(".")}; needed is ${floor} or later, below ${ceiling}`,
    );
    expect(report.problems[0]!.remedy).toContain(`Install version ${floor} or later`);
    expect(report.places).toContainEqual(expect.objectContaining({ source: "pip", error: "python3 is not on PATH" }));
  });

  it("goes on to the loader's path after a refusal, though both libraries have one name", async () => {
    const newer = standIn([1, 6, 0, 1]);
    const env = { FLOWTURBO_TENSORRT_RTX_DIR: standIn([1, 4, 0, 76]), LD_LIBRARY_PATH: newer, PATH: temporaryFolder() };
    const { stdout } = await startNode([cli, "doctor", "--json"], env).finished;
    const rtx = foundIn(stdout).find(({ name }) => name === "tensorrt-rtx")!;
    expect(rtx).toMatchObject({ version: "1.6.0.1", library: path.join(newer, "libtensorrt_rtx.so.1"), builds: true });
    expect(rtx.places[0]!.error).toMatch(/1\.4\.0\.76/);
    expect(rtx.places.at(-1)).toMatchObject({ source: "loader", error: null });
  });

  it("does not load a Python package of that name from the working folder", async () => {
    const folder = temporaryFolder();
    mkdirSync(path.join(folder, "tensorrt_rtx_libs"));
    writeFileSync(path.join(folder, "tensorrt_rtx_libs/__init__.py"), "");
    const outside = process.cwd();
    process.env.FLOWTURBO_TENSORRT_RTX_DIR = "";
    try {
      process.chdir(folder);
      const report = await examineTensorRt("tensorrt-rtx");
      expect(report.places.filter(({ place }) => place.startsWith(folder))).toEqual([]);
    } finally {
      process.chdir(outside);
    }
  });

  it("doctor lists places, versions and one remedy for each cause", async () => {
    const env = { FLOWTURBO_TENSORRT_DIR: standIn([11, 4, 0, 1]), FLOWTURBO_TENSORRT_RTX_DIR: standIn([1, 4, 0, 0]) };
    const { code, stdout } = await startNode([cli, "doctor", "--json"], env).finished;
    expect(code).toBe(0);
    const runtimes = foundIn(stdout).filter(({ name }) => name.startsWith("tensorrt"));
    expect(runtimes.map(({ name }) => name)).toEqual(["tensorrt", "tensorrt-rtx"]);
    expect(runtimes[0]).toMatchObject({ available: false, version: "11.4.0.1" });
    expect(runtimes[1]!.reason).toContain("1.4.0.0");
    for (const { problems } of runtimes)
      for (const { cause, remedy } of problems) expect([cause, remedy].every((text) => text.length > 10)).toBe(true);
    const text = await startNode([cli, "doctor"], env).finished;
    expect(text.stdout).toMatch(/tensorrt 11\.4\.0\.1/);
    expect(text.stdout).toMatch(/tried environment: .*1\.4\.0\.0/);
  });
});

/** The stand-in needs a compiler, which an emptied PATH would hide. */
function standInWithPath(version: readonly number[]): string {
  const { PATH } = process.env;
  process.env.PATH = environment.PATH;
  try {
    return standIn(version);
  } finally {
    process.env.PATH = PATH;
  }
}

function addonFile(kind: (typeof tensorRtKinds)[number]): string {
  const name = `flowturbo_${kind.replace("-", "_")}.node`;
  return path.join(process.env.FLOWTURBO_ADDON_DIR ?? path.join(root, "native"), kind, "build/Release", name);
}
