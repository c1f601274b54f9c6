/**
 * `node scripts/bundle-verify.mjs <file>`: verify:gpu as one JavaScript file, for a machine without this repository. With
 * `--check` it needs, beside a bundle, only the package that it is put into (`node_modules/flowturbo/verify/gpu.js`, say): its
 * package.json, its addons, and node-gyp-build, which finds them.
 */

import { realpathSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { fail, root } from "./headers.mjs";

/** @param outfile made, or replaced */
export async function bundleVerify(outfile) {
  await build({
    entryPoints: [join(root, "verify/gpu.ts")],
    outfile,
    ...{ bundle: true, platform: "node", format: "esm", target: "node20", logLevel: "warning" },
    // Binaries, which a file cannot hold, and which --check does not load.
    external: ["sharp", "onnxruntime-node"],
  });
}

if (realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const [outfile] = process.argv.slice(2);
  if (!outfile) fail("Name the file to write: `node scripts/bundle-verify.mjs <file>`.", 2);
  await bundleVerify(outfile);
}
