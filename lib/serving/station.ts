/**
 * A device at work, as the dispatcher has it: its runtime, what launches cost there, the registers of the rows that are there, and
 * what watches over the launch that runs. A model has one for each of its devices.
 */

import { DeviceLostError } from "../errors.js";
import type { Runtime, Workspace } from "../runtimes/runtime.js";
import { CapturedQueue } from "./captured.js";
import type { CostTable } from "./costs.js";
import { Gatherer } from "./gather.js";
import type { GraphShapes } from "./rows.js";
import type { AssignedLaunch } from "./scheduler.js";
import { LaunchWatch, type SlowLaunch } from "./watch.js";

export interface StationOptions {
  /** Shapes of a graph, which is added to the runtime when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  readonly watchdogMs: number;
  readonly onSlow?: ((launch: SlowLaunch) => void) | undefined;
}

export class Station {
  /** Among the model's devices. */
  readonly index: number;
  readonly runtime: Runtime;
  readonly costs: CostTable;
  readonly gatherer: Gatherer;
  readonly captured = new CapturedQueue();
  readonly watch: LaunchWatch;
  workspace: Workspace | null = null;
  /** Whether it is lost for good while others are left. */
  isGone = false;
  /** Milliseconds of the captured programs that wait or run. */
  pendingMs = 0;
  /** Launches, as graph, size and batch, that this workspace has made: the first of each is slower. */
  readonly #warm = new Set<string>();

  constructor(index: number, runtime: Runtime, costs: CostTable, { graph, watchdogMs, onSlow }: StationOptions) {
    this.index = index;
    this.runtime = runtime;
    this.costs = costs;
    this.gatherer = new Gatherer(graph);
    this.watch = new LaunchWatch({
      watchdogMs,
      costOf: ({ graph, size, batch }) => costs.estimate(graph, size, batch),
      isWarm: (launch) => this.#warm.has(keyOf(launch)),
      onSlow: (launch) => onSlow?.(launch),
      onHung: ({ graph, milliseconds }) =>
        runtime.giveUp?.(`has worked on one launch of "${graph}" for ${Math.round(milliseconds / 1000)} s`),
    });
  }

  /** A launch has been made: its cost is observed, unless it was the first of its kind. */
  launched(graph: string, size: string, batch: number, milliseconds: number): void {
    const key = keyOf({ graph, size, batch });
    if (this.#warm.has(key)) this.costs.observe(graph, size, batch, milliseconds);
    this.#warm.add(key);
  }

  /** The runtime has freed what these graphs were compiled to. */
  forget(graphs: readonly string[]): void {
    for (const key of this.#warm) if (graphs.some((graph) => key.startsWith(`${graph}@`))) this.#warm.delete(key);
  }

  /** The workspace is gone, with everything in it. */
  forgetWorkspace(): void {
    this.workspace = null;
    this.gatherer.reset();
    this.#warm.clear();
  }

  /** Frees what the runtime holds. To be called when idle. */
  close(): void {
    this.workspace?.close();
    this.workspace = null;
    this.gatherer.reset();
  }
}

/** Whether an error says that a device is lost for as long as this process lives. */
export function isLostForGood(error: unknown): error is DeviceLostError {
  return error instanceof DeviceLostError && error.permanent;
}

function keyOf({ graph, size, batch }: Pick<AssignedLaunch, "graph" | "size" | "batch">): string {
  return `${graph}@${size} x ${batch}`;
}
