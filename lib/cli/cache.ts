/** `flowturbo cache`: what lies in the cache of engines, of weights that were quantised or merged and of optimised graphs, whether it is sound, and how to clear it. */

import type { Command } from "commander";
import { clearCachedWeights, listCachedWeights, weightsFolder } from "../checkpoint/index.js";
import { defaultCacheFolder } from "../common/files.js";
import { loadSchema } from "../options.js";
import { clearOptimised, listOptimised, optimisedFolder } from "../runtimes/onnxruntime/optimised-folder.js";
import { findAddon, smText } from "../runtimes/tensorrt/addon.js";
import { type CacheItem, EngineCache, enginesFolder } from "../runtimes/tensorrt/cache.js";
import { tensorRtKinds } from "../runtimes/tensorrt/flavours.js";
import { addFlags, addJsonFlag, type CommonFlags } from "./flags.js";
import { megabytes, print } from "./print.js";

export function cacheCommand(command: Command, signal: AbortSignal): void {
  command.description(
    "List, verify or clear the cache of engines, of weights that were quantised or merged with LoRAs, and of optimised graphs.",
  );
  const add = (name: string, description: string, action: (flags: CommonFlags) => Promise<void>) => {
    const added = command.command(name).exitOverride().description(description);
    addFlags(added, loadSchema.pick({ cache: true }));
    addJsonFlag(added).action(action);
  };
  add(
    "list",
    "List the engines, the files of weights that were quantised or merged with LoRAs, and optimised graphs.",
    (flags) => list(flags, false, signal),
  );
  add("verify", "Read every engine and compare it with its SHA-256; exit code 1 if one is damaged.", (flags) =>
    list(flags, true, signal),
  );
  add(
    "clear",
    "Remove every engine that nobody is building, the files of weights that were quantised or merged with LoRAs, and optimised graphs.",
    clear,
  );
}

async function list(flags: CommonFlags, verify: boolean, signal: AbortSignal): Promise<void> {
  const cache = await EngineCache.openExisting(flags.cache);
  const items = cache ? await cache.list({ verify, signal }) : [];
  const damaged = items.filter(({ damage }) => damage !== null);
  const folder = cache?.folder ?? enginesFolder(flags.cache);
  const engines = items.map(({ name, bytes, damage, manifest }) => ({ name, bytes, damage, ...manifest }));
  const heading = `${folder}: ${items.length} engines, ${megabytes(sizeOf(items))}`;
  const lines = [heading, ...items.map((item) => describe(item, verify))];
  const root = flags.cache ?? defaultCacheFolder();
  const weights = await listCachedWeights(root);
  if (weights.length > 0)
    lines.push(`${weightsFolder(root)}: ${weights.length} files of weights, ${megabytes(sizeOf(weights))}`);
  const graphs = (await listOptimised(optimisedFolder(root))).map(({ file, bytes }) => ({ file, bytes }));
  if (graphs.length > 0)
    lines.push(`${optimisedFolder(root)}: ${graphs.length} optimised graphs, ${megabytes(sizeOf(graphs))}`);
  print(flags.json, { folder, engines, weights, graphs }, lines.join("\n"));
  if (damaged.length > 0) process.exitCode = 1;
}

const sizeOf = (items: readonly { readonly bytes: number }[]) => items.reduce((sum, { bytes }) => sum + bytes, 0);

function describe({ name, manifest, bytes, damage }: CacheItem, verified: boolean): string {
  if (damage !== null) return `  ✘ ${name}: ${damage}; it will be built again`;
  const { runtime, version, device, profiles, created } = manifest!;
  const target = "targets" in device ? `SM ${device.targets.map(smText).join(", ")}` : `${device.gpu}`;
  return `  ${verified ? "✔ " : ""}${name}: ${runtime} ${version}, ${target}, ${profiles.length} profiles, ${megabytes(bytes)}, ${created}`;
}

async function clear(flags: CommonFlags): Promise<void> {
  const cache = await EngineCache.openExisting(flags.cache);
  // For its locks. Without an addon no engine can be under construction.
  const addon = tensorRtKinds.map(findAddon).find((found) => "describe" in found) ?? null;
  const freed = cache ? await cache.clear(addon) : { engines: 0, bytes: 0 };
  const root = flags.cache ?? defaultCacheFolder();
  const weights = await clearCachedWeights(root);
  const graphs = await clearOptimised(optimisedFolder(root));
  const removed = [`removed ${freed.engines} engines, ${megabytes(freed.bytes)}`];
  if (weights.files > 0) removed.push(`${weights.files} files of weights, ${megabytes(weights.bytes)}`);
  if (graphs.files > 0) removed.push(`${graphs.files} optimised graphs, ${megabytes(graphs.bytes)}`);
  print(flags.json, { ...freed, weights, graphs }, removed.join(", and "));
}
