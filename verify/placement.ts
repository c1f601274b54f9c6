/**
 * Which execution provider of ONNX Runtime each node of a graph runs on. ONNX Runtime says so in its log alone, when it
 * compiles a graph: so graphs are compiled in a process of their own, with that log, and never run.
 */

import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import type { Provider } from "../lib/runtimes/onnxruntime/protocol.js";
import { sessionOptions } from "../lib/runtimes/onnxruntime/sessions.js";
import type { CompilableGraph } from "../lib/runtimes/runtime.js";

/** A node as ONNX Runtime compiles it, which may be several of the graph fused. */
export interface PlacedNode {
  readonly operator: string;
  readonly name: string;
  /** Such as "CPUExecutionProvider". */
  readonly provider: string;
}

export interface Placement {
  readonly graph: string;
  readonly nodes: readonly PlacedNode[];
  /** Milliseconds that compiling took. */
  readonly milliseconds: number;
}

export interface PlacementOptions {
  readonly provider: Provider;
  /** Variables of the process. */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** See `openThrough`. */
  readonly libraries?: string | undefined;
  /** Folder that has onnxruntime-node in its node_modules. */
  readonly root: string;
}

/** As `process.ts` does it: ONNX Runtime reports its use unless it is told not to. */
const silent = { ORT_DISABLE_TELEMETRY: process.env.ORT_DISABLE_TELEMETRY || "1" };

const code = `
import { readFileSync, writeSync } from "node:fs";
import os from "node:os";
// Not process.stderr, which makes the pipe non-blocking: ONNX Runtime's log gives up at the first write that would block.
const say = (line) => writeSync(2, line);
const { libraries, graphs } = JSON.parse(readFileSync(process.argv[1], "utf8"));
if (libraries)
  try {
    process.dlopen({ exports: {} }, libraries + "/libonnxruntime.so.1", os.constants.dlopen.RTLD_NOW | os.constants.dlopen.RTLD_GLOBAL | 0x1000);
  } catch {}
const { default: ort } = await import("onnxruntime-node");
for (const { file, options } of graphs) {
  say("\\n<<< " + file + "\\n");
  const start = performance.now();
  try {
    await ort.InferenceSession.create(readFileSync(file), options);
    say("\\n>>> " + (performance.now() - start) + "\\n");
  } catch (error) {
    say("\\n!!! " + error.message.replaceAll("\\n", " ") + "\\n");
  }
}
// Destructors of a device that is only pretended have nothing to free.
process.kill(process.pid, "SIGKILL");
`;

/** @throws Error naming the graph that cannot be compiled, and why */
export async function placementsOf(
  graphs: readonly CompilableGraph[],
  { provider, env = {}, libraries, root }: PlacementOptions,
): Promise<Placement[]> {
  const folder = await mkdtemp(path.join(tmpdir(), "flowturbo-placement-"));
  try {
    const sent = graphs.map((graph, index) => {
      const [weight] = graph.externals.values();
      const { root } = path.parse(weight?.file ?? process.cwd());
      const options = {
        ...sessionOptions({ root, widening: "folded" }, { provider, threads: 1 }),
        logSeverityLevel: 0,
      };
      return { file: path.join(folder, `${index}.onnx`), options };
    });
    for (const [index, graph] of graphs.entries()) await writeFile(sent[index]!.file, graph.bytes);
    const request = path.join(folder, "request.json");
    await writeFile(request, JSON.stringify({ libraries, graphs: sent }));
    const log = await logOf(["--input-type=module", "-e", code, request], { ...process.env, ...silent, ...env }, root);
    return parse(log, new Map(sent.map(({ file }, index) => [file, graphs[index]!.name])));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

function logOf(args: readonly string[], env: NodeJS.ProcessEnv, cwd: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, args, { cwd, env, stdio: ["ignore", "ignore", "pipe"] });
    const parts: string[] = [];
    // The log of a graph is tens of megabytes; few lines of it matter.
    let rest = "";
    child.stderr.setEncoding("utf8").on("data", (data: string) => {
      const lines = `${rest}${data}`.split("\n");
      rest = lines.pop()!;
      for (const line of lines) if (/^(<<<|>>>|!!!) |VerifyEachNodeIsAssignedToAnEp\]/.test(line)) parts.push(line);
    });
    child.once("error", reject);
    child.once("close", () => resolve(parts.join("\n")));
  });
}

function parse(log: string, names: ReadonlyMap<string, string>): Placement[] {
  const placements: (Placement & { nodes: PlacedNode[] })[] = [];
  let graph = "";
  let nodes: PlacedNode[] = [];
  let provider = "";
  for (const line of log.split("\n")) {
    // Lines of a log in colour end with what ends the colour.
    const said = line.split("VerifyEachNodeIsAssignedToAnEp]")[1]?.replaceAll("\u001b[m", "").trim();
    if (line.startsWith("<<< ")) {
      graph = names.get(line.slice(4))!;
      nodes = [];
    } else if (line.startsWith(">>> ")) {
      if (nodes.length === 0) throw new Error(`ONNX Runtime's log does not say where the nodes of ${graph} are.`);
      placements.push({ graph, nodes, milliseconds: Number(line.slice(4)) });
    } else if (line.startsWith("!!! ")) throw new Error(`${graph} cannot be compiled: ${line.slice(4)}`);
    else if (said) {
      const all = said.match(/^All nodes placed on \[(\w+)\]\. Number of nodes: (\d+)/);
      const some = said.match(/^Node\(s\) placed on \[(\w+)\]/);
      const node = said.match(/^(\w+) \((.*)\)$/);
      if (all) nodes = Array.from({ length: Number(all[2]) }, () => ({ operator: "", name: "", provider: all[1]! }));
      else if (some) provider = some[1]!;
      else if (node) nodes.push({ operator: node[1]!, name: node[2]!, provider });
    }
  }
  if (placements.length !== names.size)
    throw new Error(`The process that compiles graphs ended at ${graph || "its start"}.`);
  return placements;
}

/** Operators that, on integers, compute shapes and positions. */
const shapeArithmetic = new Set(["Shape", "Concat", "Gather", "Mul", "Div", "Slice", "Squeeze", "Unsqueeze", "Cast"]);

/**
 * The nodes of a graph that should be on a device and are not: all on the CPU but those that compute shapes, and transfers
 * from the device to the host, which bring there what such a node computes with.
 */
export function misplaced({ nodes }: Placement): PlacedNode[] {
  return nodes.filter(({ operator, provider }) =>
    provider === "CPUExecutionProvider" ? !shapeArithmetic.has(operator) : operator === "MemcpyToHost",
  );
}
