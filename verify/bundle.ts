/**
 * Cases with their graphs, checkpoint and reference results in one folder, for a machine that has a GPU but no network, no
 * checkpoint and no ONNX Runtime.
 *
 *   manifest.json     what is where: see `Manifest`; holds the SHA-256 of every other file
 *   graphs/*.onnx     as they are built for TensorRT
 *   model/            the checkpoint, without files of weights that no graph reads
 *   tensors.bin       inputs and expected results
 *
 * A bundle that stays on this machine has no copy of the checkpoint and names its folder.
 */

import { createHash, type Hash } from "node:crypto";
import { createReadStream } from "node:fs";
import {
  copyFile,
  type FileHandle,
  mkdir,
  open,
  readdir,
  readFile,
  realpath,
  rm,
  stat,
  writeFile,
} from "node:fs/promises";
import path from "node:path";
import type { FileVersion } from "../lib/common/files.js";
import { float32, int64, type StoredDType, type Tensor } from "../lib/common/tensor.js";
import { OptionError } from "../lib/errors.js";
import type { Program } from "../lib/program/program.js";
import type { CompilableGraph } from "../lib/runtimes/runtime.js";
import type { Case } from "./cases.js";
import type { Compute } from "./check.js";
import type { PictureRequest } from "./pictures.js";

/** A case with what its results should be. */
export interface Referenced {
  readonly example: Case;
  readonly expected: Record<string, Tensor>;
}

/** A request of the product with the picture that it should draw. */
export interface ReferencedPicture {
  readonly request: PictureRequest;
  readonly expected: Record<string, Tensor>;
}

export interface Pictures {
  readonly requests: readonly ReferencedPicture[];
  /** Numbers of pictures that launches may have. */
  readonly batches: readonly number[];
}

export interface Bundle {
  /** Where everything comes from, for the report. */
  readonly origin: Origin;
  readonly graphs: ReadonlyMap<string, CompilableGraph>;
  readonly compute: (graph: string) => Compute;
  readonly cases: readonly Referenced[];
  /** Files of the weights as they are now. */
  readonly files: readonly FileVersion[];
  /** Null for graphs of no checkpoint, which draw no pictures. */
  readonly pictures: Pictures | null;
  /** Folder of the checkpoint; null where there is none. */
  readonly model: string | null;
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
  readonly format: 2;
  readonly origin: Origin;
  /** Folder of the checkpoint: in the bundle, or an absolute path on the machine that wrote it. */
  readonly model: string | null;
  /** Files of weights that graphs read, in that folder. */
  readonly files: readonly string[];
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
      /** Index into `files`. */
      readonly file: number;
      readonly offset: number;
      readonly length: number;
    }[];
  }[];
  readonly cases: readonly {
    readonly name: string;
    readonly kind: Case["kind"];
    readonly quick: boolean;
    readonly program: Omit<Program, "constants">;
    readonly constants: Readonly<Record<string, TensorEntry>>;
    readonly expected: Readonly<Record<string, TensorEntry>>;
  }[];
  readonly pictures: {
    readonly requests: readonly {
      readonly request: PictureRequest;
      readonly expected: Readonly<Record<string, TensorEntry>>;
    }[];
    readonly batches: readonly number[];
  } | null;
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

/** What a bundle is written from. */
export interface Contents extends Omit<Bundle, "files"> {
  /** Whether it is for another machine: with a copy of the checkpoint. */
  readonly copy: boolean;
}

/**
 * Removes an earlier bundle, so that nothing of its checkpoint is taken for part of the next one.
 * @throws OptionError for a folder that holds something else
 */
export async function clearBundle(folder: string): Promise<void> {
  const entries = await readdir(folder).catch((): string[] => []);
  if (entries.length === 0) return;
  if (!entries.includes("manifest.json") || !entries.includes("tensors.bin"))
    throw new OptionError("bundle", `${folder} is not empty and holds no bundle. Name a folder that is empty or new.`);
  for (const part of ["graphs", "model", "tensors.bin", "weights.bin", "manifest.json"])
    await rm(path.join(folder, part), { recursive: true, force: true });
}

/** @param folder made if need be; empty */
export async function writeBundle(folder: string, contents: Contents): Promise<{ readonly bytes: number }> {
  const { origin, graphs, compute, cases, pictures, copy } = contents;
  await mkdir(path.join(folder, "graphs"), { recursive: true });
  const sha256: Record<string, string> = {};
  let bytes = 0;

  // 1. The checkpoint. Its weights may be links, as in a Hugging Face cache: the graphs know where those lead.
  const weights = new Set(
    [...graphs.values()].flatMap(({ externals }) => [...externals.values()].map(({ file }) => file)),
  );
  const found = contents.model === null ? [] : await filesOf(contents.model, weights);
  const places = new Map(found.map(({ name, real }) => [real, name]));
  const model = contents.model === null ? null : copy ? "model" : path.resolve(contents.model);
  if (copy)
    for (const { name, real } of found) {
      const to = path.join(folder, "model", name);
      await mkdir(path.dirname(to), { recursive: true });
      await copyFile(real, to);
      sha256[`model/${name}`] = await digest(to);
      bytes += (await stat(to)).size;
    }
  const files = [...weights].map((file) => {
    const name = places.get(file);
    if (name === undefined) throw new RangeError(`${file} is not in the checkpoint ${contents.model}.`);
    return name;
  });

  // 2. The graphs.
  const described: Manifest["graphs"][number][] = [];
  for (const graph of graphs.values()) {
    const file = `graphs/${graph.name}.onnx`;
    await writeFile(path.join(folder, file), graph.bytes);
    sha256[file] = createHash("sha256").update(graph.bytes).digest("hex");
    const externals = [...graph.externals].map(([initializer, { name, dtype, shape, offset, length, file }]) => {
      return { initializer, name, dtype, shape, file: files.indexOf(places.get(file)!), offset, length };
    });
    described.push({ name: graph.name, file, fingerprint: graph.fingerprint, compute: compute(graph.name), externals });
  }

  // 3. Inputs and results.
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
    const { name, kind, quick } = example;
    written.push({ name, kind, quick, program, constants: await keepAll(values), expected: await keepAll(expected) });
  }
  const drawn: NonNullable<Manifest["pictures"]>["requests"][number][] = [];
  for (const { request, expected } of pictures?.requests ?? [])
    drawn.push({ request, expected: await keepAll(expected) });
  sha256["tensors.bin"] = await tensors.close();

  const manifest: Manifest = {
    ...{ format: 2, origin, model, files, graphs: described, cases: written, sha256 },
    pictures: pictures && { ...pictures, requests: drawn },
  };
  await writeFile(path.join(folder, "manifest.json"), JSON.stringify(manifest));
  return { bytes: bytes + tensors.offset };
}

/** What else weights are stored in, besides what the graphs read: other variants and other formats. */
const otherWeights = /\.(safetensors|bin|ckpt|pt|pth|msgpack|h5|onnx|onnx_data|gguf)$/;

/** Files of a checkpoint by their names in it, and where their contents are. */
async function filesOf(
  folder: string,
  weights: ReadonlySet<string>,
): Promise<{ readonly name: string; readonly real: string }[]> {
  const files: { readonly name: string; readonly real: string }[] = [];
  const look = async (inside: string): Promise<void> => {
    for (const entry of (await readdir(path.join(folder, inside))).sort()) {
      const name = path.join(inside, entry);
      const real = await realpath(path.join(folder, name));
      if ((await stat(real)).isDirectory()) {
        if (!entry.startsWith(".")) await look(name);
      } else if (weights.has(real) || !otherWeights.test(entry)) files.push({ name, real });
    }
  };
  await look("");
  return files;
}

async function digest(file: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(file)) hash.update(chunk as Buffer);
  return hash.digest("hex");
}

async function readManifest(folder: string): Promise<Manifest> {
  try {
    return JSON.parse(await readFile(path.join(folder, "manifest.json"), "utf8")) as Manifest;
  } catch (error) {
    throw new Error(`${folder} holds no bundle: ${(error as Error).message}`, { cause: error });
  }
}

/** Where a bundle comes from. @throws Error if it is none */
export async function readOrigin(folder: string): Promise<Origin> {
  return (await readManifest(folder)).origin;
}

/**
 * @param verify whether every file is compared with its SHA-256
 * @throws Error if a file is missing or not what the manifest says
 */
export async function readBundle(folder: string, verify = true): Promise<Bundle> {
  const manifest = await readManifest(folder);
  if (manifest.format !== 2)
    throw new Error(`${folder} is a bundle of another format (${manifest.format}); write it again with --bundle.`);
  for (const [file, expected] of verify ? Object.entries(manifest.sha256) : [])
    if ((await digest(path.join(folder, file)).catch(() => "")) !== expected)
      throw new Error(`${file} of the bundle ${folder} is damaged; copy it again.`);

  const model = manifest.model === null ? null : path.resolve(folder, manifest.model);
  const weights = await Promise.all(manifest.files.map((file) => realpath(path.join(model!, file))));
  const graphs = new Map<string, CompilableGraph>();
  const types = new Map<string, Compute>();
  for (const { name, file, fingerprint, compute, externals } of manifest.graphs) {
    types.set(name, compute);
    graphs.set(name, {
      ...{ name, fingerprint, bytes: await readFile(path.join(folder, file)) },
      externals: new Map(
        externals.map(
          ({ initializer, file, ...tensor }) => [initializer, { ...tensor, file: weights[file]! }] as const,
        ),
      ),
    });
  }

  const handle = await open(path.join(folder, "tensors.bin"));
  const cases: Referenced[] = [];
  const requests: ReferencedPicture[] = [];
  try {
    const load = async ({ dtype, shape, offset }: TensorEntry): Promise<Tensor> => {
      const count = shape.reduce((product, size) => product * size, 1);
      const data = dtype === "float32" ? new Float32Array(count) : new BigInt64Array(count);
      await fill(handle, new Uint8Array(data.buffer), offset);
      return data instanceof Float32Array ? float32(shape, data) : int64(shape, data);
    };
    const loadAll = async (entries: Readonly<Record<string, TensorEntry>>) => {
      const results: Record<string, Tensor> = {};
      for (const [key, entry] of Object.entries(entries)) results[key] = await load(entry);
      return results;
    };
    for (const { name, kind, quick, program, constants, expected } of manifest.cases) {
      const values: Program["constants"] = Object.fromEntries(
        await Promise.all(
          Object.entries(constants).map(
            async ([key, entry]) => [key, { kind: "value", tensor: await load(entry) }] as const,
          ),
        ),
      );
      const example = { name, kind, quick, program: { ...program, constants: values } };
      cases.push({ example, expected: await loadAll(expected) });
    }
    for (const { request, expected } of manifest.pictures?.requests ?? [])
      requests.push({ request, expected: await loadAll(expected) });
  } finally {
    await handle.close();
  }
  return {
    ...{ origin: manifest.origin, graphs, cases, model },
    compute: (graph) => types.get(graph)!,
    files: await Promise.all(weights.map(versionOf)),
    pictures: manifest.pictures && { ...manifest.pictures, requests },
  };
}

async function versionOf(file: string): Promise<FileVersion> {
  const { size, mtimeMs } = await stat(file);
  return { file, size, mtimeMs };
}

async function fill(handle: FileHandle, bytes: Uint8Array, offset: number): Promise<void> {
  for (let done = 0; done < bytes.byteLength; ) {
    const { bytesRead } = await handle.read(bytes, done, Math.min(bytes.byteLength - done, 2 ** 28), offset + done);
    if (bytesRead === 0) throw new Error("a file ends before it should");
    done += bytesRead;
  }
}
