// Installations that run no package's scripts: `npm install --ignore-scripts`, and npm 12, which runs none that were not
// allowed. A clone and the packed package draw a picture all the same.
import { execFileSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

let folder: string;
let clone: string;

function run(cwd: string, command: string, ...args: string[]): string {
  // Also for npx, which would run `prepare` of a folder that it links.
  const env = { ...process.env, npm_config_ignore_scripts: "true", npm_config_prefer_offline: "true" };
  return execFileSync(command, args, { cwd, encoding: "utf8", env, stdio: ["ignore", "pipe", "pipe"] });
}

beforeAll(() => {
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-ignore-scripts-"));
  clone = path.join(folder, "clone");
  const files = execFileSync("git", ["ls-files", "-z", "--cached", "--others", "--exclude-standard"], { cwd: root });
  // A link named node_modules is no folder, so .gitignore does not exclude it.
  for (const file of files.toString().split("\0"))
    if (file && file !== "node_modules" && existsSync(path.join(root, file)))
      cpSync(path.join(root, file), path.join(clone, file));
  run(clone, "npm", "ci", "--no-audit", "--no-fund");
}, 300_000);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

it("a clone builds itself at the first command and draws", () => {
  expect(existsSync(path.join(clone, "dist"))).toBe(false);
  // An empty cache: npx finds the command in the clone and needs no registry.
  const npx = (...args: string[]) =>
    run(clone, "npx", "--offline", "--cache", path.join(folder, "cache"), "flowturbo", ...args);
  expect(npx("generate", "a red circle", "--steps", "2", "--out", "picture.png")).toBe("picture.png\n");
  expect(existsSync(path.join(clone, "picture.png"))).toBe(true);
  expect(existsSync(path.join(clone, "dist/index.d.ts"))).toBe(true);
  // Nothing else is left of the build.
  expect(readdirSync(path.join(clone, ".cache"))).toEqual([]);
}, 180_000);

it("the package draws", () => {
  const [{ filename }] = JSON.parse(run(clone, "npm", "pack", "--json", "--pack-destination", folder));
  const app = path.join(folder, "app");
  mkdirSync(app);
  writeFileSync(path.join(app, "package.json"), '{ "name": "app", "private": true, "type": "module" }');
  run(app, "npm", "install", "--no-audit", "--no-fund", path.join(folder, filename));
  expect(run(app, "npx", "--no", "flowturbo", "generate", "a red circle", "--seed", "1")).toBe("flowturbo-1.png\n");
  expect(existsSync(path.join(app, "flowturbo-1.png"))).toBe(true);
}, 180_000);

it("a clone that cannot build says what to run", () => {
  rmSync(path.join(clone, "dist"), { recursive: true });
  const failure = () => {
    try {
      return run(clone, process.execPath, "bin/flowturbo.js", "--version");
    } catch (error) {
      return (error as { stderr: string }).stderr;
    }
  };
  writeFileSync(path.join(clone, "lib/index.ts"), "export const = 1;\n");
  expect(failure()).toMatch(
    /^error: dist\/cli\.js is missing and could not be built:\n.*lib\/index\.ts.*\nRun `npm ci`/s,
  );
  expect(existsSync(path.join(clone, "dist"))).toBe(false);
  rmSync(path.join(clone, "node_modules"), { recursive: true });
  expect(failure()).toBe("error: dist/cli.js is missing, and tsup, which builds it, is not installed. Run `npm ci`.\n");
  rmSync(path.join(clone, "lib"), { recursive: true });
  expect(failure()).toBe("error: dist/cli.js is missing. Install the package flowturbo again.\n");
}, 180_000);
