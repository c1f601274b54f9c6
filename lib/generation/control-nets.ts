/**
 * The ControlNets of a loaded model by name: those given at load, and folders that requests name, which are opened when they are first
 * needed and opened again when their files have changed. Opening reads a configuration and headers; weights are the runtime's.
 */

import { basename, resolve } from "node:path";
import {
  type Checkpoint,
  type ControlNet,
  checkControlNetFits,
  checkpointName,
  openControlNet,
} from "../checkpoint/index.js";
import { type FileVersion, versionOf } from "../common/files.js";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";

/** Folders of requests whose graphs stay on the device; those of the ControlNet that was not used for longest are freed. */
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

export class ControlNets {
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
   * @throws CheckpointError for one that cannot be read or does not fit, OptionError for two of one name; `signal.reason`
   */
  static async open(
    checkpoint: Pick<Checkpoint, "transformer" | "vae">,
    named: readonly NamedControlNet[],
    options: ControlNetsOptions = {},
  ): Promise<ControlNets> {
    const nets = new ControlNets(checkpoint, options);
    for (const { folder, given, name = checkpointName(folder) } of named) {
      if (nets.#named.has(name))
        throw new OptionError(
          "controlNets",
          `Two ControlNets are called ${quoted(name)}. Give one of them another name: { folder, name }, or on the command line name=folder.`,
        );
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
   * @throws CheckpointError for a folder that is no ControlNet, or does not fit
   */
  async prepare(folders: readonly unknown[], signal?: AbortSignal): Promise<void> {
    for (const folder of new Set(folders))
      if (typeof folder === "string" && folder !== "" && !this.#named.has(folder) && !this.#given.has(folder))
        await this.#refresh(resolve(folder), signal);
  }

  /**
   * A ControlNet by what an entry of `controls` says of it.
   * @param allowsPaths whether a request may name folders of this machine
   * @throws OptionError for a name that is not known
   */
  get(folder: string, allowsPaths: boolean): Known {
    const atPath = () => this.#given.get(folder) ?? this.#opened.get(resolve(folder));
    const known = this.#named.get(folder) ?? (allowsPaths ? atPath() : undefined);
    if (known) return known;
    const { names } = this;
    const has =
      names.length > 0
        ? `This model has ${names.map(quoted).join(", ")}.`
        : "This model was loaded without any: name its folder at load, as controlNets: [{ folder, name }] (--control-net name=folder).";
    throw new OptionError("controls", `There is no ControlNet ${quoted(folder)}. ${has}`);
  }

  async #refresh(path: string, signal: AbortSignal | undefined): Promise<void> {
    const kept = this.#opened.get(path);
    if (kept && (await isUnchanged(kept.controlNet.weights.files))) {
      this.#opened.delete(path);
      this.#opened.set(path, kept);
      return;
    }
    // Requests at the same time open it once. It is read for all of them, whoever is aborted.
    let opening = this.#opening.get(path);
    if (!opening) {
      opening = this.#read(path).then((controlNet) => this.#keep(path, { name: basename(path) || path, controlNet }));
      this.#opening.set(path, opening);
      const done = () => this.#opening.delete(path);
      opening.then(done, done);
    }
    await opening;
    signal?.throwIfAborted();
  }

  async #read(folder: string, signal?: AbortSignal): Promise<ControlNet> {
    const controlNet = await openControlNet(folder, { variant: this.#variant, signal });
    checkControlNetFits(controlNet, this.#checkpoint);
    const known = this.byId.get(controlNet.id);
    if (known) return known;
    this.byId.set(controlNet.id, controlNet);
    this.#onOpen(controlNet);
    return controlNet;
  }

  #keep(path: string, known: Known): Known {
    const before = this.#opened.get(path);
    this.#opened.delete(path);
    this.#opened.set(path, known);
    const [oldest] = this.#opened.keys();
    const dropped = before ?? (this.#opened.size > mostOpened ? this.#opened.get(oldest!) : undefined);
    if (!before && dropped) this.#opened.delete(oldest!);
    const isStillUsed = (id: string) =>
      [...this.#named.values(), ...this.#opened.values()].some(({ controlNet }) => controlNet.id === id);
    if (dropped && !isStillUsed(dropped.controlNet.id)) this.onDrop(dropped.controlNet.id);
    return known;
  }
}

const quoted = (name: string) => JSON.stringify(clipped(name, 80));

async function isUnchanged(files: readonly FileVersion[]): Promise<boolean> {
  for (const { file, size, mtimeMs } of files) {
    const now = await versionOf(file).catch(() => null);
    if (now?.size !== size || now.mtimeMs !== mtimeMs) return false;
  }
  return true;
}
