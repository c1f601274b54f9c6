/**
 * NVIDIA's libraries that ONNX Runtime's CUDA provider needs, beyond the driver: which, where they are, and which Python
 * packages have those that are missing. The loader would name one that it lacks, and those that are opened by name later
 * (cuDNN's) only in the middle of a picture; here all are looked for before anything is loaded.
 */

import { execFile } from "node:child_process";
import { readdir } from "node:fs/promises";
import path from "node:path";
import { promisify } from "node:util";
import { readSharedLibrary } from "./elf.js";

export interface NeededLibraries {
  /** Folders to add to the loader's path, in their order. */
  readonly folders: readonly string[];
  /** Names of libraries that were not found. */
  readonly missing: readonly string[];
  /** Major version of CUDA that the provider was built for; null if it does not say. */
  readonly cuda: number | null;
}

/** The driver's own library comes with the driver, not with these. */
const driverLibrary = "libcuda.so.1";
const isNvidias = (name: string) => /^lib(cu|nv)/.test(name) && name !== driverLibrary;

/**
 * cuDNN is opened by name when the first graph needs it, and opens its parts in the same way: without these it cannot
 * compute a convolution. (A provider needs cuFFT for Fourier transforms only, which no graph here has.)
 */
const cudnn = "libcudnn.so.9";
const cudnnParts = ["graph", "ops", "cnn", "heuristic", "engines_precompiled", "engines_runtime_compiled"].map(
  (part) => `libcudnn_${part}.so.9`,
);

/** Where CUDA's own installer puts its libraries. */
const toolkitFolders = ["/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib"];
/** Where the loader looks without being told, besides its cache. */
const defaultFolders = [
  "/lib/x86_64-linux-gnu",
  "/usr/lib/x86_64-linux-gnu",
  "/lib64",
  "/usr/lib64",
  "/lib",
  "/usr/lib",
];

/**
 * Looks for everything that the provider needs, and what that needs in turn.
 * @param needed names of the libraries that the provider's file says it needs
 * @param first folders that are looked through before those of the system
 */
export async function findNeededLibraries(
  needed: readonly string[],
  first: readonly string[],
): Promise<NeededLibraries> {
  const loader = await loaderFolders();
  const searched = [...new Set([...first, ...loader, ...toolkitFolders])];
  const cuda = needed.map((name) => name.match(/^libcudart\.so\.(\d+)$/)?.[1]).find(Boolean);
  const wanted = [...needed.filter(isNvidias), cudnn];
  const used = new Set<string>();
  const missing: string[] = [];
  const seen = new Set(wanted);
  for (const name of wanted) {
    const found = await findIn(searched, name);
    if (!found) {
      missing.push(name);
      continue;
    }
    if (!loader.includes(found.folder)) used.add(found.folder);
    for (const next of name === cudnn ? cudnnParts : found.needed.filter(isNvidias))
      if (!seen.has(next)) {
        seen.add(next);
        // The loop goes on with what it finds at the end.
        wanted.push(next);
      }
  }
  // cuDNN compiles some kernels at run time, if it finds the compiler.
  const compiler = cuda && (await findIn(searched, `libnvrtc.so.${cuda}`));
  if (compiler && !loader.includes(compiler.folder)) used.add(compiler.folder);
  return { folders: searched.filter((folder) => used.has(folder)), missing, cuda: cuda ? Number(cuda) : null };
}

/** Whether the loader finds the driver's library. */
export async function findsDriver(): Promise<boolean> {
  return (await findIn(await loaderFolders(), driverLibrary)) !== null;
}

/** What installs these libraries for a major version of CUDA, with pip. */
export function installCommand(libraries: readonly string[], cuda: number | null): string {
  const packages = libraries.map((library) => packageOf(library, cuda));
  return `pip install ${[...new Set(packages)].join(" ")}`;
}

/** Folders lib/ of NVIDIA's Python packages, in folders `nvidia` of site-packages. */
export async function nvidiaFolders(roots: readonly string[]): Promise<string[]> {
  const found: string[] = [];
  for (const root of roots)
    for (const name of (await readdir(root).catch(() => [])).sort()) found.push(path.join(root, name, "lib"));
  return found;
}

async function findIn(
  folders: readonly string[],
  name: string,
): Promise<{ readonly folder: string; readonly needed: readonly string[] } | null> {
  for (const folder of folders) {
    // The loader, too, passes over files that are for another processor.
    const found = await readSharedLibrary(path.join(folder, name)).catch(() => null);
    if (found) return { folder, needed: found.needed };
  }
  return null;
}

/** Where the loader looks by itself: LD_LIBRARY_PATH, its cache, and its default folders. */
async function loaderFolders(): Promise<string[]> {
  const named = (process.env.LD_LIBRARY_PATH ?? "").split(/[:;]/).filter(Boolean);
  // Not on the PATH of every user.
  const cache = await promisify(execFile)("/sbin/ldconfig", ["-p"], { timeout: 10_000, maxBuffer: 1 << 24 }).then(
    ({ stdout }) => [...stdout.matchAll(/=> (\/.*)\/[^/\n]+$/gm)].map(([, folder]) => folder!),
    () => [],
  );
  return [...new Set([...named, ...cache, ...defaultFolders])];
}

/**
 * The Python package with a library. The number at the end of a library's name is the major version of the package; those
 * for CUDA 12 and earlier, and cuDNN, have CUDA's version in their name.
 */
function packageOf(library: string, cuda: number | null): string {
  const [, stem, version] = library.match(/^lib([A-Za-z]+?)(?:Lt|_\w+)?\.so\.(\d+)/) ?? [];
  const major = cuda ?? 13;
  const [name, isVersioned] = packages[stem ?? ""] ?? [`nvidia-${stem?.toLowerCase()}`, false];
  return `"${name}${isVersioned || major < 13 ? `-cu${major}` : ""}${version ? `==${version}.*` : ""}"`;
}

const packages: Readonly<Record<string, readonly [name: string, isVersioned: boolean]>> = {
  cudart: ["nvidia-cuda-runtime", false],
  nvrtc: ["nvidia-cuda-nvrtc", false],
  cudnn: ["nvidia-cudnn", true],
};
