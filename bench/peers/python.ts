/**
 * The Python that peers run in: virtual environments under bench/.work, made on first use, or those that the variables of
 * the environment name. Where one cannot be had, the reason is part of the result. What was installed stays, so that a run
 * that was interrupted goes on from there (pip keeps what it has built).
 */

import { type ChildProcess, execFile, spawn } from "node:child_process";
import { existsSync } from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { promisify } from "node:util";
import { root } from "../support.js";
import type { Command, Drawn, PictureRequest, Session } from "./contender.js";

const run = promisify(execFile);

interface Packages {
  /** Of the virtual environment. */
  readonly folder: string;
  /** Names a Python that has the packages, in its place. */
  readonly variable: string;
  readonly names: readonly string[];
  readonly modules: readonly string[];
  /** What the installation takes. */
  readonly takes: string;
}

const packages = {
  torch: {
    ...{ folder: "peers-python", variable: "FLOWTURBO_BENCH_PYTHON", takes: "several gigabytes, minutes" },
    names: ["torch", "diffusers", "transformers", "accelerate", "sentencepiece", "protobuf", "onnx", "onnxscript"],
    modules: ["torch", "diffusers", "transformers", "onnx"],
  },
  openvino: {
    ...{ folder: "peers-python", variable: "FLOWTURBO_BENCH_PYTHON", takes: "a minute" },
    names: ["openvino", "nncf", "pillow", "tokenizers"],
    modules: ["openvino", "nncf", "PIL", "tokenizers"],
  },
  genai: {
    ...{ folder: "peers-python", variable: "FLOWTURBO_BENCH_PYTHON", takes: "a minute" },
    names: ["openvino-genai", "openvino-tokenizers"],
    modules: ["openvino_genai", "openvino_tokenizers"],
  },
  "stable-diffusion.cpp": {
    ...{ folder: "peers-sdcpp", variable: "FLOWTURBO_BENCH_SDCPP_PYTHON", takes: "it is compiled, ten minutes" },
    names: ["stable-diffusion-cpp-python", "numpy", "pillow"],
    modules: ["stable_diffusion_cpp", "numpy", "PIL"],
  },
} satisfies Record<string, Packages>;
export type PackageSet = keyof typeof packages;
export const packageSets = Object.keys(packages) as PackageSet[];

const found = new Map<PackageSet, Promise<string>>();

/** A Python with these packages. @throws Error with the reason where there is none */
export function pythonWith(set: PackageSet): Promise<string> {
  if (!found.has(set)) found.set(set, install(packages[set]));
  return found.get(set)!;
}

async function install({ folder, variable, names, modules, takes }: Packages): Promise<string> {
  const given = process.env[variable];
  const venv = path.join(root, "bench/.work", folder);
  const python = given ?? path.join(venv, "bin/python");
  const works = () => run(python, ["-c", `import ${modules.join(", ")}`], { timeout: 300_000 });
  try {
    await works();
    return python;
  } catch (error) {
    if (given) throw new Error(`${variable}=${given} lacks a package: ${reason(error)}`);
  }
  console.log(`installing ${names.join(", ")} into ${path.relative(root, venv)} (${takes})`);
  try {
    if (!existsSync(python)) await run("python3", ["-m", "venv", venv]);
    await run(python, ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", ...names], {
      timeout: 3_600_000,
      maxBuffer: 2 ** 26,
    });
    await works();
    return python;
  } catch (error) {
    throw new Error(`the Python packages ${names.join(", ")} could not be installed: ${reason(error)}`);
  }
}

/** Versions of the packages that are there and that a result depends on. */
export async function versions(): Promise<Record<string, string>> {
  const names = ["torch", "diffusers", "openvino", "openvino-genai", "nncf", "stable-diffusion-cpp-python"];
  const script = `
import json, importlib.metadata as m
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({name: version(name) for name in ${JSON.stringify(names)}}))`;
  const all: Record<string, string> = {};
  for (const { folder, variable } of [packages.torch, packages["stable-diffusion.cpp"]]) {
    const python = process.env[variable] ?? path.join(root, "bench/.work", folder, "bin/python");
    try {
      const { stdout } = await run(python, ["-c", script]);
      for (const [name, version] of Object.entries(JSON.parse(stdout) as Record<string, string | null>))
        if (version !== null) all[name] = version;
    } catch {
      // It is not installed yet, or cannot be.
    }
  }
  return all;
}

/** The last line that says something. */
export function reason(error: unknown): string {
  const { stderr, message } = error as { stderr?: string; message: string };
  return (stderr?.trim().split("\n").at(-1) || message.split("\n")[0])!.trim();
}

/** Runs a script of bench/peers to its end. */
export async function runScript(python: string, script: string, args: readonly string[]): Promise<void> {
  await run(python, [path.join(root, "bench/peers", script), ...args], { maxBuffer: 2 ** 26 });
}

/** A script of bench/peers that is loaded once and asked again and again (peer.py). */
export class PythonSession implements Session {
  readonly #child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  #errors = "";

  private constructor(child: ChildProcess) {
    this.#child = child;
    this.#lines = createInterface({ input: child.stdout! })[Symbol.asyncIterator]();
    child.stderr!.on("data", (chunk) => {
      this.#errors = (this.#errors + chunk).slice(-4000);
    });
    // A write after its end: the reader says why it ended.
    child.stdin!.on("error", () => {});
  }

  static async start(python: string, script: string, args: readonly string[]): Promise<PythonSession> {
    const file = path.join(root, "bench/peers", script);
    const session = new PythonSession(spawn(python, [file, ...args], { stdio: ["pipe", "pipe", "pipe"] }));
    await session.#read();
    return session;
  }

  async draw(request: PictureRequest): Promise<Drawn> {
    this.#child.stdin!.write(`${JSON.stringify(request)}\n`);
    return (await this.#read()) as Drawn;
  }

  close(): void {
    this.#child.stdin!.end();
    this.#child.kill();
  }

  async #read(): Promise<unknown> {
    for (;;) {
      const { value, done } = await this.#lines.next();
      if (done) {
        if (this.#child.exitCode === null && this.#child.signalCode === null)
          await new Promise((resolve) => this.#child.once("close", resolve));
        throw new Error(reason({ stderr: this.#errors, message: `it ended by ${this.#child.signalCode ?? "itself"}` }));
      }
      // Libraries print there, too.
      if (value.startsWith('{"')) return JSON.parse(value);
    }
  }
}

/** The same script as a process that draws one picture. */
export const onceOf = (python: string, script: string, args: readonly string[]): Command => ({
  file: python,
  args: (request) => [path.join(root, "bench/peers", script), ...args, "--once", JSON.stringify(request)],
});
