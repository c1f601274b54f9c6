// Programs through the child process: results, order, aborts, failures, and what happens when the child dies.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { DisposedError, InstallationError, RuntimeDiedError, RuntimeError } from "../../lib/errors.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { findOnnxRuntime } from "../../lib/runtimes/onnxruntime/row.js";
import { resolveWeights } from "../../lib/runtimes/onnxruntime/weights.js";
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

/** Children of this process, by /proc; Linux only. */
function hosts(): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const stat = readFileSync(`/proc/${pid}/stat`, "utf8");
        const [state, parent] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
        return Number(parent) === process.pid && state !== "Z" && command(pid).includes("onnxruntime-host");
      } catch {
        return false;
      }
    });
}
const command = (pid: number) => readFileSync(`/proc/${pid}/cmdline`, "utf8");

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
  it("rejects the calls in flight and in the queue; the next call has a fresh one", async () => {
    const notes: string[] = [];
    const runtime = open({ logger: { warn: (message) => notes.push(message) } });
    await runtime.start();
    let kill = () => process.kill(hosts()[0]!, "SIGKILL");
    const onLaunch = () => {
      kill();
      kill = () => true;
    };
    const running = runtime.run(slowProgram("slow", 512, 1000), { onLaunch }).catch((reason) => reason);
    const queued = runtime.run(program([1], [double("x", "a")], [])).catch((reason) => reason);
    for (const error of await Promise.all([running, queued])) {
      expect(error).toBeInstanceOf(RuntimeDiedError);
      expect(error).toMatchObject({ code: "ERR_FLOWTURBO_RUNTIME_DIED", signal: "SIGKILL", exitCode: null });
      expect(error.message).toContain("out of memory");
    }
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

describe("resolveWeights", () => {
  it("folds only what fits comfortably", () => {
    expect(resolveWeights("auto", 100, 600)).toBe("folded");
    expect(resolveWeights("auto", 100, 599)).toBe("lazy");
    expect(resolveWeights("auto", 0)).toBe("folded");
    expect(resolveWeights("auto", 2 ** 50)).toBe("lazy");
    expect(resolveWeights("lazy", 0, 600)).toBe("lazy");
    expect(resolveWeights("folded", 100, 0)).toBe("folded");
  });
});
