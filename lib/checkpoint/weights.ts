/**
 * The weights of one part of a checkpoint: one .safetensors file, or shards that an index names, each perhaps with
 * variants of another precision ("fp16"). Diffusers and transformers have spelled a variant's index in three ways; all
 * occur on the hub. Saving a part again leaves the files of its other layout behind: where several are there, the one that
 * diffusers or transformers reads counts, and a warning names the others. Only headers are read. Names in an index must
 * stay in the part's folder, since the index is data from the internet; the files themselves may be symbolic links, since
 * a Hugging Face cache consists of them.
 */

import { readdir, realpath } from "node:fs/promises";
import { join } from "node:path";
import * as z from "zod";
import { type FileVersion, versionOf } from "../common/files.js";
import type { WeightSource } from "../common/tensor.js";
import { libraryOf, variantsIn, weightFile, weightSources } from "../common/weight-names.js";
import { CheckpointError } from "../errors.js";
import { exists, readJsonObject } from "./files.js";
import { type LocatedEntry, resolveTensor } from "./quantised.js";
import { type HeaderEntry, readSafetensorsHeader, type SafetensorsHeader } from "./safetensors.js";

/** An opened part. `find` throws what `resolveTensor` throws. */
export interface Weights extends WeightSource {
  /** The variant that was found, or null for the files without a variant in their names. */
  readonly variant: string | null;
  /** Variants that the folder offers besides the plain files. */
  readonly variantsFound: readonly string[];
  /** What is there twice, with which is read. */
  readonly warnings: readonly string[];
  /** Absolute paths without symbolic links, with what tells one version of a file from another. */
  readonly files: readonly FileVersion[];
  /** Files that were made of these for products of integers: they tell no model from another. */
  readonly derived?: readonly FileVersion[] | undefined;
  /** Names of all tensors, for messages and tests. */
  readonly names: readonly string[];
  /** Bytes of all tensors by dtype, as the files spell it: those that are never asked for (I64 positions) included. */
  readonly bytesByDType: Readonly<Record<string, number>>;
}

interface OpenWeightsOptions {
  /** For example "fp16". A part that has no such files is opened without a variant, as diffusers does. */
  readonly variant?: string | undefined;
  /** Whose names the tensors have. Default: the file's own. */
  readonly naming?: Naming | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** The name that a network gives a tensor, from the one in a file. */
export type Naming = (stored: string) => string;

/**
 * transformers adds the prefix of a model's inner model where names lack it, and removes it where they have it twice: the
 * text model of CLIP is saved either way. T5's table of tokens has two names, too. Of a tensor that a file has under several
 * names, the first one by the alphabet counts.
 */
export const namings = {
  plain: (stored) => stored,
  clip: (stored) => {
    const name = stored.replace(/^(text_model\.)+/, "");
    return /^(embeddings|encoder|final_layer_norm)\./.test(name) ? `text_model.${name}` : name;
  },
  t5: (stored) => {
    const name = stored.replace(/^transformer\./, "");
    return name === "encoder.embed_tokens.weight" ? "shared.weight" : name;
  },
} as const satisfies Record<string, Naming>;

/**
 * Opens `basename.safetensors`, or the shards of `basename.safetensors.index.json`, or a variant of either.
 *
 * @param basename "model" for text encoders, "diffusion_pytorch_model" for the others: also whose rules hold.
 * @throws CheckpointError if there are none, or an index or header is wrong. `signal.reason` after an abort.
 */
export async function openWeights(
  folder: string,
  basename: string,
  options: OpenWeightsOptions = {},
): Promise<Weights> {
  const { variant, signal, naming = namings.plain } = options;
  signal?.throwIfAborted();
  const present = await listFolder(folder);
  const variantsFound = variantsIn(present, basename);
  const ways = (of: string | null) => weightSources(basename, of).filter((name) => present.includes(name));
  // As diffusers decides, by the beginning of what follows the first dot: a variant that is there in part is not passed over.
  const ofVariant = present.filter((name) => variant !== undefined && name.split(".")[1]?.startsWith(variant));
  const isThere =
    ofVariant.length > 0 || (variant !== undefined && ways(null).length === 0 && ways(variant).length > 0);
  const found = isThere ? variant! : null;
  const [name, ...others] = ways(found);
  if (name === undefined)
    throw new CheckpointError(
      folder,
      found !== null && variantsFound.length === 0
        ? `${folder} holds ${list(ofVariant)}, but not ${weightFile(basename, found)} and no index. Download the checkpoint's remaining files.`
        : explainAbsence(folder, basename, variant, present, variantsFound),
    );
  const warnings = others.map(
    (other) =>
      `${join(folder, name)} is read, as ${libraryOf(basename)} does, and not ${join(folder, other)} beside it, which may ` +
      "hold other weights. Remove the one that is out of date.",
  );
  const at = { folder, naming, signal };
  const { files, tensors, ...read } = name.endsWith(".json") ? await openShards(name, at) : await openSingle(name, at);
  return {
    ...locatedWeights(folder, files, tensors),
    ...{ variant: found, variantsFound, warnings: [...warnings, ...read.warnings] },
  };
}

/**
 * Weights whose tensors are found, in plain files.
 * @param files that they are in
 * @param tensors by the names that networks ask for
 */
export function locatedWeights(
  origin: string,
  files: readonly FileVersion[],
  tensors: ReadonlyMap<string, LocatedEntry>,
): Weights {
  const bytesByDType: Record<string, number> = {};
  for (const { entry } of tensors.values()) bytesByDType[entry.dtype] = (bytesByDType[entry.dtype] ?? 0) + entry.length;
  return {
    ...{ origin, variant: null, variantsFound: [], warnings: [], bytesByDType },
    files: files.map(({ file, size, mtimeMs }) => ({ file, size, mtimeMs })),
    names: [...tensors.keys()],
    find: (name) => resolveTensor((stored) => tensors.get(stored), name),
  };
}

/** Where a part lies, and how its tensors are named. */
interface Place {
  readonly folder: string;
  readonly naming: Naming;
  readonly signal: AbortSignal | undefined;
}

async function openSingle(name: string, { folder, naming, signal }: Place) {
  const file = await openFile(join(folder, name), naming, signal);
  return { files: [file], tensors: new Map(locatedIn(file)), warnings: [] };
}

interface OpenedFile extends FileVersion {
  readonly header: SafetensorsHeader;
}

const locatedIn = ({ file, header }: OpenedFile): [name: string, LocatedEntry][] =>
  [...header].map(([name, entry]) => [name, { file, entry }]);

async function openFile(path: string, naming: Naming, signal: AbortSignal | undefined): Promise<OpenedFile> {
  signal?.throwIfAborted();
  const file = await realpath(path).catch((cause) => {
    // readdir lists a link whether or not its target exists: an interrupted download leaves such links behind.
    throw new CheckpointError(
      path,
      `${path} cannot be opened; if it is a symbolic link, the file it points to is missing. Download the checkpoint again.`,
      { cause },
    );
  });
  const stored = await readSafetensorsHeader(file, { signal });
  const header = new Map<string, HeaderEntry>();
  // From the last by the alphabet to the first, which stays.
  for (const name of [...stored.keys()].sort().reverse()) header.set(naming(name), stored.get(name)!);
  return { ...(await versionOf(file)), header };
}

const indexSchema = z.object({ weight_map: z.record(z.string(), z.string()) });

async function openShards(indexName: string, { folder, naming, signal }: Place) {
  const indexFile = join(folder, indexName);
  const parsed = indexSchema.safeParse(await readJsonObject(indexFile));
  if (!parsed.success)
    throw new CheckpointError(
      indexFile,
      `${indexFile} is not an index of shards: expected "weight_map", which maps the names of tensors to files.`,
    );
  const weightMap = Object.entries(parsed.data.weight_map);
  const shardNames = [...new Set(weightMap.map(([, shard]) => shard))].sort();
  for (const shard of shardNames) checkShardName(indexFile, shard);

  const opened = new Map(
    await Promise.all(
      shardNames.map(async (shard) => {
        const path = join(folder, shard);
        if (!(await exists(path)))
          throw new CheckpointError(
            path,
            `${path} is missing, though ${indexFile} names it. Download the checkpoint's remaining files.`,
          );
        return [shard, await openFile(path, naming, signal)] as const;
      }),
    ),
  );
  for (const [name, shard] of weightMap)
    if (!opened.get(shard)!.header.has(naming(name)))
      throw new CheckpointError(
        join(folder, shard),
        `${join(folder, shard)} lacks the tensor "${name}" that ${indexFile} says it holds. Index and shards are of ` +
          "different downloads: download them again.",
      );
  // All that the shards hold, one after another, as diffusers and transformers read them: the last one counts, not the index.
  const tensors = new Map<string, LocatedEntry>();
  const twice: string[] = [];
  for (const [name, located] of [...opened.values()].flatMap(locatedIn)) {
    const before = tensors.get(name);
    if (before) twice.push(`"${name}" is in ${before.file} and in ${located.file}, and the latter is read`);
    tensors.set(name, located);
  }
  const [first, ...more] = twice;
  const further = more.length > 0 ? ` So are ${more.length} more tensors.` : "";
  const warnings = first ? [`The tensor ${first}.${further} The shards may be of different downloads.`] : [];
  return { files: [...opened.values()], tensors, warnings };
}

function checkShardName(indexFile: string, shard: string): void {
  // A backslash separates folders on Windows, and so does a drive's colon.
  if (/[/\\:\0]/.test(shard) || shard === "" || shard === "." || shard === "..")
    throw new CheckpointError(
      indexFile,
      `${indexFile} names the file "${shard}", which leaves its folder. Shards must lie beside their index.`,
    );
  if (!shard.endsWith(".safetensors"))
    throw new CheckpointError(
      indexFile,
      `${indexFile} names the file "${shard}", which is not a .safetensors file. Convert the checkpoint to safetensors.`,
    );
}

async function listFolder(folder: string): Promise<string[]> {
  return readdir(folder).catch((cause: NodeJS.ErrnoException) => {
    const { code } = cause;
    const what = code === "ENOENT" ? "does not exist" : code === "ENOTDIR" ? "is not a folder" : String(cause);
    const message = `The folder ${folder} ${what}. Download the checkpoint's remaining files.`;
    throw new CheckpointError(folder, message, { cause });
  });
}

function explainAbsence(
  folder: string,
  basename: string,
  variant: string | undefined,
  present: readonly string[],
  variantsFound: readonly string[],
): string {
  const expected = `${basename}.safetensors or ${basename}.safetensors.index.json`;
  if (variantsFound.length > 0)
    return variant === undefined
      ? `${folder} has no ${expected}, but the variant ${list(variantsFound)}: pass variant "${variantsFound[0]}".`
      : `${folder} has neither the variant "${variant}" nor ${expected}, but the variant ${list(variantsFound)}.`;
  const pickled = present.filter((name) => /\.(bin|pt|pth|ckpt)$/.test(name));
  if (pickled.length > 0)
    return (
      `${folder} holds its weights as ${list(pickled)}, which are not read. Convert the checkpoint to safetensors: in ` +
      "Python, load the pipeline with diffusers and call save_pretrained(folder, safe_serialization=True)."
    );
  const others = present.filter((name) => /\.(gguf|msgpack|h5|onnx)$/.test(name));
  if (others.length > 0)
    return `${folder} holds ${list(others)}, which cannot be read. Download its .safetensors files: expected ${expected}.`;
  return `${folder} has no weights: expected ${expected}. Download the checkpoint's remaining files.`;
}

function list(names: readonly string[]): string {
  return names.map((name) => `"${name}"`).join(", ");
}
