// Products of 8-bit integers on this processor: exact, or known to overflow, and exact where weights are made unsigned.
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { GraphBuilder } from "../../lib/onnx/index.js";
import { hasInt8Products, int8ProductsOverflow } from "../../lib/runtimes/onnxruntime/int8-probe.js";
import { sessionOptions } from "../../lib/runtimes/onnxruntime/sessions.js";

process.env.ORT_DISABLE_TELEMETRY = "1";
const ort = await import("onnxruntime-node");

const [rows, inner, outer] = [37, 96, 40];
const codes = Int8Array.from({ length: inner * outer }, (_, i) => ((i * 7919) % 255) - 127);
/** The largest magnitudes of both signs, and others. */
const x = Uint8Array.from({ length: rows * inner }, (_, i) =>
  i < inner ? 255 : i < 2 * inner ? 0 : (i * 104729) % 256,
);

function graphOf(layers: number) {
  const g = new GraphBuilder("products");
  const input = g.input("x", "uint8", [rows, inner]);
  for (let layer = 0; layer < layers; layer++) {
    const scales = [g.scalar(1, "float32"), g.scalar(1, "float32")];
    const zeros = [g.scalar(128, "uint8"), g.tensor([], [0], "int8")];
    const values = layer === 0 ? codes : codes.map((code) => -code);
    const y = g.op("com.microsoft:MatMulIntegerToFloat", [
      input,
      g.tensor([inner, outer], values, "int8"),
      ...scales,
      ...zeros,
    ]);
    g.output(`y${layer}`, { ...y, type: "float32" }, [rows, outer]);
  }
  return g.build();
}

async function products(unsigned: boolean): Promise<Float32Array[]> {
  const options = sessionOptions({ root: "/", widening: "folded", unsigned }, { threads: 1 });
  const session = await ort.InferenceSession.create(graphOf(2).bytes, options);
  const results = await session.run({ x: new ort.Tensor("uint8", x, [rows, inner]) });
  await session.release();
  return [results.y0!.data, results.y1!.data] as Float32Array[];
}

function byHand(): Float32Array {
  const y = new Float32Array(rows * outer);
  for (let row = 0; row < rows; row++)
    for (let i = 0; i < inner; i++)
      for (let o = 0; o < outer; o++) y[row * outer + o]! += (x[row * inner + i]! - 128) * codes[i * outer + o]!;
  return y;
}

describe("products of 8-bit integers", () => {
  it("are exact as they are, or overflow and are exact with unsigned weights", async () => {
    const expected = byHand();
    const overflow = await int8ProductsOverflow(ort);
    for (const unsigned of overflow ? [true] : [false, true]) {
      const [first, second] = await products(unsigned);
      expect(first).toEqual(expected);
      expect(second).toEqual(expected.map((value) => 0 - value));
    }
    if (process.platform !== "linux" || process.arch !== "x64") return;
    const hasVnni = /\b(avx512_vnni|avx_vnni)\b/.test(readFileSync("/proc/cpuinfo", "utf8"));
    expect(overflow).toBe(!hasVnni);
  });

  it("are found in a graph by its bytes", () => {
    expect(hasInt8Products(graphOf(1).bytes)).toBe(true);
    const g = new GraphBuilder("none");
    g.output("y", g.op("Neg", [g.input("x", "float32", [1])]), [1]);
    expect(hasInt8Products(g.build().bytes)).toBe(false);
  });
});
