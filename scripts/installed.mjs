/**
 * For tests of the package as others install it: it is packed from the built dist/, and installed with other packages into
 * folders of .cache/. No install script runs.
 */

import { execFileSync, spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { fail, root } from "./headers.mjs";

/** Packs the package. @returns the tarball, in a folder that is gone when this process ends */
export function pack() {
  if (!existsSync(path.join(root, "dist/index.js"))) fail("dist/ is missing: run `npm run build`.");
  const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", temporaryFolder()];
  const [{ filename }] = JSON.parse(npm(root, args));
  return path.join(args.at(-1), filename);
}

const temporary = [];
process.once("exit", () => {
  for (const folder of temporary) rmSync(folder, { recursive: true, force: true });
});

/** A folder outside the repository, so that nothing is found in it or above; gone when this process ends. */
export function temporaryFolder() {
  const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-installed-"));
  temporary.push(folder);
  return folder;
}

/** Installs packages into a folder. */
export function install(folder, packages, manifest = {}) {
  mkdirSync(folder, { recursive: true });
  writeFileSync(path.join(folder, "package.json"), JSON.stringify({ name: "app", private: true, ...manifest }));
  npm(folder, ["install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", ...packages]);
  return folder;
}

/**
 * Packages that are fetched once, into .cache/<name>: fetched again when other versions are asked for.
 * @param kept of the first package, if not all: runtimes come with headers and documentation
 * @returns their folder node_modules
 */
export function fetched(name, packages, kept) {
  const folder = path.join(root, ".cache", name);
  const wanted = JSON.stringify(packages);
  const record = path.join(folder, "installed.json");
  if (!existsSync(record) || readFileSync(record, "utf8") !== wanted) {
    rmSync(folder, { recursive: true, force: true });
    install(folder, packages);
    const first = path.join(folder, "node_modules", packages[0].replace(/(?<=.)@.*/, ""));
    if (kept)
      for (const file of readdirSync(first, { recursive: true }))
        if (!kept.includes(file) && !statSync(path.join(first, file)).isDirectory()) rmSync(path.join(first, file));
    writeFileSync(record, wanted);
  }
  return path.join(folder, "node_modules");
}

function npm(cwd, args) {
  const env = { ...process.env, ONNXRUNTIME_NODE_INSTALL: "skip", npm_config_loglevel: "error" };
  return execFileSync("npm", args, { cwd, env, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
}

/** Runs a command to its end. @returns its exit code, and what it wrote to both outputs */
export function run(cwd, [command, ...args], { env = {}, seconds = 120 } = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, { cwd, env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "pipe"] });
    let output = "";
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding("utf8").on("data", (text) => {
        output += text;
      });
    const timer = setTimeout(() => child.kill("SIGKILL"), seconds * 1000);
    child.once("error", (error) => resolve({ code: null, output: error.message }));
    child.once("close", (code) => {
      clearTimeout(timer);
      resolve({ code, output: output.trim() });
    });
  });
}

/** Says what passed as it goes, and at the end how many. */
export class Checks {
  #failed = 0;
  #passed = 0;

  /** @param outcome of `run` @param expected in its output @param code that it ends with; null for any but 0 */
  expect(name, { code, output }, expected, wanted = 0) {
    const isRight = (wanted === null ? code !== 0 : code === wanted) && expected.test(output);
    if (isRight) this.#passed++;
    else this.#failed++;
    console.log(`${isRight ? "✔" : "✘"} ${name}`);
    if (!isRight) console.log(`    expected ${expected}; it ended with code ${code} and wrote:\n${output.slice(-2000)}`);
  }

  end() {
    console.log(`${this.#passed} passed, ${this.#failed} failed`);
    process.exitCode = this.#failed === 0 && this.#passed > 0 ? 0 : 1;
  }
}
