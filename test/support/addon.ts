// The addon of a library, for tests that need it.
import { type Addon, findAddon } from "../../lib/runtimes/tensorrt/addon.js";

/** @throws Error with cause and remedy where there is none */
export function loadAddon(kind: string): Addon {
  const found = findAddon(kind);
  if ("describe" in found) return found;
  throw new Error(`${found.cause} ${found.remedy}`);
}
