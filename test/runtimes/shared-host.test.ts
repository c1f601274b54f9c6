// Models that share one child process, as those on a GPU do, and what a GPU's failures make of it: with a stand-in for
// ONNX Runtime that fails in the words of the real one.
import { spawn } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import type { Tensor } from "../../lib/common/tensor.js";
import { DeviceLostError, errorTable, MemoryError, RuntimeError } from "../../lib/errors.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { Program } from "../../lib/program/program.js";
import { gpuFailure } from "../../lib/runtimes/onnxruntime/gpu-failures.js";
import { OnnxRuntime, type OnnxRuntimeOptions } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { type CompilableGraph, Preempted } from "../../lib/runtimes/runtime.js";
import { fixture } from "../support/fixtures.js";
import { hosts } from "../support/hosts.js";
import { type Bundles, bundle } from "./build.js";
import { values } from "./contract.js";
import { launch, program, scaleGraph } from "./models.js";

let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle(path.resolve(import.meta.dirname, "fake-onnxruntime.ts"));
});
afterAll(() => bundles.remove());

const opened: OnnxRuntime[] = [];
function open(options: Partial<OnnxRuntimeOptions> = {}): OnnxRuntime {
  const runtime = new OnnxRuntime({ provider: "cuda", weights: "folded", threads: 1, host: bundles.host, ...options });
  opened.push(runtime);
  for (const name of ["double", "sessions"]) runtime.add(scaleGraph(name, 2));
  return runtime;
}
afterEach(async () => {
  await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
  expect(hosts()).toEqual([]);
});

const work = (graph: string, launches = 1): Program =>
  program(
    [1, 2],
    Array.from({ length: launches }, () => launch(graph, "x", "a")),
    ["a"],
  );
const run = async (runtime: OnnxRuntime, graph: string) => values((await runtime.run(work(graph))).a) as number[];
/** Sessions that the child has created and released, that of this graph included. */
const sessions = (runtime: OnnxRuntime) => run(runtime, "sessions");
const rejection = (call: Promise<unknown>) =>
  call.then(
    () => expect.fail("It did not fail."),
    (error: Error) => error,
  );

/** Adds a graph with that name, and launches it. */
function launched(runtime: OnnxRuntime, name: string): Promise<Record<string, Tensor>> {
  runtime.add(scaleGraph(name, 2));
  return runtime.run(work(name));
}

describe.skipIf(process.platform !== "linux")("runtimes on one GPU", () => {
  it("share a process, and what graphs were compiled to", async () => {
    const [one, two] = [open(), open()];
    expect(await Promise.all([run(one, "double"), run(two, "double")])).toEqual([
      [2, 4],
      [2, 4],
    ]);
    expect(hosts()).toHaveLength(1);
    // Those that look at the device are released.
    const [created, released] = await sessions(one);
    expect(created! - released!).toBe(2);
    expect(await sessions(two)).toEqual([created, released]);
  });

  it("share no graph of other bytes, widening or versions of the weights", async () => {
    const one = open();
    const graph: CompilableGraph = scaleGraph("double", 2);
    const weight = { name: "w", dtype: "F32", shape: [1], file: "/weights", offset: 0, length: 4 } as const;
    const weighted: CompilableGraph = { ...graph, name: "weighted", externals: new Map([["w", weight]]) };
    const version = { file: "/weights", size: 4, mtimeMs: 1 };
    const others = [
      open({ weights: () => "lazy" as const }),
      open({ weights: () => "folded" as const, files: [version] }),
      open({ weights: () => "folded" as const, files: [{ ...version, mtimeMs: 2 }] }),
      // Of another file, which it does not read.
      open({ weights: () => "folded" as const, files: [version, { ...version, file: "/other" }] }),
    ];
    const before = (await sessions(one))[0]!;
    for (const [index, runtime] of others.entries()) {
      runtime.add(weighted);
      await runtime.run(work("weighted"));
      expect((await sessions(one))[0]! - before).toBe([1, 2, 3, 3][index]);
    }
    others[0]!.add({ ...scaleGraph("weighted", 3), externals: weighted.externals });
    await others[0]!.run(work("weighted"));
    expect((await sessions(one))[0]! - before).toBe(4);
    expect(hosts()).toHaveLength(1);
  });

  it("share a graph of files that two checkpoints link to", async () => {
    const folder = mkdtempSync(path.join(tmpdir(), "flowturbo-linked-"));
    try {
      for (const name of readdirSync(fixture("sd3", "model")))
        symlinkSync(fixture("sd3", `model/${name}`), path.join(folder, name));
      const created: number[] = [];
      for (const checkpoint of [fixture("sd3", "model"), folder]) {
        const graphs = new GraphLibrary(await openCheckpoint(checkpoint));
        const runtime = open({ files: graphs.files });
        runtime.add(graphs.get("vae_decoder"));
        await runtime.run(work("vae_decoder"));
        created.push((await sessions(runtime))[0]!);
      }
      expect(created[1]).toBe(created[0]);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  it("keep to themselves on the CPU, and on another GPU", async () => {
    const runtimes = [open(), open({ deviceId: 1 }), open({ provider: "cpu" }), open({ provider: "cpu" })];
    process.env.CUDA_VISIBLE_DEVICES = "1,0";
    try {
      runtimes.push(open(), open());
    } finally {
      delete process.env.CUDA_VISIBLE_DEVICES;
    }
    await Promise.all(runtimes.map((each) => run(each, "double")));
    expect(hosts()).toHaveLength(5);
  });

  it("free a graph when none has it any more", async () => {
    const [one, two] = [open(), open()];
    await Promise.all([run(one, "double"), run(two, "double")]);
    const [created, released] = await sessions(one);
    await one.unload(["double"]);
    await run(two, "double");
    expect(await sessions(one)).toEqual([created, released]);
    await two.unload(["double"]);
    expect(await sessions(one)).toEqual([created, released! + 1]);
    expect(await run(one, "double")).toEqual([2, 4]);
    expect(await sessions(one)).toEqual([created! + 1, released! + 1]);
    // A new version of a graph takes the place of the old one.
    one.add(scaleGraph("double", 3));
    await run(one, "double");
    expect(await sessions(one)).toEqual([created! + 2, released! + 2]);
  });

  it("leave the process one by one, each with what only it has", async () => {
    const [one, two] = [open(), open()];
    await run(two, "double");
    await launched(one, "its own");
    const workspace = one.open();
    await workspace.submit(work("double"));
    const [pid] = hosts();
    const [created, released] = await sessions(two);
    const running = one.run(work("its own", 3));
    await one.dispose();
    await running;
    expect(workspace.lost).toBe(true);
    expect(await sessions(two)).toEqual([created, released! + 1]);
    expect(hosts()).toEqual([pid]);
    // Joined again while it is there, and started again when it is not.
    expect(await run(open(), "double")).toEqual([2, 4]);
    expect(hosts()).toEqual([pid]);
    await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
    expect(hosts()).toEqual([]);
    expect(await run(open(), "double")).toEqual([2, 4]);
  });

  it("leave no values behind", async () => {
    const [one, two] = [open({ provider: "webgpu" }), open({ provider: "webgpu" })];
    // Doubled once more by the graph that brings a result to the host.
    const onDevice = () => launched(two, "tensors").then((results) => (values(results.a)[0] as number) / 2);
    const workspaces = [one.open(), one.open()];
    for (const workspace of workspaces) await workspace.submit({ ...work("double"), results: [] });
    expect(await onDevice()).toBe(2);
    workspaces[0]!.close();
    expect(await onDevice()).toBe(1);
    await one.dispose();
    expect(await onDevice()).toBe(0);
  });

  it("let a script end that forgets to dispose of them", async () => {
    const script = spawn(process.execPath, [bundles.endings, "shared"], { stdio: ["ignore", "pipe", "inherit"] });
    let said = "";
    script.stdout.on("data", (data) => (said += data));
    const code = await new Promise((resolve) => script.once("close", (code, signal) => resolve(code ?? signal)));
    expect([code, said]).toEqual([0, "done\n"]);
  });

  it("name graphs in messages as each of them does", async () => {
    const graph = scaleGraph("throws{no kernel for it}.", 2);
    for (const name of ["this", "that"]) {
      const runtime = open();
      runtime.add({ ...graph, name });
      const error = await rejection(runtime.run(work(name)));
      expect(error.message).toBe(`The graph "${name}" (a of x) failed: no kernel for it`);
      expect(error).toBeInstanceOf(RuntimeError);
      expect(error).not.toBeInstanceOf(MemoryError);
    }
    expect(hosts()).toHaveLength(1);
  });

  it("all hear that the process was killed, and have their work done in another", async () => {
    const told: string[] = [];
    const listenerOf = (name: string) => ({
      lost: () => told.push(`${name} lost`),
      restarted: () => told.push(`${name} restarted`),
      silent: () => {},
    });
    const warnings: string[] = [];
    const logger = { warn: (message: string) => warnings.push(message) };
    const [one, two] = [open({ listener: listenerOf("one"), logger }), open({ listener: listenerOf("two"), logger })];
    one.add(scaleGraph("takes[300]", 2));
    await Promise.all([run(one, "double"), run(two, "double")]);
    const workspaces = [one.open(), two.open()];
    let running: Promise<Error> | undefined;
    await new Promise<void>((onBegin) => {
      running = rejection(one.run(work("takes[300]", 10), { onBegin }));
    });
    const waiting = run(two, "double");
    process.kill(hosts()[0]!, "SIGKILL");
    // The program that ran may be the cause.
    expect(await running).toMatchObject({ code: "ERR_FLOWTURBO_RUNTIME_DIED", duringWork: true });
    expect(await waiting).toEqual([2, 4]);
    expect(await run(one, "double")).toEqual([2, 4]);
    expect(told).toEqual(["one lost", "two lost", "one restarted", "two restarted"]);
    expect(warnings).toHaveLength(1);
    expect(workspaces.map(({ lost }) => lost)).toEqual([true, true]);
    // One that comes later has lost nothing.
    expect(await run(open({ listener: listenerOf("late") }), "double")).toEqual([2, 4]);
    expect(told).toHaveLength(4);
    expect(hosts()).toHaveLength(1);
  });

  it("replace a process that stops after the shortest of their times", async () => {
    const [patient, impatient] = [open({ watchdogMs: 600_000 }), open({ watchdogMs: 1000 })];
    await run(patient, "double");
    process.kill(hosts()[0]!, "SIGSTOP");
    expect(await run(patient, "double")).toEqual([2, 4]);
    await impatient.dispose();
    // Nobody wants that any more, also of what is under way.
    const [pid] = hosts();
    const waiting = run(patient, "double");
    process.kill(pid!, "SIGSTOP");
    const second = run(patient, "double");
    await setTimeout(2500);
    expect(hosts()).toEqual([pid]);
    process.kill(pid!, "SIGCONT");
    expect(await Promise.all([waiting, second])).toHaveLength(2);
  });

  it("take turns where the submission of one could be long, and both go on", async () => {
    const [one, two] = [open(), open()];
    for (const runtime of [one, two]) runtime.add(scaleGraph("takes[30]", 2));
    const rest = { ...work("takes[30]"), constants: {} };
    const [first, second] = [one.open(), two.open()];
    await Promise.all([first.submit(work("takes[30]")), second.submit(work("takes[30]"))]);
    const long = (workspace: typeof first, launches: number) => {
      const { instructions } = work("takes[30]", launches);
      return workspace.submit({ ...rest, instructions, results: [] }, { preempt: new AbortController().signal });
    };
    // Each sends what is left as soon as it is preempted, as a dispatcher does.
    const turns: string[] = [];
    const follow = async (name: string, workspace: typeof first) => {
      for (let left = 20; left > 0; ) {
        const made = await long(workspace, left).then(
          () => left,
          (error: unknown) => (error instanceof Preempted ? error.launches : Promise.reject(error)),
        );
        expect(made).toBeGreaterThan(0);
        left -= made;
        turns.push(name);
      }
    };
    await Promise.all([follow("one", first), follow("two", second)]);
    // Not one after the other.
    expect(turns.length).toBeGreaterThan(4);
    expect(turns.lastIndexOf("one")).toBeGreaterThan(turns.indexOf("two"));
    expect(turns.lastIndexOf("two")).toBeGreaterThan(turns.indexOf("one"));
    // An ordinary program does not wait for all of a submission either, its own user's or another's.
    for (const runtime of [one, two]) {
      const running = rejection(long(first, 1000));
      await runtime.run(work("double"));
      expect(await running).toBeInstanceOf(Preempted);
    }
  });
});

/** As the libraries write them: with the provider, the start of the message, and what is known of bytes. */
const nan = Number.NaN;
const cuda = (library: string, number: number, words: string) =>
  `/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:118 std::conditional_t<THRW, void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE) ${library} failure ${number}: ${words} ; GPU=0 ; hostname=gpu-box ; file=/onnxruntime_src/x.cc ; line=65 ; expr=cudaStreamSynchronize(stream); `;
const download = (value: number, words: string) =>
  `/onnxruntime_src/onnxruntime/core/providers/webgpu/buffer_manager.cc:641 void onnxruntime::webgpu::BufferManager::Download(WGPUBuffer, void*, size_t) const map_async_result.status == wgpu::MapAsyncStatus::Success was false. Failed to download data from buffer. wgpu::MapAsyncStatus value: ${value}, message: ${words}`;
const memory: readonly (readonly [message: string, needed: number, available: number])[] = [
  [cuda("CUDA", 2, "out of memory"), nan, nan],
  [cuda("CUBLAS", 3, "CUBLAS_STATUS_ALLOC_FAILED"), nan, nan],
  [cuda("CUDNN", 4004, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), nan, nan],
  ["bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t) Failed to allocate memory for requested buffer of size 3221225472", 3221225472, nan], // biome-ignore format: one line
  ["bfc_arena.cc:376 Available memory of 1048576 is smaller than requested bytes of 2097152", 2097152, 1048576],
  ["WebGPU validation failed. Buffer size (2516582400) exceeds the max buffer size limit (1073741824).\n - While calling [Device].CreateBuffer([BufferDescriptor]).", 2516582400, 1073741824], // biome-ignore format: one line
  ['WebGPU validation failed. [Invalid Buffer (unlabeled)] is invalid due to a previous error.\n - While validating [BindGroupDescriptor ""Tile""]', nan, nan], // biome-ignore format: one line
  [download(3, "[Invalid Buffer (unlabeled)] is invalid due to a previous error."), nan, nan],
  ["buffer_manager.cc:512 buffer was false. Failed to create GPU buffer: size=4096, usage=140.", 4096, nan],
];
const lost = [
  cuda("CUDA", 719, "unspecified launch failure"),
  cuda("CUDA", 700, "an illegal memory access was encountered"),
  cuda("CUBLAS", 13, "CUBLAS_STATUS_EXECUTION_FAILED"),
  cuda("CUDNN", 5003, "CUDNN_STATUS_EXECUTION_FAILED_CUDART"),
  download(3, "[Device] is lost."),
  download(4, "Buffer was unmapped before mapping was resolved."),
  'WebGPU validation failed. [Device "ort"] is lost.\n - While calling [Device "ort"].CreateBuffer([BufferDescriptor]).',
  "Failed to download data from buffer: A valid external Instance reference no longer exists.",
  "WebGPU device lost (2): vkQueueSubmit failed with VK_ERROR_DEVICE_LOST",
];

describe("messages of GPUs", () => {
  it.each(memory)("tell of a lack of memory (%#)", (message, needed, available) => {
    expect(gpuFailure("It failed", message)).toEqual({
      kind: "memory",
      message: `It failed: ${message}`,
      ...{ needed, available },
    });
  });

  it.each(lost)("tell of a lost device (%#)", (message) => {
    expect(gpuFailure("It failed", message)).toEqual({ kind: "lost", message: `It failed: ${message}` });
  });

  it.each([
    cuda("CUDA", 209, "no kernel image is available for execution on the device"),
    cuda("CUDA", 704, "peer access is already enabled"),
    cuda("CUDA", 1, "invalid argument"),
    cuda("CUDNN", 3000, "CUDNN_STATUS_NOT_SUPPORTED"),
    "Non-zero status code returned while running Tile node. Name:'Tile_0' Status Message: Tile output tensor would require more than 4294967296 bytes",
    "Could not find an implementation for Einsum(12) node with name 'lost_and_found'",
    "open file weights/device/lost.safetensors fail, errcode = 2 - No such file or directory",
  ])("tell of neither (%#)", (message) => {
    expect(gpuFailure("It failed", message)).toBeNull();
  });
});

describe.skipIf(process.platform !== "linux")("a GPU that fails", () => {
  it.each([
    { kind: "memory", verb: "throws", message: memory[0]![0] },
    { kind: "memory", verb: "refuses", message: memory[3]![0] },
    { kind: "memory", verb: "throws", message: memory[5]![0] },
    { kind: "lost", verb: "throws", message: lost[0]! },
    { kind: "lost", verb: "throws", message: lost[4]! },
  ])(
    "($kind, $verb) is a typed error of one call; others and the next have another process",
    async ({ kind, verb, message }) => {
      const told: string[] = [];
      const [one, two] = [open({ listener: { lost: ({ message }) => told.push(message), restarted: () => told.push("restarted"), silent: () => {} } }), open()]; // biome-ignore format: one line
      await Promise.all([run(one, "double"), run(two, "double")]);
      const [pid] = hosts();
      const workspace = two.open();
      // Behind the work that fails, and sent before it is known: of the workspace a dispatcher submits again.
      two.add(scaleGraph("takes[200]", 2));
      const before = two.run(work("takes[200]"));
      const failing = rejection(launched(one, `${verb}{${message}}.`));
      const waiting = run(one, "double");
      const others = run(two, "double");
      const submitted = workspace.submit(work("double")).then(
        () => "done",
        (error: unknown) => error,
      );
      await before;
      const error = await failing;
      expect(error.message).toContain(`(a of x) ${verb === "throws" ? "failed" : "cannot be compiled"}: ${message}`);
      expect(error.message).toContain("next call starts a new process");
      if (kind === "memory") {
        expect(error).toBeInstanceOf(MemoryError);
        const { needed, available } = gpuFailure("", message) as { needed: number; available: number };
        expect(error).toMatchObject({ needed, available });
      } else {
        expect(error).toBeInstanceOf(DeviceLostError);
        expect(error).toMatchObject({ permanent: false, code: "ERR_FLOWTURBO_DEVICE_RESET" });
        expect(errorTable[(error as DeviceLostError).code].retryable).toBe(true);
      }
      // It is gone when the caller is told: a call that comes at once has the next one.
      expect(hosts()).not.toContain(pid);
      expect(workspace.lost).toBe(true);
      expect(await run(one, "double")).toEqual([2, 4]);
      expect(await waiting).toEqual([2, 4]);
      expect(await others).toEqual([2, 4]);
      expect(["done", expect.objectContaining({ signal: "SIGKILL", duringWork: false })]).toContainEqual(
        await submitted,
      );
      await vi.waitFor(() => expect(told).toHaveLength(2));
      expect(told[0]).toContain(kind === "memory" ? "ran out of GPU memory" : "lost the GPU");
      expect(told[1]).toBe("restarted");
    },
  );
});
