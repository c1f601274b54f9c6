/** The models of commands that serve them: `serve` over HTTP, `worker` to a fleet. Each is named, loads in the background and is disposed of at the end. */

import type { Command } from "commander";
import type { Logger } from "../common/logger.js";
import { OptionError } from "../errors.js";
import { embeddedModel, FlowTurbo } from "../flowturbo.js";
import type { LoadOptions } from "../model.js";
import { checkOptions, loadSchema } from "../options.js";
import { modelName, readLoadFlags } from "./flags.js";

/** A flag that may be given several times. */
export const repeated = (value: string, before: string[] = []) => [...before, value];

/** Adds `--model`, of which there may be several. */
export function addServedModels(command: Command): Command {
  return command.option(
    "--model <[name=]path>",
    "checkpoint (a folder, one .safetensors file, or owner/name[@revision] of a model of the hub) to serve under that name, or its own (repeatable; default: the embedded shapes model)",
    repeated,
  );
}

/** Folders by the ids of their models. @throws OptionError for two of one name */
export function foldersOf(given: readonly string[] = []): Record<string, string> {
  const folders: Record<string, string> = {};
  for (const text of given.length > 0 ? given : [embeddedModel]) {
    const [, name, folder] = text.match(/^([\w.:-]+)=(.+)$/s) ?? [null, null, text];
    const id = name ?? modelName(folder!);
    if (folders[id] !== undefined)
      throw new OptionError("model", `Two models are called "${id}". Name them: --model <name>=<path>.`);
    folders[id] = folder!;
  }
  return folders;
}

/** What all models are loaded with: paths in requests are nothing that is opened. @throws OptionError for a flag that is wrong */
export function servedLoadOptions(flags: object, command: string, further: LoadOptions): LoadOptions {
  const options: LoadOptions = { ...readLoadFlags(flags), ...further, allowPaths: false };
  checkOptions(loadSchema, options, command);
  return options;
}

/** Models by id that load. */
export interface ServedModels {
  readonly loading: Readonly<Record<string, Promise<FlowTurbo>>>;
  /** Waits for those that still load. */
  dispose(): Promise<void>;
}

/** @param end called if a model cannot be loaded, or is lost for good: the process is of no use any more */
export function loadServed(
  folders: Readonly<Record<string, string>>,
  options: LoadOptions,
  logger: Logger,
  end: (error: unknown) => void,
): ServedModels {
  // Only another process gets a GPU again that is lost for good: whoever restarts services has to see the end of this one.
  const watch = (model: FlowTurbo) =>
    model.on("lost", ({ error }) => {
      // With several, those that are left draw on.
      if (!model.health().live) end(error);
    });
  const loading = Object.fromEntries(
    Object.entries(folders).map(([id, folder]) => {
      const each = FlowTurbo.load(folder, { ...options, logger });
      each.then(watch, end);
      return [id, each];
    }),
  );
  return {
    loading,
    async dispose() {
      const loaded = await Promise.allSettled(Object.values(loading));
      await Promise.all(loaded.map((each) => (each.status === "fulfilled" ? each.value.dispose() : undefined)));
    },
  };
}
