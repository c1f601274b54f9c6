/**
 * The messages between the two processes, over Node's IPC channel with structured clones (`serialization: "advanced"`),
 * so that typed arrays, BigInt64Array among them, are sent as bytes. A program is one message: the child never waits for
 * the parent between launches, so a busy event loop cannot delay a step.
 */

import type { Tensor } from "../../common/tensor.js";
import type { LaunchReport, RunOptions } from "../runtime.js";
import type { ConstantPart, PackedProgram } from "./packing.js";

/** How 16-bit weights are widened: at each use, or once when a graph is compiled. */
export type Widening = "lazy" | "folded";

/** ONNX Runtime's execution providers that graphs run on. */
export type Provider = "cpu" | "cuda" | "webgpu";

/** What a child is for: its first message. Its command line has only what it needs to load ONNX Runtime before that. */
export interface HostSettings {
  /** Default: the CPU. */
  readonly provider?: Provider | undefined;
  /** Number of the GPU; default: the first. CUDA only. */
  readonly deviceId?: number | undefined;
  /** A folder with ONNX Runtime's own library and a provider's beside it, to be loaded from there: see load-folder.ts. On the command line. */
  readonly libraries?: string | undefined;
  /** Threads of one operator; undefined leaves the number to ONNX Runtime (all physical cores). */
  readonly threads?: number | undefined;
  /** Of graphs that do not say themselves. */
  readonly weights: Widening;
  /** Folder of optimised graphs, absolute; none are kept without it. */
  readonly optimised?: string | undefined;
}

/** What a child has found out about its device before it is ready. */
export interface DeviceFeatures {
  /** Whether it computes in float16. */
  readonly float16: boolean;
  /** Whether ONNX Runtime's own attention (MultiHeadAttention) comes out right on it. */
  readonly attention: boolean;
}

/** A graph as the child needs it. `root` is the folder that the locations of its weights are relative to. */
export interface SentGraph {
  /** Of all that it is compiled from, so that models which have the same graph share what it is compiled to. */
  readonly digest: string;
  readonly bytes: Uint8Array;
  readonly root: string;
  /** How its 16-bit weights are widened; default: as the settings say. */
  readonly widening?: Widening | undefined;
  /** Whether it may be kept in the folder of optimised graphs. Default: no. */
  readonly mayBeKept?: boolean | undefined;
}

/** What may be asked of a run that was sent: see `ToHost`. */
export type Asked = "abort" | "preempt" | "yield";

/** Everything but what is asked of a run is done in the order in which it is sent. */
export type ToHost =
  /** The first message. */
  | { readonly type: "begin"; readonly settings: HostSettings }
  /** Graphs to be compiled ahead of their first launch, in this order, when nothing runs or waits. One that fails says so at its first launch. */
  | { readonly type: "prepare"; readonly graphs: readonly SentGraph[] }
  | {
      readonly type: "run";
      readonly id: number;
      /** Those of the program that this child has not seen yet. */
      readonly graphs: readonly SentGraph[];
      /** Digests of the graphs by the names that this program has for them. */
      readonly digests: Readonly<Record<string, string>>;
      readonly program: PackedProgram;
      /** Whether each launch is reported as soon as it is done, or those of an interval together. Default: bunched. */
      readonly reports?: RunOptions["reports"];
      /** Keeps the values of this program, and those of the programs before in the same workspace. */
      readonly workspace?: number | undefined;
    }
  /** A part of a long constant of the run of that number, which follows. */
  | ({ readonly type: "part"; readonly id: number } & ConstantPart)
  /** Frees values of a workspace by name, or all of them. */
  | { readonly type: "free"; readonly workspace: number; readonly names: readonly string[] | "all" }
  /** Frees graphs, by digest, with what they were compiled to. To be launched again they have to be sent again. */
  | { readonly type: "unload"; readonly graphs: readonly string[] }
  | { readonly type: "abort"; readonly id: number }
  /** Ends a run before its next launch. */
  | { readonly type: "preempt"; readonly id: number }
  /** The same, once it has made a launch: two models that ask that of each other both go on. */
  | { readonly type: "yield"; readonly id: number };

/** Why a run failed, in a form that survives the channel. */
export type Failure =
  | { readonly kind: "runtime"; readonly message: string }
  /** The device has too little memory; the child is of no use any longer. Bytes where the message has them, else NaN. */
  | { readonly kind: "memory"; readonly message: string; readonly needed: number; readonly available: number }
  /** The device answers no more; nor is the child of any use. */
  | { readonly kind: "lost"; readonly message: string }
  | { readonly kind: "not-finite"; readonly where: string; readonly message: string }
  /** Stopped on request. */
  | { readonly kind: "aborted" }
  /** Preempted, after so many launches, with the results that there are. */
  | { readonly kind: "preempted"; readonly launches: number; readonly results: Record<string, Tensor> };

/** A finished launch: the parent knows the launch by its index. */
export type FinishedLaunch = Omit<LaunchReport, "launch">;

export type FromHost =
  /** ONNX Runtime has loaded, and its device answers. */
  | { readonly type: "ready"; readonly version: string; readonly features: DeviceFeatures | null }
  /** ONNX Runtime cannot be loaded here. */
  | { readonly type: "broken"; readonly message: string }
  /** It has loaded, but its provider has no device. */
  | { readonly type: "deviceless"; readonly message: string }
  /** A run that did not have to wait for another has begun. */
  | { readonly type: "began"; readonly id: number }
  /** Launches have finished, in order. */
  | { readonly type: "launched"; readonly id: number; readonly reports: readonly FinishedLaunch[] }
  /** With the launches that were not reported before. */
  | {
      readonly type: "done";
      readonly id: number;
      readonly reports: readonly FinishedLaunch[];
      readonly results: Record<string, Tensor>;
    }
  | { readonly type: "failed"; readonly id: number; readonly failure: Failure };
