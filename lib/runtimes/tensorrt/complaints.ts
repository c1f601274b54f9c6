/**
 * The addon's errors of building an engine as this package's, with a remedy. The parser of TensorRT names the node that it
 * refused by index only, so its messages are written out with the operator and the tensors.
 */

import { CacheError, CheckpointError, CompileError, type FlowTurboError } from "../../errors.js";
import type { CompilableGraph } from "../runtime.js";
import type { NativeError } from "./addon.js";
import { describeNode } from "./nodes.js";

/** @param cacheFolder to tell the cache's files from those of the weights */
export function explainBuild(error: NativeError, graph: CompilableGraph, cacheFolder: string): FlowTurboError {
  // Without a GPU the library ends every failure with a complaint about the driver, which is not the cause.
  const log = (error.log ?? []).filter((line) => !line.includes("cudaError 35"));
  const cause = { cause: error };
  switch (error.code) {
    case "WEIGHTS_CHANGED":
      return new CheckpointError(error.path ?? "", `${error.message}. Load the model again.`, cause);
    case "IO": {
      if (!error.path?.startsWith(cacheFolder))
        return new CheckpointError(error.path ?? "", `${error.message}. Is the checkpoint complete?`, cause);
      return new CacheError(
        error.path,
        `${error.message}. Make room there, or name another cache folder; nothing was left behind.`,
        cause,
      );
    }
    case "PARSE": {
      const details = (error.complaints ?? []).map((complaint) => explainComplaint(complaint, graph));
      const first = details[0] ?? "It gave no reason.";
      const message = `TensorRT's parser refused the graph ${graph.name}. ${first}`;
      return new CompileError(graph.name, message, details, cause);
    }
    default:
      return new CompileError(
        graph.name,
        `The engine of ${graph.name} could not be built: ${error.message}.${log.length > 0 ? ` ${log[0]}` : ""}`,
        log,
        cause,
      );
  }
}

const parserWords: Record<string, string> = {
  kMODEL_DESERIALIZE_FAILED: "the bytes are no ONNX model",
  kINVALID_GRAPH: "the graph is invalid",
  kINVALID_NODE: "the node is invalid",
  kINVALID_VALUE: "a value is invalid",
  kUNSUPPORTED_GRAPH: "the graph is not supported",
  kUNSUPPORTED_NODE: "the node is not supported",
  kUNSUPPORTED_NODE_ATTR: "an attribute of the node is not supported",
  kUNSUPPORTED_NODE_INPUT: "an input of the node is not supported",
  kUNSUPPORTED_NODE_DATATYPE: "an element type of the node is not supported",
  kUNSUPPORTED_NODE_DYNAMIC: "a dynamic shape of the node is not supported",
  kUNSUPPORTED_NODE_SHAPE: "a shape of the node is not supported",
  kMEM_ALLOC_FAILED: "memory ran out",
};

function explainComplaint(complaint: NativeError["complaints"][number], graph: CompilableGraph): string {
  const node = complaint.node >= 0 ? describeNode(graph.bytes, complaint.node) : null;
  const operator = complaint.operator || node?.operator || "";
  const name = complaint.nodeName || node?.outputs[0] || "";
  const what = /plugin not found/i.test(complaint.description)
    ? `it knows no operator ${operator}`
    : (parserWords[complaint.code] ?? complaint.code);
  const where = node || name ? `Node ${complaint.node}, "${name}" (${operator}): ` : "";
  const tensors = node ? ` It reads ${list(node.inputs)} and writes ${list(node.outputs)}.` : "";
  const words = complaint.description ? ` TensorRT says: ${complaint.description}.` : "";
  return `${where}${what}.${tensors}${words}`;
}

function list(names: readonly string[]): string {
  return names.length > 0 ? names.map((name) => `"${name}"`).join(", ") : "nothing";
}
