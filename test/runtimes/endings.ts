/**
 * A script, bundled by build.ts, that ends in the way its argument says while a launch of many seconds is under way.
 * Its parent (endings.test.ts) looks at its exit code and at what it leaves behind.
 */

import { spawn } from "node:child_process";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { isMainThread, parentPort, Worker } from "node:worker_threads";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { launch, program, scaleGraph, slowGraph, slowProgram } from "./models.js";

const way = process.argv[2]!;

/** Resolves once the slow launch has begun. */
async function begin(): Promise<void> {
  const runtime = new OnnxRuntime({ weights: "lazy", threads: 1 });
  // Created and compiled first, so that little but the product itself remains.
  runtime.add(slowGraph("slow", 2048, 300));
  runtime.add(slowGraph("quick", 2048, 1));
  const quick = slowProgram("quick", 2048, 1);
  const slow = slowProgram("slow", 2048, 1);
  await new Promise<void>((resolve, reject) => {
    const both = { ...quick, instructions: [...quick.instructions, ...slow.instructions] };
    runtime.run(both, { onLaunch: () => resolve() }).catch(reject);
  });
  await setTimeout(500);
}

if (!isMainThread) {
  await begin();
  parentPort!.postMessage("running");
} else if (way === "idle") {
  // A script that forgets dispose() ends by itself.
  const runtime = new OnnxRuntime({ weights: "lazy", threads: 1 });
  runtime.add(scaleGraph("double", 2));
  await runtime.run(program([1], [launch("double", "x", "a")], ["a"]));
} else if (way === "started") {
  new OnnxRuntime({ weights: "lazy", threads: 1 });
} else if (way === "terminate") {
  const worker = new Worker(fileURLToPath(import.meta.url), { argv: [way] });
  await new Promise((resolve) => worker.once("message", resolve));
  console.log("running");
  await setTimeout(500);
  await worker.terminate();
  console.log("terminated");
  // Long enough for the test to see that nothing is left while this process lives.
  await setTimeout(3000);
} else {
  await begin();
  // A process that outlives this one must not hold open what the runtime's child watches.
  if (way === "sibling") spawn("sleep", ["5"], { stdio: "ignore", detached: true }).unref();
  console.log("running");
  // Long enough for the test to look for the child.
  await setTimeout(500);
  if (way === "exit") process.exit(0);
  if (way === "throw") throw new Error("uncaught, as the test wants");
  await setTimeout(60_000);
}
