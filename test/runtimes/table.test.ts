// A runtime is a row in the table: a test adds one, and it is found, opened and listed like the others.
import { afterEach, describe, expect, it } from "vitest";
import {
  CheckpointError,
  InstallationError,
  MemoryError,
  OptionError,
  RuntimeUnavailableError,
} from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/flowturbo.js";
import { cpuEmitOptions } from "../../lib/onnx/index.js";
import type { BuilderRow, BuilderSettings, EngineBuilder } from "../../lib/runtimes/builder.js";
import {
  builderNames,
  checkPlatform,
  openBuilder,
  openRuntime,
  openRuntimes,
  platformWarning,
  runtimeNames,
  runtimes,
} from "../../lib/runtimes/index.js";
import type { ModelWeights, OpenedRuntime, Runtime, RuntimeRow, RuntimeSettings } from "../../lib/runtimes/runtime.js";
import { flavours, tensorRtKinds } from "../../lib/runtimes/tensorrt/flavours.js";

const rows = { ...runtimes };
/** Makes these the rows of the table, in their order. */
function table(...chosen: RuntimeRow[]): void {
  for (const name of Object.keys(runtimes)) delete runtimes[name];
  for (const row of chosen) runtimes[row.name] = row;
}
const restore = () => table(...Object.values(rows));
afterEach(restore);

const settings: RuntimeSettings = { weights: "auto", capture: false };
const weights: ModelWeights = { files: [], bytesOf16Bit: () => 0 };
const capabilities = { preemption: true, capture: true, anyShape: true };

/** A runtime that runs nothing, and counts what has been disposed of. */
function fake(name: string, change: Partial<RuntimeRow> = {}) {
  const events: string[] = [];
  const runtime = {
    ...{ name, capabilities },
    dispose: async () => void events.push("disposed"),
  } as unknown as Runtime;
  const row: RuntimeRow = {
    ...{ name, runsOn: "nothing", capabilities },
    async open(): Promise<OpenedRuntime> {
      events.push("opened");
      return { runtime, settings: { version: "7" }, device: null, emitOptions: () => cpuEmitOptions };
    },
    find: async () => ({ name, available: true, version: "7", reason: null, remedy: null }),
    ...change,
  };
  return { row, runtime, events };
}
/** For a row that cannot be used here. */
const lacking = (name: string, reason: string) => ({
  open: () => Promise.reject(new RuntimeUnavailableError(name, reason)),
});
const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

it("the table has TensorRT's libraries and ONNX Runtime, in the order in which auto tries them", () => {
  expect(runtimeNames()).toEqual(["tensorrt", "tensorrt-rtx", "cuda", "webgpu", "onnxruntime"]);
  expect(builderNames()).toEqual(["tensorrt", "tensorrt-rtx"]);
  expect(tensorRtKinds).toEqual(builderNames());
  for (const [name, row] of Object.entries(runtimes)) expect(row.name).toBe(name);
});

describe("a platform without binaries of the last runtime", () => {
  const error = new InstallationError("package", "There are no binaries.", "Take another platform.");
  const without = fake("without", { unsupported: () => error }).row;
  const found = fake("found").row;
  const lost = fake("lost", {
    find: async () => ({ name: "lost", available: false, version: null, reason: "none", remedy: "none" }),
  }).row;

  it("is refused by name, and with auto unless another can be used", async () => {
    table(lost, found, without);
    await expect(checkPlatform("without", {})).rejects.toBe(error);
    await checkPlatform("auto", {});
    await checkPlatform("lost", {});
    table(lost, without);
    await expect(checkPlatform("auto", {})).rejects.toBe(error);
    expect(platformWarning()).toBe(error.message);
    table(without, found);
    await checkPlatform("auto", {});
    expect(platformWarning()).toBe(null);
  });
});

describe("a runtime that is added", () => {
  it("is listed, and opened by its name", async () => {
    const { row, runtime } = fake("fake");
    runtimes.fake = row;
    expect(runtimeNames()).toEqual([...Object.keys(rows), "fake"]);
    expect(builderNames()).not.toContain("fake");
    const opened = await openRuntime("fake", settings, weights);
    expect(opened.runtime).toBe(runtime);
    expect(opened).toMatchObject({ settings: { version: "7" }, choice: { name: "fake", passedOver: [] } });
    expect(await runtimes.fake.find({})).toMatchObject({ name: "fake", available: true });
  });

  it("is found by auto before those behind it", async () => {
    const first = fake("first");
    const second = fake("second");
    table(first.row, second.row);
    expect((await openRuntime("auto", settings, weights)).choice).toEqual({ name: "first", passedOver: [] });
    expect(second.events).toEqual([]);
  });

  it("gets the folders that load() was given", async () => {
    const given: RuntimeSettings[] = [];
    const row = fake("onnxruntime").row;
    table({
      ...row,
      open(settings) {
        given.push(settings);
        return Promise.reject(new RuntimeUnavailableError("onnxruntime", "there is none"));
      },
    });
    const folders = { tensorrtFolder: "/trt", cudaProviderFolder: "/cuda" };
    await expect(FlowTurbo.load(undefined, { runtime: "onnxruntime", ...folders })).rejects.toThrow("there is none");
    expect(given).toEqual([expect.objectContaining(folders)]);
  });

  it("gets the settings and the weights of the model", async () => {
    const calls: unknown[] = [];
    const { row } = fake("fake");
    const open: RuntimeRow["open"] = (...given) => {
      calls.push(given);
      return row.open(...given);
    };
    table({ ...row, open });
    await openRuntime("fake", settings, weights);
    expect(calls).toEqual([[{ ...settings, named: true }, weights]]);
  });
});

describe("auto", () => {
  it("passes over what cannot be found, opened or used, each with its reason, and keeps nothing open", async () => {
    const missing = fake("missing", lacking("missing", "there is none"));
    const broken = fake("broken", lacking("broken", "it does not open"));
    const small = fake("small");
    const last = fake("last");
    table(missing.row, broken.row, small.row, last.row);
    const check = ({ runtime }: OpenedRuntime) => {
      if (runtime.name === "small") throw new OptionError("runtime", "it is too small");
    };
    const { choice } = await openRuntime("auto", settings, weights, check);
    expect(choice).toEqual({
      name: "last",
      passedOver: [
        { name: "missing", reason: "there is none" },
        { name: "broken", reason: "it does not open" },
        { name: "small", reason: "it is too small" },
      ],
    });
    expect([missing.events, small.events, last.events]).toEqual([[], ["opened", "disposed"], ["opened"]]);
  });

  it("throws the error of the last row, and any error that is a defect", async () => {
    const reason = new RuntimeUnavailableError("last", "nothing here can run");
    const last = fake("last", { open: () => Promise.reject(reason) });
    table(fake("missing", lacking("missing", "there is none")).row, last.row);
    expect(await rejection(openRuntime("auto", settings, weights))).toBe(reason);
    const defect = new TypeError("a defect");
    table(fake("broken", { open: () => Promise.reject(defect) }).row, fake("good").row);
    expect(await rejection(openRuntime("auto", settings, weights))).toBe(defect);
    // The fault of a checkpoint is the same with any runtime.
    const [first, second] = [fake("first"), fake("second")];
    table(first.row, second.row);
    const damaged = new CheckpointError("model.safetensors", "a weight is missing");
    const check = () => {
      throw damaged;
    };
    expect(await rejection(openRuntime("auto", settings, weights, check))).toBe(damaged);
    expect([first.events, second.events]).toEqual([["opened", "disposed"], []]);
  });

  it("refuses the last one too where the check does", async () => {
    const { row, events } = fake("only");
    table(row);
    const reason = new OptionError("runtime", "it is too small");
    const check = () => {
      throw reason;
    };
    expect(await rejection(openRuntime("auto", settings, weights, check))).toBe(reason);
    expect(events).toEqual(["opened", "disposed"]);
  });
});

describe("a builder", () => {
  function building(name: string, change: Partial<BuilderRow> = {}) {
    const opened: BuilderSettings[] = [];
    const compiler = { version: "1", folder: name } as EngineBuilder;
    const builder: BuilderRow = {
      takesTargets: true,
      async open(given) {
        opened.push(given);
        return { compiler, emitOptions: () => cpuEmitOptions };
      },
      ...change,
    };
    return { row: fake(name, { builder }).row, opened, compiler };
  }

  it("is listed, and opened by its name with its settings", async () => {
    const { row, opened, compiler } = building("fake");
    runtimes.fake = row;
    expect(builderNames()).toEqual(["tensorrt", "tensorrt-rtx", "fake"]);
    expect(await openBuilder("fake", { folder: "/x", memory: 5 })).toMatchObject({ name: "fake", compiler });
    expect(opened).toEqual([{ folder: "/x", memory: 5 }]);
  });

  it("is the first that can build, with targets the first that takes them", async () => {
    const here = building("here", { takesTargets: false });
    const elsewhere = building("elsewhere");
    table(fake("none").row, here.row, elsewhere.row);
    expect((await openBuilder("auto", {})).name).toBe("here");
    expect((await openBuilder("auto", { targets: [] })).name).toBe("here");
    expect((await openBuilder("auto", { targets: [89] })).name).toBe("elsewhere");
    table(building("lacking", lacking("lacking", "no library")).row, elsewhere.row);
    expect((await openBuilder("auto", {})).name).toBe("elsewhere");
  });

  it("that is the only one left says itself what it lacks; several say so together", async () => {
    const reason = new RuntimeUnavailableError("one", "one lacks a library.");
    const one = building("one", { open: () => Promise.reject(reason) });
    const two = building("two", { ...lacking("two", "two lacks a GPU."), takesTargets: false });
    table(one.row, two.row);
    expect(await rejection(openBuilder("auto", { targets: [89] }))).toBe(reason);
    const wrong = new OptionError("targets", "no such target");
    table(building("three", { open: () => Promise.reject(wrong) }).row, one.row);
    expect(await rejection(openBuilder("auto", {}))).toBe(wrong);
    table(one.row, two.row);
    const error = await rejection(openBuilder("auto", {}));
    expect(error).toBeInstanceOf(RuntimeUnavailableError);
    expect(error).toMatchObject({ runtime: "auto", message: "one lacks a library. two lacks a GPU." });
  });
});

describe("what engines are built for", () => {
  const gpu = { name: "RTX 4090", memoryBytes: 24e9, major: 8, minor: 9 };
  const cuda = { driverVersion: 13000, devices: [gpu] };

  it("is the present GPU for TensorRT, which takes no targets", () => {
    const { deviceOf } = flavours.tensorrt;
    expect(deviceOf([], cuda)).toEqual({ gpu: "RTX 4090", sm: 89, driver: 13000 });
    expect(() => deviceOf([], null)).toThrow(RuntimeUnavailableError);
    expect(() => deviceOf([89], cuda)).toThrow(/Expected no targets for the runtime tensorrt/);
  });

  it("is any target for TensorRT-RTX, by default the present GPU", () => {
    const { deviceOf } = flavours["tensorrt-rtx"];
    expect(deviceOf([120, 89, 120], null)).toEqual({ targets: [89, 120] });
    expect(deviceOf([], cuda)).toEqual({ targets: [89] });
    expect(() => deviceOf([], null)).toThrow(/no GPU, so say for which to build: targets from 7\.5, 8\.0/);
    expect(() => deviceOf([90], cuda)).toThrow(/^TensorRT-RTX builds for .*, not for 9\.0\.$/);
    const old = { ...cuda, devices: [{ ...gpu, name: "V100", major: 7, minor: 0 }] };
    expect(() => deviceOf([], old)).toThrow(/not for 7\.0, the present GPU \(V100\): use the runtime tensorrt\.$/);
  });
});

describe("a runtime on several devices", () => {
  const gpus = [
    { name: "A", problem: null },
    { name: "B", problem: "It is too old." },
    { name: "C", problem: null },
  ];
  /** What was opened on which device, and what has been disposed of. */
  const choosing = (name: string, change: Partial<RuntimeRow> = {}) => {
    const opened: (number | undefined)[] = [];
    const disposed: number[] = [];
    const { row } = fake(name, {
      listDevices: async () => gpus,
      async open({ device }) {
        opened.push(device);
        const runtime = { name, capabilities, dispose: async () => void disposed.push(device!) } as unknown as Runtime;
        return { runtime, settings: { gpu: device }, device: null, emitOptions: () => cpuEmitOptions };
      },
      ...change,
    });
    return { row, opened, disposed };
  };

  it("is opened on those that are named, in that order, each with a listener of its own", async () => {
    const { row, opened } = choosing("fake");
    table(row);
    const heard: unknown[] = [];
    const listenerOf = (device: unknown) => {
      heard.push(device);
      return { lost() {}, restarted() {}, silent() {} };
    };
    const { opened: all, choice } = await openRuntimes("fake", settings, weights, { devices: [2, 0], listenerOf });
    expect(opened).toEqual([2, 0]);
    expect(all.map((each) => each.settings.gpu)).toEqual([2, 0]);
    const devices = [
      { number: 2, name: "C" },
      { number: 0, name: "A" },
    ];
    expect(choice).toEqual({ name: "fake", passedOver: [], devices, leftOut: [] });
    expect(heard).toEqual(devices);
  });

  it("is opened on all that can be used, and says which are left out and why", async () => {
    const { row, disposed } = choosing("fake");
    table(row);
    const check = ({ settings: { gpu } }: OpenedRuntime) => {
      if (gpu === 2) throw new MemoryError("The model does not fit.", 2, 1);
    };
    const { choice } = await openRuntimes("fake", settings, weights, { devices: "all", check });
    expect(choice.devices).toEqual([{ number: 0, name: "A" }]);
    expect(choice.leftOut).toEqual([
      { number: 1, name: "B", reason: "The device 1 (B) cannot be used. It is too old." },
      { number: 2, name: "C", reason: "The model does not fit." },
    ]);
    expect(disposed).toEqual([2]);
  });

  it("is refused as a whole where one that is named cannot be used", async () => {
    const { row, disposed } = choosing("fake");
    table(row);
    const error = await rejection(openRuntimes("fake", settings, weights, { devices: [0, 1] }));
    expect(error).toBeInstanceOf(RuntimeUnavailableError);
    expect(error.message).toBe("The device 1 (B) cannot be used. It is too old.");
    expect(disposed).toEqual([0]);
    const none = () => {
      throw new MemoryError("The model does not fit.", 2, 1);
    };
    const memory = await rejection(openRuntimes("fake", settings, weights, { devices: "all", check: none }));
    expect(memory.message).toBe("The model does not fit.");
  });

  it("says how many devices there are, and which runtimes can choose", async () => {
    const { row } = choosing("fake");
    table(row, fake("other").row);
    const missing = await rejection(openRuntimes("fake", settings, weights, { devices: [0, 3] }));
    expect(missing).toBeInstanceOf(OptionError);
    expect(missing.message).toBe(
      "There is no device 3: the runtime fake finds 3 here, 0 (A), 1 (B), 2 (C). CUDA_VISIBLE_DEVICES decides which there are.",
    );
    const other = await rejection(openRuntimes("other", settings, weights, { devices: "all" }));
    expect(other).toBeInstanceOf(OptionError);
    expect(other.message).toBe(
      "The runtime other cannot choose among devices; fake can. Leave devices away, or use one of these.",
    );
  });

  it("with auto is the first that can choose, and those that cannot are passed over", async () => {
    const lacks = choosing("lacks", {
      listDevices: () => Promise.reject(new RuntimeUnavailableError("lacks", "No driver.")),
    });
    const { row } = choosing("fake");
    table(fake("plain").row, lacks.row, row);
    const { choice } = await openRuntimes("auto", settings, weights, { devices: [0] });
    expect(choice.name).toBe("fake");
    expect(choice.passedOver.map(({ name }) => name)).toEqual(["plain", "lacks"]);
    table(lacks.row, fake("plain").row);
    const error = await rejection(openRuntimes("auto", settings, weights, { devices: "all" }));
    expect(error.message).toBe("No runtime can use devices here. No driver.");
    table(row, fake("plain").row);
    const missing = await rejection(openRuntimes("auto", settings, weights, { devices: [7] }));
    expect(missing.message).toMatch(/^There is no device 7/);
  });

  it("is one that the table names", () => {
    restore();
    const names = Object.values(runtimes).flatMap(({ name, listDevices }) => (listDevices ? [name] : []));
    expect(names).toEqual(["tensorrt", "tensorrt-rtx", "cuda"]);
  });
});
