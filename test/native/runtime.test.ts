// The runtimes tensorrt and tensorrt-rtx on the simulated device: what every runtime must do, and what only these can do
// wrong.
import { afterEach, describe, expect, vi } from "vitest";
import { addGraphs, describeRuntime } from "../runtimes/contract.js";
import { describeWorkspaces } from "../runtimes/workspaces.js";
import { leftOver, SimulatedEngines, simulated, simulatedRuntime } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const folder = temporaryFolder();
const opened: { dispose(): Promise<void> }[] = [];
afterEach(async () => {
  await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
  expect(simulated.violation()).toBe("");
  await vi.waitFor(() => expect(leftOver()).toEqual({}));
});

describeAddons("on the simulated device", () => {
  describe.each(["tensorrt", "tensorrt-rtx"] as const)("%s", (kind) => {
    const open = () => {
      const runtime = simulatedRuntime(kind, new SimulatedEngines(folder));
      addGraphs(runtime);
      opened.push(runtime);
      return runtime;
    };
    describeRuntime(open);
    describeWorkspaces(open);
  });
});
