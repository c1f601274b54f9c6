/**
 * The engines on the device: loaded at a graph's first launch, replaced by one with more profiles when a program brings
 * new shapes, released to make room for others.
 */

import type { Logger } from "../../common/logger.js";
import { gigabytes } from "../../common/memory.js";
import type { Tensor } from "../../common/tensor.js";
import { MemoryError, RuntimeError } from "../../errors.js";
import type { Launch, Program } from "../../program/program.js";
import { type ProfileShapes, profileKey } from "../builder.js";
import type { CompilableGraph } from "../runtime.js";
import type { NativeEngine, NativeError, NativeExecutor } from "./addon.js";
import type { SharedDevice } from "./device.js";
import { explainEngine } from "./failures.js";
import { layOutRegisters, type ProfiledEngine } from "./layout.js";

/** Where engines come from: `EngineCompiler`, or in tests whatever stands in for it. */
export interface EngineSource {
  /**
   * A verified engine with a profile for each of `profiles`; one that has those of `kept` too is better, since an engine's
   * weights are on the device once however many profiles it has.
   * @returns its file, and the identity of that as `fileIdentity` says
   */
  engineFor(
    graph: CompilableGraph,
    profiles: readonly ProfileShapes[],
    kept: readonly ProfileShapes[],
    signal: AbortSignal,
  ): Promise<{ readonly plan: string; readonly identity: string }>;
}

interface LoadedEngine {
  readonly native: NativeEngine;
  /** Input shapes, profile by profile, and the profiles by those. */
  readonly shapes: readonly ProfileShapes[];
  readonly profiles: ReadonlyMap<string, number>;
  /** Shapes of all tensors in the profiles that are ready. */
  readonly prepared: Map<number, readonly (readonly number[])[]>;
}

export interface LoadedEnginesOptions {
  readonly device: SharedDevice;
  readonly source: EngineSource;
  /** By name; more may be added at any time. */
  readonly graphs: ReadonlyMap<string, CompilableGraph>;
  /** Called when an engine is released that may be in use by CUDA graphs. */
  readonly onRelease: (graph: string) => void;
  /** Aborts when the runtime is disposed of, which does not wait for a build. */
  readonly closing: AbortSignal;
  readonly logger: Logger | undefined;
}

export class LoadedEngines {
  readonly #options: LoadedEnginesOptions;
  readonly #engines = new Map<string, LoadedEngine>();

  constructor(options: LoadedEnginesOptions) {
    this.#options = options;
  }

  /**
   * Loads the engines of a program's launches and makes their profiles ready.
   * @returns the engine of each launch, in the profile that fits its inputs
   * @throws MemoryError, CompileError, CacheError, DeviceLostError, `signal.reason`
   */
  async ready(
    executor: NativeExecutor,
    program: Pick<Program, "registers" | "instructions">,
    constants: ReadonlyMap<string, Tensor>,
    signal: AbortSignal | undefined,
  ): Promise<(launch: Launch) => ProfiledEngine> {
    const shapesOf = (launch: Launch): ProfileShapes =>
      Object.fromEntries(
        Object.entries(launch.inputs).map(([input, name]) => [
          input,
          (constants.get(name) ?? program.registers[name]!).shape,
        ]),
      );
    const launches = program.instructions.filter((instruction) => instruction.op === "launch");
    const graphs = new Set(launches.map(({ graph }) => graph));
    this.#checkMemory(executor, program.registers, constants, graphs);
    for (const graph of graphs) {
      const needed = new Map<string, ProfileShapes>();
      for (const launch of launches)
        if (launch.graph === graph) needed.set(profileKey(shapesOf(launch)), shapesOf(launch));
      const engine = await this.#engine(executor, graph, [...needed.values()], graphs, signal);
      for (const key of needed.keys()) {
        const profile = engine.profiles.get(key);
        if (profile === undefined || engine.prepared.has(profile)) continue;
        signal?.throwIfAborted();
        const prepare = () => this.#explained(executor.prepare(engine.native.id, profile).promise, graph);
        engine.prepared.set(profile, await this.#withRoom(graph, graphs, prepare));
      }
    }
    const scratch = launches.map(({ graph, ...launch }) => {
      const { native, profiles } = this.#engines.get(graph)!;
      return native.scratchBytes[profiles.get(profileKey(shapesOf({ graph, ...launch })))!] ?? 0;
    });
    this.#checkMemory(executor, program.registers, constants, graphs, Math.max(0, ...scratch));
    // As they are now: others may load and release engines before this program has ended.
    const engines = new Map([...graphs].map((graph) => [graph, this.#engines.get(graph)!]));
    return (launch) => {
      const { native, profiles, prepared } = engines.get(launch.graph)!;
      const shapes = shapesOf(launch);
      const profile = profiles.get(profileKey(shapes));
      const inputs = Object.entries(shapes).map(([name, shape]) => `${name} [${shape}]`);
      if (profile === undefined)
        throw new RuntimeError(
          `The graph "${launch.graph}" (${launch.label.name}) failed: its engine has no profile for the inputs ${inputs.join(", ")}.`,
        );
      return { engine: native, profile, shapes: prepared.get(profile)! };
    };
  }

  release(graph: string): void {
    const engine = this.#engines.get(graph);
    if (!engine) return;
    engine.native.release();
    this.#engines.delete(graph);
    this.#options.onRelease(graph);
  }

  clear(): void {
    for (const graph of [...this.#engines.keys()]) this.release(graph);
  }

  /**
   * Refuses what the device could not hold if it were empty: weights, registers, constants, and scratch memory where it is
   * known. Before an engine is built its weights are those of the checkpoint.
   * @throws MemoryError with both numbers
   */
  #checkMemory(
    { device }: NativeExecutor,
    registers: Program["registers"],
    constants: ReadonlyMap<string, Tensor>,
    names: ReadonlySet<string>,
    scratchBytes = 0,
  ): void {
    const { graphs } = this.#options;
    let needed = layOutRegisters(registers).bytes + scratchBytes;
    for (const { data } of constants.values()) needed += data.byteLength;
    for (const name of names) {
      const loaded = this.#engines.get(name);
      if (loaded) needed += loaded.native.weightBytes;
      else for (const { length } of graphs.get(name)!.externals.values()) needed += length;
    }
    if (needed <= device.memoryBytes) return;
    throw new MemoryError(
      `This program needs at least ${gigabytes(needed)} GB of GPU memory for the weights of ${[...names].join(", ")} and its own values, but ${device.name} has ${gigabytes(device.memoryBytes)} GB. Draw fewer or smaller pictures at once, or use a larger GPU.`,
      needed,
      device.memoryBytes,
    );
  }

  async #engine(
    executor: NativeExecutor,
    name: string,
    needed: readonly ProfileShapes[],
    using: ReadonlySet<string>,
    signal: AbortSignal | undefined,
  ): Promise<LoadedEngine> {
    const present = this.#engines.get(name);
    if (present && needed.every((shapes) => present.profiles.has(profileKey(shapes)))) return present;
    const { source, graphs, closing } = this.#options;
    const stop = signal ? AbortSignal.any([signal, closing]) : closing;
    const { plan, identity } = await source.engineFor(graphs.get(name)!, needed, present?.shapes ?? [], stop);
    signal?.throwIfAborted();
    // The old one makes room first: its weights are the same.
    this.release(name);
    const native = await this.#withRoom(name, using, () =>
      this.#explained(executor.load(plan, identity).promise, name),
    );
    const shapes = native.profiles.map((dimensions) =>
      Object.fromEntries(
        native.tensors.flatMap(({ name: tensor, input }, index) => (input ? [[tensor, dimensions[index]!]] : [])),
      ),
    );
    const profiles = new Map(shapes.map((profile, index) => [profileKey(profile), index]));
    const loaded: LoadedEngine = { native, shapes, profiles, prepared: new Map() };
    this.#engines.set(name, loaded);
    return loaded;
  }

  /**
   * Does `work`, and again without the engines that the program does not launch if memory does not suffice: they are
   * loaded again from the cache at their next launch.
   */
  async #withRoom<T>(name: string, using: ReadonlySet<string>, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      const others = [...this.#engines.keys()].filter((other) => !using.has(other));
      if (!(error instanceof MemoryError) || others.length === 0) throw error;
      this.#options.logger?.warn?.(
        `To make room for ${name} on the GPU, these engines are released: ${others.join(", ")}.`,
      );
      for (const other of others) this.release(other);
      return work();
    }
  }

  /** Settles as `work` does, with the addon's errors explained. */
  #explained<T>(work: Promise<T>, graph: string): Promise<T> {
    return work.catch((error: NativeError) => {
      this.#options.device.note(error);
      throw explainEngine(error, graph);
    });
  }
}
