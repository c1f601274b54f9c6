/** Finds out, inside the child process, whether ONNX Runtime's products of 8-bit integers are exact on this processor. */

import type * as ort from "onnxruntime-node";
import { GraphBuilder } from "../../onnx/index.js";
import { sessionOptions } from "./sessions.js";

const product = "MatMulIntegerToFloat";

/** Whether a graph has products of 8-bit integers. */
export function hasInt8Products(graph: Uint8Array): boolean {
  return Buffer.from(graph.buffer, graph.byteOffset, graph.byteLength).includes(product);
}

/**
 * Whether sums of two products of unsigned by signed 8 bits overflow, as they do in 16 bits on x64 without VNNI. No list of
 * processors says so: kernels are chosen by features that only the library asks for.
 */
export async function int8ProductsOverflow(library: typeof ort): Promise<boolean> {
  const [rows, inner, outer] = [8, 64, 64];
  const g = new GraphBuilder("probe");
  const x = g.input("x", "uint8", [rows, inner]);
  const codes = g.tensor([inner, outer], new Array<number>(inner * outer).fill(127), "int8");
  const scales = [g.scalar(1, "float32"), g.scalar(1, "float32")];
  const y = g.op(`com.microsoft:${product}`, [x, codes, ...scales, g.scalar(0, "uint8"), g.scalar(0, "int8")]);
  g.output("y", { ...y, type: "float32" }, [rows, outer]);
  const options = sessionOptions({ root: "/", widening: "folded" }, { threads: 1 });
  const session = await library.InferenceSession.create(g.build().bytes, options);
  try {
    const largest = new Uint8Array(rows * inner).fill(255);
    const { y } = await session.run({ x: new library.Tensor("uint8", largest, [rows, inner]) });
    return (y!.data as Float32Array).some((value) => value !== inner * 255 * 127);
  } finally {
    await session.release();
  }
}
