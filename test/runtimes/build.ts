/**
 * Bundles the sources under test as a release does (flat, beside each other) into a folder of the test file's own, so
 * that the tests need no earlier build and can never see a stale one. Within node_modules, where packages resolve.
 */

import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { build } from "esbuild";

export interface Bundles {
  /** Built host.ts, for the option of that name. */
  readonly host: URL;
  /** A script that uses the runtime and is told how to end: see endings.ts. */
  readonly endings: string;
  remove(): void;
}

/** @param onnxruntime a module that stands in for onnxruntime-node in the process that runs graphs */
export async function bundle(onnxruntime?: string): Promise<Bundles> {
  const root = path.resolve(import.meta.dirname, "../..");
  const cache = path.join(root, "node_modules/.cache");
  mkdirSync(cache, { recursive: true });
  const folder = mkdtempSync(path.join(cache, "flowturbo-runtime-"));
  await build({
    entryPoints: {
      "onnxruntime-host": path.join(root, "lib/runtimes/onnxruntime/host.ts"),
      endings: path.join(root, "test/runtimes/endings.ts"),
    },
    outdir: folder,
    bundle: true,
    platform: "node",
    format: "esm",
    packages: "external",
    ...(onnxruntime === undefined ? {} : { alias: { "onnxruntime-node": onnxruntime } }),
    logLevel: "error",
  });
  return {
    host: pathToFileURL(path.join(folder, "onnxruntime-host.js")),
    endings: path.join(folder, "endings.js"),
    remove: () => rmSync(folder, { recursive: true, force: true }),
  };
}
