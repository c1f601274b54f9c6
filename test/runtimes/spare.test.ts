// A child process that is started ahead: who takes it, and that it ends where nobody does.
import { setTimeout } from "node:timers/promises";
import { afterEach, describe, expect, it, vi } from "vitest";
import { CheckpointError } from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/flowturbo.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { hostLaunch } from "../../lib/runtimes/onnxruntime/process.js";
import { endSpare, packagedHost, startSpare, takeSpare } from "../../lib/runtimes/onnxruntime/spare.js";
import { hosts } from "../support/hosts.js";
import { addGraphs, double, values } from "./contract.js";
import { program } from "./models.js";

const usual = () => hostLaunch(packagedHost(), undefined, {});

afterEach(() => {
  vi.unstubAllEnvs();
  endSpare();
});

describe("a spare process", () => {
  it("is taken by the next runtime, with the settings of that one", async () => {
    const before = hosts();
    startSpare();
    startSpare();
    const [spare, ...others] = hosts().filter((pid) => !before.includes(pid));
    expect(others).toEqual([]);
    await using runtime = new OnnxRuntime({ weights: "folded", threads: 1 });
    addGraphs(runtime);
    expect(values((await runtime.run(program([1, 2], [double("x", "a")], ["a"]))).a)).toEqual([2, 4]);
    expect(hosts().filter((pid) => !before.includes(pid))).toEqual([spare]);
    expect(takeSpare(usual())).toBeNull();
  });

  it("is left where it was started otherwise", () => {
    startSpare();
    expect(takeSpare(hostLaunch(packagedHost(), "/libraries", {}))).toBeNull();
    expect(takeSpare(hostLaunch(packagedHost(), undefined, { CUDA_VISIBLE_DEVICES: "1" }))).toBeNull();
    vi.stubEnv("ORT_DISABLE_TELEMETRY", "0");
    expect(takeSpare(usual())).toBeNull();
    vi.unstubAllEnvs();
    const taken = takeSpare(usual());
    expect(taken).not.toBeNull();
    return taken!.kill();
  });

  it("is not there any more once it has ended", async () => {
    const before = hosts();
    startSpare();
    const [spare] = hosts().filter((pid) => !before.includes(pid));
    process.kill(spare!, "SIGKILL");
    await vi.waitFor(() => expect(hosts()).not.toContain(spare), 10_000);
    await setTimeout(300);
    expect(takeSpare(usual())).toBeNull();
  });

  it("of a load that fails ends", async () => {
    const before = hosts();
    await expect(FlowTurbo.load("./nothing")).rejects.toThrow(CheckpointError);
    await vi.waitFor(() => expect(hosts().filter((pid) => !before.includes(pid))).toEqual([]), 10_000);
  });
});
