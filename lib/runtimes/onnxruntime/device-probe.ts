/** Finds out, inside the child process, whether a provider has a device, and what that computes right. */

import type * as ort from "onnxruntime-node";
import { type ElementType, GraphBuilder, type Value } from "../../onnx/index.js";
import type { DeviceFeatures, Provider } from "./protocol.js";
import { sessionOptions } from "./sessions.js";

/**
 * Runs graphs of a few nodes and looks at their results.
 * @throws what ONNX Runtime throws where there is no device; Error for one that cannot even add
 */
export async function probeDevice(library: typeof ort, settings: ProbedSettings): Promise<DeviceFeatures> {
  const probe = new Probe(library, settings);
  if (!(await probe.adds("float32"))) throw new Error("The device computes wrong results.");
  const float16 = await probe.adds("float16").catch(() => false);
  return { float16, attention: await probe.attends().catch(() => false) };
}

export interface ProbedSettings {
  readonly provider: Exclude<Provider, "cpu">;
  readonly deviceId?: number | undefined;
}

class Probe {
  constructor(
    private readonly library: typeof ort,
    private readonly settings: ProbedSettings,
  ) {}

  async adds(type: ElementType): Promise<boolean> {
    const g = new GraphBuilder("probe");
    const x = g.cast(g.input("x", "float32", [4]), type);
    g.output("y", g.cast(g.op("Add", [x, x]), "float32"), [4]);
    const y = await this.#run(g, { x: [Float32Array.of(1, -2, 0.5, 1024), [4]] });
    return y.toString() === "2,-4,1,2048";
  }

  /**
   * ONNX Runtime's attention for WebGPU exchanges values within groups of invocations (subgroups), and takes for granted that
   * these are large: where they are of four, as SwiftShader's, 32 tokens and more come out wrong.
   */
  async attends(): Promise<boolean> {
    const [heads, size, tokens] = [2, 64, 77];
    const width = heads * size;
    const shape = [1, tokens, width];
    const g = new GraphBuilder("probe");
    const inputs = ["q", "k", "v"].map((name) => g.input(name, "float32", shape));
    const scale = size ** -0.5;
    const attention = (extra: readonly (Value | null)[], attributes: Record<string, number>) =>
      g.op("com.microsoft:MultiHeadAttention", [...inputs, ...extra], {
        ...{ num_heads: heads, scale: { float: scale } },
        ...attributes,
      });
    const bias = g.input("bias", "float32", [1, heads, tokens, tokens]);
    const both = g.concat([attention([null, null, bias], {}), attention([], { unidirectional: 1 })], 0);
    g.output("y", both, [2, tokens, width]);

    const [q, k, v] = [1, 2, 3].map((seed) => wave(tokens * width, seed)) as [Float32Array, Float32Array, Float32Array];
    const biases = wave(heads * tokens * tokens, 4);
    const y = await this.#run(g, {
      ...{ q: [q, shape], k: [k, shape], v: [v, shape] },
      bias: [biases, [1, heads, tokens, tokens]],
    });
    for (const causal of [false, true])
      for (let head = 0; head < heads; head++)
        for (let query = 0; query < tokens; query++) {
          const at = (token: number, channel: number) => token * width + head * size + channel;
          const weights = Array.from({ length: causal ? query + 1 : tokens }, (_, key) => {
            let score = 0;
            for (let channel = 0; channel < size; channel++) score += q[at(query, channel)]! * k[at(key, channel)]!;
            return Math.exp(score * scale + (causal ? 0 : biases[(head * tokens + query) * tokens + key]!));
          });
          const sum = weights.reduce((total, weight) => total + weight, 0);
          for (let channel = 0; channel < size; channel++) {
            const mixed = weights.reduce((total, weight, key) => total + weight * v[at(key, channel)]!, 0) / sum;
            const given = y[(causal ? tokens * width : 0) + at(query, channel)]!;
            // Of values up to 1; TF32 has a thousandth.
            if (!(Math.abs(given - mixed) < 5e-3)) return false;
          }
        }
    return true;
  }

  async #run(
    graph: GraphBuilder,
    inputs: Readonly<Record<string, readonly [Float32Array, readonly number[]]>>,
  ): Promise<Float32Array> {
    const options = sessionOptions({ root: "/", widening: "folded" }, { ...this.settings, threads: 1 });
    // The result is looked at here.
    const create = { ...options, preferredOutputLocation: "cpu" as const };
    const session = await this.library.InferenceSession.create(graph.build().bytes, create);
    try {
      const feeds = Object.entries(inputs).map(([name, [data, shape]]) => {
        return [name, new this.library.Tensor("float32", data, shape)];
      });
      return (await session.run(Object.fromEntries(feeds))).y!.data as Float32Array;
    } finally {
      await session.release();
    }
  }
}

/** Values between -1 and 1 without a short period. */
function wave(length: number, seed: number): Float32Array {
  return Float32Array.from({ length }, (_, index) => Math.sin(12.9898 * seed * index + seed));
}
