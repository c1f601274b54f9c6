import { describe, expect, it } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import { placeholder } from "../../lib/generation/progress.js";
import {
  parseBlocks,
  type SamplingRequest,
  samplingProgram,
  shiftedSigmas,
  withValues,
} from "../../lib/schedule/index.js";

type Names = "predict" | "refine" | "decode" | "encode" | "join" | "noised" | "merge" | "preview";
const names: Names[] = ["predict", "refine", "decode", "encode", "join", "noised", "merge", "preview"];
const graphs = Object.fromEntries(names.map((name) => [name, name])) as Record<Names, string>;
const positions = {
  kind: "stored",
  source: { name: "p", dtype: "F32", shape: [64], file: "/p", offset: 0, length: 256 },
  ...{ shape: [1, 4, 4], firstElement: 0, rowElements: 16, strideElements: 16, rows: 1 },
} as const;

/** @param tensor makes the values of a shape */
function request(
  kind: "plain" | "edited" | "original" | "stages" | "preview",
  tensor: (...shape: number[]) => ReturnType<typeof placeholder>,
): SamplingRequest {
  const blocks = parseBlocks("H1P2");
  const stage = (side: number) => ({
    ...{ blocks, sigmas: shiftedSigmas(3, 3), noise: tensor(1, 4, side, side) },
    positions: { predict: positions, refine: null },
  });
  const first = {
    ...stage(4),
    originalLatents: kind === "edited" ? tensor(1, 4, 4, 4) : undefined,
    original: kind === "original" ? tensor(1, 3, 8, 8) : undefined,
    mask: kind === "edited" ? tensor(1, 1, 4, 4) : undefined,
  };
  return {
    stages: kind === "stages" ? [first, stage(8)] : [first],
    context: tensor(2, 3, 5),
    pooled: tensor(2, 6),
    colours: kind === "preview" ? { map: tensor(3, 4), bias: tensor(3, 1) } : undefined,
    preview: kind === "preview" ? "fast" : undefined,
    ...{ guidanceScale: 4.5, graphs, vaeFactor: 2, imageChannels: 3, pixelsAtOnce: 1000 },
  };
}

describe("withValues", () => {
  it.each(["plain", "edited", "original", "stages", "preview"] as const)(
    "%s: a program of placeholders that is given values is the program that was made of them",
    (kind) => {
      let next = 0;
      const values = request(kind, (...shape) =>
        float32(shape, new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(++next)),
      );
      const sketch = samplingProgram(request(kind, placeholder));
      const before = structuredClone(sketch);
      expect(withValues(sketch, values)).toEqual(samplingProgram(values));
      expect(sketch).toEqual(before);
    },
  );
});
