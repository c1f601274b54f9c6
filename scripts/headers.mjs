/**
 * Where the headers of TensorRT and TensorRT-RTX come from: folders that the user names, or the Rust crate trtx-sys,
 * which carries both under Apache-2.0. The crate is fetched with cargo (no Rust is compiled), checked against its
 * digest and unpacked into .cache/, which is neither committed nor packed.
 */

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

export const root = dirname(dirname(fileURLToPath(import.meta.url)));
/** The libraries that have an addon each, by the names of their folders. */
export const libraries = ["tensorrt", "tensorrt-rtx"];
const crate = "trtx-sys";
const version = "0.9.1";
const sha256 = "5480ee056292951daa1bc74532162d6cb75190f091e45d7d97c0c356916ae171";

/** Include folders of each library; null for one whose addon cannot be built from what the user named. */
export function includeFolders() {
  const { TENSORRT_INCLUDE_DIR, TENSORRT_RTX_INCLUDE_DIR } = process.env;
  if (TENSORRT_INCLUDE_DIR || TENSORRT_RTX_INCLUDE_DIR) {
    // The folder may contain the headers of both libraries, as the crate does, or those of one.
    const both = TENSORRT_INCLUDE_DIR && existsSync(TENSORRT_INCLUDE_DIR) && bothWithin(TENSORRT_INCLUDE_DIR);
    if (both) return both;
    return { tensorrt: given(TENSORRT_INCLUDE_DIR), rtx: given(TENSORRT_RTX_INCLUDE_DIR) };
  }
  return bothWithin(fetchHeaders()) ?? fail("The crate's archive holds no TensorRT headers.");
}

function given(folder) {
  if (!folder) return null;
  if (!existsSync(join(folder, "NvInfer.h"))) fail(`${folder} has no NvInfer.h.`);
  // CUDA's header lies beside the folder in the crate, and with NVIDIA's toolkit where the compiler does not look.
  const cuda = [dirname(folder), join(process.env.CUDA_HOME ?? "/usr/local/cuda", "include")];
  return [folder, ...cuda.filter((candidate) => existsSync(join(candidate, "cuda_runtime_api.h")))];
}

function bothWithin(folder) {
  const pick = (name) => {
    const found = readdirSync(folder).filter((entry) => entry.startsWith(name)).sort().at(-1);
    return found ? [join(folder, found), folder] : null;
  };
  const tensorrt = pick("TRT-Enterprise-");
  const rtx = pick("TRT-RTX-");
  return tensorrt && rtx ? { tensorrt, rtx } : null;
}

function fetchHeaders() {
  const folder = join(root, ".cache", "headers", sha256.slice(0, 16));
  const headers = join(folder, "TensorRT-Headers");
  if (existsSync(headers)) return headers;
  // A CARGO_HOME inside the repository, so that the user's cargo configuration and registry are not changed.
  const home = join(root, ".cache", "cargo-home");
  mkdirSync(home, { recursive: true });
  try {
    execFileSync("cargo", ["info", `${crate}@${version}`], {
      cwd: home,
      env: { ...process.env, CARGO_HOME: home },
      stdio: ["ignore", "ignore", "pipe"],
    });
  } catch (error) {
    fail(
      error.code === "ENOENT"
        ? "cargo is not on PATH. It fetches the headers; or set TENSORRT_INCLUDE_DIR and TENSORRT_RTX_INCLUDE_DIR."
        : `cargo could not fetch ${crate} ${version}: ${error.stderr ?? error.message}`,
      lacking,
    );
  }
  const archive = readdirSync(join(home, "registry", "cache"), { recursive: true })
    .map(String)
    .find((name) => name.endsWith(".crate") && name.includes(`${crate}-${version}`));
  if (!archive) fail(`cargo left no archive of ${crate} ${version} under ${home}.`);
  const file = join(home, "registry", "cache", archive);
  const digest = createHash("sha256").update(readFileSync(file)).digest("hex");
  if (digest !== sha256) fail(`${file} has SHA-256 ${digest}; expected ${sha256}.`);
  const temporary = `${folder}.${process.pid}`;
  mkdirSync(temporary, { recursive: true });
  execFileSync("tar", ["-xzf", file, "-C", temporary, "--strip-components=1"]);
  rmSync(folder, { recursive: true, force: true });
  renameSync(temporary, folder);
  return headers;
}

/** Exit code for "this machine lacks a tool or a file", as opposed to 1 for "an attempt failed". */
export const lacking = 3;

export function fail(message, code = 1) {
  console.error(`error: ${message}`);
  process.exit(code);
}
