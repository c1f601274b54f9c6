// Before all tests: compiles the addons and fetches TensorRT-RTX, where this machine can. What is lacking is a reason
// to skip the tests that need it, unless FLOWTURBO_REQUIRE_NATIVE is set; code that does not compile is a failure.
import { spawnSync } from "node:child_process";
import path from "node:path";
import type { TestProject } from "vitest/node";

export interface Native {
  /** Why there are no addons. */
  readonly lacksAddons: string | null;
  /** Why no engines can be built; includes the reason above. */
  readonly lacksRtx: string | null;
  /** Folder of TensorRT-RTX's libraries. */
  readonly rtx: string;
  /** Why TensorRT 11 cannot be opened: nobody has fetched it, which is half a gigabyte. Includes the first reason. */
  readonly lacksTensorRt: string | null;
  /** Folder of TensorRT 11's libraries. */
  readonly tensorrt: string;
}

declare module "vitest" {
  export interface ProvidedContext {
    native: Native;
  }
}

const root = path.resolve(import.meta.dirname, "../..");

function script(
  name: string,
  args: readonly string[] = [],
  required = Boolean(process.env.FLOWTURBO_REQUIRE_NATIVE),
): { lacks: string | null; output: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, [path.join(root, "scripts", name), ...args], {
    cwd: root,
    encoding: "utf8",
  });
  if (status === 0) return { lacks: null, output: stdout.trim() };
  const reason = stderr.trim().replace(/^error: /, "");
  if (status !== 3) throw new Error(`scripts/${name} failed:\n${stdout}\n${stderr}`);
  if (required) throw new Error(`FLOWTURBO_REQUIRE_NATIVE is set, but the native tests cannot run: ${reason}`);
  return { lacks: reason, output: "" };
}

export default function setup(project: TestProject): void {
  const built = script("build-native.mjs", ["--simulated"]);
  const fetched = built.lacks === null ? script("tensorrt-rtx.mjs") : { lacks: built.lacks, output: "" };
  if (fetched.lacks !== null)
    console.warn(
      `The native tests ${built.lacks === null ? "that build engines " : ""}are skipped: ${fetched.lacks.split("\n")[0]}`,
    );
  // A quarter of a gigabyte: fetched by hand, and where nothing may be skipped.
  if (process.env.FLOWTURBO_REQUIRE_NATIVE) script("onnxruntime-cuda.mjs");
  // Fetched by hand only: no test run begins with a download of that size.
  const full = built.lacks === null ? script("tensorrt.mjs", ["--present"], false) : { lacks: built.lacks, output: "" };
  project.provide("native", {
    ...{ lacksAddons: built.lacks, lacksRtx: fetched.lacks, rtx: fetched.output },
    ...{ lacksTensorRt: full.lacks, tensorrt: full.output },
  });
}
