import { describe, expect, it } from "vitest";
import { type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { encoderProgram, type SamplingKind, samplingTemplate, slotValues } from "../../lib/generation/programs.js";
import { bind, type Program } from "../../lib/program/program.js";
import { validateProgram } from "../../lib/program/validate.js";
import { parseBlocks, scheduleOf, shiftedSigmas } from "../../lib/schedule/index.js";
import { cases, requestOf } from "../support/sampling.js";

const positions = {
  kind: "stored",
  source: { name: "p", dtype: "F32", shape: [64], file: "/p", offset: 0, length: 256 },
  ...{ shape: [1, 4, 4], firstElement: 0, rowElements: 16, strideElements: 16, rows: 1 },
} as const;

type What = "plain" | "started from an original" | "inpainted" | "of two stages" | "previewed";

function kindOf(what: What): SamplingKind {
  const schedule = scheduleOf(parseBlocks("H1P2"), shiftedSigmas(3, { shift: 3 }), { guidance: 4.5 });
  const stage = (side: number) => ({
    ...{ schedule, latentShape: [1, 4, side, side] as const, positions: { predict: positions } },
    ...{ hasInit: what === "started from an original" || what === "inpainted", hasMask: what === "inpainted" },
  });
  return {
    stages: what === "of two stages" ? [stage(4), stage(8)] : [stage(4)],
    ...{ contextShape: [3, 5], pooledShape: [6], vaeFactor: 2, imageChannels: 3 },
    ...{ preview: what === "previewed" ? "fast" : undefined, keepsLatents: true },
  };
}

let next = 0;
const values = (...shape: number[]): FloatTensor =>
  float32(shape, new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(++next));

function valuesOf(kind: SamplingKind) {
  return slotValues({
    stages: kind.stages.map(({ latentShape: [, channels, height, width], hasInit, hasMask }) => ({
      noise: values(1, channels, height, width),
      init: hasInit ? values(1, channels, height, width) : undefined,
      mask: hasMask ? values(1, 1, height, width) : undefined,
    })),
    guided: { context: values(2, ...kind.contextShape), pooled: values(2, ...kind.pooledShape) },
    colours: kind.preview && { map: values(3, 4), bias: values(3, 1) },
  });
}

const slotsOf = ({ constants }: Program) =>
  Object.entries(constants).flatMap(([name, { kind }]) => (kind === "slot" ? [name] : []));

describe.each(["plain", "started from an original", "inpainted", "of two stages", "previewed"] as const)(
  "the template of a picture that is %s",
  (what) => {
    it("has a slot for each value, and no others", () => {
      const kind = kindOf(what);
      expect(slotsOf(samplingTemplate(kind).program).sort()).toEqual(Object.keys(valuesOf(kind)).sort());
    });

    it("runs with its values only, which leave the template as it was", () => {
      const kind = kindOf(what);
      const { program, image } = samplingTemplate(kind);
      const before = structuredClone(program);
      expect(() => validateProgram(program, () => true)).toThrow(/slot ".*" has no value/);
      const given = valuesOf(kind);
      const bound = bind(program, given);
      expect([...validateProgram(bound, () => true).keys()]).toContain(image);
      for (const [name, tensor] of Object.entries(given))
        expect(bound.constants[name]).toEqual({ kind: "value", tensor });
      expect(program).toEqual(before);
      const { "guided.context": context, ...rest } = given;
      expect(context).toBeDefined();
      expect(() => validateProgram(bind(program, rest), () => true)).toThrow(/slot "guided.context" has no value/);
    });
  },
);

describe("a block", () => {
  it.each(cases)("ends with one launch, and reports its latents once where they are asked for: $name", (example) => {
    const { stages, context, pooled } = requestOf(example, 1);
    for (const preview of [undefined, "fast", "decoded"] as const) {
      const { program } = samplingTemplate({
        ...{ stages, vaeFactor: 2, imageChannels: 3, keepsLatents: true, reportsLatents: true, preview },
        contextShape: context.shape.slice(1) as [number, number],
        pooledShape: pooled.shape.slice(1) as [number],
      });
      const launches = program.instructions.filter((each) => each.op === "launch");
      const blocks = stages.reduce((sum, { schedule }) => sum + schedule.blocks.length, 0);
      for (let block = 0; block < blocks; block++) {
        const own = launches.filter(({ label }) => label.block === block);
        expect(own.map(({ label }) => Boolean(label.last))).toEqual(own.map((_, index) => index === own.length - 1));
        const reporting = own.filter(({ reported, label }) => reported && label.kind !== "preview");
        expect(reporting).toHaveLength(1);
        // Nothing but a preview follows it, and the next block, or the stage's end, begins with what it reports.
        const [{ reported }] = reporting as [(typeof own)[number]];
        const after = launches.slice(launches.indexOf(reporting[0]!) + 1);
        expect(after.filter(({ label }) => label.block === block && label.kind !== "preview")).toEqual([]);
        const next = after.find(({ label }) => label.kind !== "preview")!;
        expect(Object.values(next.inputs)).toContain(reported![0]);
      }
    }
  });
});

describe("bind", () => {
  const { program } = samplingTemplate(kindOf("plain"));

  it("refuses a name that is no slot, and a value of another shape", () => {
    expect(() => bind(program, { nothing: values(1) })).toThrow(/no slot "nothing"/);
    expect(() => bind(program, { "stage1.zeros.pair": values(2, 4, 4, 4) })).toThrow(/no slot "stage1.zeros.pair"/);
    expect(() => bind(program, { "guided.pooled": values(1, 6) })).toThrow(
      /"guided.pooled" is float32 \[2,6\], and the value float32 \[1,6\]/,
    );
  });
});

it("an encoder's program reads its picture, or has a slot for it", () => {
  const picture = values(1, 3, 8, 8);
  expect(bind(encoderProgram("slot", [1, 4, 4, 4], 2), { image: picture })).toEqual(
    encoderProgram(picture, [1, 4, 4, 4], 2),
  );
});
