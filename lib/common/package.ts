/**
 * Where this package's own files are: the embedded model, the entry of the child process, the addons. They are found from
 * the place of this code, upwards to the package's package.json, so that it is the same from dist/ as from lib/. Paths are
 * put together here and never written as `new URL("…", import.meta.url)`: bundlers take that for an asset, and copy one
 * file without those that it imports. In a bundle there is no such package.json above the code, which is said in one sentence.
 */

import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { fileURLToPath } from "node:url";
import { InstallationError } from "../errors.js";

/** What this package reads of its own package.json. */
interface Manifest {
  readonly name: string;
  readonly version: string;
  readonly engines: { readonly node: string };
}

/** Absent from ES modules; what a bundle in CommonJS has in place of import.meta. */
declare const __filename: string | undefined;

const here = import.meta.url
  ? fileURLToPath(import.meta.url)
  : typeof __filename === "string"
    ? __filename
    : path.resolve("flowturbo.js");
const found = findPackage(path.dirname(here));

/** A path within the package, whether or not there is such a file. */
export function packagePath(name: string): string {
  return path.join(found?.root ?? path.dirname(path.dirname(here)), name);
}

/**
 * A file or folder of the package.
 * @throws InstallationError if it is not there, with the settings of bundlers that keep it
 */
export function packageFile(name: string): string {
  const file = packagePath(name);
  if (found && existsSync(file)) return file;
  throw found ? leftOut(found.root, name) : bundled();
}

/** The package's version. @throws InstallationError if this code was bundled */
export function packageVersion(): string {
  return manifest().version;
}

/**
 * @param versions of the process; for tests
 * @throws InstallationError if this code was bundled, or if Node is older than the package supports
 */
export function checkInstallation(versions: NodeJS.ProcessVersions = process.versions): void {
  const { engines } = manifest();
  // Bun and Deno name a version of Node that they resemble.
  if (versions.bun || versions.deno || !isOlder(versions.node, engines.node)) return;
  throw new InstallationError(
    "node",
    `flowturbo needs Node ${engines.node.replace(">=", "")} or newer; this is Node ${versions.node}.`,
    "Install a newer Node.",
  );
}

/** Whether a version is below a range of the form ">=20.10". */
function isOlder(version: string, range: string): boolean {
  const [major, minor] = version.split(".").map(Number) as [number, number];
  const [least, leastMinor = 0] = range.replace(">=", "").split(".").map(Number) as [number, number?];
  return major < least || (major === least && minor < leastMinor);
}

function manifest(): Manifest {
  if (!found) throw bundled();
  return found.manifest;
}

function findPackage(start: string): { root: string; manifest: Manifest } | null {
  for (let folder = start; ; folder = path.dirname(folder)) {
    const manifest = readManifest(path.join(folder, "package.json"));
    if (manifest?.name === "flowturbo") return { root: folder, manifest };
    if (path.dirname(folder) === folder) return null;
  }
}

/** Null for a file that is not there, or is no package's: above a bundle there may be any. */
function readManifest(file: string): Manifest | null {
  try {
    return JSON.parse(readFileSync(file, "utf8"));
  } catch {
    return null;
  }
}

const settings =
  'esbuild --external:flowturbo; webpack externals: { flowturbo: "commonjs flowturbo" }, or "module flowturbo" with output.module; Vite ssr: { external: ["flowturbo"] }; Next.js serverExternalPackages: ["flowturbo"]';

function bundled(): InstallationError {
  return new InstallationError(
    "flowturbo",
    `flowturbo was bundled, or copied in part: its own files are not found from ${here}.`,
    `Mark it as external, and install it where the bundle runs: ${settings}.`,
  );
}

function leftOut(root: string, name: string): InstallationError {
  return new InstallationError(
    "flowturbo",
    `flowturbo's own ${name} is missing in ${root}; whatever copied the package left it out.`,
    'Copy all of the package (Next.js: outputFileTracingIncludes: { "/*": ["./node_modules/flowturbo/**/*"] }), or install it again.',
  );
}
