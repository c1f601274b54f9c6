/** `flowturbo cache`: what lies in the cache of engines and of weights that were quantised or merged, whether it is sound, and how to clear it. */

import type { Command } from "commander";
import { clearCachedWeights, listCachedWeights, weightsFolder } from "../checkpoint/index.js";
import { defaultCacheFolder } from "../common/files.js";
import { loadSchema } from "../options.js";
import { findAddon, smText } from "../runtimes/tensorrt/addon.js";
import { type CacheItem, EngineCache, enginesFolder } from "../runtimes/tensorrt/cache.js";
import { tensorRtKinds } from "../runtimes/tensorrt/flavours.js";
import { addFlags, addJsonFlag, type CommonFlags } from "./flags.js";
import { megabytes, print } from "./print.js";

export function cacheCommand(command: Command, signal: AbortSignal): void {
  command.description(
    "List, verify or clear the cache of engines and of weights that were quantised or merged with LoRAs.",
  );
  const add = (name: string, description: string, action: (flags: CommonFlags) => Promise<void>) => {
    const added = command.command(name).exitOverride().description(description);
    addFlags(added, loadSchema.pick({ cache: true }));
    addJsonFlag(added).action(action);
  };
  add("list", "List the engines, and the files of weights that were quantised or merged with LoRAs.", (flags) =>
    list(flags, false, signal),
  );
  add("verify", "Read every engine and compare it with its SHA-256; exit code 1 if one is damaged.", (flags) =>
    list(flags, true, signal),
  );
  add(
    "clear",
    "Remove every engine that nobody is building, and the files of weights that were quantised or merged with LoRAs.",
    clear,
  );
}

async function list(flags: CommonFlags, verify: boolean, signal: AbortSignal): Promise<void> {
  const cache = await EngineCache.openExisting(flags.cache);
  const items = cache ? await cache.list({ verify, signal }) : [];
  const damaged = items.filter(({ damage }) => damage !== null);
  const folder = cache?.folder ?? enginesFolder(flags.cache);
  const engines = items.map(({ name, bytes, damage, manifest }) => ({ name, bytes, damage, ...manifest }));
  const bytes = items.reduce((sum, item) => sum + item.bytes, 0);
  const heading = `${folder}: ${items.length} engines, ${megabytes(bytes)}`;
  const lines = [heading, ...items.map((item) => describe(item, verify))];
  const root = flags.cache ?? defaultCacheFolder();
  const weights = await listCachedWeights(root);
  const total = weights.reduce((sum, item) => sum + item.bytes, 0);
  if (weights.length > 0) lines.push(`${weightsFolder(root)}: ${weights.length} files of weights, ${megabytes(total)}`);
  print(flags.json, { folder, engines, weights }, lines.join("\n"));
  if (damaged.length > 0) process.exitCode = 1;
}

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
  const weights = await clearCachedWeights(flags.cache ?? defaultCacheFolder());
  const text = `removed ${freed.engines} engines, ${megabytes(freed.bytes)}`;
  const more = `, and ${weights.files} files of weights, ${megabytes(weights.bytes)}`;
  print(flags.json, { ...freed, weights }, weights.files > 0 ? `${text}${more}` : text);
}
