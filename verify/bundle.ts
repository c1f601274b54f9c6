/**
 * Cases with their graphs, weights and reference results in one folder, for a machine that has a GPU but no network, no
 * checkpoint and no ONNX Runtime.
 *
 *   manifest.json     what is where: see `Manifest`; holds the SHA-256 of every other file
 *   graphs/*.onnx     as they are built for TensorRT
 *   weights.bin       the values of their initializers, each at a multiple of 64
 *   tensors.bin       inputs and expected results
 */

import { createHash, type Hash } from "node:crypto";
import { createReadStream } from "node:fs";
import { type FileHandle, mkdir, open, readFile, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { float32, int64, type StoredDType, type StoredTensor, type Tensor } from "../lib/common/tensor.js";
import type { Program } from "../lib/program/program.js";
import type { CompilableGraph } from "../lib/runtimes/runtime.js";
import type { Case } from "./cases.js";
import type { Compute } from "./check.js";

/** A case with what its results should be. */
export interface Referenced {
  readonly example: Case;
  readonly expected: Record<string, Tensor>;
}

export interface Bundle {
  /** Where everything comes from, for the report. */
  readonly origin: Origin;
  readonly graphs: ReadonlyMap<string, CompilableGraph>;
  readonly compute: (graph: string) => Compute;
  readonly cases: readonly Referenced[];
  /** Files of the weights as they are now. */
  readonly files: readonly { readonly file: string; readonly size: number; readonly mtimeMs: number }[];
}

export interface Origin {
  readonly checkpoint: string;
  readonly flowturbo: string;
  readonly reference: string;
  readonly created: string;
}

/** A range of tensors.bin. */
interface TensorEntry {
  readonly dtype: Tensor["dtype"];
  readonly shape: readonly number[];
  readonly offset: number;
}

interface Manifest {
  readonly format: 1;
  readonly origin: Origin;
  readonly graphs: readonly {
    readonly name: string;
    readonly file: string;
    readonly fingerprint: string;
    readonly compute: Compute;
    readonly externals: readonly {
      readonly initializer: string;
      readonly name: string;
      readonly dtype: StoredDType;
      readonly shape: readonly number[];
      readonly offset: number;
      readonly length: number;
    }[];
  }[];
  readonly cases: readonly {
    readonly name: string;
    readonly kind: Case["kind"];
    readonly program: Omit<Program, "constants">;
    readonly constants: Readonly<Record<string, TensorEntry>>;
    readonly expected: Readonly<Record<string, TensorEntry>>;
  }[];
  readonly sha256: Readonly<Record<string, string>>;
}

const alignment = 64;

/** Appends to a file and hashes what it appends. */
class Writer {
  offset = 0;
  readonly #hash: Hash = createHash("sha256");

  private constructor(readonly handle: FileHandle) {}

  static async create(file: string): Promise<Writer> {
    return new Writer(await open(file, "w"));
  }

  /** @returns where it begins */
  async append(bytes: Uint8Array): Promise<number> {
    const at = this.offset;
    const padded = Math.ceil(bytes.byteLength / alignment) * alignment - bytes.byteLength;
    for (const part of [bytes, new Uint8Array(padded)]) {
      this.#hash.update(part);
      for (let done = 0; done < part.byteLength; )
        done += (await this.handle.write(part, done, Math.min(part.byteLength - done, 2 ** 28))).bytesWritten;
      this.offset += part.byteLength;
    }
    return at;
  }

  async close(): Promise<string> {
    await this.handle.close();
    return this.#hash.digest("hex");
  }
}

/** @param folder made if need be; files of an earlier bundle are replaced */
export async function writeBundle(
  folder: string,
  origin: Origin,
  graphs: ReadonlyMap<string, CompilableGraph>,
  compute: (graph: string) => Compute,
  cases: readonly Referenced[],
): Promise<{ readonly bytes: number }> {
  await mkdir(path.join(folder, "graphs"), { recursive: true });
  const sha256: Record<string, string> = {};

  // 1. Graphs and weights; a tensor that several graphs read is there once.
  const weights = await Writer.create(path.join(folder, "weights.bin"));
  const places = new Map<string, Promise<number>>();
  const place = (tensor: StoredTensor) => {
    const key = `${tensor.file}:${tensor.offset}:${tensor.length}`;
    const known = places.get(key);
    if (known) return known;
    const written = read(tensor).then((bytes) => weights.append(bytes));
    places.set(key, written);
    return written;
  };
  const described: Manifest["graphs"][number][] = [];
  for (const graph of graphs.values()) {
    const file = `graphs/${graph.name}.onnx`;
    await writeFile(path.join(folder, file), graph.bytes);
    sha256[file] = createHash("sha256").update(graph.bytes).digest("hex");
    const externals: Manifest["graphs"][number]["externals"][number][] = [];
    for (const [initializer, tensor] of graph.externals) {
      const { name, dtype, shape, length } = tensor;
      externals.push({ initializer, name, dtype, shape, offset: await place(tensor), length });
    }
    described.push({ name: graph.name, file, fingerprint: graph.fingerprint, compute: compute(graph.name), externals });
  }
  sha256["weights.bin"] = await weights.close();

  // 2. Inputs and results.
  const tensors = await Writer.create(path.join(folder, "tensors.bin"));
  const keep = async ({ dtype, shape, data }: Tensor): Promise<TensorEntry> => {
    return {
      dtype,
      shape,
      offset: await tensors.append(new Uint8Array(data.buffer, data.byteOffset, data.byteLength)),
    };
  };
  const keepAll = async (all: Record<string, Tensor>) => {
    const entries: Record<string, TensorEntry> = {};
    for (const [name, tensor] of Object.entries(all)) entries[name] = await keep(tensor);
    return entries;
  };
  const written: Manifest["cases"][number][] = [];
  for (const { example, expected } of cases) {
    const { constants, ...program } = example.program;
    const values = Object.fromEntries(
      Object.entries(constants).map(([name, constant]) => {
        if (constant.kind !== "value") throw new RangeError(`The constant ${name} of ${example.name} is no value.`);
        return [name, constant.tensor];
      }),
    );
    const { name, kind } = example;
    written.push({ name, kind, program, constants: await keepAll(values), expected: await keepAll(expected) });
  }
  sha256["tensors.bin"] = await tensors.close();

  const manifest: Manifest = { format: 1, origin, graphs: described, cases: written, sha256 };
  await writeFile(path.join(folder, "manifest.json"), JSON.stringify(manifest));
  return { bytes: weights.offset + tensors.offset };
}

async function readManifest(folder: string): Promise<Manifest> {
  try {
    return JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8")) as Manifest;
  } catch (error) {
    throw new Error(`${folder} holds no bundle: ${(error as Error).message}`, { cause: error });
  }
}

/** @throws Error if a file is missing or not what the manifest says */
export async function readBundle(folder: string): Promise<Bundle> {
  const manifest = await readManifest(folder);
  if (manifest.format !== 1) throw new Error(`${folder} is a bundle of an unknown format (${manifest.format}).`);
  for (const [file, expected] of Object.entries(manifest.sha256)) {
    const hash = createHash("sha256");
    for await (const chunk of createReadStream(path.join(folder, file))) hash.update(chunk as Buffer);
    if (hash.digest("hex") !== expected) throw new Error(`${file} of the bundle ${folder} is damaged; copy it again.`);
  }

  const weights = path.resolve(folder, "weights.bin");
  const graphs = new Map<string, CompilableGraph>();
  const types = new Map<string, Compute>();
  for (const { name, file, fingerprint, compute, externals } of manifest.graphs) {
    types.set(name, compute);
    graphs.set(name, {
      ...{ name, fingerprint, bytes: await readFile(path.join(folder, file)) },
      externals: new Map(
        externals.map(({ initializer, ...tensor }) => [initializer, { ...tensor, file: weights }] as const),
      ),
    });
  }

  const handle = await open(path.join(folder, "tensors.bin"));
  const cases: Referenced[] = [];
  try {
    const load = async ({ dtype, shape, offset }: TensorEntry): Promise<Tensor> => {
      const count = shape.reduce((product, size) => product * size, 1);
      const data = dtype === "float32" ? new Float32Array(count) : new BigInt64Array(count);
      await fill(handle, new Uint8Array(data.buffer), offset);
      return data instanceof Float32Array ? float32(shape, data) : int64(shape, data);
    };
    for (const { name, kind, program, constants, expected } of manifest.cases) {
      const values: Program["constants"] = Object.fromEntries(
        await Promise.all(
          Object.entries(constants).map(
            async ([key, entry]) => [key, { kind: "value", tensor: await load(entry) }] as const,
          ),
        ),
      );
      const results: Record<string, Tensor> = {};
      for (const [key, entry] of Object.entries(expected)) results[key] = await load(entry);
      cases.push({ example: { name, kind, program: { ...program, constants: values } }, expected: results });
    }
  } finally {
    await handle.close();
  }
  const { size, mtimeMs } = await stat(weights);
  return {
    origin: manifest.origin,
    graphs,
    compute: (graph) => types.get(graph)!,
    cases,
    files: [{ file: weights, size, mtimeMs }],
  };
}

async function read({ file, offset, length }: StoredTensor): Promise<Uint8Array> {
  const handle = await open(file);
  try {
    const bytes = new Uint8Array(length);
    await fill(handle, bytes, offset);
    return bytes;
  } finally {
    await handle.close();
  }
}

async function fill(handle: FileHandle, bytes: Uint8Array, offset: number): Promise<void> {
  for (let done = 0; done < bytes.byteLength; ) {
    const { bytesRead } = await handle.read(bytes, done, Math.min(bytes.byteLength - done, 2 ** 28), offset + done);
    if (bytesRead === 0) throw new Error("a file ends before it should");
    done += bytesRead;
  }
}
