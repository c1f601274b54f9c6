/**
 * A low-rank branch beside the linear layers of a network, as adapters (LoRA) have it: y += ((x·down) ∘ scale)·up. Its
 * matrices are inputs of the graph, so that one graph serves all adapters of a rank, and each row may have its own: the matrices of all layers lie
 * behind each other in two inputs, and each layer takes its part.
 */

import type { ElementType, GraphBuilder, OnnxGraph, Value } from "../onnx/index.js";

/** Ranks that graphs come in: an adapter is padded to the next one. */
export const loraRanks = [8, 16, 32, 64, 128] as const;
/** A rank that graphs come in: those of dynamic LoRAs are padded to the next one. */
export type LoraRank = (typeof loraRanks)[number];

/** Where the matrices of a linear layer are. */
export interface LowRankLayer {
  /** Name of the layer in the checkpoint, without ".weight". */
  readonly module: string;
  readonly in: number;
  readonly out: number;
  /** First value of its down matrix, [in, rank] row-major, in a row of `lora_down`. */
  readonly downOffset: number;
  /** First value of its up matrix, [rank, out] row-major, in a row of `lora_up`. */
  readonly upOffset: number;
}

/** The inputs `lora_down` [rows, down], `lora_up` [rows, up] and `lora_scale` [rows, rank] of a graph. */
export interface LowRankLayout {
  readonly rank: LoraRank;
  readonly down: number;
  readonly up: number;
  /** In the order in which the network computes them. */
  readonly layers: readonly LowRankLayer[];
}

/** A graph of a network; `lowRank` says where the matrices of its branch are, where it has one. */
export interface NetworkGraph extends OnnxGraph {
  readonly lowRank?: LowRankLayout | undefined;
}

export class LowRankBranch {
  readonly #g: GraphBuilder;
  readonly #rank: LoraRank;
  readonly #compute: ElementType;
  readonly #layers = new Map<string, LowRankLayer>();
  /** Inputs of layers with their rows in groups, and values that all layers share. */
  readonly #shared = new Map<string, Value>();
  #down = 0;
  #up = 0;

  /** @param compute the type that the network computes in */
  constructor(g: GraphBuilder, rank: LoraRank, compute: ElementType) {
    this.#g = g;
    this.#rank = rank;
    this.#compute = compute;
  }

  /**
   * What the branch adds to a linear layer's result. The rows of x are those of the inputs, or as many groups of them, one after the
   * other (guidance: the unconditional rows, then the conditional ones): in each group row b takes the matrices of row b.
   * @param x [groups · rows, tokens, in], or [groups · rows, in]
   * @param hasTokens which of them it is
   * @returns as x, with `out` in place of `in`
   */
  beside(x: Value, module: string, from: number, to: number, hasTokens: boolean): Value {
    const g = this.#g;
    const { downOffset, upOffset } = this.#layer(module, from, to);
    const part = (input: string, offset: number, height: number, width: number) => {
      const bounds = [g.ints([offset]), g.ints([offset + height * width]), g.ints([1])];
      const values = g.op("Slice", [{ name: input, type: "float32" }, ...bounds]);
      return g.cast(g.op("Reshape", [values, g.ints([0, height, width])]), this.#compute);
    };
    // The matrices, [rows, in, rank] and [rows, rank, out], are broadcast over the groups.
    const inner = g.op("MatMul", [this.#grouped(x, from, hasTokens), part("lora_down", downOffset, from, this.#rank)]);
    const scaled = g.op("Mul", [inner, this.#once("scale", () => this.#scale())]);
    const added = g.op("MatMul", [scaled, part("lora_up", upOffset, this.#rank, to)]);
    const shape = hasTokens ? [g.ints([-1]), g.shapeOf(x, 1, 2), g.ints([to])] : [g.ints([-1, to])];
    return g.op("Reshape", [added, shape.length > 1 ? g.concat(shape, 0) : shape[0]!]);
  }

  /** Declares the inputs: to be called when all layers are there. */
  close(): LowRankLayout {
    const [rank, down, up] = [this.#rank, this.#down, this.#up];
    this.#g.input("lora_down", "float32", ["rows", down]);
    this.#g.input("lora_up", "float32", ["rows", up]);
    this.#g.input("lora_scale", "float32", ["rows", rank]);
    return { rank, down, up, layers: [...this.#layers.values()] };
  }

  /** A layer's place. One that is computed twice, on other rows, has one. */
  #layer(module: string, from: number, to: number): LowRankLayer {
    const known = this.#layers.get(module);
    if (known) return known;
    const layer = { module, in: from, out: to, downOffset: this.#down, upOffset: this.#up };
    this.#layers.set(module, layer);
    this.#down += from * this.#rank;
    this.#up += this.#rank * to;
    return layer;
  }

  /** [groups, rows, tokens, in]; layers that read the same value share it. */
  #grouped(x: Value, from: number, hasTokens: boolean): Value {
    const g = this.#g;
    return this.#once(`grouped ${x.name}`, () => {
      const tokens = hasTokens ? g.shapeOf(x, 1, 2) : g.ints([1]);
      const rows = this.#once("rows", () => g.shapeOf({ name: "lora_scale", type: "float32" }, 0, 1));
      return g.op("Reshape", [x, g.concat([g.ints([-1]), rows, tokens, g.ints([from])], 0)]);
    });
  }

  /** [rows, 1, rank] */
  #scale(): Value {
    const g = this.#g;
    const scale: Value = { name: "lora_scale", type: "float32" };
    return g.cast(g.op("Unsqueeze", [scale, g.ints([1])]), this.#compute);
  }

  #once(key: string, make: () => Value): Value {
    const value = this.#shared.get(key) ?? make();
    this.#shared.set(key, value);
    return value;
  }
}
