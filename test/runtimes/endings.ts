/**
 * A script, bundled by build.ts, that ends in the way its argument says while a launch of many seconds is under way.
 * Its parent (endings.test.ts) looks at its exit code and at what it leaves behind.
 */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { isMainThread, parentPort, Worker } from "node:worker_threads";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { launch, program, scaleGraph, slowGraph, slowProgram } from "./models.js";

const way = process.argv[2]!;

/** Resolves when the slow launch is under way. */
async function begin(): Promise<void> {
  const runtime = new OnnxRuntime({ weights: "lazy", threads: 1 });
  runtime.add(slowGraph("slow", 2048, 300));
  runtime.add(slowGraph("quick", 2048, 1));
  const workspace = runtime.open();
  const quick = workspace.submit(slowProgram("quick", 2048, 1));
  void workspace.submit({ ...slowProgram("slow", 2048, 1), constants: {} });
  // The child has both, and goes on with the second: it compiles the graph, in a few milliseconds, and launches it.
  await quick;
}

/** Resolves when the test has found the child. */
const told = () => once(process.stdin, "data");

if (!isMainThread) {
  await begin();
  parentPort!.postMessage("running");
} else if (way === "idle") {
  // A script that forgets dispose() ends by itself.
  const runtime = new OnnxRuntime({ weights: "lazy", threads: 1 });
  runtime.add(scaleGraph("double", 2));
  await runtime.run(program([1], [launch("double", "x", "a")], ["a"]));
} else if (way === "shared") {
  // Two models on one process, one of which has work that nobody waits for: the other's work counts alone.
  const options = {
    provider: "cuda",
    weights: "folded",
    host: new URL("onnxruntime-host.js", import.meta.url),
  } as const;
  const [one, two] = [new OnnxRuntime(options), new OnnxRuntime(options)];
  for (const runtime of [one, two]) for (const name of ["takes[50]", "double"]) runtime.add(scaleGraph(name, 2));
  await Promise.all([one, two].map((runtime) => runtime.run(program([1], [launch("double", "x", "a")], ["a"]))));
  const endless = Array.from({ length: 2000 }, () => launch("takes[50]", "x", "a"));
  void one.run(program([1], endless, ["a"]), { background: true }).catch(() => {});
  await two.unload(["double"]);
  console.log("done");
} else if (way === "started") {
  new OnnxRuntime({ weights: "lazy", threads: 1 });
} else if (way === "terminate") {
  const worker = new Worker(fileURLToPath(import.meta.url), { argv: [way] });
  await new Promise((resolve) => worker.once("message", resolve));
  console.log("running");
  await told();
  await worker.terminate();
  console.log("terminated");
  // The test sees that nothing is left while this process lives.
  await told();
  process.stdin.destroy();
} else {
  await begin();
  // A process that outlives this one must not hold open what the runtime's child watches.
  if (way === "sibling") spawn("sleep", ["5"], { stdio: "ignore", detached: true }).unref();
  console.log("running");
  await told();
  if (way === "exit") process.exit(0);
  if (way === "throw") throw new Error("uncaught, as the test wants");
  await setTimeout(60_000);
}
