/**
 * The graphics adapters that ONNX Runtime's WebGPU provider may run on. Neither it nor onnxruntime-node says which it takes or
 * what that has, so on Linux they are listed through Vulkan, by a process of its own, and the choice is made as Dawn makes
 * it. On Windows and macOS, where Dawn uses Direct3D 12 and Metal, they are not known.
 */

import { fork } from "node:child_process";
import { fileURLToPath, pathToFileURL } from "node:url";
import { packageFile } from "../../common/package.js";
import { thisPlatform } from "../../common/platform.js";
import type { AdapterFinding, Problem, RuntimeFinding } from "../runtime.js";
import type { NativeGraphicsAdapter } from "../tensorrt/addon.js";

/** A graphics adapter. */
export type GraphicsAdapter = AdapterFinding;

/** The adapters of this machine. */
export interface GraphicsAdapters {
  /** In the order of the loader; null where they are not known: those of Windows and macOS, or without an addon. */
  readonly adapters: readonly GraphicsAdapter[] | null;
  /** Why there are none, or why they are not known; null on Windows and macOS. */
  readonly problem: Problem | null;
}

/** What the probe answers: the list, an error of the addon's, or why there is no addon. */
export type FromProbe =
  | { readonly adapters: readonly NativeGraphicsAdapter[] }
  | { readonly code: string; readonly message: string }
  | { readonly cause: string; readonly remedy: string };

export interface ProbeOptions {
  /** Milliseconds after which the process is ended. Default: 20 000, for drivers on a slow disk. */
  readonly timeoutMs?: number | undefined;
  /** The built adapters-probe.ts; default: the package's. */
  readonly probe?: URL | undefined;
}

/** Lists the adapters. Never rejects. */
export async function findAdapters({ timeoutMs = 20_000, probe }: ProbeOptions = {}): Promise<GraphicsAdapters> {
  const { os } = thisPlatform();
  if (os !== "linux") return { adapters: null, problem: null };
  let answer: FromProbe | Problem;
  try {
    answer = await ask(probe ?? pathToFileURL(packageFile("dist/adapters-probe.js")), timeoutMs);
  } catch (error) {
    // The package is not whole, or no process can be started; drawing says so, too.
    const { message } = error as Error;
    return { adapters: null, problem: { prevents: "running", cause: message, remedy: "Install flowturbo again." } };
  }
  if ("adapters" in answer) {
    const adapters = answer.adapters.map(adapterOf);
    return { adapters, problem: adapters.length > 0 ? null : noAdapter };
  }
  if ("prevents" in answer) return { adapters: [], problem: answer };
  if ("cause" in answer) return { adapters: null, problem: { prevents: "running", ...answer } };
  if (answer.code === "LIBRARY_NOT_LOADED")
    return {
      adapters: [],
      problem: {
        prevents: "running",
        cause: `Vulkan's loader cannot be opened: ${answer.message}.`,
        remedy: "Install it: `apt-get install libvulkan1`, or the package vulkan-loader of other distributions.",
      },
    };
  return { adapters: [], problem: brokenDriver(`Vulkan failed: ${answer.message}.`) };
}

/** Whether it computes on processors: SwiftShader, lavapipe. */
export function isSoftware({ type }: GraphicsAdapter): boolean {
  return type === "cpu";
}

/** The adapter that Dawn takes where high performance is preferred; null if there is none. */
export function chosenAdapter(adapters: readonly GraphicsAdapter[]): GraphicsAdapter | null {
  // Dawn's SortAdapters: what is no GPU of its own, of the processor or of software comes last.
  const rank = ({ type }: GraphicsAdapter) => ({ discrete: 0, integrated: 1, cpu: 2, virtual: 3, other: 3 })[type];
  return adapters.reduce<GraphicsAdapter | null>(
    (best, next) => (best && rank(best) <= rank(next) ? best : next),
    null,
  );
}

/**
 * For `flowturbo doctor`, without starting ONNX Runtime: whether there is an adapter. Never rejects.
 * @param found the adapters
 */
export async function findWebGpu(found: Promise<GraphicsAdapters> = findAdapters()): Promise<RuntimeFinding> {
  const { adapters, problem } = await found;
  const chosen = adapters && chosenAdapter(adapters);
  const software =
    chosen && isSoftware(chosen)
      ? {
          reason: `Its only graphics adapter is ${chosen.name}, which is software: used only if the runtime is asked for by name.`,
          remedy: "If this machine has a GPU, install the Vulkan driver of its vendor.",
        }
      : null;
  return {
    name: "webgpu",
    // Adapters that are not known may be there.
    available: adapters === null || chosen !== null,
    version: null,
    reason: software?.reason ?? problem?.cause ?? null,
    remedy: software?.remedy ?? problem?.remedy ?? null,
    adapters,
  };
}

const noAdapter: Problem = {
  prevents: "running",
  cause: "Vulkan knows of no graphics adapter: no driver has its manifest (*_icd.json) in a folder vulkan/icd.d.",
  remedy:
    "Install the Vulkan driver of your GPU; in a container, with NVIDIA_DRIVER_CAPABILITIES=all (or with graphics among them), or with access to /dev/dri.",
};

function brokenDriver(cause: string): Problem {
  return {
    prevents: "running",
    cause,
    remedy: "A graphics driver is broken. Update it, or name the manifest of another one in VK_DRIVER_FILES.",
  };
}

/** Asks the probe; a Problem where it gave no answer. */
function ask(probe: URL, timeoutMs: number): Promise<FromProbe | Problem> {
  return new Promise((resolve) => {
    const child = fork(fileURLToPath(probe), [], {
      // None of the parent's flags: --inspect would claim its port.
      execArgv: [],
      // Drivers print warnings.
      stdio: ["ignore", "ignore", "ignore", "ipc"],
    });
    const end = (answer: FromProbe | Problem) => {
      clearTimeout(timer);
      process.off("exit", kill);
      child.kill("SIGKILL");
      resolve(answer);
    };
    const kill = () => child.kill("SIGKILL");
    process.on("exit", kill);
    const timer = setTimeout(
      () => end(brokenDriver(`Listing the graphics adapters took more than ${timeoutMs / 1000} s.`)),
      timeoutMs,
    );
    child.once("message", (message) => end(message as FromProbe));
    child.once("error", (error) => end(brokenDriver(`Listing the graphics adapters failed: ${error.message}.`)));
    child.once("exit", (code, signal) =>
      end(brokenDriver(`Listing the graphics adapters ended with ${signal ?? `code ${code}`}.`)),
    );
  });
}

/** Numbers of vendors as PCI and Khronos assign them. */
const vendors: Readonly<Record<number, string>> = {
  4098: "AMD",
  4112: "Imagination",
  4203: "Apple",
  4318: "NVIDIA",
  5045: "Arm",
  5140: "Microsoft",
  6880: "Google",
  20803: "Qualcomm",
  32902: "Intel",
  65541: "Mesa",
};

function adapterOf(native: NativeGraphicsAdapter): GraphicsAdapter {
  const { name, vendorId, deviceId, type, driverName, driverInfo, driverVersion, apiVersion } = native;
  return {
    name,
    vendor: vendors[vendorId] ?? `vendor 0x${vendorId.toString(16)}`,
    vendorId,
    deviceId,
    type,
    driver: driverName || null,
    driverVersion: driverInfo || versionText(vendorId, driverVersion),
    apiVersion: apiVersion.join("."),
    memoryBytes: native.memoryBytes,
    freeBytes: native.freeBytes,
    float16: native.float16,
    maxStorageBufferBytes: native.maxStorageBufferRange,
  };
}

/** Most drivers encode their version as Vulkan does its own; NVIDIA has four parts. */
function versionText(vendorId: number, version: number): string {
  const parts: readonly (readonly [shift: number, bits: number])[] =
    vendorId === 4318
      ? [
          [22, 10],
          [14, 8],
          [6, 8],
          [0, 6],
        ]
      : [
          [22, 10],
          [12, 10],
          [0, 12],
        ];
  return parts.map(([shift, bits]) => (version >>> shift) & ((1 << bits) - 1)).join(".");
}
