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
      return lost(error);
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
  if (error.code === "DEVICE_LOST") return lost(error);
  return new RuntimeUnavailableError(
    kind,
    `The runtime ${kind} cannot use a GPU here: ${error.message}. \`flowturbo doctor\` says what was looked for.`,
    { cause: error },
  );
}

function lost(error: NativeError): DeviceLostError {
  return new DeviceLostError(
    `The GPU cannot be used any more: ${error.message}. The next call opens it again; if that fails too, restart the process and look at nvidia-smi and the system's log.`,
    { cause: error },
  );
}

function outOfMemory(what: string, error: NativeError): MemoryError {
  const { needed = 0, available = 0 } = error;
  return new MemoryError(
    `${what} needs about ${gigabytes(needed)} GB of GPU memory, but ${gigabytes(available)} GB are free. ` +
      "Draw fewer or smaller pictures at once, set keepTextEncoders to false, or end other programs on the GPU.",
    needed,
    available,
  );
}

function logged(error: NativeError): string {
  return error.log?.length ? ` TensorRT says: ${error.log.slice(0, 3).join(" ")}` : "";
}
