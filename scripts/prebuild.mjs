/**
 * `npm run build:prebuilds`: the addons that the package carries, native/<library>/prebuilds/linux-x64/, made by prebuildify
 * (Node-API 8, glibc). One folder for each library, since node-gyp-build takes one addon from a folder.
 *
 *   --pack   before `npm pack`: a machine that cannot compile packs the addons that exist already, or none
 */

import { spawnSync } from "node:child_process";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { parseArgs } from "node:util";
import { fail, lacking, libraries, root } from "./headers.mjs";

const { values } = parseArgs({ options: { pack: { type: "boolean" } } });
const prebuildify = createRequire(import.meta.url).resolve("prebuildify/bin.js");
// All output goes to stderr, since `npm pack --json` prints JSON to stdout.
const run = (script, args, env) =>
  spawnSync(process.execPath, [script, ...args], { cwd: root, stdio: ["ignore", 2, 2], env: { ...process.env, ...env } })
    .status;

// Built first without node-gyp, since the build's own messages say more clearly what this machine lacks.
const built = run(path.join(root, "scripts/build-native.mjs"), []);
if (built === lacking && values.pack) {
  console.error("The package is made without compiling its native addons.");
  process.exit();
}
if (built !== 0) process.exit(built ?? 1);

// node-gyp downloads Node's headers unless it is given a folder of them, but nothing is compiled with them: one with an
// empty configuration will do.
const headers = path.join(root, ".cache/node-gyp");
mkdirSync(path.join(headers, "include/node"), { recursive: true });
for (const name of ["common.gypi", "config.gypi"])
  writeFileSync(path.join(headers, "include/node", name), '{ "target_defaults": {}, "variables": {} }\n');

for (const kind of libraries) {
  const out = path.join(root, "native", kind);
  rmSync(path.join(out, "prebuilds"), { recursive: true, force: true });
  rmSync(path.join(root, "build"), { recursive: true, force: true });
  mkdirSync(out, { recursive: true });
  const name = `flowturbo_${kind.replace("-", "_")}`;
  const status = run(
    prebuildify,
    ["--napi", "--strip", "--tag-libc", "-t", process.versions.node, "--name", name, "--out", out],
    { npm_config_nodedir: headers, FLOWTURBO_ADDON: kind },
  );
  if (status !== 0) fail(`prebuildify failed for ${kind}; its messages are above.`);
}
rmSync(path.join(root, "build"), { recursive: true, force: true });
