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
  DeviceFinding,
  DeviceName,
  Int8Option,
  LibraryFolders,
  ModelWeights,
  OpenedRuntime,
  RuntimeListener,
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
  /** With the option `devices`: those that it runs on, in the order of CUDA's numbers or as they were listed. */
  readonly devices?: readonly DeviceName[];
  /** With `devices: "all"`: those that were left out. */
  readonly leftOut?: readonly (DeviceName & {
    /** Why it could not be used. */
    readonly reason: string;
  })[];
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
  const { opened, choice } = await openRuntimes(wanted, settings, weights, { check });
  return { ...opened[0]!, choice };
}

export interface OpenRuntimesOptions {
  /** Refuses a runtime that has been opened, on one device: with "auto" the next one is tried. */
  readonly check?: (opened: OpenedRuntime) => void;
  /** The devices to open it on: all that can be used, or those of these numbers; default: one, the first. */
  readonly devices?: "all" | readonly number[] | undefined;
  /** Who hears what befalls the runtime of a device, where devices are named; default: nobody. */
  readonly listenerOf?: (device: DeviceName) => RuntimeListener;
}

/**
 * As `openRuntime`, on each of some devices. With "all" those are left out on which it cannot be opened, or that are refused.
 * @returns one for each device
 * @throws also OptionError for a device that there is not, and where the runtime of that name cannot choose
 */
export async function openRuntimes(
  wanted: string,
  settings: RuntimeSettings,
  weights: ModelWeights,
  { check = () => {}, devices, listenerOf }: OpenRuntimesOptions,
): Promise<{ readonly opened: readonly OpenedRuntime[]; readonly choice: RuntimeChoice }> {
  const passedOver: { name: string; reason: string }[] = [];
  const rows = rowsOf(wanted);
  let wrongDevice: OptionError | null = null;
  for (const [index, row] of rows.entries()) {
    const open = async (more: Partial<RuntimeSettings> = {}) => {
      const opened = await row.open({ ...settings, named: wanted !== "auto", ...more }, weights);
      try {
        check(opened);
        return opened;
      } catch (error) {
        await opened.runtime.dispose();
        throw error;
      }
    };
    const { name } = row;
    try {
      if (settings.int8Option) checkInt8Weights(name, settings.int8Option);
      if (devices === undefined) return { opened: [await open()], choice: { name, passedOver } };
      const numbered = await findDevices(row, settings, devices);
      const all = await openAll(name, numbered, devices === "all", (device) =>
        open({ device: device.number, listener: listenerOf?.(device) ?? settings.listener }),
      );
      const { opened, ...chosen } = all;
      return { opened, choice: { name, passedOver, ...chosen } };
    } catch (error) {
      // No other runtime makes up for a fault of the checkpoint.
      const isOwn = error instanceof FlowTurboError && !(error instanceof CheckpointError);
      if (!isOwn) throw error;
      // What is wrong with the numbers says more than that the last runtime cannot choose.
      if (row.listDevices && error instanceof OptionError && error.option === "devices") wrongDevice ??= error;
      passedOver.push({ name, reason: error.message });
      if (index < rows.length - 1) continue;
      if (devices === undefined || wanted !== "auto") throw error;
      const reasons = passedOver.filter((each) => runtimes[each.name]!.listDevices).map(({ reason }) => reason);
      throw wrongDevice ?? new RuntimeUnavailableError("auto", `No runtime can use devices here. ${reasons.join(" ")}`);
    }
  }
  throw new RangeError("The table of runtimes is empty.");
}

interface NumberedDevice extends DeviceName, DeviceFinding {}

/** @throws OptionError for a number that there is not, and a runtime that cannot choose; RuntimeUnavailableError */
async function findDevices(
  { name, listDevices }: RuntimeRow,
  settings: RuntimeSettings,
  devices: "all" | readonly number[],
): Promise<NumberedDevice[]> {
  if (!listDevices) {
    const others = Object.values(runtimes).filter((row) => row.listDevices);
    throw new OptionError(
      "devices",
      `The runtime ${name} cannot choose among devices; ${others.map((row) => row.name).join(", ")} can. Leave devices away, or use one of these.`,
    );
  }
  const found = await listDevices(settings);
  const all = found.map((device, number) => ({ ...device, number }));
  if (devices === "all") return all;
  return devices.map((number) => {
    const device = all[number];
    if (device) return device;
    const there = all.map(({ number, name }) => `${number} (${name})`).join(", ");
    throw new OptionError(
      "devices",
      `There is no device ${number}: the runtime ${name} finds ${found.length} here, ${there}. CUDA_VISIBLE_DEVICES decides which there are.`,
    );
  });
}

/**
 * Opens a runtime on each device.
 * @param mayLeaveOut whether one that cannot be used is left out
 * @throws what opening it on the first one throws that may not be left out
 */
async function openAll(
  name: string,
  devices: readonly NumberedDevice[],
  mayLeaveOut: boolean,
  open: (device: DeviceName) => Promise<OpenedRuntime>,
): Promise<Required<Pick<RuntimeChoice, "devices" | "leftOut">> & { readonly opened: readonly OpenedRuntime[] }> {
  const results = await Promise.allSettled(
    devices.map(async ({ number, name: device, problem }) => {
      if (problem !== null)
        throw new RuntimeUnavailableError(name, `The device ${number} (${device}) cannot be used. ${problem}`);
      return open({ number, name: device });
    }),
  );
  const opened: OpenedRuntime[] = [];
  const chosen: DeviceName[] = [];
  const leftOut: (DeviceName & { reason: string })[] = [];
  /** What prevents the others, and what would prevent all. */
  const [errors, faults]: [unknown[], unknown[]] = [[], []];
  for (const [index, result] of results.entries()) {
    const { number, name } = devices[index]!;
    if (result.status === "fulfilled") {
      opened.push(result.value);
      chosen.push({ number, name });
      continue;
    }
    const error: unknown = result.reason;
    // A fault of the checkpoint is none of a device.
    const isOwn = error instanceof FlowTurboError && !(error instanceof CheckpointError);
    (isOwn ? errors : faults).push(error);
    if (isOwn) leftOut.push({ number, name, reason: error.message });
  }
  if (opened.length > 0 && faults.length === 0 && (mayLeaveOut || errors.length === 0))
    return { opened, devices: chosen, leftOut };
  await Promise.all(opened.map(({ runtime }) => runtime.dispose()));
  throw faults[0] ?? errors[0] ?? new RuntimeUnavailableError(name, `The runtime ${name} finds no device here.`);
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
