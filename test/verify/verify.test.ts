// verify:gpu on a machine without a GPU: what it says, the bundle for another machine, and that its comparison notices what it
// is there to notice. simulated.test.ts runs all of it on the simulated library.
import { execFileSync, spawnSync } from "node:child_process";
import {
  appendFileSync,
  cpSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import path from "node:path";
import { beforeAll, describe, expect, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { float32, type StoredTensor, type Tensor } from "../../lib/common/tensor.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { Program } from "../../lib/program/program.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import type { Runtime } from "../../lib/runtimes/runtime.js";
import { EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import {
  type Bundle,
  clearBundle,
  type Referenced,
  type ReferencedPicture,
  readBundle,
  readOrigin,
  writeBundle,
} from "../../verify/bundle.js";
import { type Case, casesOf } from "../../verify/cases.js";
import { barOf, checkCase, compare, graphsOf, isWithin } from "../../verify/check.js";
import { pictureRequests, referencePictures } from "../../verify/pictures.js";
import { markdown, type Report } from "../../verify/report.js";
import { describeEngines, hasDriver, rtxFolder, temporaryFolder } from "../native/support.js";
import { bundle as bundleRuntime } from "../runtimes/build.js";
import { root } from "../support/fixtures.js";

const script = path.join(root, "verify/gpu.ts");
const tsx = [
  path.join(root, "node_modules/tsx/dist/cli.mjs"),
  "--tsconfig",
  path.join(root, "bench/tsconfig.json"),
  script,
];
const verify = (args: readonly string[], env: NodeJS.ProcessEnv = {}) =>
  spawnSync(process.execPath, [...tsx, ...args], { cwd: root, encoding: "utf8", env: { ...process.env, ...env } });

/** A folder with something in it that must stay. */
function occupied(): string {
  const folder = temporaryFolder();
  writeFileSync(path.join(folder, "thesis.txt"), "");
  return folder;
}

describe("verify:gpu", () => {
  it.skipIf(hasDriver)("ends with 3 without a GPU and says what was looked for", () => {
    const { status, stdout, stderr } = verify([]);
    expect(stderr).toMatch(/Nothing was verified: there is no GPU here/);
    expect(stderr).toMatch(/TensorRT 11 cannot be used for running here.*libcuda\.so\.1|no native addon/s);
    expect({ status, stdout }).toEqual({ status: 3, stdout: "" });
  });

  it.each([
    [["--runtime", "cuda"], /--runtime is tensorrt or tensorrt-rtx, not cuda/],
    [["--rounds", "0"], /--rounds is a whole number from 1/],
    [["--level", "6"], /--level is a whole number from 0 to 5, not 6/],
    [["--memory", "much"], /--memory is a number from 0\.1 .*, not much/],
    [["--case-timeout", ""], /--case-timeout is a number/],
    [["--sizes", "64"], /--sizes are such as 1024x1024/],
    [["--batches", "1,0"], /--batches are such as/],
    [["--check", "a", "--bundle", "b"], /leave out the checkpoint and --bundle/],
    [["--rouds", "3"], /Unknown option '--rouds'/],
    [["one", "two"], /Give one checkpoint, not 2/],
    [
      ["--bundle", temporaryFolder(), "--sizes", "66x64"],
      /66x64 cannot be drawn.*multiple of 8 for width but received 66/,
    ],
    [["--bundle", occupied()], /is not empty and holds no bundle\. Name a folder that is empty or new/],
  ])("refuses %j", (args, message) => {
    const { status, stderr } = verify(args);
    expect(status).toBe(2);
    expect(stderr).toMatch(message);
  });

  describe("a bundle", () => {
    let folder: string;
    let written: readonly Referenced[];
    let drawn: readonly ReferencedPicture[];
    /** The embedded model with links for weights, as in a Hugging Face cache, and with what no graph reads. */
    const linked = () => {
      const model = temporaryFolder();
      cpSync(embeddedModel, model, { recursive: true });
      const weights = path.join(model, "vae/diffusion_pytorch_model.safetensors");
      rmSync(weights);
      symlinkSync(path.join(embeddedModel, "vae/diffusion_pytorch_model.safetensors"), weights);
      for (const other of [
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        ".git/HEAD",
      ]) {
        mkdirSync(path.dirname(path.join(model, other)), { recursive: true });
        writeFileSync(path.join(model, other), "not read");
      }
      return model;
    };
    let bundle: Bundle;
    let reference: { run(program: Program): Promise<Record<string, Tensor>>; runtime: Runtime };
    beforeAll(async () => {
      folder = temporaryFolder();
      const model = linked();
      const checkpoint = await openCheckpoint(model);
      const graphs = new GraphLibrary(checkpoint);
      const { host, remove } = await bundleRuntime();
      const runtime = new OnnxRuntime({ weights: "lazy", host });
      const run = (program: Program) => {
        for (const name of graphsOf(program)) if (!runtime.has(name)) runtime.add(graphs.get(name));
        return runtime.run(program);
      };
      reference = { run, runtime };
      const cases: Case[] = await casesOf(graphs, { sizes: [{ width: 64, height: 64 }], batches: [1] }, run);
      const referenced: Referenced[] = [];
      for (const example of cases) referenced.push({ example, expected: await run(example.program) });
      written = referenced;
      const compiled = new GraphLibrary(checkpoint, tensorRtEmitOptions());
      const names = [...new Set(cases.flatMap(({ program }) => graphsOf(program)))];
      const requests = pictureRequests(checkpoint, [{ width: 64, height: 64 }]).filter(({ quick }) => quick);
      drawn = await referencePictures(embeddedModel, requests, () => undefined);
      await writeBundle(folder, {
        origin: { checkpoint: "embedded", flowturbo: "0", reference: "ONNX Runtime", created: "now" },
        graphs: new Map(names.map((name) => [name as string, compiled.get(name)])),
        compute: (name) => compiled.optionsOf(name).compute,
        ...{ cases: written, pictures: { requests: drawn, batches: [1, 2] }, model, copy: true },
      });
      bundle = await readBundle(folder);
      return async () => {
        await runtime.dispose();
        remove();
      };
    });

    it("has every graph of the checkpoint and every kind of schedule", () => {
      expect([...bundle.graphs.keys()].sort()).toEqual(
        [
          ...["clip_g", "clip_l", "t5", "predict", "predict.guidance", "refine", "refine.guidance", "scale_noise"],
          ...["vae_decoder", "vae_encoder", "inpaint_blend", "inpaint_blend.guidance", "preview", "preview.guidance"],
          ...["combine", "combine.guidance", "extrapolate", "extrapolate.guidance"],
          ...["clip_g.lora-8", "clip_l.lora-8", "predict.lora-8", "predict.guidance.lora-8"],
          ...["predict.guidance.skipped-0+2+4", "predict.guidance.lora-8.skipped-0+2+4"],
        ].sort(),
      );
      const names = bundle.cases.filter(({ example }) => example.kind === "sampler").map(({ example }) => example.name);
      for (const what of ["E4", "H3", "H1P4", "H1P5R3", "without guidance", "inpainting", "skip-layer", "LoRAs"])
        expect(
          names.some((name) => name.includes(what)),
          what,
        ).toBe(true);
    });

    it("comes back as it was written, with a checkpoint of its own", async () => {
      // Whether a constant is worth keeping matters where requests share launches; programs alone have no use for it.
      const plain = written.map(({ example, expected }) => {
        const constants = Object.fromEntries(
          Object.entries(example.program.constants).map(([name, constant]) => [name, { ...constant, keep: undefined }]),
        );
        return { example: { ...example, program: { ...example.program, constants } }, expected };
      });
      expect(bundle.cases).toEqual(plain);
      expect(bundle.pictures).toEqual({ requests: drawn, batches: [1, 2] });
      expect(bundle.model).toBe(path.join(folder, "model"));
      // The files of the embedded model, whatever else lay there.
      const names = (of: string) => (readdirSync(of, { recursive: true }) as string[]).sort();
      expect(names(bundle.model!)).toEqual(names(embeddedModel));
      for (const name of names(bundle.model!))
        expect(lstatSync(path.join(bundle.model!, name)).isSymbolicLink()).toBe(false);
      const checkpoint = await openCheckpoint(embeddedModel);
      const original = new GraphLibrary(checkpoint, tensorRtEmitOptions()).get("predict.guidance");
      const copied = bundle.graphs.get("predict.guidance")!;
      // The bytes name the places of the weights, which the builder does not look at.
      expect(copied.fingerprint).toBe(original.fingerprint);
      expect([...copied.externals.keys()]).toEqual([...original.externals.keys()]);
      const files = new Map<string, Buffer>();
      const valuesOf = ({ file, offset, length }: StoredTensor) => {
        if (!files.has(file)) files.set(file, readFileSync(file));
        return files.get(file)!.subarray(offset, offset + length);
      };
      for (const [name, tensor] of copied.externals) {
        expect(tensor.file.startsWith(path.join(folder, "model/"))).toBe(true);
        expect(Buffer.compare(valuesOf(tensor), valuesOf(original.externals.get(name)!)), name).toBe(0);
      }
    });

    it("that stays on this machine has no copy, and names the checkpoint's folder", async () => {
      const here = temporaryFolder();
      const [one] = bundle.cases;
      const { graphs, compute, origin, pictures } = bundle;
      await writeBundle(here, { origin, graphs, compute, cases: [one!], pictures, model: bundle.model, copy: false });
      const read = await readBundle(here);
      expect(read.model).toBe(bundle.model);
      expect(existsSync(path.join(here, "model"))).toBe(false);
      expect(read.graphs).toEqual(graphs);
      expect(read.files).toEqual(bundle.files);
      expect(await readOrigin(here)).toEqual(origin);
    });

    it("has a small part with every graph once", () => {
      const quick = bundle.cases.filter(({ example }) => example.quick);
      const launched = new Set(quick.flatMap(({ example }) => graphsOf(example.program)));
      expect([...launched].sort()).toEqual([...bundle.graphs.keys()].sort());
      expect(quick.length).toBeLessThan(bundle.cases.length);
    });

    it("has bars that float16 keeps, and not by orders of magnitude", { timeout: 120_000 }, async () => {
      const half = new GraphLibrary(await openCheckpoint(embeddedModel), (network) => ({
        ...tensorRtEmitOptions()({ ...network, overflowsInFloat16: false }),
        compute: "float16",
      }));
      const { host, remove } = await bundleRuntime();
      const runtime = new OnnxRuntime({ weights: "lazy", host });
      const most = { engine: 0, sampler: 0, worst: 0 };
      for (const { example, expected } of written) {
        const { kind, program } = example;
        if (kind === "texts") continue;
        for (const name of graphsOf(program)) if (!runtime.has(name)) runtime.add(half.get(name));
        const differences = compare(await runtime.run(program), expected);
        const bar = barOf(kind, ["float16"]);
        expect(isWithin(differences, bar), `${example.name}: ${JSON.stringify(differences)}`).toBe(true);
        for (const { relative, worst } of differences) {
          most[kind] = Math.max(most[kind], relative / bar.relative);
          if (kind === "sampler") most.worst = Math.max(most.worst, worst / bar.worst);
        }
      }
      for (const share of Object.values(most)) expect(share).toBeGreaterThan(0.1);
      await runtime.dispose();
      remove();
    });

    it("passes on the runtime that made it, and fails on one that is a little off", async () => {
      const [example, expected] = [bundle.cases.at(-1)!.example, bundle.cases.at(-1)!.expected];
      const bar = barOf(example.kind, ["float16"]);
      const exact = { run: reference.run } as unknown as Runtime;
      const good = await checkCase(exact, example, expected, { bar, rounds: 1 });
      expect(good).toMatchObject({ passed: true, name: example.name });
      expect(Math.max(...good.differences.map(({ relative }) => relative))).toBeLessThan(1e-4);
      const wrong = (change: (value: number, index: number) => number) =>
        ({
          run: async (program: Program) =>
            Object.fromEntries(
              Object.entries(await reference.run(program)).map(([name, { shape, data }]) => [
                name,
                float32(shape, Float32Array.from(data as Float32Array, change)),
              ]),
            ),
        }) as unknown as Runtime;
      for (const change of [
        (value: number) => value * (1 + 2 * bar.relative),
        // One value of thousands: far below the bar of the L2 error.
        (value: number, index: number) => (index === 0 ? value + 20 * bar.relative : value),
        (value: number, index: number) => (index === 0 ? Number.NaN : value),
        (value: number, index: number) => (index < 20 ? 9 : value),
      ])
        expect(await checkCase(wrong(change), example, expected, { bar, rounds: 1 })).toMatchObject({ passed: false });
      const failing = { run: () => Promise.reject(new RangeError("no")) } as unknown as Runtime;
      const failed = await checkCase(failing, example, expected, { bar, rounds: 1 });
      expect(failed).toMatchObject({ passed: false, problems: ["RangeError: no"] });
      // Other bits from a CUDA graph are a failure, however close, and so is one that was not replayed.
      let replays = 0;
      const counted = { replays: () => replays++ * 2, reason: () => "the stream is busy" };
      const capturing = { runtime: wrong((value) => value * (1 + 1e-6)), ...counted };
      const captured = await checkCase(exact, example, expected, { bar, rounds: 1, capturing });
      expect(captured).toMatchObject({ passed: false, captured: { runs: 2, replayed: 2 } });
      expect(captured.problems[0]).toBe("captured, 2 of 2 runs gave other bits than launch by launch");
      const none = { runtime: exact, replays: () => 7, reason: () => "the stream is busy" };
      const plain = await checkCase(exact, example, expected, { bar, rounds: 1, capturing: none });
      expect(plain.problems).toEqual(["not replayed as one CUDA graph: 2 of 2 runs (the stream is busy)"]);
      const report: Report = {
        ...{ state: "finished", passed: false, running: null, quick: false, level: null, skipped: [], problems: [] },
        ...{ planned: { engines: 0, cases: 2 }, pictures: [] },
        machine: { gpu: "G", sm: "9.0", memoryBytes: 1e9, driver: "13.0", runtime: "tensorrt", library: "11" },
        ...{ origin: bundle.origin, rounds: 1, engines: [], findings: [good, failed], lifecycle: [] },
      };
      expect(markdown(report)).toMatch(/# verify:gpu: FAILED[\s\S]*## What failed\n\n- .*RangeError: no/);
    });

    it("is removed before another takes its place", async () => {
      const copy = temporaryFolder();
      cpSync(folder, copy, { recursive: true });
      writeFileSync(path.join(copy, "notes.txt"), "");
      await clearBundle(copy);
      expect(readdirSync(copy)).toEqual(["notes.txt"]);
      await expect(clearBundle(copy)).rejects.toThrow(/not empty and holds no bundle/);
      await clearBundle(path.join(copy, "new"));
    });

    it("is refused when it was damaged", async () => {
      const copy = temporaryFolder();
      execFileSync("cp", ["-r", `${folder}/.`, copy]);
      appendFileSync(path.join(copy, "tensors.bin"), "x");
      await expect(readBundle(copy)).rejects.toThrow(/tensors\.bin of the bundle .* is damaged/);
      writeFileSync(path.join(copy, "manifest.json"), "{");
      await expect(readBundle(copy)).rejects.toThrow(/holds no bundle/);
      await expect(readBundle(path.join(copy, "nowhere"))).rejects.toThrow(/nowhere holds no bundle.*no such file/);
    });

    describeEngines("gives the real builder all it needs:", () => {
      it("an engine from its graphs and weights alone", async () => {
        const compiler = await EngineCompiler.open({
          ...{ kind: "tensorrt-rtx", folder: rtxFolder, targets: [86], cache: temporaryFolder() },
        });
        const { program } = bundle.cases.find(({ example }) => example.name.startsWith("refine,"))!.example;
        const shapes = Object.fromEntries(
          Object.entries(program.constants).map(([name, constant]) => [
            name.slice(3),
            constant.kind === "value" ? constant.tensor.shape : [],
          ]),
        );
        const request = { graph: bundle.graphs.get("refine")!, profiles: [shapes] };
        expect(await compiler.compile(request, { files: bundle.files })).toMatchObject({ cached: false });
      });
    });
  });

  it("measures differences as they are", () => {
    const tensor = (...data: number[]) => ({ a: float32([data.length], Float32Array.from(data)) });
    expect(compare(tensor(3, 4), tensor(3, 4))).toEqual([{ result: "a", relative: 0, worst: 0 }]);
    expect(compare(tensor(3, 5), tensor(3, 4))).toEqual([{ result: "a", relative: 0.2, worst: 0.25 }]);
    expect(compare(tensor(0, 0), tensor(0, 0))[0]!.relative).toBe(0);
    expect(compare(tensor(1, 0), tensor(0, 0))[0]!.relative).toBe(Number.POSITIVE_INFINITY);
    expect(compare(tensor(3, Number.NaN), tensor(3, 4))[0]!.relative).toBeNaN();
    expect(compare(tensor(3), tensor(3, 4))[0]!.relative).toBe(Number.POSITIVE_INFINITY);
    expect(compare({}, tensor(3))[0]!.relative).toBe(Number.POSITIVE_INFINITY);
  });
});
