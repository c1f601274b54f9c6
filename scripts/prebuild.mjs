/**
 * `npm run prebuild`: the addons that the package carries, native/<library>/prebuilds/linux-x64/, made by prebuildify
 * (Node-API 8, glibc). One folder for each library, since node-gyp-build takes one addon from a folder.
 */

import { spawnSync } from "node:child_process";
import { existsSync, mkdirSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { fail, root } from "./headers.mjs";

const require = createRequire(import.meta.url);
const prebuildify = require.resolve("prebuildify/bin.js");
// node-gyp wants Node's headers although nothing is compiled with them: those beside this Node, where there are any.
const prefix = path.dirname(path.dirname(process.execPath));
const headers = existsSync(path.join(prefix, "include/node/node_api.h")) ? { npm_config_nodedir: prefix } : {};

for (const kind of ["tensorrt", "tensorrt-rtx"]) {
  const out = path.join(root, "native", kind);
  rmSync(path.join(out, "prebuilds"), { recursive: true, force: true });
  rmSync(path.join(root, "build"), { recursive: true, force: true });
  mkdirSync(out, { recursive: true });
  const { status } = spawnSync(
    process.execPath,
    [prebuildify, "--napi", "--strip", "--tag-libc", "-t", process.versions.node, "--name", `flowturbo_${kind.replace("-", "_")}`, "--out", out],
    { cwd: root, stdio: "inherit", env: { ...headers, ...process.env, FLOWTURBO_ADDON: kind } },
  );
  if (status !== 0) fail(`prebuildify failed for ${kind}; its messages are above.`);
}
rmSync(path.join(root, "build"), { recursive: true, force: true });
