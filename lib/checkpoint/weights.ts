/**
 * The weights of one part of a checkpoint: one .safetensors file, or shards that an index names, each perhaps with
 * variants of another precision ("fp16"). Diffusers and transformers have spelled a variant's index in three ways; all
 * occur on the hub. Only headers are read. Names in an index must stay in the part's folder, since the index is data
 * from the internet; the files themselves may be symbolic links, since a Hugging Face cache consists of them.
 */

import { readdir, readFile, realpath, stat } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import type { FileVersion } from "../common/files.js";
import type { StoredTensor, WeightSource } from "../common/tensor.js";
import { CheckpointError } from "../errors.js";
import { exists } from "./files.js";
import { resolveTensor } from "./quantised.js";
import { readSafetensorsHeader, type SafetensorsHeader } from "./safetensors.js";

/** An opened part. `find` throws what `resolveTensor` throws. */
export interface Weights extends WeightSource {
  /** The variant that was found, or null for the files without a variant in their names. */
  readonly variant: string | null;
  /** Variants that the folder offers besides the plain files. */
  readonly variantsFound: readonly string[];
  /** Absolute paths without symbolic links, with what tells one version of a file from another. */
  readonly files: readonly FileVersion[];
  /** Names of all tensors, for messages and tests. */
  readonly names: readonly string[];
  /** Bytes of all tensors by dtype, as the files spell it: those that are never asked for (I64 positions) included. */
  readonly bytesByDType: Readonly<Record<string, number>>;
}

interface OpenWeightsOptions {
  /** For example "fp16". A part that has no such files is opened without a variant, as diffusers does. */
  readonly variant?: string | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Opens `basename.safetensors`, or the shards of `basename.safetensors.index.json`, or a variant of either.
 *
 * @param basename "model" for text encoders, "diffusion_pytorch_model" for the others.
 * @throws CheckpointError if there are none, or an index or header is wrong. `signal.reason` after an abort.
 */
export async function openWeights(
  folder: string,
  basename: string,
  options: OpenWeightsOptions = {},
): Promise<Weights> {
  const { variant, signal } = options;
  signal?.throwIfAborted();
  const present = await listFolder(folder);
  const variantsFound = findVariants(present, basename);
  for (const candidate of variant === undefined ? [null] : [variant, null]) {
    const single = fileName(basename, candidate);
    const index = indexNames(basename, candidate).find((name) => present.includes(name));
    const found = { variant: candidate, variantsFound };
    if (present.includes(single)) {
      const file = await openFile(join(folder, single), signal);
      return source(folder, found, [file], new Map([...file.header.keys()].map((name) => [name, file])));
    }
    if (index !== undefined) {
      const { files, tensors } = await openShards(folder, index, signal);
      return source(folder, found, files, tensors);
    }
  }
  throw new CheckpointError(folder, explainAbsence(folder, basename, variant, present, variantsFound));
}

interface OpenedFile extends FileVersion {
  readonly header: SafetensorsHeader;
}

function source(
  folder: string,
  found: Pick<Weights, "variant" | "variantsFound">,
  files: readonly OpenedFile[],
  tensors: ReadonlyMap<string, OpenedFile>,
): Weights {
  const bytesByDType: Record<string, number> = {};
  for (const [name, { header }] of tensors) {
    const { dtype, length } = header.get(name)!;
    bytesByDType[dtype] = (bytesByDType[dtype] ?? 0) + length;
  }
  return {
    ...{ ...found, origin: folder, bytesByDType },
    files: files.map(({ file, size, mtimeMs }) => ({ file, size, mtimeMs })),
    names: [...tensors.keys()],
    find(name: string): StoredTensor | undefined {
      return resolveTensor((stored) => {
        const opened = tensors.get(stored);
        return opened && { file: opened.file, entry: opened.header.get(stored)! };
      }, name);
    },
  };
}

async function openFile(path: string, signal: AbortSignal | undefined): Promise<OpenedFile> {
  signal?.throwIfAborted();
  const file = await realpath(path).catch((cause) => {
    // readdir lists a link whether or not its target exists: an interrupted download leaves such links behind.
    throw new CheckpointError(
      path,
      `${path} cannot be opened; if it is a symbolic link, the file it points to is missing. Download the checkpoint again.`,
      { cause },
    );
  });
  const header = await readSafetensorsHeader(file, { signal });
  const { size, mtimeMs } = await stat(file);
  return { file, size, mtimeMs, header };
}

const indexSchema = z.object({ weight_map: z.record(z.string(), z.string()) });

async function openShards(folder: string, indexName: string, signal: AbortSignal | undefined) {
  const indexFile = join(folder, indexName);
  const text = readFile(indexFile, "utf8");
  const json: unknown = await text.then(JSON.parse).catch((cause: Error) => {
    throw new CheckpointError(indexFile, `Cannot read ${indexFile}: ${cause.message}`, { cause });
  });
  const parsed = indexSchema.safeParse(json);
  if (!parsed.success)
    throw new CheckpointError(
      indexFile,
      `${indexFile} is not an index of shards: expected "weight_map", which maps the names of tensors to files.`,
    );
  const weightMap = Object.entries(parsed.data.weight_map);
  const shardNames = [...new Set(weightMap.map(([, shard]) => shard))];
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
        return [shard, await openFile(path, signal)] as const;
      }),
    ),
  );
  const tensors = new Map<string, OpenedFile>();
  for (const [name, shard] of weightMap) {
    const file = opened.get(shard)!;
    if (!file.header.has(name))
      throw new CheckpointError(
        join(folder, shard),
        `${join(folder, shard)} lacks the tensor "${name}" that ${indexFile} says it holds. Index and shards are of ` +
          "different downloads: download them again.",
      );
    tensors.set(name, file);
  }
  return { files: [...opened.values()], tensors };
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

function fileName(basename: string, variant: string | null): string {
  return variant === null ? `${basename}.safetensors` : `${basename}.${variant}.safetensors`;
}

/** The present spelling of transformers and diffusers first, then the two older ones. */
function indexNames(basename: string, variant: string | null): string[] {
  if (variant === null) return [`${basename}.safetensors.index.json`];
  return [
    `${basename}.safetensors.index.${variant}.json`,
    `${basename}.${variant}.safetensors.index.json`,
    `${basename}.safetensors.${variant}.index.json`,
  ];
}

function findVariants(present: readonly string[], basename: string): string[] {
  // The names of a variant "*", with what may stand there.
  const spellings = [fileName(basename, "*"), ...indexNames(basename, "*")].map(
    (name) => new RegExp(`^${name.replaceAll(".", "\\.").replace("*", "([\\w-]+)")}$`),
  );
  const found = present.flatMap((name) => spellings.flatMap((spelling) => spelling.exec(name)?.[1] ?? []));
  // A shard of a variant, "fp16-00001-of-00002", is no variant of its own.
  return [...new Set(found)].filter((variant) => !/-\d+-of-\d+$/.test(variant)).sort();
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
  return `${folder} has no weights: expected ${expected}. Download the checkpoint's remaining files.`;
}

function list(names: readonly string[]): string {
  return names.map((name) => `"${name}"`).join(", ");
}
