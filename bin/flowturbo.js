#!/usr/bin/env node
/**
 * The command that npm links. It runs dist/cli.js, or says in one sentence why it cannot: Node is too old, or a package that
 * the command line itself needs is missing. The package always contains that file; a clone lacks it after
 * `npm ci --ignore-scripts`, since the script `prepare` did not run. So a clone builds it once, at the first command.
 */

import { existsSync, readFileSync } from "node:fs";

const cli = new URL("../dist/cli.js", import.meta.url);
checkNode();
if (!existsSync(cli)) await build();
// What V8 makes of the code is kept from one command to the next, where Node can do that (22.1 and later).
(await import("node:module")).enableCompileCache?.();
await import(cli.href).catch((error) => {
  // Its message has the package's name and who imports it.
  if (error.code !== "ERR_MODULE_NOT_FOUND") throw error;
  fail(`${error.message}. Run \`npm install\` again.`);
});

/** In syntax that old versions can read. Bun and Deno name a version that they resemble. */
function checkNode() {
  const { engines } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8"));
  const floor = engines.node.replace(">=", "");
  const [major, minor] = process.versions.node.split(".").map(Number);
  const [least, leastMinor = 0] = floor.split(".").map(Number);
  if (process.versions.bun || process.versions.deno || major > least || (major === least && minor >= leastMinor))
    return;
  fail(`flowturbo needs Node ${floor} or newer; this is Node ${process.versions.node}.`);
}

/** Builds dist/ in a folder of its own and renames it, so that no other command ever imports a part of a build. */
async function build() {
  const { spawnSync } = await import("node:child_process");
  const { mkdirSync, renameSync, rmSync } = await import("node:fs");
  const { fileURLToPath } = await import("node:url");
  const folder = (path) => fileURLToPath(new URL(`../${path}`, import.meta.url));
  if (!existsSync(folder("lib/cli/main.ts"))) fail("dist/cli.js is missing. Install the package flowturbo again.");
  const tsup = folder("node_modules/tsup/dist/cli-default.js");
  if (!existsSync(tsup)) fail("dist/cli.js is missing, and tsup, which builds it, is not installed. Run `npm ci`.");
  const output = folder(`.cache/dist-${process.pid}`);
  mkdirSync(output, { recursive: true });
  const { status, stdout, stderr, error } = spawnSync(process.execPath, [tsup, "--out-dir", output], {
    cwd: folder("."),
    encoding: "utf8",
  });
  if (status !== 0) {
    rmSync(output, { recursive: true, force: true });
    fail(
      `dist/cli.js is missing and could not be built:\n${error?.message ?? stdout + stderr}\nRun \`npm ci\` and \`npm run build\`.`,
    );
  }
  try {
    renameSync(output, folder("dist"));
  } catch (cause) {
    // Another command may have built it meanwhile. Otherwise dist/ holds parts of an old build.
    rmSync(output, { recursive: true, force: true });
    if (!existsSync(cli)) fail(`dist/ is in the way (${cause.message}). Remove it, or run \`npm run build\`.`);
  }
}

function fail(message) {
  console.error(`error: ${message}`);
  process.exit(1);
}
