// verify:gpu on a machine without a GPU: what it says, the bundle for another machine, and that its comparison would
// notice what it is there to notice.
import { execFileSync, spawnSync } from "node:child_process";
import { appendFileSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { beforeAll, describe, expect, it, vi } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { float32, type StoredTensor, type Tensor } from "../../lib/common/tensor.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import type { Program } from "../../lib/program/program.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import type { Runtime } from "../../lib/runtimes/runtime.js";
import { EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import { type Bundle, type Referenced, readBundle, writeBundle } from "../../verify/bundle.js";
import { type Case, casesOf } from "../../verify/cases.js";
import { barOf, checkCase, compare, graphsOf } from "../../verify/check.js";
import { markdown, type Report } from "../../verify/report.js";
import { describeAddons, describeEngines, hasDriver, rtxFolder, temporaryFolder } from "../native/support.js";
import { bundle as bundleRuntime } from "../runtimes/build.js";
import { closedForms, launch, program, scaleGraph } from "../runtimes/models.js";
import { loadAddon } from "../support/addon.js";
import { root } from "../support/fixtures.js";
import { planText, simulatedFolder } from "../support/simulated.js";

const script = path.join(root, "verify/gpu.ts");
const tsx = [
  path.join(root, "node_modules/tsx/dist/cli.mjs"),
  "--tsconfig",
  path.join(root, "bench/tsconfig.json"),
  script,
];
const verify = (args: readonly string[], env: NodeJS.ProcessEnv = {}) =>
  spawnSync(process.execPath, [...tsx, ...args], { cwd: root, encoding: "utf8", env: { ...process.env, ...env } });

describe("verify:gpu", () => {
  it.skipIf(hasDriver)("ends with 3 without a GPU and says what was looked for", () => {
    const { status, stdout, stderr } = verify([]);
    expect(stderr).toMatch(/Nothing was verified: there is no GPU here/);
    expect(stderr).toMatch(/TensorRT 11 cannot be used for running here.*libcuda\.so\.1|no native addon/s);
    expect({ status, stdout }).toEqual({ status: 3, stdout: "" });
  });

  it.each([
    [["--runtime", "cuda"], /--runtime is tensorrt or tensorrt-rtx, not cuda/],
    [["--rounds", "0"], /--rounds is a whole number/],
    [["--check", "a", "--bundle", "b"], /leave out the checkpoint and --bundle/],
    [["--rouds", "3"], /Unknown option '--rouds'/],
    [["one", "two"], /Give one checkpoint, not 2/],
    [
      ["--bundle", temporaryFolder(), "--sizes", "66x64"],
      /66x64 cannot be drawn.*multiple of 8 for width but received 66/,
    ],
  ])("refuses %j", (args, message) => {
    const { status, stderr } = verify(args);
    expect(status).toBe(2);
    expect(stderr).toMatch(message);
  });

  describe("a bundle", () => {
    let folder: string;
    let written: readonly Referenced[];
    let bundle: Bundle;
    let reference: { run(program: Program): Promise<Record<string, Tensor>>; runtime: Runtime };
    beforeAll(async () => {
      folder = temporaryFolder();
      const checkpoint = await openCheckpoint(embeddedModel);
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
      await writeBundle(
        folder,
        { checkpoint: "embedded", flowturbo: "0", reference: "ONNX Runtime", created: "now" },
        new Map(names.map((name) => [name as string, compiled.get(name)])),
        (name) => compiled.optionsOf(name).compute,
        written,
      );
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
        ].sort(),
      );
      const names = bundle.cases.filter(({ example }) => example.kind === "sampler").map(({ example }) => example.name);
      for (const what of ["E4", "H3", "H1P4", "H1P5R3", "without guidance", "inpainting"])
        expect(
          names.some((name) => name.includes(what)),
          what,
        ).toBe(true);
    });

    it("comes back as it was written, with weights of its own", async () => {
      expect(bundle.cases).toEqual(written);
      const checkpoint = await openCheckpoint(embeddedModel);
      const original = new GraphLibrary(checkpoint, tensorRtEmitOptions()).get("predict.guidance");
      const copied = bundle.graphs.get("predict.guidance")!;
      expect(Buffer.compare(copied.bytes, original.bytes)).toBe(0);
      expect([...copied.externals.keys()]).toEqual([...original.externals.keys()]);
      const files = new Map<string, Buffer>();
      const valuesOf = ({ file, offset, length }: StoredTensor) => {
        if (!files.has(file)) files.set(file, readFileSync(file));
        return files.get(file)!.subarray(offset, offset + length);
      };
      for (const [name, tensor] of copied.externals) {
        expect(tensor.file).toBe(path.join(folder, "weights.bin"));
        expect(Buffer.compare(valuesOf(tensor), valuesOf(original.externals.get(name)!)), name).toBe(0);
      }
    });

    it("passes on the runtime that made it, and fails on one that is a little off", async () => {
      const [example, expected] = [bundle.cases.at(-1)!.example, bundle.cases.at(-1)!.expected];
      const bar = barOf(example, bundle.compute);
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
        (value: number) => value * (1 + 2 * bar),
        (value: number, index: number) => (index === 0 ? Number.NaN : value),
        (value: number, index: number) => (index < 20 ? 9 : value),
      ])
        expect(await checkCase(wrong(change), example, expected, { bar, rounds: 1 })).toMatchObject({ passed: false });
      const failing = { run: () => Promise.reject(new RangeError("no")) } as unknown as Runtime;
      const failed = await checkCase(failing, example, expected, { bar, rounds: 1 });
      expect(failed).toMatchObject({ passed: false, error: "RangeError: no" });
      // Other bits from a CUDA graph are a failure, however close.
      const capturing = wrong((value) => value * (1 + 1e-6));
      const captured = await checkCase(exact, example, expected, { bar, rounds: 1, capturing });
      expect(captured).toMatchObject({ passed: false, captured: { same: false } });
      const report: Report = {
        passed: false,
        machine: { gpu: "G", sm: "9.0", memoryBytes: 1e9, driver: "13.0", runtime: "tensorrt", library: "11" },
        ...{ origin: bundle.origin, rounds: 1, engines: [], findings: [good, failed], lifecycle: [] },
      };
      expect(markdown(report)).toMatch(/# verify:gpu: FAILED[\s\S]*## What failed\n\n- .*RangeError: no/);
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

    describeAddons("on the simulated device,", () => {
      it("whose library builds nothing, is reported to fail engine by engine", () => {
        const out = temporaryFolder();
        const { status, stdout, stderr } = verify(
          [
            ...["--check", folder, "--rounds", "1", "--runtime", "tensorrt-rtx", "--out", out],
            ...["--tensorrt-dir", path.join(simulatedFolder, "tensorrt-rtx"), "--cache", temporaryFolder()],
          ],
          { LD_LIBRARY_PATH: simulatedFolder },
        );
        expect(status, stderr).toBe(1);
        expect(stdout).toMatch(/# verify:gpu: FAILED/);
        const report = JSON.parse(readFileSync(path.join(out, "report.json"), "utf8")) as Report;
        expect(report.engines).toHaveLength(bundle.graphs.size);
        for (const { error } of report.engines) expect(error).toMatch(/could not be built/);
        expect(report.findings).toHaveLength(bundle.cases.length);
        for (const { error } of report.findings) expect(error).toMatch(/^CompileError: /);
        expect(readFileSync(path.join(out, "report.md"), "utf8")).toBe(stdout);
      });
    });
  });

  describeAddons("on the simulated device, with engines in the cache", () => {
    const kind = "tensorrt-rtx";
    const libraries = path.join(simulatedFolder, kind);
    const cache = temporaryFolder();
    const graph = scaleGraph("double", 2);
    const job = (...names: string[]): Program => ({
      ...program(
        [1, 2, 3],
        names.slice(1).map((name, index) => launch("double", names[index]!, name)),
        [names.at(-1)!],
      ),
    });
    const cases: Case[] = [
      { name: "double alone", kind: "engine", program: job("x", "a") },
      { name: "doubled four times", kind: "sampler", program: job("x", "a", "b", "c", "d") },
    ];
    const run = async (expected: readonly number[][], name: string) => {
      const folder = temporaryFolder();
      await writeBundle(
        folder,
        { checkpoint: "none", flowturbo: "0", reference: "by hand", created: "now" },
        new Map([["double", graph]]),
        () => "float16",
        cases.map((example, index) => ({
          example,
          expected: { [example.program.results[0]!]: float32([3], Float32Array.from(expected[index]!)) },
        })),
      );
      const out = temporaryFolder();
      const { status, stdout, stderr } = verify(
        [
          "--check",
          folder,
          "--rounds",
          "2",
          "--runtime",
          kind,
          "--tensorrt-dir",
          libraries,
          "--cache",
          cache,
          "--out",
          out,
        ],
        { LD_LIBRARY_PATH: simulatedFolder },
      );
      expect(stderr, name).toContain("Written to");
      return { status, stdout, report: JSON.parse(readFileSync(path.join(out, "report.json"), "utf8")) as Report };
    };
    beforeAll(async () => {
      // A builder that writes the closed form; all else of the compiler and its cache is as it is.
      const addon = loadAddon(kind);
      const build = vi.spyOn(addon, "build").mockImplementation((_library, _parser, { planPath }) => {
        writeFileSync(planPath, planText(closedForms.get(graph)!, [{ x: [3] }]), { mode: 0o600 });
        const done = { planBytes: 0, parseSeconds: 0, buildSeconds: 0, warnings: [] };
        return { promise: Promise.resolve(done), cancel: () => undefined };
      });
      const compiler = await EngineCompiler.open({ kind, folder: libraries, cache });
      await compiler.compile({ graph, profiles: [{ x: [3] }] }, { files: [] });
      build.mockRestore();
    });

    it("passes, with every launch timed and every run replayed as one graph", async () => {
      const { status, stdout, report } = await run(
        [
          [2, 4, 6],
          [16, 32, 48],
        ],
        "sound",
      );
      expect(report).toMatchObject({ passed: true, machine: { runtime: kind }, rounds: 2 });
      expect(status).toBe(0);
      expect(stdout).toMatch(/# verify:gpu: passed/);
      expect(report.engines).toEqual([expect.objectContaining({ graph: "double", cached: true })]);
      const [alone, four] = report.findings;
      expect(alone!.launches).toHaveLength(1);
      expect(four!.launches).toHaveLength(4);
      for (const { milliseconds } of four!.launches) expect(milliseconds).toBeGreaterThan(0);
      expect(four!.captured).toMatchObject({ same: true });
      expect(report.lifecycle.map(({ passed }) => passed)).toEqual([true, true, true]);
    });

    it("fails and ends with 1 where one value is further from the reference than its type allows", async () => {
      const { status, stdout, report } = await run(
        [
          [2, 4, 6.2],
          [16, 32, 48],
        ],
        "wrong",
      );
      expect(status).toBe(1);
      expect(report.findings.map(({ passed }) => passed)).toEqual([false, true]);
      expect(stdout).toMatch(/## What failed\n\n- double alone: a 2\.6e-2 \(bar 1\.0e-2\)/);
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
