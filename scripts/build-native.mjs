/**
 * `npm run build:native`: compiles both addons with cmake-js into native/tensorrt/build and native/tensorrt-rtx/build,
 * where node-gyp-build looks for them. binding.gyp runs the same command, so that there is one description of the build.
 *
 *   --copy FILE --addon tensorrt|tensorrt-rtx   copy that addon to FILE (binding.gyp)
 *   --simulated   also the simulated device, the executor's test and the stand-in for TensorRT, into .cache/simulated
 *   --sanitize address,undefined   all of it with sanitizers, into .cache/native-sanitize-address-undefined instead
 *   --target executor_tests   only what this target of CMakeLists.txt needs
 */

import { spawnSync } from "node:child_process";
import { copyFileSync, mkdirSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { fail, includeFolders, lacking, root } from "./headers.mjs";
import { formulaPtx } from "./ptx.mjs";
import { writeStubs } from "./stubs.mjs";

const { values } = parseArgs({
  options: {
    addon: { type: "string" },
    copy: { type: "string" },
    sanitize: { type: "string" },
    simulated: { type: "boolean" },
    target: { type: "string" },
  },
});
const absent = (tool) => spawnSync(tool, ["--version"]).error !== undefined;
for (const tool of ["cmake", process.env.CXX ?? "c++"]) if (absent(tool)) fail(`${tool} is not on PATH.`, lacking);
if (absent("make") && absent("ninja")) fail("Neither make nor ninja is on PATH.", lacking);
const headers = includeFolders();
const variant = values.sanitize ? `-sanitize-${values.sanitize.replaceAll(",", "-")}` : "";
const output = variant ? join(root, ".cache", `native${variant}`) : join(root, "native");
const work = join(root, ".cache", `cmake${variant}`);
const simulated = variant ? join(output, "simulated") : join(root, ".cache/simulated");
const list = (folders) => folders?.join(";") ?? "";
if (values.simulated || variant)
  for (const [folder, include] of [["tensorrt", headers.tensorrt], ["tensorrt-rtx", headers.rtx]])
    if (include) writeStubs(include, join(work, "stubs", folder));
const cmakeJs = createRequire(import.meta.url).resolve("cmake-js/bin/cmake-js");

// "binary.napi_versions" in package.json makes cmake-js take the headers of node-api-headers and download nothing.
for (const step of ["configure", "build"]) {
  const done = spawnSync(
    process.execPath,
    [
      cmakeJs,
      step,
      ...["--directory", root, "--out", work, "--config", "Release", "--parallel", "2", "--log-level", "warn"],
      `--CDTENSORRT_INCLUDE=${list(headers.tensorrt)}`,
      `--CDTENSORRT_RTX_INCLUDE=${list(headers.rtx)}`,
      `--CDFLOWTURBO_OUTPUT=${output}`,
      `--CDFLOWTURBO_SIMULATED=${values.simulated || variant ? "ON" : "OFF"}`,
      `--CDFLOWTURBO_SIMULATED_STUBS=${join(work, "stubs")}`,
      `--CDFLOWTURBO_SIMULATED_OUTPUT=${simulated}`,
      `--CDFLOWTURBO_SANITIZE=${values.sanitize ?? ""}`,
      ...(values.target && step === "build" ? ["--target", values.target] : []),
    ],
    { cwd: root, stdio: ["ignore", "inherit", "inherit"] },
  );
  if (done.status !== 0) fail("The addons could not be built; the compiler's messages are above.");
}

// The kernel of the stand-in. Without it the rest is of use all the same.
if ((values.simulated || variant) && headers.tensorrt) {
  const beside = join(simulated, "stand-in/formula.ptx");
  const { file, why } = formulaPtx();
  if (file) copyFileSync(file, beside);
  else rmSync(beside, { force: true });
  if (!file) console.error(`The stand-in for TensorRT has no kernel, since it could not be compiled: ${why}.`);
}

if (values.copy) {
  const kind = values.addon ?? fail("--copy needs --addon.");
  mkdirSync(dirname(resolve(values.copy)), { recursive: true });
  copyFileSync(join(output, kind, "build", "Release", `flowturbo_${kind.replace("-", "_")}.node`), values.copy);
}
