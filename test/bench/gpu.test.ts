// bench:gpu on a machine without a GPU: what it says there, and that it measures whatever runtime it is told to, beside a
// torch that only answers as the real one would.
import { spawn } from "node:child_process";
import { chmodSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const hasDriver = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64"].some((folder) =>
  existsSync(path.join(folder, "libcuda.so.1")),
);
let folder: string;
beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), "flowturbo-bench-gpu-"));
});
afterAll(() => rmSync(folder, { recursive: true }));

/** @param torch what stands for python3 */
function bench(name: string, args: readonly string[], torch: string) {
  const results = path.join(folder, name);
  const bin = mkdtempSync(path.join(folder, "bin-"));
  writeFileSync(path.join(bin, "python3"), `#!/bin/sh\n${torch}\n`);
  chmodSync(path.join(bin, "python3"), 0o755);
  const tsx = [path.join(root, "node_modules/tsx/dist/cli.mjs"), "--tsconfig", path.join(root, "bench/tsconfig.json")];
  const child = spawn(process.execPath, [...tsx, path.join(root, "bench/gpu.ts"), ...args], {
    cwd: root,
    env: { ...process.env, FLOWTURBO_BENCH_RESULTS: results, PATH: `${bin}:${process.env.PATH}` },
  });
  let [stdout, stderr] = ["", ""];
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  child.stderr.on("data", (chunk) => {
    stderr += chunk;
  });
  const read = (file: string) => readFileSync(path.join(results, file), "utf8");
  return new Promise<{ status: number | null; stdout: string; stderr: string; read: typeof read; results: string }>(
    (resolve, reject) => {
      child.once("error", reject);
      child.once("close", (status) => resolve({ status, stdout, stderr, read, results }));
    },
  );
}

const noTorch = "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1";
const steps = (milliseconds: number) =>
  `echo '{"event": "round", "steps": [${milliseconds}, ${milliseconds}], "denoise": ${2 * milliseconds}}'`;
/** Eager takes 4 ms a step, compiled 1 ms. */
const torch = `
[ "$1" = -c ] && exit 0
echo '{"event": "machine", "torch": "2.9", "gpu": "A GPU"}'
echo '{"event": "first", "milliseconds": 1500}'
case "$*" in *--compile*) ${steps(1)} ;; *) ${steps(4)} ;; esac`;
const small = ["--model", "test/fixtures/medium/model", "--sizes", "64", "--steps", "2", "--rounds", "2"];

describe("bench:gpu", () => {
  it.skipIf(hasDriver)("ends with 3 without a GPU, and says of each contender why", async () => {
    const { status, stderr, results } = await bench("nothing", [], noTorch);
    expect(stderr).toMatch(/^Nothing was measured: there is no GPU here\./);
    expect(stderr).toMatch(/Not measured, tensorrt: .*\nNot measured, tensorrt-rtx: /);
    expect(stderr).toMatch(/Not measured, torch: ModuleNotFoundError/);
    expect(existsSync(results)).toBe(false);
    expect(status).toBe(3);
  });

  it.each([
    [["--runtime", "nobody"], /--runtime names some of .*, not nobody/],
    [["--sizes", "500"], /--sizes are multiples of 16/],
    [["--steps", "0"], /whole numbers above 0/],
    [["--stepps", "3"], /Unknown option '--stepps'/],
  ])("refuses %j", async (args, message) => {
    const { status, stderr } = await bench("refused", args, noTorch);
    expect(stderr).toMatch(message);
    expect(status).toBe(2);
  });

  it.skipIf(hasDriver)(
    "measures each contender in a process of its own, and goes on after one that fails",
    async () => {
      const { status, read } = await bench("some", [...small, "--runtime", "tensorrt,onnxruntime"], torch);
      const { rows, complete, gpus, versions } = JSON.parse(read("gpu.json"));
      expect(rows.map(({ contender }: { contender: string }) => contender)).toEqual([
        ...["flowturbo, tensorrt", "flowturbo, tensorrt, as one CUDA graph", "flowturbo, onnxruntime"],
        ...["torch, eager", "torch, compiled"],
      ]);
      const [launched, captured, cpu, eager, compiled] = rows;
      for (const failed of [launched, captured]) {
        expect(failed.error).toMatch(/^RuntimeUnavailableError: TensorRT 11 cannot be used for running here/);
        expect(failed.step).toBe(null);
      }
      expect(cpu).toMatchObject({
        error: null,
        side: 64,
        step: { runs: 4 },
        picture: { runs: 2 },
        decode: { runs: 2 },
      });
      expect(cpu.picture.median).toBeGreaterThanOrEqual(cpu.denoise.median);
      expect(cpu.first).toBeGreaterThan(0);
      expect(eager).toMatchObject({ first: 1500, picture: null, step: { median: 4, runs: 2 }, denoise: { median: 8 } });
      expect(compiled.step.median).toBe(1);
      expect({ complete, gpus, torch: versions.torch }).toEqual({ complete: true, gpus: ["A GPU"], torch: "2.9" });
      const text = read("gpu.md");
      expect(text).toMatch(/^\| torch, compiled \| 0\.25 \| 1\.00 \(1\.00 to 1\.00\) \| 2\.0 /m);
      expect(text).toMatch(/^- Failed, flowturbo, tensorrt, 64 px: RuntimeUnavailableError/m);
      expect(text).not.toMatch(/Not finished/);
      expect(status).toBe(1);
    },
  );

  it("ends what hangs, and keeps what it has printed", async () => {
    const hangs = `${torch}\ncase "$*" in *--compile*) exec sleep 600 ;; esac`;
    const { status, read } = await bench("hangs", [...small, "--runtime", "onnxruntime", "--limit", "20"], hangs);
    const { rows } = JSON.parse(read("gpu.json"));
    expect(rows[0]).toMatchObject({ contender: "flowturbo, onnxruntime", error: null });
    expect(rows[1]).toMatchObject({ contender: "torch, eager", error: null });
    expect(rows[2].error).toMatch(/longer than 20 s/);
    expect(rows[2].step).toMatchObject({ median: 1 });
    expect(status).toBe(1);
  });
});
