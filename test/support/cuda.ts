/**
 * ONNX Runtime's real CUDA provider on a CUDA runtime that only pretends, so that graphs can be compiled for it (never run)
 * on a machine without a GPU: every function that the provider imports succeeds, and those that make something make it.
 * `npm run fetch:onnxruntime-cuda` brings the provider.
 */

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import path from "node:path";
import { loadFolder } from "../../lib/runtimes/onnxruntime/load-folder.js";
import { root } from "./fixtures.js";

const { version } = JSON.parse(readFileSync(path.join(root, "node_modules/onnxruntime-node/package.json"), "utf8"));
/** Where the script puts it. */
export const cudaProvider = path.join(root, `.cache/onnxruntime-cuda-${version}`);
const provider = path.join(cudaProvider, "libonnxruntime_providers_cuda.so");
const cache = path.join(root, ".cache/pretended-cuda");

/** Why the provider is not here; null if it is. */
export const noCudaProvider =
  process.platform !== "linux" || process.arch !== "x64"
    ? "it exists for linux-x64 only"
    : existsSync(provider)
      ? null
      : "run `npm run fetch:onnxruntime-cuda` for it";

if (noCudaProvider && process.env.FLOWTURBO_REQUIRE_NATIVE === "1")
  throw new Error(`CUDA provider: ${noCudaProvider}.`);

/** Functions that do more than succeed. */
const bodies: readonly (readonly [RegExp, string])[] = [
  [/^cudaGetDeviceProperties/, '(char* p) { memset(p, 0, 800); strcpy(p, "Pretended"); return 0; }'],
  [/^cudaGetDeviceCount$/, "(int* n) { *n = 1; return 0; }"],
  [/^cudaGetDevice$/, "(int* n) { *n = 0; return 0; }"],
  [/^cudaMemGetInfo$/, "(size_t* f, size_t* t) { *f = *t = (size_t)80 << 30; return 0; }"],
  // 75 and 76: major and minor compute capability.
  [/^cudaDeviceGetAttribute$/, "(int* v, int a) { *v = a == 75 ? 9 : a == 76 ? 0 : 1024; return 0; }"],
  [/^cuda(Malloc|MallocHost|HostAlloc)$/, "(void** p, size_t n) { *p = malloc(n); return 0; }"],
  [/^cudaFree(Host)?$/, "(void* p) { free(p); return 0; }"],
  [/^cudaMemcpy(Async)?$/, "(void* to, const void* from, size_t n) { memcpy(to, from, n); return 0; }"],
  [/^cudaMemset(Async)?$/, "(void* to, int v, size_t n) { memset(to, v, n); return 0; }"],
  [/^cudaStreamIsCapturing$/, "(void* s, int* v) { *v = 0; return 0; }"],
  [/^cuda(Runtime|Driver)GetVersion$/, "(int* v) { *v = 13000; return 0; }"],
  [/^cudnnGetVersion$/, "(void) { return 91000; }"],
  [/Create|^cudaLibrary(LoadData|GetKernel)$/, "(void** p) { *p = calloc(1, 4096); return 0; }"],
];
const named = /Get\w*(ErrorString|ErrorName|StatusString|StatusName)$/;

function source(names: readonly string[]): string {
  const functions = names.map((name) => {
    if (named.test(name)) return `const char* ${name}(int e) { return "pretended"; }`;
    const body = bodies.find(([pattern]) => pattern.test(name))?.[1] ?? "(void) { return 0; }";
    return `${name === "cudnnGetVersion" ? "size_t" : "int"} ${name}${body}`;
  });
  return ["#include <stdlib.h>", "#include <string.h>", "#include <stddef.h>", ...functions, ""].join("\n");
}

/** Libraries whose functions the provider imports or opens by name, and how its names begin. */
const libraries = { "libcuda.so.1": /^cu[A-Z]/, "libcudnn.so.9": /^cudnn/ } as const;
const runtime = /^_*(cuda|cublas|curand|cufft)/;
const others = ["libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"];

let made: Promise<{ readonly env: Record<string, string>; readonly libraries: string }> | undefined;

/** Variables and folder of a process that compiles for the provider. */
export function pretendedCuda(): NonNullable<typeof made> {
  made ??= (async () => {
    const folder = path.join(cache, version);
    if (!existsSync(folder)) make(folder);
    const native = path.join(root, "node_modules/onnxruntime-node/bin/napi-v6/linux/x64");
    return {
      env: { LD_LIBRARY_PATH: folder },
      libraries: await loadFolder({ folder: cudaProvider, runtimeFolder: native }, path.join(cache, "links")),
    };
  })();
  return made;
}

function make(folder: string): void {
  mkdirSync(cache, { recursive: true });
  const work = mkdtempSync(path.join(cache, "making-"));
  const imports = execFileSync("nm", ["-D", "--undefined-only", provider], { encoding: "utf8", maxBuffer: 2 ** 28 })
    .split("\n")
    .map((line) => line.trim().split(" ").at(-1)!.split("@")[0]!);
  // cuDNN is opened by name: its functions are texts in the provider.
  const texts = readFileSync(provider, "latin1").match(/(?<=\0)cudnn[A-Z]\w+(?=\0)/g) ?? [];
  const compile = (library: string, names: readonly string[]) => {
    const file = path.join(work, "source.c");
    writeFileSync(file, source([...new Set(names)].sort()));
    const args = ["-shared", "-fPIC", "-w", `-Wl,-soname,${library}`, "-o", path.join(work, library), file];
    execFileSync(process.env.CC ?? "cc", args);
  };
  compile(
    "libcuda.so.1",
    imports.filter((name) => libraries["libcuda.so.1"].test(name)),
  );
  compile(
    "libcudnn.so.9",
    [...imports, ...texts].filter((name) => libraries["libcudnn.so.9"].test(name)),
  );
  compile(
    others[0]!,
    imports.filter((name) => runtime.test(name)),
  );
  for (const library of others.slice(1)) compile(library, []);
  renameSync(work, folder);
}
