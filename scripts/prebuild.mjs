/**
 * `npm run build:prebuilds`: the addons that the package carries, native/<library>/prebuilds/linux-x64/, made by prebuildify
 * (Node-API 8, glibc). One folder for each library, since node-gyp-build takes one addon from a folder.
 *
 *   --pack   before `npm pack`: where they cannot be compiled, the ones that are there are packed as they are, or none
 */

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { parseArgs } from "node:util";
import { fail, libraries, root } from "./headers.mjs";

const { values } = parseArgs({ options: { pack: { type: "boolean" } } });
// All output goes to stderr, since `npm pack --json` prints JSON to stdout.
const run = (script, args, env) =>
  spawnSync(process.execPath, [script, ...args], { cwd: root, stdio: ["ignore", 2, 2], env: { ...process.env, ...env } })
    .status;

// Built first without node-gyp, since the build's own messages say more clearly what this machine lacks.
const built = run(path.join(root, "scripts/build-native.mjs"), []);
if (built !== 0) giveUp(built ?? 1);
const prebuildify = createRequire(import.meta.url).resolve("prebuildify/bin.js");

// node-gyp downloads Node's headers unless it is given a folder of them, but nothing is compiled with them: one with an
// empty configuration will do.
const headers = path.join(root, ".cache/node-gyp");
mkdirSync(path.join(headers, "include/node"), { recursive: true });
for (const name of ["common.gypi", "config.gypi"])
  writeFileSync(path.join(headers, "include/node", name), '{ "target_defaults": {}, "variables": {} }\n');

// Into a folder of its own first, so that a failure leaves the prebuilds that are there.
const made = path.join(root, ".cache/prebuilds");
rmSync(made, { recursive: true, force: true });
for (const kind of libraries) {
  const out = path.join(made, kind);
  rmSync(path.join(root, "build"), { recursive: true, force: true });
  mkdirSync(out, { recursive: true });
  const name = `flowturbo_${kind.replace("-", "_")}`;
  const status = run(
    prebuildify,
    ["--napi", "--strip", "--tag-libc", "-t", process.versions.node, "--name", name, "--out", out],
    { npm_config_nodedir: headers, FLOWTURBO_ADDON: kind },
  );
  if (status !== 0) giveUp(status ?? 1, `prebuildify failed for ${kind}; its messages are above.`);
}
for (const kind of libraries) {
  const prebuilds = path.join(root, "native", kind, "prebuilds");
  rmSync(prebuilds, { recursive: true, force: true });
  mkdirSync(path.dirname(prebuilds), { recursive: true });
  renameSync(path.join(made, kind, "prebuilds"), prebuilds);
}
for (const folder of [made, path.join(root, "build")]) rmSync(folder, { recursive: true, force: true });

/** Ends with the code; before `npm pack` it says what is packed in place of what could not be compiled. */
function giveUp(code, message) {
  if (!values.pack) {
    if (message) fail(message, code);
    process.exit(code);
  }
  const there = libraries.filter((kind) => existsSync(path.join(root, "native", kind, "prebuilds")));
  const missing = libraries.filter((kind) => !there.includes(kind));
  console.error(`warning: the native addons could not be compiled here${message ? ` (${message})` : ""}.`);
  if (there.length > 0) console.error(`warning: packed as they are, from an earlier build: ${there.join(", ")}.`);
  if (missing.length > 0) console.error(`warning: packed without an addon: ${missing.join(", ")}; those runtimes cannot be used.`);
  process.exit();
}
