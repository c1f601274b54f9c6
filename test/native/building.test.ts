// Building engines with the library's own builder simulated (native/simulated/builder.cpp): what the addon asks it for, and
// what builds leave for each other. Real engines are built in engines.test.ts, with TensorRT-RTX.
import { chmodSync, readdirSync, readFileSync, statSync, symlinkSync, unlinkSync, writeFileSync } from "node:fs";
import path from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { CompileError } from "../../lib/errors.js";
import { type CompilerSettings, EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import type { TensorRtKind } from "../../lib/runtimes/tensorrt/flavours.js";
import { scaleGraph } from "../runtimes/models.js";
import { loadAddon } from "../support/addon.js";
import { writeForms } from "../support/closed-forms.js";
import { simulated, simulatedFolder } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const graphs = ["double", "triple"].map((name, index) => scaleGraph(name, index + 2));
const [double, triple] = graphs as [(typeof graphs)[0], (typeof graphs)[0]];
const shapes = (...sizes: number[]) => sizes.map((size) => ({ x: [size] }));

describeAddons("the simulated builder", () => {
  let cache: string;
  beforeEach(() => {
    cache = temporaryFolder();
    const forms = temporaryFolder();
    writeForms(forms, { double: { formulas: ["y x 2 *"] }, triple: { formulas: ["y x 3 *"] } });
    vi.stubEnv("FLOWTURBO_SIMULATED_FORMS", forms);
  });
  afterEach(() => {
    vi.unstubAllEnvs();
    expect(simulated.violation()).toBe("");
  });

  const open = (kind: TensorRtKind, settings: Partial<CompilerSettings> = {}) =>
    EngineCompiler.open({ kind, folder: path.join(simulatedFolder, kind), cache, ...settings });
  const built = async (compiler: EngineCompiler, graph = double, profiles = shapes(3)) => {
    const engine = await compiler.compile({ graph, profiles }, { files: [] });
    return { ...engine, plan: readFileSync(engine.plan, "utf8") };
  };
  const timings = () => readdirSync(path.join(cache, "engines")).filter((name) => name.includes(".timings"));

  it.each(["tensorrt", "tensorrt-rtx"] as const)(
    "%s: TF32 is off, whose 10 bits of mantissa no float32 checkpoint asked for",
    async (kind) => {
      const { plan } = await built(await open(kind));
      expect(plan).toContain("\nbuilt tf32 0\n");
      expect(plan).toContain("\nbuilt level 3\n");
      expect(plan).toContain("\nprofile x=3 y=3\n");
    },
  );

  it("what kernels took is measured once for all engines of a GPU, and kept for the next process", async () => {
    const compiler = await open("tensorrt");
    expect((await built(compiler, double, shapes(3, 4))).plan).toMatch(/by timing[\s\S]*by timing/);
    expect((await built(compiler, triple)).plan).toContain("built by timing");
    // One profile more: an engine of its own, whose other profiles are known.
    const { plan } = await built(await open("tensorrt"), double, shapes(3, 4, 5));
    expect(plan.match(/built (by timing|from timings)/g)).toEqual([
      ...["built from timings", "built from timings", "built by timing"],
    ]);
    expect(timings()).toEqual([expect.stringMatching(/^timings-[0-9a-f]{32}\.timings$/)]);
    const file = path.join(cache, "engines", timings()[0]!);
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(readFileSync(file, "utf8")).toMatch(/double.*\n[\s\S]*triple/);
    await compiler.cache.clear(loadAddon("tensorrt"));
    expect(timings()).toEqual([]);
  });

  it("two builds at the same time both leave what they measured", async () => {
    const compiler = await open("tensorrt");
    await Promise.all([built(compiler, double), built(compiler, triple)]);
    const text = readFileSync(path.join(cache, "engines", timings()[0]!), "utf8");
    expect(text).toMatch(/^double /m);
    expect(text).toMatch(/^triple /m);
  });

  it("measurements that are damaged, a link, or open to others are not read", async () => {
    const compiler = await open("tensorrt");
    await built(compiler);
    const file = path.join(cache, "engines", timings()[0]!);
    const text = readFileSync(file, "utf8");
    const elsewhere = path.join(temporaryFolder(), "timings");
    writeFileSync(elsewhere, text);
    const spoilt: (() => void)[] = [
      () => writeFileSync(file, "no timings"),
      () => chmodSync(file, 0o622),
      () => {
        unlinkSync(file);
        symlinkSync(elsewhere, file);
      },
    ];
    for (const [index, spoil] of spoilt.entries()) {
      spoil();
      // The profile of size 3 is in the file, and measured again. What is then written is sound.
      expect((await built(compiler, double, shapes(3, 10 + index))).plan).not.toContain("from timings");
      expect(readFileSync(file, "utf8")).toContain(`x=${10 + index}`);
    }
    expect(readFileSync(elsewhere, "utf8")).toBe(text);
  });

  it("TensorRT-RTX measures nothing and leaves nothing", async () => {
    await built(await open("tensorrt-rtx"));
    expect(timings()).toEqual([]);
  });

  it("an optimisation level is the engine's own, and one of another level serves where there is no better", async () => {
    const [quick, usual] = [await open("tensorrt", { level: 1 }), await open("tensorrt")];
    const first = await built(quick);
    expect(first.plan).toContain("\nbuilt level 1\n");
    const request = { graph: double, profiles: shapes(3) };
    // What runs pictures takes it, rather than to build for minutes in the middle of one.
    expect(await usual.find(request, { files: [] })).toMatchObject({ cached: true, sha256: first.sha256 });
    // What compiles ahead of time does not.
    const second = await built(usual);
    expect(second).toMatchObject({ cached: false });
    expect(await usual.find(request, { files: [] })).toMatchObject({ cached: true, sha256: second.sha256 });
    expect(await quick.find(request, { files: [] })).toMatchObject({ cached: true, sha256: first.sha256 });
  });

  it("a builder that lacks its resource is reported with what it logged", async () => {
    vi.stubEnv("FLOWTURBO_SIMULATED_BUILDER", "no-resource");
    const error = await built(await open("tensorrt")).catch((caught) => caught);
    expect(error).toBeInstanceOf(CompileError);
    expect(error.message).toMatch(/double could not be built.*libnvinfer_builder_resource/s);
  });

  it("a graph that nobody has a closed form of is refused by the parser", async () => {
    await expect(built(await open("tensorrt"), scaleGraph("tenfold", 10))).rejects.toThrow(
      /tenfold has no closed form/,
    );
  });
});
