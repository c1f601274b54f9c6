/**
 * Builds one ONNX graph, node by node. Weights never pass through here: an initializer that belongs to the checkpoint
 * is an external-data entry (file, offset, length), so that the graph of a model of many gigabytes is a few hundred
 * kilobytes. Values carry their element type, since strongly typed runtimes (TensorRT) forbid implicit conversion.
 */

import { createHash } from "node:crypto";
import { elementCount, is8Bit, type StoredDType, type StoredTensor } from "../common/tensor.js";
import { MessageWriter } from "./protobuf.js";

export type ElementType =
  | "float32"
  | "float16"
  | "bfloat16"
  | "float8e4m3"
  | "float8e5m2"
  | "uint8"
  | "int8"
  | "int64"
  | "bool";

/** A value of the graph under construction. */
export interface Value {
  readonly name: string;
  readonly type: ElementType;
}

export type Attribute = number | string | readonly number[] | { readonly float: number };

/** A graph within a node, with one output of that type. */
interface Branch {
  readonly type: ElementType;
  readonly graph: MessageWriter;
}

/** A dimension: a number, or the name of one that is known only when the graph runs. */
export type Dimension = number | string;

/**
 * Dimensions as numbers.
 * @param sizes what the names stand for
 * @throws RangeError for a name that they lack
 */
export function shapeWith(dimensions: readonly Dimension[], sizes: Readonly<Record<string, number>>): number[] {
  return dimensions.map((dimension) => {
    const size = typeof dimension === "number" ? dimension : sizes[dimension];
    if (size === undefined) throw new RangeError(`There is no size for the dimension "${dimension}".`);
    return size;
  });
}

/** A finished graph; see `CompilableGraph` in the runtimes. */
export interface OnnxGraph {
  readonly name: string;
  readonly bytes: Uint8Array;
  readonly externals: ReadonlyMap<string, StoredTensor>;
  /** Dimensions of inputs and outputs by name. The first is "rows" or "network_rows" where there is one for each row. */
  readonly inputs: ReadonlyMap<string, readonly Dimension[]>;
  readonly outputs: ReadonlyMap<string, readonly Dimension[]>;
  /** Types of 16-bit weights that the graph computes with in float32, and of 8-bit weights that it casts. */
  readonly widened: ReadonlySet<StoredDType>;
  /** SHA-256 of the graph without the places of its external data: the same wherever the checkpoint lies. */
  readonly fingerprint: string;
}

/**
 * A graph names the first opset that has all of its operators, since runtimes have kernels by version: ONNX Runtime's
 * WebGPU provider has none for the Sin and Cos of opset 22. GroupNormalization as it is written here is of opset 21.
 */
const leastOpset = 21;
const firstOpset: Readonly<Record<string, number>> = { Attention: 23, RMSNormalization: 23, "Conv bfloat16": 22 };
const irVersion = 11;

/** Types of constants, whose values are written here. */
type ConstantType = Exclude<ElementType, "float8e4m3" | "float8e5m2">;

const onnxType: Record<ElementType, number> = {
  ...{ float32: 1, uint8: 2, int8: 3, int64: 7, bool: 9, float16: 10, bfloat16: 16, float8e4m3: 17, float8e5m2: 19 },
};
const storedType: Record<StoredDType, ElementType> = {
  ...{
    F32: "float32",
    F16: "float16",
    BF16: "bfloat16",
    F8_E4M3: "float8e4m3",
    F8_E5M2: "float8e5m2",
    I8: "int8",
  },
};

/** Operators whose result type is not that of their first input. */
const resultType: Record<string, ElementType> = { Shape: "int64", ArgMax: "int64", Equal: "bool", Greater: "bool" };

interface InputOrOutput {
  readonly info: MessageWriter;
  readonly shape: readonly Dimension[];
}

export class GraphBuilder {
  readonly name: string;
  /** Fields of the message of the graph, or of the branch that is being built. */
  #nodes = new MessageWriter();
  readonly #initializers: (MessageWriter | StoredTensor)[] = [];
  readonly #inputs = new Map<string, InputOrOutput>();
  readonly #outputs = new Map<string, InputOrOutput>();
  readonly #externals = new Map<string, StoredTensor>();
  readonly #constants = new Map<string, Value>();
  #scope = "";
  #counter = 0;
  #opset = leastOpset;
  readonly #widened = new Set<StoredDType>();
  /** Domains of operators that are not ONNX's own. */
  readonly #domains = new Set<string>();

  constructor(name: string) {
    this.name = name;
  }

  /** Names the nodes that `build` adds, so that a runtime's error names the layer. */
  scoped<T>(scope: string, build: () => T): T {
    const outer = this.#scope;
    this.#scope = outer ? `${outer}.${scope}` : scope;
    try {
      return build();
    } finally {
      this.#scope = outer;
    }
  }

  input(name: string, type: ElementType, shape: readonly Dimension[]): Value {
    this.#inputs.set(name, { info: valueInfo(name, type, shape), shape });
    return { name, type };
  }

  /** Gives `value` the output name `name`. */
  output(name: string, value: Value, shape: readonly Dimension[]): void {
    this.#node("Identity", [value.name], [name], {});
    this.#outputs.set(name, { info: valueInfo(name, value.type, shape), shape });
  }

  /**
   * Adds a node with one output. A null input is an optional one that is left out.
   * @param type the operator, with a domain and a colon before it where it is not ONNX's own
   */
  op(type: string, inputs: readonly (Value | null)[], attributes: Record<string, Attribute> = {}): Value {
    return this.ops(type, inputs, 1, attributes)[0]!;
  }

  concat(values: readonly Value[], axis: number): Value {
    return this.op("Concat", values, { axis });
  }

  /** The sizes of the axes from `start` to before `end`, as an int64 vector. */
  shapeOf(value: Value, start: number, end: number): Value {
    return this.op("Shape", [value], { start, end });
  }

  /** Adds a node with several outputs, all of the first input's type. */
  ops(
    type: string,
    inputs: readonly (Value | null)[],
    outputs: number,
    attributes: Record<string, Attribute> = {},
  ): Value[] {
    const element = resultType[type] ?? inputs.find((input) => input !== null)?.type ?? "float32";
    const values = Array.from({ length: outputs }, () => this.#fresh(type, element));
    this.#node(
      type,
      inputs.map((input) => input?.name ?? ""),
      values.map((value) => value.name),
      attributes,
      element,
    );
    return values;
  }

  /**
   * The value of one of two branches, of which only that one runs. A branch may read all values of the graph; those that it
   * makes are its own.
   * @param condition one bool
   */
  either(condition: Value, then: () => Value, otherwise: () => Value): Value {
    const branches = { then_branch: this.#branch(then), else_branch: this.#branch(otherwise) };
    const result = this.#fresh("If", branches.then_branch.type);
    this.#node("If", [condition.name], [result.name], branches);
    return result;
  }

  #branch(build: () => Value): Branch {
    const outer = this.#nodes;
    this.#nodes = new MessageWriter();
    try {
      const { name, type } = build();
      const graph = new MessageWriter().string(2, name).merge(this.#nodes);
      return { type, graph: graph.message(12, valueInfo(name, type)) };
    } finally {
      this.#nodes = outer;
    }
  }

  /** The value converted to `type`; itself where it has that type already. */
  cast(value: Value, type: ElementType): Value {
    if (value.type === type) return value;
    const stored = this.#externals.get(value.name);
    if (stored && (type === "float32" || is8Bit(stored.dtype))) this.#widened.add(stored.dtype);
    const result = this.#fresh("Cast", type);
    this.#node("Cast", [value.name], [result.name], { to: onnxType[type] });
    return result;
  }

  /** A constant vector of integers (shapes, axes, indices). */
  ints(values: readonly number[]): Value {
    return this.#constant(`ints[${values}]`, "int64", [values.length], values);
  }

  /** A constant scalar in the element type asked for. */
  scalar(value: number, type: ConstantType): Value {
    return this.#constant(`${type}(${value})`, type, [], [value]);
  }

  /** A constant tensor of a few values in the element type asked for. */
  tensor(shape: readonly number[], values: ArrayLike<number>, type: ConstantType): Value {
    return this.#initializer(`constant_${this.#counter++}`, type, shape, values);
  }

  /** An initializer that stays in the checkpoint's file, in the element type that it has there. */
  external(tensor: StoredTensor, name = tensor.name): Value {
    const type = storedType[tensor.dtype];
    const known = this.#externals.get(name);
    if (known) {
      if (known.file !== tensor.file || known.offset !== tensor.offset)
        throw new RangeError(`Two different tensors are named ${name} in the graph ${this.name}.`);
      return { name, type };
    }
    this.#externals.set(name, tensor);
    this.#initializers.push({ ...tensor, name });
    return { name, type };
  }

  build(): OnnxGraph {
    const model = (place: (tensor: StoredTensor) => Record<string, string>): Uint8Array => {
      const graph = new MessageWriter().string(2, this.name).merge(this.#nodes);
      for (const initializer of this.#initializers)
        graph.message(5, "file" in initializer ? externalTensor(initializer, place(initializer)) : initializer);
      for (const { info } of this.#inputs.values()) graph.message(11, info);
      for (const { info } of this.#outputs.values()) graph.message(12, info);
      const message = new MessageWriter()
        .int(1, irVersion)
        .string(2, "flowturbo")
        .message(7, graph)
        .message(8, new MessageWriter().string(1, "").int(2, this.#opset));
      for (const domain of this.#domains) message.message(8, new MessageWriter().string(1, domain).int(2, 1));
      return message.finish();
    };
    const bytes = model(({ file, offset, length }) => ({
      // Without the root ("/" or "C:\\"): runtimes resolve it against the root, since they refuse absolute paths.
      location: file.replace(/^([A-Za-z]:)?[\\/]+/, "").replaceAll("\\", "/"),
      offset: String(offset),
      length: String(length),
    }));
    let digest: string | undefined;
    return {
      name: this.name,
      bytes,
      externals: this.#externals,
      widened: this.#widened,
      inputs: shapesOf(this.#inputs),
      outputs: shapesOf(this.#outputs),
      get fingerprint() {
        digest ??= createHash("sha256")
          .update(model(({ length }) => ({ length: String(length) })))
          .digest("hex");
        return digest;
      },
    };
  }

  #fresh(type: string, element: ElementType): Value {
    const number = this.#counter++;
    const operator = type.slice(type.indexOf(":") + 1);
    return { name: this.#scope ? `${this.#scope}/${operator}_${number}` : `${operator}_${number}`, type: element };
  }

  #node(
    type: string,
    inputs: string[],
    outputs: string[],
    attributes: Record<string, Attribute | Branch>,
    element?: ElementType,
  ): void {
    const node = new MessageWriter();
    for (const input of inputs) node.string(1, input);
    for (const output of outputs) node.string(2, output);
    const [operator, domain] = type.split(":").reverse() as [string, string?];
    node.string(3, `${outputs[0]}`).string(4, operator);
    for (const [name, value] of Object.entries(attributes)) node.message(5, attribute(name, value));
    if (domain) this.#domains.add(domain);
    if (domain) node.string(7, domain);
    else
      this.#opset = Math.max(this.#opset, firstOpset[operator] ?? firstOpset[`${operator} ${element}`] ?? leastOpset);
    this.#nodes.message(1, node);
  }

  #constant(key: string, type: ConstantType, shape: readonly number[], values: readonly number[]): Value {
    const value = this.#constants.get(key) ?? this.#initializer(key, type, shape, values);
    this.#constants.set(key, value);
    return value;
  }

  #initializer(name: string, type: ConstantType, shape: readonly number[], values: ArrayLike<number>): Value {
    if (values.length !== elementCount(shape))
      throw new RangeError(`The constant ${name} of shape [${shape}] has ${values.length} values.`);
    const bytes = new Uint8Array(rawData[type](values).buffer);
    this.#initializers.push(
      new MessageWriter().packedInts(1, shape).int(2, onnxType[type]).string(8, name).bytes(9, bytes),
    );
    return { name, type };
  }
}

function shapesOf(operands: ReadonlyMap<string, InputOrOutput>): ReadonlyMap<string, readonly Dimension[]> {
  return new Map([...operands].map(([name, { shape }]) => [name, shape]));
}

/** An initializer whose data lies in a file; `place` says where. */
function externalTensor(tensor: StoredTensor, place: Record<string, string>): MessageWriter {
  const message = new MessageWriter()
    .packedInts(1, tensor.shape)
    .int(2, onnxType[storedType[tensor.dtype]])
    .string(8, tensor.name);
  for (const [key, value] of Object.entries(place))
    message.message(13, new MessageWriter().string(1, key).string(2, value));
  return message.int(14, 1);
}

/** @param shape left out where it follows from what makes the value */
function valueInfo(name: string, type: ElementType, shape?: readonly Dimension[]): MessageWriter {
  const tensor = new MessageWriter().int(1, onnxType[type]);
  if (shape) tensor.message(2, dimensionsOf(shape));
  return new MessageWriter().string(1, name).message(2, new MessageWriter().message(1, tensor));
}

function dimensionsOf(shape: readonly Dimension[]): MessageWriter {
  const dimensions = new MessageWriter();
  for (const dimension of shape)
    dimensions.message(
      1,
      typeof dimension === "number" ? new MessageWriter().int(1, dimension) : new MessageWriter().string(2, dimension),
    );
  return dimensions;
}

function attribute(name: string, value: Attribute | Branch): MessageWriter {
  const message = new MessageWriter().string(1, name);
  if (typeof value === "string") return message.string(4, value).int(20, 3);
  if (typeof value === "number") return message.int(3, value).int(20, 2);
  if ("float" in value) return message.float(2, value.float).int(20, 1);
  if ("graph" in value) return message.message(6, value.graph).int(20, 5);
  for (const item of value) message.int(8, item);
  return message.int(20, 7);
}

/** Values as raw little-endian data. */
const rawData: Record<ConstantType, (values: ArrayLike<number>) => NodeJS.TypedArray<ArrayBuffer>> = {
  float32: (values) => Float32Array.from(values),
  bfloat16: (values) => Uint16Array.from(values, bfloat16Bits),
  float16: (values) => Uint16Array.from(values, float16Bits),
  uint8: (values) => Uint8Array.from(values),
  int8: (values) => Int8Array.from(values),
  int64: (values) => BigInt64Array.from(Array.from(values), BigInt),
  bool: (values) => Uint8Array.from(values),
};

const bits = new DataView(new ArrayBuffer(4));

/** Round to nearest, ties to even. Finite values only. */
function bfloat16Bits(value: number): number {
  bits.setFloat32(0, value);
  const word = bits.getUint32(0);
  return (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
}

/** Round to nearest, ties to even, with subnormals; values beyond the range become infinite. */
function float16Bits(value: number): number {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const magnitude = Math.abs(value);
  if (magnitude >= 65520) return sign | 0x7c00;
  // Below 2^-14 the spacing is fixed at 2^-24; above, it is 2^-10 of the power of two below the value.
  const exponent = Math.max(-14, Math.floor(Math.log2(magnitude || Number.MIN_VALUE)));
  const spacing = 2 ** (exponent - 10);
  const scaled = magnitude / spacing;
  let units = Math.round(scaled);
  if (units - scaled === 0.5 && units % 2 === 1) units -= 1;
  return sign | (exponent === -14 ? units : ((exponent + 14) << 10) + units);
}
