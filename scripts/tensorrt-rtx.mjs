/**
 * `npm run fetch:tensorrt-rtx`: TensorRT-RTX for the tests, from the Python package that NVIDIA publishes, into .cache/
 * (neither committed nor packed: its licence does not clearly allow that). Prints the folder with the libraries, for
 * FLOWTURBO_TENSORRT_RTX_DIR.
 */

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fail, lacking, root } from "./headers.mjs";

const version = "1.7.1.116";
const folder = join(root, ".cache", `tensorrt-rtx-${version}`);
const libraries = join(folder, "tensorrt_rtx_libs");

if (!existsSync(libraries)) {
  const temporary = `${folder}.${process.pid}`;
  mkdirSync(temporary, { recursive: true });
  try {
    execFileSync(
      "python3",
      [
        ...["-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"],
        ...["--root-user-action", "ignore", "--only-binary", ":all:", "--target", temporary],
        `tensorrt-rtx-cu13-libs==${version}`,
      ],
      { stdio: ["ignore", "ignore", "pipe"] },
    );
    renameSync(temporary, folder);
  } catch (error) {
    rmSync(temporary, { recursive: true, force: true });
    // Another process may have fetched it meanwhile.
    if (!existsSync(libraries))
      fail(
        error.code === "ENOENT" ? "python3 is not on PATH." : `pip could not fetch it: ${error.stderr ?? error.message}`,
        lacking,
      );
  }
}
console.log(libraries);
