/**
 * The ControlNets of a loaded model by name: those given at load, and folders that requests name, which are opened when they are first
 * needed and opened again when their files have changed. Opening reads them through once, for values that are not finite.
 */

import { basename, resolve } from "node:path";
import {
  type Checkpoint,
  type ControlNet,
  checkControlNetFits,
  checkControlNetValues,
  checkpointName,
  openControlNet,
} from "../checkpoint/index.js";
import { untilAborted } from "../common/abort.js";
import { type FileVersion, versionOf } from "../common/files.js";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";
import { longestAdapterName } from "../options.js";

/**
 * Folders of requests whose graphs stay on the device, beside those of the present request; those of the ControlNet that was not used for
 * longest are freed.
 */
const mostOpened = 4;

/** A ControlNet that load() names. */
export interface NamedControlNet {
  /** Path of its folder. */
  readonly folder: string;
  /** As it was given: a path, or a name of the hub. */
  readonly given: string;
  readonly name?: string | undefined;
}

export interface ControlNetsOptions {
  readonly variant?: string | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Told of each ControlNet that is opened, by its id: its weights are the model's from now on. */
  readonly onOpen?: ((controlNet: ControlNet) => void) | undefined;
}

/** What a request is told of a ControlNet. */
interface Known {
  readonly name: string;
  readonly controlNet: ControlNet;
}

/** The ControlNets that a request may name. */
export interface KnownControlNets {
  /**
   * A ControlNet by what an entry of `controls` says of it.
   * @param allowsPaths whether a request may name folders of this machine
   * @throws OptionError for a name that is not known
   */
  readonly get: (folder: string, allowsPaths: boolean) => Known;
}

export class ControlNets implements KnownControlNets {
  /** By their ids, as graphs name them: those that are no longer kept, too, since a request under way may need them. */
  readonly byId = new Map<string, ControlNet>();
  readonly #checkpoint: Pick<Checkpoint, "transformer" | "vae">;
  readonly #variant: string | undefined;
  readonly #onOpen: (controlNet: ControlNet) => void;
  /** Those of load() by name, and by what was given where that is another text. */
  readonly #named = new Map<string, Known>();
  readonly #given = new Map<string, Known>();
  /** Those of requests by their absolute paths, the one that was used last at the end. */
  readonly #opened = new Map<string, Known>();
  readonly #opening = new Map<string, Promise<Known>>();
  /** Told of the id of a ControlNet that is not kept any more. */
  onDrop: (id: string) => void = () => {};

  private constructor(
    checkpoint: Pick<Checkpoint, "transformer" | "vae">,
    { variant, onOpen = () => {} }: ControlNetsOptions = {},
  ) {
    this.#checkpoint = checkpoint;
    this.#variant = variant;
    this.#onOpen = onOpen;
  }

  /** No ControlNets, of a model that none were opened for. */
  static none(checkpoint: Pick<Checkpoint, "transformer" | "vae">): ControlNets {
    return new ControlNets(checkpoint);
  }

  /**
   * Opens the ControlNets of load().
   * @throws CheckpointError for one that cannot be read or does not fit, OptionError for two of one name or a name too long; `signal.reason`
   */
  static async open(
    checkpoint: Pick<Checkpoint, "transformer" | "vae">,
    named: readonly NamedControlNet[],
    options: ControlNetsOptions = {},
  ): Promise<ControlNets> {
    const nets = new ControlNets(checkpoint, options);
    for (const { folder, given, name = checkpointName(folder) } of named) {
      if (nets.#named.has(name)) throw twoControlNetsOfOneName(name);
      checkControlNetName(name, folder);
      const known = { name, controlNet: await nets.#read(folder, options.signal) };
      nets.#named.set(name, known);
      nets.#given.set(given, nets.#given.get(given) ?? known);
    }
    return nets;
  }

  /** What their folders have twice, with which is read. */
  get warnings(): string[] {
    return [...new Set([...this.#named.values()].flatMap(({ controlNet }) => controlNet.weights.warnings))];
  }

  /** Names of those that load() named. */
  get names(): string[] {
    return [...this.#named.keys()];
  }

  /**
   * Opens the folders that a request names besides those of load(), or looks whether they have changed.
   * @param folders what the entries of `controls` say, unchecked
   * @returns the ControlNets for that request, whatever others make of the folders in the meantime
   * @throws CheckpointError for a folder that is no ControlNet, or does not fit
   */
  async prepare(folders: readonly unknown[], signal?: AbortSignal): Promise<KnownControlNets> {
    const paths = new Set<string>();
    for (const folder of folders)
      if (typeof folder === "string" && folder !== "" && !this.#named.has(folder) && !this.#given.has(folder))
        paths.add(resolve(folder));
    const opened = new Map<string, Known>();
    const most = Math.max(mostOpened, paths.size);
    for (const path of paths) opened.set(path, await untilAborted(this.#refresh(path, most), signal));
    return { get: (folder, allowsPaths) => this.#find(folder, allowsPaths, opened) };
  }

  /** Of those of load() only: see `KnownControlNets`. */
  get(folder: string, allowsPaths: boolean): Known {
    return this.#find(folder, allowsPaths, new Map());
  }

  #find(folder: string, allowsPaths: boolean, opened: ReadonlyMap<string, Known>): Known {
    const atPath = () => this.#given.get(folder) ?? opened.get(resolve(folder));
    const known = this.#named.get(folder) ?? (allowsPaths ? atPath() : undefined);
    if (known) return known;
    const { names } = this;
    const has =
      names.length > 0
        ? `This model has ${names.map(quoted).join(", ")}.`
        : "This model was loaded without any: name its folder at load, as controlNets: [{ folder, name }] (--control-net name=folder).";
    throw new OptionError("controls", `There is no ControlNet ${quoted(folder)}. ${has}`);
  }

  /** @param most folders that are kept */
  async #refresh(path: string, most: number): Promise<Known> {
    const kept = this.#opened.get(path);
    if (kept && (await isUnchanged(kept.controlNet.files))) {
      // Unless it was freed in the meantime.
      if (this.#opened.get(path) === kept) this.#keep(path, kept, most);
      return kept;
    }
    // Requests at the same time open it once. It is read for all of them, whoever is aborted.
    let opening = this.#opening.get(path);
    if (!opening) {
      opening = this.#read(path).then((controlNet) =>
        this.#keep(path, { name: basename(path) || path, controlNet }, most),
      );
      this.#opening.set(path, opening);
      const done = () => this.#opening.delete(path);
      opening.then(done, done);
    }
    return opening;
  }

  async #read(folder: string, signal?: AbortSignal): Promise<ControlNet> {
    const controlNet = await openControlNet(folder, { variant: this.#variant, signal });
    checkControlNetFits(controlNet, this.#checkpoint);
    if (!this.byId.has(controlNet.id)) await checkControlNetValues(controlNet, signal);
    const known = this.byId.get(controlNet.id);
    if (known) return known;
    this.byId.set(controlNet.id, controlNet);
    this.#onOpen(controlNet);
    return controlNet;
  }

  /** Keeps a folder as the one that was used last, and frees what is too much. */
  #keep(path: string, known: Known, most: number): Known {
    const before = this.#opened.get(path);
    this.#opened.delete(path);
    this.#opened.set(path, known);
    const dropped = before && before !== known ? [before] : [];
    for (const [oldest, each] of this.#opened) {
      if (this.#opened.size <= most) break;
      this.#opened.delete(oldest);
      dropped.push(each);
    }
    const used = new Set([...this.#named.values(), ...this.#opened.values()].map(({ controlNet }) => controlNet.id));
    for (const { controlNet } of dropped) if (!used.has(controlNet.id)) this.onDrop(controlNet.id);
    return known;
  }
}

/** @throws OptionError for one called as its folder, by a name too long for requests */
export function checkControlNetName(name: string, folder: string): void {
  if (name.length <= longestAdapterName) return;
  throw new OptionError(
    "controlNets",
    `The ControlNet ${folder} is called as its folder, with more than ${longestAdapterName} characters, so that no request can name it. Give it a name: { folder, name }, or on the command line --control-net name=folder.`,
    { publicMessage: "A ControlNet of controlNets has a name too long for requests." },
  );
}

export function twoControlNetsOfOneName(name: string): OptionError {
  return new OptionError(
    "controlNets",
    `Two ControlNets are called ${quoted(name)}. Give one of them another name: { folder, name }, or on the command line name=folder.`,
  );
}

const quoted = (name: string) => JSON.stringify(clipped(name, 80));

async function isUnchanged(files: readonly FileVersion[]): Promise<boolean> {
  for (const { file, size, mtimeMs } of files) {
    const now = await versionOf(file).catch(() => null);
    if (now?.size !== size || now.mtimeMs !== mtimeMs) return false;
  }
  return true;
}
