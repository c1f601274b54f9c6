/**
 * Finds ONNX Runtime's CUDA provider on this machine, and says in full why it cannot be used. onnxruntime-node brings the
 * library that graphs run in, but not the two files of the provider (272 MB), nor what those need of NVIDIA's: the shortest
 * way to all of them is a Python package. ONNX Runtime and its provider share internal structures, so that only a
 * provider of exactly the same version may be loaded; another one can crash the process. Nothing is loaded here.
 */

import { readdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { packagePath } from "../../common/package.js";
import { platformText, thisPlatform } from "../../common/platform.js";
import { pythonFolders } from "../python.js";
import type { LibraryFolders, PlaceTried, Problem, RuntimeFinding } from "../runtime.js";
import { type Cuda, smOf, smText } from "../tensorrt/addon.js";
import { cudaText, examineGpus, hardwareOf } from "../tensorrt/gpus.js";
import { findNeededLibraries, findsDriver, installCommand, nvidiaFolders } from "./cuda-libraries.js";
import { readSharedLibrary, type SharedLibrary } from "./elf.js";

/** The two files of the provider: ONNX Runtime opens the second, which the first connects to it. */
export const providerFiles = ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"] as const;
const [sharedFile, cudaFile] = providerFiles;
/** ONNX Runtime itself, as onnxruntime-node brings it. */
export const runtimeFile = "libonnxruntime.so.1";
const variable = "FLOWTURBO_ONNXRUNTIME_CUDA_DIR";

/** Everything that decides whether the CUDA provider can be used here. */
export interface CudaProviderReport {
  /** Folder with the provider's files; null if there is none that can be used. */
  readonly folder: string | null;
  /** The provider's version; null without one, or if it does not say. */
  readonly version: string | null;
  /** Folder of onnxruntime-node's own library; null if it is not installed. */
  readonly runtimeFolder: string | null;
  /** Folders with NVIDIA's libraries, to be put at the front of LD_LIBRARY_PATH where the provider is loaded. */
  readonly libraryFolders: readonly string[];
  readonly places: readonly PlaceTried[];
  /** Driver and GPUs; null without them, and where there is no addon to ask. */
  readonly cuda: Cuda | null;
  /** Number of the first GPU that the provider has kernels for; null where none is known. */
  readonly device: number | null;
  /** Numbers of all of those. */
  readonly usable: readonly number[];
  /** Why it cannot be used: one remedy for each cause; empty if it can. */
  readonly problems: readonly Problem[];
}

export interface FindCudaProviderOptions {
  /** Folder with the provider's files: the first place that is tried. */
  readonly folder?: string | undefined;
  /** Looks for files only where there is a GPU: for callers who want to run, and to know soon if they cannot. */
  readonly gpuFirst?: boolean | undefined;
}

/** Looks for the provider and what it needs, and examines the GPUs. Never rejects: what is missing is in `problems`. */
export async function findCudaProvider(options: FindCudaProviderOptions = {}): Promise<CudaProviderReport> {
  const nothing = {
    ...{ folder: null, version: null, runtimeFolder: null },
    ...{ libraryFolders: [], places: [], cuda: null, device: null, usable: [] },
  };
  const platform = thisPlatform();
  if (platform.os !== "linux" || platform.cpu !== "x64" || platform.libc !== "glibc")
    return {
      ...nothing,
      problems: [
        problem(
          `ONNX Runtime's CUDA provider is supported on linux-x64 only; this is ${platformText(platform)}.`,
          'Use another runtime, such as "onnxruntime".',
        ),
      ],
    };
  const examined = await examineGpus();
  const cuda = examined && !("cause" in examined) ? examined : null;
  const problems: Problem[] = examined && "cause" in examined ? [examined] : [];
  // Without an addon nobody asks the driver; that it is missing can be told all the same.
  if (!examined && !(await findsDriver()))
    problems.push(
      problem(
        "There is no NVIDIA driver: libcuda.so.1 is not on the loader's path.",
        "Install NVIDIA's driver (in a container, start it with access to the GPU).",
      ),
    );
  if (options.gpuFirst && problems.length > 0) return { ...nothing, problems };

  const runtime = await findRuntime();
  if (!runtime)
    return {
      ...nothing,
      cuda,
      problems: [problem("onnxruntime-node is not installed with its binaries.", "Run `npm install`."), ...problems],
    };
  const python = pythonFolders("onnxruntime", "nvidia").catch((error: Error) => error);
  const { found, places } = await findFiles(runtime, options.folder, python);
  const common = { ...nothing, runtimeFolder: runtime.folder, places, cuda };
  if (!found) {
    const gpus = cuda ? gpuProblem(cuda, null) : null;
    return { ...common, problems: [providerProblem(runtime.version, places), ...(gpus ? [gpus] : []), ...problems] };
  }
  const packages = await python;
  const needed = await findNeededLibraries(found.needed, [
    found.folder,
    // Of the site-packages that the provider is in, where that is a Python package: it need not be that of python3.
    ...(await nvidiaFolders([path.resolve(found.folder, "../../nvidia")])),
    ...(packages instanceof Error ? [] : await nvidiaFolders(packages.nvidia)),
  ]);
  if (needed.missing.length > 0)
    problems.unshift(
      problem(
        `The CUDA provider in ${found.folder} needs ${needed.missing.join(", ")}, which ${needed.missing.length === 1 ? "was" : "were"} not found.`,
        `Run \`${installCommand(needed.missing, needed.cuda)}\`, or add the folder to LD_LIBRARY_PATH.`,
      ),
    );
  const gpus = cuda && gpuProblem(cuda, needed.cuda);
  if (gpus) problems.push(gpus);
  return {
    ...common,
    folder: found.folder,
    version: found.version,
    libraryFolders: needed.folders,
    device: cuda && (usableDevices(cuda, needed.cuda)[0] ?? null),
    usable: cuda ? usableDevices(cuda, needed.cuda) : [],
    problems,
  };
}

/** The report as text: causes with their remedies, and the places that were tried. */
export function cudaDiagnosis({ folder, problems, places }: CudaProviderReport): string {
  const lines = problems.map(({ cause, remedy }) => `${cause} ${remedy}`);
  const failed = places.filter(({ error }) => error !== null);
  if (!folder && failed.length > 0)
    lines.push(`Places tried: ${failed.map(({ place, error }) => `${place} (${error})`).join("; ")}.`);
  return `ONNX Runtime's CUDA provider cannot be used here. ${lines.join(" ")}`;
}

/** For `flowturbo doctor`. Never rejects. */
export async function findCuda(settings: LibraryFolders): Promise<RuntimeFinding> {
  const { folder, version, places, problems, cuda } = await findCudaProvider({ folder: settings.cudaProviderFolder });
  return {
    name: "cuda",
    available: problems.length === 0,
    version,
    reason: problems.map(({ cause }) => cause).join(" ") || null,
    remedy: problems.map(({ remedy }) => remedy).join(" ") || null,
    libraries: { library: folder && path.join(folder, cudaFile), places, problems },
    hardware: cuda && hardwareOf(cuda),
  };
}

const problem = (cause: string, remedy: string): Problem => ({ prevents: "running", cause, remedy });
const installed = (version: string) => `pip install "onnxruntime-gpu[cuda,cudnn]==${version}"`;

/** onnxruntime-node's version, and the folder of its library; null where either is missing. */
async function findRuntime(): Promise<{ readonly version: string; readonly folder: string } | null> {
  try {
    const manifest = createRequire(packagePath("package.json")).resolve("onnxruntime-node/package.json");
    const { version } = JSON.parse(await readFile(manifest, "utf8")) as { version: string };
    const binaries = path.join(path.dirname(manifest), "bin");
    for (const name of await readdir(binaries)) {
      const folder = path.join(binaries, name, process.platform, process.arch);
      if ((await readdir(folder).catch(() => [] as string[])).includes(runtimeFile)) return { version, folder };
    }
  } catch {
    // As good as not installed; opening ONNX Runtime itself says more.
  }
  return null;
}

interface ProviderFiles {
  readonly folder: string;
  readonly version: string | null;
  /** Names of the libraries that it needs. */
  readonly needed: readonly string[];
}

async function findFiles(
  runtime: { readonly version: string; readonly folder: string },
  option: string | undefined,
  python: Promise<Readonly<Record<"onnxruntime" | "nvidia", readonly string[]>> | Error>,
): Promise<{ readonly found: ProviderFiles | null; readonly places: PlaceTried[] }> {
  const places: PlaceTried[] = [];
  const folders = async function* (): AsyncGenerator<[PlaceTried["source"], string]> {
    if (option !== undefined) yield ["option", path.resolve(option)];
    const named = process.env[variable];
    if (named) yield ["environment", path.resolve(named)];
    else places.push({ source: "environment", place: variable, error: "not set" });
    // Where the install script of onnxruntime-node puts it.
    yield ["package", runtime.folder];
    const packages = await python;
    const refused = (error: string) =>
      places.push({ source: "pip", place: "python3's package onnxruntime-gpu", error });
    if (packages instanceof Error) refused(packages.message);
    else if (packages.onnxruntime.length === 0) refused("not installed");
    else for (const folder of packages.onnxruntime) yield ["pip", path.join(folder, "capi")];
  };
  for await (const [source, place] of folders()) {
    try {
      const found = await examineFolder(place, runtime.version);
      places.push({ source, place: found.folder, error: null });
      return { found, places };
    } catch (error) {
      places.push({ source, place, error: (error as Error).message });
    }
  }
  return { found: null, places };
}

/** @throws Error with the reason why its files cannot be used */
async function examineFolder(place: string, needed: string): Promise<ProviderFiles> {
  // Archives have the files in lib/, unpacked wheels in capi/.
  for (const folder of ["", "lib", "capi", "onnxruntime/capi"].map((name) => path.join(place, name))) {
    const names = await readdir(folder).catch(() => [] as string[]);
    if (!names.includes(cudaFile)) continue;
    if (!names.includes(sharedFile)) throw new Error(`${sharedFile} is missing beside ${cudaFile}`);
    await readFileOf(folder, sharedFile);
    const library = await readFileOf(folder, cudaFile);
    const version = await versionOf(folder, library, needed);
    // What does not say its version is not refused: a build of one's own may name none.
    if (version !== null && version !== needed)
      throw new Error(`is version ${version}; needed is exactly ${needed}, that of onnxruntime-node`);
    return { folder, version, needed: library.needed };
  }
  throw new Error(`there is no ${cudaFile}`);
}

/** @throws Error with the name of the file, and what is wrong with it */
async function readFileOf(folder: string, name: string): Promise<SharedLibrary> {
  try {
    return await readSharedLibrary(path.join(folder, name));
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    throw new Error(`${name} ${code ? `cannot be read: ${message}` : message}`);
  }
}

/**
 * A provider's version. Its library has the version among its constants, as the whole of a text; the wheel's description is
 * beside its package. Null where neither says.
 * @param needed the version that is looked for first
 */
async function versionOf(folder: string, library: SharedLibrary, needed: string): Promise<string | null> {
  const constants = (await library.constants()).toString("latin1");
  if (`\0${constants}`.includes(`\0${needed}\0`)) return needed;
  const site = path.resolve(folder, "../..");
  const described = (await readdir(site).catch(() => [] as string[]))
    .map((name) => name.match(/^onnxruntime_gpu-([^-]+)\.dist-info$/)?.[1])
    .filter((version) => version !== undefined);
  if (described.length === 1) return described[0]!;
  // Versions of ONNX Runtime have two digits there, and those of other libraries in it (zlib 1.2.11) mostly have one.
  const texts = [...constants.matchAll(/(?<=\0)1\.\d{2}\.\d{1,2}(?=\0)/g)].map(([text]) => text);
  return new Set(texts).size === 1 ? texts[0]! : null;
}

function providerProblem(version: string, places: readonly PlaceTried[]): Problem {
  const remedy = `Run \`${installed(version)}\`, or set ${variable} to the folder with ${cudaFile} of version ${version}.`;
  // The first place where there was one is where the user means it to be.
  const refused = places.find(({ error }) => error?.startsWith("is version"));
  if (refused) return problem(`The CUDA provider in ${refused.place} ${refused.error}.`, remedy);
  const broken = places.find(({ error }) => error?.startsWith("lib"));
  if (broken) return problem(`The CUDA provider in ${broken.place} cannot be used: ${broken.error}.`, remedy);
  return problem("ONNX Runtime's CUDA provider was not found.", remedy);
}

/** The first driver for each version of CUDA. */
const drivers: Readonly<Record<number, string>> = { 12: "525", 13: "580" };
/** The oldest GPUs that CUDA 13 has kernels for. */
const oldestSm = 75;

/** Why it does not use a GPU. */
export const kernelsText = `The CUDA provider has kernels for SM ${smText(oldestSm)} and later`;

/** @param built the major version of CUDA that the provider was built for, if that is known */
function gpuProblem(cuda: Cuda, built: number | null): Problem | null {
  const driver = drivers[built ?? 0];
  if (built && cuda.driverVersion < built * 1000)
    return problem(
      `The NVIDIA driver serves CUDA ${cudaText(cuda.driverVersion)}; the CUDA provider was built for CUDA ${built}.`,
      `Update NVIDIA's driver${driver ? ` to ${driver} or newer` : ""}.`,
    );
  if (usableDevices(cuda, built).length > 0) return null;
  const found = cuda.devices.map((device) => `${device.name} (SM ${smText(smOf(device))})`).join(", ");
  return problem(`${kernelsText}; this machine has ${found}.`, 'Use another runtime, such as "onnxruntime".');
}

function usableDevices(cuda: Cuda, built: number | null): number[] {
  // Builds for older versions of CUDA have kernels for older GPUs, too.
  const isUsable = (number: number) => (built !== null && built < 13) || smOf(cuda.devices[number]!) >= oldestSm;
  return [...cuda.devices.keys()].filter(isUsable);
}
