/**
 * `npm run fetch:onnxruntime-cuda`: ONNX Runtime's CUDA provider for the tests, of onnxruntime-node's own version, from the
 * Python package onnxruntime-gpu, into .cache/ (neither committed nor packed: it is 290 MB). Prints its folder, for
 * FLOWTURBO_ONNXRUNTIME_CUDA_DIR.
 */

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fail, lacking, root } from "./headers.mjs";

const files = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];
const manifest = join(root, "node_modules/onnxruntime-node/package.json");
if (!existsSync(manifest)) fail("onnxruntime-node is not installed.", "Run `npm install`.");
const { version } = JSON.parse(readFileSync(manifest, "utf8"));
const folder = join(root, ".cache/onnxruntime-cuda");
const told = join(folder, `onnxruntime_gpu-${version}`);

if (!existsSync(told)) {
  mkdirSync(folder, { recursive: true });
  const temporary = mkdtempSync(join(folder, "fetching-"));
  const python = (...args) => execFileSync("python3", args, { stdio: ["ignore", "ignore", "pipe"] });
  try {
    python(
      ...["-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"],
      // Whatever python3 is here: only two files of the wheel are wanted.
      ...["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"],
      ...["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64", "--dest", temporary],
      `onnxruntime-gpu==${version}`,
    );
    const wheel = readdirSync(temporary).find((name) => name.endsWith(".whl"));
    const extract = "import sys, zipfile\nfor n in sys.argv[3:]: zipfile.ZipFile(sys.argv[1]).extract('onnxruntime/capi/' + n, sys.argv[2])";
    python("-c", extract, join(temporary, wheel), temporary, ...files);
    for (const file of files) renameSync(join(temporary, "onnxruntime/capi", file), join(folder, file));
    mkdirSync(told);
  } catch (error) {
    fail(error.code === "ENOENT" ? "python3 is not on PATH." : `pip could not fetch it: ${error.stderr ?? error.message}`, lacking);
  } finally {
    rmSync(temporary, { recursive: true, force: true });
  }
}
console.log(folder);
