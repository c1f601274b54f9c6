/**
 * Which files of a repository are downloaded: those that are read, in one precision, and nothing beside them (weights in other
 * forms and precisions, single-file checkpoints, pictures). The rule is that of lib/checkpoint/weights.ts, over a listing in
 * place of a folder; a test holds the two together.
 */

import { variantsIn, weightSources } from "../common/weight-names.js";

export interface Wanted {
  /** Precision variant, such as "fp16". A part without it is taken without a variant, as diffusers does. */
  readonly variant?: string | undefined;
  /** Whether the third text encoder (T5) is taken, where there is one. Default: true. */
  readonly textEncoder3?: boolean | undefined;
}

/** Paths of the files of a repository. */
type Paths = Pick<ReadonlyMap<string, unknown>, "has" | "keys"> | ReadonlySet<string>;

/** A repository lacks what is needed, or is of another kind. */
export class SelectionError extends Error {}

export const modelIndex = "model_index.json";

/** Files of the root that are read where they are there. */
const rootFiles = ["schedules.json", "prompts.txt"];

const tokenizerFiles = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];
const vocabularyFiles = ["vocab.json", "merges.txt", "tokenizer.json", "spiece.model"];

interface PartRow {
  readonly name: string;
  /** What is taken of it besides weights, where it is there. */
  readonly files: readonly string[];
  /** The name that weights begin with. Absent from parts without weights. */
  readonly weights?: string;
  /** Whether it is the third text encoder's. */
  readonly t5?: boolean;
  /** A part that model_index.json does not name. */
  readonly unnamed?: boolean;
}

const ofDiffusers = "diffusion_pytorch_model";
const ofTransformers = "model";
const config = ["config.json"];
const vocabulary = [...tokenizerFiles, ...vocabularyFiles];

const partRows: readonly PartRow[] = [
  { name: "scheduler", files: ["scheduler_config.json"] },
  { name: "transformer", files: config, weights: ofDiffusers },
  { name: "vae", files: config, weights: ofDiffusers },
  { name: "refiner", files: config, weights: ofDiffusers, unnamed: true },
  { name: "text_encoder", files: config, weights: ofTransformers },
  { name: "text_encoder_2", files: config, weights: ofTransformers },
  { name: "text_encoder_3", files: config, weights: ofTransformers, t5: true },
  { name: "tokenizer", files: vocabulary },
  { name: "tokenizer_2", files: vocabulary },
  { name: "tokenizer_3", files: vocabulary, t5: true },
];

/** What is taken, before the indexes are read. */
export interface Selection {
  readonly files: readonly string[];
  /** Indexes of shards: the files that they name are taken too. They are among `files`. */
  readonly indexes: readonly string[];
}

/**
 * @param index what model_index.json holds
 * @throws SelectionError if a part that it names is missing, has no weights that can be read, or none has the variant
 */
export function select(paths: Paths, index: unknown, { variant, textEncoder3 = true }: Wanted): Selection {
  const named = (index ?? {}) as Record<string, unknown>;
  const folders = new Set([...paths.keys()].map((path) => path.split("/")[0]));
  const files = [modelIndex, ...rootFiles.filter((name) => paths.has(name))];
  const indexes: string[] = [];
  const variants = new Set<string>();
  let hasVariant = false;
  for (const { name: part, files: wanted, weights, t5, unnamed } of partRows) {
    const entry = named[part];
    const isNamed = (Array.isArray(entry) ? entry[1] : entry) != null;
    if (unnamed ? !folders.has(part) : !isNamed || (t5 && !textEncoder3)) continue;
    if (!folders.has(part))
      throw new SelectionError(
        `lacks the folder ${part}, though model_index.json names this part${t5 ? "; textEncoder3: false (--no-t5) leaves T5 out" : ""}`,
      );
    files.push(...wanted.map((name) => `${part}/${name}`).filter((path) => paths.has(path)));
    if (!weights) continue;
    for (const found of variantsOf(paths, part, weights)) variants.add(found);
    const chosen = chooseWeights(paths, part, weights, variant);
    hasVariant ||= chosen.isVariant;
    files.push(chosen.path);
    if (chosen.path.endsWith(".json")) indexes.push(chosen.path);
  }
  if (variant === undefined || hasVariant) return { files, indexes };
  const found = [...variants].sort().map((name) => `"${name}"`);
  throw new SelectionError(
    `has no part with the variant "${variant}"; ${found.length > 0 ? `variants found: ${found.join(", ")}` : "it has no variants"}`,
  );
}

/** @param json what the index holds. @throws SelectionError for a shard that is missing, or lies in another folder */
export function shardsOf(paths: Paths, index: string, json: unknown): string[] {
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  const names = typeof map === "object" && map !== null ? [...new Set(Object.values(map))] : [];
  if (names.length === 0) throw new SelectionError(`has in ${index} no index of shards`);
  return names.map((name) => {
    const path = `${index.slice(0, index.lastIndexOf("/"))}/${name}`;
    if (typeof name !== "string" || name.includes("/") || !name.endsWith(".safetensors") || !paths.has(path))
      throw new SelectionError(`lacks the file ${path} that ${index} names`);
    return path;
  });
}

function chooseWeights(
  paths: Paths,
  part: string,
  basename: string,
  variant: string | undefined,
): { path: string; isVariant: boolean } {
  for (const candidate of variant === undefined ? [null] : [variant, null]) {
    const sources = weightSources(basename, candidate);
    const path = sources.map((name) => `${part}/${name}`).find((each) => paths.has(each));
    if (path !== undefined) return { path, isVariant: candidate !== null };
  }
  const variants = variantsOf(paths, part, basename).map((name) => `"${name}"`);
  const others = [...paths.keys()].some(
    (path) => path.startsWith(`${part}/`) && /\.(bin|msgpack|h5|onnx|ckpt)$/.test(path),
  );
  throw new SelectionError(
    `has no weights for ${part} in .safetensors files${variant === undefined ? "" : ` ("${variant}" or plain)`}` +
      (variants.length > 0 ? `; variants found: ${variants.join(", ")}` : others ? ", only in other forms" : ""),
  );
}

function variantsOf(paths: Paths, part: string, basename: string): string[] {
  const folder = `${part}/`;
  const names = [...paths.keys()].flatMap((path) => (path.startsWith(folder) ? path.slice(folder.length) : []));
  return variantsIn(names, basename);
}
