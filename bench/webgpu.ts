/**
 * `npm run bench:webgpu`: every graph of a checkpoint on ONNX Runtime's WebGPU provider: how many of its nodes are on the
 * device, what its first launch costs (sessions, upload of the weights, shaders), and what a later one takes, as a ratio to the
 * CPU. Ends with 3 where there is no adapter. A software adapter is slow, and the page says so.
 *
 *   --model FOLDER    default: the embedded model
 *   --size 64x64      pixels; default: the model's native size
 *   --rounds N        timed launches of each graph, in turn with the CPU; default: 5
 *   --graphs a,b      only these
 */

import "./telemetry.js";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { elementCount, float32 } from "../lib/common/tensor.js";
import { embeddedModel } from "../lib/flowturbo.js";
import { nativeSize } from "../lib/generation/sizes.js";
import { GraphLibrary } from "../lib/networks/library.js";
import type { Program } from "../lib/program/program.js";
import { chosenAdapter, findAdapters, isSoftware } from "../lib/runtimes/onnxruntime/adapters.js";
import { OnnxRuntime } from "../lib/runtimes/onnxruntime/onnxruntime.js";
import type { Values } from "../lib/runtimes/onnxruntime/values.js";
import { webgpu } from "../lib/runtimes/onnxruntime/webgpu.js";
import { WebGpuValues } from "../lib/runtimes/onnxruntime/webgpu-values.js";
import type { Runtime } from "../lib/runtimes/runtime.js";
import { casesOf } from "../verify/cases.js";
import { compare, graphsOf } from "../verify/check.js";
import { misplaced, placementsOf } from "../verify/placement.js";
import { format, machineLine, paired, ratios, report, root, type Spread, spread, table } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    model: { type: "string" },
    size: { type: "string" },
    rounds: { type: "string", default: "5" },
    graphs: { type: "string" },
  },
});
const rounds = Number(flags.rounds);
const given = flags.size?.match(/^(\d+)x(\d+)$/);
if (!Number.isInteger(rounds) || rounds < 1 || (flags.size !== undefined && !given)) {
  console.error("--rounds is a whole number of 1 or more, and --size such as 1024x1024.");
  process.exit(2);
}

const checkpoint = await openCheckpoint(flags.model ?? embeddedModel);
const size = given ? { width: Number(given[1]), height: Number(given[2]) } : nativeSize(checkpoint);
const { adapters } = await findAdapters();
const adapter = adapters && chosenAdapter(adapters);
const start = performance.now();
const opened = await webgpu
  .open({ named: true, weights: "auto", capture: false }, { files: [], bytesOf16Bit: () => 0 })
  .catch((error: Error) => error);
if (opened instanceof Error) {
  console.error(`Nothing was measured. ${opened.message}`);
  process.exit(3);
}
const readyMs = performance.now() - start;
const { runtime, emitOptions, settings } = opened;
const host = pathToFileURL(`${root}/dist/onnxruntime-host.js`);
const cpu = new OnnxRuntime({ weights: "folded", host });

interface Row {
  readonly graph: string;
  readonly launch: string;
  readonly onDevice: number;
  readonly onCpu: number;
  /** Nodes that should be on the device. */
  readonly misplaced: readonly string[];
  readonly firstMs: number;
  readonly laterMs: Spread;
  readonly timesOfCpu: Spread;
  /** Relative L2 error against the CPU. */
  readonly error: number;
}

const rows: Row[] = [];
try {
  const graphs = new GraphLibrary(checkpoint, emitOptions);
  const reference = new GraphLibrary(checkpoint);
  const run = (on: Runtime, library: GraphLibrary) => (program: Program) => {
    for (const name of graphsOf(program)) if (!on.has(name)) on.add(library.get(name));
    return on.run(program);
  };
  const [onDevice, onCpu] = [run(runtime, graphs), run(cpu, reference)];
  const only = flags.graphs?.split(",");
  const cases = (await casesOf(reference, { sizes: [size], batches: [1] }, onCpu)).filter(
    ({ kind, program }) => kind === "engine" && (!only || graphsOf(program).every((name) => only.includes(name))),
  );
  const names = [...new Set(cases.flatMap(({ program }) => graphsOf(program)))];
  const placements = new Map(
    (
      await placementsOf(
        names.map((name) => graphs.get(name)),
        { provider: "webgpu", root },
      )
    ).map((each) => [each.graph, each]),
  );
  for (const { name: launch, program } of cases) {
    const graph = graphsOf(program)[0]!;
    const timed = async (on: typeof onDevice) => {
      const start = performance.now();
      const values = await on(program);
      return { values, milliseconds: performance.now() - start };
    };
    const expected = await onCpu(program);
    const first = await timed(onDevice);
    const error = Math.max(...compare(first.values, expected).map(({ relative }) => relative));
    const times = await paired(
      {
        webgpu: async () => (await timed(onDevice)).milliseconds,
        cpu: async () => (await timed(onCpu)).milliseconds,
      },
      rounds,
      1,
    );
    const { nodes } = placements.get(graph)!;
    const row: Row = {
      ...{ graph, launch, error, firstMs: first.milliseconds },
      onDevice: nodes.filter(({ provider }) => provider === "WebGpuExecutionProvider").length,
      onCpu: nodes.filter(({ provider }) => provider === "CPUExecutionProvider").length,
      misplaced: misplaced(placements.get(graph)!).map(({ operator, name }) => `${operator} ${name}`),
      laterMs: spread(times.webgpu!),
      timesOfCpu: ratios(times.webgpu!, times.cpu!),
    };
    rows.push(row);
    console.log(
      `${launch}: ${row.onDevice} nodes on the device and ${row.onCpu} on the CPU; first ${row.firstMs.toFixed(0)} ms, then ${format(row.laterMs, 1)} ms, ${format(row.timesOfCpu)} of the CPU's time; error ${error.toExponential(1)}`,
    );
  }
} finally {
  await Promise.all([runtime.dispose(), cpu.dispose()]);
}

/**
 * What it costs that values stay on the device, and what it would cost if they came to the host: a step of SD3.5 at 1024 × 1024
 * reads the state, the velocity and the context, and leaves the first two.
 */
async function transfers() {
  const shapes = { state: [1, 16, 128, 128], velocity: [2, 16, 128, 128], context: [2, 333, 4096] } as const;
  const values = new WebGpuValues(ort);
  const timed = async (work: () => Promise<unknown>) => {
    const start = performance.now();
    await work();
    return performance.now() - start;
  };
  const tensors = Object.entries(shapes).map(([name, shape]) => {
    const length = elementCount(shape);
    return {
      name,
      tensor: float32(
        shape,
        Float32Array.from({ length }, (_, index) => Math.sin(index)),
      ),
    };
  });
  const measured: { name: string; bytes: number; upload: Spread; download: Spread; check: Spread }[] = [];
  for (const { name, tensor } of tensors) {
    const times = { upload: [] as number[], download: [] as number[], check: [] as number[] };
    for (let round = -1; round < rounds; round++) {
      let value!: Awaited<ReturnType<Values["upload"]>>;
      const upload = await timed(async () => {
        value = await values.upload(tensor);
        await values.settle(value);
      });
      const check = await timed(() => values.isFinite(value));
      const download = await timed(() => values.download(value));
      values.free(value);
      if (round >= 0)
        for (const [key, time] of Object.entries({ upload, check, download })) times[key as "check"].push(time);
    }
    measured.push({
      ...{ name, bytes: tensor.data.byteLength },
      ...{ upload: spread(times.upload), download: spread(times.download), check: spread(times.check) },
    });
  }
  return measured;
}

const moved = await transfers();
const isSoft = adapter !== null && isSoftware(adapter);
const about = adapter
  ? `${adapter.name}, driver ${adapter.driver} ${adapter.driverVersion}`
  : "an adapter that does not say its name";
const page = [
  "# WebGPU, graph by graph",
  "",
  isSoft
    ? `On ${about}: **software, not a GPU**. It computes on the processor's cores, far slower than ONNX Runtime does there; these figures show placement and correctness, and say nothing about a GPU.`
    : `On ${about}.`,
  "",
  `Checkpoint ${checkpoint.folder === embeddedModel ? "models/shapes (embedded)" : checkpoint.folder}, ${size.width} × ${size.height} pixels, one picture. The first launch compiles the graph: it uploads the weights and compiles shaders; before it, the process took ${Math.round(readyMs)} ms to be ready. Later launches, upload and download included, are medians of ${rounds}, taken in turn with ONNX Runtime on the CPU of this machine. Nodes on the CPU compute shapes. \`npm run bench:webgpu\`.`,
  "",
  table([
    [
      "launch",
      "nodes on the device",
      "on the CPU",
      "misplaced",
      "first, ms",
      "later, ms",
      "of the CPU's time",
      "relative L2 error",
    ],
    ...rows.map((row) => [
      ...[row.launch, row.onDevice, row.onCpu, row.misplaced.length, row.firstMs.toFixed(0)],
      ...[format(row.laterMs, 1), format(row.timesOfCpu), row.error.toExponential(1)],
    ]),
  ]),
  "",
  "Values stay on the device between launches; what waits for a launch and checks its values brings down four bytes. If they came to the host, a step would upload all three of these and download two:",
  "",
  table([
    ["value, of SD3.5 at 1024 × 1024", "MB", "upload, ms", "download, ms", "check on the device, ms"],
    ...moved.map(({ name, bytes, upload, download, check }) => [
      ...[name, (bytes / 1e6).toFixed(1), format(upload, 1), format(download, 1), format(check, 1)],
    ]),
  ]),
  "",
  machineLine(),
].join("\n");
await report("webgpu", { adapter, software: isSoft, settings, size, rounds, readyMs, rows, transfers: moved }, page);
process.exitCode = rows.every((row) => row.misplaced.length === 0 && row.error < 1e-2) ? 0 : 1;
