// Mixed requests at the same time on the embedded model, with aborts, launches that fail and a runtime that is killed: every
// promise settles once, nothing stays behind, and every picture equals the one drawn alone.
//   SOAK_REQUESTS=1000 npx vitest run test/serving/soak.test.ts   (npm run bench:soak)
import { readFileSync, rmSync } from "node:fs";
import { mkdtemp } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { setTimeout } from "node:timers/promises";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { RuntimeDiedError } from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/flowturbo.js";
import type { GenerateOptions } from "../../lib/model.js";
import type { Launch, Program } from "../../lib/program/program.js";
import type { OnnxRuntimeOptions } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import type { Workspace } from "../../lib/runtimes/runtime.js";
import { type Bundles, bundle } from "../runtimes/build.js";
import { relativeError } from "../support/fixtures.js";
import { hosts } from "../support/hosts.js";
import { withValues } from "../support/with-values.js";

const requests = Number(process.env.SOAK_REQUESTS ?? 60);
const callers = 12;
const share = { aborted: 0.1, failing: 0.01, killing: requests > 500 ? 0.001 : 0.004 };

/** What the tests tell the runtime, and what it tells them. */
const injected = vi.hoisted(() => ({
  host: undefined as URL | undefined,
  decide: (): "ok" | "fails" | "dies" => "ok",
  failures: 0,
  kills: 0,
  /** Names that workspaces hold now. */
  kept: new Set<string>(),
}));

vi.mock("../../lib/runtimes/onnxruntime/onnxruntime.js", async (original) => {
  const { OnnxRuntime, ...rest } = await original<typeof import("../../lib/runtimes/onnxruntime/onnxruntime.js")>();
  return {
    ...rest,
    OnnxRuntime: class extends OnnxRuntime {
      constructor(options: OnnxRuntimeOptions) {
        super({ ...options, host: injected.host });
      }
      override open(): Workspace {
        const workspace = super.open();
        injected.kept.clear();
        return {
          get lost() {
            return workspace.lost;
          },
          submit: (submission, options) => {
            const fate = injected.decide();
            if (fate === "fails") injected.failures++;
            if (fate === "dies") {
              injected.kills++;
              for (const child of hosts()) process.kill(child, "SIGKILL");
            }
            for (const name of [...Object.keys(submission.registers), ...Object.keys(submission.constants)])
              injected.kept.add(name);
            return workspace.submit(fate === "fails" ? broken(submission) : submission, options);
          },
          free: (names) => {
            for (const name of names) injected.kept.delete(name);
            workspace.free(names);
          },
          close: () => workspace.close(),
        };
      }
    },
  };
});

/** A submission whose last launch fails: it is given a tensor of a wrong rank. */
function broken(submission: Program): Program {
  const instructions = [...submission.instructions];
  const at = instructions.findLastIndex(({ op }) => op === "launch");
  const launch = instructions[at] as Launch;
  const [input] = Object.keys(launch.inputs);
  const tensor = float32([1, 1, 1, 1, 1, 1, 1], new Float32Array(1));
  const constants = { ...submission.constants, [`broken ${injected.failures}`]: { kind: "value", tensor } as const };
  instructions[at] = { ...launch, inputs: { ...launch.inputs, [input!]: `broken ${injected.failures}` } };
  return { ...submission, instructions, constants };
}

const residentBytes = (pid: number) =>
  Number(readFileSync(`/proc/${pid}/status`, "utf8").match(/^VmRSS:\s+(\d+)/m)![1]) * 1024;

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

let bundles: Bundles;
let cache: string;
beforeAll(async () => {
  bundles = await bundle();
  injected.host = bundles.host;
  cache = await mkdtemp(path.join(os.tmpdir(), "flowturbo-soak-"));
});
afterAll(() => {
  bundles.remove();
  rmSync(cache, { recursive: true, force: true });
});

const gradient = {
  width: 32,
  height: 32,
  data: Uint8Array.from({ length: 32 * 32 * 3 }, (_, index) => (index * 7) % 256),
};
const mask = {
  width: 32,
  height: 32,
  data: Uint8Array.from({ length: 32 * 32 * 3 }, (_, index) => (index % 96 < 48 ? 255 : 0)),
};
const square = (side: number) => ({ width: side, height: side });
/** Kinds of requests: schedules, sizes, guidance, numbers of pictures, edits, stages, previews. */
const kinds: GenerateOptions[] = [
  { prompt: "a red circle", ...square(16), blocks: "H1P2R1", seed: 1 },
  { prompt: "a red circle", ...square(16), blocks: "H1P2R1", seed: 2, guidanceScale: 7 },
  { prompt: "a blue square", ...square(16), blocks: "H1P4R2", seed: 3, count: 3 },
  { prompt: "a green star", ...square(32), blocks: "H1P1", seed: 4 },
  { prompt: "a green star", ...square(32), sampler: "euler", steps: 4, seed: 5, guidanceScale: 1 },
  { prompt: ["a red circle", "a blue square"], ...square(32), blocks: "H1P1R1", seed: 6, negativePrompt: "green" },
  { prompt: "a small triangle", ...square(16), sampler: "heun", steps: 2, seed: 7, preview: "fast" },
  { prompt: "a small triangle", ...square(32), blocks: "H1P2", seed: 8, image: gradient, strength: 0.7 },
  { prompt: "a small triangle", ...square(32), blocks: "H1P3R1", seed: 9, image: gradient, mask },
  {
    prompt: "a large circle",
    seed: 10,
    count: 2,
    stages: [
      { ...square(16), blocks: "H1P1" },
      { ...square(32), blocks: "H1" },
    ],
  },
  { prompt: "a large circle", width: 32, height: 16, blocks: "H1P2R1", seed: 11, maxSequenceLength: 8 },
];

it(`${requests} mixed requests with aborts and failures`, { timeout: 3_600_000 }, async () => {
  const model = await FlowTurbo.load(undefined, { cache, maxQueue: 10 * callers, measureCosts: false });
  const references: { latents: FloatTensor; pixels: FloatTensor }[] = [];
  for (const kind of kinds) references.push(await withValues(model, kind));

  let state = 20240917;
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  let submissions = 0;
  injected.decide = () => {
    // What chance brings depends on the order of arrivals, and so on the machine; one failure is certain.
    if (++submissions === 20) return "fails";
    const draw = random();
    return draw < share.killing ? "dies" : draw < share.killing + share.failing ? "fails" : "ok";
  };
  const counts = { completed: 0, aborted: 0, failed: 0 };
  const aborted = new Error("aborted");
  const memory: { heap: number; resident: number; host: number | null; hostBytes: number }[] = [];
  const measure = () => {
    collect();
    collect();
    // The runtime's process may just have been killed.
    const [host = null] = hosts();
    let hostBytes = 0;
    try {
      if (host !== null) hostBytes = residentBytes(host);
    } catch {}
    memory.push({ heap: process.memoryUsage().heapUsed, resident: residentBytes(process.pid), host, hostBytes });
  };
  let next = 0;
  const caller = async () => {
    while (next < requests) {
      const number = next++;
      if (number % Math.ceil(requests / 8) === 0) measure();
      const kind = Math.floor(random() * kinds.length);
      const controller = new AbortController();
      if (random() < share.aborted) void setTimeout(random() * 300).then(() => controller.abort(aborted));
      let settled = 0;
      const call = withValues(model, {
        ...kinds[kind]!,
        priority: Math.floor(random() * 3),
        signal: controller.signal,
        onStep: () => expect(settled).toBe(0),
      });
      await call.then(
        ({ latents, pixels }) => {
          settled++;
          counts.completed++;
          expect(relativeError(latents, references[kind]!.latents), `request ${number}, kind ${kind}`).toBeLessThan(
            1e-5,
          );
          expect(relativeError(pixels, references[kind]!.pixels), `request ${number}, kind ${kind}`).toBeLessThan(1e-5);
        },
        (error) => {
          settled++;
          if (error === aborted) counts.aborted++;
          else {
            counts.failed++;
            expect(error).toSatisfy(
              (reason) =>
                reason instanceof RuntimeDiedError || /^The graph ".*" \(.*\) failed: /.test((reason as Error).message),
            );
          }
        },
      );
      expect(settled).toBe(1);
    }
  };
  await Promise.all(Array.from({ length: callers }, caller));
  measure();

  const { requests: totals, running, queue, launches, rowsPerLaunch } = model.stats();
  expect(counts.completed + counts.aborted + counts.failed).toBe(requests);
  expect(totals).toMatchObject({ completed: counts.completed + kinds.length, failed: counts.failed });
  expect(totals.refused).toEqual({ queueFull: 0, deadline: 0, impossible: 0 });
  expect(totals.accepted).toBe(totals.completed + totals.failed + totals.aborted);
  // Some are aborted before they are accepted, while their originals are being read.
  expect(totals.aborted).toBeLessThanOrEqual(counts.aborted);
  expect([running, queue.waiting]).toEqual([{ requests: 0, pictures: 0 }, 0]);
  // The disturbances took place, rows did share launches, and still most requests were answered.
  expect(injected.failures).toBeGreaterThan(0);
  expect(Math.max(...Object.keys(rowsPerLaunch).map(Number))).toBeGreaterThan(1);
  expect(counts.completed).toBeGreaterThan(0.7 * requests);
  injected.decide = () => "ok";
  await withValues(model, kinds[0]!);
  // Between requests the runtime holds nothing.
  expect([...injected.kept]).toEqual([]);
  const megabytes = (key: "heap" | "resident" | "hostBytes") => memory.map((at) => Math.round(at[key] / 1e6));
  console.info(
    JSON.stringify({ requests, ...counts, ...injected, host: undefined, kept: 0, launches, heap: megabytes("heap"), resident: megabytes("resident"), runtime: megabytes("hostBytes") }), // biome-ignore format: one line
  );
  // From the second eighth on: before, code is still being compiled.
  expect(memory.at(-1)!.heap - memory[1]!.heap).toBeLessThan(12e6);
  expect(memory.at(-1)!.resident - memory[1]!.resident).toBeLessThan(requests > 500 ? 60e6 : 120e6);
  // The runtime's process, as long as it is the same, from its second eighth on.
  for (const [index, { host, hostBytes }] of memory.entries()) {
    const first = memory.findIndex((at) => at.host === host) + 1;
    if (requests > 500 && host !== null && index > first)
      expect(hostBytes - memory[first]!.hostBytes).toBeLessThan(100e6);
  }
  const children = hosts();
  expect(children).toHaveLength(1);
  expect(residentBytes(children[0]!)).toBeLessThan(600e6);
  await model.dispose();
  expect(hosts()).toEqual([]);
});
