// Where a library that was opened by its path finds the library of its builder's kernels, on the simulated library.
import { copyFileSync, existsSync, mkdirSync } from "node:fs";
import path from "node:path";
import { expect, it } from "vitest";
import type { NativeError } from "../../lib/runtimes/tensorrt/addon.js";
import { flavours } from "../../lib/runtimes/tensorrt/flavours.js";
import { loadAddon } from "../support/addon.js";
import { simulatedFolder } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const { library, parser } = flavours.tensorrt;
const resource = "libnvinfer_builder_resource.so.11";

describeAddons("TensorRT, unpacked somewhere", () => {
  /** What the library logs when a builder is asked for. */
  const logOf = async (names: readonly string[]) => {
    // A relative path, and one with a space, are paths too.
    const folder = path.join(temporaryFolder(), "an archive");
    mkdirSync(folder);
    for (const name of names) copyFileSync(path.join(simulatedFolder, "tensorrt", name), path.join(folder, name));
    const plan = path.join(folder, "plan");
    const request = {
      ...{ onnx: new Uint8Array(1), files: [], initializers: [], profiles: [], targets: [], flags: [] },
      ...{ optimizationLevel: -1, workspaceBytes: 0, planPath: plan, logPath: "", timingsPath: "" },
    };
    const from = path.relative(process.cwd(), folder);
    const error: NativeError = await loadAddon("tensorrt")
      .build(path.join(from, library), path.join(from, parser), request, () => undefined)
      .promise.then(
        () => expect.fail("the simulated library builds nothing"),
        (reason) => reason,
      );
    expect(error.code).toBe("BUILD");
    expect(existsSync(plan)).toBe(false);
    return error.log.join("\n");
  };

  it("is told to look for the kernels of its builder beside it", async () => {
    expect(await logOf([library, parser, resource])).not.toMatch(/Unable to load library/);
  });

  it("says so where they are missing", async () => {
    expect(await logOf([library, parser])).toMatch(/Unable to load library: libnvinfer_builder_resource/);
  });
});
