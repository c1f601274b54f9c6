/**
 * `npm run fetch:onnxruntime-cuda`: ONNX Runtime's CUDA provider for the tests, of onnxruntime-node's own version, from the
 * Python package onnxruntime-gpu, into .cache/ (neither committed nor packed: it is 290 MB). Prints its folder, for
 * FLOWTURBO_ONNXRUNTIME_CUDA_DIR.
 */

import { existsSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fetched, quietly } from "./fetched.mjs";
import { fail, lacking, root } from "./headers.mjs";

const files = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];
const manifest = join(root, "node_modules/onnxruntime-node/package.json");
if (!existsSync(manifest)) fail("onnxruntime-node is not installed; run `npm install`.", lacking);
const { version } = JSON.parse(readFileSync(manifest, "utf8"));
const extract =
  "import sys, zipfile\nfor n in sys.argv[3:]: zipfile.ZipFile(sys.argv[1]).extract('onnxruntime/capi/' + n, sys.argv[2])";

console.log(
  fetched(`onnxruntime-cuda-${version}`, "pip", (folder) => {
    const work = join(folder, "wheel");
    quietly("python3", [
      ...["-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"],
      // Whatever python3 is here: only two files of the wheel are wanted.
      ...["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"],
      ...["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64", "--dest", work],
      `onnxruntime-gpu==${version}`,
    ]);
    const wheel = readdirSync(work).find((name) => name.endsWith(".whl"));
    quietly("python3", ["-c", extract, join(work, wheel), work, ...files]);
    for (const file of files) renameSync(join(work, "onnxruntime/capi", file), join(folder, file));
    rmSync(work, { recursive: true, force: true });
  }),
);
