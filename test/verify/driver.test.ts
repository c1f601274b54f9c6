// verify:gpu --driver from end to end on the simulated driver: the stand-in's own kernel as a driver would take it, a report
// that is whole after each check, and that it fails where a wrong bit, a lost device, a hang or a capture that does not
// happen is injected.
import { spawn } from "node:child_process";
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { type DriverReport, driverMarkdown } from "../../verify/driver.js";
import { describeAddons, temporaryFolder } from "../native/support.js";
import { exactPrograms } from "../runtimes/models.js";
import { root } from "../support/fixtures.js";
import { cases } from "../support/sampling.js";

const simulatedFolder = path.join(root, ".cache/simulated");
const standIn = path.join(simulatedFolder, "stand-in");
const kernel = path.join(standIn, "formula.ptx");
const hasDriver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"].some((folder) =>
  existsSync(path.join(folder, "libcuda.so.1")),
);

interface Ended {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly folder: string;
  readonly report: () => DriverReport;
}

/** On the simulated driver, unless the environment says otherwise. */
function verify(args: readonly string[] = [], env: NodeJS.ProcessEnv = {}): Promise<Ended> {
  const folder = temporaryFolder();
  const tsx = [path.join(root, "node_modules/tsx/dist/cli.mjs"), "--tsconfig", path.join(root, "bench/tsconfig.json")];
  const child = spawn(
    process.execPath,
    [...tsx, path.join(root, "verify/gpu.ts"), "--driver", "--out", folder, ...args],
    // Of the addons as they are shipped: those with sanitizers have a test of their own.
    { cwd: root, env: { ...process.env, FLOWTURBO_ADDON_DIR: undefined, LD_LIBRARY_PATH: simulatedFolder, ...env } },
  );
  let [stdout, stderr] = ["", ""];
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  child.stderr.on("data", (chunk) => {
    stderr += chunk;
  });
  const report = () => JSON.parse(readFileSync(path.join(folder, "driver.json"), "utf8")) as DriverReport;
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("close", (status) => resolve({ status, stdout, stderr, folder, report }));
  });
}

const failedOf = ({ report }: Ended) => report().checks.filter(({ passed }) => !passed);

describeAddons("verify:gpu --driver", () => {
  it.skipIf(hasDriver)("ends with 3 without a driver, and with 1 without the stand-in", async () => {
    const [without, empty] = await Promise.all([
      verify([], { LD_LIBRARY_PATH: undefined }),
      verify(["--tensorrt-dir", temporaryFolder()]),
    ]);
    expect(without.stderr).toMatch(/Nothing was verified: there is no GPU here.*libcuda\.so\.1/s);
    expect(without).toMatchObject({ status: 3, stdout: "" });
    expect(empty.stderr).toMatch(/The stand-in for TensorRT is not in .*npm run build:native -- --simulated/s);
    expect(empty).toMatchObject({ status: 1, stdout: "" });
  });

  it.each([
    [["one"], /--driver takes no checkpoint/],
    [["--case-timeout", "soon"], /--case-timeout is a number .*not soon/],
  ])("refuses %j", async (args, message) => {
    const { status, stderr } = await verify(args);
    expect(stderr).toMatch(message);
    expect(status).toBe(2);
  });

  // Without a compiler for CUDA (pip's NVRTC or nvcc) there is no kernel.
  const lacksKernel = !existsSync(kernel) && !process.env.FLOWTURBO_REQUIRE_NATIVE;
  describe.skipIf(lacksKernel)("with the stand-in", () => {
    it("passes: every schedule plain and captured, and 1,000 runs in mixture", async () => {
      const ended = await verify();
      const report = ended.report();
      expect(failedOf(ended)).toEqual([]);
      expect(report).toMatchObject({ passed: true, complete: true, machine: { gpu: "Simulated GPU", driver: "13.0" } });
      const names = report.checks.map(({ check }) => check);
      for (const { name } of cases) {
        expect(names).toContain(`schedule ${name}, launch by launch`);
        expect(names).toContain(`schedule ${name}, as one CUDA graph`);
      }
      for (const { name } of exactPrograms) expect(names).toContain(`a program ${name}`);
      const mixture = report.checks.find(({ check }) => check.startsWith("1000 runs in mixture"))!;
      const runs = [...mixture.detail.matchAll(/(\d+) (?:plain|captured|workspace|aborted)/g)].map(([, runs]) =>
        Number(runs),
      );
      expect(runs).toHaveLength(4);
      expect(Math.min(...runs)).toBeGreaterThan(100);
      expect(runs.reduce((sum, each) => sum + each, 0)).toBeGreaterThanOrEqual(1000);
      expect(names.filter((name) => name.startsWith("executor without Node")).length).toBeGreaterThan(10);
      expect(ended.stdout).toBe(driverMarkdown(report));
      expect(readFileSync(path.join(ended.folder, "driver.md"), "utf8")).toBe(driverMarkdown(report));
      expect(ended.status).toBe(0);
    });

    it("fails where one bit of one value is wrong, and names the value", async () => {
      const ended = await verify([], { FLOWTURBO_SIMULATED_FAULT: "bit kernel 300" });
      expect(ended.status).toBe(1);
      const [first, ...others] = failedOf(ended);
      expect(first!.check).toMatch(/^schedule /);
      expect(first!.detail).toMatch(/has -?\d+\.\d+ at \d+, where the closed form is -?\d+\.\d+: other bits/);
      // The same kernel of the other process.
      expect(others.map(({ check }) => check)).toEqual(["executor without Node: the next"]);
      expect(ended.report()).toMatchObject({ passed: false, complete: true });
    });

    it("fails where a program is not replayed as one CUDA graph, and says why", async () => {
      const ended = await verify([], { FLOWTURBO_SIMULATED_FAULT: "capture kernel" });
      expect(ended.status).toBe(1);
      const failed = failedOf(ended);
      for (const { name } of cases)
        expect(failed.find(({ check }) => check === `schedule ${name}, as one CUDA graph`)?.detail).toMatch(
          /4 runs are replayed as one CUDA graph; 0 were\..*refused to launch/,
        );
      expect(failed.some(({ check }) => check.endsWith("launch by launch"))).toBe(false);
    });

    it("fails where the device is lost, and goes on with the next check", async () => {
      const ended = await verify([], { FLOWTURBO_SIMULATED_FAULT: "lost kernel 100" });
      expect(ended.status).toBe(1);
      const failed = failedOf(ended);
      expect(failed[0]!.detail).toMatch(/DeviceLostError: .*719/);
      expect(ended.report()).toMatchObject({ passed: false, complete: true });
      expect(failed.length).toBeGreaterThan(10);
    });

    it("ends a check that hangs, and leaves the report of those before", async () => {
      const ended = await verify(["--case-timeout", "2"], { FLOWTURBO_SIMULATED_FAULT: "hang kernel 150" });
      expect(ended.status).toBe(1);
      const report = ended.report();
      expect(report).toMatchObject({ passed: false, complete: false });
      expect(report.checks.at(-1)).toMatchObject({ passed: false, detail: "Hung: it did not end within 2 s" });
      expect(failedOf(ended)).toHaveLength(1);
      expect(report.checks.length).toBeGreaterThan(3);
      expect(readFileSync(path.join(ended.folder, "driver.md"), "utf8")).toMatch(
        /^# verify:gpu --driver: not finished\n/,
      );
    });

    describe("its kernel", () => {
      const text = lacksKernel ? "" : readFileSync(kernel, "utf8");

      it("is for every GPU and driver that TensorRT 11 runs on, and rounds after each operation", () => {
        expect(Number(text.match(/^\.version (\S+)$/m)![1])).toBeLessThanOrEqual(9);
        expect(text).toMatch(/^\.target sm_75$/m);
        expect(text).toMatch(/\bmul\.rn\.f32\b/);
        expect(text).toMatch(/\badd\.rn\.f32\b/);
        expect(text).not.toMatch(/\bfma\.|\.ftz\b/);
      });

      it.each([
        ["is missing", null, /formula\.ptx cannot be read/],
        ["is newer than the driver", text.replace(/^\.version .*/m, ".version 9.3"), /loading the kernel answered 222/],
        ["has another name", text.replaceAll("flowturbo_formula(", "another("), /loading the kernel answered 500/],
        ["is no PTX", "nothing", /loading the kernel answered 218/],
      ])("is refused where it %s", async (_, changed, message) => {
        const folder = path.join(temporaryFolder(), "stand-in");
        cpSync(standIn, folder, { recursive: true });
        if (changed === null) rmSync(path.join(folder, "formula.ptx"));
        else writeFileSync(path.join(folder, "formula.ptx"), changed);
        const ended = await verify(["--tensorrt-dir", folder]);
        expect(ended.status).toBe(1);
        expect(failedOf(ended)[0]!.detail).toMatch(message);
      });

      it("takes a parameter of the size that the host gives it", async () => {
        const folder = path.join(temporaryFolder(), "stand-in");
        cpSync(standIn, folder, { recursive: true });
        const larger = text.replace(/flowturbo_formula_param_0\[\d+\]/, "flowturbo_formula_param_0[4000]");
        expect(larger).not.toBe(text);
        writeFileSync(path.join(folder, "formula.ptx"), larger);
        const ended = await verify(["--tensorrt-dir", folder]);
        expect(failedOf(ended)[0]!.detail).toMatch(/loading the kernel answered 1 /);
      });
    });
  });
});
