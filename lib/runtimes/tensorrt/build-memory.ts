/**
 * Memory for builds: they go on at the same time as long as they fit into memory together, first come, first served. One
 * that does not fit even alone is refused, since running out of memory would end the process.
 */

import { Gate } from "../../common/gate.js";
import { availableMemory, gigabytes } from "../../common/memory.js";
import { MemoryError } from "../../errors.js";
import type { CompilableGraph } from "../runtime.js";

/**
 * Memory that a build takes at its peak, as a multiple of the weights and beside the library's own: measured with
 * TensorRT-RTX 1.7 (bench/build), where plan and weights in the library's arrangement stand beside each other; the mapped
 * weights themselves can be dropped at any time.
 */
const buildFactor = 3;

export class BuildMemory {
  readonly #base: number;
  readonly #available: () => number;
  readonly #gate: Gate;

  /**
   * @param base bytes that a build of the library takes whatever the graph
   * @param limit bytes that builds may take; default: what is available at that moment
   */
  constructor(base: number, limit?: number) {
    this.#base = base;
    this.#available = () => limit ?? availableMemory();
    this.#gate = new Gate({ capacity: this.#available });
  }

  /** Why the build of a graph is refused, with both numbers; null if it fits where it is alone. */
  refusal(graph: CompilableGraph): MemoryError | null {
    const needed = this.#needed(graph);
    const available = this.#available();
    if (needed <= available) return null;
    return new MemoryError(
      `Building the engine of ${graph.name} takes about ${gigabytes(needed)} GB of memory, but ${gigabytes(available)} GB are available. ` +
        "Free some, build on a larger machine and copy the cache, or raise the limit (memory) if you know better.",
      needed,
      available,
    );
  }

  /**
   * Waits until a build fits beside those under way.
   * @returns a function to be called at its end
   * @throws MemoryError if it does not fit even alone; `signal.reason`
   */
  async enter(graph: CompilableGraph, signal: AbortSignal | undefined): Promise<() => void> {
    const leave = await this.#gate.enter(undefined, this.#needed(graph), signal);
    // The gate lets anything in that is alone.
    const refusal = this.refusal(graph);
    if (!refusal) return leave;
    leave();
    throw refusal;
  }

  #needed({ externals }: CompilableGraph): number {
    let weights = 0;
    for (const { length } of externals.values()) weights += length;
    return this.#base + buildFactor * weights;
  }
}
