// A machine without a GPU, as this one is: every call into the runtime fails with one typed error that says what was
// looked for, soon, and holds nothing. (This file must not load the simulated device.)
import path from "node:path";
import { expect, it } from "vitest";
import { DisposedError, RuntimeUnavailableError } from "../../lib/errors.js";
import { flavours, tensorRtKinds } from "../../lib/runtimes/tensorrt/flavours.js";
import { TensorRtRuntime } from "../../lib/runtimes/tensorrt/runtime.js";
import { double } from "../runtimes/contract.js";
import { program, scaleGraph } from "../runtimes/models.js";
import { loadAddon } from "../support/addon.js";
import { cli, describeAddons, hasDriver, standIn, startNode } from "./support.js";

const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

describeAddons("without a GPU", () => {
  it.skipIf(hasDriver).each(tensorRtKinds)("every call of the runtime %s is refused by name", async (kind) => {
    // The library is there; the driver is not.
    const libraries = standIn(kind === "tensorrt" ? [11, 4, 0, 1] : [1, 7, 1, 116]);
    const open = () =>
      new TensorRtRuntime({
        ...{ kind, addon: loadAddon(kind) },
        library: path.join(libraries, flavours[kind].library),
        parser: path.join(libraries, flavours[kind].parser),
        engines: { engineFor: () => Promise.reject(new Error("nothing is compiled for a GPU that is not there")) },
      });
    const runtime = open();
    runtime.add(scaleGraph("double", 2));
    const work = program([1], [double("x", "a")], ["a"]);
    const start = performance.now();
    const parts = runtime.open();
    const calls = [() => runtime.start(), () => runtime.run(work), () => parts.submit(work), () => runtime.run(work)];
    for (const call of calls) {
      const error = await rejection(call());
      expect(error).toBeInstanceOf(RuntimeUnavailableError);
      expect(error).toMatchObject({ code: "ERR_FLOWTURBO_RUNTIME_UNAVAILABLE", runtime: kind });
      expect(error.message).toMatch(/libcuda\.so\.1/);
    }
    const both = await Promise.all([rejection(runtime.run(work)), rejection(runtime.run(work))]);
    for (const error of both) expect(error).toBeInstanceOf(RuntimeUnavailableError);
    parts.close();
    await runtime.unload(["double"]);
    expect(runtime.statistics()).toBe(null);
    await runtime.dispose();
    expect(await rejection(runtime.run(work))).toBeInstanceOf(DisposedError);
    expect(performance.now() - start).toBeLessThan(5000);

    // Again and again: nothing is kept.
    const descriptors = () => process.memoryUsage().rss;
    const before = descriptors();
    for (let index = 0; index < 300; index++) {
      const short = open();
      await rejection(short.start());
      await short.dispose();
    }
    expect(descriptors() - before).toBeLessThan(50e6);
  });

  it.skipIf(hasDriver).each(tensorRtKinds)("flowturbo generate --runtime %s says what was looked for", async (kind) => {
    const { code, stdout, stderr } = await startNode([cli, "generate", "a red circle", "--runtime", kind]).finished;
    expect(code).not.toBe(0);
    expect(stdout).toBe("");
    expect(stderr).toMatch(/libcuda\.so\.1/);
  });
});
