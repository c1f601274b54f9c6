// What can be said of NVIDIA's own interfaces without a GPU: that the driver's functions have the signatures that our table
// gives them, and that TensorRT 11, where somebody has fetched it, is opened, recognised, and reported as lacking a driver.
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import { examineTensorRt } from "../../lib/runtimes/tensorrt/libraries.js";
import { loadAddon } from "../support/addon.js";
import { root } from "../support/fixtures.js";
import { cli, describeTensorRt, hasDriver, startNode, temporaryFolder, tensorrtFolder } from "./support.js";

const check = path.join(root, "scripts/driver-signatures.mjs");
const signatures = (...args: string[]) =>
  spawnSync(process.execPath, [check, ...args], { cwd: root, encoding: "utf8" });
const first = signatures();
const lacks = first.status === 3 ? first.stderr.trim().split("\n")[0] : null;

describe("the table of the driver's functions", () => {
  it.skipIf(lacks !== null && !process.env.FLOWTURBO_REQUIRE_NATIVE)(
    `agrees with CUDA's own header${lacks === null ? "" : ` (skipped: ${lacks})`}`,
    () => {
      expect(first.stderr).toBe("");
      expect(first.stdout).toMatch(/^\d+ functions of the driver agree with cuda\.h/);
      const members = readFileSync(path.join(root, "native/core/cuda_driver.h"), "utf8").match(/\(\*cu\w+\)/g)!;
      expect(Number.parseInt(first.stdout, 10)).toBe(members.length);
    },
  );

  it.skipIf(lacks !== null).each([
    ["a narrower number", /(cuMemsetD8Async\)\(DevicePointer, unsigned char, )size_t/, "$1unsigned", "cuMemsetD8Async"],
    ["a parameter less", /(cuGraphLaunch\)\(CUgraphExec_st\*), CUstream_st\*/, "$1", "cuGraphLaunch"],
    ["a lost const", /(cuMemcpyHtoDAsync\)\(DevicePointer, )const /, "$1", "cuMemcpyHtoDAsync"],
    ["another handle", /(cuEventDestroy\)\()CUevent_st/, "$1CUgraph_st", "cuEventDestroy"],
  ])("is refused with %s", (_name, from, to, member) => {
    const core = temporaryFolder();
    for (const file of ["cuda_driver.h", "cuda_driver.cpp", "error.h"])
      cpSync(path.join(root, "native/core", file), path.join(core, file));
    const header = path.join(core, "cuda_driver.h");
    const text = readFileSync(header, "utf8");
    expect(text).toMatch(from);
    writeFileSync(header, text.replace(from, to));
    const { status, stderr } = signatures("--core", core);
    expect(status).toBe(1);
    expect(stderr).toMatch(new RegExp(`^error: .*\\n${member} differs from ${member}(_v2)? in cuda\\.h\\n$`));
  });

  it("is refused where a function is never looked up", () => {
    const core = temporaryFolder();
    for (const file of ["cuda_driver.h", "cuda_driver.cpp"])
      cpSync(path.join(root, "native/core", file), path.join(core, file));
    const source = path.join(core, "cuda_driver.cpp");
    writeFileSync(source, readFileSync(source, "utf8").replace(/ *find\(table->cuGraphLaunch.*\n/, ""));
    expect(signatures("--core", core)).toMatchObject({
      status: 1,
      stderr: "error: cuGraphLaunch is in the table and is never looked up.\n",
    });
  });
});

describe("what scripts fetch", () => {
  const fetch = (name: string, fill: string) => {
    const script = `import { fetched, quietly } from ${JSON.stringify(path.join(root, "scripts/fetched.mjs"))};
      import { mkdirSync, writeFileSync } from "node:fs"; import { join } from "node:path";
      console.log(fetched(${JSON.stringify(name)}, "the tool", (folder) => { ${fill} }));`;
    const { status, stdout, stderr } = spawnSync(process.execPath, ["--input-type=module", "-e", script], {
      encoding: "utf8",
    });
    return { status, stdout: stdout.trim(), stderr: stderr.trim() };
  };
  const left = (name: string) =>
    readdirSync(path.join(root, ".cache")).filter((entry) => entry.startsWith(name)).length;

  it("is there complete or not at all, and what is lacking is said", () => {
    const name = `fetched-by-a-test-${process.pid}`;
    const missing = fetch(name, 'quietly("no-such-tool", [])');
    expect(missing).toEqual({ status: 3, stdout: "", stderr: "error: no-such-tool is not on PATH." });
    const failed = fetch(name, 'quietly("sh", ["-c", "echo no network >&2; exit 1"])');
    expect(failed).toEqual({ status: 3, stdout: "", stderr: `error: the tool could not fetch ${name}: no network` });
    expect(left(name)).toBe(0);
    // Another process was faster.
    const folder = path.join(root, ".cache", name);
    const late = `mkdirSync(${JSON.stringify(folder)}); writeFileSync(${JSON.stringify(path.join(folder, "it"))}, "");`;
    expect(fetch(name, late)).toEqual({ status: 0, stdout: folder, stderr: "" });
    expect(left(name)).toBe(1);
    expect(fetch(name, "throw new Error()").status).toBe(0);
    rmSync(folder, { recursive: true });
  });
});

describeTensorRt("TensorRT 11 from Maven Central", () => {
  it("has what engines are built and run with, and nothing else", () => {
    for (const library of ["libnvinfer.so.11", "libnvonnxparser.so.11"])
      expect(existsSync(path.join(tensorrtFolder, library)), library).toBe(true);
  });

  it("is opened and recognised; that there is no driver is said with a remedy", async () => {
    const { library, problems } = await examineTensorRt("tensorrt", { folder: tensorrtFolder });
    expect(library).toMatchObject({ version: [11, 2, 1, expect.any(Number)] });
    expect(library!.file).toBe(path.join(tensorrtFolder, "libnvinfer.so.11"));
    if (!hasDriver) expect(problems).toEqual([expect.objectContaining({ prevents: "running" })]);
  });

  it.skipIf(hasDriver)("flowturbo doctor says so, too, and ends by itself", async () => {
    const { code, signal, stdout, stderr } = await startNode([cli, "doctor"], {
      FLOWTURBO_TENSORRT_DIR: tensorrtFolder,
    }).finished;
    expect({ signal, stderr }).toEqual({ signal: null, stderr: "" });
    expect(code).not.toBeNull();
    expect(stdout).toMatch(/tensorrt[\s\S]*no NVIDIA driver/i);
    expect(stdout).toContain("11.2.1");
  });

  it.skipIf(hasDriver)("builds nothing without a driver, and does not crash either", async () => {
    await expect(
      EngineCompiler.open({ kind: "tensorrt", folder: tensorrtFolder, cache: temporaryFolder() }),
    ).rejects.toThrow(/builds engines on the GPU that will run them, and this machine has none/);
    const nothing = { files: [], initializers: [], profiles: [], targets: [], flags: [] };
    const [library, parser] = ["libnvinfer.so.11", "libnvonnxparser.so.11"].map((name) =>
      path.join(tensorrtFolder, name),
    );
    const request = { ...nothing, onnx: new Uint8Array(), optimizationLevel: -1, workspaceBytes: 0 };
    const files = { planPath: path.join(temporaryFolder(), "plan"), timingsPath: "", logPath: "" };
    const building = loadAddon("tensorrt").build(library!, parser!, { ...request, ...files }, () => undefined);
    await expect(building.promise).rejects.toMatchObject({ code: "BUILD" });
  });
});
