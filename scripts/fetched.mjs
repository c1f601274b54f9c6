/**
 * What the scripts that fetch NVIDIA's libraries and headers have in common: a folder under .cache/ (neither committed nor
 * packed) that appears complete or not at all, whatever number of processes fetch it at the same time.
 */

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fail, lacking, root } from "./headers.mjs";

/**
 * A folder with a version in its name, fetched if it is not there. Ends the process with `lacking` where it cannot be.
 * @param tool what fetches it, for the message where that is not on PATH
 * @param fill fetches everything into a folder, with `quietly`
 */
export function fetched(name, tool, fill) {
  const folder = join(root, ".cache", name);
  if (existsSync(folder)) return folder;
  const temporary = `${folder}.${process.pid}`;
  mkdirSync(temporary, { recursive: true });
  try {
    fill(temporary);
    renameSync(temporary, folder);
  } catch (error) {
    rmSync(temporary, { recursive: true, force: true });
    // Another process may have fetched it meanwhile.
    if (!existsSync(folder))
      fail(
        error.code === "ENOENT"
          ? `${error.path ?? tool} is not on PATH.`
          : `${tool} could not fetch ${name}: ${String(error.stderr ?? "").trim() || String(error.stdout ?? "").trim() || error.message}`,
        lacking,
      );
  }
  return folder;
}

export function quietly(command, args, options = {}) {
  execFileSync(command, args, { stdio: ["ignore", "pipe", "pipe"], maxBuffer: 2 ** 26, ...options });
}

/** A Python package of exactly one version, by pip, without what it depends on. */
export function fetchedByPip(name, requirement) {
  return fetched(name, "pip", (folder) =>
    quietly("python3", [
      ...["-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"],
      ...["--root-user-action", "ignore", "--only-binary", ":all:", "--target", folder, requirement],
    ]),
  );
}
