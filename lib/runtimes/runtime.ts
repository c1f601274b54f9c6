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
  /** Whether the process may end while this runs: for work that nobody waits for. */
  readonly background?: boolean | undefined;
}

export interface PieceOptions extends RunOptions {
  /**
   * When it aborts, a runtime that `cutsPieces` ends the piece before its next launch: what it uploads is there, the
   * launches made so far have been reported, and `submit` rejects with a PieceCut.
   */
  readonly cut?: AbortSignal | undefined;
}

/** A piece was cut short on request: no failure, the rest of it may be submitted again. */
export class PieceCut extends Error {
  /** How many of the piece's launches were made; fewer than it has. */
  readonly launches: number;
  /** Those of its results that had been written, by this piece or before. */
  readonly results: Readonly<Record<string, Tensor>>;
  constructor(launches: number, results: Readonly<Record<string, Tensor>>) {
    super(`The piece was cut short after ${launches} of its launches.`);
    this.name = "PieceCut";
    this.launches = launches;
    this.results = results;
  }
}

/**
 * Registers that outlive programs, so that a scheduler can submit a run piece by piece, ahead of the device, and gather
 * rows of several runs into one launch. A piece is a program whose instructions may also read what earlier pieces have
 * written or uploaded; everything stays until it is freed by name.
 */
export interface Workspace {
  /** Whether its registers are gone: later pieces would be refused. Start again in a new one. */
  readonly lost: boolean;
  /**
   * Runs a piece after all that were submitted before, without waiting for them here. Where a piece fails or is
   * aborted, the registers that it would have written hold no value or an older one.
   * @throws PieceCut
   */
  submit(piece: Program, options?: PieceOptions): Promise<Record<string, Tensor>>;
  /** Frees registers and constants when the pieces submitted before have run. Unknown names are ignored. */
  free(names: readonly string[]): void;
  /** Frees everything. */
  close(): void;
}

export interface Runtime {
  readonly name: RuntimeName;
  /**
   * Whether pieces can be cut short, so that one piece may hold all of a lone request. Worth having where JavaScript
   * between two pieces takes time from the graphs, as on a CPU; a device runs one piece while the next waits.
   */
  readonly cutsPieces?: boolean;
  /** Names a graph so that programs can launch it. Compiling it may wait until its first launch. */
  add(graph: CompilableGraph): void;
  has(name: string): boolean;
  /** Runs a program; programs given at the same time run one after another, in order. */
  run(program: Program, options?: RunOptions): Promise<Record<string, Tensor>>;
  open(): Workspace;
  /** Frees the memory that graphs take, until their next launch; after the programs given so far. */
  unload?(graphs: readonly string[]): Promise<void>;
  /** Waits for the run in flight to stop, then frees everything. Later calls reject with a DisposedError. */
  dispose(): Promise<void>;
}
