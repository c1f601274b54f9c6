/**
 * The table of runtimes, in the order in which "auto" tries them. Everything that lists runtimes (option values, flags,
 * `flowturbo doctor`) follows from it; the rest of the package asks for capabilities and compares no names.
 */

import { FlowTurboError } from "../errors.js";
import { onnxruntime } from "./onnxruntime/row.js";
import type { ModelWeights, OpenedRuntime, RuntimeRow, RuntimeSettings } from "./runtime.js";
import { tensorRtRow } from "./tensorrt/row.js";

const rows = {
  tensorrt: tensorRtRow("tensorrt"),
  "tensorrt-rtx": tensorRtRow("tensorrt-rtx"),
  onnxruntime,
} satisfies Record<string, RuntimeRow>;

export type RuntimeName = keyof typeof rows;
/** Runtimes that engines can be built for. */
export type BuilderName = Exclude<RuntimeName, "onnxruntime">;

/** The table of runtimes by name. */
export const runtimes: Readonly<Record<string, RuntimeRow>> = rows;

export const runtimeNames = () => Object.keys(runtimes) as RuntimeName[];
export const builderNames = () => runtimeNames().filter((name) => name !== "onnxruntime") as BuilderName[];

/** The runtime of a model, and why those that would be preferred were passed over. */
export interface RuntimeChoice {
  readonly name: string;
  readonly passedOver: readonly { readonly name: string; readonly reason: string }[];
}

/**
 * Opens the runtime of that name; with "auto" the first one that can be used here.
 * @param check refuses a runtime that has been opened; with "auto" the next one is tried
 * @throws what opening it, or with "auto" the last one, throws
 */
export async function openRuntime(
  wanted: string,
  settings: RuntimeSettings,
  weights: ModelWeights,
  check: (opened: OpenedRuntime) => void = () => {},
): Promise<OpenedRuntime & { readonly choice: RuntimeChoice }> {
  const passedOver: { name: string; reason: string }[] = [];
  const rows = wanted === "auto" ? Object.values(runtimes) : [runtimes[wanted]!];
  for (const [index, row] of rows.entries()) {
    const isLast = index === rows.length - 1;
    const reason = isLast ? null : await row.find(settings);
    if (reason !== null) {
      passedOver.push({ name: row.name, reason });
      continue;
    }
    let opened: OpenedRuntime | null = null;
    try {
      opened = await row.open(settings, weights);
      check(opened);
      return { ...opened, choice: { name: row.name, passedOver } };
    } catch (error) {
      await opened?.runtime.dispose();
      if (isLast || !(error instanceof FlowTurboError)) throw error;
      passedOver.push({ name: row.name, reason: error.message });
    }
  }
  throw new RangeError("The table of runtimes is empty.");
}
