// Real engines, built by TensorRT-RTX from the graphs of the fixtures: what is built, what the cache answers, and what
// happens when something goes wrong in the middle. Needs no GPU.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import path from "node:path";
import { beforeAll, describe, expect, inject, it } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CacheError, CheckpointError, CompileError, MemoryError, OptionError } from "../../lib/errors.js";
import { type CompileReport, compileEngines, requiredEngines } from "../../lib/generation/engines.js";
import type { CompileEnginesOptions, EngineProgress } from "../../lib/model.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import type { CompileProgress } from "../../lib/runtimes/builder.js";
import { EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import { fixture, fixtureNames } from "../support/fixtures.js";
import { cli, copyOf, describeEngines, rtxFolder, startNode, temporaryFolder } from "./support.js";

const model = (name: string) => fixture(name, "model");
const digest = (file: string) => createHash("sha256").update(readFileSync(file)).digest("hex");
const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );
/** Whatever a build may leave in a cache besides plans, their descriptions and the memory of digests. */
const leftovers = (cache: string) =>
  readdirSync(path.join(cache, "engines")).filter((name) => !/\.(plan|json)$/.test(name));

const everything: CompileEnginesOptions = {
  runtime: "tensorrt-rtx",
  tensorrtFolder: rtxFolder,
  targets: ["8.6", "8.9", "12.0"],
  sizes: [
    { width: 64, height: 64 },
    { width: 128, height: 96 },
  ],
  batches: [1, 2, 4],
};

async function until(what: () => boolean | Promise<boolean>, seconds = 30): Promise<void> {
  for (const end = Date.now() + seconds * 1000; !(await what()); ) {
    if (Date.now() > end) throw new Error(`Waited ${seconds} s in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

describeEngines("the engines of a fixture", () => {
  it.each(fixtureNames)(
    "%s: all graphs, three targets, six profiles; then from the cache",
    { timeout: 240_000 },
    async (name) => {
      const cache = temporaryFolder();
      const events: EngineProgress[] = [];
      const built = await compileEngines(model(name), {
        ...everything,
        cache,
        onProgress: (event) => events.push(event),
      });
      expect(built).toMatchObject({
        runtime: "tensorrt-rtx",
        version: "1.7.1.116",
        cache: path.join(cache, "engines"),
      });
      const graphs = [
        "clip_l",
        "clip_g",
        ...(name === "sd3" ? [] : ["t5"]),
        "predict.guidance",
        "refine.guidance",
        "combine.guidance",
        "extrapolate.guidance",
        "vae_decoder",
      ];
      expect(built.engines.map(({ graph }) => graph)).toEqual(graphs);
      for (const engine of built.engines) {
        const { graph, stepType, profiles, plan, bytes, sha256, cached, rebuilt } = engine;
        expect([stepType, cached, rebuilt]).toEqual([
          ["predict", "refine"].find((type) => graph.startsWith(type)) ?? null,
          false,
          null,
        ]);
        expect(profiles).toHaveLength(["clip_l", "clip_g", "t5"].includes(graph) ? 3 : 6);
        expect([statSync(plan).size, digest(plan), statSync(plan).mode & 0o777]).toEqual([bytes, sha256, 0o600]);
        // Kernels cost 2 to 3 MB for each layer and profile at worst.
        expect(bytes).toBeGreaterThan(/^(combine|extrapolate)/.test(graph) ? 1e4 : 1e5);
        expect(bytes).toBeLessThan(1e8);
      }
      const six = built.engines.find(({ graph }) => graph === "predict.guidance")!.profiles;
      expect(six.map(({ batch, width, height }) => `${batch}:${width}x${height}`)).toEqual(
        ["64x64", "128x96"].flatMap((size) => [1, 2, 4].map((batch) => `${batch}:${size}`)),
      );
      expect(six[5]!.inputs).toMatchObject({
        x: [4, 16, 12, 16],
        velocity: [8, 16, 12, 16],
        position_embedding: [1, 48, expect.anything()],
        guidance: [4],
      });

      // Progress: one scale for each engine, never backwards, complete.
      for (const graph of graphs) {
        const own = events.filter((event) => event.graph === graph);
        expect(own.map(({ done }) => done)).toEqual(own.map(({ done }) => done).sort((a, b) => a - b));
        expect(new Set(own.map(({ total }) => total)).size).toBe(1);
        expect(own.at(-1)).toMatchObject({ phase: "done", done: own[0]!.total });
        expect(own.some(({ phase }) => phase === "building")).toBe(true);
      }

      const again = await compileEngines(model(name), { ...everything, cache });
      expect(again.engines.map(({ cached }) => cached)).toEqual(graphs.map(() => true));
      expect(again.engines.map(({ plan, sha256 }) => [plan, sha256])).toEqual(
        built.engines.map(({ plan, sha256 }) => [plan, sha256]),
      );
      expect(leftovers(cache)).toEqual([]);
    },
  );

  it.each(fixtureNames)(
    "%s: the graphs of steps without guidance, stages, editing and previews",
    async (name) => {
      const { engines } = await compileEngines(model(name), {
        ...{ ...everything, targets: ["8.9"], batches: [1], cache: temporaryFolder() },
        ...{ guidance: "off", features: ["stages", "editing", "previews"], jobs: 2 },
      });
      expect(engines.map(({ graph }) => graph).slice(name === "sd3" ? 2 : 3)).toEqual([
        ...["predict", "refine", "combine", "extrapolate", "vae_decoder", "vae_encoder"],
        ...["upscale", "upscale_latents", "scale_noise", "inpaint_blend", "preview"],
      ]);
      for (const { graph, stepType } of engines)
        expect(stepType, graph).toBe(["predict", "refine"].includes(graph) ? graph : null);
    },
    240_000,
  );

  it("with both kinds of guidance; decoding in several launches; one profile for equal shapes", async () => {
    const graphs = new GraphLibrary(await openCheckpoint(model("medium")));
    const required = requiredEngines(graphs, {
      batches: [4, 2, 2],
      sizes: [{ width: 64, height: 64 }],
      guidance: "both",
    });
    const names = required.map(({ graph }) => graph);
    expect(names).toEqual([
      "clip_l",
      "clip_g",
      "t5",
      "predict.guidance",
      "predict",
      "refine.guidance",
      "refine",
      "combine.guidance",
      "combine",
      "extrapolate.guidance",
      "extrapolate",
      "vae_decoder",
    ]);
    const unguided = required[4]!.profiles;
    expect(unguided.map(({ batch, inputs }) => [batch, inputs.velocity![0], "guidance" in inputs])).toEqual([
      [2, 2, false],
      [4, 4, false],
    ]);
    // Texts can always be encoded one by one.
    expect(required[0]!.profiles.map(({ batch }) => batch)).toEqual([1, 2, 4]);
    expect(() => requiredEngines(graphs, { batches: [1], sizes: [{ width: 65, height: 64 }], guidance: "on" })).toThrow(
      OptionError,
    );
  });

  it("computes each network in its own type, T5 never in float16", async () => {
    const types = async (folder: string, targets?: number[]) => {
      const graphs = new GraphLibrary(await openCheckpoint(folder), tensorRtEmitOptions(targets));
      return ["clip_l", "t5", "predict", "vae_decoder"].map((name) => graphs.optionsOf(name).compute);
    };
    expect(await types(model("medium"))).toEqual(["bfloat16", "bfloat16", "bfloat16", "bfloat16"]);
    expect(await types(model("large"))).toEqual(["float32", "float32", "float32", "float32"]);
    const embedded = fixture("../../models/shapes");
    expect(await types(embedded)).toEqual(["float16", "bfloat16", "float16", "float16"]);
    expect(await types(embedded, [75, 89])).toEqual(["float16", "float32", "float16", "float16"]);
    // Turing has no bfloat16: said before anything is built.
    const refused = await rejection(compileEngines(model("medium"), { ...everything, targets: ["7.5", "8.9"] }));
    expect(refused).toBeInstanceOf(OptionError);
    expect(refused.message).toMatch(/weights of clip_l are bfloat16, which compute capability 7\.5 does not have/);
  });
});

describeEngines("one engine", () => {
  let cache: string;
  let compiler: EngineCompiler;
  const open = (options: Partial<Parameters<typeof EngineCompiler.open>[0]> = {}) =>
    EngineCompiler.open({ kind: "tensorrt-rtx", folder: rtxFolder, targets: [89], cache, ...options });
  /** The smallest graph: builds in half a second. */
  const small = { ids: [1, 77], relative_buckets: [77, 77] };
  async function compile(
    options: {
      folder?: string;
      graph?: string;
      profiles?: Record<string, number[]>[];
      with?: EngineCompiler;
      signal?: AbortSignal;
      onProgress?: (progress: CompileProgress) => void;
      logFile?: string;
    } = {},
  ) {
    const checkpoint = await openCheckpoint(options.folder ?? model("medium"));
    const graphs = new GraphLibrary(checkpoint, tensorRtEmitOptions());
    const files = [checkpoint.transformer, checkpoint.textEncoder!, checkpoint.textEncoder3!].flatMap(
      ({ weights }) => weights.files,
    );
    return (options.with ?? compiler).compile(
      { graph: graphs.get(options.graph ?? "t5"), profiles: options.profiles ?? [small] },
      { files, signal: options.signal, onProgress: options.onProgress, logFile: options.logFile },
    );
  }
  const predictProfiles = async (...batches: number[]) =>
    requiredEngines(new GraphLibrary(await openCheckpoint(model("medium"))), {
      batches,
      sizes: [{ width: 64, height: 64 }],
      guidance: "on",
    })
      .find(({ graph }) => graph === "predict.guidance")!
      .profiles.map(({ inputs }) => inputs as Record<string, number[]>);

  beforeAll(async () => {
    cache = temporaryFolder();
    if (inject("native").lacksRtx === null) compiler = await open();
  });

  it("is built again byte for byte, wherever the checkpoint lies", async () => {
    const first = await compile();
    const elsewhere = await open({ cache: temporaryFolder() });
    const second = await compile({ with: elsewhere, folder: copyOf(model("medium")) });
    expect([second.cached, second.sha256]).toEqual([false, first.sha256]);
    expect(path.basename(second.plan)).toBe(path.basename(first.plan));
  });

  it("is another one for other weights, profiles, targets or versions", async () => {
    const { plan } = await compile();
    expect((await compile()).cached).toBe(true);
    const folder = copyOf(model("medium"));
    const weights = path.join(folder, "text_encoder_3/model.safetensors");
    const { atime, mtime } = statSync(weights);
    const bytes = readFileSync(weights);
    bytes[bytes.length - 1]! ^= 1;
    writeFileSync(weights, bytes);
    utimesSync(weights, atime, mtime);
    const others = [
      await compile({ folder }),
      await compile({ profiles: [{ ids: [2, 77], relative_buckets: [77, 77] }] }),
      await compile({ profiles: [small, { ids: [2, 77], relative_buckets: [77, 77] }] }),
      await compile({ with: await open({ targets: [86] }) }),
      await compile({
        with: Object.assign(await open(), { library: { ...compiler.library, version: [1, 7, 1, 117] } }),
      }),
    ];
    expect(others.map(({ cached }) => cached)).toEqual(others.map(() => false));
    expect(new Set([plan, ...others.map((engine) => engine.plan)]).size).toBe(6);
    expect((await compile()).cached).toBe(true);
  });

  it("serves every program over some of its profiles; another family's does not", async () => {
    const two = { ids: [2, 77], relative_buckets: [77, 77] };
    const four = { ids: [4, 77], relative_buckets: [77, 77] };
    const checkpoint = await openCheckpoint(model("medium"));
    const graph = new GraphLibrary(checkpoint, tensorRtEmitOptions()).get("t5");
    const { files } = checkpoint.textEncoder3!.weights;
    const fresh = await open({ cache: temporaryFolder(), targets: [86, 89] });
    const built = await fresh.compile({ graph, profiles: [small, two] }, { files });
    // A program needs some of them, in any order.
    for (const profiles of [[small], [two], [two, small]]) {
      const found = await fresh.find({ graph, profiles }, { files });
      expect(found).toMatchObject({ cached: true, plan: built.plan, profiles: [small, two] });
    }
    const larger = await fresh.find({ graph, profiles: [small, four] }, { files });
    expect(larger).toMatchObject({ cached: false });
    // Its plan is damaged: the next one that will do is taken.
    flip(built.plan);
    expect(await fresh.find({ graph, profiles: [small] }, { files })).toMatchObject({
      cached: true,
      plan: larger.plan,
    });
    // One built for several GPUs serves each of them, and no other.
    const cache = path.dirname(fresh.cache.folder);
    const one = await open({ cache, targets: [86] });
    expect(await one.find({ graph, profiles: [small] }, { files })).toMatchObject({ cached: true, plan: larger.plan });
    const other = await open({ cache, targets: [120] });
    expect(await other.find({ graph, profiles: [small] }, { files })).toMatchObject({ cached: false });
  });

  it.each([
    ["truncated", (plan: string) => truncateSync(plan, statSync(plan).size - 1), /bytes instead of/],
    ["altered", (plan: string) => flip(plan), /SHA-256/],
    ["without its description", (plan: string) => rmSync(plan.replace(/plan$/, "json")), /description is missing/],
    [
      "with a garbled description",
      (plan: string) => writeFileSync(plan.replace(/plan$/, "json"), "{"),
      /cannot be read/,
    ],
    ["writable by others", (plan: string) => chmodSync(plan, 0o622), /others may write/],
    [
      "replaced by a link",
      (plan: string) => {
        renameSync(plan, `${plan}.real`);
        symlinkSync(`${plan}.real`, plan);
      },
      /symbolic link/,
    ],
    [
      "replaced by a folder",
      (plan: string) => {
        renameSync(plan, `${plan}.real`);
        mkdirSync(plan);
      },
      /not a plain file/,
    ],
  ])("%s in the cache is built again and reported", async (_, damage, reason) => {
    const own = await open({ cache: temporaryFolder() });
    const first = await compile({ with: own });
    damage(first.plan);
    const listed = await own.cache.list({ verify: true });
    expect(listed[0]!.damage).toMatch(reason);
    if (statSync(first.plan).isDirectory()) {
      // A folder is not ours to remove: said in so many words, not loaded.
      await expect(compile({ with: own })).rejects.toThrow(CacheError);
      return;
    }
    const second = await compile({ with: own });
    expect(second).toMatchObject({ cached: false, plan: first.plan, sha256: first.sha256 });
    expect(second.rebuilt).toMatch(reason);
    expect((await compile({ with: own })).cached).toBe(true);
  });

  it.skipIf(process.getuid?.() !== 0)("of another user in the cache is built again", async () => {
    const own = await open({ cache: temporaryFolder() });
    const { plan } = await compile({ with: own });
    chownSync(plan, 12345, 12345);
    expect((await compile({ with: own })).rebuilt).toMatch(/another user/);
  });

  it("fuses every attention of the transformer", async () => {
    const logFile = path.join(temporaryFolder(), "log");
    await compile({ graph: "predict.guidance", profiles: await predictProfiles(1), logFile });
    const log = readFileSync(logFile, "utf8");
    const fused = new Set(log.match(/_gemm_mha_v2_myl\d+_\d+/g));
    const { transformer } = await openCheckpoint(model("medium"));
    expect(fused.size).toBe(transformer.config.numLayers + transformer.config.dualAttentionLayers.length);
  });

  it("stops soon after an abort, leaves nothing behind, and can be built right after", async () => {
    const profiles = await predictProfiles(1, 2);
    for (const phase of ["weights", "waiting", "building"] as const) {
      const own = await open({ cache: temporaryFolder() });
      const controller = new AbortController();
      const reason = new Error("enough");
      let aborted = 0;
      const error = await rejection(
        compile({
          ...{ graph: "predict.guidance", profiles, with: own, signal: controller.signal },
          onProgress: (progress) => {
            if (progress.phase !== phase || aborted) return;
            aborted = performance.now();
            controller.abort(reason);
          },
        }),
      );
      expect(error, phase).toBe(reason);
      expect(performance.now() - aborted).toBeLessThan(5000);
      await until(() => readdirSync(own.cache.folder).every((name) => name.startsWith("digest-")));
      expect((await compile({ with: own })).cached).toBe(false);
    }
  });

  it("says in words what the parser refused: operator, node and tensors", async () => {
    const g = new GraphBuilder("odd");
    const x = g.input("x", "float32", ["rows", 4]);
    g.output(
      "y",
      g.scoped("layers.3", () => g.op("Frobnicate", [x, g.scalar(2, "float32")])),
      ["rows", 4],
    );
    const error = await rejection(compiler.compile({ graph: g.build(), profiles: [{ x: [1, 4] }] }, { files: [] }));
    expect(error).toBeInstanceOf(CompileError);
    expect(error.graph).toBe("odd");
    expect(error.message).toMatch(/knows no operator Frobnicate/);
    expect(error.message).toMatch(/"layers\.3\/Frobnicate_\d"/);
    expect(error.message).toMatch(/reads "x", "float32\(2\)" and writes "layers\.3/);
  });

  it.each([
    ["bytes that are no model", Uint8Array.of(1, 2, 3), /no ONNX model/],
    ["no bytes", new Uint8Array(0), /./],
  ])("refuses %s", async (_, bytes, message) => {
    const graph = { name: "garbage", bytes, externals: new Map(), fingerprint: `${bytes.length}` };
    const error = await rejection(compiler.compile({ graph, profiles: [] }, { files: [] }));
    expect(error).toBeInstanceOf(CompileError);
    expect(error.message).toMatch(message);
    expect(leftovers(cache)).toEqual([]);
  });

  it.each([
    ["an input left out", { ids: [1, 77] }, /lacks the input relative_buckets/],
    ["a wrong rank", { ids: [1, 77, 1], relative_buckets: [77, 77] }, /do not fit the input ids/],
    ["lengths that contradict each other", { ids: [1, 77], relative_buckets: [78, 77] }, /tokens/],
  ])("refuses a profile with %s", async (_, shapes, message) => {
    const error = await rejection(compile({ profiles: [shapes as Record<string, number[]>] }));
    expect(error).toBeInstanceOf(CompileError);
    expect(error.message).toMatch(message);
    expect(error.message).not.toMatch(/driver version/);
    expect(leftovers(cache)).toEqual([]);
  });

  it("refuses weights that are missing or changed since the checkpoint was opened", async () => {
    for (const [change, message] of [
      [(file: string) => rmSync(file), /Cannot read the weights/],
      [(file: string) => flip(file), /has changed since the model was opened/],
      [(file: string) => truncateSync(file, 100), /has changed since the model was opened/],
    ] as const) {
      const folder = copyOf(model("medium"));
      const checkpoint = await openCheckpoint(folder);
      const graph = new GraphLibrary(checkpoint, tensorRtEmitOptions()).get("t5");
      change(path.join(folder, "text_encoder_3/model.safetensors"));
      const error = await rejection(
        compiler.compile({ graph, profiles: [small] }, { files: checkpoint.textEncoder3!.weights.files }),
      );
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(message);
    }
    expect(leftovers(cache)).toEqual([]);
  });

  it("refuses a build that does not fit into memory, with the numbers", async () => {
    const error = await rejection(compile({ with: await open({ cache: temporaryFolder(), memory: 1e8 }) }));
    expect(error).toBeInstanceOf(MemoryError);
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_MEMORY", available: 1e8 });
    expect(error.needed).toBeGreaterThan(1e8);
    expect(error.message).toMatch(/takes about 0\.70 GB of memory, but 0\.10 GB are available/);
  });

  it("refuses unknown targets", async () => {
    const wrong = await rejection(open({ targets: [90] }));
    expect(wrong).toBeInstanceOf(OptionError);
    expect(wrong.message).toMatch(/builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, not for 9\.0/);
    await expect(open({ targets: [] })).rejects.toThrow(/This machine has no GPU, so say for which/);
  });
});

describeEngines("a cache folder", () => {
  const open = (cache: string) =>
    EngineCompiler.open({ kind: "tensorrt-rtx", folder: rtxFolder, targets: [89], cache });

  it("is made for its user alone", async () => {
    const base = path.join(temporaryFolder(), "a/b");
    await open(base);
    expect(statSync(path.join(base, "engines")).mode & 0o777).toBe(0o700);
  });

  it("that cannot be made, is a link, or is open to others is refused", async () => {
    const file = path.join(temporaryFolder(), "file");
    writeFileSync(file, "");
    await expect(open(path.join(file, "cache"))).rejects.toThrow(CacheError);
    await expect(open("/proc/flowturbo/cache")).rejects.toThrow(/Cannot create the cache/);
    const wide = temporaryFolder();
    mkdirSync(path.join(wide, "engines"));
    chmodSync(path.join(wide, "engines"), 0o755);
    await expect(open(wide)).rejects.toThrow(/open to other users \(mode 755\).*chmod 700/s);
    const linked = temporaryFolder();
    symlinkSync(temporaryFolder(), path.join(linked, "engines"));
    await expect(open(linked)).rejects.toThrow(/symbolic link/);
  });

  it.skipIf(process.getuid?.() !== 0)("of another user is refused", async () => {
    for (const part of ["", "engines"]) {
      const base = temporaryFolder();
      mkdirSync(path.join(base, "engines"), { mode: 0o700 });
      chownSync(path.join(base, part), 12345, 12345);
      await expect(open(base)).rejects.toThrow(/belongs to another user \(12345\)/);
    }
  });

  const mounted =
    (options: string, body: (folder: string) => Promise<void>) => async (context: { skip(note: string): void }) => {
      const folder = temporaryFolder();
      try {
        execFileSync("mount", ["-t", "tmpfs", "-o", options, "tmpfs", folder], { stdio: "ignore" });
      } catch {
        return context.skip("this user may not mount a tmpfs");
      }
      try {
        await body(folder);
      } finally {
        execFileSync("umount", ["-l", folder]);
      }
    };

  it(
    "on a full disk: the build fails with the reason, nothing is left, and room is enough to succeed",
    mounted("size=2m,mode=700", async (folder) => {
      const options = {
        ...everything,
        batches: [1],
        targets: ["8.9"],
        sizes: [{ width: 64, height: 64 }],
        cache: folder,
      };
      const error = await rejection(compileEngines(model("medium"), options));
      expect(error).toBeInstanceOf(CacheError);
      expect(error.message).toMatch(/No space left on device.*Make room/s);
      expect(leftovers(folder)).toEqual([]);
      execFileSync("mount", ["-o", "remount,size=200m", folder]);
      const report = await compileEngines(model("medium"), options);
      expect(report.engines.every(({ rebuilt }) => rebuilt === null)).toBe(true);
    }),
  );

  it(
    "on a read-only disk is refused",
    mounted("size=2m,mode=700", async (folder) => {
      mkdirSync(path.join(folder, "engines"), { mode: 0o700 });
      execFileSync("mount", ["-o", "remount,ro", folder]);
      await expect(open(folder)).rejects.toThrow(/read-only.*Make it writable/s);
    }),
  );
});

describeEngines("flowturbo compile", () => {
  const flags = (cache: string, name = "medium") => [
    ...[cli, "compile", "--model", model(name), "--runtime", "tensorrt-rtx", "--targets", "8.6,8.9"],
    ...["--sizes", "64x64,96x128", "--batches", "1,2", "--cache", cache],
  ];

  it("prints what it built as JSON, then serves it from the cache; list, verify and clear", async () => {
    const cache = temporaryFolder();
    const first = await startNode([...flags(cache), "--json"]).finished;
    expect(first.stderr).toBe("");
    const report: CompileReport = JSON.parse(first.stdout);
    expect(report.engines.map(({ graph, stepType, cached }) => [graph, stepType, cached])).toEqual([
      ["clip_l", null, false],
      ["clip_g", null, false],
      ["t5", null, false],
      ["predict.guidance", "predict", false],
      ["refine.guidance", "refine", false],
      ["combine.guidance", null, false],
      ["extrapolate.guidance", null, false],
      ["vae_decoder", null, false],
    ]);
    const { profiles, plan, bytes, seconds } = report.engines[3]!;
    expect(profiles.map(({ width, height, batch }) => [width, height, batch])).toEqual([
      [64, 64, 1],
      [64, 64, 2],
      [96, 128, 1],
      [96, 128, 2],
    ]);
    expect([statSync(plan).size, seconds > 0.1]).toEqual([bytes, true]);
    const again = JSON.parse((await startNode([...flags(cache), "--json"]).finished).stdout) as CompileReport;
    expect(again.engines.every(({ cached }) => cached)).toBe(true);

    const verify = () => startNode([cli, "cache", "verify", "--cache", cache, "--json"]).finished;
    expect((await verify()).code).toBe(0);
    flip(plan);
    const listed = await verify();
    expect(listed.code).toBe(1);
    const damaged = JSON.parse(listed.stdout).engines.filter(({ damage }: { damage: string | null }) => damage);
    expect(damaged).toMatchObject([{ graph: "predict.guidance", damage: expect.stringContaining("SHA-256") }]);
    const rebuilt = await startNode(flags(cache)).finished;
    expect(rebuilt.stdout).toMatch(
      /predict\.guidance: 4 profiles, .* built in .* \(the one in the cache was not used: its SHA-256/,
    );
    const list = await startNode([cli, "cache", "list", "--cache", cache]).finished;
    expect(list.stdout).toMatch(/8 engines/);
    const clear = await startNode([cli, "cache", "clear", "--cache", cache]).finished;
    expect(clear.stdout).toMatch(/removed 8 engines/);
    expect(readdirSync(path.join(cache, "engines"))).toEqual([]);
  }, 120_000);

  it("two processes at once build each engine once", async () => {
    const cache = temporaryFolder();
    const runs = await Promise.all([1, 2].map(() => startNode([...flags(cache, "sd3"), "--json"]).finished));
    const reports = runs.map(({ stdout }) => JSON.parse(stdout) as CompileReport);
    for (const [index, engine] of reports[0]!.engines.entries())
      expect([engine.cached, reports[1]!.engines[index]!.cached].sort(), engine.graph).toEqual([false, true]);
    expect(leftovers(cache)).toEqual([]);
  }, 120_000);

  it("killed in the middle leaves nothing that the next run takes for an engine", async () => {
    const cache = temporaryFolder();
    const { child, finished } = startNode(flags(cache));
    const engines = path.join(cache, "engines");
    const underConstruction = () =>
      existsSync(engines) && readdirSync(engines).some((name) => /predict.*\.tmp$/.test(name));
    await until(underConstruction);
    child.kill("SIGKILL");
    await finished;
    expect(underConstruction()).toBe(true);
    const next = await startNode([...flags(cache), "--json"]).finished;
    const report: CompileReport = JSON.parse(next.stdout);
    expect(report.engines.map(({ cached, rebuilt }) => [cached, rebuilt])).toContainEqual([false, null]);
    expect(leftovers(cache)).toEqual([]);
    expect((await startNode([cli, "cache", "verify", "--cache", cache]).finished).code).toBe(0);
  }, 120_000);

  it.each([
    ["SIGINT", 130],
    ["SIGTERM", 143],
  ] as const)(
    "%s in the middle ends it at once with %i and nothing left",
    async (signal, code) => {
      const cache = temporaryFolder();
      const { child, finished } = startNode(flags(cache));
      const engines = path.join(cache, "engines");
      await until(() => existsSync(engines) && readdirSync(engines).some((name) => /predict.*\.tmp$/.test(name)));
      const start = performance.now();
      child.kill(signal);
      const result = await finished;
      expect([result.code, result.signal]).toEqual([code, null]);
      expect(performance.now() - start).toBeLessThan(15_000);
      expect(leftovers(cache).filter((name) => !name.endsWith(".lock"))).toEqual([]);
    },
    60_000,
  );

  it("process.exit in the middle of a build exits cleanly with its own code", async () => {
    const cache = temporaryFolder();
    const script = `
      import { compileEngines } from ${JSON.stringify(path.join(path.dirname(cli), "index.js"))};
      compileEngines(${JSON.stringify(model("medium"))}, { runtime: "tensorrt-rtx", targets: ["8.9"], batches: [1, 2], cache: ${JSON.stringify(cache)},
        onProgress: ({ graph, phase, done }) => { if (graph === "predict.guidance" && phase === "building" && done > 100) process.exit(7); } });`;
    const { code, signal, stderr } = await startNode(["--input-type=module", "-e", script]).finished;
    expect([code, signal, stderr]).toEqual([7, null, ""]);
    expect(leftovers(cache).filter((name) => !name.endsWith(".lock"))).toEqual([]);
  }, 60_000);

  it.each([
    ["a size that is none", ["--sizes", "64"], /--sizes: Expected sizes such as 1024x1024 .*64\./],
    ["a size off the grid", ["--sizes", "65x64"], /--sizes: .*Expected a multiple of 16 for width but received 65/],
    ["batches that are none", ["--batches", "1,x"], /--batches: Expected a list of whole numbers from 1 to 1024/],
    ["an unknown target", ["--targets", "9.0"], /--targets: TensorRT-RTX builds for .*, not for 9\.0/],
    ["a target that is none", ["--targets", "ada"], /--targets: Expected compute capabilities/],
    ["an unknown runtime", ["--runtime", "onnxruntime"], /--runtime: Expected "auto", "tensorrt" or "tensorrt-rtx"/],
    ["targets with TensorRT", ["--runtime", "tensorrt"], /TensorRT 11 cannot be used|--targets/],
  ])("says what is wrong with %s", async (_, change, message) => {
    const { code, stderr, stdout } = await startNode([...flags(temporaryFolder()), ...change]).finished;
    expect(stderr).toMatch(message);
    expect(stdout).toBe("");
    expect(code).not.toBe(0);
  });
});

describe("the runtime of a model", async () => {
  // The built package: its ONNX Runtime lives in a process whose script is found beside it.
  const { FlowTurbo }: typeof import("../../lib/index.js") = await import(path.join(path.dirname(cli), "index.js"));

  it("is ONNX Runtime for auto, which says why the others were passed over", async () => {
    const loaded = await FlowTurbo.load(undefined, { runtime: "auto" });
    try {
      expect(loaded.runtime.name).toBe("onnxruntime");
      expect(loaded.runtime.passedOver.map(({ name }) => name)).toEqual(["tensorrt", "tensorrt-rtx", "cuda", "webgpu"]);
      for (const { reason } of loaded.runtime.passedOver) expect(reason.length).toBeGreaterThan(40);
    } finally {
      await loaded.dispose();
    }
  });

  it.each(["tensorrt", "tensorrt-rtx"] as const)("is refused with the diagnosis for %s", async (runtime) => {
    const error = await rejection(FlowTurbo.load(undefined, { runtime }));
    expect(error).toMatchObject({
      name: "RuntimeUnavailableError",
      code: "ERR_FLOWTURBO_RUNTIME_UNAVAILABLE",
      runtime,
    });
    expect(error.message.length).toBeGreaterThan(60);
  });
});

function flip(file: string): void {
  const bytes = readFileSync(file);
  bytes[bytes.length >> 1]! ^= 1;
  writeFileSync(file, bytes);
}
