/**
 * `node verify/placements.js <runtime> <checkpoint>…`: which nodes of the checkpoints' graphs ONNX Runtime leaves on the CPU,
 * on this machine's GPU, with the graphs as they are emitted for it. Ends with 1 where one is that does more than compute shapes.
 */

import { openCheckpoint } from "../lib/checkpoint/index.js";
import { packagePath } from "../lib/common/package.js";
import { graphName } from "../lib/networks/index.js";
import { GraphLibrary } from "../lib/networks/library.js";
import { runtimes } from "../lib/runtimes/index.js";
import { findCudaProvider } from "../lib/runtimes/onnxruntime/cuda-provider.js";
import { loadFolder } from "../lib/runtimes/onnxruntime/load-folder.js";
import { graphsWithAndWithout } from "./cases.js";
import { misplaced, placementsOf } from "./placement.js";

const [provider, ...checkpoints] = process.argv.slice(2);
process.exitCode = await main().catch((error: Error) => {
  console.log(error.message);
  return 1;
});

async function main(): Promise<number> {
  if ((provider !== "cuda" && provider !== "webgpu") || checkpoints.length === 0)
    throw new Error("Name a runtime, cuda or webgpu, and checkpoints.");
  // What the device has decides how graphs are emitted; only an open runtime knows.
  const settings = { weights: "auto", capture: false, named: true } as const;
  const weights = { bytesOf16Bit: () => 0, files: [] };
  const { runtime, emitOptions } = await runtimes[provider]!.open(settings, weights);
  await runtime.dispose();
  const places = provider === "cuda" ? await cudaPlaces() : {};

  let [graphs, nodes] = [0, 0];
  const wrong: string[] = [];
  for (const folder of checkpoints) {
    const checkpoint = await openCheckpoint(folder);
    const library = new GraphLibrary(checkpoint, emitOptions);
    const all = graphsWithAndWithout(checkpoint).map((key) => library.get(graphName(key)));
    for (const placement of await placementsOf(all, { provider, root: packagePath("."), ...places })) {
      const off = misplaced(placement).map(({ operator, name }) => `${placement.graph}: ${operator} ${name}`);
      graphs++;
      nodes += placement.nodes.length;
      wrong.push(...off);
      console.log(
        `${folder} ${placement.graph}: ${placement.nodes.length} nodes, ${off.length} misplaced, compiled in ${placement.milliseconds.toFixed(0)} ms`,
      );
    }
  }
  for (const node of wrong) console.log(`misplaced: ${node}`);
  console.log(
    `${graphs} graphs with ${nodes} nodes; ${wrong.length} on the CPU that should not be${wrong.length > 0 ? `: ${wrong.slice(0, 5).join(", ")}` : ""}`,
  );
  return wrong.length === 0 ? 0 : 1;
}

async function cudaPlaces() {
  const { folder, runtimeFolder, libraryFolders } = await findCudaProvider({ gpuFirst: true });
  const paths = [...libraryFolders, process.env.LD_LIBRARY_PATH].filter(Boolean);
  return {
    libraries: await loadFolder({ folder: folder!, runtimeFolder: runtimeFolder! }),
    env: { LD_LIBRARY_PATH: paths.join(":") },
  };
}
