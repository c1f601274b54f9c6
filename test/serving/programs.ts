/** Row programs for the simulated runtime, from the product's template: small pictures with made-up values. */

import { type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { type SamplingKind, samplingTemplate, slotValues } from "../../lib/generation/programs.js";
import { bind, type Program } from "../../lib/program/program.js";
import { parseBlocks, scheduleOf, shiftedSigmas, upscaleSigmas } from "../../lib/schedule/index.js";

/** What a picture is drawn with. */
export interface Picture {
  readonly blocks: string;
  /** Side of its latents; in pixels twice as much. */
  readonly side: number;
  readonly seed: number;
  readonly guidanceScale: number | null;
  /** Stages of one and of two times the side; a mask; previews of each block. */
  readonly extra?: "stages" | "inpainting" | "preview" | undefined;
  /** Pixels that go through the autoencoder at once. */
  readonly pixelsAtOnce?: number;
}

export function numbers(seed: number, ...shape: number[]): FloatTensor {
  const length = shape.reduce((a, b) => a * b, 1);
  return float32(
    shape,
    Float32Array.from({ length }, (_, i) => Math.sin(seed * 12.9898 + i * 78.233)),
  );
}

const positions = (side: number) =>
  ({
    kind: "stored",
    source: { name: "positions", dtype: "F32", shape: [1, 4096, 4], file: "/file", offset: 0, length: 65536 },
    ...{ shape: [1, side * side, 4], firstElement: side, rowElements: side * 4, strideElements: side * 4, rows: side },
  }) as const;

/** The same for all pictures, as a model's are. */
const colours = { map: numbers(1, 3, 4), bias: numbers(2, 3, 1) };

/** The condition of a text. */
export function conditionOf(seed: number, isGuided: boolean) {
  const rows = isGuided ? 2 : 1;
  return { context: numbers(seed, rows, 3, 5), pooled: numbers(seed + 0.5, rows, 20) };
}

/** One row: its image and latents. Pictures with the same condition and edit share the arrays of these. */
export function programOf(
  { blocks, side, seed, guidanceScale, extra, pixelsAtOnce }: Picture,
  condition: ReturnType<typeof conditionOf>,
  edit?: { readonly init: FloatTensor; readonly mask: FloatTensor },
): Program {
  const list = parseBlocks(blocks);
  const shift = { shift: 3 };
  const sigmas = [shiftedSigmas(list.length, shift)];
  if (extra === "stages") sigmas.push(upscaleSigmas(list.length, shift, 0.6));
  const stages = sigmas.map((sigmas, index): SamplingKind["stages"][number] => {
    const sideHere = side * 2 ** index;
    return {
      schedule: scheduleOf(list, sigmas, { guidance: guidanceScale }),
      latentShape: [1, 4, sideHere, sideHere],
      positions: { predict: positions(sideHere), refine: positions(sideHere) },
      ...{ hasInit: edit !== undefined, hasMask: edit !== undefined },
    };
  });
  const { program } = samplingTemplate({
    ...{ stages, vaeFactor: 2, imageChannels: 3, keepsLatents: true },
    contextShape: condition.context.shape.slice(1) as [number, number],
    pooledShape: condition.pooled.shape.slice(1) as [number],
    ...(extra === "preview" && { preview: "fast" }),
  });
  const values = stages.map(({ latentShape }, index) => ({
    noise: numbers(seed + index / 10, ...latentShape),
    ...edit,
  }));
  const text = { [guidanceScale === null ? "alone" : "guided"]: condition };
  const bound = bind(program, slotValues({ stages: values, ...text, ...(extra === "preview" && { colours }) }));
  return pixelsAtOnce === undefined ? bound : { ...bound, instructions: bound.instructions.map(limited) };

  function limited(instruction: Program["instructions"][number]) {
    if (instruction.op !== "launch" || instruction.sharing?.maxRows === undefined) return instruction;
    const [width, height] = instruction.sharing.size.split("-").at(-1)!.split("x").map(Number) as [number, number];
    const maxRows = Math.max(1, Math.floor(pixelsAtOnce! / (width * height)));
    return { ...instruction, sharing: { ...instruction.sharing, maxRows } };
  }
}
