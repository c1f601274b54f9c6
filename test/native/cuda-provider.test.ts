// ONNX Runtime's CUDA provider: where it is looked for, what is wrong with one that is found, and the folder through which
// it is loaded. Providers, NVIDIA's libraries and the driver are small libraries that are compiled here. The real provider
// is used where `npm run fetch:onnxruntime-cuda` has brought it.
import { execFileSync, spawnSync } from "node:child_process";
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { transformSync } from "esbuild";
import { afterEach, beforeEach, expect, it } from "vitest";
import { CacheError } from "../../lib/errors.js";
import { installCommand } from "../../lib/runtimes/onnxruntime/cuda-libraries.js";
import { cudaDiagnosis, findCuda, findCudaProvider } from "../../lib/runtimes/onnxruntime/cuda-provider.js";
import { readSharedLibrary } from "../../lib/runtimes/onnxruntime/elf.js";
import { loadFolder } from "../../lib/runtimes/onnxruntime/load-folder.js";
import { scaleGraph } from "../runtimes/models.js";
import { cudaProvider, noCudaProvider } from "../support/cuda.js";
import { root } from "../support/fixtures.js";
import { describeAddons, temporaryFolder } from "./support.js";

const environment = { ...process.env };
const [shared, cuda] = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];
const { version } = JSON.parse(readFileSync(path.join(root, "node_modules/onnxruntime-node/package.json"), "utf8"));
const runtimeFolder = path.join(
  realpathSync(path.join(root, "node_modules/onnxruntime-node")),
  "bin/napi-v6/linux/x64",
);
const other = "1.29.7";
const cudnn = ["", "_graph", "_ops", "_cnn", "_heuristic", "_engines_precompiled", "_engines_runtime_compiled"].map(
  (part) => `libcudnn${part}.so.9`,
);

beforeEach(() => {
  process.env = { ...environment, PATH: temporaryFolder(), LD_LIBRARY_PATH: "" };
  delete process.env.FLOWTURBO_ONNXRUNTIME_CUDA_DIR;
});
afterEach(() => {
  process.env = { ...environment };
});

/** Compiles a library that needs others, which need not exist. */
function compile(folder: string, name: string, code: string, needs: readonly string[] = []): void {
  mkdirSync(folder, { recursive: true });
  const work = temporaryFolder();
  const cc = (file: string, source: string, ...flags: readonly string[]) => {
    writeFileSync(path.join(work, "source.c"), source);
    execFileSync("cc", ["-shared", "-fPIC", "-o", file, path.join(work, "source.c"), ...flags], { env: environment });
  };
  for (const need of needs) cc(path.join(work, need), "int flowturbo_nothing;", `-Wl,-soname,${need}`);
  const links = needs.map((need) => path.join(work, need));
  cc(path.join(folder, name), code, `-Wl,-soname,${name}`, "-Wl,--no-as-needed", ...links);
}
const nothing = "int flowturbo_nothing;";

/** A provider's two files: enough of them that ONNX Runtime begins to load it. */
function provider(
  folder: string,
  options: { version?: string; needs?: readonly string[]; code?: string } = {},
): string {
  const { version: named, needs = ["libcublas.so.13", "libcudart.so.13", "libcuda.so.1"], code = "" } = options;
  compile(folder, shared, "void Provider_SetHost(void* host) {}");
  const text = named ? `const char flowturbo_version[] = "\\0" "${named}";` : nothing;
  compile(folder, cuda, `${text}\n${code}`, needs);
  return folder;
}
function libraries(folder: string, ...names: readonly string[]): string {
  for (const name of names) compile(folder, name, nothing, name.startsWith("libcublas.") ? ["libcublasLt.so.13"] : []);
  return folder;
}
const all = ["libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", ...cudnn];

/** Puts a python3 on PATH that knows these folders of packages. */
function python(answer: string | { onnxruntime?: readonly string[]; nvidia?: readonly string[] }): void {
  const line =
    typeof answer === "string" ? answer : `echo '${JSON.stringify({ onnxruntime: [], nvidia: [], ...answer })}'`;
  writeFileSync(path.join(process.env.PATH!, "python3"), `#!/bin/sh\n${line}\n`, { mode: 0o755 });
}

const driverState = path.join(temporaryFolder(), "state");
/** A driver whose answers a test chooses; it stays in the process, which has no other. */
function driver(state: { version: number; gpus: number; sm: readonly [number, number] }): void {
  writeFileSync(driverState, [state.version, state.gpus, ...state.sm].join(" "));
  if (loaded) return;
  loaded = true;
  const table = readFileSync(path.join(root, "native/core/cuda_driver.cpp"), "utf8");
  const names = [...table.matchAll(/"(cu[A-Z]\w+)"\)/g)].map(([, name]) => name!);
  const own: Record<string, string> = {
    cuDriverGetVersion: "int cuDriverGetVersion(int* value) { *value = state(0); return 0; }",
    cuDeviceGetCount: "int cuDeviceGetCount(int* value) { *value = state(1); return 0; }",
    cuDeviceGet: "int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }",
    cuDeviceGetName:
      'int cuDeviceGetName(char* text, int size, int device) { snprintf(text, size, "GPU %d", device); return 0; }',
    cuDeviceTotalMem_v2: "int cuDeviceTotalMem_v2(unsigned long* bytes, int device) { *bytes = 8000000000; return 0; }",
    cuDeviceGetAttribute:
      "int cuDeviceGetAttribute(int* value, int which, int device) { *value = state(which == 75 ? 2 : 3); return 0; }",
  };
  const code = `#include <stdio.h>
    static int state(int index) {
      int values[4]; FILE* file = fopen("${driverState}", "r");
      if (fscanf(file, "%d %d %d %d", values, values + 1, values + 2, values + 3) != 4) return -1;
      fclose(file); return values[index];
    }
    ${[...new Set(names)].map((name) => own[name] ?? `int ${name}() { return 0; }`).join("\n")}`;
  const folder = temporaryFolder();
  compile(folder, "libcuda.so.1", code);
  // Under its name for everything that asks for it later.
  try {
    process.dlopen({ exports: {} }, path.join(folder, "libcuda.so.1"), os.constants.dlopen.RTLD_NOW | 0x1000);
  } catch (error) {
    if (!/self-register/.test((error as Error).message)) throw error;
  }
}
let loaded = false;
const hasDriver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"].some((folder) =>
  existsSync(path.join(folder, "libcuda.so.1")),
);
const newest = { version: 13000, gpus: 1, sm: [8, 9] } as const;

describeAddons("a shared library's file", () => {
  it("names what it needs, and its constants", async () => {
    const folder = temporaryFolder();
    compile(folder, "liba.so", 'const char text[] = "flowturbo-constant";', ["libcublas.so.13", "libb.so"]);
    const library = await readSharedLibrary(path.join(folder, "liba.so"));
    expect(library.needed.filter((name) => !name.startsWith("libc.so"))).toEqual(["libcublas.so.13", "libb.so"]);
    expect((await library.constants()).includes("flowturbo-constant\0")).toBe(true);
  });

  it("that is none, is cut short, or is for another processor is refused", async () => {
    const folder = temporaryFolder();
    const file = path.join(folder, "liba.so");
    const refused = (cpu?: string) => expect(readSharedLibrary(file, cpu)).rejects;
    await refused().toThrow(/ENOENT/);
    writeFileSync(file, "version https://git-lfs.github.com/spec/v1\n");
    await refused().toThrow("is no shared library");
    writeFileSync(file, "");
    await refused().toThrow("is no shared library");
    compile(folder, "liba.so", nothing);
    await refused("arm64").toThrow("is for another processor than arm64");
    const { size } = lstatSync(file);
    truncateSync(file, size - 100);
    await refused().toThrow("is incomplete");
    truncateSync(file, 80);
    await refused().toThrow("is incomplete");
  });
});

describeAddons("without a driver", () => {
  it.skipIf(hasDriver)("is said, and callers who want to run do not wait for python3", async () => {
    const mark = path.join(temporaryFolder(), "asked");
    python(`touch ${mark}; echo '{"onnxruntime": [], "nvidia": []}'`);
    process.env.PATH += ":/usr/bin:/bin";
    const quick = await findCudaProvider({ gpuFirst: true });
    expect(quick.problems).toHaveLength(1);
    expect(quick.problems[0]!.cause).toMatch(/There is no NVIDIA driver: libcuda\.so\.1/);
    expect(existsSync(mark)).toBe(false);
    const { problems } = await findCudaProvider();
    expect(problems.map(({ cause }) => cause)).toEqual([
      "ONNX Runtime's CUDA provider was not found.",
      expect.stringContaining("libcuda.so.1"),
    ]);
    expect(existsSync(mark)).toBe(true);
    expect(await findCuda({})).toMatchObject({ name: "cuda", available: false, hardware: null });
  });
});

describeAddons("the CUDA provider", () => {
  beforeEach(() => driver(newest));

  it("is the first of option, environment, onnxruntime-node and python3 that can be used", async () => {
    const [option, variable, pip] = [1, 2, 3].map(() => temporaryFolder()) as [string, string, string];
    const site = path.join(pip, "onnxruntime/capi");
    provider(site, { version });
    python({ onnxruntime: [path.dirname(site)] });
    const sources = (places: readonly { source: string; error: string | null }[]) =>
      places.map(({ source, error }) => [source, error]);

    const fromPip = await findCudaProvider();
    expect(fromPip).toMatchObject({ folder: site, version, runtimeFolder });
    expect(sources(fromPip.places)).toEqual([
      ["environment", "not set"],
      ["package", `there is no ${cuda}`],
      ["pip", null],
    ]);
    process.env.FLOWTURBO_ONNXRUNTIME_CUDA_DIR = provider(variable, { version });
    expect(sources((await findCudaProvider()).places)).toEqual([["environment", null]]);
    expect(await findCudaProvider({ folder: provider(option, { version }) })).toMatchObject({
      folder: option,
      places: [{ source: "option", place: option, error: null }],
    });
    // An archive has it in lib/, and a wheel below onnxruntime/.
    const archive = temporaryFolder();
    provider(path.join(archive, "lib"), { version });
    expect((await findCudaProvider({ folder: archive })).folder).toBe(path.join(archive, "lib"));
    expect((await findCudaProvider({ folder: pip })).folder).toBe(site);
  });

  it("of another version is passed over, and named where there is no other", async () => {
    const folder = provider(temporaryFolder(), { version: other });
    const refused = await findCudaProvider({ folder });
    expect(refused.folder).toBe(null);
    expect(refused.places[0]!.error).toBe(
      `is version ${other}; needed is exactly ${version}, that of onnxruntime-node`,
    );
    expect(refused.problems).toHaveLength(1);
    expect(refused.problems[0]!.cause).toContain(`${folder} is version ${other}`);
    expect(refused.problems[0]!.remedy).toContain(`pip install "onnxruntime-gpu[cuda,cudnn]==${version}"`);
    expect(cudaDiagnosis(refused)).toMatch(/Places tried: .*not set.*python3 is not on PATH/);
    process.env.FLOWTURBO_ONNXRUNTIME_CUDA_DIR = provider(temporaryFolder(), { version });
    expect((await findCudaProvider({ folder })).folder).toBe(process.env.FLOWTURBO_ONNXRUNTIME_CUDA_DIR);
  });

  it("has the version that its library says, else that of its package; one that says none is not refused", async () => {
    const site = temporaryFolder();
    const capi = path.join(site, "onnxruntime/capi");
    const found = async (inside: string | undefined, described: string | null) => {
      for (const name of readdirSync(site)) rmSync(path.join(site, name), { recursive: true });
      provider(capi, inside === undefined ? {} : { version: inside });
      if (described) mkdirSync(path.join(site, `onnxruntime_gpu-${described}.dist-info`));
      const { folder, version: said } = await findCudaProvider({ folder: capi });
      return [folder !== null, said];
    };
    expect(await found(undefined, version)).toEqual([true, version]);
    expect(await found(undefined, other)).toEqual([false, null]);
    // A description that was left behind.
    expect(await found(version, other)).toEqual([true, version]);
    expect(await found(other, null)).toEqual([false, null]);
    expect(await found(undefined, null)).toEqual([true, null]);
  });

  it("that is not whole is said to be so", async () => {
    const folder = provider(temporaryFolder(), { version });
    rmSync(path.join(folder, shared));
    const alone = await findCudaProvider({ folder });
    expect(alone.problems[0]!.cause).toContain(`${shared} is missing beside ${cuda}`);
    provider(folder, { version });
    writeFileSync(path.join(folder, cuda), "a pointer to the file");
    const { problems } = await findCudaProvider({ folder });
    expect(problems[0]!.cause).toBe(`The CUDA provider in ${folder} cannot be used: ${cuda} is no shared library.`);
    expect(problems[0]!.remedy).toContain("pip install");
  });

  it("says what was wrong with python3", async () => {
    python("echo broken >&2; exit 3");
    const failed = await findCudaProvider();
    expect(failed.places.at(-1)).toMatchObject({ source: "pip", error: expect.stringMatching(/^python3 failed: /) });
    python({});
    expect((await findCudaProvider()).places.at(-1)).toMatchObject({ source: "pip", error: "not installed" });
    // The package for CPUs has the same module.
    const cpu = temporaryFolder();
    python({ onnxruntime: [cpu] });
    expect((await findCudaProvider()).places.at(-1)!.error).toBe(`there is no ${cuda}`);
  });

  it("needs NVIDIA's libraries, which are found beside it, in python3's packages and on the loader's path", async () => {
    const site = temporaryFolder();
    const capi = provider(path.join(site, "onnxruntime/capi"), { version });
    const lib = (name: string) => path.join(site, "nvidia", name, "lib");
    libraries(lib("cu13"), ...all.slice(0, 3), "libnvrtc.so.13");
    libraries(lib("cudnn"), ...cudnn);
    const beside = await findCudaProvider({ folder: capi });
    expect(beside).toMatchObject({ problems: [], libraryFolders: [lib("cu13"), lib("cudnn")], device: 0 });
    expect(await findCuda({ cudaProviderFolder: capi })).toEqual({
      ...{ name: "cuda", available: true, version, reason: null, remedy: null },
      libraries: { library: path.join(capi, cuda), places: beside.places, problems: [] },
      hardware: { driver: "13.0", gpus: [{ name: "GPU 0", memoryBytes: 8e9, sm: "8.9" }] },
    });

    const alone = provider(temporaryFolder(), { version });
    python({ nvidia: [path.join(site, "nvidia")] });
    expect(await findCudaProvider({ folder: alone })).toMatchObject({
      problems: [],
      libraryFolders: [lib("cu13"), lib("cudnn")],
    });
    python({});
    process.env.LD_LIBRARY_PATH = libraries(temporaryFolder(), ...all);
    // The loader finds these by itself.
    expect(await findCudaProvider({ folder: alone })).toMatchObject({ problems: [], libraryFolders: [] });
  });

  it("lacks libraries by their names, and by the packages that have them", async () => {
    const folder = provider(temporaryFolder(), { version });
    const lacks = async (...absent: readonly string[]) => {
      process.env.LD_LIBRARY_PATH = libraries(temporaryFolder(), ...all.filter((name) => !absent.includes(name)));
      const { problems } = await findCudaProvider({ folder });
      expect(problems).toHaveLength(1);
      return problems[0]!;
    };
    const noCudnn = await lacks(...cudnn);
    expect(noCudnn.cause).toBe(`The CUDA provider in ${folder} needs libcudnn.so.9, which was not found.`);
    expect(noCudnn.remedy).toContain('pip install "nvidia-cudnn-cu13==9.*"');
    expect((await lacks("libcudnn_ops.so.9")).cause).toContain("libcudnn_ops.so.9, which was not");
    // What a library needs that the provider needs.
    expect((await lacks("libcublasLt.so.13")).remedy).toContain('pip install "nvidia-cublas==13.*"`');
    expect((await lacks("libcublas.so.13", "libcudart.so.13")).remedy).toContain(
      'pip install "nvidia-cublas==13.*" "nvidia-cuda-runtime==13.*"',
    );
    const older = ["libcublasLt.so.12", "libcudnn_graph.so.9", "libcurand.so.10", "libnvJitLink.so.12"];
    expect(installCommand(older, 12)).toBe(
      'pip install "nvidia-cublas-cu12==12.*" "nvidia-cudnn-cu12==9.*" "nvidia-curand-cu12==10.*" "nvidia-nvjitlink-cu12==12.*"',
    );
  });

  it("needs a driver and a GPU that are new enough", async () => {
    const folder = provider(temporaryFolder(), { version });
    process.env.LD_LIBRARY_PATH = libraries(temporaryFolder(), ...all);
    const problems = async (state: Parameters<typeof driver>[0], of = folder) => {
      driver(state);
      return (await findCudaProvider({ folder: of })).problems;
    };
    expect(await problems(newest)).toEqual([]);
    expect(await problems({ ...newest, version: 12080 })).toEqual([
      {
        prevents: "running",
        cause: "The NVIDIA driver serves CUDA 12.8; the CUDA provider was built for CUDA 13.",
        remedy: "Update NVIDIA's driver to 580 or newer.",
      },
    ]);
    const [old] = await problems({ ...newest, gpus: 2, sm: [7, 0] });
    expect(old!.cause).toContain("SM 7.5 and later; this machine has GPU 0 (SM 7.0), GPU 1 (SM 7.0).");
    expect((await problems({ ...newest, gpus: 0 }))[0]!.cause).toContain("found no GPU");
    // One for CUDA 12 is served by a driver for it.
    const twelve = ["libcudart.so.12", "libcublas.so.12"];
    process.env.LD_LIBRARY_PATH += `:${libraries(temporaryFolder(), ...twelve)}`;
    const older = provider(temporaryFolder(), { version, needs: twelve });
    expect(await problems({ ...newest, version: 12080, sm: [7, 0] }, older)).toEqual([]);
    // Without a provider its version of CUDA is not known, and only the provider is missing.
    expect((await problems({ ...newest, version: 12080 }, "/nowhere")).map(({ cause }) => cause)).toEqual([
      "ONNX Runtime's CUDA provider was not found.",
    ]);
  });
});

describeAddons("the folder to load through", () => {
  const names = ["libonnxruntime.so.1", cuda, shared];

  it("links to both, and is made once", async () => {
    const cache = temporaryFolder();
    const folder = provider(temporaryFolder(), { version });
    const made = await Promise.all([1, 2, 3, 4].map(() => loadFolder({ folder, runtimeFolder }, cache)));
    expect(new Set(made).size).toBe(1);
    expect(readdirSync(made[0]!).sort()).toEqual([...names].sort());
    expect(readlinkSync(path.join(made[0]!, cuda))).toBe(path.join(folder, cuda));
    expect(readdirSync(path.join(cache, "onnxruntime"))).toEqual([path.basename(made[0]!)]);
    const inode = lstatSync(made[0]!).ino;
    expect(await loadFolder({ folder, runtimeFolder }, cache)).toBe(made[0]);
    expect(lstatSync(made[0]!).ino).toBe(inode);
    // Another provider has another folder.
    expect(await loadFolder({ folder: provider(temporaryFolder()), runtimeFolder }, cache)).not.toBe(made[0]);
  });

  it("is mended where its links were changed, also by several at once", async () => {
    const cache = temporaryFolder();
    const folder = provider(temporaryFolder(), { version });
    const made = await loadFolder({ folder, runtimeFolder }, cache);
    rmSync(path.join(made, cuda));
    symlinkSync("/nowhere", path.join(made, cuda));
    writeFileSync(path.join(made, "more"), "");
    const mended = await Promise.all([1, 2, 3, 4].map(() => loadFolder({ folder, runtimeFolder }, cache)));
    expect(new Set(mended)).toEqual(new Set([made]));
    expect(readlinkSync(path.join(made, cuda))).toBe(path.join(folder, cuda));
    rmSync(made, { recursive: true });
    writeFileSync(made, "a file in its place");
    expect(await loadFolder({ folder, runtimeFolder }, cache)).toBe(made);
    expect(readdirSync(path.join(cache, "onnxruntime"))).toEqual([path.basename(made)]);
  });

  it("is refused where another user could change it", async () => {
    const cache = temporaryFolder();
    const folder = provider(temporaryFolder(), { version });
    const made = await loadFolder({ folder, runtimeFolder }, cache);
    chmodSync(path.dirname(made), 0o775);
    await expect(loadFolder({ folder, runtimeFolder }, cache)).rejects.toThrow(/open to other users \(mode 775\)/);
  });

  it("is onnxruntime-node's own where the provider is there", async () => {
    const folder = provider(temporaryFolder(), { version });
    expect(await loadFolder({ folder, runtimeFolder: folder }, "/proc/nowhere")).toBe(folder);
    const refused = loadFolder({ folder, runtimeFolder }, "/proc/nowhere");
    await expect(refused).rejects.toThrow(CacheError);
    await expect(refused).rejects.toThrow(/in \/proc\/nowhere\/onnxruntime: .*\. Give a folder that can be written/);
  });

  /** What ONNX Runtime says when it is to load the provider, in a process of its own. */
  function failure(through: string | null, libraryPath = ""): string {
    const folder = temporaryFolder();
    const module = path.join(folder, "open-through.mjs");
    const source = readFileSync(path.join(root, "lib/runtimes/onnxruntime/open-through.ts"), "utf8");
    writeFileSync(module, transformSync(source, { loader: "ts", format: "esm" }).code);
    writeFileSync(path.join(folder, "graph.onnx"), scaleGraph("double", 2).bytes);
    const script = `
      import { openThrough } from ${JSON.stringify(pathToFileURL(module).href)};
      ${through ? `openThrough(${JSON.stringify(through)});` : ""}
      const { default: ort } = await import(${JSON.stringify(pathToFileURL(path.join(root, "node_modules/onnxruntime-node/dist/index.js")).href)});
      const session = await ort.InferenceSession.create(${JSON.stringify(path.join(folder, "graph.onnx"))}, { executionProviders: ["cpu"] });
      const { y } = await session.run({ x: new ort.Tensor("float32", [3], [1]) });
      console.log("on the CPU", y.data[0]);
      await ort.InferenceSession.create(${JSON.stringify(path.join(folder, "graph.onnx"))}, { executionProviders: ["cuda"] })
        .then(() => console.log("created"), (error) => console.log(error.message));`;
    writeFileSync(path.join(folder, "script.mjs"), script);
    const { stdout, stderr, status } = spawnSync(process.execPath, [path.join(folder, "script.mjs")], {
      env: { ...environment, ORT_DISABLE_TELEMETRY: "1", LD_LIBRARY_PATH: libraryPath },
      encoding: "utf8",
    });
    expect(status, stderr).toBe(0);
    expect(stdout).toMatch(/^on the CPU 6\n/);
    return stdout + stderr;
  }

  it("is where ONNX Runtime then looks for the provider", async () => {
    const folder = provider(temporaryFolder(), { version, needs: ["libflowturbo_missing.so.1"] });
    const through = await loadFolder({ folder, runtimeFolder }, temporaryFolder());
    expect(failure(null)).toContain(`${path.join(runtimeFolder, shared)}: cannot open shared object file`);
    const output = failure(through);
    expect(output).toContain(
      `Failed to load library ${path.join(through, cuda)} with error: libflowturbo_missing.so.1`,
    );
    expect(output).not.toContain("created");
  });

  it("names the loader's message where there is no library", () => {
    expect(() => failure("/nowhere")).toThrow(/nowhere\/libonnxruntime\.so\.1: cannot open shared object file/);
  });

  const lacks = hasDriver ? "there is a driver" : noCudaProvider;
  it.skipIf(lacks)(
    `takes the real provider up to the missing driver${lacks ? ` (skipped: ${lacks})` : ""}`,
    async () => {
      driver(newest);
      const found = await findCudaProvider({ folder: cudaProvider });
      expect(found).toMatchObject({ folder: cudaProvider, version });
      const through = await loadFolder(
        { folder: found.folder!, runtimeFolder: found.runtimeFolder! },
        temporaryFolder(),
      );
      // Of NVIDIA's libraries the driver is what is missing last.
      const missing = found.problems.some(({ cause }) => cause.includes("libcublasLt.so.13"))
        ? "libcublasLt.so.13"
        : "libcuda.so.1";
      expect(failure(through, found.libraryFolders.join(":"))).toContain(
        `Failed to load library ${path.join(through, cuda)} with error: ${missing}: cannot open`,
      );
    },
  );
});
