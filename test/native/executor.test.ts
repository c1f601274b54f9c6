// What the runtimes on a GPU can do wrong that others cannot, on the simulated device: leaks, errors of each single call
// of the driver, aborts at each launch, memory that does not suffice, engines that are shared, plans that do not fit.
import { writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import {
  CacheError,
  CompileError,
  DeviceLostError,
  FlowTurboError,
  MemoryError,
  RuntimeError,
} from "../../lib/errors.js";
import type { Program } from "../../lib/program/program.js";
import type { LaunchReport } from "../../lib/runtimes/runtime.js";
import { fileIdentity } from "../../lib/runtimes/tensorrt/digests.js";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import type { TensorRtRuntime, TensorRtRuntimeOptions } from "../../lib/runtimes/tensorrt/runtime.js";
import { addGraphs, double, values } from "../runtimes/contract.js";
import { closedForms, launch, program, scaleGraph } from "../runtimes/models.js";
import { cases, draw, requestOf, samplingGraphs, samplingProgram } from "../support/sampling.js";
import { leftOver, planText, SimulatedEngines, simulated, simulatedRuntime } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const folder = temporaryFolder();
const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

describeAddons("the executor", () => {
  describe.each(["tensorrt", "tensorrt-rtx"] as const)("on %s", (kind) => {
    const opened: TensorRtRuntime[] = [];
    const start = (
      options: Partial<TensorRtRuntimeOptions> = {},
      engines: EngineSource = new SimulatedEngines(folder),
    ) => {
      const runtime = simulatedRuntime(kind, engines, options);
      addGraphs(runtime);
      for (const graph of samplingGraphs(true)) runtime.add(graph);
      opened.push(runtime);
      return runtime;
    };
    beforeEach(() => simulated.reset());
    afterEach(async () => {
      simulated.let(-1);
      simulated.failAt(0, 0);
      await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
      expect(simulated.violation()).toBe("");
      await vi.waitFor(() => expect(leftOver()).toEqual({}));
      simulated.reset();
    });
    const request = requestOf(cases.find(({ name }) => name === "two stages")!, 3);
    const sampling = samplingProgram(request);
    const expected = draw(request);
    const launches = sampling.program.instructions.filter(({ op }) => op === "launch").length;
    const check = async (runtime: TensorRtRuntime) => {
      const results = await runtime.run(sampling.program);
      expect(results[sampling.latents]!.data).toEqual(expected.latents);
      expect(results[sampling.image]!.data).toEqual(expected.image);
    };

    it.each([false, true])(
      "leaks nothing in 1,000 runs (capture: %s)",
      async (capture) => {
        const runtime = start({ capture });
        for (let run = 0; run < 10; run++) await check(runtime);
        const before = leftOver();
        const memory = process.memoryUsage().rss;
        for (let run = 0; run < 1000; run++) await runtime.run(sampling.program);
        // What is kept for later runs (transfer memory, events) may yet grow by a few.
        for (const [name, count] of Object.entries(leftOver()))
          expect(count, name).toBeLessThanOrEqual(before[name as keyof typeof before]! * 1.5 + 4);
        // A run carries some 100 kB: what it should give back would be seen. A sanitizer keeps freed memory for a while.
        expect(process.memoryUsage().rss - memory).toBeLessThan(process.env.FLOWTURBO_ADDON_DIR ? 600e6 : 120e6);
        await check(runtime);
      },
      120_000,
    );

    it("stops at whichever launch it is aborted, and goes on with the next program", async () => {
      const runtime = start();
      await check(runtime);
      for (let stop = 0; stop < launches; stop++) {
        simulated.reset();
        simulated.hold();
        const controller = new AbortController();
        let reports = 0;
        const running = rejection(
          runtime.run(sampling.program, { signal: controller.signal, onLaunch: () => void reports++ }),
        );
        simulated.let(stop);
        await vi.waitFor(() => expect(simulated.counts().kernels).toBe(stop));
        controller.abort(`at ${stop}`);
        simulated.let(-1);
        expect(await running).toBe(`at ${stop}`);
        expect(reports).toBeLessThanOrEqual(stop);
        // One that the device works on, and one that is queued behind it.
        expect(simulated.counts().kernels).toBeLessThanOrEqual(stop + 2);
        await check(runtime);
      }
    });

    it("reports an error of every single call of the driver, and runs again after it", async () => {
      const runtime = start();
      await check(runtime);
      simulated.reset();
      await runtime.dispose();
      const life = async () => {
        await using fresh = start();
        await fresh.run(sampling.program);
      };
      simulated.reset();
      await life();
      const { calls } = simulated.counts();
      expect(calls).toBeGreaterThan(100);
      const reported = new Set<string>();
      // Out of memory, an invalid value, a launch that failed for good.
      for (const code of [2, 1, 719])
        for (let call = 1; call <= calls; call++) {
          const fresh = start();
          simulated.reset();
          simulated.failAt(call, code);
          // What fails while a run's memory is freed is an error of the next one.
          const error =
            (await rejection(fresh.run(sampling.program))) ?? (await rejection(fresh.run(sampling.program)));
          const failed = simulated.failed();
          simulated.failAt(0, 0);
          if (error !== null) {
            expect(error, `${failed} answered ${code}: ${(error as Error).stack}`).toBeInstanceOf(FlowTurboError);
            reported.add(error.code);
          }
          // The same object runs again, unless the device is lost: then it says so again and again, and so do others.
          const late = await rejection(check(fresh));
          if (late) {
            expect({ code, late }).toEqual({ code: 719, late: expect.any(DeviceLostError) });
            expect(await rejection(check(fresh))).toBe(late);
            expect(await rejection(start().start())).toBeInstanceOf(DeviceLostError);
          }
          await Promise.all(opened.splice(0).map((runtime) => runtime.dispose()));
          expect(simulated.violation()).toBe("");
          // A new process.
          simulated.reset();
        }
      for (const code of ["MEMORY", "LAUNCH", "DEVICE_LOST", "RUNTIME_UNAVAILABLE"])
        expect([...reported]).toContain(`ERR_FLOWTURBO_${code}`);
    }, 300_000);

    it("names the launch that failed on the device", async () => {
      const runtime = start();
      const work = program([1, 2], [double("x", "a"), double("a", "b"), double("b", "c")], ["c"]);
      await runtime.run(work);
      simulated.failKernel(2, 719);
      expect(await rejection(runtime.run(work))).toBeInstanceOf(DeviceLostError);
    });

    it("rejects what runs, what waits and what comes when the device is lost, without asking it again", async () => {
      const runtime = start();
      await check(runtime);
      simulated.hold();
      const first = rejection(runtime.run(sampling.program));
      const second = rejection(runtime.run(sampling.program));
      // After both have been submitted.
      await runtime.unload([]);
      simulated.failKernel(1, 700);
      simulated.let(-1);
      expect(await first).toBeInstanceOf(DeviceLostError);
      const lost = await second;
      expect(lost).toBeInstanceOf(DeviceLostError);
      expect(lost.message).toMatch(/lost the GPU: .*700.* this process must be restarted/);
      await vi.waitFor(() => expect(leftOver()).toEqual({}));
      const { calls } = simulated.counts();
      for (const call of [() => runtime.run(sampling.program), () => runtime.start(), async () => runtime.open()]) {
        const error = await rejection(call());
        expect(error).toBeInstanceOf(DeviceLostError);
        expect(error.message).toBe(lost.message);
      }
      expect(simulated.counts().calls).toBe(calls);
    });

    it("loses the device for all runtimes on it, idle ones and new ones too", async () => {
      const told: string[] = [];
      const listenerOf = (name: string) => ({
        lost: (error: Error) => told.push(`${name} lost by ${error.constructor.name}`),
        restarted: () => told.push("restarted"),
        silent: () => told.push("silent"),
      });
      const [one, idle] = [start({ listener: listenerOf("one") }), start({ listener: listenerOf("idle") })];
      await check(one);
      await check(idle);
      const workspace = idle.open();
      simulated.failKernel(1, 719);
      expect(await rejection(one.run(sampling.program))).toBeInstanceOf(DeviceLostError);
      expect(told).toEqual(["one lost by DeviceLostError", "idle lost by DeviceLostError"]);
      const late = start({ listener: listenerOf("late") });
      for (const runtime of [one, idle, late])
        expect(await rejection(runtime.run(sampling.program))).toBeInstanceOf(DeviceLostError);
      expect(workspace.lost).toBe(true);
      expect(await rejection(workspace.submit(sampling.program))).toBeInstanceOf(DeviceLostError);
      expect(told.slice(2)).toEqual(["late lost by DeviceLostError"]);
    });

    it("says once why a program is not captured, and does not try again", async () => {
      const warnings: string[] = [];
      const runtime = start({ capture: true, logger: { warn: (message) => void warnings.push(message) } });
      simulated.refuseCaptures(true);
      for (let run = 0; run < 3; run++) await check(runtime);
      expect(simulated.counts().captures).toBe(1);
      expect(warnings).toEqual([expect.stringMatching(/launch by launch, not as one CUDA graph: .*900/)]);
      simulated.refuseCaptures(false);
      await check(runtime);
      expect(simulated.counts()).toMatchObject({ captures: 1, graphLaunches: 0 });
    });

    it("counts all memory that it takes on the device", async () => {
      const runtime = start();
      await check(runtime);
      const { deviceBytes, weightBytes, contextBytes } = runtime.statistics()!;
      expect(deviceBytes + weightBytes + contextBytes).toBe(simulated.counts().deviceBytes);
      expect(Math.min(deviceBytes, contextBytes)).toBeGreaterThan(0);
    });

    it("waits for its run when it is disposed of, and frees everything", async () => {
      const runtime = start();
      await check(runtime);
      simulated.hold();
      const running = runtime.run(sampling.program);
      await vi.waitFor(() => expect(simulated.counts().uploads).toBeGreaterThan(1));
      const order: string[] = [];
      const disposal = runtime.dispose().then(() => order.push("disposed"));
      void running.then(() => order.push("ended"));
      simulated.let(-1);
      expect((await running)[sampling.image]!.data).toEqual(expected.image);
      await disposal;
      expect(order).toEqual(["ended", "disposed"]);
      expect(leftOver()).toEqual({});
    });

    describe("engines", () => {
      it("are loaded once for all runtimes of a process", async () => {
        const engines = new SimulatedEngines(folder);
        const [one, two] = [start({}, engines), start({}, engines)];
        await Promise.all([check(one), check(two)]);
        const graphs = new Set(engines.requests.map(({ graph }) => graph)).size;
        expect(simulated.counts().engines).toBe(graphs);
        await one.dispose();
        expect(simulated.counts().engines).toBe(graphs);
        await check(two);
      });

      it("give their memory back when they are unloaded", async () => {
        const runtime = start();
        await check(runtime);
        const { engines } = simulated.counts();
        await runtime.unload(["predict.guidance", "refine.guidance"]);
        await vi.waitFor(() => expect(simulated.counts().engines).toBe(engines - 2));
        await check(runtime);
      });

      it("gain a profile when a program brings new shapes, and keep the old ones", async () => {
        const engines = new SimulatedEngines(folder);
        const runtime = start({}, engines);
        const run = async (x: number[]) => values((await runtime.run(program(x, [double("x", "a")], ["a"]))).a);
        expect(await run([1, 2])).toEqual([2, 4]);
        expect(await run([1, 2, 3])).toEqual([2, 4, 6]);
        expect(await run([5, 6])).toEqual([10, 12]);
        expect(engines.requests.map(({ profiles }) => profiles)).toEqual([[{ x: [2] }], [{ x: [2] }, { x: [3] }]]);
      });
    });

    describe("memory that does not suffice", () => {
      const large = (name: string, weights: number) => {
        const graph = scaleGraph(name, 2);
        closedForms.set(graph, { ...closedForms.get(graph)!, weights });
        return graph;
      };
      const on = (graph: string): Program => program([1, 2], [launch(graph, "x", "a")], ["a"]);

      it("is refused with both numbers, and the runtime goes on", async () => {
        simulated.capacity(8e6);
        const runtime = start();
        runtime.add(large("too large", 9e6));
        const error = await rejection(runtime.run(on("too large")));
        expect(error).toBeInstanceOf(MemoryError);
        expect(error.needed).toBeGreaterThanOrEqual(9e6);
        expect(error.available).toBeLessThanOrEqual(8e6);
        expect(error.message).toMatch(
          /needs about 0\.0090 GB of GPU memory, but 0\.00\d+ GB are free.*keepTextEncoders/,
        );
        expect(values((await runtime.run(on("double"))).a)).toEqual([2, 4]);
      });

      it("is freed by releasing engines that the program does not launch", async () => {
        simulated.capacity(8e6);
        const warnings: string[] = [];
        const runtime = start({ logger: { warn: (message) => void warnings.push(message) } });
        runtime.add(large("first", 5e6));
        runtime.add(large("second", 5e6));
        for (const name of ["first", "second", "first"])
          expect(values((await runtime.run(on(name))).a)).toEqual([2, 4]);
        expect(warnings[0]).toMatch(/To make room for second on the GPU, these engines are released: first/);
      });

      it("is found by TensorRT itself, which says so in words only", async () => {
        const runtime = start();
        for (const kind of ["contextBytes", "firstBytes"] as const) {
          const graph = scaleGraph(kind, 2);
          closedForms.set(graph, { ...closedForms.get(graph)!, [kind]: 9e6 });
          runtime.add(graph);
          simulated.capacity(8e6);
          const error = await rejection(runtime.run(on(kind)));
          expect(error).toBeInstanceOf(MemoryError);
          expect(error).toMatchObject({ needed: 9e6, code: "ERR_FLOWTURBO_MEMORY" });
          expect(error.available).toBeLessThan(8e6);
          expect(error.message).toMatch(/0\.0090 GB of GPU memory.*TensorRT says: .*Requested size was 9000000 bytes/);
          // Another engine is released for it where that helps.
          runtime.add(large("first", 5e6));
          expect(values((await runtime.run(on("first"))).a)).toEqual([2, 4]);
          simulated.capacity(12e6);
          if (kind === "contextBytes") expect(values((await runtime.run(on(kind))).a)).toEqual([2, 4]);
        }
      });

      it("is freed by releasing CUDA graphs that are kept for later", async () => {
        simulated.capacity(8e6);
        const runtime = start({ capture: true });
        // Five tensors of this many numbers each; from the third on the engine has both profiles.
        for (const size of [300_000, 310_000, 300_000, 310_000]) {
          const work = program(new Array(size).fill(3), [double("x", "a")], ["a"]);
          expect(values((await runtime.run(work)).a).slice(-2)).toEqual([6, 6]);
        }
      });

      it("is refused before anything is built where the weights alone are more than the device has", async () => {
        const engines = new SimulatedEngines(folder);
        const runtime = start({}, engines);
        const { device } = await runtime.start();
        const length = device.memoryBytes + 1;
        const weight = { name: "w", dtype: "F32", shape: [length / 4], file: "/nowhere", offset: 0, length } as const;
        runtime.add({ ...scaleGraph("huge weights", 2), externals: new Map([["w", weight]]) });
        const error = await rejection(runtime.run(on("huge weights")));
        expect(error).toBeInstanceOf(MemoryError);
        expect(error.available).toBe(device.memoryBytes);
        expect(error.needed).toBeGreaterThan(device.memoryBytes);
        expect(error.message).toMatch(/huge weights.* has \d+\.\d+ GB/);
        expect(engines.requests).toEqual([]);
      });
    });

    describe("a program that cannot run is refused before its first launch", () => {
      const refused = async (work: Program, options: Partial<TensorRtRuntimeOptions> = {}, engines?: EngineSource) => {
        const runtime = start(options, engines);
        simulated.reset();
        const reports: LaunchReport[] = [];
        const error = await rejection(runtime.run(work, { onLaunch: (report) => void reports.push(report) }));
        expect(error).toBeInstanceOf(FlowTurboError);
        expect(reports).toEqual([]);
        expect(simulated.counts().kernels).toBe(0);
        expect(values((await runtime.run(program([1], [double("x", "a")], ["a"]), {})).a)).toEqual([2]);
        return error;
      };
      const good = program([1, 2], [double("x", "a"), double("a", "b")], ["b"]);

      it("since a register does not have the engine's shape, at its last launch too", async () => {
        const error = await refused({ ...good, registers: { ...good.registers, b: { dtype: "float32", shape: [3] } } });
        expect(error.message).toMatch(
          /"double" \(b of a\) gave float32 \[2\] as "y", but the register "b" is float32 \[3\]/,
        );
      });

      it("since the plan has other inputs than the launch", async () => {
        const error = await refused(program([1], [{ ...double("x", "a"), inputs: { x: "x", z: "x" } }], ["a"]));
        expect(error).toBeInstanceOf(RuntimeError);
        expect(error.message).toMatch(/"double" \(a of x\).*"?z/);
      });

      it.each([
        ["a register is read before it is written", program([1], [double("a", "b")], ["b"]), /"a" is read before/],
        [
          "there is no such graph",
          program([1], [launch("nobody", "x", "a")], ["a"]),
          /"nobody".*no graph of that name/,
        ],
        [
          "two outputs go to one register",
          program([1], [{ ...double("x", "a"), outputs: { y: "a", z: "a" } }], ["a"]),
          /two outputs go to one register/,
        ],
        [
          "an output is an input too",
          program([1], [double("x", "a"), double("a", "a")], ["a"]),
          /both an input and an output/,
        ],
        [
          "a coefficient is NaN",
          {
            ...good,
            constants: { x: { kind: "value", tensor: float32([2], Float32Array.of(1, Number.NaN)) } },
          } as Program,
          /the constant "x" holds NaN/,
        ],
        [
          "rows are copied from outside",
          program([1, 2], [double("x", "a"), { op: "copy", from: "a", fromRow: 1, to: "b", toRow: 0, rows: 2 }], ["b"]),
          /rows 1 to 2 are outside "a"/,
        ],
      ])("since %s", async (_, work, message) => {
        expect((await refused(work)).message).toMatch(message);
      });

      it("since the plan is damaged, foreign or changed", async () => {
        const form = closedForms.get(scaleGraph("double", 2))!;
        const plan = (text: string, change?: string): EngineSource => {
          let asked = 0;
          const good = new SimulatedEngines(folder);
          return {
            engineFor: async (...request) => {
              if (asked++ > 0) return good.engineFor(request[0], request[1], request[2]);
              const file = path.join(temporaryFolder(), "engine.plan");
              writeFileSync(file, text);
              const handle = await open(file);
              const identity = await fileIdentity(handle);
              await handle.close();
              if (change !== undefined) writeFileSync(file, change);
              return { plan: file, identity };
            },
          };
        };
        expect(await refused(good, {}, plan("no plan at all"))).toBeInstanceOf(CompileError);
        expect(await refused(good, {}, plan(""))).toBeInstanceOf(FlowTurboError);
        const sound = planText(form, [{ x: [2] }]);
        expect(await refused(good, {}, plan(sound, `${sound} `))).toBeInstanceOf(CacheError);
        const other = await refused(good, {}, plan(planText(form, [{ x: [7] }])));
        expect(other.message).toMatch(/"double" \(a of x\) failed: its engine has no profile for the inputs x \[2\]/);
      });
    });

    it("does not wait for JavaScript between launches", async () => {
      const runtime = start();
      const work = program(
        [1],
        Array.from({ length: 40 }, (_, index) =>
          double(index === 0 ? "x" : index % 2 ? "a" : "b", index % 2 ? "b" : "a"),
        ),
        ["b"],
      );
      await runtime.run(work);
      simulated.reset();
      const running = runtime.run(work);
      // Until it has been handed over; then the event loop is blocked, until all is done or nothing comes any more. How
      // soon a launch follows another meanwhile is measured in bench/executor.
      while (simulated.counts().kernels === 0) await setImmediate();
      for (const end = performance.now() + 10_000; simulated.counts().kernels < 40 && performance.now() < end; );
      expect(simulated.counts().kernels).toBe(40);
      await running;
    });
  });
});
