// Plans of the simulated TensorRT (native/simulated/tensorrt.cpp): texts that say in closed form what an engine computes. The
// tests use them on the simulated device, and `verify:gpu -- --driver` on a real one.
import { writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import path from "node:path";
import { CompileError } from "../../lib/errors.js";
import type { ProfileShapes } from "../../lib/runtimes/builder.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";
import { fileIdentity } from "../../lib/runtimes/tensorrt/digests.js";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import { type ClosedForm, closedForms } from "../runtimes/models.js";

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
