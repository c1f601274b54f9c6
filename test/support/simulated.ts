// The simulated device for tests in TypeScript: its controls, plans that say in closed form what a graph computes, and
// runtimes on it. Importing this file brings the simulated libcuda.so.1 into the process, before any addon looks for it.
import { existsSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { CompileError } from "../../lib/errors.js";
import type { ProfileShapes } from "../../lib/runtimes/builder.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";
import { fileIdentity } from "../../lib/runtimes/tensorrt/digests.js";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import { flavours, type TensorRtKind } from "../../lib/runtimes/tensorrt/flavours.js";
import { TensorRtRuntime, type TensorRtRuntimeOptions } from "../../lib/runtimes/tensorrt/runtime.js";
import { type ClosedForm, closedForms } from "../runtimes/models.js";
import { loadAddon } from "./addon.js";
import { root } from "./fixtures.js";

/** See native/simulated/simulated.h. */
export interface Counts {
  readonly calls: number;
  readonly deviceBlocks: number;
  readonly deviceBytes: number;
  readonly hostBlocks: number;
  readonly streams: number;
  readonly events: number;
  readonly graphs: number;
  readonly contexts: number;
  readonly runtimes: number;
  readonly engines: number;
  readonly executionContexts: number;
  readonly kernels: number;
  readonly uploads: number;
  readonly downloads: number;
  readonly copies: number;
  readonly graphLaunches: number;
  readonly deserialised: number;
  readonly violations: number;
  readonly captures: number;
  readonly spins: number;
  readonly interrupts: number;
}

interface Control {
  counts(): Counts;
  kernelTimes(): number[];
  reset(): void;
  failAt(call: number, code: number): void;
  failKernel(kernel: number, code: number): void;
  failed(): string;
  violation(): string;
  capacity(bytes: number): void;
  refuseCaptures(refuse: boolean): void;
  hold(): void;
  let(count: number): void;
}

/** Folder of the simulated libraries. */
export const simulatedFolder = process.env.FLOWTURBO_ADDON_DIR
  ? path.join(process.env.FLOWTURBO_ADDON_DIR, "simulated")
  : path.join(root, ".cache/simulated");

const control = path.join(simulatedFolder, "control.node");

/** Absent where no addons can be compiled; the tests that need it are skipped there. */
export const simulated = (existsSync(control) ? createRequire(import.meta.url)(control) : null) as Control;

/** What exists on the device: all zero when everything has been freed. */
export function leftOver(): Partial<Counts> {
  const { deviceBlocks, deviceBytes, hostBlocks, streams, events, graphs, contexts, runtimes, engines } =
    simulated.counts();
  const { executionContexts } = simulated.counts();
  const all = { deviceBlocks, deviceBytes, hostBlocks, streams, events, graphs, contexts, runtimes, engines };
  return Object.fromEntries(Object.entries({ ...all, executionContexts }).filter(([, count]) => count !== 0));
}

const types = { float32: "f32", int64: "i64" } as const;

/** The plan of an engine that computes a closed form, with the given profiles. */
export function planText(form: ClosedForm, profiles: readonly ProfileShapes[]): string {
  const shapes = profiles.map((inputs) => ({ ...inputs, ...form.outputs(inputs) }));
  const outputs = Object.keys(form.outputs(profiles[0]!));
  return [
    "flowturbo-simulated 1",
    `weights ${form.weights ?? 0}`,
    `microseconds ${form.microseconds ?? 0}`,
    `context ${form.contextBytes ?? 1024}`,
    `first ${form.firstBytes ?? 512}`,
    ...Object.entries(form.inputs).map(([name, dtype]) => `input ${name} ${types[dtype]}`),
    ...outputs.map((name) => `output ${name} ${types[form.dtype ?? "float32"]}`),
    ...Object.entries(form.temporaries ?? {}).map(([name, like]) => `temporary ${name} ${like}`),
    ...form.formulas.map((formula) => `formula ${formula}`),
    ...shapes.map((profile) =>
      ["profile", ...Object.entries(profile).map(([name, shape]) => `${name}=${shape.join()}`)].join(" "),
    ),
    // Plans are as large as the weights they hold.
    " ".repeat(form.weights ?? 0),
  ].join("\n");
}

/** Plans of closed forms in a folder, in place of the compiler and its cache. */
export class SimulatedEngines implements EngineSource {
  /** What was asked for: graph and profiles. */
  readonly requests: { readonly graph: string; readonly profiles: readonly ProfileShapes[] }[] = [];
  readonly #folder: string;
  readonly #formOf: (graph: CompilableGraph) => ClosedForm | undefined;

  constructor(
    folder: string,
    formOf: (graph: CompilableGraph) => ClosedForm | undefined = (graph) => closedForms.get(graph),
  ) {
    this.#folder = folder;
    this.#formOf = formOf;
  }

  async engineFor(graph: CompilableGraph, profiles: readonly ProfileShapes[], kept: readonly ProfileShapes[]) {
    const all = [...new Map([...kept, ...profiles].map((shapes) => [JSON.stringify(shapes), shapes])).values()];
    this.requests.push({ graph: graph.name, profiles: all });
    const form = this.#formOf(graph);
    if (!form) throw new CompileError(graph.name, `The graph ${graph.name} has no closed form.`);
    // Of one process's runtimes, those with the same plan share an engine.
    const text = planText(form, all);
    const key = `${this.#folder} ${graph.name} ${text}`;
    const plan = path.join(this.#folder, `${graph.name}-${plans.get(key) ?? plans.size}.plan`);
    if (!plans.has(key)) {
      plans.set(key, plans.size);
      writeFileSync(plan, text);
    }
    const handle = await open(plan);
    try {
      return { plan, identity: await fileIdentity(handle) };
    } finally {
      await handle.close();
    }
  }
}
const plans = new Map<string, number>();

export function simulatedRuntime(
  kind: TensorRtKind,
  engines: EngineSource,
  options: Partial<TensorRtRuntimeOptions> = {},
): TensorRtRuntime {
  const folder = path.join(simulatedFolder, kind);
  return new TensorRtRuntime({
    ...{ kind, addon: loadAddon(kind), engines },
    library: path.join(folder, flavours[kind].library),
    parser: path.join(folder, flavours[kind].parser),
    ...options,
  });
}
