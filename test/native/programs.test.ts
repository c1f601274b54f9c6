// Schedules on the simulated device, against the same closed form in TypeScript: bit for bit, since both round
// after each operation.
import { afterEach, describe, expect, it, vi } from "vitest";
import { cases, draw, requestOf, samplingGraphs, samplingProgram } from "../support/sampling.js";
import { leftOver, SimulatedEngines, simulated, simulatedRuntime } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const folder = temporaryFolder();

describeAddons("programs of a schedule", () => {
  describe.each(["tensorrt", "tensorrt-rtx"] as const)("on %s", (kind) => {
    afterEach(async () => {
      expect(simulated.violation()).toBe("");
      await vi.waitFor(() => expect(leftOver()).toEqual({}));
    });

    describe.each(cases)("$name", (example) => {
      it.each([1, 2, 3, 4])("in a batch of %i", async (batch) => {
        await using runtime = simulatedRuntime(kind, new SimulatedEngines(folder));
        for (const graph of samplingGraphs(example.guided ?? true)) runtime.add(graph);
        const request = requestOf(example, batch);
        const { program, latents, image } = samplingProgram(request);
        const launches = program.instructions.filter(({ op }) => op === "launch");
        const reports: unknown[] = [];
        simulated.reset();
        const results = await runtime.run(program, { onLaunch: ({ launch }) => reports.push(launch) });
        const expected = draw(request);
        expect(new Set(expected.latents).size).toBeGreaterThan(20 * batch);
        expect(results[latents]!.data).toEqual(expected.latents);
        expect(results[image]!.data).toEqual(expected.image);
        // One launch each, in order; everything goes up at once.
        expect(reports).toEqual(launches);
        expect(simulated.counts()).toMatchObject({ kernels: launches.length, uploads: 1 });
      });

      it("as one CUDA graph from the second run on", async () => {
        await using runtime = simulatedRuntime(kind, new SimulatedEngines(folder), { capture: true });
        for (const graph of samplingGraphs(example.guided ?? true)) runtime.add(graph);
        const request = requestOf(example, 2);
        const { program, latents, image } = samplingProgram(request);
        const expected = draw(request);
        for (let run = 0; run < 3; run++) {
          const results = await runtime.run(program);
          expect(results[latents]!.data).toEqual(expected.latents);
          expect(results[image]!.data).toEqual(expected.image);
        }
        expect(simulated.counts().graphLaunches).toBe(2);
        simulated.reset();
      });

      it.each([false, true])("with the state after each block in its reports (capture: %s)", async (capture) => {
        await using runtime = simulatedRuntime(kind, new SimulatedEngines(folder), { capture });
        for (const graph of samplingGraphs(example.guided ?? true)) runtime.add(graph);
        const request = requestOf(example, 2);
        const { program } = samplingProgram(request, true);
        const { steps } = draw(request);
        for (let run = 0; run < 2; run++) {
          const reported: unknown[] = [];
          await runtime.run(program, {
            onLaunch: ({ values }) => reported.push(...Object.values(values).map(({ data }) => data.slice())),
          });
          expect(reported).toEqual(steps);
        }
        simulated.reset();
      });
    });
  });
});
