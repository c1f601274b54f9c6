/** A model with its base, its preview autoencoder and its ControlNets, each a path or a name on the hub: what is on the hub is downloaded, and what cannot be used is refused before that. */

import {
  baseOfFile,
  baseOfFolder,
  checkBase,
  checkControlNetConfig,
  checkModelIndex,
  openControlNet,
  openPreviewVae,
  partsOfFile,
} from "../checkpoint/index.js";
import { type HubOptions, hubNameOf, locateModel, nameText } from "../hub/index.js";

export interface LocateOptions
  extends Pick<HubOptions, "variant" | "textEncoder3" | "signal" | "logger" | "onDownload" | "settings"> {
  readonly base?: string | undefined;
  readonly previewVae?: string | undefined;
  /** Folders of ControlNets, or their names on the hub. */
  readonly controlNets?: readonly { readonly folder: string }[] | undefined;
}

/** Paths of folders and files. */
export interface LocatedModel {
  readonly path: string;
  readonly base: string | undefined;
  readonly previewVae: string | undefined;
  /** Folders of the ControlNets, in their order. */
  readonly controlNets: readonly string[];
  /** That the hub could not be asked. */
  readonly warnings: readonly string[];
}

/**
 * Finds or downloads the preview autoencoder, the ControlNets, the model, and of its base what the model's file lacks: in this order, one after another.
 * @throws HubError; CheckpointError for a base of a folder, and for what is neither base nor autoencoder; `signal.reason` after an abort
 */
export async function locateAll(
  model: string,
  { base, previewVae, controlNets = [], ...asked }: LocateOptions,
): Promise<LocatedModel> {
  const { textEncoder3, variant, signal, logger, onDownload, settings } = asked;
  const options: HubOptions = { variant, signal, logger, onDownload, settings, checkIndex: checkModelIndex };
  const warnings: string[] = [];
  const locate = async (text: string, more: HubOptions) => {
    const located = await locateModel(text, { ...options, ...more });
    warnings.push(...located.warnings);
    return located.path;
  };
  const [modelName, baseName] = await Promise.all([hubNameOf(model), base === undefined ? null : hubNameOf(base)]);
  if (base !== undefined && modelName?.file === null) throw baseOfFolder(nameText(modelName));
  if (baseName && baseName.file !== null) throw baseOfFile(nameText(baseName));
  if (base !== undefined && !baseName && modelName) await checkBase(base);

  const previews = previewVae === undefined ? undefined : await locate(previewVae, { kind: "autoencoder" });
  if (modelName) await openPreviewVae({ previewVae: previews, variant, signal });
  const nets: string[] = [];
  for (const { folder } of controlNets)
    nets.push(await locate(folder, { kind: "controlnet", checkIndex: checkControlNetConfig }));
  if (modelName) for (const net of nets) await openControlNet(net, { variant, signal });
  const path = await locate(model, { kind: "model", textEncoder3 });
  const located = { path, previewVae: previews, controlNets: nets, warnings };
  if (base === undefined || !baseName) return { ...located, base };
  const baseOf = await partsOfFile(path, signal);
  return { ...located, base: await locate(base, { kind: "model", textEncoder3, baseOf }) };
}
