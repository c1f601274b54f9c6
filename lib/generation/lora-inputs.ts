/**
 * Dynamic LoRAs: adapters whose matrices are inputs of the graphs, so that each request names its own. Here they become those
 * inputs. Several of a request are joined along the rank, and padded to a rank that graphs come in: that of the model's largest adapter, so that rows
 * with different adapters share launches, or the next where several do not fit in it.
 */

import { createHash } from "node:crypto";
import { type Checkpoint, type Lora, type LoraPart, type LowRank, readLora } from "../checkpoint/index.js";
import { LruCache } from "../common/lru-cache.js";
import { nearest } from "../common/near.js";
import { type FloatTensor, float32, type StoredTensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { OptionError } from "../errors.js";
import { graphName, type LoraRank, loraRanks, networks } from "../networks/index.js";
import type { GraphLibrary } from "../networks/library.js";
import type { LowRankLayout } from "../networks/low-rank.js";
import type { NamedLora } from "./loras.js";

/** An adapter whose scale each request says. */
export interface DynamicLora extends Lora {
  /** Where a request says none. */
  readonly defaultScale: number;
}

/**
 * Those of a model's adapters that are dynamic.
 * @throws CheckpointError for a file that is no LoRA of the model
 */
export async function dynamicLoras(
  checkpoint: Checkpoint,
  named: readonly NamedLora[],
  signal?: AbortSignal,
): Promise<DynamicLora[]> {
  const loras: DynamicLora[] = [];
  for (const { file, name, scale, dynamic } of named)
    if (dynamic) loras.push({ ...(await readLora(file, checkpoint, { name, signal })), defaultScale: scale });
  return loras;
}

/** An adapter of a request. */
export interface AppliedLora {
  readonly name: string;
  /** Not 0: with that the adapter has no part in the request. */
  readonly scale: number;
}

/** The inputs of a graph's low-rank branch for one row: see `LowRankLayout`. */
export interface LoraValues {
  /** [1, D] */
  readonly down: FloatTensor;
  /** [1, U] */
  readonly up: FloatTensor;
  /** [1, rank] */
  readonly scale: FloatTensor;
}

/** The two that do not depend on scales. */
type PackedMatrices = Pick<LoraValues, "down" | "up">;

/** What has to be known of a model's adapters to settle a request. */
export type LoraFacts = Pick<LoraInputs, "settle" | "layout" | "reading">;

/** Bytes of packed matrices that are kept in memory. */
const cacheBytes = 2 ** 30;

export class LoraInputs {
  readonly #graphs: GraphLibrary;
  /** In the order of loading. */
  readonly #loras = new Map<string, DynamicLora>();
  /** What the largest adapter is padded to; null without adapters. */
  readonly #rank: LoraRank | null;
  readonly #packed: LruCache<{ readonly bytes: number; readonly values: Promise<PackedMatrices> }>;

  /**
   * @param kept bytes of packed matrices that stay in memory
   * @throws OptionError for an adapter of a rank that graphs do not come in
   */
  constructor(graphs: GraphLibrary, loras: readonly DynamicLora[] = [], kept = cacheBytes) {
    this.#graphs = graphs;
    this.#packed = new LruCache(kept, ({ bytes }) => bytes);
    let largest = 0;
    for (const lora of loras) {
      const { name } = lora;
      this.#loras.set(name, lora);
      for (const [part, layers] of lora.parts) {
        const rank = rankOf(layers);
        largest = Math.max(largest, rank);
        if (rankFor(rank) === null)
          throw new OptionError(
            "loras",
            `The LoRA "${name}" has rank ${rank} (${part}), and a dynamic one may have ${loraRanks.at(-1)} at most; load it without dynamic, so that it is merged into the weights.`,
          );
      }
    }
    this.#rank = largest > 0 ? rankFor(largest) : null;
  }

  /**
   * Checks that the branch has a place for all that the adapters change.
   * @throws OptionError that names the layer and the remedy
   */
  check(): void {
    for (const { name, parts } of this.#loras.values())
      for (const [part, layers] of parts) {
        const refuse = (what: string): never => {
          throw new OptionError(
            "loras",
            `The LoRA "${name}" changes ${what}, where a dynamic one cannot be added; load it without dynamic, so that it is merged into the weights.`,
          );
        };
        const network = adaptedNetwork(part) ?? refuse(`the ${part}`);
        const graph = this.#graphs.get(graphName({ network, lora: this.#rank! }));
        const known = new Set(graph.lowRank!.layers.map(({ module }) => module));
        const { weights } = this.#graphs.checkpoint[part]!;
        const read = new Set([...graph.externals.values()].map(placeOf));
        for (const module of layers.keys()) {
          // A layer whose result nothing reads is not computed: of the last block the queries of the text.
          const weight = weights.find(`${module}.weight`);
          if (!known.has(module) && weight && read.has(placeOf(weight))) refuse(`"${module}", no linear layer`);
        }
      }
  }

  /** What requests call them, in the order of loading. */
  get names(): string[] {
    return [...this.#loras.keys()];
  }

  /**
   * The adapters that a request names, in the order of loading, those of scale 0 left out.
   * @throws OptionError for a name that no dynamic adapter has, or that is given twice, or for more than there is a rank for
   */
  settle(
    given: readonly { readonly name: string; readonly scale?: number | undefined }[] = [],
  ): readonly AppliedLora[] {
    const scales = new Map<string, number>();
    for (const { name, scale } of given) {
      const lora = this.#loras.get(name) ?? this.#refuseUnknown(name);
      if (scales.has(name))
        throw new OptionError(
          "loras",
          `The LoRA "${name}" is named twice; name it once, with the scale of both together.`,
        );
      scales.set(name, scale ?? lora.defaultScale);
    }
    const uses = [...this.#loras.keys()].flatMap((name) => {
      const scale = scales.get(name) ?? 0;
      return scale === 0 ? [] : [{ name, scale }];
    });
    for (const network of Object.keys(networks)) this.rank(network, uses);
    return uses;
  }

  /**
   * The rank of the branch that a network's graph needs; null where none of the adapters changes it.
   * @throws OptionError for adapters whose ranks together are more than there is a graph for
   */
  rank(network: string, uses: readonly AppliedLora[]): LoraRank | null {
    const touching = this.touching(network, uses);
    if (touching.length === 0) return null;
    const sum = touching.reduce((total, { name }) => total + rankOf(this.#layers(network, name)!), 0);
    const rank = rankFor(Math.max(sum, this.#rank!));
    if (rank !== null) return rank;
    const names = touching.map(({ name }) => `"${name}"`).join(", ");
    throw new OptionError(
      "loras",
      `The LoRAs ${names} have rank ${sum} together, and those of a request may have ${loraRanks.at(-1)} at most; leave out one, or load one without dynamic, so that it is merged into the weights.`,
    );
  }

  /** The adapters that change a network. */
  touching(network: string, uses: readonly AppliedLora[]): AppliedLora[] {
    return uses.filter(({ name }) => this.#layers(network, name) !== undefined);
  }

  /** The adapters that change a text encoder. */
  reading(uses: readonly AppliedLora[]): AppliedLora[] {
    const encoders = Object.keys(networks).filter((network) => networks[network]!.role === "text");
    return uses.filter((use) => encoders.some((network) => this.touching(network, [use]).length > 0));
  }

  /** Where matrices are in the inputs of the graphs that a network needs; null where none of the adapters changes it. */
  layout(network: string, uses: readonly AppliedLora[]): LowRankLayout | null {
    const rank = this.rank(network, uses);
    return rank && this.#graphs.get(graphName({ network, lora: rank })).lowRank!;
  }

  /**
   * What adapters are as inputs of a network's graphs. The matrices do not depend on scales, and are the same arrays each time, as long as they are kept.
   * @returns null where none of the adapters changes the network
   */
  async values(network: string, uses: readonly AppliedLora[]): Promise<LoraValues | null> {
    const layout = this.layout(network, uses);
    if (!layout) return null;
    const { rank } = layout;
    const touching = this.touching(network, uses);
    const scale = new Float32Array(rank);
    let from = 0;
    for (const { name, scale: each } of touching) {
      const ranks = rankOf(this.#layers(network, name)!);
      scale.fill(each, from, from + ranks);
      from += ranks;
    }
    const key = JSON.stringify([network, digestOf(layout), touching.map(({ name }) => name)]);
    const bytes = 4 * (layout.down + layout.up);
    const matrices = touching.map(({ name }) => this.#layers(network, name)!);
    const known = this.#packed.get(key) ?? this.#packed.set(key, { bytes, values: packed(layout, matrices) });
    return { ...(await known.values), scale: float32([1, rank], scale) };
  }

  /** Whether an adapter is part of the weights. */
  #isMerged(name: string): boolean {
    return this.#graphs.checkpoint.loras.some((merged) => merged.name === name);
  }

  #layers(network: string, name: string): ReadonlyMap<string, LowRank> | undefined {
    const { part, variants } = networks[network]!;
    if (!part || !variants.includes("lora")) return undefined;
    const layers = this.#loras.get(name)?.parts.get(part as LoraPart);
    return layers && layers.size > 0 ? layers : undefined;
  }

  #refuseUnknown(name: string): never {
    if (this.#isMerged(name))
      throw new OptionError(
        "loras",
        `The LoRA "${name}" is merged into the weights, so that requests cannot name it; load it with dynamic: true.`,
      );
    const { names } = this;
    if (names.length === 0) refuseAll(name);
    const near = nearest(name, names);
    throw new OptionError(
      "loras",
      `There is no dynamic LoRA "${name}"${near === null ? "" : ` (did you mean "${near}"?)`}; the model was loaded with ${names.map((each) => `"${each}"`).join(", ")}.`,
    );
  }
}

/** Of a model without dynamic LoRAs. */
export const noLoras: LoraFacts = {
  settle: ([first] = []) => (first ? refuseAll(first.name) : []),
  layout: () => null,
  reading: () => [],
};

function refuseAll(name: string): never {
  throw new OptionError(
    "loras",
    `There is no dynamic LoRA "${name}": the model was loaded without any. Name files in the option loras of load(), with dynamic: true (--dynamic-lora name=file).`,
  );
}

/** The rank of a graph that holds an adapter's; null where there is none. */
function rankFor(rank: number): LoraRank | null {
  return loraRanks.find((each) => each >= rank) ?? null;
}

/** The components of an adapter in one part: those of its largest layer. */
function rankOf(layers: ReadonlyMap<string, LowRank>): number {
  return [...layers.values()].reduce((largest, { rank }) => Math.max(largest, rank), 0);
}

/** The network of a part whose graphs come with a low-rank branch. */
function adaptedNetwork(part: LoraPart): string | undefined {
  return Object.keys(networks).find(
    (name) => networks[name]!.part === part && networks[name]!.variants.includes("lora"),
  );
}

const placeOf = ({ file, offset }: StoredTensor) => `${file} ${offset}`;

const digests = new WeakMap<LowRankLayout, string>();

/** Equal for layouts that are: graphs of several variants share packed matrices. */
function digestOf(layout: LowRankLayout): string {
  const digest = digests.get(layout) ?? createHash("sha256").update(JSON.stringify(layout)).digest("hex");
  digests.set(layout, digest);
  return digest;
}

/**
 * Adapters joined along the rank, each with as many components as its largest layer has; what they do not fill is 0. Alpha by rank is part of the up matrices.
 */
async function packed(
  layout: LowRankLayout,
  adapters: readonly ReadonlyMap<string, LowRank>[],
): Promise<PackedMatrices> {
  const { rank } = layout;
  const down = new Float32Array(layout.down);
  const up = new Float32Array(layout.up);
  for (const { module, in: from, out: to, downOffset, upOffset } of layout.layers) {
    let first = 0;
    for (const adapter of adapters) {
      const layer = adapter.get(module);
      for (let index = 0; index < (layer?.rank ?? 0); index++) {
        const component = first + index;
        for (let i = 0; i < from; i++) down[downOffset + i * rank + component] = layer!.down[index * from + i]!;
        const row = upOffset + component * to;
        for (let o = 0; o < to; o++) up[row + o] = layer!.scale * layer!.up[o * layer!.rank + index]!;
        if (isDue()) await rest();
      }
      first += rankOf(adapter);
    }
  }
  return { down: float32([1, layout.down], down), up: float32([1, layout.up], up) };
}
