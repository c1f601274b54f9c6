// What services tell their clients of an error: no path of this machine, and no hint whether a file exists.
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { FlowTurbo, publicMessage as published } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint, readSafetensorsHeader, writeSafetensors } from "../lib/checkpoint/index.js";
import { float32 } from "../lib/common/tensor.js";
import * as errors from "../lib/errors.js";
import { readMask, readOriginal } from "../lib/generation/edit.js";
import { Image } from "../lib/generation/image.js";
import { requestFromJson, requestToJson, resultToJson } from "../lib/json.js";
import { OnnxRuntime } from "../lib/runtimes/onnxruntime/onnxruntime.js";
import { EngineCache } from "../lib/runtimes/tensorrt/cache.js";
import { copyModel, editJson } from "./checkpoint/folders.js";
import { type Bundles, bundle } from "./runtimes/build.js";
import { addGraphs, double } from "./runtimes/contract.js";
import { launch, program } from "./runtimes/models.js";
import { root } from "./support/fixtures.js";

const { errorTable, FlowTurboError, publicMessage } = errors;
const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-secret-"));
const at = (...parts: string[]) => path.join(folder, ...parts);
let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle();
});
afterAll(() => {
  bundles.remove();
  rmSync(folder, { recursive: true, force: true });
});

/** What must not be told: places of this machine, and what the system says about files. */
function expectNothingTold(text: string, name = ""): void {
  const where = `${name}: ${text}`;
  expect(text, where).toMatch(/^\S.{8,}\.$/s);
  for (const place of [folder, os.tmpdir(), process.cwd(), root, os.homedir()])
    if (place.length > 1) expect(text, where).not.toContain(place);
  expect(text, where).not.toMatch(/(^|[\s"'`(:])\/[\w.-]+|[A-Z]:\\|file:|node_modules|secret/);
  expect(text, where).not.toMatch(/ENOENT|EACCES|EISDIR|ENOTDIR|no such file|does not exist|is missing/i);
}

/** A runtime whose child is the script. */
async function withHost(script: string, work: (runtime: OnnxRuntime) => Promise<unknown>): Promise<void> {
  const host = at(`secret-host-${Math.random()}.mjs`);
  writeFileSync(host, script);
  await using runtime = new OnnxRuntime({ weights: "lazy", threads: 1, host: pathToFileURL(host) });
  addGraphs(runtime);
  await work(runtime);
}

const damaged = async (file: string, edit: (json: Record<string, unknown>) => void) => {
  const model = await copyModel("sd3");
  await editJson(path.join(model, file), edit);
  return model;
};
const withModel = async (folder: string | undefined, work: (model: FlowTurbo) => Promise<unknown>) => {
  await using model = await FlowTurbo.load(folder, { measureCosts: false, cache: at("cache") });
  await work(model);
};
const generate = (options: object) => () => withModel(undefined, (model) => model.generate({ prompt: "x", width: 32, height: 32, steps: 2, ...options })); // biome-ignore format: one line

/** Ways to fail, with the code of each. `text` is what the message holds that a client must not see. */
const failures: Record<string, [code: string, fail: () => Promise<unknown> | unknown, text?: () => string]> = {
  "a wrong option": ["OPTION", generate({ steps: 0 })],
  "an unknown option": ["OPTION", generate({ model: 1 })],
  "a wrong size": ["OPTION", generate({ width: 33 })],
  "a picture that is not there": ["OPTION", generate({ image: at("absent.png") }), () => at("absent.png")],
  "a mask that is not there": [
    "OPTION",
    generate({ image: new Image(2, 2, new Uint8Array(12)), mask: at("absent.png") }),
    () => at("absent.png"),
  ],
  "a folder for a picture": ["OPTION", generate({ image: folder }), () => folder],
  "a file that is no picture": [
    "OPTION",
    () => {
      writeFileSync(at("secret.txt"), "text");
      return generate({ image: at("secret.txt") })();
    },
    () => "secret.txt",
  ],
  "bytes that are no picture": ["OPTION", generate({ image: Buffer.from("text") })],
  "a picture that requestToJson() cannot read": [
    "OPTION",
    () => requestToJson({ prompt: "x", image: at("absent.png") }),
    () => at("absent.png"),
  ],
  "a request that is none": ["OPTION", () => requestFromJson({ prompt: "x", image: at("absent.png") })],
  "a result that is none": ["OPTION", () => resultToJson({} as never)],
  "blocks without a refiner": [
    "OPTION",
    async () => {
      const model = await copyModel("sd3");
      rmSync(path.join(model, "refiner"), { recursive: true, force: true });
      return withModel(model, (loaded) => loaded.generate({ prompt: "x", blocks: "H1R1" }));
    },
    () => os.tmpdir(),
  ],
  "stages without a refiner": [
    "OPTION",
    async () => {
      const model = await copyModel("sd3");
      rmSync(path.join(model, "refiner"), { recursive: true, force: true });
      const stages = [{ width: 16, height: 16, blocks: "H1R1" }];
      return withModel(model, (loaded) => loaded.generate({ prompt: "x", stages }));
    },
    () => os.tmpdir(),
  ],
  "an extension that is none": [
    "OPTION",
    () => new Image(1, 1, new Uint8Array(3)).toFile(at("a.gif")),
    () => at("a.gif"),
  ],
  "no checkpoint": ["CHECKPOINT", () => FlowTurbo.load(at("absent")), () => at("absent")],
  "a file for a checkpoint": ["CHECKPOINT", () => FlowTurbo.load(at("secret.txt")), () => at("secret.txt")],
  "a damaged config": [
    "CHECKPOINT",
    async () => openCheckpoint(await damaged("transformer/config.json", (json) => (json.num_layers = -1))),
    () => os.tmpdir(),
  ],
  "a missing part": [
    "CHECKPOINT",
    async () => {
      const model = await copyModel("sd3");
      rmSync(path.join(model, "vae"), { recursive: true });
      return openCheckpoint(model);
    },
    () => os.tmpdir(),
  ],
  "a schedule that is none": [
    "CHECKPOINT",
    async () => {
      const model = await copyModel("sd3");
      writeFileSync(path.join(model, "schedules.json"), '{ "ladder": ["Q1"] }');
      return FlowTurbo.load(model, { measureCosts: false });
    },
    () => os.tmpdir(),
  ],
  "weights that are cut": [
    "CHECKPOINT",
    () => {
      writeFileSync(at("cut.safetensors"), Buffer.alloc(4));
      return readSafetensorsHeader(at("cut.safetensors"));
    },
    () => at("cut.safetensors"),
  ],
  "no library": [
    "RUNTIME_UNAVAILABLE",
    () => FlowTurbo.load(undefined, { runtime: "tensorrt", tensorrtFolder: at("secret-libraries") }),
    () => ": ",
  ],
  "no onnxruntime-node": [
    "INSTALLATION",
    async () => {
      const { readFileSync } = await import("node:fs");
      await withHost(readFileSync(bundles.host, "utf8"), (runtime) => runtime.start());
    },
    () => "npm install",
  ],
  "a child that ends with words": [
    "RUNTIME_DIED",
    () =>
      withHost(`console.error(${JSON.stringify(at("secret-stderr"))}); process.exit(3)`, (runtime) => runtime.start()),
    () => at("secret-stderr"),
  ],
  "a graph that cannot run": [
    "RUNTIME",
    async () => {
      await using runtime = new OnnxRuntime({ weights: "lazy", threads: 1, host: bundles.host });
      addGraphs(runtime);
      await runtime.run(program([1], [{ ...launch("double", "x", "a"), inputs: { z: "x" } }], []));
    },
    () => "double",
  ],
  "values that overflow": [
    "NOT_FINITE",
    async () => {
      await using runtime = new OnnxRuntime({ weights: "lazy", threads: 1, host: bundles.host });
      addGraphs(runtime);
      await runtime.run(program([2], [double("x", "a"), launch("huge", "a", "b", { mustBeFinite: ["b"] })], ["b"]));
    },
  ],
  "a cache that cannot be made": [
    "CACHE",
    () => {
      writeFileSync(at("secret-file"), "");
      return EngineCache.open(at("secret-file"));
    },
    () => at("secret-file"),
  ],
  "a cache that is open to others": [
    "CACHE",
    async () => {
      mkdirSync(at("secret-cache/engines"), { recursive: true });
      chmodSync(at("secret-cache/engines"), 0o777);
      return EngineCache.open(at("secret-cache"));
    },
    () => at("secret-cache"),
  ],
  "a picture that cannot be written": [
    "OUTPUT",
    () => new Image(1, 1, new Uint8Array(3)).toFile(at("no/such/a.png")),
    () => at("no/such/a.png"),
  ],
  "tensors that cannot be written": [
    "OUTPUT",
    () => writeSafetensors(at("no/such/a.safetensors"), { a: float32([1], new Float32Array(1)) }),
    () => at("no/such"),
  ],
  "a limit that nothing meets": ["DEADLINE_IMPOSSIBLE", generate({ deadlineMs: 0.001, steps: undefined })],
  "a full queue": [
    "QUEUE_FULL",
    async () => {
      await using model = await FlowTurbo.load(undefined, { measureCosts: false, maxQueue: 0, maxBatch: 1 });
      const request = { prompt: "x", width: 32, height: 32, steps: 50 };
      await Promise.all(Array.from({ length: 8 }, () => model.generate(request)));
    },
  ],
  "a model that is disposed": [
    "DISPOSED",
    async () => {
      const model = await FlowTurbo.load(undefined, { measureCosts: false });
      await model.dispose();
      await model.generate({ prompt: "x" });
    },
  ],
};

describe("publicMessage", () => {
  it.each(Object.entries(failures))("%s", async (name, [code, fail, text]) => {
    const error = await Promise.resolve()
      .then(fail)
      .then(
        () => null,
        (error) => error,
      );
    expect(error?.code, error?.message).toBe(`ERR_FLOWTURBO_${code}`);
    if (text) expect(error.message).toContain(text());
    expectNothingTold(error.publicMessage, name);
    // Errors of sources and of the package are of two classes here.
    const tell = error instanceof FlowTurboError ? publicMessage : published;
    expect(tell(error)).toBe(error.publicMessage);
  });

  it("does not tell whether a file is there, nor what it is", async () => {
    writeFileSync(at("secret.txt"), "text");
    const gif = Buffer.from("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7", "base64");
    writeFileSync(at("cut.gif"), gif.subarray(0, 20));
    const pages = Buffer.concat([gif.subarray(0, -1), gif.subarray(19)]);
    writeFileSync(at("pages.gif"), pages);
    const told = async (read: typeof readOriginal, file: string | Buffer) => {
      const error = await read(file).then(
        () => null,
        (error) => error,
      );
      expect(error, String(file)).toBeInstanceOf(FlowTurboError);
      return error;
    };
    for (const read of [readOriginal, readMask]) {
      const files = ["absent.png", "secret.txt", "cut.gif", "pages.gif", "."].map((name) => at(name));
      const all = await Promise.all(files.map((file) => told(read, file)));
      expect(new Set(all.map((error) => error.publicMessage)).size).toBe(1);
      expect(new Set(all.map((error) => error.message)).size).toBe(files.length);
      // Of bytes the client may know what they are.
      expect((await told(read, pages)).publicMessage).toMatch(/has 2 frames/);
    }
  });

  it("rests on no cause and on no message of another", () => {
    const cause = new Error(`secret ${folder}`);
    const made = [
      new errors.CheckpointError(folder, folder, { cause }),
      new errors.HubError(folder, "cache", folder, { cause }),
      new errors.HubError(folder, "unreachable", folder, { cause }),
      new errors.RuntimeError(folder, { cause }),
      new errors.RuntimeDiedError(folder, 1, null),
      new errors.RuntimeUnavailableError("tensorrt", folder, { cause }),
      new errors.CompileError("g", folder, [folder], { cause }),
      new errors.MemoryError(folder, 2, 1),
      new errors.CacheError(folder, folder, { cause }),
      new errors.NotFiniteError(folder, folder),
      new errors.LaunchError("g", folder, [folder], { cause }),
      new errors.DeviceLostError(folder, { cause }),
      new errors.DeviceLostError(folder, { cause, permanent: false }),
      new errors.OutputError(folder, folder, { cause }),
      new errors.DisposedError(folder),
      new errors.RedisError(folder, { cause }),
      new errors.FleetEmptyError(folder, { cause }),
      new errors.FleetFormatError(2, 1),
      new errors.PoisonousJobError(folder, [folder]),
    ];
    for (const error of made) {
      expectNothingTold(error.publicMessage, error.code);
      expect(error.publicMessage).toBe(errorTable[error.code].sentence);
    }
    const option = new errors.OptionError("image", folder, { cause, publicMessage: "Give the picture's bytes." });
    expect([option.message, option.publicMessage]).toEqual([folder, "Give the picture's bytes."]);
  });

  it("has one sentence for whatever else is thrown", () => {
    for (const thrown of [new Error(folder), new TypeError(folder), folder, null, undefined, { publicMessage: folder }])
      expect(publicMessage(thrown)).toBe("Internal error.");
    expect(publicMessage(new FlowTurboError("ERR_OTHER" as never, folder))).toBe("Internal error.");
  });

  it("every code of the server's side has a sentence", () => {
    const plain = Object.entries(errorTable).filter(([, { sentence }]) => sentence === null);
    expect(plain.map(([code]) => code)).toEqual(
      ["OPTION", "DEADLINE", "DEADLINE_IMPOSSIBLE", "TIMEOUT", "QUEUE_FULL"].map((name) => `ERR_FLOWTURBO_${name}`),
    );
  });
});
