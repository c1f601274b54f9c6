// Both decisions that ask for available memory (widening weights, building engines) respect the limit of the process's
// control group.
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { availableMemory } from "../../lib/common/memory.js";
import { MemoryError } from "../../lib/errors.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import { sessionOptions } from "../../lib/runtimes/onnxruntime/sessions.js";
import { resolveWeights } from "../../lib/runtimes/onnxruntime/weights.js";
import { BuildMemory } from "../../lib/runtimes/tensorrt/build-memory.js";
import { flavours } from "../../lib/runtimes/tensorrt/flavours.js";

process.env.ORT_DISABLE_TELEMETRY = "1";

afterEach(() => vi.unstubAllGlobals());

/** A process in a control group, as Node 20.13 and later say, or as earlier versions say. */
function limited(bytes: number, version: "new" | "old") {
  const known = { constrainedMemory: () => bytes, availableMemory: version === "new" ? () => bytes : undefined };
  vi.stubGlobal("process", Object.assign(Object.create(process), known));
}
const graph = (bytes: number) => {
  const weight = { name: "w", dtype: "F32", shape: [bytes / 4], file: "/w", offset: 0, length: bytes } as const;
  return { name: "graph", bytes: new Uint8Array(), externals: new Map([["w", weight]]), fingerprint: "" };
};
const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

describe("within a limit", () => {
  it.each(["new", "old"] as const)("of a control group (%s Node)", async (version) => {
    limited(1e6, version);
    expect(availableMemory()).toBe(1e6);
    expect(resolveWeights("auto", 1e6 / 6)).toBe("folded");
    expect(resolveWeights("auto", 1e6 / 6 + 1)).toBe("lazy");
    const memory = new BuildMemory(0.7e9);
    expect(memory.refusal(graph(4))).toBeInstanceOf(MemoryError);
    const error = await rejection(memory.enter(graph(4), undefined));
    expect(error).toBeInstanceOf(MemoryError);
    expect(error.available).toBe(1e6);
  });
});

describe("builds", () => {
  it("take what their library takes besides the weights", () => {
    const needed = ({ buildBaseBytes }: { readonly buildBaseBytes: number }) => buildBaseBytes + 3e8;
    for (const flavour of Object.values(flavours)) {
      const fits = new BuildMemory(flavour.buildBaseBytes, needed(flavour));
      expect(fits.refusal(graph(1e8))).toBeNull();
      expect(new BuildMemory(flavour.buildBaseBytes, needed(flavour) - 1).refusal(graph(1e8))).toMatchObject({
        needed: needed(flavour),
      });
    }
    // The full library has kernels for every GPU in memory.
    expect(flavours.tensorrt.buildBaseBytes).toBeGreaterThan(4 * flavours["tensorrt-rtx"].buildBaseBytes);
  });

  it("go on together while they fit, then one after another, and leave the queue after an abort", async () => {
    // Each takes 1 GB.
    const memory = new BuildMemory(0.7e9, 2.5e9);
    const build = graph(1e8);
    const first = await memory.enter(build, undefined);
    const second = await memory.enter(build, undefined);
    const controller = new AbortController();
    const third = rejection(memory.enter(build, controller.signal));
    let entered = false;
    const fourth = memory.enter(build, undefined).then((leave) => {
      entered = true;
      return leave;
    });
    controller.abort("enough");
    expect(await third).toBe("enough");
    expect(entered).toBe(false);
    first();
    (await fourth)();
    second();
  });

  it("that do not fit even alone are refused with both numbers, and others go on", async () => {
    const memory = new BuildMemory(0.7e9, 2.5e9);
    const leave = await memory.enter(graph(1e8), undefined);
    const large = rejection(memory.enter(graph(1e9), undefined));
    leave();
    const error = await large;
    expect(error).toBeInstanceOf(MemoryError);
    expect([error.needed, error.available]).toEqual([3.7e9, 2.5e9]);
    expect(error.message).toMatch(/takes about 3\.70 GB of memory, but 2\.50 GB are available/);
    (await memory.enter(graph(1e8), undefined))();
  });
});

it.runIf(process.platform === "linux")(
  "lazy weights are not widened as a session is made, folded ones are",
  async () => {
    const ort = await import("onnxruntime-node");
    const folder = await mkdtemp(join(tmpdir(), "flowturbo-lazy-"));
    try {
      const file = join(folder, "weights");
      const length = 2 ** 25;
      await writeFile(file, new Uint8Array(length));
      const grown = async (dtype: "F16" | "BF16" | "F8_E4M3", widening: "lazy" | "folded") => {
        const g = new GraphBuilder("widened");
        const shape = [length / (dtype === "F8_E4M3" ? 1 : 2) / 1024, 1024];
        const weight = g.cast(g.external({ name: "w", dtype, shape, file, offset: 0, length }), "float32");
        const x = g.input("x", "float32", ["rows", 1024]);
        g.output("y", g.op("Gemm", [x, weight], { transB: 1 }), ["rows", shape[0]!]);
        const anonymous = async () =>
          1024 * Number(/RssAnon:\s+(\d+)/.exec(await readFile("/proc/self/status", "utf8"))![1]);
        const before = await anonymous();
        const options = sessionOptions({ root: "/", widening }, { threads: 1 });
        const session = await ort.InferenceSession.create(g.build().bytes, options);
        const after = await anonymous();
        await session.release();
        return after - before;
      };
      for (const [dtype, times] of [
        ["F16", 2],
        ["BF16", 2],
        ["F8_E4M3", 4],
      ] as const) {
        expect(await grown(dtype, "lazy")).toBeLessThan(length / 2);
        expect(await grown(dtype, "folded")).toBeGreaterThan(0.75 * times * length);
      }
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  },
);
