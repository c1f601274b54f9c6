/** The same checkpoint exported by torch.onnx, and driven by plain onnxruntime-node (onnxruntime.mjs). */

import { existsSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { root } from "../support.js";
import type { Contender, Place } from "./contender.js";
import { readFloats } from "./flowturbo.js";
import { open } from "./onnxruntime.mjs";
import { pythonWith, runScript } from "./python.js";

async function exported({ model, work }: Place): Promise<string> {
  const folder = path.join(work, "graphs");
  // The file that is written last.
  if (!existsSync(path.join(folder, "config.json"))) {
    console.log("exporting by torch.onnx");
    rmSync(folder, { recursive: true, force: true });
    await runScript(await pythonWith("torch"), "export.py", [model, folder]);
  }
  return folder;
}

export const graphs: Contender = {
  name: "onnxruntime-node, torch.onnx graphs",
  precision: "float32",
  async open(place) {
    const driver = await open(await exported(place));
    return {
      async draw({ noise, pixels, ...request }) {
        const starting = noise ? { noise: readFloats(noise) } : {};
        const { image, milliseconds, denoise } = await driver.generate({ ...request, ...starting });
        if (pixels)
          writeFileSync(
            pixels,
            image.map((value) => Math.min(1, Math.max(0, value / 2 + 0.5))),
          );
        return { milliseconds, denoise, evaluations: request.steps };
      },
      close: () => driver.release(),
    };
  },
  async process(place) {
    const folder = await exported(place);
    const driver = path.join(root, "bench/peers/onnxruntime.mjs");
    return { file: process.execPath, args: (request) => [driver, folder, JSON.stringify(request)] };
  },
};
