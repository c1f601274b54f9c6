// However a program ends during a launch of many seconds, it ends as Node would and leaves no process behind.
import { spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { setTimeout } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { type Bundles, bundle } from "./build.js";

let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle();
});
afterAll(() => bundles.remove());

/** State and parent of a process; undefined if there is none. */
function inspect(pid: number): { state: string; parent: number } | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    const [state, parent] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return { state: state!, parent: Number(parent) };
  } catch {
    return undefined;
  }
}

function childrenOf(parent: number): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => inspect(pid)?.parent === parent);
}

/** A zombie computes nothing and holds nothing: it waits for the one process that may ask how it ended. */
async function gone(pid: number, milliseconds: number): Promise<boolean> {
  for (const end = performance.now() + milliseconds; performance.now() < end; await setTimeout(20)) {
    const state = inspect(pid)?.state;
    if (state === undefined || state === "Z") return true;
  }
  return false;
}

/** Runs the script, calls `act` when its launch is under way, and waits for its end. */
async function endingOf(way: string, act: (script: { pid: number; host: number; said: Promise<string> }) => unknown) {
  const script = spawn(process.execPath, [bundles.endings, way], { stdio: ["pipe", "pipe", "pipe"] });
  const pid = script.pid!;
  let stderr = "";
  script.stderr.setEncoding("utf8").on("data", (text) => (stderr += text));
  const lines = script.stdout.setEncoding("utf8")[Symbol.asyncIterator]();
  const ended = new Promise<{ code: number | null; signal: string | null }>((resolve) =>
    script.once("exit", (code, signal) => resolve({ code, signal })),
  );
  const next = async () => (await lines.next()).value as string;
  expect(await next(), stderr).toBe("running\n");
  const [host, ...others] = childrenOf(pid);
  expect(host).toBeDefined();
  expect(others).toHaveLength(way === "sibling" ? 1 : 0);
  const said = next();
  script.stdin.on("error", () => {}).write("go on\n");
  await act({ pid, host: host!, said });
  script.stdin.write("go on\n");
  const ending = await ended;
  expect(await gone(host!, 10_000), `the child ${host} outlives ${way}`).toBe(true);
  // What it wrote may arrive after it has ended.
  return { ...ending, stderr: () => stderr };
}

describe.skipIf(process.platform !== "linux")("ending during a launch", () => {
  it.concurrent("process.exit(0)", async () => {
    expect(await endingOf("exit", () => {})).toMatchObject({ code: 0, signal: null });
  });

  it.concurrent("an uncaught exception", async () => {
    const { code, stderr } = await endingOf("throw", () => {});
    expect(code).toBe(1);
    // Not expect.poll: with tests side by side it may not know which one it is called in.
    await vi.waitFor(() => expect(stderr()).toContain("uncaught, as the test wants"));
  });

  it.concurrent.each(["SIGINT", "SIGTERM", "SIGKILL"] as const)("%s", async (signal) => {
    // A shell calls this 130, 143 and 137.
    expect(await endingOf("wait", ({ pid }) => process.kill(pid, signal))).toMatchObject({ code: null, signal });
  });

  it.concurrent("SIGKILL while another child of the same parent lives on", async () => {
    expect(await endingOf("sibling", ({ pid }) => process.kill(pid, "SIGKILL"))).toMatchObject({ signal: "SIGKILL" });
  });

  it.concurrent("worker.terminate()", async () => {
    const ending = await endingOf("terminate", async ({ host, said }) => {
      expect(await said).toBe("terminated\n");
      expect(await gone(host, 10_000)).toBe(true);
    });
    expect(ending).toMatchObject({ code: 0, signal: null });
  });

  it.concurrent("Ctrl-C, which all of the group receive, is the parent's to handle", async () => {
    const ending = await endingOf("wait", async ({ pid, host }) => {
      process.kill(host, "SIGINT");
      process.kill(host, "SIGTERM");
      process.kill(host, "SIGHUP");
      expect(await gone(host, 300)).toBe(false);
      process.kill(pid, "SIGINT");
    });
    expect(ending.signal).toBe("SIGINT");
  });
});

describe("a script that forgets dispose()", () => {
  it.concurrent.each(["idle", "started"])("ends by itself (%s)", async (way) => {
    const script = spawn(process.execPath, [bundles.endings, way], { stdio: "inherit" });
    const code = await new Promise((resolve) => script.once("exit", (code, signal) => resolve(code ?? signal)));
    expect(code).toBe(0);
  });
});
