/** Small graphs and programs for the tests of the runtimes, and one that keeps a core busy for as long as asked. */

import { GraphBuilder } from "../../lib/onnx/index.js";
import type { Instruction, Launch, Program } from "../../lib/program.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";
import { float32 } from "../../lib/tensor.js";

/** y = x * factor on float32 [n]. */
export function scaleGraph(name: string, factor: number): CompilableGraph {
  const graph = new GraphBuilder(name);
  const x = graph.input("x", "float32", ["n"]);
  graph.output("y", graph.op("Mul", [x, graph.scalar(factor, "float32")]), ["n"]);
  return graph.build();
}

/** A chain of products of [size, size] matrices: `products` times 2 size³ operations in one uninterruptible run. */
export function slowGraph(name: string, size: number, products: number): CompilableGraph {
  const graph = new GraphBuilder(name);
  const x = graph.input("x", "float32", [size, size]);
  let y = x;
  for (let index = 0; index < products; index++) y = graph.op("MatMul", [y, x]);
  graph.output("y", y, [size, size]);
  return graph.build();
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
