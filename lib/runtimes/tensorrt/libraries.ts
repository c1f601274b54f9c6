/**
 * Finds TensorRT's libraries on this machine, and says in full why one cannot be used. NVIDIA's libraries cannot come
 * with this package, so the places where people put them are tried in a fixed order, and each is reported with the
 * loader's own message: in most cases one of these lines names the cause.
 */

import { existsSync } from "node:fs";
import path from "node:path";
import { RuntimeUnavailableError } from "../../errors.js";
import { pythonFolders } from "../python.js";
import type { PlaceTried, Problem } from "../runtime.js";
import {
  type Addon,
  type Cuda,
  findAddon,
  type NativeError,
  smOf,
  smText,
  type Version,
  versionText,
} from "./addon.js";
import { flavours, type TensorRtKind } from "./flavours.js";
import { examineCuda } from "./gpus.js";

/** A library that was opened and has a version that this package works with. */
export interface Library {
  readonly kind: TensorRtKind;
  readonly version: Version;
  /** Files, or names for the loader, as the addon takes them. */
  readonly library: string;
  readonly parser: string;
  /** The file that was opened. */
  readonly file: string;
}

/** Everything that decides whether one of the libraries can be used here. */
export interface TensorRtReport {
  readonly kind: TensorRtKind;
  /** Null where there is no addon; `problems` then says why. */
  readonly addon: Addon | null;
  readonly library: Library | null;
  readonly places: readonly PlaceTried[];
  /** Null without a driver or a GPU. */
  readonly cuda: Cuda | null;
  /** Why engines cannot be built here, and why they could not run here: one remedy for each cause. */
  readonly problems: readonly Problem[];
}

export interface FindOptions {
  /** Folder with the libraries: the first place that is tried. */
  readonly folder?: string | undefined;
  /** Looks for the library only where there is a GPU: for callers who want to run, and to know soon if they cannot. */
  readonly gpuFirst?: boolean | undefined;
}

/** Looks for one of the libraries and examines the GPUs. Never throws: what is missing is in `problems`. */
export async function examineTensorRt(kind: TensorRtKind, options: FindOptions = {}): Promise<TensorRtReport> {
  const flavour = flavours[kind];
  const nothing = { kind, addon: null, library: null, places: [], cuda: null };
  const addon = findAddon(kind);
  if (!("describe" in addon)) return { ...nothing, problems: [addon] };
  const cuda = await examineCuda(addon);
  if (options.gpuFirst && "cause" in cuda) return { ...nothing, addon, problems: [cuda] };
  const { library, places } = await findLibrary(addon, kind, options.folder);
  const problems: Problem[] = [];
  if (!library) problems.push(libraryProblem(addon, kind, places));
  if ("cause" in cuda) problems.push(cuda);
  else if (!cuda.devices.some((device) => flavour.supports(smOf(device)))) {
    const found = cuda.devices.map((device) => `${device.name} (SM ${smText(smOf(device))})`).join(", ");
    problems.push({
      prevents: "running",
      cause: `${flavour.title} runs on ${flavour.supported}; this machine has ${found}.`,
      remedy: flavour.unsupportedRemedy,
    });
  }
  return { kind, addon, library, places, cuda: "cause" in cuda ? null : cuda, problems };
}

/** What it takes to call a library. */
export interface Installation {
  readonly addon: Addon;
  readonly library: Library;
  readonly cuda: Cuda | null;
}

/**
 * The addon and a library that can be used for that.
 * @throws RuntimeUnavailableError with every place that was tried
 */
export async function requireTensorRt(
  kind: TensorRtKind,
  purpose: Problem["prevents"],
  options: FindOptions,
): Promise<Installation> {
  const report = await examineTensorRt(kind, options);
  const { addon, library, cuda, problems } = report;
  if (!addon || !library || (purpose === "running" && problems.length > 0))
    throw new RuntimeUnavailableError(kind, diagnosis(report, purpose));
  return { addon, library, cuda };
}

/** The report as text: causes with their remedies, and the places that were tried. */
export function diagnosis(report: TensorRtReport, purpose: Problem["prevents"]): string {
  const { title } = flavours[report.kind];
  const causes = report.problems.filter(({ prevents }) => purpose === "running" || prevents === "building");
  const lines = causes.map(({ cause, remedy }) => `${cause} ${remedy}`);
  const failed = report.places.filter((place) => place.error !== null);
  if (!report.library && failed.length > 0)
    lines.push(`Places tried: ${failed.map(({ place, error }) => `${place} (${error})`).join("; ")}.`);
  return `${title} cannot be used for ${purpose === "building" ? "building engines" : "running"} here. ${lines.join(" ")}`;
}

async function findLibrary(
  addon: Addon,
  kind: TensorRtKind,
  option: string | undefined,
): Promise<{ library: Library | null; places: PlaceTried[] }> {
  const flavour = flavours[kind];
  const places: PlaceTried[] = [];
  const folders = async function* (): AsyncGenerator<[PlaceTried["source"], string]> {
    if (option !== undefined) yield ["option", path.resolve(option)];
    const variable = process.env[flavour.variable];
    if (variable) yield ["environment", path.resolve(variable)];
    else places.push({ source: "environment", place: flavour.variable, error: "not set" });
    try {
      const folders = (await pythonFolders(flavour.module))[flavour.module]!;
      if (folders.length === 0) throw new Error("not installed");
      for (const folder of folders) yield ["pip", folder];
    } catch (error) {
      places.push({ source: "pip", place: `python3's package ${flavour.module}`, error: (error as Error).message });
    }
    // No folder: the loader looks for the names.
    yield ["loader", ""];
  };
  for await (const [source, folder] of folders()) {
    // NVIDIA's archives keep the libraries in lib/.
    const lib = path.join(folder, "lib");
    const isIn = (place: string) => existsSync(path.join(place, flavour.library));
    const found = folder !== "" && !isIn(folder) && isIn(lib) ? lib : folder;
    const place = found || `the loader's path (${flavour.library})`;
    const [library, parser] = [path.join(found, flavour.library), path.join(found, flavour.parser)];
    try {
      const opened = await addon.open(library, parser).promise;
      places.push({ source, place, error: null });
      return { library: { kind, version: opened.version, library, parser, file: opened.library }, places };
    } catch (error) {
      places.push({ source, place, error: (error as NativeError).message });
    }
  }
  return { library: null, places };
}

function libraryProblem(addon: Addon, kind: TensorRtKind, places: readonly PlaceTried[]): Problem {
  const { floor, ceiling } = addon.describe();
  const { title, install, variable, library, parser } = flavours[kind];
  const needed = `version ${versionText(floor)} or later, below ${versionText(ceiling)}`;
  const refused = places.find(({ error }) => error?.includes("needed is"));
  if (refused) return { prevents: "building", cause: `${refused.error}.`, remedy: `Install ${needed}: ${install}.` };
  const broken = places.find(({ place }) => existsSync(path.join(place, library)));
  if (broken)
    return {
      prevents: "building",
      cause: `${title} was found in ${broken.place}, but cannot be opened: ${broken.error}.`,
      remedy: `Install it again, complete with its ONNX parser (${parser}): ${install}.`,
    };
  return {
    prevents: "building",
    cause: `${title} was not found.`,
    remedy: `Install ${needed}: ${install}; or set ${variable} to the folder with ${library}.`,
  };
}
