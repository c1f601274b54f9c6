/** The ONNX writer: a graph builder over a minimal protobuf writer. It knows no network. */
export { cpuEmitOptions, type EmitOptions, type EmittedNetwork } from "./emit-options.js";
export {
  type Attribute,
  type Dimension,
  type ElementType,
  GraphBuilder,
  type OnnxGraph,
  shapeWith,
  type Value,
} from "./graph.js";
