/**
 * TensorRT's libraries, a row each: how one is found, what it runs on, what it builds engines for. Another library of the
 * family is another row, and an addon compiled with its headers; nothing else compares names.
 */

import { OptionError, RuntimeUnavailableError } from "../../errors.js";
import { type Cuda, smOf, smText } from "./addon.js";

/** A library of TensorRT. */
export type TensorRtKind = "tensorrt" | "tensorrt-rtx";

/** What an engine is built for: SM numbers, or the very GPU that it was built on. */
export type EngineDevice = { targets: number[] } | { gpu: string; sm: number; driver: number };

export interface Flavour {
  readonly title: string;
  readonly library: string;
  readonly parser: string;
  /** Environment variable that names a folder. */
  readonly variable: string;
  /** Python package whose folder holds the libraries when pip has installed them. */
  readonly module: string;
  readonly install: string;
  /** Compute capabilities, as SM numbers, that the library runs on. */
  readonly supports: (sm: number) => boolean;
  readonly supported: string;
  /** What helps where it supports no GPU of the machine. */
  readonly unsupportedRemedy: string;
  /** Whether engines can be built without a GPU, and so for others: whether targets can be named. */
  readonly takesTargets: boolean;
  /** Memory that a build takes besides what goes with the weights: see build-memory.ts. */
  readonly buildBaseBytes: number;
  /** Whether it times kernels on the GPU while it builds, which is worth keeping for the next build. */
  readonly timesKernels: boolean;
  /**
   * What engines are built for.
   * @param number of the present GPU; default: 0
   * @throws OptionError, RuntimeUnavailableError
   */
  deviceOf(targets: readonly number[], cuda: Cuda | null, number?: number): EngineDevice;
}

/** SM numbers that a TensorRT-RTX engine can be built for. */
const rtxTargets: readonly number[] = [75, 80, 86, 89, 120, 121];
const rtxTargetsText = rtxTargets.map(smText).join(", ");
const targetExamples = "8.6 is an RTX 3090, 8.9 an RTX 4090, 12.0 an RTX 5090";
const fullInstall = "`pip install tensorrt-cu13`, NVIDIA's apt packages, or NVIDIA's archive";

/** In order of preference: TensorRT covers every GPU, and times its kernels on the very one. */
export const flavours: Readonly<Record<TensorRtKind, Flavour>> = {
  tensorrt: {
    title: "TensorRT 11",
    library: "libnvinfer.so.11",
    parser: "libnvonnxparser.so.11",
    variable: "FLOWTURBO_TENSORRT_DIR",
    module: "tensorrt_libs",
    install: fullInstall,
    supports: (sm) => sm >= 75,
    supported: "SM 7.5 or later",
    unsupportedRemedy: "Use a newer GPU.",
    takesTargets: false,
    // Not measured here, for want of a GPU: what its libraries and its context on the device are said to take.
    buildBaseBytes: 3e9,
    timesKernels: true,
    deviceOf(targets, cuda, number = 0) {
      if (targets.length > 0)
        throw new OptionError(
          "targets",
          "Expected no targets for the runtime tensorrt, which builds for the present GPU only. Use tensorrt-rtx to build for others.",
        );
      const gpu = cuda?.devices[number];
      if (!gpu || !flavours.tensorrt.supports(smOf(gpu)))
        throw new RuntimeUnavailableError(
          "tensorrt",
          `TensorRT 11 builds engines on the GPU that will run them, and this machine has none of ${flavours.tensorrt.supported}. Use tensorrt-rtx with targets to build ahead of time.`,
        );
      return { gpu: gpu.name, sm: smOf(gpu), driver: cuda.driverVersion };
    },
  },
  "tensorrt-rtx": {
    title: "TensorRT-RTX",
    library: "libtensorrt_rtx.so.1",
    parser: "libtensorrt_onnxparser_rtx.so.1",
    variable: "FLOWTURBO_TENSORRT_RTX_DIR",
    module: "tensorrt_rtx_libs",
    install: "`pip install tensorrt-rtx-cu13-libs`",
    supports: (sm) => rtxTargets.includes(sm),
    supported: `SM ${rtxTargetsText}`,
    unsupportedRemedy: `Use the runtime "tensorrt": ${fullInstall}.`,
    takesTargets: true,
    // Measured with 1.7 (npm run bench:build).
    buildBaseBytes: 0.7e9,
    timesKernels: false,
    deviceOf(targets, cuda, number = 0) {
      const gpu = cuda?.devices[number];
      const wanted = targets.length > 0 ? targets : gpu ? [smOf(gpu)] : [];
      if (wanted.length === 0)
        throw new OptionError(
          "targets",
          `This machine has no GPU, so say for which to build: targets from ${rtxTargetsText} (${targetExamples}).`,
        );
      for (const sm of wanted)
        if (!rtxTargets.includes(sm))
          throw new OptionError(
            "targets",
            `TensorRT-RTX builds for ${rtxTargetsText}, not for ${smText(sm)}${targets.length > 0 ? "" : `, the present GPU (${gpu!.name}): use the runtime tensorrt`}.`,
          );
      return { targets: [...new Set(wanted)].sort((a, b) => a - b) };
    },
  },
};

export const tensorRtKinds = Object.keys(flavours) as TensorRtKind[];
