/**
 * The Python that the peers run in: a virtual environment of its own under bench/.work, made on first use, or one that
 * FLOWTURBO_BENCH_PYTHON names. Where it cannot be had, the reason is part of the result.
 */

import { type ChildProcess, execFile, spawn } from "node:child_process";
import { existsSync, rmSync } from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { root } from "../support.js";

const run = promisify(execFile);
const packages = [
  "torch",
  "diffusers",
  "transformers",
  "accelerate",
  "sentencepiece",
  "protobuf",
  "onnx",
  "onnxscript",
];

export async function peerPython(): Promise<{ python: string } | { missing: string }> {
  const given = process.env.FLOWTURBO_BENCH_PYTHON;
  const venv = path.join(root, "bench/.work/peers-python");
  const python = given ?? path.join(venv, "bin/python");
  const works = () => run(python, ["-c", "import torch, diffusers, transformers, onnx"], { timeout: 120_000 });
  try {
    await works();
    return { python };
  } catch (error) {
    if (given) return { missing: `FLOWTURBO_BENCH_PYTHON=${given} lacks a package: ${reason(error)}` };
  }
  console.log(`installing ${packages.join(", ")} into ${path.relative(root, venv)} (several gigabytes, minutes)`);
  try {
    if (!existsSync(python)) await run("python3", ["-m", "venv", venv]);
    await run(python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", ...packages], {
      timeout: 1_800_000,
      maxBuffer: 2 ** 26,
    });
    await works();
    return { python };
  } catch (error) {
    rmSync(venv, { recursive: true, force: true });
    return { missing: `the Python packages could not be installed: ${reason(error)}` };
  }
}

/** The last line that says something. */
export function reason(error: unknown): string {
  const { stderr, message } = error as { stderr?: string; message: string };
  return (stderr?.trim().split("\n").at(-1) || message.split("\n")[0])!.trim();
}

export interface PipelineRequest {
  prompt: string;
  steps: number;
  guidance: number;
  size: number;
  seed: number;
  tokens: number;
  out?: string;
}
export interface PipelineAnswer {
  milliseconds: number;
  denoise: number;
  peak: number;
  torch: string;
}

/** diffusers' pipeline, loaded once and asked again and again (bench/peers/pipeline.py). */
export class Pipeline {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  #errors = "";

  private constructor(child: ChildProcess) {
    this.#child = child;
    this.#lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]();
    child.stderr!.on("data", (chunk) => {
      this.#errors = (this.#errors + chunk).slice(-4000);
    });
  }

  static async start(python: string, model: string, args: readonly string[]): Promise<Pipeline> {
    const script = path.join(root, "bench/peers/pipeline.py");
    const pipeline = new Pipeline(spawn(python, [script, model, ...args], { stdio: ["pipe", "pipe", "pipe"] }));
    await pipeline.#read();
    return pipeline;
  }

  async ask(request: PipelineRequest): Promise<PipelineAnswer> {
    this.#child.stdin!.write(`${JSON.stringify(request)}\n`);
    return (await this.#read()) as PipelineAnswer;
  }

  close(): void {
    this.#child.stdin!.end();
    this.#child.kill();
  }

  async #read(): Promise<unknown> {
    const { value, done } = await this.#lines.next();
    if (done) throw new Error(`diffusers ended: ${reason({ stderr: this.#errors, message: "no output" })}`);
    return JSON.parse(value);
  }
}
