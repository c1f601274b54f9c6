// A script that uses the simulated device in the way its first argument says, run by endings.test.ts.
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { isMainThread, parentPort, Worker } from "node:worker_threads";
import type { TensorRtKind } from "../../lib/runtimes/tensorrt/flavours.js";
import { launch, program, scaleGraph, slowGraph, slowProgram } from "../runtimes/models.js";
import { leftOver, SimulatedEngines, simulated, simulatedRuntime } from "../support/simulated.js";

const [way, kind] = process.argv.slice(2) as [string, TensorRtKind];

function start() {
  const runtime = simulatedRuntime(kind, new SimulatedEngines(mkdtempSync(path.join(tmpdir(), "flowturbo-ending-"))));
  runtime.add(scaleGraph("double", 2));
  runtime.add(slowGraph("slow", 16, 50));
  return runtime;
}
/** Launches of 50 ms each, for as long as nobody stops them. */
const slow = slowProgram("slow", 16, 1000);

if (!isMainThread) {
  const runtime = start();
  for (let run = 0; run < 20; run++) {
    const { a } = await runtime.run(program([run, 1], [launch("double", "x", "a")], ["a"]));
    if (a!.data[0] !== 2 * run) throw new Error(`run ${run} gave ${a!.data}`);
  }
  // Half of them free what they hold, half leave it to the end of the thread; some are in the middle of a run.
  if (way === "dispose") await runtime.dispose();
  if (way === "running")
    await new Promise<void>((begun) => void runtime.run(slow, { onLaunch: () => begun() }).catch(() => {}));
  parentPort!.postMessage("done");
} else if (way === "workers") {
  const ways = Array.from({ length: 10 }, (_, index) => ["dispose", "leave", "running"][index % 3]!);
  await Promise.all(
    ways.map(async (each) => {
      const worker = new Worker(fileURLToPath(import.meta.url), { argv: [each, kind] });
      // Where a thread ends at once, its end and its last message arrive in the same moment.
      let done = false;
      const ended = new Promise<number>((resolve, reject) => worker.once("exit", resolve).once("error", reject));
      await Promise.race([
        ended,
        new Promise<void>((resolve) =>
          worker.once("message", () => {
            done = true;
            resolve();
          }),
        ),
      ]);
      if (!done) throw new Error(`a thread (${each}) ended with ${await ended} before it was done`);
      if (each === "running") await worker.terminate();
      await ended;
    }),
  );
  for (const end = Date.now() + 60_000; Date.now() < end && Object.keys(leftOver()).length > 0; ) await setTimeout(50);
  console.log(JSON.stringify({ left: leftOver(), violation: simulated.violation() }));
} else if (way === "idle") {
  // A script that forgets dispose() ends by itself.
  const { a } = await start().run(program([1], [launch("double", "x", "a")], ["a"]));
  console.log(String(a!.data));
} else {
  const runtime = start();
  const running = new Promise<void>((begun) => void runtime.run(slow, { onLaunch: () => begun() }).catch(() => {}));
  await running;
  console.log("running");
  if (way === "exit") process.exit(7);
  if (way === "throw") throw new Error("uncaught, as the test wants");
  await setTimeout(60_000);
}
