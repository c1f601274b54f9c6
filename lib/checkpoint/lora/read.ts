/**
 * Reads a LoRA file for a checkpoint: of each layer that it changes two matrices of low rank, under the names of diffusers and
 * transformers, whatever trainer wrote them. Every tensor of the file is used, or an error names it. The whole file is read: it is small beside the
 * weights that it changes.
 */

import { readdir } from "node:fs/promises";
import path from "node:path";
import { elementCount } from "../../common/tensor.js";
import { isDue, rest } from "../../common/turns.js";
import { CheckpointError } from "../../errors.js";
import type { Checkpoint } from "../checkpoint.js";
import { exists, isFile, isFolder } from "../files.js";
import { checkpointName } from "../name.js";
import { type HeaderEntry, readBytes, readDescribedHeader, readTensor } from "../safetensors.js";
import { refuseOtherFormats } from "../single-file/kinds.js";
import { type Alphas, readAlphas } from "./alphas.js";
import { formOf, type LoraRole, otherModelOf, parseKey } from "./keys.js";
import { LoraLayers, type LoraPart, type LoraTarget, partTitles } from "./layers.js";

/** What a LoRA adds to the weight of one layer: scale · up · down. */
export interface LowRank {
  /** [rank, in], row-major. Of a convolution `in` counts channels · height · width of its kernel. */
  readonly down: Float32Array;
  /** [out, rank], row-major, its rows in the order of the checkpoint's own weight. */
  readonly up: Float32Array;
  readonly rank: number;
  readonly in: number;
  readonly out: number;
  /** alpha / r, r the rank that the file has for the layer. */
  readonly scale: number;
}

/** A LoRA, as far as it is for a checkpoint. */
export interface Lora {
  /** The file that was read. */
  readonly file: string;
  /** What requests and pictures call it. */
  readonly name: string;
  /** Layers by the names of diffusers and transformers, without ".weight". */
  readonly parts: ReadonlyMap<LoraPart, ReadonlyMap<string, LowRank>>;
}

interface ReadLoraOptions {
  /** Default: see `nameOfLora`. */
  readonly name?: string | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Names of files that say nothing: diffusers' and PEFT's. */
const usualFiles = ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"] as const;

const isUrl = (place: string) => /^[a-z][a-z0-9+.-]*:\/\//i.test(place);
/** As models are named on the hub: not what ends as a file. */
const hubName = /^[\w.-]+\/[\w.-]+(@[\w./-]+)?(?<!\.safetensors)$/;

const dequantise = "Save the LoRA in float16, bfloat16 or float32.";

/**
 * @param place a .safetensors file, or a folder with `pytorch_lora_weights.safetensors`, PEFT's `adapter_model.safetensors` or one other such file
 * @param checkpoint that it is to change
 * @throws CheckpointError for what is no LoRA, or is one of another model or form, with what it is; for a tensor that no layer has, that does not fit, or
 *   that is not finite; for a matrix without the other. `signal.reason` after an abort
 */
export async function readLora(
  place: string,
  checkpoint: Checkpoint,
  { name, signal }: ReadLoraOptions = {},
): Promise<Lora> {
  signal?.throwIfAborted();
  const file = await fileOf(place);
  await refuseOtherFormats(file);
  const { header, metadata } = await readDescribedHeader(file, { signal });
  refuseOthers(file, header.values());
  const layers = new LoraLayers(checkpoint);
  const pairs = pairsOf(file, header.values(), checkpoint, layers);
  const alphas = await readAlphas(file, metadata);
  const parts = new Map<LoraPart, Map<string, LowRank>>();
  for (const pair of pairs) {
    signal?.throwIfAborted();
    if (isDue()) await rest();
    for (const [layer, lowRank] of await readPair(file, pair, alphas)) {
      const { part } = pair.target;
      const known = parts.get(part) ?? new Map<string, LowRank>();
      if (known.has(layer))
        throw new CheckpointError(
          file,
          `${file}: the tensors "${pair.down.name}" and others are for one layer of the ${partTitles[part]}, ${layer}, under several names. ` +
            "The file was merged of several LoRAs wrongly: pass each LoRA's own file.",
        );
      parts.set(part, known.set(layer, lowRank));
    }
  }
  return { file, name: name ?? nameOf(file), parts };
}

/**
 * What a LoRA is called where nothing else is said: as its file without ".safetensors", or as its folder where the file is called as in any other.
 * @param place as for `readLora`
 * @throws CheckpointError for a folder without a LoRA, or with several
 */
export async function nameOfLora(place: string): Promise<string> {
  return nameOf(await fileOf(place));
}

function nameOf(file: string): string {
  const isUsual = usualFiles.some((usual) => usual === path.basename(file));
  return checkpointName(isUsual ? path.dirname(file) : file);
}

/** @param given as the caller has it: a path, which may be relative */
async function fileOf(given: string): Promise<string> {
  const place = path.resolve(given);
  if (!(await isFolder(place))) {
    // What is no path here may have been meant as one of the hub, as models are.
    if (isUrl(given) || (hubName.test(given) && !(await exists(place))))
      throw new CheckpointError(
        given,
        `${given} is no file here${isUrl(given) ? "" : `: ${place} does not exist`}. LoRAs are not downloaded: download the .safetensors file, and pass its path.`,
      );
    return place;
  }
  for (const usual of usualFiles) if (await isFile(path.join(place, usual))) return path.join(place, usual);
  const entries = await readdir(place, { withFileTypes: true });
  const names = entries
    .filter((entry) => entry.name.endsWith(".safetensors") && !entry.isDirectory())
    .map(({ name }) => name)
    .sort();
  if (names.length === 1) return path.join(place, names[0]!);
  if (await exists(path.join(place, "model_index.json")))
    throw new CheckpointError(place, `The folder ${place} is a model, and no LoRA: pass it as the model (--model).`);
  const several = `several .safetensors files (${names.slice(0, 4).join(", ")}${names.length > 4 ? ", ..." : ""}), and none of them is ${usualFiles.join(" or ")}`;
  throw new CheckpointError(
    place,
    `The folder ${place} has ${names.length === 0 ? "no .safetensors file" : several}. Pass the path of the LoRA's file.`,
  );
}

/** Refuses what is no LoRA of SD3 by the names alone. */
function refuseOthers(file: string, entries: Iterable<HeaderEntry>): void {
  const all = [...entries];
  const [first] = all;
  if (!first) throw new CheckpointError(file, `${file} is no LoRA: it has no tensors. Download or save it again.`);
  for (const { name } of all) {
    const form = formOf(name);
    if (form)
      throw new CheckpointError(
        file,
        `${file} is ${form} ("${name}"), which is not read; LoRAs of two matrices for a layer are. Merge it into its checkpoint with its ` +
          "trainer's script or in ComfyUI, and pass that checkpoint as the model; or train it as a plain LoRA.",
      );
  }
  const other = otherModelOf(all);
  const isLora = all.some(({ name }) => parseKey(name)?.role === "down" || parseKey(name)?.role === "up");
  // Some of other models have matrices with names that are not known here, such as qkv_lora1.down.weight.
  if (isLora || (other && all.some(({ name }) => /lora/i.test(name)))) {
    if (!other) return;
    throw new CheckpointError(
      file,
      `${file} is ${other}, and cannot change a model of Stable Diffusion 3 or 3.5. Pass a LoRA that was trained for the model.`,
    );
  }
  // Layers of another model without matrices of low rank are its own weights.
  const isCheckpoint =
    other !== null ||
    all.some(({ name }) =>
      /(^|\.)(joint_blocks|transformer_blocks)\.\d+\.|^(text_model|encoder\.block|first_stage_model|text_encoders)\./.test(
        name,
      ),
    );
  const isControl = all.some(({ name }) => /^(controlnet_|pos_embed_input\.|control_model\.)/.test(name));
  throw new CheckpointError(
    file,
    isControl
      ? `${file} is a ControlNet, and no LoRA: pass its folder as a control of a picture (--control).`
      : isCheckpoint
        ? `${file} is a checkpoint or a part of one, and no LoRA: pass it as the model (--model).`
        : `${file} is no LoRA: it has tensors such as "${first.name}", and none whose name ends in lora_A.weight, lora_down.weight or the like.`,
  );
}

/** The tensors of one of the file's layers. */
interface Pair {
  readonly down: HeaderEntry;
  readonly up: HeaderEntry;
  readonly alpha: HeaderEntry | undefined;
  /** As the file has it. */
  readonly layer: string;
  readonly target: LoraTarget;
}

function pairsOf(
  file: string,
  entries: Iterable<HeaderEntry>,
  checkpoint: Checkpoint,
  layers: LoraLayers,
): readonly Pair[] {
  const found = new Map<string, Partial<Record<LoraRole, HeaderEntry>>>();
  const unknown: HeaderEntry[] = [];
  for (const entry of entries) {
    const key = parseKey(entry.name);
    if (!key) {
      unknown.push(entry);
      continue;
    }
    const tensors = found.get(key.layer) ?? {};
    const twice = tensors[key.role];
    if (twice)
      throw new CheckpointError(
        file,
        `${file}: the tensors "${twice.name}" and "${entry.name}" are the same matrix of one layer. The file holds several LoRAs: save each of them alone.`,
      );
    found.set(key.layer, { ...tensors, [key.role]: entry });
  }
  const matched: Pair[] = [];
  const unmatched: { readonly layer: string; readonly part: LoraPart; readonly entry: HeaderEntry }[] = [];
  for (const [layer, tensors] of found) {
    const { part, target } = layers.find(layer);
    const { down, up, alpha } = tensors;
    const entry = (down ?? up ?? alpha)!;
    if (!target) unmatched.push({ layer, part, entry });
    else if (down && up && adapterOf(down) !== adapterOf(up))
      throw new CheckpointError(
        file,
        `${file}: the tensors "${down.name}" and "${up.name}" are of two adapters, each without its other matrix. The file was saved wrongly: save each LoRA alone.`,
      );
    else if (down && up) matched.push({ down, up, alpha, layer, target });
    else throw incomplete(file, entry, down ? "up" : up ? "down" : "both");
  }
  const names = [...found.keys()];
  const misfit = matched.find(({ down, up, target }) => !fits(down, up, target));
  if (misfit || unmatched.some(({ part }) => part === "transformer")) refuseOtherSize(file, names, matched, checkpoint);
  const [absent] = unmatched.filter(({ part }) => !layers.has(part));
  if (absent)
    throw new CheckpointError(
      file,
      `${file} changes the ${partTitles[absent.part]} ("${absent.entry.name}"), but the model is without it. ` +
        "Load the model with all of its text encoders, or train a LoRA of the transformer alone.",
    );
  const nameless = [...unmatched.map(({ entry }) => entry), ...unknown];
  if (nameless.length > 0) throw unmatchedTensors(file, nameless);
  if (misfit) throw unfitting(file, misfit);
  return matched;
}

/** The name that PEFT has in memory for an adapter, which some files keep. */
const adapterOf = ({ name }: HeaderEntry) => /\.lora_[AaBb]\.([\w-]+)\.weight$/.exec(name)?.[1];

function incomplete(file: string, entry: HeaderEntry, missing: "up" | "down" | "both"): CheckpointError {
  const what =
    missing === "both"
      ? "its matrices (lora_A and lora_B, or lora_down and lora_up)"
      : missing === "up"
        ? "its second matrix (lora_B or lora_up)"
        : "its first matrix (lora_A or lora_down)";
  return new CheckpointError(
    file,
    `${file}: the tensor "${entry.name}" is there without ${what}. The download may be incomplete, or the file was saved wrongly: download or save it again.`,
  );
}

function unmatchedTensors(file: string, entries: readonly HeaderEntry[]): CheckpointError {
  const shown = entries.slice(0, 3).map(({ name, shape }) => `"${name}" [${shape.join(", ")}]`);
  const more = entries.length > shown.length ? ` and ${entries.length - shown.length} more` : "";
  return new CheckpointError(
    file,
    `${file}: the model has no layer for ${entries.length === 1 ? "the tensor" : "the tensors"} ${shown.join(", ")}${more}. ` +
      "Nothing of a LoRA is left out silently: pass one that was trained for this model.",
  );
}

/** A part of a shape without sizes of 1 at its end: convolutions of 1 × 1 are linear layers. */
const withoutOnes = (shape: readonly number[]) => {
  let length = shape.length;
  while (length > 1 && shape[length - 1] === 1) length--;
  return shape.slice(0, length);
};

function expectedShapes({ layers }: LoraTarget) {
  const [, ...inner] = layers[0]!.shape;
  const rows = layers.reduce((sum, { shape }) => sum + shape[0]!, 0);
  return { inner, rows };
}

function fits({ shape: down }: HeaderEntry, { shape: up }: HeaderEntry, target: LoraTarget): boolean {
  const { inner, rows } = expectedShapes(target);
  const [rank = 0, ...of] = down;
  const isUp = up.length > 1 && up[0] === rows && up[1] === rank && up.slice(2).every((size) => size === 1);
  return rank > 0 && withoutOnes(of).join() === withoutOnes(inner).join() && isUp;
}

function unfitting(file: string, { down, up, target }: Pair): CheckpointError {
  const { inner, rows } = expectedShapes(target);
  const names = target.layers.map(({ name }) => name).join(", ");
  const shapeOf = ({ shape }: HeaderEntry) => `[${shape.join(", ")}]`;
  const isRank = down.shape[0] !== up.shape[1];
  return new CheckpointError(
    file,
    `${file}: ` +
      (isRank && down.shape[1] === inner[0] && up.shape[0] === rows
        ? `the ranks of the tensors "${down.name}" ${shapeOf(down)} and "${up.name}" ${shapeOf(up)} differ: ${down.shape[0]} and ${up.shape[1]}.`
        : `the tensors "${down.name}" ${shapeOf(down)} and "${up.name}" ${shapeOf(up)} do not fit ${names} of the model's ${partTitles[target.part]}: ` +
          `expected [rank, ${inner.join(", ")}] and [${rows}, rank].`) +
      " The LoRA is of another model, or damaged: pass one that was trained for this model.",
  );
}

/** Public models by the width of their transformer. */
const sizes: Readonly<Record<number, string>> = {
  1536: "Stable Diffusion 3 medium or 3.5 medium",
  2432: "Stable Diffusion 3.5 large",
};

/** Refuses a LoRA of a model of the SD3 class that has another width, more blocks or a second attention in other blocks. */
function refuseOtherSize(
  file: string,
  names: readonly string[],
  matched: readonly Pair[],
  { transformer: { config } }: Checkpoint,
): void {
  const width = config.numAttentionHeads * config.attentionHeadDim;
  const blockOf = (name: string) => /(?:joint_blocks|transformer_blocks)[._](\d+)[._]/.exec(name)?.[1];
  const blocks = names.reduce((most, name) => Math.max(most, Number(blockOf(name) ?? -1) + 1), 0);
  const dual = names
    .filter((name) => /[._]attn2[._]/.test(name))
    .map((name) => Number(blockOf(name)))
    .filter((block) => !config.dualAttentionLayers.includes(block));
  // What the tokens have is the width: inputs of the queries, of the whole of q, k and v, and of the modulation.
  const inputs = matched
    .filter(
      ({ target: { part, layers } }) =>
        part === "transformer" && /\.(to_[qkv]|add_[qkv]_proj|linear|net\.0\.proj)$/.test(layers[0]!.name),
    )
    .map(({ down }) => down.shape[1]!);
  // Where some are as wide as the model's, the others are damaged: the file is not of another model.
  const otherWidth = inputs.includes(width) ? undefined : inputs[0];
  const own = `the model's is ${width} wide with ${config.numLayers} blocks${sizes[width] ? `, as that of ${sizes[width]}` : ""}`;
  const theirs =
    otherWidth !== undefined
      ? `a transformer that is ${otherWidth} wide${sizes[otherWidth] ? `, as that of ${sizes[otherWidth]}` : ""}`
      : blocks > config.numLayers
        ? `a transformer with at least ${blocks} blocks${blocks > 24 && blocks <= 38 ? ", as that of Stable Diffusion 3.5 large" : ""}`
        : dual.length > 0
          ? `a transformer with a second attention (attn2) in block ${dual[0]}, as Stable Diffusion 3.5 medium has`
          : null;
  if (theirs === null) return;
  const without = otherWidth === undefined && blocks <= config.numLayers ? ", and has none there" : "";
  // Any width may be that of another kind of model.
  const isKnown = otherWidth === undefined || sizes[otherWidth] !== undefined;
  throw new CheckpointError(
    file,
    `${file} is a LoRA of another model${isKnown ? " of Stable Diffusion 3" : ""}: of ${theirs}, but ${own}${without}. Pass a LoRA that was trained for the model.`,
  );
}

/** Reads the matrices of one of the file's layers: for each of the checkpoint's layers that it stands for, its rows. */
async function readPair(file: string, pair: Pair, alphas: Alphas): Promise<[layer: string, LowRank][]> {
  const { target } = pair;
  const down = await readMatrix(file, pair.down);
  const up = await readMatrix(file, pair.up);
  const rank = pair.down.shape[0]!;
  const scale = pair.alpha
    ? (await readAlpha(file, pair.alpha)) / rank
    : alphas.scaleOf(pair, target.part, target.layers[0]!.name, rank);
  const most = up.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0);
  if (!Number.isFinite(Math.fround(scale * most)))
    throw new CheckpointError(
      file,
      `${file}: alpha over the rank of "${pair.down.name}" is ${scale}, and times the values of "${pair.up.name}" beyond float32. The LoRA was saved wrongly: download or save it again.`,
    );
  if (target.isReversed) swapHalves(up);
  let row = 0;
  return target.layers.flatMap(({ name, shape }) => {
    const out = shape[0]!;
    const rows = up.subarray(row * rank, (row + out) * rank);
    row += out;
    const matrices = withoutZeros(down, rows, rank);
    // What is zero throughout changes nothing.
    return matrices.rank > 0 ? [[name, { ...matrices, out, in: elementCount(shape.slice(1)), scale }]] : [];
  });
}

async function readMatrix(file: string, entry: HeaderEntry): Promise<Float32Array> {
  if (entry.dtype === "I8")
    throw new CheckpointError(file, `${file}: the tensor "${entry.name}" has dtype I8, without a scale. ${dequantise}`);
  const { data } = await readTensor(file, entry);
  const wrong = data.findIndex((value) => !Number.isFinite(value));
  if (wrong < 0) return data;
  throw new CheckpointError(
    file,
    `${file}: the tensor "${entry.name}" has the value ${data[wrong]} at index ${wrong}: its training failed, or the file is damaged. Pass another version of the LoRA.`,
  );
}

/** Types of whole numbers that trainers save alpha in. */
const wholeNumbers: Readonly<Record<string, (bytes: Buffer) => number>> = {
  I64: (bytes) => Number(bytes.readBigInt64LE()),
  I32: (bytes) => bytes.readInt32LE(),
  F64: (bytes) => bytes.readDoubleLE(),
};

async function readAlpha(file: string, entry: HeaderEntry): Promise<number> {
  const fail = (what: string) =>
    new CheckpointError(
      file,
      `${file}: the tensor "${entry.name}" ${what}; expected one number that is finite, the alpha of its layer. The file is damaged: download or save it again.`,
    );
  if (elementCount(entry.shape) !== 1) throw fail(`has the shape [${entry.shape.join(", ")}]`);
  const read = wholeNumbers[entry.dtype];
  const alpha = read
    ? read(await readBytes(file, entry.offset, entry.length))
    : (await readTensor(file, entry)).data[0]!;
  if (!Number.isFinite(alpha)) throw fail(`is ${alpha}`);
  return alpha;
}

function swapHalves(up: Float32Array): void {
  const half = up.length / 2;
  const first = up.slice(0, half);
  up.copyWithin(0, half);
  up.set(first, half);
}

/**
 * The matrices without what adds nothing: columns of `up` that are all zero, with their rows of `down`. q, k and v that were trained apart are
 * saved as one layer of three times the rank, of which each has one third.
 */
function withoutZeros(down: Float32Array, up: Float32Array, rank: number): Pick<LowRank, "down" | "up" | "rank"> {
  const used = new Uint8Array(rank);
  for (let at = 0, column = 0; at < up.length; at++, column = column + 1 === rank ? 0 : column + 1)
    if (up[at] !== 0) used[column] = 1;
  const kept = [...used.keys()].filter((column) => used[column]);
  if (kept.length === rank) return { down, up: up.slice(), rank };
  const [width, rows] = [down.length / rank, up.length / rank];
  const parts = { down: new Float32Array(kept.length * width), up: new Float32Array(rows * kept.length) };
  for (const [index, column] of kept.entries()) {
    parts.down.set(down.subarray(column * width, (column + 1) * width), index * width);
    for (let row = 0; row < rows; row++) parts.up[row * kept.length + index] = up[row * rank + column]!;
  }
  return { ...parts, rank: kept.length };
}
