// verify:gpu from end to end on the simulated library: it builds every engine of a checkpoint through the addon, compares every
// case and draws pictures with the product, while the networks are closed forms whose results plain TypeScript knows
// (test/support/closed-forms.ts). What it is there to notice is then made to happen.
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { cpSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { beforeAll, expect, it, vi } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { cpuEmitOptions } from "../../lib/onnx/index.js";
import type { Program } from "../../lib/program/program.js";
import { runtimes } from "../../lib/runtimes/index.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import { type Referenced, writeBundle } from "../../verify/bundle.js";
import { casesOf, enginesOf } from "../../verify/cases.js";
import { graphsOf } from "../../verify/check.js";
import { pictureRequests, referencePictures } from "../../verify/pictures.js";
import type { Report } from "../../verify/report.js";
import { describeAddons, temporaryFolder } from "../native/support.js";
import { ClosedFormRuntime, checkpointForms, type Forms, writeForms } from "../support/closed-forms.js";
import { root } from "../support/fixtures.js";
import { simulatedFolder } from "../support/simulated.js";

/** Not tsx's own command, which is another process in front of this one. */
const script = ["--import", "tsx", path.join(root, "verify/gpu.ts")];

const forms = temporaryFolder();
const bundle = temporaryFolder();
/** Engines of all runs but those that are about building. */
const cache = temporaryFolder();

let closed: Forms;

interface Outcome {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly report: Report;
}

async function verify(
  args: readonly string[],
  env: NodeJS.ProcessEnv = {},
  watch: (stderr: string, child: ChildProcess) => void = () => undefined,
  what = script,
  of = ["--check", bundle],
): Promise<Outcome> {
  const out = temporaryFolder();
  const common = [...of, "--runtime", "tensorrt", "--rounds", "2", "--out", out];
  const child = spawn(
    process.execPath,
    [...what, ...common, "--tensorrt-dir", path.join(simulatedFolder, "tensorrt"), "--cache", cache, ...args],
    {
      // Of the script's own package: nothing may be found in this one.
      cwd: what === script ? root : path.dirname(what[0]!),
      env: {
        ...process.env,
        TSX_TSCONFIG_PATH: path.join(root, "bench/tsconfig.json"),
        LD_LIBRARY_PATH: simulatedFolder,
        FLOWTURBO_SIMULATED_FORMS: forms,
        ...env,
      },
      stdio: ["ignore", "pipe", "pipe"],
    },
  );
  let [stdout, stderr] = ["", ""];
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  child.stderr.on("data", (chunk) => {
    stderr += chunk;
    watch(stderr, child);
  });
  const status = await new Promise<number | null>((resolve) => child.once("close", resolve));
  expect(existsSync(path.join(out, "report.json")), stderr).toBe(true);
  const report = JSON.parse(readFileSync(path.join(out, "report.json"), "utf8")) as Report;
  const text = readFileSync(path.join(out, "report.md"), "utf8");
  if (report.state === "finished") expect(text).toBe(stdout);
  else expect(text).toMatch(/^# verify:gpu: UNFINISHED, it was at /);
  return { status, stdout, stderr, report };
}

describeAddons("verify:gpu on the simulated library", () => {
  beforeAll(async () => {
    const checkpoint = await openCheckpoint(embeddedModel);
    const graphs = new GraphLibrary(checkpoint);
    const sizes = [
      { width: 64, height: 64 },
      { width: 64, height: 96 },
    ];
    const batches = [1, 2];
    const names = enginesOf(graphs, { sizes, batches }).map(({ graph }) => graph);
    closed = checkpointForms(checkpoint.vae.config.factor, names);
    writeForms(forms, closed);
    const runtime = new ClosedFormRuntime(closed);
    const run = (program: Program) => {
      for (const name of graphsOf(program)) runtime.add({ name });
      return runtime.run(program);
    };
    const cases: Referenced[] = [];
    for (const example of await casesOf(graphs, { sizes, batches }, run))
      cases.push({ example, expected: await run(example.program) });
    const open = vi.spyOn(runtimes.onnxruntime!, "open").mockImplementation(async () => ({
      ...{ runtime: new ClosedFormRuntime(closed), settings: {}, device: null, emitOptions: () => cpuEmitOptions },
    }));
    const requests = await referencePictures(embeddedModel, pictureRequests(checkpoint, sizes), () => undefined);
    open.mockRestore();
    const compiled = new GraphLibrary(checkpoint, tensorRtEmitOptions());
    const launched = new Set(cases.flatMap(({ example }) => graphsOf(example.program)));
    await writeBundle(bundle, {
      origin: { checkpoint: "embedded", flowturbo: "0", reference: "closed forms in TypeScript", created: "now" },
      graphs: new Map([...launched].map((name) => [name, compiled.get(name)])),
      // The closed forms are computed in float32, whatever the network's own type.
      compute: () => "float32",
      ...{ cases, pictures: { requests, batches }, model: embeddedModel, copy: true },
    });
  });

  it("passes: every engine built, every case compared, every sampler replayed, every picture drawn", async () => {
    const { status, stderr, stdout, report } = await verify([]);
    expect(stderr).not.toMatch(/FAILED/);
    expect(report).toMatchObject({ state: "finished", passed: true, running: null, problems: [], skipped: [] });
    expect(status).toBe(0);
    expect(stdout).toMatch(/^# verify:gpu: passed\n/);
    expect(report.machine).toMatchObject({ gpu: "Simulated GPU", sm: "8.9", runtime: "tensorrt", driver: "13.0" });
    expect([report.engines.length, report.findings.length]).toEqual([report.planned.engines, report.planned.cases]);
    expect(new Set(report.engines.map(({ graph }) => graph)).size).toBe(26);
    for (const { cached, bytes } of report.engines) expect([cached, bytes > 100]).toEqual([false, true]);

    // The simulation rounds after each operation, as plain TypeScript does: not a bit is off.
    for (const { name, differences } of [...report.findings, ...report.pictures])
      for (const { worst } of differences) expect(worst, name).toBe(0);
    const samplers = report.findings.filter(({ kind }) => kind === "sampler");
    expect(samplers).toHaveLength(16);
    for (const { name, captured, rounds } of samplers)
      expect([captured, rounds], name).toMatchObject([{ runs: 3, replayed: 3 }, 2]);
    // Five requests: at the same time, padded, and captured twice.
    expect(report.pictures).toHaveLength(20);
    expect(report.lifecycle.map(({ passed }) => passed)).toEqual([true, true, true]);
  });

  it("--quick has every graph and every kind of program in about a third of the cases", async () => {
    const { status, report, stdout } = await verify(["--quick"]);
    expect([status, report.passed, report.quick]).toEqual([0, true, true]);
    // Its profiles are among those of the engines that were built above.
    for (const { graph, cached } of report.engines) expect(cached, graph).toBe(true);
    expect(report.engines).toHaveLength(26);
    const launched = new Set(report.findings.flatMap(({ launches }) => launches.map(({ graph }) => graph)));
    expect([...launched].sort()).toEqual(report.engines.map(({ graph }) => graph).sort());
    expect(new Set(report.findings.map(({ kind }) => kind))).toEqual(new Set(["engine", "texts", "sampler"]));
    expect(report.findings.length).toBeLessThan(36);
    expect(report.pictures).toHaveLength(2);
    expect(stdout).toContain("35 of 35 cases (the small set, --quick)");
  });

  const namesOf = (findings: readonly { readonly name: string; readonly passed: boolean }[]) =>
    findings.flatMap(({ name, passed }) => (passed ? [] : [name]));
  /** With something made to go wrong: it fails, says so by name, and ends by itself with 1. */
  const faulty = async (fault: string, ...args: string[]): Promise<Outcome & { readonly names: string[] }> => {
    const outcome = await verify(["--quick", ...args], { FLOWTURBO_SIMULATED_FAULT: fault });
    const { status, report, stdout } = outcome;
    expect(stdout).toMatch(/^# verify:gpu: FAILED\n[\s\S]*\n## What failed\n\n- /);
    expect([status, report.state, report.passed]).toEqual([1, "finished", false]);
    return { ...outcome, names: namesOf([...report.findings, ...report.pictures]) };
  };
  const sampler = "inpainting (H1P2R1), batch 1, 64 × 64";

  it.each([
    [
      "a stream that cannot be captured",
      "refuse-capture",
      /not replayed as one CUDA graph: 3 of 3 runs \(This program runs launch by launch.*900/,
    ],
    ["a replay in which nothing runs", "skip-replay", /captured, a run with other inputs did not give their results/],
  ])("fails for %s", async (_name, fault, message) => {
    const { names, report, stdout, stderr } = await faulty(fault);
    expect(names).toEqual([
      "multistep (A2S1U3), batch 1, 64 × 64",
      "refined midpoint (A2C2), batch 1, 64 × 64",
      "without guidance (H1P2R1), batch 1, 64 × 64",
      sampler,
      "skip-layer guidance (H2P2), batch 1, 64 × 64",
      "LoRAs of each picture (H1P1), batch 2, 64 × 64",
    ]);
    for (const { captured } of report.findings.filter(({ kind }) => kind === "sampler"))
      expect(captured).toMatchObject({ runs: 3, replayed: fault === "refuse-capture" ? 0 : 3 });
    for (const text of [stdout, stderr])
      expect(text).toMatch(new RegExp(`${sampler.replace(/[()]/g, "\\$&")}: .*${message.source}`));
  });

  it("fails for one value that is off by a thousandth of the largest", async () => {
    const { names, report, stdout } = await faulty("value predict.guidance");
    expect(names).toContain("predict.guidance, batch 1, 64 × 64");
    expect(names).not.toContain("predict, batch 1, 64 × 64");
    expect(stdout).toMatch(/- predict\.guidance, batch 1, 64 × 64: out\.x_next worst value 1\.0e-3 \(bar 4\.0e-4\)\n/);
    const finding = report.findings.find(({ name }) => name === "predict.guidance, batch 1, 64 × 64")!;
    // Its L2 error alone would not have been noticed.
    expect(finding.differences[0]!.relative).toBeLessThan(finding.bar.relative);
  });

  it("fails for a value that is off in one run only", async () => {
    const { names, stdout } = await faulty("value vae_encoder 2");
    expect(names).toEqual(["vae_encoder, batch 1, 64 × 64"]);
    expect(stdout).toMatch(/vae_encoder, batch 1, 64 × 64: 1 of 2 further runs gave other bits than the first/);
  });

  it("fails for a value that is no number", async () => {
    const { names, stdout } = await faulty("nan vae_encoder 1");
    expect(names).toEqual(["vae_encoder, batch 1, 64 × 64"]);
    expect(stdout).toMatch(/vae_encoder, batch 1, 64 × 64: NotFiniteError: "out\.latents" holds NaN or an infinity/);
  });

  it.each([
    ["a launch that never ends", "hang", "timed out after 2 s"],
    ["a process that crashes", "crash", "the process ended \\(SIGABRT\\)"],
    ["a lost device", "lost", "DeviceLostError: .*"],
  ])("fails for %s, and another process does the rest", async (_name, what, message) => {
    const { names, report, stdout, stderr } = await faulty(`${what} vae_encoder`, "--case-timeout", "2");
    expect(names).toEqual(["vae_encoder, batch 1, 64 × 64"]);
    expect(stdout).toMatch(new RegExp(`- vae_encoder, batch 1, 64 × 64: ${message}`));
    expect(stderr).toContain("another process does the rest");
    expect(report.skipped).toEqual([]);
    expect(report.findings).toHaveLength(report.planned.cases);
    expect(report.pictures.map(({ passed }) => passed)).toEqual([true, true]);
  });

  it("gives up after a few processes, and says what was not run", async () => {
    const { names, report, stdout } = await faulty("hang predict.guidance", "--case-timeout", "1");
    expect(names.length).toBeGreaterThanOrEqual(2);
    expect(
      names.every((name) => /predict\.guidance|multistep|midpoint|inpainting|skip-layer|LoRAs|pictures/.test(name)),
    ).toBe(true);
    const { findings, lifecycle, skipped, pictures } = report;
    // Every case is accounted for.
    expect(findings.length + skipped.length + lifecycle.length + Math.min(1, pictures.length)).toBe(35 + 3 + 1);
    expect(stdout).toMatch(/timed out after 1 s/);
  });

  it("a graph whose engine could not be built is built once, and its cases are skipped by name", async () => {
    const some = temporaryFolder();
    const { preview: _preview, ...others } = closed;
    writeForms(some, others);
    const fresh = ["--quick", "--cache", temporaryFolder()];
    const { status, report, stdout, stderr } = await verify(fresh, { FLOWTURBO_SIMULATED_FORMS: some });
    expect([status, report.state, report.passed]).toEqual([1, "finished", false]);
    expect(report.engines.filter(({ error }) => error !== undefined)).toEqual([
      expect.objectContaining({ graph: "preview", error: expect.stringContaining("preview has no closed form") }),
    ]);
    expect(report.skipped).toEqual([{ name: "preview, batch 1, 64 × 64", reason: "there is no engine of preview" }]);
    expect(stderr.match(/engine of preview …/g)).toHaveLength(1);
    expect(stdout).toContain("- the engine of preview: ");
    expect(stdout).toContain("## What was not run\n\n- preview, batch 1, 64 × 64: there is no engine of preview\n");
    // The product needs no previews here.
    expect(report.pictures.map(({ passed }) => passed)).toEqual([true, true]);
  });

  it("a library that builds nothing: every case is skipped", async () => {
    const { status, report } = await verify(["--quick", "--cache", temporaryFolder()], {
      FLOWTURBO_SIMULATED_BUILDER: "no-resource",
    });
    expect([status, report.passed, report.findings, report.pictures]).toEqual([1, false, [], []]);
    for (const { error } of report.engines) expect(error).toMatch(/libnvinfer_builder_resource/);
    expect(report.skipped).toHaveLength(35 + 3 + 1);
  });

  it("--level builds into a folder of its own; --memory refuses what does not fit", async () => {
    const out = temporaryFolder();
    const level = await verify(["--quick", "--level", "1", "--cache", path.join(out, "level")]);
    expect([level.status, level.report.level]).toEqual([0, 1]);
    const plan = readdirSync(path.join(out, "level/engines")).find((name) => name.endsWith(".plan"))!;
    expect(readFileSync(path.join(out, "level/engines", plan), "utf8")).toContain("\nbuilt level 1\n");
    expect(level.stdout).toContain("engines of optimisation level 1");
    const { status, report } = await verify(["--quick", "--memory", "2.5", "--cache", temporaryFolder()]);
    expect(status).toBe(1);
    for (const { error } of report.engines) expect(error).toMatch(/takes about 3\.\d\d GB of memory, but 2\.50 GB/);
  });

  it("of a checkpoint takes ONNX Runtime's results, by which other networks are noticed", async () => {
    const temporary = temporaryFolder();
    const { status, report } = await verify(["--quick"], { TMPDIR: temporary }, undefined, script, []);
    expect([status, report.state, report.passed]).toEqual([1, "finished", false]);
    expect(report.origin).toMatchObject({ checkpoint: "models/shapes (embedded)" });
    expect(report.origin.reference).toMatch(/^ONNX Runtime .* on the CPU, float32$/);
    const failing = namesOf(report.findings);
    for (const graph of ["clip_l", "t5", "predict", "vae_decoder"])
      expect(failing.some((name) => name.startsWith(`${graph}, `))).toBe(true);
    // What is arithmetic in the product as well is the same in the closed forms.
    expect(failing.some((name) => name.startsWith("scale_noise"))).toBe(false);
    expect(report.pictures.map(({ passed }) => passed)).toEqual([false, false]);
    // The bundle of such a run is a temporary one.
    expect(readdirSync(temporary).filter((name) => name.startsWith("flowturbo-verify-"))).toEqual([]);
  });

  it("--check needs nothing but the package and the bundle: one file, the addons, and what finds them", async () => {
    const folder = temporaryFolder();
    const { name, version, engines } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
    writeFileSync(path.join(folder, "package.json"), JSON.stringify({ name, version, engines, type: "module" }));
    for (const part of ["native/tensorrt/build/Release", "node_modules/node-gyp-build"])
      cpSync(path.join(root, part), path.join(folder, part), { recursive: true, dereference: true });
    const file = path.join(folder, "verify/gpu.js");
    execFileSync(process.execPath, [path.join(root, "scripts/bundle-verify.mjs"), file], { cwd: root });
    const { status, stderr, report } = await verify(["--quick"], {}, undefined, [file]);
    expect(stderr).not.toMatch(/FAILED|sharp|onnxruntime/);
    expect([status, report.passed]).toEqual([0, true]);
    expect(report.pictures).toHaveLength(2);
  });

  it.each([
    ["SIGKILL", null],
    ["SIGTERM", 143],
  ] as const)("a run that is ended by %s leaves a report that says how far it came", async (signal, code) => {
    let hasBegun = false;
    const { status, report, stdout } = await verify(
      ["--quick"],
      { FLOWTURBO_SIMULATED_FAULT: "hang vae_encoder" },
      (text, child) => {
        if (hasBegun || !text.includes("vae_decoder, batch 1")) return;
        hasBegun = true;
        setTimeout(() => child.kill(signal), 500);
      },
    );
    expect([status, report.state, report.passed]).toEqual([code, "unfinished", false]);
    expect(report.running).toBe("vae_encoder, batch 1, 64 × 64");
    expect(report.findings.map(({ name }) => name)).toContain("vae_decoder, batch 1, 64 × 64");
    expect(stdout).toBe("");
  });
});
