// pack:gpu from end to end, as far as a machine without a GPU can show it: the pack is made, unpacked and run in an empty
// environment, with nothing on PATH but what run.sh says that it needs; then with damaged parts, too little time, a signal,
// and the simulated driver, on which the executor is verified.
import { execFileSync, spawn, spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, expect, it } from "vitest";
import type { Summary } from "../../verify/steps.js";
import { describeAddons, hasDriver } from "../native/support.js";
import { root } from "../support/fixtures.js";
import { noSwiftShader, swiftShaderEnv } from "../support/swiftshader.js";

const script = path.join(root, "scripts/pack-gpu.mjs");
const simulated = path.join(root, ".cache/simulated");
const hasKernel = existsSync(path.join(simulated, "stand-in/formula.ptx"));
const partSize = 16 * 2 ** 20;
const coreutils = ["cat", "cp", "dirname", "mkdir", "rm", "sha256sum", "tee", "timeout"];

let folder: string;
let parts: string;
let names: string[];

/** A folder with links to programs, as the whole of PATH. */
function programs(...wanted: string[]): string {
  const bin = mkdtempSync(path.join(folder, "bin-"));
  for (const name of ["bash", "tar", ...coreutils, ...wanted]) {
    const [found] = execFileSync("which", ["-a", name], { encoding: "utf8" }).trim().split("\n");
    // Not a script that looks for the program on PATH.
    const real = name === "python3" ? execFileSync(found!, ["-c", "import sys; print(sys.executable)"]) : found!;
    symlinkSync(realpathSync(real.toString().trim()), path.join(bin, name));
  }
  return bin;
}

interface Run {
  readonly code: number | null;
  readonly stdout: string;
  readonly output: string;
  readonly text: string;
  readonly summary: Summary;
}

/** In an empty environment. `work` is what the first run has unpacked, unless another is named. */
async function run(
  variables: Record<string, string> = {},
  {
    from = parts,
    bin = programs("xz"),
    watch,
  }: { from?: string; bin?: string; watch?: (out: string) => number | undefined } = {},
): Promise<Run> {
  const out = mkdtempSync(path.join(folder, "report-"));
  const env = { PATH: bin, OUT: out, WORK: path.join(folder, "work"), ...variables };
  const child = spawn(path.join(bin, "bash"), [path.join(from, "run.sh")], {
    ...{ cwd: folder, env: env as unknown as NodeJS.ProcessEnv, stdio: ["ignore", "pipe", "pipe"] },
  });
  let [stdout, output] = ["", ""];
  child.stdout.on("data", (data) => {
    stdout += data;
    output += data;
  });
  child.stderr.on("data", (data) => {
    output += data;
  });
  const poll = watch && setInterval(() => watch(out) && child.kill("SIGTERM"), 20);
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once("error", reject);
    child.once("close", resolve);
  });
  clearInterval(poll);
  const read = (name: string) => (existsSync(path.join(out, name)) ? readFileSync(path.join(out, name), "utf8") : "");
  return { code, stdout, output, text: read("summary.txt"), summary: JSON.parse(read("summary.json") || "null") };
}

/** Command lines of processes that have to do with a folder. */
function processesOf(where: string): string[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap((pid) => {
      try {
        const line = readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ");
        return line.includes(where) && Number(pid) !== process.pid ? [line] : [];
      } catch {
        return [];
      }
    });
}
const outcomes = ({ summary }: Run) => Object.fromEntries(summary.steps.map(({ step, outcome }) => [step, outcome]));

describeAddons("pack:gpu", () => {
  beforeAll(() => {
    folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-pack-gpu-"));
    parts = path.join(folder, "parts");
    // What is built is packed as it is: other tests are reading it.
    const small = ["--no-build", "--bundles", "embedded", "--preset", "0", "--part-size", String(partSize)];
    execFileSync(process.execPath, [script, ...small, "--out", parts], { stdio: ["ignore", "ignore", "pipe"] });
    names = readdirSync(parts);
  }, 600_000);
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  it("makes parts of at most the size that was asked for, with their SHA-256", () => {
    const listed = readFileSync(path.join(parts, "sums"), "utf8");
    const found = names.filter((name) => name !== "sums" && name !== "run.sh");
    expect(found.length).toBeGreaterThan(4);
    for (const name of found) {
      // Nothing of NVIDIA's, unless it is asked for.
      expect(name).toMatch(/^(base|node)-\d{3}$/);
      expect(statSync(path.join(parts, name)).size).toBeLessThanOrEqual(partSize);
      expect(listed).toContain(`  ${name}\n`);
    }
    expect(spawnSync("sha256sum", ["-c", "--quiet", "sums"], { cwd: parts }).status).toBe(0);
  });

  it.each([
    [["--part-size", "10"], /--part-size is a whole number of bytes/],
    [["--bundles", "nobody"], /--bundles are some of embedded, medium and large, not nobody/],
    [["--preset", "x"], /--preset is 0 to 9/],
    [["--tensorflow"], /Unknown option '--tensorflow'/],
  ])("refuses %j", (args, message) => {
    const { status, stderr } = spawnSync(process.execPath, [script, ...args], { encoding: "utf8" });
    expect(stderr).toMatch(message);
    expect(status).toBe(2);
  });

  it.skipIf(hasDriver)("run.sh says plainly that there is no GPU, ends with 3 and leaves nothing running", async () => {
    const ended = await run();
    expect(ended.code, ended.output).toBe(3);
    expect(ended.summary).toMatchObject({ state: "finished", passed: false, problems: [] });
    expect(ended.summary.noGpu).toMatch(/libcuda\.so\.1/);
    expect(outcomes(ended)).toEqual({ doctor: "passed" });
    expect(ended.text).toMatch(
      /\nThere is no GPU here that flowturbo can use, so nothing was verified\. .*\nNO GPU \(/,
    );
    expect(ended.stdout.endsWith(ended.text)).toBe(true);
    expect(processesOf(folder)).toEqual([]);
  });

  it("run.sh unpacks without xz, by python3, and takes up what is unpacked without the parts", async () => {
    const work = path.join(folder, "by-python");
    const first = await run({ WORK: work, STEPS: "reference-embedded" }, { bin: programs("python3") });
    expect(first.code, first.output).toBe(0);
    expect(outcomes(first)).toEqual({ doctor: "passed", "reference-embedded": "passed" });
    const without = path.join(folder, "without");
    mkdirSync(without);
    for (const name of ["run.sh", "sums"]) symlinkSync(path.join(parts, name), path.join(without, name));
    const again = await run({ WORK: work, STEPS: "reference-embedded" }, { from: without, bin: programs() });
    expect(again.code, again.output).toBe(0);
    expect(again.text).toMatch(/^flowturbo .*: base, node; bundles embedded; Node .*\n[\s\S]*\nALL PASSED \(/);
    rmSync(work, { recursive: true });
  });

  it("run.sh names damaged and missing parts, and ends with 1", async () => {
    const damaged = path.join(folder, "damaged");
    mkdirSync(damaged);
    for (const name of names) if (name !== "node-001") symlinkSync(path.join(parts, name), path.join(damaged, name));
    const content = readFileSync(path.join(parts, "base-001"));
    content[1000] = content[1000]! ^ 1;
    rmSync(path.join(damaged, "base-001"));
    writeFileSync(path.join(damaged, "base-001"), content);
    const ended = await run({ WORK: path.join(folder, "other") }, { from: damaged });
    expect(ended.code).toBe(1);
    expect(ended.summary.problems.toSorted()).toEqual([
      "the part base-001 is damaged: copy it again",
      `the part node-001 is missing in ${damaged}`,
    ]);
    expect(ended.text).toMatch(/\nFAILED: .*the part base-001 is damaged/);
    expect(ended.stdout).toBe(ended.text);
  });

  it("run.sh ends with a summary where the budget is too short to unpack, or to begin anything", async () => {
    // Python unpacks on one processor: a second is not enough.
    const bin = programs("python3");
    const unpacking = await run({ WORK: path.join(folder, "other"), BUDGET: "1" }, { bin });
    expect(unpacking.code).toBe(1);
    expect(unpacking.text).toMatch(/^problem: unpacking \w+ did not end within the budget of 1 s\n[\s\S]*FAILED: /);
    expect(unpacking.summary).toMatchObject({ state: "finished", passed: false });
    const starting = await run({ BUDGET: "4", STEPS: "reference-embedded" });
    expect(starting.code, starting.output).toBe(1);
    expect(outcomes(starting)).toEqual({ doctor: "not started", "reference-embedded": "not started" });
    expect(starting.text).toMatch(/\nFAILED: doctor \(not started\)/);
    expect(processesOf(folder)).toEqual([]);
  });

  it("run.sh that is told to end leaves a summary and nothing running", async () => {
    const isRunning = (out: string) => {
      const file = path.join(out, "summary.txt");
      return existsSync(file) && readFileSync(file, "utf8").includes("it was at doctor") ? 1 : undefined;
    };
    const ended = await run({}, { watch: isRunning });
    expect(ended.code, ended.output).toBe(143);
    expect(ended.text).toMatch(/\nUNFINISHED, it was at doctor \(/);
    expect(ended.summary).toMatchObject({ state: "unfinished", passed: false, running: "doctor" });
    expect(processesOf(folder)).toEqual([]);
  });

  it.each([
    ["BUDGET", "soon", 2, /BUDGET is a whole number of seconds above 0, not soon/],
    ["STEPS", "one,driver", 1, /STEPS names one, which this pack does not have; it has reference-embedded, webgpu-/],
  ])("run.sh refuses %s=%s", async (name, value, wanted, message) => {
    const { code, output } = await run({ [name]: value });
    expect(output).toMatch(message);
    expect(code).toBe(wanted);
  });

  it.skipIf(hasDriver || !hasKernel)(
    "with a driver, the executor is verified, and what is lacking is named",
    async () => {
      const ended = await run({ LD_LIBRARY_PATH: simulated, STEPS: "cuda-embedded,driver,tensorrt-embedded" });
      expect(outcomes(ended), ended.output).toMatchObject({ driver: "passed", "reference-embedded": "passed" });
      const details = Object.fromEntries(ended.summary.steps.map(({ step, detail }) => [step, detail]));
      expect(details).toMatchObject({
        driver: expect.stringMatching(/^\d+ checks passed$/),
        "tensorrt-embedded": "TensorRT is neither in this pack nor on this machine",
      });
      expect(outcomes(ended)["cuda-embedded"]).toBe("skipped");
      expect(ended.text).toMatch(/^GPU: Simulated GPU, SM 8\.9/m);
      expect(ended.code).toBe(0);
      expect(processesOf(folder)).toEqual([]);
    },
  );

  it.skipIf(noSwiftShader)(
    `on software, steps run by their names: where nodes are${noSwiftShader ? ` (skipped: ${noSwiftShader})` : ""}`,
    async () => {
      const ended = await run({ ...swiftShaderEnv, STEPS: "placement-webgpu" });
      expect(outcomes(ended), ended.output).toEqual({ doctor: "passed", "placement-webgpu": "passed" });
      const { detail } = ended.summary.steps.at(-1)!;
      expect(detail).toMatch(/^\d+ graphs with \d{3,} nodes; 0 on the CPU that should not be$/);
      expect(ended.text).toMatch(/^graphics adapter: SwiftShader .*software/m);
      expect(ended.code).toBe(0);
    },
  );

  it.skipIf(hasDriver || !hasKernel)("a step that fails fails the run, and does not end it", async () => {
    const ended = await run({
      ...{ LD_LIBRARY_PATH: simulated, STEPS: "driver,reference-embedded" },
      FLOWTURBO_SIMULATED_FAULT: "bit kernel 300",
    });
    expect(outcomes(ended)).toEqual({ doctor: "passed", driver: "failed", "reference-embedded": "passed" });
    expect(ended.text).toMatch(/^failed +driver .*checks failed: schedule .*other bits/m);
    expect(ended.code).toBe(1);
  });
});
