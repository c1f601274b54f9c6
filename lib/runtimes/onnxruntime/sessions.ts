/** How ONNX Runtime compiles a graph: the options of its sessions, by execution provider. */

import type * as ort from "onnxruntime-node";
import type { HostSettings, SentGraph, Widening } from "./protocol.js";

/** Would make float32 copies of weights: from the casts behind 16-bit and 8-bit ones, and from float16 ones in a pass of its own. */
const wideningOptimizers = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"];

/**
 * Options of the session of a graph.
 * @param root the folder that the locations of external weights are relative to
 * @param widening of 16-bit weights that the graph computes with in float32
 * @param unsigned whether weights of 8 bits are made unsigned, for processors whose products of unsigned by signed ones overflow: exact there, and
 *   less than half as fast where nothing overflows
 */
export function sessionOptions(
  {
    root,
    widening,
    unsigned = false,
  }: Pick<SentGraph, "root"> & { readonly widening: Widening; readonly unsigned?: boolean },
  { provider = "cpu", deviceId = 0, threads }: Pick<HostSettings, "provider" | "deviceId" | "threads">,
): ort.InferenceSession.SessionOptions {
  const onDevice = provider !== "cpu";
  return {
    executionProviders: [provider === "cuda" ? { name: provider, deviceId } : provider],
    // Values that launches leave stay on the GPU. For CUDA onnxruntime-node has no such thing: there they come to the host.
    ...(provider === "webgpu" ? { preferredOutputLocation: "gpu-buffer" as const } : {}),
    executionMode: "sequential",
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
    interOpNumThreads: 1,
    // Memory patterns reserve one block for all values of a run and keep it for every size seen: a third of a gigabyte more
    // for 1 GB of lazy weights, while steps take 0.96 to 1.03 of their time.
    enableMemPattern: false,
    // Errors only: warnings would go to a stream that is not read.
    logSeverityLevel: 3,
    extra: {
      session: {
        model_external_initializers_file_folder_path: root,
        // Each session has threads of its own. Those that spun on after its run would take the cores from the next graph:
        // a decoder on two cores takes 26 ms behind a predictor that spins and 16 behind one that does not.
        force_spinning_stop: "1",
        // Between two operators threads wait by spinning, by default for long. On a core that other programs want, too, that
        // time is the thread's next turn: with one busy program a core, steps on two cores took 1.4 to 2.2 times as long as on
        // one thread, and 0.7 to 1.4 times with this limit. Without any spinning small steps take up to 1.25 times as long
        // where the cores are free (bench:trials). Results do not change.
        intra_op: { spin_duration_us: "20" },
        ...(unsigned ? { x64quantprecision: "1" } : {}),
        // A GPU's memory is taken in blocks that double; weights, whose size is known, are kept out of them.
        ...(onDevice ? { use_device_allocator_for_initializers: "1" } : {}),
      },
      ...(provider === "webgpu" ? { ep: { webgpuexecutionprovider: { powerPreference: "high-performance" } } } : {}),
      ...(widening === "lazy" ? { optimization: { disable_specified_optimizers: wideningOptimizers.join(";") } } : {}),
    },
  };
}
