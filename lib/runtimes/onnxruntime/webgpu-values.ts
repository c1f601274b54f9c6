/**
 * Values of programs that stay on a WebGPU device between launches. onnxruntime-node has GPU tensors as results and as
 * inputs of sessions, and nothing else: no upload, no download, no copy. So each of these is a session of its own with a
 * graph of a few nodes. A GPU tensor may be read with other dimensions than those that it was written with, which is how
 * one graph serves all shapes.
 */

import type * as ort from "onnxruntime-node";
import { type DType, elementCount, type Tensor } from "../../common/tensor.js";
import { GraphBuilder } from "../../onnx/index.js";
import type { Register } from "../../program/program.js";
import { sessionOptions } from "./sessions.js";
import { type CopiedRows, tensorOf, type Values, zeros } from "./values.js";

/**
 * Constants of up to this many bytes stay in the memory of the process, and go up with each launch that reads them: an
 * upload of its own costs more than they do.
 */
const smallBytes = 4096;

/** Values of a row, or more, that one group of invocations adds up. */
const longRow = 1024;

export class WebGpuValues implements Values {
  readonly #ort: typeof ort;
  readonly #sessions = new Map<string, Promise<ort.InferenceSession>>();

  constructor(library: typeof ort) {
    this.#ort = library;
  }

  async upload(tensor: Tensor): Promise<ort.Tensor> {
    const value = tensorOf(this.#ort, tensor);
    // Integers are ids and indices, which shape arithmetic on the CPU reads too.
    if (tensor.dtype !== "float32" || tensor.data.byteLength <= smallBytes) return value;
    const flat = tensorOf(this.#ort, { ...tensor, shape: [tensor.data.length] });
    const session = await this.#session("upload", "gpu-buffer", () => identityGraph("float32"));
    return this.#as((await session.run({ x: flat })).y!, tensor.shape);
  }

  async download(value: ort.Tensor): Promise<ort.Tensor["data"]> {
    if (value.location === "cpu") return value.data;
    const type = typeOf(value);
    const session = await this.#session(`download ${type}`, "cpu", () => identityGraph(type));
    return (await session.run({ x: this.#seenAs(value, [value.size]) })).y!.data;
  }

  async replaceRows(
    old: ort.Tensor | undefined,
    register: Register,
    copies: readonly CopiedRows[],
  ): Promise<ort.Tensor> {
    const { shape } = register;
    const row = elementCount(shape.slice(1));
    let base = old;
    const all = () => {
      base ??= tensorOf(this.#ort, zeros(register));
      return base;
    };
    // Each row's source, then runs of rows from one source.
    const sources: { value: ort.Tensor | null; row: number }[] = Array.from({ length: shape[0]! }, (_, index) => ({
      value: null,
      row: index,
    }));
    for (const { from, fromRow, toRow, rows } of copies)
      for (let index = 0; index < rows; index++) sources[toRow + index] = { value: from, row: fromRow + index };
    const parts: { value: ort.Tensor; start: number; end: number }[] = [];
    for (const { value, row: start } of sources) {
      const source = value ?? all();
      const last = parts.at(-1);
      if (last?.value === source && last.end === start) last.end++;
      else parts.push({ value: source, start, end: start + 1 });
    }
    const { dtype } = register;
    const graph = () => rowsGraph(parts.length, dtype);
    const session = await this.#session(`rows ${parts.length} ${dtype}`, "gpu-buffer", graph);
    const feeds: Record<string, ort.Tensor> = {};
    for (const [index, { value, start, end }] of parts.entries()) {
      feeds[`x${index}`] = this.#seenAs(value, [value.size / row, row]);
      feeds[`start${index}`] = new this.#ort.Tensor("int64", BigInt64Array.of(BigInt(start)), [1]);
      feeds[`end${index}`] = new this.#ort.Tensor("int64", BigInt64Array.of(BigInt(end)), [1]);
    }
    const replaced = this.#as((await session.run(feeds)).y!, shape);
    if (old) this.free(old);
    return replaced;
  }

  /**
   * The sum of the magnitudes is finite where all values are, but for values beyond 10^30, which are no result either. Its
   * download is what waits for the launch.
   */
  async isFinite(value: ort.Tensor): Promise<boolean> {
    // Rows first, so that the device adds several at a time: long ones, since each is a group of invocations of its own.
    let columns = 1;
    for (const size of value.dims.toReversed()) {
      if (columns >= longRow) break;
      columns *= size || 1;
    }
    const session = await this.#session("sum", "cpu", sumGraph);
    const { y } = await session.run({ x: this.#seenAs(value, [value.size / columns, columns]) });
    return Number.isFinite(Number(y!.data[0]));
  }

  async settle(value: ort.Tensor): Promise<void> {
    if (value.type === "float32") await this.isFinite(value);
  }

  free(value: ort.Tensor): void {
    if (value.location === "gpu-buffer") value.dispose();
  }

  /** The same memory with other dimensions, for a moment: its owner is `value`. */
  #seenAs(value: ort.Tensor, dims: readonly number[]): ort.Tensor {
    if (value.location === "cpu")
      return tensorOf(this.#ort, { dtype: typeOf(value), shape: dims, data: value.data } as Tensor);
    return this.#ort.Tensor.fromGpuBuffer(value.gpuBuffer, { dataType: typeOf(value), dims });
  }

  /** Takes the memory over under other dimensions. */
  #as(value: ort.Tensor, dims: readonly number[]): ort.Tensor {
    return this.#ort.Tensor.fromGpuBuffer(value.gpuBuffer, {
      dataType: typeOf(value),
      dims,
      dispose: () => value.dispose(),
    });
  }

  #session(key: string, output: "cpu" | "gpu-buffer", graph: () => Uint8Array): Promise<ort.InferenceSession> {
    const known = this.#sessions.get(key);
    if (known) return known;
    const options = sessionOptions({ root: "/", widening: "folded" }, { provider: "webgpu", threads: 1 });
    const session = this.#ort.InferenceSession.create(graph(), { ...options, preferredOutputLocation: output });
    this.#sessions.set(key, session);
    return session;
  }
}

/** Values of programs have no other types. */
function typeOf(value: ort.Tensor): DType {
  return value.type === "int64" ? "int64" : "float32";
}

/** Inputs: x [n]. Output: y [n], a copy. */
function identityGraph(type: DType): Uint8Array {
  const g = new GraphBuilder("copy");
  g.output("y", g.input("x", type, ["n"]), ["n"]);
  return g.build().bytes;
}

/** Inputs: x0 [n0, k], start0 [1], end0 [1] and so on. Output: those rows of each, one after the other. */
function rowsGraph(parts: number, type: DType): Uint8Array {
  const g = new GraphBuilder("rows");
  const slices = Array.from({ length: parts }, (_, index) =>
    g.op("Slice", [
      g.input(`x${index}`, type, [`n${index}`, "k"]),
      g.input(`start${index}`, "int64", [1]),
      g.input(`end${index}`, "int64", [1]),
      g.ints([0]),
    ]),
  );
  g.output("y", slices.length === 1 ? slices[0]! : g.concat(slices, 0), ["rows", "k"]);
  return g.build().bytes;
}

/** Inputs: x [n, k]. Output: y [1, 1], the sum of magnitudes. */
function sumGraph(): Uint8Array {
  const g = new GraphBuilder("sum");
  const x = g.input("x", "float32", ["n", "k"]);
  const sum = (value: typeof x, axis: number) => g.op("ReduceL1", [value, g.ints([axis])], { keepdims: 1 });
  g.output("y", sum(sum(x, 1), 0), [1, 1]);
  return g.build().bytes;
}
