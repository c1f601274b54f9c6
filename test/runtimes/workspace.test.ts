// Workspaces: submissions over registers that outlive them.
import { afterAll, afterEach, beforeAll, expect, it } from "vitest";
import { RuntimeDiedError } from "../../lib/errors.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { Preempted } from "../../lib/runtimes/runtime.js";
import { hosts } from "../support/hosts.js";
import { type Bundles, bundle } from "./build.js";
import { program, scaleGraph, slowGraph } from "./models.js";
import { describeWorkspaces, double, slowSubmission, submission, values } from "./workspaces.js";

let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle();
});
afterAll(() => bundles.remove());

let runtime: OnnxRuntime;
afterEach(() => runtime?.dispose());
function open(): OnnxRuntime {
  runtime = new OnnxRuntime({ weights: "lazy", threads: 1, host: bundles.host });
  runtime.add(scaleGraph("double", 2));
  runtime.add(scaleGraph("huge", 3e38));
  runtime.add(slowGraph("slow", 512, 20));
  return runtime;
}

describeWorkspaces(open);

it.skipIf(process.platform !== "linux")("a workspace is lost with the child that held it", async () => {
  const workspace = open().open();
  await workspace.submit(program([1], [double("x", "a")], []));
  let killed = false;
  const onLaunch = () => {
    if (!killed) process.kill(hosts()[0]!, "SIGKILL");
    killed = true;
  };
  const running = workspace.submit(slowSubmission(1000), { onLaunch }).catch((reason) => reason);
  const queued = workspace.submit(submission([double("a", "b")], [])).catch((reason) => reason);
  for (const error of await Promise.all([running, queued])) expect(error).toBeInstanceOf(RuntimeDiedError);
  expect(workspace.lost).toBe(true);
  await expect(workspace.submit(submission([double("a", "b")], []))).rejects.toThrow(/gone with the process/);
  const fresh = runtime.open();
  expect(values((await fresh.submit(program([2], [double("x", "a")], ["a"]))).a)).toEqual([4]);
});

it("a submission that is preempted has uploaded its constants and made some of its launches; the rest can follow", async () => {
  const workspace = open().open();
  const preempt = new AbortController();
  const made: number[] = [];
  const running = workspace.submit(slowSubmission(1000), {
    preempt: preempt.signal,
    onLaunch: ({ index }) => {
      made.push(index);
      preempt.abort();
    },
  });
  const waiting = new AbortController();
  const behind = workspace.submit(program([3], [double("x", "a")], ["a"]), { preempt: waiting.signal });
  waiting.abort();
  const error = await running.catch((reason) => reason);
  expect(error).toBeInstanceOf(Preempted);
  expect(error.launches).toBe(made.length);
  expect(made.length).toBeLessThan(1000);
  await expect(behind).rejects.toMatchObject({ name: "Preempted", launches: 0 });
  expect(values((await workspace.submit(submission([double("x", "a")], ["a"]))).a)).toEqual([6]);
  expect(await workspace.submit({ ...slowSubmission(1), constants: {} })).toEqual({});
});

it("an ordinary program waits for no submission that may be preempted", async () => {
  const workspace = open().open();
  const never = new AbortController();
  const running = workspace.submit(slowSubmission(1000), { preempt: never.signal }).catch((reason) => reason);
  expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
  expect(await running).toBeInstanceOf(Preempted);
  // One without that signal is not preempted.
  const complete = workspace.submit({ ...slowSubmission(20), constants: {} });
  await runtime.run(program([1], [double("x", "a")], ["a"]));
  expect(await complete).toEqual({});
});
