// The package's own files and the version of Node: what is said where they are not as they should be.
import { existsSync } from "node:fs";
import { afterEach, describe, expect, it } from "vitest";
import { checkInstallation, packageFile, packagePath, packageVersion } from "../../lib/common/package.js";
import { libcOf, platformText, thisPlatform } from "../../lib/common/platform.js";
import { InstallationError } from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/flowturbo.js";
import { compileEngines } from "../../lib/generation/engines.js";
import { root } from "../support/fixtures.js";

describe("the package's files", () => {
  it("are found from the code", () => {
    expect(packagePath("")).toBe(root);
    expect(packageVersion()).toMatch(/^\d+\.\d+\.\d+/);
    expect(existsSync(packageFile("models/shapes/model_index.json"))).toBe(true);
  });

  it("that are missing are named, with the setting that keeps them", () => {
    expect(() => packageFile("models/none")).toThrow(InstallationError);
    expect(() => packageFile("models/none")).toThrow(/own models\/none is missing.*outputFileTracingIncludes/);
  });
});

describe("the version of Node", () => {
  const versions = (node: string, others = {}) => ({ ...process.versions, node, ...others });

  it.each(["20.9.0", "18.20.4", "0.12.0"])("%s is refused in one sentence", (node) => {
    expect(() => checkInstallation(versions(node))).toThrow(
      `flowturbo needs Node 20.10 or newer; this is Node ${node}.`,
    );
  });

  it.each(["20.10.0", "20.19.6", "22.0.0", "26.1.0", "100.0.0"])("%s is supported", (node) => {
    expect(() => checkInstallation(versions(node))).not.toThrow();
  });

  it("of Bun and Deno is not looked at", () => {
    expect(() => checkInstallation(versions("20.0.0", { bun: "1.0.0" }))).not.toThrow();
    expect(() => checkInstallation(versions("20.0.0", { deno: "2.0.0" }))).not.toThrow();
  });
});

describe("the platform", () => {
  it("is that of this process", () => {
    const { os, cpu, libc } = thisPlatform();
    expect([os, cpu]).toEqual([process.platform, process.arch]);
    expect(libc).toBe(process.platform === "linux" ? (existsSync("/etc/alpine-release") ? "musl" : "glibc") : null);
  });

  it("has musl where the process has loaded it", () => {
    expect(libcOf(["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"])).toBe("glibc");
    expect(libcOf(["/lib/ld-musl-x86_64.so.1"])).toBe("musl");
    expect(libcOf(["/lib/libc.musl-aarch64.so.1"])).toBe("musl");
    expect(libcOf([])).toBe("glibc");
    expect(platformText({ os: "linux", cpu: "x64", libc: "musl" })).toBe("linux-x64 (musl)");
  });
});

describe("a Node that is too old", () => {
  const found = Object.getOwnPropertyDescriptor(process, "versions")!;
  afterEach(() => void Object.defineProperty(process, "versions", found));

  it("is named by every function that begins with a checkpoint, before that is read", async () => {
    Object.defineProperty(process, "versions", { ...found, value: { ...process.versions, node: "18.20.4" } });
    const tooOld = { code: "ERR_FLOWTURBO_INSTALLATION", package: "node" };
    await expect(FlowTurbo.load("/nowhere")).rejects.toMatchObject(tooOld);
    await expect(compileEngines("/nowhere")).rejects.toMatchObject(tooOld);
  });
});
