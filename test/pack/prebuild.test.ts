// `npm pack` on a machine that cannot compile: the addons that are there are packed as they are, or none.
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterEach, beforeEach, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), "flowturbo-prebuild-"));
  cpSync(path.join(root, "scripts"), path.join(folder, "scripts"), { recursive: true });
  cpSync(path.join(root, "package.json"), path.join(folder, "package.json"));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

/** Without CMake and without any package. */
function prebuild(...args: string[]) {
  const empty = path.join(folder, "bin");
  mkdirSync(empty, { recursive: true });
  return spawnSync(process.execPath, [path.join(folder, "scripts/prebuild.mjs"), ...args], {
    encoding: "utf8",
    env: { ...process.env, PATH: empty },
  });
}

it("packs what an earlier build left, and says so", () => {
  const addon = path.join(folder, "native/tensorrt/prebuilds/linux-x64/flowturbo_tensorrt.glibc.node");
  mkdirSync(path.dirname(addon), { recursive: true });
  writeFileSync(addon, "an addon");
  const { status, stderr, stdout } = prebuild("--pack");
  expect(status, stderr).toBe(0);
  expect(stdout).toBe("");
  expect(stderr).toMatch(/cmake is not on PATH/);
  expect(stderr).toMatch(/packed as they are, from an earlier build: tensorrt\.\n/);
  expect(stderr).toMatch(/packed without an addon: tensorrt-rtx;/);
  expect(existsSync(addon)).toBe(true);
});

it("packs none where there is none, and says so", () => {
  const { status, stderr } = prebuild("--pack");
  expect(status, stderr).toBe(0);
  expect(stderr).toMatch(/packed without an addon: tensorrt, tensorrt-rtx;/);
});

it("fails where the addons are to be published", () => {
  const { status, stderr } = prebuild();
  expect(status).toBe(3);
  expect(stderr).toMatch(/cmake is not on PATH/);
});
