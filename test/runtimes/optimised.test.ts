// Optimised graphs on disk: results are the same with and without, and damage or a folder that cannot be written changes nothing.
import { mkdtemp, readdir, readFile, realpath, rm, stat, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import type * as ort from "onnxruntime-node";
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { versionOf } from "../../lib/common/files.js";
import { float32, type Tensor } from "../../lib/common/tensor.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { GraphBuilder, type OnnxGraph } from "../../lib/onnx/index.js";
import { HostConnection } from "../../lib/runtimes/onnxruntime/connection.js";
import { Executor } from "../../lib/runtimes/onnxruntime/executor.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { clearOptimised, limitOptimised, listOptimised } from "../../lib/runtimes/onnxruntime/optimised-folder.js";
import type { SentGraph } from "../../lib/runtimes/onnxruntime/protocol.js";
import { onnxruntime } from "../../lib/runtimes/onnxruntime/row.js";
import { fixture } from "../support/fixtures.js";
import { type Bundles, bundle } from "./build.js";

process.env.ORT_DISABLE_TELEMETRY = "1";
const library = await import("onnxruntime-node");
const { InferenceSession } = library;

let bundles: Bundles;
let graph: OnnxGraph;
let root: string;
let folder: string;
let factor: number;

beforeAll(async () => {
  bundles = await bundle();
  root = await realpath(await mkdtemp(path.join(tmpdir(), "flowturbo-optimised-")));
  const checkpoint = await openCheckpoint(fixture("sd3", "model"));
  graph = new GraphLibrary(checkpoint).get("vae_decoder");
  factor = checkpoint.vae.config.factor;
});
afterAll(async () => {
  bundles.remove();
  await rm(root, { recursive: true });
});
beforeEach(async () => {
  folder = await mkdtemp(path.join(root, "graphs-"));
});

async function decoded(
  options: { weights?: "lazy" | "folded"; foldsOnlyWhatPays?: boolean; optimised?: string },
  expected?: number,
): Promise<Tensor> {
  const [, channels] = graph.inputs.get("latents")! as unknown as [string, number];
  const input = float32(
    [1, channels, 8, 8],
    Float32Array.from({ length: 64 * channels }, (_, i) => Math.sin(i)),
  );
  await using runtime = new OnnxRuntime({ host: bundles.host, weights: "lazy", ...options });
  if (expected !== undefined) runtime.expect((name) => (name === graph.name ? expected : 0));
  runtime.add(graph);
  const [[output]] = [...graph.outputs] as [[string, unknown]];
  const { pixels } = await runtime.run({
    constants: { latents: { kind: "value", tensor: input } },
    registers: { pixels: { dtype: "float32", shape: [1, 3, 8 * factor, 8 * factor] } },
    instructions: [
      {
        ...{ op: "launch", graph: graph.name, label: { kind: "decode", name: "decoder" } },
        ...{ inputs: { latents: "latents" }, outputs: { [output]: "pixels" } },
      },
    ],
    results: ["pixels"],
  });
  return pixels!;
}

describe("optimised graphs", () => {
  it("are written once, and give the same bits", async () => {
    const plain = await decoded({});
    const first = await decoded({ optimised: folder });
    const [file] = await readdir(folder);
    expect(file).toMatch(/^[0-9a-f]{32}\.onnx$/);
    const { ino } = await stat(path.join(folder, file!));
    const second = await decoded({ optimised: folder });
    expect(first).toEqual(plain);
    expect(second).toEqual(plain);
    expect(await readdir(folder)).toEqual([file]);
    expect((await stat(path.join(folder, file!))).ino).toBe(ino);
    // It refers to the checkpoint's weights.
    const weights = [...graph.externals.values()].reduce((sum, { length }) => sum + length, 0);
    expect((await stat(path.join(folder, file!))).size).toBeLessThan(weights + graph.bytes.length);
  });

  it.each([
    ["nothing", Buffer.alloc(0)],
    ["something else", Buffer.alloc(1000, 7)],
  ])("are made again where a file holds %s", async (_, damaged) => {
    const plain = await decoded({ optimised: folder });
    const [name] = await readdir(folder);
    const file = path.join(folder, name!);
    const right = await readFile(file);
    await writeFile(file, damaged);
    expect(await decoded({ optimised: folder })).toEqual(plain);
    expect((await readFile(file)).length).toBe(right.length);
  });

  it("are left out where their folder cannot be made", async () => {
    const file = path.join(folder, "file");
    await writeFile(file, "");
    expect(await decoded({ optimised: path.join(file, "graphs") })).toEqual(await decoded({}));
  });

  it("are of lazy weights only; a graph that is launched a few times leaves weights lazy", async () => {
    const folded = { weights: "folded", foldsOnlyWhatPays: true, optimised: folder } as const;
    const many = await decoded(folded, 1e6);
    expect(await readdir(folder)).toEqual([]);
    const few = await decoded(folded, 12);
    expect(await readdir(folder)).toHaveLength(1);
    expect(few).toEqual(await decoded({}));
    expect(many).toEqual(await decoded({ weights: "folded" }));
  });
});

describe("graphs with weights of 8 bits", () => {
  it.each([
    ["are kept", false, 1],
    ["are not where weights are made unsigned, which would be in the file", true, 0],
  ])("%s", async (_, overflows, files) => {
    // A processor that answers the probe so.
    const answer = { data: Float32Array.of(overflows ? 0 : 64 * 255 * 127) };
    const probe = { run: async () => ({ y: answer }), release: async () => {} };
    const create = async (bytes: Uint8Array, options: ort.InferenceSession.SessionOptions) =>
      Buffer.from(bytes).includes("probe") ? probe : InferenceSession.create(bytes, options);
    const answering = { ...library, InferenceSession: { create } } as unknown as typeof ort;
    const executor = new Executor(answering, { weights: "lazy", threads: 1, optimised: folder });
    const g = new GraphBuilder("products");
    const codes = g.tensor([64, 64], new Array<number>(4096).fill(127), "int8");
    const scales = [g.scalar(1, "float32"), g.scalar(1, "float32"), g.scalar(128, "uint8"), g.tensor([], [0], "int8")];
    const y = g.op("com.microsoft:MatMulIntegerToFloat", [g.input("x", "uint8", [8, 64]), codes, ...scales]);
    g.output("y", { ...y, type: "float32" }, [8, 64]);
    executor.add({ digest: "products", bytes: g.build().bytes, root: "/", widening: "lazy", mayBeKept: true });
    await executor.prepare("products");
    expect(await readdir(folder)).toHaveLength(files);
    await executor.unload(["products"]);
  });
});

describe("an optimised graph of a convolution in float32, whose weights ONNX Runtime reorders", () => {
  let file: string;
  beforeEach(() => {
    file = path.join(folder, "weights");
  });

  /** The sum of the weights of an output channel of a convolution of all of them with ones. */
  async function convolved(channels: number, value: number): Promise<number> {
    const values = new Float32Array(channels * channels).fill(value);
    await writeFile(file, values);
    const g = new GraphBuilder("convolution");
    const x = g.input("x", "float32", [1, channels, 4, 4]);
    const shape = [channels, channels, 1, 1];
    const weight = g.external({ name: "weight", dtype: "F32", shape, file, offset: 0, length: values.byteLength });
    g.output("y", g.op("Conv", [x, weight]), [1, channels, 4, 4]);
    const files = [await versionOf(file)];
    const optimised = path.join(folder, "graphs");
    await using runtime = new OnnxRuntime({ host: bundles.host, weights: "lazy", files, optimised });
    runtime.add(g.build());
    const ones = float32([1, channels, 4, 4], new Float32Array(channels * 16).fill(1));
    const { y } = await runtime.run({
      constants: { x: { kind: "value", tensor: ones } },
      registers: { y: { dtype: "float32", shape: [1, channels, 4, 4] } },
      instructions: [
        {
          ...{ op: "launch", graph: "convolution", label: { kind: "decode", name: "decoder" } },
          ...{ inputs: { x: "x" }, outputs: { y: "y" } },
        },
      ],
      results: ["y"],
    });
    return y!.data[0] as number;
  }
  const kept = () => readdir(path.join(folder, "graphs")).catch(() => []);

  it("is another one when the file of the weights has changed", async () => {
    expect(await convolved(32, 1)).toBe(32);
    await utimes(file, 1, 1);
    expect(await convolved(32, 2)).toBe(64);
    expect(await kept()).toHaveLength(2);
  });

  it("is not kept where they are large", async () => {
    expect(await convolved(2048, 1)).toBe(2048);
    expect(await kept()).toEqual([]);
  });
});

it("the runtime for the CPU tells optimised graphs of other versions of the weights apart", async () => {
  const added: unknown[] = [];
  for (const mtimeMs of [1, 2]) {
    const files = [...new Set([...graph.externals.values()].map(({ file }) => file))];
    const versions = files.map((file) => ({ file, size: 1, mtimeMs }));
    const settings = { weights: "lazy", capture: false, cache: folder } as const;
    const { runtime } = await onnxruntime.open(settings, { files: versions, bytesOf16Bit: () => 0 });
    const prepared = vi.spyOn(HostConnection.prototype, "prepare");
    runtime.add(graph);
    runtime.prepare!([graph.name]);
    const [[, graphs]] = prepared.mock.calls as [[object, SentGraph[]]];
    added.push(graphs[0]!.digest);
    prepared.mockRestore();
    await runtime.dispose();
  }
  expect(new Set(added).size).toBe(2);
});

describe("the folder of optimised graphs", () => {
  const name = (digit: number) => `${String(digit).repeat(32)}.onnx`;

  it("loses those that have not been used for longest", async () => {
    for (const digit of [1, 2, 3]) {
      await writeFile(path.join(folder, name(digit)), Buffer.alloc(100));
      await utimes(path.join(folder, name(digit)), 1000 * digit, 1000 * digit);
    }
    await limitOptimised(folder, 200);
    expect((await readdir(folder)).sort()).toEqual([name(2), name(3)]);
  });

  it("is cleared of them and of what was left half written, and of nothing else", async () => {
    for (const file of [name(1), `${name(2)}.abc.tmp`, "other.onnx"]) await writeFile(path.join(folder, file), "1234");
    expect((await listOptimised(folder)).map(({ bytes }) => bytes)).toEqual([4, 4]);
    expect(await clearOptimised(folder)).toEqual({ files: 2, bytes: 8 });
    expect(await readdir(folder)).toEqual(["other.onnx"]);
    expect(await clearOptimised(path.join(folder, "none"))).toEqual({ files: 0, bytes: 0 });
  });
});
