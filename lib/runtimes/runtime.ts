/**
 * What a runtime is: something that compiles graphs and runs programs. The pipeline sees only this interface, so that
 * ONNX Runtime on the CPU and TensorRT on a GPU receive the same graphs and the same program.
 */

import type { Launch, Program } from "../program.js";
import type { StoredTensor, Tensor } from "../tensor.js";

export type RuntimeName = "onnxruntime" | "tensorrt" | "tensorrt-rtx";

/**
 * An ONNX model whose large initializers are external data in the checkpoint's own files. The location of each is its
 * path relative to the root of the file system.
 */
export interface CompilableGraph {
  readonly name: string;
  readonly bytes: Uint8Array;
  /** Initializers by the name they have in the ONNX, for runtimes that map the files themselves. */
  readonly externals: ReadonlyMap<string, StoredTensor>;
  /** SHA-256 of the graph without the places of its weights, for runtimes that keep what they compile. */
  readonly fingerprint: string;
}

/** One finished launch. */
export interface LaunchReport {
  readonly launch: Launch;
  readonly index: number;
  readonly milliseconds: number;
  /** Values of the registers that the launch names in `reported`. */
  readonly values: Readonly<Record<string, Tensor>>;
}

export interface RunOptions {
  /** Aborting stops the program before its next launch; the run rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
  /** Called after each launch, in order. An error it throws stops the program and rejects the run. */
  readonly onLaunch?: ((report: LaunchReport) => void) | undefined;
}

export interface Runtime {
  readonly name: RuntimeName;
  /** Names a graph so that programs can launch it. Compiling it may wait until its first launch. */
  add(graph: CompilableGraph): void;
  has(name: string): boolean;
  /** Runs a program; programs given at the same time run one after another, in order. */
  run(program: Program, options?: RunOptions): Promise<Record<string, Tensor>>;
  /** Waits for the run in flight to stop, then frees everything. Later calls reject with a DisposedError. */
  dispose(): Promise<void>;
}
