// The simulated device for tests in TypeScript: its controls, and runtimes on it. Importing this file brings the simulated
// libcuda.so.1 into the process, before any addon looks for it.
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import { flavours, type TensorRtKind } from "../../lib/runtimes/tensorrt/flavours.js";
import { TensorRtRuntime, type TensorRtRuntimeOptions } from "../../lib/runtimes/tensorrt/runtime.js";
import { loadAddon } from "./addon.js";
import { root } from "./fixtures.js";

export { planText, SimulatedEngines } from "./plans.js";

/** See native/simulated/simulated.h. */
export interface Counts {
  readonly calls: number;
  readonly deviceBlocks: number;
  readonly deviceBytes: number;
  readonly hostBlocks: number;
  readonly streams: number;
  readonly events: number;
  readonly graphs: number;
  readonly contexts: number;
  readonly runtimes: number;
  readonly engines: number;
  readonly executionContexts: number;
  readonly kernels: number;
  readonly uploads: number;
  readonly downloads: number;
  readonly copies: number;
  readonly graphLaunches: number;
  readonly deserialised: number;
  readonly violations: number;
  readonly captures: number;
  readonly spins: number;
  readonly interrupts: number;
}

interface Control {
  counts(): Counts;
  kernelTimes(): number[];
  reset(): void;
  failAt(call: number, code: number): void;
  failKernel(kernel: number, code: number): void;
  failed(): string;
  violation(): string;
  capacity(bytes: number): void;
  devices(microseconds: readonly number[]): void;
  kernelsOn(device: number): number;
  loseDevice(device: number, code: number): void;
  refuseCaptures(refuse: boolean): void;
  hold(): void;
  let(count: number): void;
}

/** Folder of the simulated libraries. */
export const simulatedFolder = process.env.FLOWTURBO_ADDON_DIR
  ? path.join(process.env.FLOWTURBO_ADDON_DIR, "simulated")
  : path.join(root, ".cache/simulated");

const control = path.join(simulatedFolder, "control.node");

/** Absent where no addons can be compiled; the tests that need it are skipped there. */
export const simulated = (existsSync(control) ? createRequire(import.meta.url)(control) : null) as Control;

/** What exists on the device: all zero when everything has been freed. */
export function leftOver(): Partial<Counts> {
  const { deviceBlocks, deviceBytes, hostBlocks, streams, events, graphs, contexts, runtimes, engines } =
    simulated.counts();
  const { executionContexts } = simulated.counts();
  const all = { deviceBlocks, deviceBytes, hostBlocks, streams, events, graphs, contexts, runtimes, engines };
  return Object.fromEntries(Object.entries({ ...all, executionContexts }).filter(([, count]) => count !== 0));
}

export function simulatedRuntime(
  kind: TensorRtKind,
  engines: EngineSource,
  options: Partial<TensorRtRuntimeOptions> = {},
): TensorRtRuntime {
  const folder = path.join(simulatedFolder, kind);
  return new TensorRtRuntime({
    ...{ kind, addon: loadAddon(kind), engines },
    library: path.join(folder, flavours[kind].library),
    parser: path.join(folder, flavours[kind].parser),
    ...options,
  });
}
