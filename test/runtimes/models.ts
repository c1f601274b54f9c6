/** Small graphs and programs for the tests of the runtimes, and one that keeps a core busy for as long as asked. */

import { type DType, float32, int64 } from "../../lib/common/tensor.js";
import { GraphBuilder } from "../../lib/onnx/index.js";
import type { CopyRows, Instruction, Launch, Program } from "../../lib/program/program.js";
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

/** A program and its results, which every runtime gives to the last bit. */
export interface ExactProgram {
  readonly name: string;
  readonly program: Program;
  readonly expected: Readonly<Record<string, Float32Array | BigInt64Array>>;
}

const copy = (from: string, fromRow: number, to: string, toRow: number, rows = 1): CopyRows => ({
  ...{ op: "copy", from, fromRow, to, toRow, rows },
});

/** They launch `double` (a scale by 2) and `negate`. */
export const exactPrograms: readonly ExactProgram[] = [
  {
    name: "launches graphs and copies rows in order",
    program: program(
      [1, 2, 3],
      [
        launch("double", "x", "a"),
        copy("a", 0, "c", 1, 2),
        launch("double", "a", "b"),
        launch("double", "c", "d"),
        copy("b", 0, "c", 0, 2),
      ],
      ["a", "b", "c", "d"],
    ),
    expected: {
      a: Float32Array.of(2, 4, 6),
      b: Float32Array.of(4, 8, 12),
      d: Float32Array.of(0, 4, 8),
      // The first rows come from b, after d was computed from a's.
      c: Float32Array.of(4, 8, 4),
    },
  },
  {
    name: "carries 64-bit integers there and back, in rows too",
    program: {
      registers: { y: { dtype: "int64", shape: [2, 2] }, z: { dtype: "int64", shape: [2, 2] } },
      constants: { x: { kind: "value", tensor: int64([2, 2], BigInt64Array.of(1n, 2n, 2n ** 62n, -4n)) } },
      instructions: [launch("negate", "x", "y"), copy("y", 1, "z", 0)],
      results: ["y", "z"],
    },
    expected: {
      y: BigInt64Array.of(-1n, -2n, -(2n ** 62n), 4n),
      z: BigInt64Array.of(-(2n ** 62n), 4n, 0n, 0n),
    },
  },
];

/**
 * Submissions to one workspace: two of one row each, then one that gathers both rows into a launch of `double` and
 * scatters the results. p is four times the first value, q four times the second.
 */
export function gathering(first: number, second: number): { submissions: Program[]; expected: Record<string, number> } {
  const row = { dtype: "float32", shape: [1] } as const;
  const pair = { dtype: "float32", shape: [2] } as const;
  const own = (name: string, value: number): Program => ({
    registers: { [name]: row },
    constants: { [`${name}.x`]: { kind: "value", tensor: float32([1], Float32Array.of(value)) } },
    instructions: [launch("double", `${name}.x`, name)],
    results: [],
  });
  const shared: Program = {
    registers: { wide: pair, out: pair, p: row, q: row },
    constants: {},
    instructions: [
      copy("p", 0, "wide", 1),
      copy("q", 0, "wide", 0),
      launch("double", "wide", "out"),
      copy("out", 1, "p", 0),
      copy("out", 0, "q", 0),
    ],
    results: ["p", "q"],
  };
  return { submissions: [own("p", first), own("q", second), shared], expected: { p: 4 * first, q: 4 * second } };
}
