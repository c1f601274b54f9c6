/** The addon's errors of running programs as this package's, with the launch by name and a remedy. */

import { gigabytes } from "../../common/memory.js";
import {
  CacheError,
  CompileError,
  DeviceLostError,
  type FlowTurboError,
  LaunchError,
  MemoryError,
  NotFiniteError,
  RuntimeError,
  RuntimeUnavailableError,
} from "../../errors.js";
import type { Launch } from "../../program/program.js";
import type { NativeEngine, NativeError } from "./addon.js";

/** @param launches those of the submission, and the tensors of the engine of each */
export function explainRun(
  error: NativeError,
  launches: readonly Launch[],
  engineOf: (launch: Launch) => NativeEngine,
): FlowTurboError {
  const cause = { cause: error };
  const launch = error.launch === undefined ? undefined : launches[error.launch];
  const where = launch ? `The graph "${launch.graph}" (${launch.label.name})` : "The program";
  switch (error.code) {
    case "NOT_FINITE": {
      const tensor = launch && engineOf(launch).tensors[error.operand ?? 0]?.name;
      const name = tensor === undefined ? "A value" : `"${launch!.outputs[tensor]}"`;
      return new NotFiniteError(
        launch?.label.name ?? "",
        `${name} holds NaN or an infinity after ${launch?.label.name} (graph "${launch?.graph}").`,
      );
    }
    case "DEVICE_MEMORY":
      return outOfMemory("This program", error);
    case "DEVICE_LOST":
      return explainLoss(error);
    case "LAUNCH":
    case "CUDA":
      return new LaunchError(
        launch?.graph ?? null,
        `${where} failed on the GPU: ${error.message}.${logged(error)}`,
        error.log ?? [],
        cause,
      );
    default:
      return new RuntimeError(`${where} failed: ${error.message}.${logged(error)}`, cause);
  }
}

/** Errors of loading an engine or making it ready. */
export function explainEngine(error: NativeError, graph: string): FlowTurboError {
  switch (error.code) {
    case "PLAN":
      return new CompileError(
        graph,
        `The engine of ${graph} cannot be loaded: ${error.message}.${logged(error)}`,
        error.log ?? [],
      );
    case "PLAN_CHANGED":
    case "IO":
      return new CacheError(error.path ?? "", `${error.message}. Run \`flowturbo cache verify\`, or try again.`, {
        cause: error,
      });
    case "DEVICE_MEMORY":
      return outOfMemory(`The engine of ${graph}`, error);
    default:
      return explainRun(error, [], () => {
        throw error;
      });
  }
}

/** Errors of opening the device. */
export function explainDevice(error: NativeError, kind: string): FlowTurboError {
  if (error.code === "DEVICE_LOST") return explainLoss(error);
  return new RuntimeUnavailableError(
    kind,
    `The runtime ${kind} cannot use a GPU here: ${error.message}. \`flowturbo doctor\` says what was looked for.`,
    { cause: error },
  );
}

/** What every call of this process rejects with from now on. */
export function explainLoss(error: NativeError): DeviceLostError {
  return new DeviceLostError(
    `This process has lost the GPU: ${error.message}. CUDA gives it back to a new process only, so this process must be restarted. If the GPU is lost again, look at nvidia-smi and the system's log.`,
    { cause: error },
  );
}

function outOfMemory(what: string, error: NativeError): MemoryError {
  // TensorRT does not always say how much it asked for.
  const { needed = 0, available = 0 } = error;
  const free = `${gigabytes(available)} GB are free`;
  const lack =
    needed > 0
      ? `needs about ${gigabytes(needed)} GB of GPU memory, but ${free}`
      : `needs more GPU memory than is free; ${free}`;
  return new MemoryError(
    `${what} ${lack}. Draw fewer or smaller pictures at once, set keepTextEncoders to false, or end other programs on the GPU.${logged(error)}`,
    needed,
    available,
  );
}

function logged(error: NativeError): string {
  return error.log?.length ? ` TensorRT says: ${error.log.slice(0, 3).join(" ")}` : "";
}
