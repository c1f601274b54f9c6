// The process of the runtime, which `generate` starts before it reads anything: when there is one, and that none is left.
import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { run, temporaryFolder } from "./support.js";

afterEach(() => vi.unstubAllEnvs());

/** Runs the command; the numbers of the processes that it forked. */
async function forked(args: readonly string[]) {
  const folder = temporaryFolder();
  const [spy, log] = [path.join(folder, "spy.cjs"), path.join(folder, "log")];
  writeFileSync(log, "");
  writeFileSync(
    spy,
    `const processes = require("node:child_process");
     const { fork } = processes;
     processes.fork = (...args) => {
       const child = fork(...args);
       require("node:fs").appendFileSync(${JSON.stringify(log)}, child.pid + "\\n");
       return child;
     };
     require("node:module").syncBuiltinESMExports();`,
  );
  vi.stubEnv("NODE_OPTIONS", `--require ${spy}`);
  const finished = await run(args, folder);
  return { ...finished, pids: readFileSync(log, "utf8").split("\n").filter(Boolean).map(Number) };
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

describe("the process of the runtime", () => {
  it.each([
    [["--help"]],
    [["--version"]],
    [["generate", "--help"]],
    [["generate", "a", "-h"]],
    [["inspect", "no.png"]],
    [["generate", "a", "--runtime", "tensorrt"]],
    [["generate", "a", "--runtime=webgpu", "--steps", "x"]],
  ])("is not started for %j", async (args) => {
    expect((await forked(args)).pids).toEqual([]);
  });

  it("is one for a command that draws, and ends with it", async () => {
    const { code, pids } = await forked(["generate", "a", "--steps", "1", "--threads", "1", "--weights", "lazy"]);
    expect([code, pids.length]).toEqual([0, 1]);
    expect(isAlive(pids[0]!)).toBe(false);
  });

  it.each([
    ["an option that is wrong", ["--width", "7"], 2],
    ["a flag that there is not", ["--colour", "red"], 2],
    ["a folder that is none", ["--model", "./nothing"], 1],
  ])("ends with a command that fails: %s", async (_, flags, wanted) => {
    const { code, pids } = await forked(["generate", "a", ...flags]);
    expect([code, pids.length]).toEqual([wanted, 1]);
    await vi.waitFor(() => expect(isAlive(pids[0]!)).toBe(false), 10_000);
  });
});
