/**
 * The .safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes. Weights are never read
 * here: a checkpoint needs only the header, which says where in the file each tensor lies, and whoever computes reads
 * the bytes from there. The header is checked as strictly as the reference implementation does (no holes, no overlaps,
 * sizes that add up), because a runtime that maps the file reads at these offsets. Small tensors that are values rather
 * than weights (`--noise`, `--save-latents`) are read and written here.
 */

import { type FileHandle, open } from "node:fs/promises";
import { writeFileAtomic } from "../common/files.js";
import { bytesPerElement, elementCount, type FloatTensor, float32, type StoredDType } from "../common/tensor.js";
import { widen } from "../common/widen.js";
import { CheckpointError, OutputError } from "../errors.js";
import { isRecord, type JsonObject, toRead } from "./files.js";

/** One tensor of a header. `offset` counts from the start of the file, `length` is in bytes. */
export interface HeaderEntry {
  readonly name: string;
  /** As the file spells it; not necessarily one that this package computes with (see {@link supportedDType}). */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly offset: number;
  readonly length: number;
  /** How it is quantised, where the file's metadata says it of its layer, as ComfyUI writes them: format and parameters. */
  readonly quantisation?: JsonObject | undefined;
}

export type SafetensorsHeader = ReadonlyMap<string, HeaderEntry>;

/** The limit of the reference implementation: a longer header is taken for damage, not for a model. */
const maxHeaderBytes = 100_000_000;

/** Dtypes by size, for checking a header. One that is not here cannot be checked, and is refused only where it is used. */
const dtypesBySize = {
  1: ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"],
  2: ["U16", "I16", "F16", "BF16"],
  4: ["U32", "I32", "F32"],
  8: ["U64", "I64", "F64", "C64"],
};
const knownBytes = new Map(
  Object.entries(dtypesBySize).flatMap(([bytes, dtypes]) => dtypes.map((dtype) => [dtype, Number(bytes)] as const)),
);

const downloadAgain = "The download may be incomplete: download the file again.";

/**
 * Reads and validates the header of a .safetensors file; the tensors themselves are not read.
 *
 * @returns the tensors by name, in the order of the header.
 * @throws CheckpointError that names the file, and the tensor where one is wrong. `signal.reason` after an abort.
 */
export async function readSafetensorsHeader(
  file: string,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<SafetensorsHeader> {
  return (await readDescribedHeader(file, options)).header;
}

/** The same, with what the file says of itself (`__metadata__`): texts by name. */
export async function readDescribedHeader(
  file: string,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<{ readonly header: SafetensorsHeader; readonly metadata: Readonly<Record<string, string>> }> {
  options.signal?.throwIfAborted();
  return withFile(file, async (handle) => {
    const stat = await handle.stat();
    if (!stat.isFile()) throw fault(file, `is not a file; expected a .safetensors file.`);
    const { text, dataStart } = await readHeaderText(file, handle, stat.size);
    options.signal?.throwIfAborted();
    return parseHeader(file, text, dataStart, stat.size);
  });
}

/**
 * The dtype of an entry as one that this package computes with.
 *
 * @throws CheckpointError that names file and tensor if it is another.
 */
export function supportedDType(file: string, entry: HeaderEntry): StoredDType {
  if (Object.hasOwn(bytesPerElement, entry.dtype)) return entry.dtype as StoredDType;
  throw new CheckpointError(
    file,
    `${file}: the tensor "${entry.name}" has dtype ${entry.dtype}; supported are ` +
      `${Object.keys(bytesPerElement).join(", ")}. Convert the file to one of these.`,
  );
}

/**
 * Reads one tensor into memory, widened to float32 and without a scale. For values such as starting noise, never for weights.
 *
 * @throws CheckpointError if its dtype is not supported, or the file has become shorter than its header says.
 */
export async function readTensor(file: string, entry: HeaderEntry): Promise<FloatTensor> {
  const dtype = supportedDType(file, entry);
  const bytes = await readBytes(file, entry.offset, entry.length);
  if (bytes.length < entry.length) throw fault(file, `ends inside the tensor "${entry.name}". ${downloadAgain}`);
  const data = new Float32Array(elementCount(entry.shape));
  widen(bytes, dtype, data);
  return float32(entry.shape, data);
}

/**
 * At most `length` bytes from `position`; fewer only at the end of the file.
 *
 * @throws CheckpointError if the file cannot be read.
 */
export function readBytes(file: string, position: number, length: number): Promise<Buffer> {
  return withFile(file, (handle) => readExactly(handle, position, length));
}

/**
 * Writes float32 tensors, in the order given. The file appears complete or not at all.
 *
 * @throws OutputError if the file cannot be written. RangeError for a tensor named `__metadata__`.
 */
export async function writeSafetensors(file: string, tensors: Readonly<Record<string, FloatTensor>>): Promise<void> {
  if (Object.hasOwn(tensors, "__metadata__")) throw new RangeError('A tensor cannot be named "__metadata__".');
  const header: [string, unknown][] = [];
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    const begin = end;
    end += 4 * data.length;
    header.push([name, { dtype: "F32", shape, data_offsets: [begin, end] }]);
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(header)));
  // Spaces after the JSON keep the tensors aligned to 8 bytes, as the reference implementation writes them.
  const headerBytes = Math.ceil(json.length / 8) * 8;
  const start = Buffer.alloc(8 + headerBytes, " ");
  start.writeBigUInt64LE(BigInt(headerBytes));
  json.copy(start, 8);

  function* chunks() {
    yield start;
    for (const { data } of Object.values(tensors)) yield littleEndian(data);
  }
  await writeFileAtomic(file, chunks()).catch((cause: Error) => {
    throw new OutputError(file, `Cannot write ${file}: ${cause.message}`, { cause });
  });
}

/** Says what is wrong with a file. */
function fault(file: string, what: string, options?: ErrorOptions): CheckpointError {
  return new CheckpointError(file, `${file} ${what}`, options);
}

async function readHeaderText(file: string, handle: FileHandle, size: number) {
  const start = await readExactly(handle, 0, 8);
  if (start.length < 8) throw fault(file, `has ${size} bytes: too short for a .safetensors file. ${downloadAgain}`);
  if (start.toString("latin1") === "version ")
    throw fault(
      file,
      'is not a .safetensors file but, it seems, a Git LFS pointer to one. Run "git lfs pull" in its repository.',
    );
  // No file has a header of so many bytes as eight letters are.
  if (start.every((byte) => isLetter(byte)))
    throw fault(
      file,
      `is not a .safetensors file but text, which begins with "${await beginningOf(handle)}". Servers answer so where a file cannot ` +
        "be had: open its page, sign in and accept the model's licence where it has one, and download the file again.",
    );
  const length = start.readBigUInt64LE();
  const firstByte = (await readExactly(handle, 8, 1)).toString("latin1");
  // The reference implementation demands the brace; it is also what tells a damaged file from one of another kind.
  if (firstByte !== "{" && firstByte !== "")
    throw fault(file, `is not a .safetensors file: its header does not begin with "{". ${downloadAgain}`);
  if (length > BigInt(maxHeaderBytes))
    throw fault(
      file,
      `is not a .safetensors file: it declares a header of ${length} bytes; the limit is ${maxHeaderBytes}.`,
    );
  const headerBytes = Number(length);
  if (8 + headerBytes > size)
    throw fault(
      file,
      `is truncated: its header should have ${headerBytes} bytes, but the whole file has ${size}. ${downloadAgain}`,
    );
  const bytes = await readExactly(handle, 8, headerBytes);
  try {
    return { text: new TextDecoder("utf-8", { fatal: true }).decode(bytes), dataStart: 8 + headerBytes };
  } catch (cause) {
    throw fault(file, `has a damaged header: it is not UTF-8. ${downloadAgain}`, { cause });
  }
}

/** Whether a byte is of a text in ASCII. */
const isLetter = (byte: number) => (byte >= 32 && byte < 127) || byte === 9 || byte === 10 || byte === 13;

/** How a text begins, in one line. */
async function beginningOf(handle: FileHandle): Promise<string> {
  const text = (await readExactly(handle, 0, 60)).toString("latin1");
  return text.replace(/[^ -~]+/g, " ").trim();
}

function parseHeader(file: string, text: string, dataStart: number, size: number) {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw fault(file, `has a damaged header: it is not JSON. ${downloadAgain}`, { cause });
  }
  if (!isRecord(json)) throw fault(file, "has a damaged header: it is not a JSON object.");
  const { __metadata__: metadata = {}, ...entries } = json;
  if (!isRecord(metadata) || Object.values(metadata).some((item) => typeof item !== "string"))
    throw fault(file, "has a damaged header: __metadata__ must map names to strings.");
  const header: Map<string, HeaderEntry> = new Map(
    Object.entries(entries).map(([name, value]) => [name, parseEntry(file, name, value, dataStart, size)]),
  );
  checkThatTensorsTileTheFile(file, header, dataStart, size);
  for (const [layer, quantisation] of quantisedLayers(file, metadata)) {
    const name = `${layer}.weight`;
    const weight = header.get(name);
    if (weight) header.set(name, { ...weight, quantisation });
  }
  return { header, metadata: metadata as Record<string, string> };
}

/** ComfyUI's key of metadata: {"layers": {"model.layer": {"format": ...}}}. */
const layersKey = "_quantization_metadata";

function quantisedLayers(file: string, { [layersKey]: text }: JsonObject): [layer: string, JsonObject][] {
  if (text === undefined) return [];
  let json: unknown;
  try {
    json = JSON.parse(text as string);
  } catch (cause) {
    throw fault(file, `has damaged metadata: ${layersKey} is not JSON. ${downloadAgain}`, { cause });
  }
  const layers = isRecord(json) && isRecord(json.layers) ? json.layers : {};
  return Object.entries(layers).flatMap(([layer, value]) => (isRecord(value) ? [[layer, value]] : []));
}

function parseEntry(file: string, name: string, value: unknown, dataStart: number, size: number): HeaderEntry {
  const fail = (what: string): never => {
    throw new CheckpointError(
      file,
      `${file}: the header's entry for the tensor "${name}" is damaged: ${what}. ${downloadAgain}`,
    );
  };
  if (!isRecord(value)) return fail("it is not an object");
  const { dtype, shape, data_offsets: offsets } = value;
  if (typeof dtype !== "string") return fail("dtype is not a string");
  if (!isSizes(shape)) return fail("shape is not a list of sizes");
  if (!isSizes(offsets) || offsets.length !== 2) return fail("data_offsets is not a pair of offsets");
  const [begin, end] = offsets as [number, number];
  if (begin > end) return fail(`its data begin at ${begin}, behind their end at ${end}`);
  if (end > size - dataStart)
    return fail(`its data end at ${end}, outside the file, which holds ${size - dataStart} bytes of data`);
  const elements = elementCount(shape);
  if (!Number.isSafeInteger(elements)) return fail(`its shape [${shape}] is absurd`);
  const bytes = knownBytes.get(dtype);
  if (bytes !== undefined && bytes * elements !== end - begin)
    return fail(`${dtype} [${shape}] takes ${bytes * elements} bytes, but its data_offsets span ${end - begin}`);
  return { name, dtype, shape, offset: dataStart + begin, length: end - begin };
}

function checkThatTensorsTileTheFile(file: string, header: SafetensorsHeader, dataStart: number, size: number): void {
  let expected = dataStart;
  const inOrder = [...header.values()].sort((a, b) => a.offset - b.offset || a.length - b.length);
  for (const { name, offset, length } of inOrder) {
    if (offset !== expected)
      throw new CheckpointError(
        file,
        `${file}: the data of the tensor "${name}" ${offset < expected ? "overlap the tensor before them" : "leave a hole before them"}` +
          ` (offset ${offset - dataStart}, expected ${expected - dataStart}). The file is damaged: download or convert it again.`,
      );
    expected = offset + length;
  }
  if (expected !== size)
    throw fault(
      file,
      `holds ${size - expected} bytes behind its last tensor. The file is damaged: download or convert it again.`,
    );
}

async function withFile<T>(file: string, use: (handle: FileHandle) => Promise<T>): Promise<T> {
  try {
    const handle = await open(file, toRead);
    try {
      return await use(handle);
    } finally {
      await handle.close();
    }
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === "ENOENT") throw fault(file, `does not exist. Check its path.`, { cause });
    // Only the operating system's errors are about the file; anything else, an abort's reason too, passes as it is.
    if (cause instanceof Error && "syscall" in cause)
      throw new CheckpointError(file, `Cannot read ${file}: ${cause.message}`, { cause });
    throw cause;
  }
}

/** At most `length` bytes from `position`; fewer only at the end of the file. */
async function readExactly(handle: FileHandle, position: number, length: number): Promise<Buffer> {
  const bytes = Buffer.alloc(length);
  let filled = 0;
  while (filled < length) {
    const { bytesRead } = await handle.read(bytes, filled, length - filled, position + filled);
    if (bytesRead === 0) break;
    filled += bytesRead;
  }
  return bytes.subarray(0, filled);
}

function littleEndian(data: Float32Array): Buffer {
  const bytes = Buffer.alloc(4 * data.length);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  for (let i = 0; i < data.length; i++) view.setFloat32(4 * i, data[i]!, true);
  return bytes;
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((item) => Number.isSafeInteger(item) && item >= 0);
}
