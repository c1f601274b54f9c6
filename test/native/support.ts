// What the native tests share: whether they can run here, folders, copies of checkpoints, child processes.
import { execFileSync, spawn } from "node:child_process";
import { copyFileSync, cpSync, existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, describe, inject } from "vitest";
import { root } from "../support/fixtures.js";

const native = inject("native");

/** Whether a driver is installed: what a machine without one says cannot be tested then. */
export const hasDriver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"].some((folder) =>
  existsSync(path.join(folder, "libcuda.so.1")),
);

export const rtxFolder = native.rtx;
export const tensorrtFolder = native.tensorrt;

/** A describe that is skipped, with the reason in its name, where this machine lacks what it takes. */
function describeWith(lacks: string | null) {
  return (name: string, body: () => void) =>
    describe.skipIf(lacks !== null)(lacks === null ? name : `${name} (skipped: ${lacks.split("\n")[0]})`, body);
}
export const describeAddons = describeWith(native.lacksAddons);
export const describeEngines = describeWith(native.lacksRtx);
/** With NVIDIA's own TensorRT 11, where somebody has fetched it. */
export const describeTensorRt = describeWith(native.lacksTensorRt);

const folders: string[] = [];

/** A folder that is gone after the file's tests. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-native-"));
  folders.push(folder);
  return folder;
}
afterAll(() => {
  for (const folder of folders.splice(0)) rmSync(folder, { recursive: true, force: true });
});

/** A library that answers nothing but a version, under the names of both. */
export function standIn(version: readonly number[]): string {
  const folder = temporaryFolder();
  const [major, minor, patch, build] = version;
  const source = path.join(folder, "stand-in.c");
  writeFileSync(
    source,
    `int getInferLibMajorVersion(void){return ${major};} int getInferLibMinorVersion(void){return ${minor};}
     int getInferLibPatchVersion(void){return ${patch};} int getInferLibBuildVersion(void){return ${build};}
     void* createInferBuilder_INTERNAL(void* logger, int version){return 0;}
     void* createInferRuntime_INTERNAL(void* logger, int version){return 0;}
     void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version){return 0;}\n`,
  );
  const link = (name: string, inside: string) =>
    execFileSync("cc", ["-shared", "-fPIC", `-Wl,-soname,${inside}`, "-o", path.join(folder, name), source]);
  // With its name inside, as the real one: the loader takes an open library for any of that name.
  link("libtensorrt_rtx.so.1", "libtensorrt_rtx.so.1");
  // The others without, for what a test has opened stays open.
  link("libnvinfer.so.11", "stand-in.so");
  for (const name of ["libnvonnxparser.so.11", "libtensorrt_onnxparser_rtx.so.1"])
    copyFileSync(path.join(folder, "libnvinfer.so.11"), path.join(folder, name));
  return folder;
}

/** A copy of a checkpoint that a test may change. */
export function copyOf(model: string): string {
  const folder = path.join(temporaryFolder(), "model");
  cpSync(model, folder, { recursive: true });
  return folder;
}

export interface Finished {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs the built command line, or any script, with TensorRT-RTX where the tests fetched it. */
export function startNode(args: readonly string[], env: NodeJS.ProcessEnv = {}) {
  const child = spawn(process.execPath, args, {
    cwd: root,
    env: { ...process.env, FLOWTURBO_TENSORRT_RTX_DIR: rtxFolder, ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let stdout = "";
  let stderr = "";
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  child.stderr.on("data", (chunk) => {
    stderr += chunk;
  });
  const finished = new Promise<Finished>((resolve) =>
    child.on("close", (code, signal) => resolve({ code, signal, stdout, stderr })),
  );
  return { child, finished };
}

export const cli = path.join(root, "dist/cli.js");
