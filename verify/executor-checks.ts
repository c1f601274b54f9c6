/**
 * What `verify:gpu -- --driver` asks of the executor: the closed forms of the tests (test/support/sampling.ts,
 * test/runtimes/models.ts) through two runtimes on one device, one of which captures. Every result is compared, bit for
 * bit, with what the form gives here.
 */

import { mkdtempSync, rmSync } from "node:fs";
import { open, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { gigabytes } from "../lib/common/memory.js";
import type { Tensor } from "../lib/common/tensor.js";
import { CompileError, MemoryError, NotFiniteError, RuntimeError } from "../lib/errors.js";
import type { Program } from "../lib/program/program.js";
import type { LaunchReport, RunOptions } from "../lib/runtimes/runtime.js";
import { fileIdentity } from "../lib/runtimes/tensorrt/digests.js";
import type { EngineSource } from "../lib/runtimes/tensorrt/engines.js";
import { TensorRtRuntime, type TensorRtRuntimeOptions } from "../lib/runtimes/tensorrt/runtime.js";
import {
  exactPrograms,
  gathering,
  launch,
  negateGraph,
  program,
  scaleGraph,
  slowGraph,
  slowProgram,
} from "../test/runtimes/models.js";
import { SimulatedEngines } from "../test/support/plans.js";
import { cases, draw, requestOf, samplingGraphs, samplingProgram } from "../test/support/sampling.js";

type Results = Record<string, Tensor>;
type Expected = Readonly<Record<string, Float32Array | BigInt64Array>>;

/** @throws Error naming the first value that differs */
function compareBits(actual: Results, expected: Expected): void {
  for (const [name, want] of Object.entries(expected)) {
    const have = actual[name]?.data;
    if (have?.length !== want.length)
      throw new Error(`"${name}" has ${have?.length ?? "no"} values where ${want.length} are expected`);
    const bits = (data: Float32Array | BigInt64Array) =>
      new Uint32Array(data.buffer, data.byteOffset, data.byteLength / 4);
    const [a, b] = [bits(have as Float32Array | BigInt64Array), bits(want)];
    const at = a.findIndex((word, index) => word !== b[index]);
    if (at === -1) continue;
    const index = Math.floor((at * 4) / want.BYTES_PER_ELEMENT);
    throw new Error(`"${name}" has ${have[index]} at ${index}, where the closed form is ${want[index]}: other bits`);
  }
}

function must(condition: boolean, what: string): asserts condition {
  if (!condition) throw new Error(`not so: ${what}`);
}

const rejection = (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    () => null,
    (error: unknown) => error,
  );

/** A schedule with everything that it takes to run it and to know the results. */
interface Example {
  readonly name: string;
  readonly program: Program;
  readonly launches: number;
  readonly expected: Expected;
}

function exampleOf(example: (typeof cases)[number], batch: number): Example {
  const request = requestOf(example, batch);
  const { program: work, latents, image } = samplingProgram(request);
  const drawn = draw(request);
  return {
    name: `${example.name}, batch ${batch}`,
    program: work,
    launches: work.instructions.filter(({ op }) => op === "launch").length,
    expected: { [latents]: drawn.latents, [image]: drawn.image },
  };
}

type Installation = Pick<TensorRtRuntimeOptions, "addon" | "library" | "parser">;

/** Of one device: two runtimes, one of which captures, and what is asked of them. */
export class ExecutorChecks {
  readonly #installation: Installation;
  readonly #runs: number;
  readonly #folder = mkdtempSync(path.join(tmpdir(), "flowturbo-driver-"));
  readonly #engines = new SimulatedEngines(this.#folder);
  readonly #warnings: string[] = [];
  #plain: TensorRtRuntime;
  #capturing: TensorRtRuntime;

  /** @param runs of the mixture */
  constructor(installation: Installation, runs: number) {
    this.#installation = installation;
    this.#runs = runs;
    this.#plain = this.#open();
    this.#capturing = this.#open({ capture: true });
  }

  #open(options: { readonly capture?: boolean; readonly engines?: EngineSource } = {}): TensorRtRuntime {
    const runtime = new TensorRtRuntime({
      ...{ kind: "tensorrt", ...this.#installation, engines: this.#engines },
      logger: { warn: (line) => void this.#warnings.push(line) },
      ...options,
    });
    const sampling = [...samplingGraphs(true), ...samplingGraphs(false)];
    for (const graph of new Map(sampling.map((each) => [each.name, each])).values()) runtime.add(graph);
    runtime.add(scaleGraph("double", 2));
    runtime.add(scaleGraph("huge", 3e38));
    runtime.add(negateGraph("negate"));
    runtime.add(slowGraph("slow", 16, 2));
    return runtime;
  }

  async dispose(): Promise<void> {
    await Promise.all([this.#plain.dispose(), this.#capturing.dispose()]);
  }

  removeFolder(): void {
    rmSync(this.#folder, { recursive: true, force: true });
  }

  /** In their order: each tells in a few words what was done, or throws. */
  *checks(): Generator<readonly [name: string, body: () => Promise<string>]> {
    yield ["the device opens", () => this.#opens()];
    for (const { name, program: work, expected } of exactPrograms)
      yield [`a program ${name}`, async () => this.#runsExactly(work, expected)];
    for (const example of cases) yield [`schedule ${example.name}, launch by launch`, () => this.#launches(example)];
    for (const example of cases) yield [`schedule ${example.name}, as one CUDA graph`, () => this.#replays(example)];
    yield ["an engine gains a profile for new shapes, and keeps the old ones", () => this.#gainsProfiles()];
    yield ["a workspace gathers rows of several registers", () => this.#gathers()];
    yield ["a failed submission leaves other registers alone", () => this.#isolates()];
    yield ["NaN and infinities are found, and named by their launch", () => this.#findsNotFinite()];
    yield ["an abort stops at whichever launch it comes", () => this.#aborts()];
    yield ["launches are timed by the device's clock", () => this.#timesLaunches()];
    yield ["two runtimes share engines, and their programs do not mix", () => this.#shares()];
    yield ["what does not fit into the device's memory is refused with numbers", () => this.#refusesTooLarge()];
    yield ["a damaged plan is refused, and the next program runs", () => this.#refusesDamaged()];
    yield [`${this.#runs} runs in mixture: the same bits, and no more memory`, () => this.#mixture()];
    yield ["closed and opened again, it draws the same bits", () => this.#reopens()];
  }

  async #opens(): Promise<string> {
    const { device } = await this.#plain.start();
    const { free, total } = await this.#memory();
    must(free > 0 && free <= total, "the device has free memory");
    return `${device.name}, ${gigabytes(free)} of ${gigabytes(total)} GB free`;
  }

  async #runsExactly(work: Program, expected: Expected): Promise<string> {
    for (const runtime of [this.#plain, this.#capturing, this.#capturing])
      compareBits(await runtime.run(work), expected);
    return "plain, captured and replayed";
  }

  async #launches(example: (typeof cases)[number]): Promise<string> {
    let launches = 0;
    for (const batch of [1, 2, 3, 4]) {
      const { program: work, expected } = exampleOf(example, batch);
      const reports: LaunchReport[] = [];
      compareBits(await this.#plain.run(work, { onLaunch: (report) => void reports.push(report) }), expected);
      const asked = work.instructions.filter(({ op }) => op === "launch");
      must(
        reports.length === asked.length && reports.every(({ launch: each }, index) => each === asked[index]),
        "each launch is reported once, in order",
      );
      must(
        reports.every(({ milliseconds }) => milliseconds > 0),
        "each launch takes time",
      );
      launches += reports.length;
    }
    return `${launches} launches, batches 1 to 4`;
  }

  async #replays(example: (typeof cases)[number]): Promise<string> {
    const before = this.#counters().replays;
    for (const batch of [1, 3]) {
      const { program: work, expected, launches } = exampleOf(example, batch);
      for (let run = 0; run < 3; run++) {
        let reports = 0;
        compareBits(await this.#capturing.run(work, { onLaunch: () => void reports++ }), expected);
        must(reports === launches, "each launch of a CUDA graph is reported once");
      }
    }
    this.#mustCapture(this.#counters().replays - before, 4);
    return "4 replays of 6 runs";
  }

  #mustCapture(replays: number, wanted: number): void {
    must(
      replays === wanted,
      `${wanted} runs are replayed as one CUDA graph; ${replays} were. ${this.#warnings.join(" ")}`,
    );
  }

  async #gainsProfiles(): Promise<string> {
    await using runtime = this.#open();
    for (const values of [[1, 2], [1, 2, 3], [5, 6], [7]])
      compareBits(await runtime.run(program(values, [launch("double", "x", "a")], ["a"])), {
        a: Float32Array.from(values, (value) => 2 * value),
      });
    return "3 profiles";
  }

  async #gathers(): Promise<string> {
    const workspace = this.#plain.open();
    for (const value of [1, 0.1, -7]) {
      const { submissions, expected } = gathering(value, 10 * value);
      const [, , shared] = await Promise.all(submissions.map((each) => workspace.submit(each)));
      compareBits(shared!, scalars(expected));
      workspace.free(["p", "q", "p.x", "q.x", "wide", "out"]);
    }
    workspace.close();
    return "3 times, freed in between";
  }

  async #isolates(): Promise<string> {
    const workspace = this.#plain.open();
    const submission = (graph: string, x: string, y: string, results: string[]): Program => ({
      ...program([0], [launch(graph, x, y, { mustBeFinite: [y] })], results),
      constants: {},
    });
    const [, failed, dependent, other] = await Promise.all([
      workspace.submit(program([1], [launch("double", "x", "c")], [])),
      rejection(workspace.submit(submission("huge", "c", "a", []))),
      rejection(workspace.submit(submission("double", "a", "b", ["b"]))),
      workspace.submit(submission("double", "c", "d", ["d"])),
    ]);
    workspace.close();
    must(failed instanceof NotFiniteError, "2 times 3e38 is not finite");
    must(
      dependent instanceof RuntimeError && /"a", which has no value/.test(dependent.message),
      "what reads it is refused",
    );
    compareBits(other, scalars({ d: 4 }));
    return "";
  }

  async #findsNotFinite(): Promise<string> {
    const names = ["a", "b", "c", "d"];
    for (let at = 0; at < names.length; at++) {
      const work = program(
        [1, 2],
        names.map((name, index) =>
          launch(index === at ? "huge" : "double", index === 0 ? "x" : names[index - 1]!, name, {
            mustBeFinite: [name],
          }),
        ),
        ["d"],
      );
      for (const runtime of [this.#plain, this.#capturing]) {
        const error = await rejection(runtime.run(work));
        must(error instanceof NotFiniteError, `an infinity is found in ${names[at]}`);
        const where = work.instructions[at] as { label: { name: string } };
        must(error.where === where.label.name, `it is ${where.label.name}, not ${error.where}`);
      }
    }
    return "at each of 4 launches, captured or not";
  }

  async #aborts(): Promise<string> {
    const example = exampleOf(cases.find(({ name }) => name === "two stages")!, 2);
    for (let stop = 1; stop <= example.launches; stop++) {
      const controller = new AbortController();
      const reason = new Error(`at ${stop}`);
      let reports = 0;
      const onLaunch = () => {
        if (++reports === stop) controller.abort(reason);
      };
      const error = await rejection(this.#plain.run(example.program, { signal: controller.signal, onLaunch }));
      must(error === reason && reports === stop, `launch ${stop} is the last one that is reported`);
      compareBits(await this.#plain.run(example.program), example.expected);
    }
    // Of a thousand launches of 2 ms those that the device has been given are few.
    const before = this.#counters().launches;
    const controller = new AbortController();
    let reports = 0;
    const run = this.#plain.run(slowProgram("slow", 16, 1000), {
      signal: controller.signal,
      onLaunch: () => {
        if (++reports === 2) controller.abort();
      },
    });
    must((await rejection(run)) !== null, "an abort rejects");
    // Behind what is left of it.
    await this.#plain.run(program([1], [launch("double", "x", "a")], ["a"]));
    const made = this.#counters().launches - before;
    must(made < 100, `the device makes no more of 1000 launches than it has been given; it made ${made}`);
    // As one graph it cannot be stopped, but the caller is answered, and the next run is whole.
    const early = new AbortController();
    const captured = this.#capturing.run(example.program, { signal: early.signal });
    early.abort(new Error("early"));
    must((await rejection(captured)) === early.signal.reason, "a captured run that is aborted rejects with the reason");
    compareBits(await this.#capturing.run(example.program), example.expected);
    return `at each of ${example.launches} launches; ${made - 1} of 1000 slow ones were made`;
  }

  async #timesLaunches(): Promise<string> {
    const times: number[] = [];
    await this.#plain.run(slowProgram("slow", 16, 5), {
      onLaunch: ({ milliseconds }) => void times.push(milliseconds),
    });
    const text = times.map((time) => time.toFixed(2)).join(", ");
    must(
      times.length === 5 && times.every((time) => time > 0.9 && time < 500),
      `5 launches of 2 ms take that; ${text}`,
    );
    return `5 launches of 2 ms: ${text} ms`;
  }

  async #shares(): Promise<string> {
    await using one = this.#open();
    await using other = this.#open();
    const example = exampleOf(cases.find(({ name }) => name === "R")!, 2);
    await one.run(example.program);
    const { engines } = this.#counters();
    const all = await Promise.all(
      Array.from({ length: 12 }, (_, index) => (index % 2 ? other : one).run(example.program)),
    );
    for (const results of all) compareBits(results, example.expected);
    must(this.#counters().engines === engines, "the second runtime loads no engine again");
    return `12 programs at once, ${engines} engines in all`;
  }

  async #refusesTooLarge(): Promise<string> {
    const { total } = await this.#memory();
    const work = program([1], [launch("double", "x", "a")], ["a"]);
    const vast = { ...work, registers: { ...work.registers, vast: { dtype: "float32", shape: [total] } } } as const;
    const error = await rejection(this.#plain.run(vast));
    must(error instanceof MemoryError, `four times the device's memory is refused: ${error}`);
    must(error.needed >= 4 * total && error.available <= total, "both numbers are given");
    compareBits(await this.#plain.run(work), scalars({ a: 2 }));
    return `${gigabytes(error.needed)} GB asked for, ${gigabytes(error.available)} GB free`;
  }

  async #refusesDamaged(): Promise<string> {
    const plan = path.join(this.#folder, "damaged.plan");
    await writeFile(plan, "no plan at all");
    await using handle = await open(plan);
    const identity = await fileIdentity(handle);
    const engines: EngineSource = { engineFor: async () => ({ plan, identity }) };
    await using broken = this.#open({ engines });
    const work = program([1], [launch("double", "x", "a")], ["a"]);
    must((await rejection(broken.run(work))) instanceof CompileError, "it is refused by name");
    compareBits(await this.#plain.run(work), scalars({ a: 2 }));
    return "";
  }

  /** Plain and captured programs and submissions of workspaces, three at a time, some of them aborted. */
  async #mixture(): Promise<string> {
    const plain = cases.flatMap((example) => [1, 2].map((batch) => exampleOf(example, batch)));
    // As many as are kept.
    const captured = ["E", "R", "without guidance", "two stages"].map((name) =>
      exampleOf(cases.find((each) => each.name === name)!, 2),
    );
    const workspace = this.#plain.open();
    let state = 1;
    const random = (below: number) => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    const counts = { plain: 0, captured: 0, workspace: 0, aborted: 0 };
    const one = async (number: number) => {
      const kind = random(20);
      if (kind < 7) {
        const { program: work, expected } = plain[random(plain.length)]!;
        compareBits(await this.#plain.run(work), expected);
        counts.plain++;
      } else if (kind < 14) {
        const { program: work, expected } = captured[random(captured.length)]!;
        compareBits(await this.#capturing.run(work), expected);
        counts.captured++;
      } else if (kind < 17) {
        const { submissions, expected } = gathering(number, number / 3);
        // Names of its own, since others may be under way.
        const renamed = submissions.map((each) => renamedTo(`${number}`, each));
        const results = await Promise.all(renamed.map((each) => workspace.submit(each)));
        const shared = Object.fromEntries(
          Object.entries(results[2]!).map(([name, tensor]) => [name.split(" ")[0]!, tensor]),
        );
        compareBits(shared, scalars(expected));
        workspace.free(renamed.flatMap((each) => [...Object.keys(each.registers), ...Object.keys(each.constants)]));
        counts.workspace++;
      } else {
        const { program: work, launches } = plain[random(plain.length)]!;
        const stop = random(launches);
        const controller = new AbortController();
        let reports = 0;
        const options: RunOptions = {
          signal: controller.signal,
          onLaunch: () => {
            if (++reports > stop) controller.abort(new Error("stopped"));
          },
        };
        must(
          (await rejection(this.#plain.run(work, options))) === controller.signal.reason,
          "an abort rejects with its reason",
        );
        counts.aborted++;
      }
    };
    let next = 0;
    const until = (end: number) =>
      Promise.all(
        Array.from({ length: 3 }, async () => {
          try {
            while (next < end) await one(next++);
          } catch (error) {
            // The others end with what they have begun.
            next = end;
            throw error;
          }
        }),
      );

    // Everything once, and what is kept for later filled up.
    for (const { program: work } of captured) await this.#capturing.run(work);
    for (const { program: work } of plain) await this.#plain.run(work);
    const warmUp = Math.min(100, Math.floor(this.#runs / 4));
    await until(warmUp);
    const own = () => this.#counters().deviceBytes + this.#counters().pinnedBytes;
    const [bytes, free, replays, capturedBefore] = [
      own(),
      (await this.#memory()).free,
      this.#counters().replays,
      counts.captured,
    ];
    await until(this.#runs + warmUp);
    workspace.close();
    const grown = own() - bytes;
    const taken = free - (await this.#memory()).free;
    this.#mustCapture(this.#counters().replays - replays, counts.captured - capturedBefore);
    must(grown <= bytes / 2 + 2 ** 20, `the executor's ${bytes} bytes have not grown; they have by ${grown}`);
    must(taken <= 2 ** 25, `the device has as much free memory as before; it has ${taken} bytes less`);
    const texts = Object.entries(counts).map(([name, count]) => `${count} ${name}`);
    return `${texts.join(", ")}; ${grown} bytes more of the executor's ${bytes}, ${taken} of the device's`;
  }

  async #reopens(): Promise<string> {
    await this.dispose();
    const example = exampleOf(cases.find(({ name }) => name === "R")!, 2);
    for (let time = 0; time < 3; time++) {
      await using runtime = this.#open();
      compareBits(await runtime.run(example.program), example.expected);
    }
    return "3 times";
  }

  #counters() {
    const statistics = this.#plain.statistics();
    must(statistics !== null, "the executor is open");
    return statistics;
  }

  async #memory() {
    const { executor } = this.#plain.device;
    must(executor !== null, "the executor is open");
    return executor.memory().promise;
  }
}

const scalars = (values: Readonly<Record<string, number>>): Expected =>
  Object.fromEntries(Object.entries(values).map(([name, value]) => [name, Float32Array.of(value)]));

/** The same program with other names for its registers and constants. */
function renamedTo(suffix: string, work: Program): Program {
  const name = (old: string) => `${old} ${suffix}`;
  const keys = <Value>(record: Readonly<Record<string, Value>>) =>
    Object.fromEntries(Object.entries(record).map(([old, value]) => [name(old), value]));
  const values = (record: Readonly<Record<string, string>>) =>
    Object.fromEntries(Object.entries(record).map(([key, old]) => [key, name(old)]));
  return {
    registers: keys(work.registers),
    constants: keys(work.constants),
    instructions: work.instructions.map((each) =>
      each.op === "launch"
        ? { ...each, inputs: values(each.inputs), outputs: values(each.outputs) }
        : { ...each, from: name(each.from), to: name(each.to) },
    ),
    results: work.results.map(name),
  };
}
