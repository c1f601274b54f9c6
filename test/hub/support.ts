/** A fake hub for each test, with a model in it, and a cache that is gone afterwards. */

import { lstat, readdir, readFile, readlink } from "node:fs/promises";
import path from "node:path";
import { afterEach, beforeEach } from "vitest";
import { type HubOptions, parseHubName, pull } from "../../lib/hub/index.js";
import { type HubSettings, readSettings } from "../../lib/hub/settings.js";
import { fixture, temporaryFolder } from "../checkpoint/folders.js";
import { FakeHub } from "./fake-hub.js";

export let hub: FakeHub;
export let home: string;

beforeEach(async () => {
  hub = await FakeHub.start();
  home = await temporaryFolder();
});
afterEach(() => hub.stop());

export const name = "owner/model";
export const transformer = "transformer/diffusion_pytorch_model.safetensors";

/** The files of a fixture's model. */
export async function modelFiles(of: "sd3" | "medium" = "sd3"): Promise<Map<string, Buffer>> {
  const root = fixture(of, "model");
  const found = await readdir(root, { recursive: true, withFileTypes: true });
  const names = found
    .filter((entry) => entry.isFile())
    .map((entry) => path.relative(root, path.join(entry.parentPath, entry.name)));
  return new Map(
    await Promise.all(names.sort().map(async (each) => [each, await readFile(path.join(root, each))] as const)),
  );
}

/** A model that takes no time: what is in the files does not matter to the download. */
export function smallModel(weights: Buffer = bytes(40_000)): Map<string, Buffer> {
  const index = { _class_name: "StableDiffusion3Pipeline", transformer: ["diffusers", "SD3Transformer2DModel"] };
  return new Map([
    ["model_index.json", Buffer.from(JSON.stringify(index))],
    ["transformer/config.json", Buffer.from("{}")],
    [transformer, weights],
  ]);
}

/** Bytes that differ from place to place. */
export function bytes(length: number, seed = 1): Buffer {
  const found = Buffer.alloc(length);
  for (let at = 0, state = seed; at < length; at++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    found[at] = state >>> 24;
  }
  return found;
}

export async function settingsOf(env: Record<string, string> = {}): Promise<HubSettings> {
  const read = await readSettings({ HF_ENDPOINT: hub.url, HF_HOME: home, ...env });
  return { ...read, backoffMs: 5 };
}

export async function pullModel(text = name, options: HubOptions = {}, env: Record<string, string> = {}) {
  return pull(parseHubName(text)!, { settings: await settingsOf(env), ...options });
}

/** What lies in the model's part of the cache: links with their targets, files with `null`. */
export async function cacheOf(of = name): Promise<Record<string, string | null>> {
  const root = path.join(home, "hub", `models--${of.replace("/", "--")}`);
  const found: Record<string, string | null> = {};
  for (const each of (await readdir(root, { recursive: true }).catch(() => [])).sort()) {
    const file = path.join(root, each);
    const stat = await lstat(file);
    if (stat.isSymbolicLink()) found[each] = await readlink(file);
    else if (stat.isFile()) found[each] = null;
  }
  return found;
}
