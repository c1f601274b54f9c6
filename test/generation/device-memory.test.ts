// What a GPU has to hold, and what is refused with both numbers: before anything is compiled, and before a picture begins.
import { beforeAll, describe, expect, it } from "vitest";
import { type ControlNet, openCheckpoint, openControlNet } from "../../lib/checkpoint/index.js";
import { MemoryError } from "../../lib/errors.js";
import { type Additions, type ControlKind, noAdditions, type PlacedStage } from "../../lib/generation/additions.js";
import {
  additionsMemoryNeeded,
  checkDeviceMemory,
  checkPictureMemory,
  deviceMemoryNeeded,
} from "../../lib/generation/device-memory.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { cpuEmitOptions } from "../../lib/onnx/index.js";
import { cudaEmitOptions, gpuWidening, webGpuEmitOptions } from "../../lib/runtimes/onnxruntime/emission.js";
import { parseBlocks, scheduleOf } from "../../lib/schedule/index.js";
import { fixture } from "../support/fixtures.js";

const gigabyte = 1e9;
let graphs: GraphLibrary;
let half: GraphLibrary;
beforeAll(async () => {
  const checkpoint = await openCheckpoint(fixture("sd3", "model"));
  graphs = new GraphLibrary(checkpoint, webGpuEmitOptions({ float16: false, attention: false }));
  half = graphs.emittedAs(webGpuEmitOptions({ float16: true, attention: true }));
});
const refusal = (check: () => void): MemoryError => {
  try {
    check();
  } catch (error) {
    expect(error).toBeInstanceOf(MemoryError);
    return error as MemoryError;
  }
  throw new Error("Nothing was refused.");
};

/** Bytes of the weights of the graphs that draw, as they are in the files. */
const stored = () =>
  graphs.essential
    .filter(({ role }) => role !== "text")
    .flatMap(({ graph }) => [...graph.externals.values()])
    .reduce((sum, { length }) => sum + length, 0);

describe("weights", () => {
  it("take twice their bytes where 16 bits become 32, and as many where the device has the type", () => {
    // All of this checkpoint's weights are float16.
    expect(deviceMemoryNeeded(graphs, gpuWidening([])).draw).toBe(2 * stored());
    expect(deviceMemoryNeeded(graphs, gpuWidening(["F16"])).draw).toBe(stored());
    expect(deviceMemoryNeeded(half, gpuWidening(["F16"])).draw).toBe(stored());
    const cuda = graphs.emittedAs(cudaEmitOptions({ attention: true, bfloat16: true }));
    expect(deviceMemoryNeeded(cuda, gpuWidening(["F16", "BF16"])).draw).toBe(stored());
  });

  it("that the device cannot hold are refused with both numbers", () => {
    const device = { name: "A card", memoryBytes: 1000, widening: gpuWidening([]) };
    const error = refusal(() => checkDeviceMemory(graphs, device));
    expect(error.message).toMatch(/but A card has/);
    expect(error).toMatchObject({ needed: deviceMemoryNeeded(graphs, gpuWidening([])).draw, available: 1000 });
    checkDeviceMemory(graphs, { ...device, memoryBytes: gigabyte });
  });

  it("that no buffer can hold are refused", () => {
    const error = refusal(() =>
      checkDeviceMemory(graphs, {
        name: "A card",
        memoryBytes: gigabyte,
        largestBuffer: 1000,
        widening: gpuWidening([]),
      }),
    );
    expect(error.message).toMatch(/^A weight of \w+ takes .*buffers of A card hold at most/);
    expect(error.available).toBe(1000);
  });
});

describe("ControlNets", () => {
  it("take what each graph with some of them takes, less the graph without where no step runs it", async () => {
    const controlNets = new Map<string, ControlNet>();
    const kinds = await Promise.all(
      ["controlnet", "controlnet_own"].map(async (name) => {
        const controlNet = await openControlNet(fixture("sd3", name));
        controlNets.set(controlNet.id, controlNet);
        return { id: controlNet.id, channels: 16, scale: 1, start: 0, stop: 1, bytes: weightBytes(controlNet) };
      }),
    );
    const [first, second] = kinds as [(typeof kinds)[0], (typeof kinds)[0]];
    const library = new GraphLibrary({ ...graphs.checkpoint, controlNets }, () => cpuEmitOptions);
    const schedule = scheduleOf(parseBlocks("E4"), [1, 0.75, 0.5, 0.25, 0], { guidance: 4 });
    const memory = (additions: Additions, stage: PlacedStage) =>
      additionsMemoryNeeded(library, () => "lazy", additions, "cfg", [stage]);
    const guided = { schedule };
    const needed = (...controls: ControlKind[]) => memory({ ...noAdditions, controls }, guided);
    const transformer = [...library.get("predict.guidance").externals.values()].reduce(
      (sum, each) => sum + each.length,
      0,
    );
    expect(needed()).toBe(0);
    expect(needed(first)).toBe(first.bytes);
    expect(needed({ ...first, stop: 0.5 })).toBe(transformer + first.bytes);
    // Both, and the second alone.
    expect(needed({ ...first, stop: 0.5 }, second)).toBe(transformer + first.bytes + 2 * second.bytes);
    // Skip-layer guidance in some steps, dynamic LoRAs in all.
    const skipLayers = { layers: [1], scale: 2, start: 0.1, stop: 0.5 };
    expect(memory({ ...noAdditions, skipLayers }, guided)).toBe(transformer);
    const lora = { rank: 8, down: 1, up: 1 } as const;
    expect(memory({ ...noAdditions, lora }, guided)).toBe(0);
    expect(memory({ ...noAdditions, lora, skipLayers }, guided)).toBe(transformer);
    // Steps without guidance have a graph of their own, and leave no blocks out.
    const half = scheduleOf(parseBlocks("E4"), schedule.sigmas, { guidance: (block) => (block < 2 ? 4 : null) });
    expect(memory({ ...noAdditions, skipLayers }, { schedule: half })).toBe(2 * transformer);
  });

  /** Of all weights but the table of positions, of which rows are an input. */
  const weightBytes = ({ weights }: ControlNet) =>
    weights.names
      .filter((name) => name !== "pos_embed.pos_embed")
      .reduce((sum, name) => sum + weights.find(name)!.length, 0);
});

describe("a picture", () => {
  const device = { name: "A card", memoryBytes: gigabyte, widening: gpuWidening(["F16"]) };
  const drawn = (side: number) =>
    ({
      width: side,
      height: side,
      latentShape: [1, 16, side / 8, side / 8],
      rows: 2,
      sequenceLength: 77,
    }) as const;

  it("that fits is not refused, and a larger one is, with its size and both numbers", () => {
    const { draw } = deviceMemoryNeeded(half, device.widening);
    checkPictureMemory(half, device, draw, drawn(64));
    const error = refusal(() => checkPictureMemory(half, device, draw, drawn(8192)));
    expect(error.message).toMatch(/^A picture of 8192 x 8192 needs about .* for weights, but A card has/);
    expect(error.needed).toBeGreaterThan(error.available);
    expect(error.available).toBe(gigabyte);
  });

  it("whose kinds of steps are too much is refused with what helps", () => {
    const { draw } = deviceMemoryNeeded(half, device.widening);
    const error = refusal(() => checkPictureMemory(half, device, draw, drawn(64), gigabyte));
    expect(error.message).toMatch(
      / for weights, with 1\.0\d* GB for further kinds of steps and ControlNets, but A card/,
    );
    expect(error.message).toMatch(/ControlNets in all steps or in none, leave out skip-layer guidance/);
    expect(error.message).not.toMatch(/smaller pictures/);
    expect(error.needed).toBeGreaterThan(draw + gigabyte);
    // Where the picture alone is too much, it has to be smaller.
    expect(refusal(() => checkPictureMemory(half, device, draw, drawn(8192), gigabyte)).message).toMatch(
      /smaller pictures/,
    );
  });

  it("takes twice as much in float32", () => {
    const needed = (library: GraphLibrary) => {
      const { draw } = deviceMemoryNeeded(library, device.widening);
      return (
        refusal(() => checkPictureMemory(library, { ...device, memoryBytes: draw }, draw, drawn(1024))).needed - draw
      );
    };
    expect(needed(graphs)).toBe(2 * needed(half));
  });

  it("takes more where attention holds all of its scores", () => {
    const needed = (holdsScores: boolean) =>
      refusal(() => checkPictureMemory(half, { ...device, memoryBytes: 1, holdsScores }, 0, drawn(2048))).needed;
    expect(needed(true)).toBeGreaterThan(needed(false));
  });

  it("with values that no buffer can hold is refused", () => {
    const limited = { ...device, memoryBytes: 1000 * gigabyte, largestBuffer: 2 ** 22 };
    expect(refusal(() => checkPictureMemory(half, limited, 0, drawn(2048))).message).toMatch(
      /^A picture of 2048 x 2048 has values of .* buffers of A card hold at most/,
    );
    checkPictureMemory(half, limited, 0, drawn(64));
  });
});
