/** Finds out, inside the child process, whether a provider has a device, and what that computes in. */

import type * as ort from "onnxruntime-node";
import { type ElementType, GraphBuilder } from "../../onnx/index.js";
import type { DeviceFeatures, Provider } from "./protocol.js";
import { sessionOptions } from "./sessions.js";

/**
 * Runs a graph of a few nodes in each type.
 * @throws what ONNX Runtime throws where there is no device
 */
export async function probeDevice(library: typeof ort, provider: Provider): Promise<DeviceFeatures> {
  const doubled = async (type: ElementType) => {
    const g = new GraphBuilder("probe");
    const x = g.cast(g.input("x", "float32", [4]), type);
    g.output("y", g.cast(g.op("Add", [x, x]), "float32"), [4]);
    const options = sessionOptions({ root: "/", widening: "folded" }, { provider, threads: 1 });
    // The result is looked at.
    const session = await library.InferenceSession.create(g.build().bytes, {
      ...options,
      preferredOutputLocation: "cpu",
    });
    const { y } = await session.run({ x: new library.Tensor("float32", Float32Array.of(1, -2, 0.5, 1024), [4]) });
    await session.release();
    return y!.data.toString() === "2,-4,1,2048";
  };
  if (!(await doubled("float32"))) throw new Error("The device computes wrong results.");
  return { float16: await doubled("float16").catch(() => false) };
}
