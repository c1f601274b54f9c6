/** `flowturbo cache`: what lies in the cache of engines, whether it is sound, and how to clear it. */

import { type Command, Option } from "commander";
import { findAddon, smText } from "../runtimes/tensorrt/addon.js";
import { type CacheItem, EngineCache, enginesFolder } from "../runtimes/tensorrt/cache.js";
import { tensorRtKinds } from "../runtimes/tensorrt/flavours.js";

interface Flags {
  cache?: string;
  json?: boolean;
}

export function cacheCommand(command: Command, signal: AbortSignal): void {
  command.description("List, verify or clear the cache of engines.");
  const add = (name: string, description: string, action: (flags: Flags) => Promise<void>) =>
    command
      .command(name)
      .exitOverride()
      .description(description)
      .addOption(new Option("--cache <folder>", "folder of the cache (default: flowturbo in the user's cache folder)"))
      .addOption(new Option("--json", "print one JSON object"))
      .action(action);
  add("list", "List the engines.", (flags) => list(flags, false, signal));
  add("verify", "Read every engine and compare it with its SHA-256; exit code 1 if one is damaged.", (flags) =>
    list(flags, true, signal),
  );
  add("clear", "Remove every engine that nobody is building.", clear);
}

async function list(flags: Flags, verify: boolean, signal: AbortSignal): Promise<void> {
  const cache = await EngineCache.openExisting(flags.cache);
  const items = cache ? await cache.list({ verify, signal }) : [];
  const damaged = items.filter(({ damage }) => damage !== null);
  const folder = cache?.folder ?? enginesFolder(flags.cache);
  if (flags.json)
    process.stdout.write(
      `${JSON.stringify({ folder, engines: items.map(({ name, bytes, damage, manifest }) => ({ name, bytes, damage, ...manifest })) })}\n`,
    );
  else {
    const bytes = items.reduce((sum, item) => sum + item.bytes, 0);
    process.stdout.write(`${folder}: ${items.length} engines, ${(bytes / 1e6).toFixed(1)} MB\n`);
    for (const item of items) process.stdout.write(`${describe(item, verify)}\n`);
  }
  if (damaged.length > 0) process.exitCode = 1;
}

function describe({ name, manifest, bytes, damage }: CacheItem, verified: boolean): string {
  if (damage !== null) return `  ✘ ${name}: ${damage}; it will be built again`;
  const { runtime, version, device, profiles, created } = manifest!;
  const target = "targets" in device ? `SM ${device.targets.map(smText).join(", ")}` : `${device.gpu}`;
  return `  ${verified ? "✔ " : ""}${name}: ${runtime} ${version}, ${target}, ${profiles.length} profiles, ${(bytes / 1e6).toFixed(1)} MB, ${created}`;
}

async function clear(flags: Flags): Promise<void> {
  const cache = await EngineCache.openExisting(flags.cache);
  // For its locks; where there is none, nobody builds either.
  const addon = tensorRtKinds.map(findAddon).find((found) => "describe" in found) ?? null;
  const freed = cache ? await cache.clear(addon) : { engines: 0, bytes: 0 };
  process.stdout.write(
    flags.json
      ? `${JSON.stringify(freed)}\n`
      : `removed ${freed.engines} engines, ${(freed.bytes / 1e6).toFixed(1)} MB\n`,
  );
}
