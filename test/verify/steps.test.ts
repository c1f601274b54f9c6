// Steps within a budget, with commands that pass, fail, hang, leave processes behind or cannot be started.
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, describe, expect, it, vi } from "vitest";
import { type Step, Steps, type Summary, summaryText } from "../../verify/steps.js";

const folders: string[] = [];
afterAll(() => {
  for (const folder of folders) rmSync(folder, { recursive: true });
});

function start(seconds = 60, problems: readonly string[] = []) {
  const out = mkdtempSync(path.join(os.tmpdir(), "flowturbo-steps-"));
  folders.push(out);
  const stop = new AbortController();
  const said: string[] = [];
  const steps = new Steps({
    ...{ out, seconds, budgetSeconds: 100, problems, signal: stop.signal, say: (line) => said.push(line) },
  });
  const summary = () => JSON.parse(readFileSync(path.join(out, "summary.json"), "utf8")) as Summary;
  const text = () => readFileSync(path.join(out, "summary.txt"), "utf8");
  return { out, stop, said, steps, summary, text };
}

const bash = (name: string, script: string, more: Partial<Step> = {}): Step => ({
  ...{ name, limit: 30, command: () => ({ file: "bash", args: ["-c", script] }) },
  ...more,
});
const isAlive = (pid: number) => {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
};
/** The process of which a step has written the number. It is gone, or about to be. */
async function expectGone(file: string) {
  const pid = Number(readFileSync(file, "utf8"));
  expect(pid).toBeGreaterThan(0);
  await expect.poll(() => isAlive(pid), { timeout: 5000 }).toBe(false);
}

describe("steps", () => {
  it("run one after the other; a failure does not end them; the summary is whole at every moment", async () => {
    const { out, steps, said, summary, text } = start();
    await steps.run(bash("first", "echo one; echo two >&2"));
    await steps.run(bash("second", `cp ${out}/summary.json ${out}/then.json; echo no; exit 7`));
    const then = JSON.parse(readFileSync(path.join(out, "then.json"), "utf8")) as Summary;
    expect(then).toMatchObject({ state: "unfinished", passed: false, running: "second", budgetSeconds: 100 });
    expect(then.steps.map(({ step }) => step)).toEqual(["first"]);
    await steps.run(bash("third", "", { skip: () => "there is no such thing here" }));
    await steps.run({ name: "fourth", limit: 9, command: () => ({ file: "/nowhere/program", args: [] }) });
    await steps.run(bash("fifth", ":", { judge: () => Promise.reject(new Error("no\nreport")) }));
    await steps.end();
    const { steps: results } = summary();
    expect(results.map(({ outcome }) => outcome)).toEqual(["passed", "failed", "skipped", "failed", "failed"]);
    expect(results.map(({ detail }) => detail)).toMatchObject([
      ...["two", "no", "there is no such thing here", expect.stringContaining("/nowhere/program"), "no report"],
    ]);
    expect(summary()).toMatchObject({ state: "finished", passed: false, running: null });
    expect(steps.exitCode).toBe(1);
    expect(readFileSync(path.join(out, "first.log"), "utf8")).toBe("one\ntwo\n");
    expect(text()).toBe(summaryText(summary()));
    expect(text()).toMatch(/\nFAILED: second \(failed\); fourth \(failed\); fifth \(failed\) \(\d+ s of 100 s\)\n$/);
    expect(said).toHaveLength(5);
  });

  it("pass, with what is skipped", async () => {
    const { steps, text } = start();
    await steps.run(bash("first", "exit 0"));
    await steps.run(bash("second", "exit 1", { skip: () => "not here" }));
    await steps.end();
    expect([steps.exitCode, steps.summary.passed]).toEqual([0, true]);
    expect(text()).toMatch(/\nALL PASSED \(/);
  });

  it("return the summary that they have written, though time goes on", async () => {
    const { steps, text } = start();
    const clock = vi.spyOn(performance, "now");
    // Each look at the clock is a second later.
    let now = performance.now();
    clock.mockImplementation(() => (now += 1000));
    const ended = await steps.end().finally(() => clock.mockRestore());
    expect(text()).toBe(summaryText(ended));
  });

  it("have failed with what went wrong before", async () => {
    const { steps, text } = start(60, ["the part cuda-000 is damaged"]);
    await steps.run(bash("first", ":"));
    await steps.end();
    expect(steps.exitCode).toBe(1);
    expect(text()).toMatch(/^problem: the part cuda-000 is damaged\n[\s\S]*\nFAILED: the part cuda-000 is damaged \(/);
  });

  it("end with 3 where there is no GPU, and with 1 if anything failed besides", async () => {
    const { steps, text } = start();
    await steps.run(bash("first", ":"));
    steps.withoutGpu("no driver.");
    await steps.end();
    expect([steps.exitCode, steps.summary.passed]).toEqual([3, false]);
    expect(text()).toMatch(
      /\nThere is no GPU here that flowturbo can use, so nothing was verified. no driver.\nNO GPU \(/,
    );
    steps.fail("a part");
    expect(steps.exitCode).toBe(1);
    expect(summaryText(steps.summary)).toMatch(/\nNO GPU, and FAILED: a part \(/);
  });

  it("end what takes longer than its limit, with all that it has started", async () => {
    const { out, steps } = start();
    const result = await steps.run(
      bash("slow", `trap "" TERM; sleep 300 & echo $! >${out}/pid; echo begun; wait; sleep 300`, { limit: 1 }),
    );
    expect(result).toMatchObject({ outcome: "timed out", detail: "it did not end within 1 s; begun" });
    await expectGone(path.join(out, "pid"));
    await steps.end();
    expect(steps.exitCode).toBe(1);
  });

  it("end at the end of the budget, and none begins without time", async () => {
    const { steps, text } = start(6);
    expect(await steps.run(bash("first", "sleep 300"))).toMatchObject({ outcome: "cut" });
    expect(await steps.run(bash("second", ":"))).toMatchObject({ outcome: "not started" });
    await steps.end();
    expect(steps.exitCode).toBe(1);
    expect(text()).toMatch(/\nFAILED: first \(cut\); second \(not started\) \(/);
  });

  it("leave no process behind, nor wait for one", async () => {
    const { out, steps } = start();
    const result = await steps.run(bash("leaves", `sleep 300 & echo $! >${out}/pid; echo done`));
    expect(result).toMatchObject({ outcome: "passed", detail: "done" });
    expect(result.seconds).toBeLessThan(20);
    await expectGone(path.join(out, "pid"));
  });

  it("can be stopped: nothing runs on, and the summary says where it was", async () => {
    const { out, stop, steps, text } = start();
    const running = steps.run(bash("first", `sleep 300 & echo $! >${out}/pid; wait`));
    await expect.poll(() => Number(readFileSync(path.join(out, "pid"), "utf8").trim() || 0)).toBeGreaterThan(0);
    stop.abort(new Error("stopped by SIGTERM"));
    await expect(running).rejects.toThrow("stopped by SIGTERM");
    await expectGone(path.join(out, "pid"));
    expect(text()).toMatch(/^UNFINISHED, it was at first \(/);
    await expect(steps.run(bash("second", ":"))).rejects.toThrow("stopped by SIGTERM");
  });
});
