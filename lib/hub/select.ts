/**
 * Which files of a repository are downloaded: those that are read, in one precision, and nothing beside them (weights in other
 * forms and precisions, single-file checkpoints, pictures). The rule is that of lib/checkpoint/weights.ts, over a listing in
 * place of a folder; a test holds the two together.
 */

import { indexFiles, isElsewhere, readIndexEntry, remedyForParts } from "../common/model-index.js";
import { encoderBeside, variantsIn, weightSources } from "../common/weight-names.js";

export interface Wanted {
  /** Precision variant, such as "fp16". A part without it is taken without a variant, as diffusers does. */
  readonly variant?: string | undefined;
  /** Whether the third text encoder (T5) is taken, where there is one. Default: true. */
  readonly textEncoder3?: boolean | undefined;
  /** What the repository is taken for. Default: a model if it has an index of parts, else one network. */
  readonly kind?: "model" | "autoencoder" | "controlnet" | undefined;
  /** Taken as the base of a file: the parts, by their names, whose weights that file has. Its own weights of these are not taken. */
  readonly baseOf?: readonly string[] | undefined;
}

/** Paths of the files of a repository. */
type Paths = Pick<ReadonlyMap<string, unknown>, "has" | "keys"> | ReadonlySet<string>;

/** A repository lacks what is needed, or is of another kind. */
export class SelectionError extends Error {}

/** The configuration of a repository that is one network: an autoencoder, or a ControlNet. */
const networkConfig = "config.json";

/** What is said of a repository that is no such network. */
const networkNames = {
  autoencoder: "one autoencoder, such as madebyollin/taesd3",
  controlnet: "one ControlNet, such as InstantX/SD3-Controlnet-Canny",
} as const;

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

/** The files that say what a repository is, the one that counts first. */
export function firstFiles({ kind }: Wanted): readonly string[] {
  const isNetwork = kind !== undefined && kind !== "model";
  return [...(isNetwork ? [] : indexFiles), ...(kind === "model" ? [] : [networkConfig])];
}

/** The file that says what a repository is, and is read before all others. @throws SelectionError for one of another kind */
export function firstFile(paths: Paths, wanted: Wanted): string {
  const { kind } = wanted;
  const first = firstFiles(wanted).find((name) => paths.has(name));
  if (first !== undefined) return first;
  const single = [...paths.keys()].filter((path) => path.endsWith(".safetensors") && !path.includes("/"));
  throw new SelectionError(
    (kind === "autoencoder" || kind === "controlnet"
      ? `has no config.json, so it is not ${networkNames[kind]}`
      : "has no model_index.json, so it is not in the diffusers layout") +
      (single.length > 0 ? `; a file of it is named by owner/name/file: it has ${single.slice(0, 5).join(", ")}` : ""),
  );
}

/** What is taken, before the indexes are read. */
export interface Selection {
  readonly files: readonly string[];
  /** Indexes of shards: the files that they name are taken too. They are among `files`. */
  readonly indexes: readonly string[];
}

/**
 * @param first what the first file holds
 * @throws SelectionError if a part that it names is missing, has no weights that can be read, or none has the variant
 */
export function select(paths: Paths, first: unknown, wanted: Wanted): Selection {
  const name = firstFile(paths, wanted);
  return name === networkConfig
    ? selectNetwork(paths, wanted)
    : selectModel(paths, name, (first ?? {}) as Record<string, unknown>, wanted);
}

/** The files of a name with a file in it. @throws SelectionError without that file */
export function selectFile(paths: Paths, file: string): string[] {
  if (!paths.has(file)) throw new SelectionError(`lacks the file ${file}`);
  const encoder = encoderBeside(file);
  return encoder !== null && paths.has(encoder) ? [file, encoder] : [file];
}

function selectNetwork(paths: Paths, { variant }: Wanted): Selection {
  const { path } = chooseWeights(paths, "", ofDiffusers, variant);
  return { files: [networkConfig, path], indexes: path.endsWith(".json") ? [path] : [] };
}

function selectModel(
  paths: Paths,
  index: string,
  named: Record<string, unknown>,
  { variant, textEncoder3 = true, baseOf }: Wanted,
): Selection {
  const files = [index, ...rootFiles.filter((name) => !baseOf && paths.has(name))];
  const indexes: string[] = [];
  const variants = new Set<string>();
  let hasVariant = false;
  for (const { name: part, files: wanted, weights, t5, unnamed } of partRows) {
    const entry = readIndexEntry(part, named[part]);
    const { folder, origin } = entry;
    const isThere = !isElsewhere(entry) && [...paths.keys()].some((path) => path.startsWith(`${folder}/`));
    // A refiner is no part of a base.
    if (unnamed ? !isThere || baseOf : entry.className === null || (t5 && !textEncoder3)) continue;
    if (!isThere)
      throw new SelectionError(
        `lacks ${folder === "." ? `the part ${part}` : `the folder ${folder}`}, though ${index} names this part` +
          (origin === undefined ? "" : ` (of ${origin}). ${remedyForParts(origin)}`) +
          (t5 ? "; textEncoder3: false (--no-t5) leaves T5 out" : ""),
      );
    files.push(...wanted.map((name) => `${folder}/${name}`).filter((path) => paths.has(path)));
    if (!weights || baseOf?.includes(part)) continue;
    for (const found of variantsOf(paths, folder, weights)) variants.add(found);
    const chosen = chooseWeights(paths, folder, weights, variant ?? entry.variant);
    hasVariant ||= chosen.isVariant;
    files.push(chosen.path);
    if (chosen.path.endsWith(".json")) indexes.push(chosen.path);
  }
  // The parts that are taken of a base may be those without variants.
  if (variant === undefined || hasVariant || baseOf) return { files, indexes };
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
    const path = `${index.slice(0, index.lastIndexOf("/") + 1)}${name}`;
    if (typeof name !== "string" || name.includes("/") || !name.endsWith(".safetensors") || !paths.has(path))
      throw new SelectionError(`lacks the file ${path} that ${index} names`);
    return path;
  });
}

/** @param folder of the part; "" for the repository's own */
function chooseWeights(
  paths: Paths,
  folder: string,
  basename: string,
  variant: string | undefined,
): { path: string; isVariant: boolean } {
  const beginning = folder === "" ? "" : `${folder}/`;
  for (const candidate of variant === undefined ? [null] : [variant, null]) {
    const sources = weightSources(basename, candidate);
    const path = sources.map((name) => beginning + name).find((each) => paths.has(each));
    if (path !== undefined) return { path, isVariant: candidate !== null };
  }
  const variants = variantsOf(paths, folder, basename).map((name) => `"${name}"`);
  const others = [...paths.keys()].some(
    (path) => path.startsWith(beginning) && /\.(bin|msgpack|h5|onnx|ckpt)$/.test(path),
  );
  throw new SelectionError(
    `has no weights${folder === "" ? "" : ` for ${folder}`} in .safetensors files${variant === undefined ? "" : ` ("${variant}" or plain)`}` +
      (variants.length > 0 ? `; variants found: ${variants.join(", ")}` : others ? ", only in other forms" : ""),
  );
}

function variantsOf(paths: Paths, folder: string, basename: string): string[] {
  const beginning = folder === "" ? "" : `${folder}/`;
  const names = [...paths.keys()].flatMap((path) => (path.startsWith(beginning) ? path.slice(beginning.length) : []));
  return variantsIn(names, basename);
}
