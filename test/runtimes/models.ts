/** Small graphs and programs for the tests of the runtimes, and one that keeps a core busy for as long as asked. */

import { type DType, float32 } from "../../lib/common/tensor.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import type { Instruction, Launch, Program } from "../../lib/program/program.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";

/** What a graph computes, for the simulated device: see native/simulated/tensorrt.cpp. */
export interface ClosedForm {
  readonly inputs: Readonly<Record<string, DType>>;
  /** Shapes of the outputs for those of the inputs. */
  outputs(inputs: Readonly<Record<string, readonly number[]>>): Record<string, readonly number[]>;
  readonly dtype?: DType;
  /** Scratch tensors by name, each with the tensor whose shape it has. */
  readonly temporaries?: Readonly<Record<string, string>>;
  /** "y x 2 *": y is x times two. */
  readonly formulas: readonly string[];
  readonly microseconds?: number;
  /** Bytes of device memory that the engine takes. */
  readonly weights?: number;
  /** Of an execution context, and of its first launch, on the simulated device. */
  readonly contextBytes?: number;
  readonly firstBytes?: number;
}

/** Of the graphs below, and of those that tests add. */
export const closedForms = new WeakMap<CompilableGraph, ClosedForm>();

function withForm(graph: CompilableGraph, form: ClosedForm): CompilableGraph {
  closedForms.set(graph, form);
  return graph;
}

/** y = x * factor on float32 [n]. */
export function scaleGraph(name: string, factor: number): CompilableGraph {
  const graph = new GraphBuilder(name);
  const x = graph.input("x", "float32", ["n"]);
  graph.output("y", graph.op("Mul", [x, graph.scalar(factor, "float32")]), ["n"]);
  return withForm(graph.build(), {
    inputs: { x: "float32" },
    outputs: ({ x }) => ({ y: x! }),
    formulas: [`y x ${factor} *`],
    weights: 4096,
  });
}

/** y = -x on int64 [n, 2]. */
export function negateGraph(name: string): CompilableGraph {
  const graph = new GraphBuilder(name);
  const x = graph.input("x", "int64", ["n", 2]);
  graph.output("y", graph.op("Neg", [x]), ["n", 2]);
  return withForm(graph.build(), {
    inputs: { x: "int64" },
    outputs: ({ x }) => ({ y: x! }),
    dtype: "int64",
    formulas: ["y 0 x -"],
  });
}

/** A chain of products of [size, size] matrices: `products` times 2 size³ operations in one uninterruptible run. */
export function slowGraph(name: string, size: number, products: number): CompilableGraph {
  const graph = new GraphBuilder(name);
  const x = graph.input("x", "float32", [size, size]);
  let y = x;
  for (let index = 0; index < products; index++) y = graph.op("MatMul", [y, x]);
  graph.output("y", y, [size, size]);
  return withForm(graph.build(), {
    inputs: { x: "float32" },
    outputs: ({ x }) => ({ y: x! }),
    formulas: ["y x 0 *"],
    microseconds: products * 1000,
  });
}

export function launch(graph: string, x: string, y: string, extra: Partial<Launch> = {}): Launch {
  return {
    op: "launch",
    graph,
    inputs: { x },
    outputs: { y },
    label: { kind: "step", name: `${y} of ${x}` },
    ...extra,
  };
}

/** Registers a, b, c and d of [n], the constant x = `values`, and what is given. */
export function program(values: readonly number[], instructions: Instruction[], results: string[]): Program {
  const register = { dtype: "float32", shape: [values.length] } as const;
  return {
    registers: { a: register, b: register, c: register, d: register },
    constants: { x: { kind: "value", tensor: float32([values.length], Float32Array.from(values)) } },
    instructions,
    results,
  };
}

/** Launches of `slowGraph`: as many as asked, from constant x. */
export function slowProgram(graph: string, size: number, launches: number): Program {
  const register = { dtype: "float32", shape: [size, size] } as const;
  return {
    registers: { a: register, b: register },
    constants: { x: { kind: "value", tensor: float32([size, size], new Float32Array(size * size)) } },
    instructions: Array.from({ length: launches }, (_, index) => launch(graph, "x", index % 2 ? "b" : "a")),
    results: [],
  };
}
