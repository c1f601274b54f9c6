/**
 * The stand-in's kernel (native/simulated/formula.cu) as PTX, the text from which a driver makes code for its GPU. It is
 * made once for each version of the source, by NVRTC from the Python package that NVIDIA publishes (which needs no GPU)
 * or by nvcc, and kept in .cache/. The compiler is not kept, nor is anything of NVIDIA's committed or packed.
 *
 * `npm run build:native -- --simulated` puts it beside the stand-in. A machine with neither pip nor nvcc takes both files
 * from one that has them.
 */

import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { root } from "./headers.mjs";

// An old one: a driver takes what older compilers have written. Its ISA is 8.4, that of CUDA 12.4.
const compiler = "nvidia-cuda-nvrtc-cu12==12.4.127";
/** The newest ISA that drivers for CUDA 13.0 take: the oldest that TensorRT 11 runs on. */
const newestIsa = 9.0;
const sources = ["formula.cu", "formula.h"].map((name) => join(root, "native/simulated", name));
const options = ["-arch=compute_75", "-std=c++17", "--fmad=false", `-I${join(root, "native/simulated")}`];

/** @returns the file, or why there is none */
export function formulaPtx() {
  const digest = createHash("sha256");
  for (const source of sources) digest.update(readFileSync(source));
  const name = digest.update(options.slice(0, -1).join(" ")).digest("hex").slice(0, 16);
  const folder = join(root, ".cache/ptx");
  const file = join(folder, `formula-${name}.ptx`);
  if (existsSync(file)) return { file };
  mkdirSync(folder, { recursive: true });
  const reasons = [];
  for (const compile of [byNvrtc, byNvcc]) {
    const work = mkdtempSync(join(folder, "work-"));
    try {
      const text = compile(work);
      check(text);
      const temporary = join(work, "formula.ptx");
      writeFileSync(temporary, text);
      renameSync(temporary, file);
      return { file };
    } catch (error) {
      reasons.push(`${compile === byNvrtc ? "NVRTC" : "nvcc"}: ${lastLine(error)}`);
    } finally {
      rmSync(work, { recursive: true, force: true });
    }
  }
  return { file: null, why: reasons.join("; ") };
}

function byNvrtc(work) {
  const pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"];
  const where = ["--root-user-action", "ignore", "--only-binary", ":all:", "--target", work];
  execFileSync("python3", [...pip, ...where, compiler], { stdio: ["ignore", "ignore", "pipe"] });
  const library = readdirSync(work, { recursive: true })
    .map(String)
    .find((path) => /\/libnvrtc\.so\.\d+$/.test(path));
  if (!library) throw new Error(`${compiler} has no libnvrtc.so`);
  return execFileSync("python3", [join(root, "scripts/ptx.py"), join(work, library), sources[0], ...options], {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
  });
}

function byNvcc(work) {
  const inToolkit = join(process.env.CUDA_HOME ?? "/usr/local/cuda", "bin/nvcc");
  const nvcc = existsSync(inToolkit) ? inToolkit : "nvcc";
  const out = join(work, "formula.ptx.part");
  const { error, status, stderr } = spawnSync(nvcc, ["-ptx", ...options, "-o", out, sources[0]], { encoding: "utf8" });
  if (error) throw error.code === "ENOENT" ? new Error("nvcc is not on PATH") : error;
  if (status !== 0) throw new Error(stderr);
  return readFileSync(out, "utf8");
}

function check(text) {
  const isa = Number(text.match(/^\.version (\d+\.\d+)/m)?.[1]);
  if (!(isa <= newestIsa)) throw new Error(`PTX ISA ${isa} is newer than ${newestIsa.toFixed(1)}, which drivers for CUDA 13.0 take`);
  if (!/\.entry flowturbo_formula\(/.test(text)) throw new Error("the PTX has no kernel flowturbo_formula");
  if (/\bfma\.|\bmad\.\w+\.f32/.test(text)) throw new Error("the PTX has a fused multiply-add, which rounds otherwise");
}

function lastLine(error) {
  if (error.code === "ENOENT") return `${error.path ?? "it"} is not on PATH`;
  return String(error.stderr || error.message).trim().split("\n").at(-1);
}
