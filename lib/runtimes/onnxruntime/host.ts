/**
 * Entry of the child process that runs the graphs. It follows the messages of its channel, and must never outlive its
 * parent, even in the middle of a `session.run` of many seconds, when this thread receives nothing. So a second thread
 * holds the read end of a pipe (stdin) whose write end only the parent has; when that closes, however the parent ended,
 * the thread kills the process. It also answers each byte on that pipe with a line on stdout that names the launch which
 * runs: a sign of life that does not depend on how long a launch takes. Bun and Deno have no such thread's socket; there the channel's end, which the first
 * thread notices between two launches, ends the process, and there are no such signs.
 */

import { setImmediate, setTimeout } from "node:timers/promises";
import { Worker } from "node:worker_threads";
import type * as ort from "onnxruntime-node";
import { messageOf } from "../../common/text.js";
import { probeDevice } from "./device-probe.js";
import { Executor, RunFailure } from "./executor.js";
import { openThrough } from "./open-through.js";
import { JoinedParts, unpack } from "./packing.js";
import type { Asked, FinishedLaunch, FromHost, HostSettings, ToHost } from "./protocol.js";

// Ctrl-C and a closed terminal signal all of the foreground group. The parent decides what they mean.
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => {});
process.once("disconnect", () => process.kill(process.pid, "SIGKILL"));

/** Comes when it is known what this process is for, which may be after the library has loaded. */
const settled = new Promise<HostSettings>((resolve) => {
  process.once("message", (message: ToHost) => message.type === "begin" && resolve(message.settings));
});
/** A folder to load the library from. */
const libraries = process.argv[2];
/**
 * Milliseconds between two messages about finished launches, where nobody watches each. The parent handles each message, on a core that the graph
 * would use: at steps of 5 to 25 ms on two cores, a message for each costs several percent, and one each tenth of a second
 * still one.
 */
const reportInterval = 200;

/** Runs that wait or run, with what has been asked of them since. */
const pending = new Map<number, Set<Asked>>();
/** Long constants of runs that are still to come. */
const joined = new Map<number, JoinedParts>();
let turn: Promise<void> = Promise.resolve();
/** Digests of graphs that are to be compiled when no run waits. */
const ahead: string[] = [];
let isPreparing = false;
/** What runs now, for the watching thread: run · 2^16 + launch in one value, so that both change at once; −1 for nothing. */
const running = new BigInt64Array(new SharedArrayBuffer(8)).fill(-1n);

// Before the library is imported: what it opens its provider beside.
if (libraries) openThrough(libraries);
const [library] = await Promise.all([
  import("onnxruntime-node").then(
    // A CommonJS module: its exports are on `default`.
    (module) => module.default as unknown as typeof ort,
    (error) => ({ broken: messageOf(error) }),
  ),
  watchParent(),
]);
const settings = await settled;

if ("broken" in library) void send({ type: "broken", message: library.broken });
else {
  const executor = new Executor(library, settings);
  process.on("message", (message: ToHost) => {
    if (message.type === "begin") return;
    if (message.type === "abort" || message.type === "preempt" || message.type === "yield") {
      pending.get(message.id)?.add(message.type);
    } else if (message.type === "part") {
      const parts = joined.get(message.id) ?? new JoinedParts();
      joined.set(message.id, parts);
      parts.add(message);
    } else if (message.type === "free") {
      turn = turn.then(() => executor.free(message.workspace, message.names));
    } else if (message.type === "unload") {
      turn = turn.then(() => executor.unload(message.graphs));
    } else if (message.type === "prepare") {
      for (const graph of message.graphs) {
        executor.add(graph);
        ahead.push(graph.digest);
      }
      void prepareAhead(executor);
    } else {
      const asked = new Set<Asked>();
      if (pending.size === 0) send({ type: "began", id: message.id });
      pending.set(message.id, asked);
      turn = turn.then(() => run(executor, message, asked));
    }
  });
  const { provider = "cpu", deviceId } = settings;
  try {
    const features = provider === "cpu" ? null : await probeDevice(library, { provider, deviceId });
    void send({ type: "ready", version: library.env.versions.node ?? library.env.versions.common, features });
  } catch (error) {
    void send({ type: "deviceless", message: messageOf(error) });
  }
}

async function run(
  executor: Executor,
  message: Extract<ToHost, { type: "run" }>,
  asked: ReadonlySet<Asked>,
): Promise<void> {
  const { id, graphs, digests, program, workspace } = message;
  const parts = joined.get(id);
  joined.delete(id);
  const isWatched = message.reports === "each";
  let reports: FinishedLaunch[] = [];
  let reported = performance.now();
  const flush = () => {
    const sent = reports.length > 0 ? send({ type: "launched", id, reports }) : undefined;
    reports = [];
    reported = performance.now();
    return sent;
  };
  try {
    for (const graph of graphs) executor.add(graph);
    const launched = async (report: FinishedLaunch) => {
      reports.push(report);
      if (!isWatched) {
        if (performance.now() - reported >= reportInterval) void flush();
        return;
      }
      // The channel takes some hundred kilobytes at a time, and the rest of a picture only while this thread waits. It waits
      // no longer than the launch took: a parent that is busy must not stop the graphs.
      const patience = new AbortController();
      const over = setTimeout(report.milliseconds, undefined, { signal: patience.signal }).catch(() => {});
      await Promise.race([flush(), over]);
      patience.abort();
    };
    const launching = (index: number) => Atomics.store(running, 0, (BigInt(id) << 16n) + BigInt(index));
    const results = await executor.run(unpack(program, parts), digests, { launching, launched, asked }, workspace);
    void send({ type: "done", id, reports, results });
  } catch (error) {
    const failure =
      error instanceof RunFailure ? error.failure : ({ kind: "runtime", message: messageOf(error) } as const);
    void flush();
    void send({ type: "failed", id, failure });
  } finally {
    Atomics.store(running, 0, -1n);
    pending.delete(id);
    void prepareAhead(executor);
  }
}

/** Compiles what is to be compiled ahead, until a run has come. */
async function prepareAhead(executor: Executor): Promise<void> {
  if (isPreparing) return;
  isPreparing = true;
  while (ahead.length > 0 && pending.size === 0) {
    const digest = ahead.shift()!;
    turn = turn.then(() => executor.prepare(digest));
    await turn;
    // Compiling has blocked this thread: messages wait.
    await setImmediate();
  }
  isPreparing = false;
}

/**
 * Resolves when the message has been written. A channel that has closed is no error here: the watching thread ends this
 * process at that moment.
 */
function send(message: FromHost): Promise<void> {
  let written = () => {};
  const sent = new Promise<void>((resolve) => {
    written = resolve;
  });
  // What cannot be sent at all is thrown here, to whoever sends it.
  if (process.connected) process.send!(message, undefined, undefined, () => written());
  return sent;
}

function watchParent(): Promise<unknown> {
  const code = `
    const { parentPort, workerData } = require("node:worker_threads");
    const { writeSync } = require("node:fs");
    const kill = () => process.kill(process.pid, "SIGKILL");
    // An answer that cannot be written now is not needed: the parent has not read those before.
    const answer = () => { try { writeSync(1, Atomics.load(workerData, 0) + "\\n"); } catch {} };
    new (require("node:net").Socket)({ fd: 0 }).on("data", answer).on("error", kill).on("close", kill);
    parentPort.postMessage("watching");`;
  const thread = new Worker(code, { eval: true, workerData: running });
  return new Promise((resolve) => thread.once("message", resolve));
}
