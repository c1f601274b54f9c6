// Programs through the child process: results, order, aborts, failures, and what happens when the child dies.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { elementCount, float32 } from "../../lib/common/tensor.js";
import { DisposedError, InstallationError, RuntimeDiedError, RuntimeError } from "../../lib/errors.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import type { Program } from "../../lib/program/program.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { findOnnxRuntime } from "../../lib/runtimes/onnxruntime/row.js";
import { foldingPays, resolveWeights } from "../../lib/runtimes/onnxruntime/weights.js";
import { isBlameless, type Preempted } from "../../lib/runtimes/runtime.js";
import { hosts } from "../support/hosts.js";
import { type Bundles, bundle } from "./build.js";
import { addGraphs, describeRuntime, double, storedTensors, values } from "./contract.js";
import { launch, program, slowGraph, slowProgram } from "./models.js";

let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle();
});
afterAll(() => bundles.remove());

const opened: OnnxRuntime[] = [];
function open(options: Partial<ConstructorParameters<typeof OnnxRuntime>[0]> = {}): OnnxRuntime {
  const runtime = new OnnxRuntime({ weights: "lazy", threads: 1, host: bundles.host, ...options });
  opened.push(runtime);
  addGraphs(runtime);
  return runtime;
}
afterEach(async () => {
  await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
});

describeRuntime(open);

describe("values in files", () => {
  const { store, numbers } = storedTensors();

  it.each(["lazy", "folded"] as const)("maps external weights relative to the root (%s)", async (weights) => {
    const runtime = open({ weights });
    for (const dtype of ["F32", "F16", "BF16"] as const) {
      const graph = new GraphBuilder(`weights ${dtype}`);
      const weight = graph.external(store(dtype, "weight", numbers, [24]));
      graph.output("y", graph.op("Mul", [graph.input("x", "float32", [24]), graph.cast(weight, "float32")]), [24]);
      runtime.add(graph.build());
      const work = program(new Array(24).fill(4), [launch(`weights ${dtype}`, "x", "a")], ["a"]);
      expect(values((await runtime.run(work)).a)).toEqual(numbers.map((value) => 4 * value));
    }
  });
});

describe("graphs that are compiled ahead", () => {
  it("give the same results, and go when they are unloaded", async () => {
    const runtime = open();
    runtime.prepare(["double", "huge"]);
    const doubled = async () => values((await runtime.run(program([1, 2], [double("x", "a")], ["a"]))).a);
    expect(await doubled()).toEqual([2, 4]);
    runtime.prepare(["double"]);
    await runtime.unload(["double"]);
    expect(await doubled()).toEqual([2, 4]);
  });

  it("wait for what runs: a run comes before those that are not compiled yet", async () => {
    const runtime = open();
    // Each takes some ten milliseconds.
    const names = Array.from({ length: 40 }, (_, index) => `ahead ${index}`);
    for (const [index, name] of names.entries()) runtime.add(slowGraph(name, 8, 300 + index));
    await runtime.run(program([1], [double("x", "a")], ["a"]));
    const elapsed = async (work: () => Promise<unknown>) => {
      const start = performance.now();
      await work();
      return performance.now() - start;
    };
    const alone = await elapsed(() => runtime.run(slowProgram(names[0]!, 8, 1)));
    runtime.prepare(names);
    const beside = await elapsed(() => runtime.run(program([1], [double("x", "a")], ["a"])));
    expect(beside).toBeLessThan(alone * 10);
  });

  it("fail at their launch", async () => {
    const runtime = open();
    runtime.add({ name: "nonsense", bytes: Uint8Array.of(1, 2, 3), externals: new Map(), fingerprint: "" });
    runtime.prepare(["nonsense", "double"]);
    expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
    await expect(runtime.run(program([1], [launch("nonsense", "x", "a")], []))).rejects.toThrow(
      /"nonsense" \(a of x\) cannot be compiled: .*protobuf/i,
    );
  });
});

describe("a failure", () => {
  it("of a graph to compile names the graph and what ONNX Runtime says", async () => {
    const runtime = open();
    runtime.add({ name: "nonsense", bytes: Uint8Array.of(1, 2, 3), externals: new Map(), fingerprint: "" });
    const error = await runtime.run(program([1], [launch("nonsense", "x", "a")], [])).catch((reason) => reason);
    expect(error).toBeInstanceOf(RuntimeError);
    expect(error.code).toBe("ERR_FLOWTURBO_RUNTIME");
    expect(error.message).toMatch(/"nonsense" \(a of x\) cannot be compiled: .*protobuf/i);
    expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
  });

  it("of a launch names the graph, the launch and what ONNX Runtime says", async () => {
    const runtime = open();
    const wrong = { ...double("x", "a"), inputs: { z: "x" } };
    await expect(runtime.run(program([1], [wrong], []))).rejects.toThrow(/^The graph "double" \(a of x\) failed: /);
    runtime.add(slowGraph("square", 4, 1));
    await expect(runtime.run(program([1], [launch("square", "x", "a")], []))).rejects.toThrow(
      /"square".* failed: .*rank/i,
    );
  });

  it("to load onnxruntime-node says how to install it", async () => {
    // A host for which the package does not exist: outside any node_modules.
    const folder = mkdtempSync(path.join(tmpdir(), "flowturbo-broken-"));
    const copy = path.join(folder, "onnxruntime-host.mjs");
    writeFileSync(copy, readFileSync(bundles.host));
    try {
      const runtime = open({ host: pathToFileURL(copy) });
      const waiting = runtime.run(program([1], [double("x", "a")], []));
      const queued = runtime.run(program([1], [double("x", "a")], []));
      for (const call of [runtime.start(), waiting, queued]) {
        const error = await call.catch((reason) => reason);
        expect(error).toBeInstanceOf(InstallationError);
        expect(error.message).toMatch(/cannot be loaded: .*npm install onnxruntime-node/s);
      }
      const finding = await findOnnxRuntime(pathToFileURL(copy));
      expect(finding.available).toBe(false);
      expect(finding.remedy).toContain("ONNXRUNTIME_NODE_INSTALL=skip");
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it("of the host to start is a typed error with its words", async () => {
    const runtime = open({ host: new URL("nowhere.js", bundles.host) });
    const error = await runtime.start().catch((reason) => reason);
    expect(error).toBeInstanceOf(RuntimeDiedError);
    expect(error.message).toContain("Cannot find module");
  });
});

describe.skipIf(process.platform !== "linux")("a child that dies", () => {
  it("rejects the call in flight; one in the queue and the next have a fresh one", async () => {
    const notes: string[] = [];
    const runtime = open({ logger: { warn: (message) => notes.push(message) } });
    await runtime.start();
    let kill = () => process.kill(hosts()[0]!, "SIGKILL");
    const onLaunch = () => {
      kill();
      kill = () => true;
    };
    const running = runtime.run(slowProgram("slow", 512, 1000), { onLaunch }).catch((reason) => reason);
    const queued = runtime.run(program([1], [double("x", "a")], ["a"]));
    const error = await running;
    expect(error).toBeInstanceOf(RuntimeDiedError);
    const expected = { code: "ERR_FLOWTURBO_RUNTIME_DIED", signal: "SIGKILL", exitCode: null, duringWork: true };
    expect(error).toMatchObject(expected);
    expect(error.message).toContain("out of memory");
    expect(values((await queued).a)).toEqual([2]);
    expect(notes).toHaveLength(1);
    expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
  });

  it("while idle is replaced unnoticed", async () => {
    let warn = (_message: string) => {};
    const noticed = new Promise<string>((resolve) => {
      warn = resolve;
    });
    const runtime = open({ logger: { warn: (message) => warn(message) } });
    await runtime.start();
    process.kill(hosts()[0]!, "SIGKILL");
    await noticed;
    expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
  });
});

describe.skipIf(process.platform !== "linux")("the moment of a kill", () => {
  const told: string[] = [];
  const listener = {
    lost: () => told.push("lost"),
    restarted: () => told.push("restarted"),
    silent: (milliseconds: number | null) => told.push(milliseconds === null ? "heard" : "silent"),
  };
  const work = (runtime: OnnxRuntime) => runtime.run(program([1], [double("x", "a")], ["a"]));
  const kill = () => {
    for (const pid of hosts()) process.kill(pid, "SIGKILL");
  };
  const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  it("does not matter to the next call: during the start, idle, noticed or not, several times in a row", async () => {
    told.length = 0;
    const runtime = open({ listener });
    // During the start, before and after the child has begun to load the library.
    for (const wait of [0, 30, 100]) {
      const starting = runtime.start();
      await pause(wait);
      kill();
      await starting;
      expect(values((await work(runtime)).a)).toEqual([2]);
    }
    // Idle: the end is noticed at once, soon, or long before the call.
    for (const wait of [0, 1, 20, 200]) {
      kill();
      if (wait > 0) await pause(wait);
      expect(values((await work(runtime)).a)).toEqual([2]);
    }
    // Twice in a row: again while the fresh one starts for the call.
    kill();
    const call = work(runtime);
    await pause(20);
    kill();
    expect(values((await call).a)).toEqual([2]);
    const restarts = told.filter((what) => what === "restarted").length;
    expect(restarts).toBeGreaterThanOrEqual(5);
    expect(told.filter((what) => what === "lost").length).toBeGreaterThanOrEqual(restarts);
  });

  it("does not matter to a program that waits in a workspace behind nothing", async () => {
    const runtime = open();
    await runtime.start();
    const workspace = runtime.open();
    kill();
    // Sent to a process that has ended, which is not noticed yet: nobody is at fault.
    const error = await workspace.submit(program([1], [double("x", "a")], ["a"])).catch((reason) => reason);
    expect(error).toBeInstanceOf(RuntimeDiedError);
    expect(isBlameless(error)).toBe(true);
    expect(workspace.lost).toBe(true);
    expect(values((await runtime.open().submit(program([1], [double("x", "a")], ["a"]))).a)).toEqual([2]);
  });

  it("is chosen here where a child has stopped: what waits for it starts again", async () => {
    told.length = 0;
    const runtime = open({ listener, watchdogMs: 1000 });
    await work(runtime);
    const [pid] = hosts();
    process.kill(pid!, "SIGSTOP");
    const results = await Promise.all([work(runtime), work(runtime)]);
    for (const { a } of results) expect(values(a)).toEqual([2]);
    expect(hosts()).not.toContain(pid);
    expect(told.filter((what) => what !== "silent")).toEqual(["lost", "restarted"]);
    expect(told).toContain("silent");
  });

  it("leaves a child alone that works long, or that goes on in time", async () => {
    told.length = 0;
    const runtime = open({ listener, watchdogMs: 1000 });
    await work(runtime);
    const before = hosts();
    // Some seconds in launches that each take long.
    await runtime.run(slowProgram("slow", 512, 100));
    process.kill(before[0]!, "SIGSTOP");
    const call = work(runtime);
    setTimeout(() => process.kill(before[0]!, "SIGCONT"), 600);
    expect(values((await call).a)).toEqual([2]);
    expect(hosts()).toEqual(before);
    expect(told.filter((what) => what !== "silent" && what !== "heard")).toEqual([]);
  });

  it("is told by the child while a long launch runs, though reports of short ones before it are held back", async () => {
    const runtime = open({ watchdogMs: 1000 });
    runtime.add(slowGraph("short", 512, 1));
    runtime.add(slowGraph("long", 512, 400));
    const work = slowProgram("short", 512, 2);
    const long = { ...work.instructions[1]!, graph: "long" } as (typeof work.instructions)[number];
    // Warm: nothing is compiled below.
    await runtime.run({ ...work, instructions: [work.instructions[0]!, long] });
    const seen: (number | string)[] = [];
    await runtime.run(
      { ...work, instructions: [work.instructions[0]!, work.instructions[1]!, long] },
      { onProgress: (index) => seen.push(index), onLaunch: ({ index }) => seen.push(`made ${index}`) },
    );
    // The child is at the third launch before it has reported the first.
    expect(seen.indexOf(2)).toBeGreaterThanOrEqual(0);
    expect(seen.indexOf(2)).toBeLessThan(seen.indexOf("made 0"));
  });

  it("in the start again and again leaves a runtime that starts by itself, later and later", async () => {
    told.length = 0;
    const runtime = open({ listener });
    await runtime.start();
    kill();
    await vi.waitFor(() => expect(told).toEqual(["lost"]));
    const killer = setInterval(kill, 5);
    try {
      await expect(work(runtime)).rejects.toBeInstanceOf(RuntimeDiedError);
      await vi.waitFor(() => expect(told.filter((what) => what === "lost").length).toBeGreaterThan(4), 20_000);
    } finally {
      clearInterval(killer);
    }
    // Nobody calls.
    await vi.waitFor(() => expect(told.at(-1)).toBe("restarted"), { timeout: 20_000, interval: 50 });
    expect(values((await work(runtime)).a)).toEqual([2]);
  });

  it("that a caller gives up is an error of the program that ran", async () => {
    const runtime = open();
    const call = runtime.run(slowProgram("slow", 512, 1000), {
      onLaunch: () => runtime.giveUp("has worked on one launch for 90 s"),
    });
    const error = await call.catch((reason) => reason);
    expect(error).toBeInstanceOf(RuntimeDiedError);
    expect(error).toMatchObject({ duringWork: true });
    expect(error.message).toBe(
      "The process that runs ONNX Runtime has worked on one launch for 90 s, and was replaced.",
    );
    expect(values((await work(runtime)).a)).toEqual([2]);
  });
});

describe("reports of launches", () => {
  it("come at once if each is asked for, and bring values that are larger than the channel's buffer", async () => {
    const large = { dtype: "float32", shape: [1 << 21] } as const;
    const small = { dtype: "float32", shape: [128, 128] } as const;
    const zeros = ({ shape }: { shape: readonly number[] }) =>
      ({ kind: "value", tensor: float32(shape, new Float32Array(elementCount(shape))) }) as const;
    const work: Program = {
      registers: { large, small },
      constants: { x: zeros(large), y: zeros(small) },
      instructions: [
        launch("double", "x", "large", { reported: ["large"] }),
        ...Array.from({ length: 2000 }, () => launch("short", "y", "small")),
      ],
      results: [],
    };
    // How many launches were made until the parent, told of the first one, had stopped the rest. What other processes
    // of this machine do can only make that more: the least of a few trials counts.
    const made: number[] = [];
    while (made.length < 3) {
      const runtime = open();
      runtime.add(slowGraph("short", 128, 1));
      const preempt = new AbortController();
      const options = { reports: "each", preempt: preempt.signal, onLaunch: () => preempt.abort() } as const;
      const outcome = runtime.open().submit(work, options);
      made.push(await outcome.then(() => 2001, ({ launches }: Preempted) => launches)); // biome-ignore format: one line
    }
    // Some 20; where the channel is served only between launches, hundreds.
    expect(Math.min(...made)).toBeLessThan(200);
  });
});

describe("lifetimes", () => {
  it.skipIf(process.platform !== "linux")("dispose leaves no process", async () => {
    const runtime = open();
    const running = runtime.run(slowProgram("slow", 512, 5));
    await runtime.dispose();
    await running;
    expect(hosts()).toEqual([]);
    await expect(runtime.start()).rejects.toBeInstanceOf(DisposedError);
  });

  it("many runtimes share one listener for the end of the process", async () => {
    const before = process.listenerCount("exit");
    const many = Array.from({ length: 12 }, () => open());
    expect(process.listenerCount("exit")).toBe(before + 1);
    await Promise.all(many.map((runtime) => runtime.dispose()));
    expect(process.listenerCount("exit")).toBe(before);
  });
});

it("the probe finds the version", async () => {
  const { version } = JSON.parse(
    readFileSync(path.resolve(import.meta.dirname, "../../node_modules/onnxruntime-node/package.json"), "utf8"),
  ) as { version: string };
  const finding = { name: "onnxruntime", available: true, version, reason: null, remedy: null };
  expect(await findOnnxRuntime(bundles.host)).toEqual(finding);
});

describe("foldingPays", () => {
  it("asks for more launches of a graph with few weights, and of one without any for ever more", () => {
    const least = (bytes: number) => [...Array(1000).keys()].find((launches) => foldingPays(launches, bytes)) ?? null;
    expect(least(5e9)).toBe(13);
    expect(least(250e6)).toBe(14);
    expect(least(10e6)).toBe(38);
    expect(least(0)).toBeNull();
  });
});

describe("resolveWeights", () => {
  it("folds only what fits comfortably", () => {
    expect(resolveWeights("auto", 100, 600)).toBe("folded");
    expect(resolveWeights("auto", 100, 599)).toBe("lazy");
    expect(resolveWeights("auto", 0)).toBe("folded");
    expect(resolveWeights("auto", 2 ** 50)).toBe("lazy");
    expect(resolveWeights("lazy", 0, 600)).toBe("lazy");
    expect(resolveWeights("folded", 100, 0)).toBe("folded");
    // What is left in 16 bits.
    expect(resolveWeights("int8", 100, 600)).toBe("folded");
    expect(resolveWeights("int8", 100, 599)).toBe("lazy");
  });
});
