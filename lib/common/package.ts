/** Where this package is installed, and its version. */

import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";

/**
 * The folder with this package's package.json, from dist/ as from lib/.
 * @throws RangeError where there is none above the code, as in a bundle
 */
export function packageRoot(): string {
  let folder = path.dirname(fileURLToPath(import.meta.url));
  for (;;) {
    if (manifestIn(folder)?.name === "flowturbo") return folder;
    const parent = path.dirname(folder);
    if (parent === folder) throw new RangeError("flowturbo's package.json was not found above its code.");
    folder = parent;
  }
}

let version: string | null | undefined;

/** The package's version; null where its package.json is not above the code, as in a bundle. */
export function packageVersion(): string | null {
  if (version === undefined)
    try {
      version = manifestIn(packageRoot())?.version ?? null;
    } catch {
      version = null;
    }
  return version;
}

function manifestIn(folder: string): { name?: string; version?: string } | null {
  const file = path.join(folder, "package.json");
  return existsSync(file) ? JSON.parse(readFileSync(file, "utf8")) : null;
}
