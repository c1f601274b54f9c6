/**
 * The table of runtimes, in the order in which "auto" tries them. Everything that lists runtimes (option values, flags,
 * `flowturbo doctor`) follows from it; the rest of the package asks for capabilities and compares no names.
 */

import { CheckpointError, FlowTurboError, OptionError, RuntimeUnavailableError } from "../errors.js";
import type { BuilderSettings, OpenedBuilder } from "./builder.js";
import { cuda } from "./onnxruntime/cuda.js";
import { onnxruntime } from "./onnxruntime/row.js";
import { webgpu } from "./onnxruntime/webgpu.js";
import type {
  Int8Option,
  LibraryFolders,
  ModelWeights,
  OpenedRuntime,
  RuntimeRow,
  RuntimeSettings,
} from "./runtime.js";
import { type TensorRtKind, tensorRtKinds } from "./tensorrt/flavours.js";
import { tensorRtRow } from "./tensorrt/row.js";

/** Name of a runtime: see the option `runtime` of `FlowTurbo.load`. */
export type RuntimeName = TensorRtKind | "cuda" | "webgpu" | "onnxruntime";
/** Runtimes that engines are built for. */
export type BuilderName = TensorRtKind;

/** The table of runtimes by name. */
export const runtimes: Record<string, RuntimeRow> = {
  ...Object.fromEntries(tensorRtKinds.map((kind) => [kind, tensorRtRow(kind)])),
  cuda,
  webgpu,
  onnxruntime,
};

/** Names of the runtimes that there are when it is called, in the order of the table. */
export function runtimeNames(): RuntimeName[] {
  return Object.keys(runtimes) as RuntimeName[];
}

/** Names of those of them that build engines. */
export function builderNames(): BuilderName[] {
  return runtimeNames().filter((name) => runtimes[name]!.builder) as BuilderName[];
}

/** The runtime of a model, and why those that would be preferred were passed over. */
export interface RuntimeChoice {
  /** Its name in the table of runtimes. */
  readonly name: string;
  /** With `runtime: "auto"`: those that come before it, in their order. */
  readonly passedOver: readonly {
    /** Its name in the table of runtimes. */
    readonly name: string;
    /** Why it could not be used, and what to do about it. */
    readonly reason: string;
  }[];
}

const rowsOf = (wanted: string): readonly RuntimeRow[] =>
  wanted === "auto" ? Object.values(runtimes) : [runtimes[wanted]!];

/**
 * Asked before anything is read: on a platform without binaries other packages may fail first, with advice that cannot help.
 * @throws InstallationError if the runtime of that name has no binaries for this platform; with "auto" if the last one has
 *   none, and no other can be used
 */
export async function checkPlatform(wanted: string, settings: LibraryFolders): Promise<void> {
  const rows = rowsOf(wanted);
  const error = rows.at(-1)?.unsupported?.();
  if (!error) return;
  const others = await Promise.all(rows.slice(0, -1).map((row) => row.find(settings)));
  if (!others.some(({ available }) => available)) throw error;
}

/**
 * Begins what opening the runtime of that name takes longest, with "auto" for the one that is tried last.
 * @returns ends what was begun, where opening a runtime has not used it
 */
export function beginRuntime(wanted: string): () => void {
  return rowsOf(wanted).at(-1)?.begin?.() ?? (() => undefined);
}

/** What is wrong with this platform for the runtime that is tried last; null if nothing is. Looks for no other. */
export function platformWarning(): string | null {
  return rowsOf("auto").at(-1)?.unsupported?.()?.message ?? null;
}

/** What to do where a runtime does not take them. */
const withoutInt8: Readonly<Record<Int8Option, string>> = {
  weights: ": a GPU computes with the weights as they are stored.",
  t5Weights: ", or load a checkpoint whose T5 is stored in 8 bits.",
};

/**
 * @param option that asks for weights that are quantised at load
 * @throws OptionError if the runtime of that name does not compute with such weights; "auto" always finds one
 */
export function checkInt8Weights(wanted: string, option: Int8Option): void {
  const takers = Object.values(runtimes).filter(({ takesInt8Weights }) => takesInt8Weights);
  if (wanted === "auto" || takers.includes(runtimes[wanted]!)) return;
  throw new OptionError(
    option,
    `The runtime ${wanted} does not take ${option} "int8"; ${takers.map(({ name }) => name).join(", ")} does. Leave it away${withoutInt8[option]}`,
  );
}

/**
 * Opens the runtime of that name; with "auto" the first one that can be used here.
 * @param check refuses a runtime that has been opened; with "auto" the next one is tried
 * @throws what opening it, or with "auto" the last one, throws; a CheckpointError at once
 */
export async function openRuntime(
  wanted: string,
  settings: RuntimeSettings,
  weights: ModelWeights,
  check: (opened: OpenedRuntime) => void = () => {},
): Promise<OpenedRuntime & { readonly choice: RuntimeChoice }> {
  const passedOver: { name: string; reason: string }[] = [];
  const rows = rowsOf(wanted);
  for (const [index, row] of rows.entries()) {
    let opened: OpenedRuntime | null = null;
    try {
      if (settings.int8Option) checkInt8Weights(row.name, settings.int8Option);
      opened = await row.open({ ...settings, named: wanted !== "auto" }, weights);
      check(opened);
      return { ...opened, choice: { name: row.name, passedOver } };
    } catch (error) {
      await opened?.runtime.dispose();
      // No other runtime makes up for a fault of the checkpoint.
      const isOwn = error instanceof FlowTurboError && !(error instanceof CheckpointError);
      if (index === rows.length - 1 || !isOwn) throw error;
      passedOver.push({ name: row.name, reason: error.message });
    }
  }
  throw new RangeError("The table of runtimes is empty.");
}

/**
 * Opens what builds engines for the runtime of that name; with "auto" the first one that can build here. Where targets
 * are named, those that take targets are left.
 * @throws RuntimeUnavailableError with every reason if none can build; what opening it throws
 */
export async function openBuilder(
  wanted: string,
  settings: BuilderSettings,
): Promise<OpenedBuilder & { readonly name: string }> {
  const all: readonly string[] = wanted === "auto" ? builderNames() : [wanted];
  const named = settings.targets && settings.targets.length > 0;
  const names = all.filter((name) => wanted !== "auto" || !named || runtimes[name]!.builder!.takesTargets);
  const reasons: string[] = [];
  for (const name of names) {
    try {
      return { ...(await runtimes[name]!.builder!.open(settings)), name };
    } catch (error) {
      // With one builder, its own error says what is missing.
      if (names.length === 1 || !(error instanceof RuntimeUnavailableError)) throw error;
      reasons.push(error.message);
    }
  }
  throw new RuntimeUnavailableError("auto", reasons.join(" "));
}
