/**
 * Quantised weights: finding the scale that belongs to a tensor, checking both, and naming what cannot be read. 8-bit values without
 * their scale are other weights, so that a scale which should be there and is not is an error, and never 1.
 */

import { bytesPerElement, elementCount, is8Bit, type StoredScale, type StoredTensor } from "../common/tensor.js";
import { widen } from "../common/widen.js";
import { CheckpointError } from "../errors.js";
import { isRecord } from "./files.js";
import { type HeaderEntry, readBytes, readTensor, supportedDType } from "./safetensors.js";

/** A tensor of a header, and the file that has it. */
export interface LocatedEntry {
  /** Absolute path without symbolic links. */
  readonly file: string;
  readonly entry: HeaderEntry;
}

/** Finds a tensor by the name that diffusers or transformers gives it, without the prefix of its network. */
export type Lookup = (name: string) => LocatedEntry | undefined;

/** Where a scale of `X.weight` is, in place of `.weight`, and what it is multiplied by. */
const scaleNames: readonly { readonly suffix: string; readonly factor: number; readonly dtypes: readonly string[] }[] =
  [
    { suffix: ".scale_weight", factor: 1, dtypes: ["F8_E4M3", "F8_E5M2", "I8"] },
    { suffix: ".weight_scale", factor: 1, dtypes: ["F8_E4M3", "F8_E5M2", "I8"] },
    // bitsandbytes: the largest magnitude of each row, which is stored as 127.
    { suffix: ".SCB", factor: 1 / 127, dtypes: ["I8"] },
  ];

/** ComfyUI's mark of a network whose linear weights have scales. It has no elements. */
const scaledMark = "scaled_fp8";

/** bitsandbytes' order of int8 values: 0 for rows. The others are those of kernels that it no longer has. */
const formatSuffix = ".weight_format";

/** What ComfyUI says of a layer's quantisation, as JSON: its name and parameters. */
const comfySuffix = ".comfy_quant";
/** The formats of it that are no more than scaled values. */
const comfyFormats = ["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"];

const takeOthers = "Take the model's weights in F16 or BF16, or quantise it again.";

/**
 * A tensor as networks read it, with its scale where it has one.
 *
 * @param lookup also asked for the scale's name and for `scaled_fp8`
 * @throws CheckpointError if its dtype is not one that this package computes with, its scale is missing or of another shape, or the file's
 * metadata say that it is quantised in another way
 */
export function resolveTensor(lookup: Lookup, name: string): StoredTensor | undefined {
  const found = lookup(name);
  if (!found) return undefined;
  // A number up to 3, and a text: U8 and I8 store them alike.
  if (name.endsWith(formatSuffix) || name.endsWith(comfySuffix)) return { ...located(found), name, dtype: "I8" };
  const { file, entry } = found;
  if (entry.quantisation)
    checkComfyDescription(file, entry.name, JSON.stringify(entry.quantisation), entry.quantisation);
  const stored = storedTensor(found, name);
  if (!is8Bit(stored.dtype)) return stored;
  const scale = scaleOf(lookup, stored, found.entry.name);
  return scale ? { ...stored, scale } : stored;
}

function storedTensor(found: LocatedEntry, name: string): StoredTensor {
  return { ...located(found), name, dtype: supportedDType(found.file, found.entry) };
}

function located({ file, entry: { shape, offset, length } }: LocatedEntry) {
  return { shape, file, offset, length };
}

/** @param storedName what the tensor is called in its file */
function scaleOf(
  lookup: Lookup,
  { name, dtype, shape, file }: StoredTensor,
  storedName: string,
): StoredScale | undefined {
  const fail = (what: string): never => {
    throw new CheckpointError(file, `${file}: the quantised tensor "${storedName}" (${dtype}) ${what}. ${takeOthers}`);
  };
  const module = name.endsWith(".weight") ? name.slice(0, -".weight".length) : undefined;
  for (const { suffix, factor, dtypes } of module === undefined ? [] : scaleNames) {
    const scaleName = `${module}${suffix}`;
    const found = lookup(scaleName);
    if (!found || !dtypes.includes(dtype)) continue;
    const scale = storedTensor(found, scaleName);
    const [rows = 1] = shape;
    const forRows = scale.shape.join() === `${rows}` || scale.shape.join() === `${rows},1`;
    if (is8Bit(scale.dtype) || (elementCount(scale.shape) !== 1 && !forRows))
      fail(
        `has a scale "${found.entry.name}" of ${scale.dtype} [${scale.shape}]; expected F32 with one value, or one for each of its ${rows} rows`,
      );
    return { tensor: { ...scale, shape: elementCount(scale.shape) === 1 ? [] : [rows] }, factor };
  }
  if (dtype === "I8") fail("has no scale: expected SCB, weight_scale or scale_weight beside it");
  if (module !== undefined && shape.length > 1 && lookup(scaledMark))
    fail(
      `has no scale, though "${scaledMark}" says that there is one: expected scale_weight or weight_scale beside it`,
    );
  return undefined;
}

/** What tells a quantisation that cannot be read, and how its weights are had without it. */
interface Unreadable {
  readonly title: string;
  /** Of config.json's quantization_config. */
  readonly methods: readonly string[];
  /** Names that only its files have. */
  readonly tensors: RegExp | null;
  readonly remedy: string;
}

const dequantize = (library: string) =>
  `in Python, load the part with ${library}, call dequantize() on it and save_pretrained(folder)`;
const original = "take the model that it was made from";

/** The first that applies is named. */
const unreadable: readonly Unreadable[] = [
  {
    title: "bitsandbytes in 4 bits (NF4, FP4)",
    methods: ["bitsandbytes", "bitsandbytes_4bit"],
    tensors: /\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.)/,
    remedy: dequantize("transformers or diffusers and bitsandbytes"),
  },
  {
    title: "quanto",
    methods: ["quanto"],
    tensors: /\.weight\._(data|scale|shift)$/,
    remedy:
      "in Python, load the part with optimum-quanto, replace each weight by weight.dequantize() and call save_pretrained(folder)",
  },
  {
    title: "torchao",
    methods: ["torchao"],
    tensors: /[.:_]weight(_|:_?)(qdata|tensor_data|tensor_impl)/,
    remedy:
      "in Python, load the part with torchao, replace each weight by weight.dequantize() and call save_pretrained(folder)",
  },
  {
    title: "SVDQuant (nunchaku)",
    methods: ["svdquant", "nunchaku"],
    tensors: /\.(wscales|smooth_factor(_orig)?|smooth|proj_down|wcscales|wtscale)$/,
    remedy: `its low-rank part and 4-bit part are in the order of its kernels; ${original}`,
  },
  {
    title: "GPTQ or AWQ",
    methods: ["gptq", "awq", "auto-round"],
    tensors: /\.(qweight|qzeros|g_idx)$/,
    remedy: `${original}, or ${dequantize("transformers and gptqmodel")}`,
  },
  {
    title: "GGUF",
    methods: ["gguf"],
    tensors: null,
    remedy: `${original}, or ${dequantize("diffusers (GGUFQuantizationConfig)")}`,
  },
  {
    title: "FP4 or FP8 with a scale for each block",
    methods: ["fp8", "nvfp4", "mxfp4", "mxfp8", "modelopt", "nvidia_modelopt"],
    tensors: /\.(weight_scale_2|weight_scale_inv|weight_quantizer\._\w+)$/,
    remedy: original,
  },
  {
    title: "compressed-tensors",
    methods: ["compressed-tensors", "fbgemm_fp8"],
    tensors: /\.weight_(packed|shape)$/,
    remedy: dequantize("transformers and compressed-tensors"),
  },
  { title: "HQQ", methods: ["hqq"], tensors: /\.W_q$/, remedy: dequantize("transformers and hqq") },
];

/** Weights as far as their quantisation is checked. */
interface CheckedWeights {
  readonly origin: string;
  /** Names of all tensors: those of networks, whatever is before them, and what a quantisation keeps besides. */
  readonly names: readonly string[];
  find(name: string): StoredTensor | undefined;
  storedName?(name: string): string;
}

/**
 * Refuses weights whose quantisation is another than those that `resolveTensor` reads, and damaged ones. Scales are read, and as
 * much of each 8-bit matrix as it takes to find two different values.
 *
 * @param quantization `quantization_config` of config.json, undefined where it has none
 * @param named names for `find` of the tensors to check; default: all
 * @throws CheckpointError that names the quantisation or the tensor, and the remedy
 */
export async function checkQuantisation(
  weights: CheckedWeights,
  quantization: unknown,
  { signal, named = weights.names }: { signal?: AbortSignal | undefined; named?: readonly string[] } = {},
): Promise<void> {
  refuseUnreadable(weights, quantization);
  // In messages a tensor is called what its file calls it.
  const called = (tensor: StoredTensor): StoredTensor => ({
    ...tensor,
    name: weights.storedName?.(tensor.name) ?? tensor.name,
  });
  for (const name of named) {
    const description = name.endsWith(comfySuffix) && weights.find(name);
    if (description) await checkComfyFormat(weights.origin, called(description));
  }
  for (const name of named) {
    if (!name.endsWith(".weight")) continue;
    const found = weights.find(name);
    if (!found) continue;
    signal?.throwIfAborted();
    if (!is8Bit(found.dtype)) {
      for (const { suffix } of scaleNames) {
        const scale = weights.find(name.replace(/\.weight$/, suffix));
        if (scale) await checkNoScale(called(found), called(scale));
      }
      continue;
    }
    const tensor = called(found);
    if (found.scale) await checkScale(tensor, called(found.scale.tensor));
    const format = weights.find(name.replace(/\.weight$/, formatSuffix));
    if (format) await checkFormat(tensor, called(format));
    await checkValues(tensor);
  }
}

function refuseUnreadable({ origin, names }: CheckedWeights, quantization: unknown): void {
  const config = isRecord(quantization) ? quantization : {};
  const method = typeof config.quant_method === "string" ? config.quant_method.toLowerCase() : undefined;
  const readable = method === undefined || (method === "bitsandbytes" && config.load_in_4bit !== true);
  const row =
    unreadable.find(({ tensors }) => tensors && names.some((name) => tensors.test(name))) ??
    (readable ? undefined : unreadable.find(({ methods }) => methods.includes(method)));
  if (!row && readable) return;
  const { title, remedy } = row ?? { title: `"${method}"`, remedy: original };
  throw new CheckpointError(
    origin,
    `The weights of ${origin} are quantised by ${title}, which cannot be read. To have weights without it: ${remedy}. 8-bit weights that can be read are F8_E4M3 and F8_E5M2, with scales or without, and bitsandbytes int8.`,
  );
}

/** One value of a scale may be zero, for a row of zeros; all of them are damage, since no network has such a weight. */
async function checkScale({ name, file }: StoredTensor, tensor: StoredTensor): Promise<void> {
  const { data } = await readTensor(tensor.file, tensor);
  const wrong = data.find((value) => !Number.isFinite(value) || value < 0);
  if (wrong === undefined && data.some((value) => value > 0)) return;
  throw new CheckpointError(
    file,
    `${file}: the scale "${tensor.name}" of the quantised tensor "${name}" ${wrong === undefined ? "is zero throughout" : `has the value ${wrong}`}, so that the weight cannot be restored. The file is damaged or was quantised wrongly: download it again. ${takeOthers}`,
  );
}

/** Layers that a quantiser passes over may keep a scale of 1. Another one would have to be multiplied by, or is of other weights. */
async function checkNoScale({ name, dtype, file }: StoredTensor, scale: StoredTensor): Promise<void> {
  const { data } = await readTensor(scale.file, scale);
  if (data.every((value) => value === 1)) return;
  throw new CheckpointError(
    file,
    `${file}: the tensor "${name}" is ${dtype}, but beside it is the scale "${scale.name}" of quantised weights, which is not 1. The file was converted wrongly. ${takeOthers}`,
  );
}

/**
 * Values of a tensor, restored with its scale.
 *
 * @param first index of the first one in the row-major tensor
 * @throws CheckpointError if they cannot be read in full
 */
export async function readElements(tensor: StoredTensor, first: number, count: number): Promise<Float32Array> {
  const { file, shape, dtype, offset, scale } = tensor;
  const size = bytesPerElement[dtype];
  const bytes = await readBytes(file, offset + first * size, count * size);
  if (bytes.length < count * size)
    throw new CheckpointError(file, `${file} ends inside the tensor "${tensor.name}". Download the file again.`);
  const data = new Float32Array(count);
  widen(bytes, dtype, data);
  if (!scale) return data;
  const { data: scales } = await readTensor(scale.tensor.file, scale.tensor);
  const perScale = elementCount(shape) / scales.length;
  for (let i = 0; i < count; i++) data[i]! *= scales[Math.floor((first + i) / perScale)]! * scale.factor;
  return data;
}

/** Whether a tensor is no weight of a network but what a quantisation keeps beside one. */
export function isBesideWeights(name: string): boolean {
  return name === scaledMark || besides.test(name);
}

const besides = /\.(scale_weight|weight_scale|SCB|weight_format|scale_input|input_scale|comfy_quant)$/;

async function checkFormat({ name, file }: StoredTensor, format: StoredTensor): Promise<void> {
  const [order] = await readBytes(format.file, format.offset, 1);
  if (order === 0) return;
  throw new CheckpointError(
    file,
    `${file}: "${format.name}" is ${order}, so that the values of "${name}" are in another order than rows, as older versions of bitsandbytes kept them for their kernels. ${takeOthers}`,
  );
}

/** Bytes of a description: they have some tens. */
const longestDescription = 1024;

async function checkComfyFormat(origin: string, { name, file, offset, length }: StoredTensor): Promise<void> {
  const text = (await readBytes(file, offset, Math.min(length, longestDescription))).toString("utf8");
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw new CheckpointError(file, `${file}: "${name}" is not JSON. The file is damaged: download it again.`, {
      cause,
    });
  }
  checkComfyDescription(origin, name, text, json);
}

/** @param text the description as it is shown */
function checkComfyDescription(origin: string, name: string, text: string, description: unknown): void {
  const { format, convrot = false } = isRecord(description) ? description : {};
  if (comfyFormats.includes(format as string) && !convrot) return;
  throw new CheckpointError(
    origin,
    `The weights of ${origin} are quantised by ComfyUI as ${text} ("${name}"), which cannot be read. Of ComfyUI's formats, ${comfyFormats.join(", ")} can, with a scale for the whole or for each row. To have weights without it: ${original}.`,
  );
}

/** Bytes of a tensor that are read at a time. */
const piece = 1 << 16;

/**
 * A matrix of which every value is the same, and not zero, is what is left where a quantiser clipped or rounded all of it, and has
 * nothing of what was learnt. Zeros are left alone: layers that begin with zeros are.
 */
async function checkValues({ name, dtype, shape, file, offset, length }: StoredTensor): Promise<void> {
  if (shape.length < 2 || length < 2) return;
  let first: number | undefined;
  for (let start = 0; start < length; start += piece) {
    const bytes = await readBytes(file, offset + start, Math.min(piece, length - start));
    first ??= bytes[0];
    if (first === 0 || bytes.some((byte) => byte !== first)) return;
  }
  throw new CheckpointError(
    file,
    `${file}: all values of the quantised tensor "${name}" (${dtype}) are the same. Its quantisation has lost what the weight was, or the file is damaged: download it again. ${takeOthers}`,
  );
}
