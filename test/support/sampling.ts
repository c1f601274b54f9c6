// Sampling in closed form: graphs with the operands of the real ones that compute a few sums and products, so that the
// simulated device can run whole schedules, and the same in plain TypeScript, written from the definitions of the blocks
// rather than from programs.

import { elementCount, type FloatTensor, float32 } from "../../lib/common/tensor.js";
import {
  type SamplingStage,
  type SamplingTemplate,
  samplingTemplate,
  slotValues,
} from "../../lib/generation/programs.js";
import { graphName } from "../../lib/networks/index.js";
import { bind } from "../../lib/program/program.js";
import type { CompilableGraph } from "../../lib/runtimes/runtime.js";
import { parseBlocks, type StepType, scheduleOf } from "../../lib/schedule/index.js";
import { type ClosedForm, closedForms } from "../runtimes/models.js";

const channels = 4;
const factor = 2;

const float = Math.fround;

const guide = (velocity: string, guided: boolean) =>
  guided ? `${velocity}.u guidance ${velocity}.c ${velocity}.u - * +` : velocity;

function step(network: string, guided: boolean): ClosedForm {
  const perRow = ["sigma", "a_in", "a_old", "a_new", ...(guided ? ["guidance"] : [])];
  const names = ["x", "velocity", "context", "pooled", "position_embedding", ...perRow];
  return {
    inputs: Object.fromEntries(names.map((name) => [name, "float32"])),
    outputs: ({ x, velocity }) => ({ x_next: x!, velocity_next: velocity! }),
    temporaries: { old: "x", point: "x", new: "x" },
    formulas: [
      `old ${guide("velocity", guided)}`,
      "point x a_in old * +",
      `velocity_next ${network} context 0.25 * + pooled 0.125 * + position_embedding 0.0625 * +`,
      `new ${guide("velocity_next", guided)}`,
      "x_next x a_old old * + a_new new * +",
    ],
    weights: 65536,
  };
}

function combine(guided: boolean): ClosedForm {
  const outputs = ["x", "first", "second"];
  const weights = outputs.flatMap((output) => ["velocity", "first", "second"].map((term) => `${output}_${term}`));
  const names = ["x", "velocity", "first", "second", ...weights, ...(guided ? ["guidance"] : [])];
  const sum = (output: string) => `${output}_velocity w * ${output}_first first * + ${output}_second second * +`;
  return {
    inputs: Object.fromEntries(names.map((name) => [name, "float32"])),
    outputs: ({ x }) => ({ x_next: x!, first_next: x!, second_next: x! }),
    temporaries: { w: "x" },
    formulas: [
      `w ${guide("velocity", guided)}`,
      `x_next x ${sum("x")} +`,
      `first_next ${sum("first")}`,
      `second_next ${sum("second")}`,
    ],
  };
}

const withNoise = "latents 1 sigma - * noise sigma * +";

/** Of the graphs that sample, by name. @param side pixels of a latent's side */
export const samplingForms = (guided: boolean, side = factor): Record<string, ClosedForm> => ({
  predict: step("point 0.5 * sigma +", guided),
  refine: step("point 0.75 * velocity + sigma 0.5 * -", guided),
  combine: combine(guided),
  extrapolate: {
    inputs: { velocity: "float32", before: "float32", weight: "float32" },
    outputs: ({ velocity }) => ({ velocity_next: velocity! }),
    formulas: ["velocity_next velocity weight velocity before - * +"],
  },
  vae_decoder: {
    inputs: { latents: "float32" },
    outputs: ({ latents }) => {
      const [rows, , height, width] = latents as [number, number, number, number];
      return { image: [rows, 3, height * side, width * side] };
    },
    formulas: ["image latents 0.5 * 0.25 +"],
  },
  vae_encoder: {
    inputs: { image: "float32" },
    outputs: ({ image }) => ({ latents: [image![0]!, channels, image![2]! / side, image![3]! / side] }),
    formulas: ["latents image 2 *"],
  },
  upscale: {
    inputs: { latents: "float32", noise: "float32", sigma: "float32" },
    outputs: ({ noise }) => ({ x: noise! }),
    formulas: [`x ${withNoise}`],
  },
  // Not what the graph computes, but of all its operands: the program is to bring the right ones.
  upscale_latents: {
    inputs: Object.fromEntries(
      ["latents", "noise", "sigma", "scale", "vertical", "horizontal", "weights"].map((name) => [name, "float32"]),
    ),
    outputs: ({ noise }) => ({ x: noise! }),
    formulas: ["x latents scale * noise sigma * + vertical 0.5 * + horizontal 0.25 * + weights 0.125 * +"],
  },
  scale_noise: {
    inputs: { latents: "float32", noise: "float32", sigma: "float32" },
    outputs: ({ noise }) => ({ x: noise! }),
    formulas: [`x ${withNoise}`],
  },
  inpaint_blend: {
    inputs: Object.fromEntries(
      ["x", "velocity", "latents", "noise", "mask", "sigma"].map((name) => [name, "float32"] as const),
    ),
    outputs: ({ x, velocity }) => ({ x_next: x!, velocity_next: velocity! }),
    temporaries: { known: "noise", direction: "noise" },
    formulas: [
      `known ${withNoise}`,
      "direction noise latents -",
      "x_next mask x * 1 mask - known * +",
      "velocity_next mask velocity * 1 mask - direction * +",
    ],
  },
});

const withVariants = ["predict", "refine", "combine", "extrapolate", "inpaint_blend", "preview"];

/** The graphs under the names that templates give them. */
export function samplingGraphs(guided: boolean): CompilableGraph[] {
  return Object.entries(samplingForms(guided)).map(([network, form]) => {
    const name = graphName({ network, guidance: guided && withVariants.includes(network) });
    const graph = { name, bytes: new Uint8Array(), externals: new Map(), fingerprint: `${name} ${guided}` };
    closedForms.set(graph, form);
    return graph;
  });
}

export interface Case {
  readonly name: string;
  /** Blocks of each stage. */
  readonly stages: readonly string[];
  readonly guided?: boolean;
  readonly inpainted?: boolean;
  /** How later stages start from the one before. */
  readonly upscale?: "pixels" | "latents";
}

export const cases: readonly Case[] = [
  { name: "E", stages: ["E3"] },
  { name: "H", stages: ["H2"] },
  { name: "P", stages: ["P3"] },
  { name: "R", stages: ["H1P2R2"] },
  { name: "C", stages: ["C3"] },
  { name: "without guidance", stages: ["H1P1R1E1C2"], guided: false },
  { name: "two stages", stages: ["H1P1R1", "H1C1"] },
  { name: "two stages in latents", stages: ["H1P1R1", "H1R1"], upscale: "latents" },
  { name: "inpainting", stages: ["H1P2R1C2"], inpainted: true },
];

/** Deterministic numbers of about the size of normal noise. */
function numbers(shape: readonly number[], seed: number): FloatTensor {
  let state = seed * 2654435761 + 1;
  const data = Float32Array.from({ length: elementCount(shape) }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32 - 0.5) * 3;
  });
  return float32(shape, data);
}

/** Pictures to draw: the kind and the values of all of them. */
export interface Sampling {
  readonly stages: readonly (SamplingStage & {
    readonly positions: Readonly<Record<StepType, { readonly kind: "value"; readonly tensor: FloatTensor }>>;
    readonly noise: FloatTensor;
    readonly init?: FloatTensor;
    readonly mask?: FloatTensor;
  })[];
  readonly context: FloatTensor;
  readonly pooled: FloatTensor;
  readonly guidanceScale: number | null;
}

export function requestOf({ stages, guided = true, inpainted = false, upscale }: Case, batch: number): Sampling {
  const rows = guided ? 2 * batch : batch;
  return {
    stages: stages.map((text, index) => {
      const blocks = parseBlocks(text);
      const side = 4 * (index + 1);
      const positions = (seed: number) => {
        return { kind: "value", tensor: numbers([1, (side / 2) ** 2, 3], seed) } as const;
      };
      const sigmas = Array.from(
        { length: blocks.length + 1 },
        (_, point) => (0.9 - 0.2 * index) * (1 - point / blocks.length),
      );
      return {
        schedule: scheduleOf(blocks, sigmas, { guidance: guided ? 3.5 : null }),
        latentShape: [batch, channels, side, side],
        ...{ upscale, positions: { predict: positions(11), refine: positions(12) } },
        ...{ hasInit: inpainted, hasMask: inpainted, noise: numbers([batch, channels, side, side], 1 + index) },
        ...(inpainted && {
          init: numbers([1, channels, side, side], 21),
          mask: float32(
            [1, 1, side, side],
            numbers([side * side], 22).data.map((value) => (value > 0 ? 1 : 0)),
          ),
        }),
      };
    }),
    context: numbers([rows, 5, 6], 31),
    pooled: numbers([rows, 7], 32),
    guidanceScale: guided ? 3.5 : null,
  };
}

/** The program that draws them: the product's template, with the values bound. */
export function samplingProgram(
  { stages, context, pooled, guidanceScale }: Sampling,
  reportsLatents = false,
): SamplingTemplate & { readonly image: string } {
  const template = samplingTemplate({
    ...{ stages, vaeFactor: factor, imageChannels: 3, keepsLatents: true, reportsLatents },
    contextShape: context.shape.slice(1) as [number, number],
    pooledShape: pooled.shape.slice(1) as [number],
  });
  const values = stages.map(({ noise, init, mask }) => ({ noise, init, mask }));
  const condition = { [guidanceScale === null ? "alone" : "guided"]: { context, pooled } };
  return {
    ...template,
    image: template.image!,
    program: bind(template.program, slotValues({ stages: values, ...condition })),
  };
}

/** The same pictures, computed here. */
export function draw(request: Sampling): { latents: Float32Array; image: Float32Array; steps: Float32Array[] } {
  /** The state after each block. */
  const steps: Float32Array[] = [];
  const batch = request.stages[0]!.noise.shape[0]!;
  const rows = request.context.shape[0]!;
  const scale = request.guidanceScale;
  const each = (shape: readonly number[], value: (row: number, place: number) => number): FloatTensor => {
    const size = elementCount(shape.slice(1));
    return float32(
      shape,
      Float32Array.from({ length: elementCount(shape) }, (_, index) => value(Math.floor(index / size), index % size)),
    );
  };
  /** Broadcast as the closed forms are. */
  const at = (tensor: FloatTensor, row: number, place: number) => {
    const size = elementCount(tensor.shape.slice(1));
    return tensor.data[(row % tensor.shape[0]!) * size + (place % size)]!;
  };
  const guided = (velocity: FloatTensor, row: number, place: number) => {
    if (scale === null) return at(velocity, row, place);
    const u = at(velocity, row, place);
    const c = at(velocity, row + batch, place);
    return float(u + float(float(scale) * float(c - u)));
  };
  const mix = (latents: FloatTensor, noise: FloatTensor, sigma: number) =>
    each(noise.shape, (row, place) =>
      float(float(at(latents, row, place) * float(1 - float(sigma))) + float(at(noise, row, place) * float(sigma))),
    );

  /** From 4 latents a side to 8: each is repeated twice in either direction, and the noise seems twice as large. */
  const inLatents = (before: FloatTensor, noise: FloatTensor, sigma: number) => {
    const repeats = float32(
      [8, 4],
      Float32Array.from({ length: 32 }, (_, index) => (Math.floor(index / 8) === index % 4 ? 1 : 0)),
    );
    const weights = float32([4, 4], new Float32Array(16).fill(1 / 4));
    const terms: [FloatTensor, number][] = [
      [noise, sigma],
      [repeats, 0.5],
      [repeats, 0.25],
      [weights, 0.125],
    ];
    return each(noise.shape, (row, place) =>
      terms.reduce(
        (sum, [tensor, factor]) => float(sum + float(at(tensor, row, place) * float(factor))),
        float(at(before, row, place) * float(1 - sigma + sigma / 2)),
      ),
    );
  };

  let latents: FloatTensor | null = null;
  for (const [index, stage] of request.stages.entries()) {
    const noise = stage.noise;
    const shape = noise.shape;
    const start = stage.schedule.sigmas[0]!;
    const { init } = stage;
    const started = () =>
      stage.upscale === "latents" ? inLatents(latents!, noise, start) : mix(latents!, noise, start);
    let x: FloatTensor = index > 0 ? started() : init ? mix(init, noise, start) : noise;
    let velocity: FloatTensor | null = null;
    /** Where that was evaluated. */
    let level = 0;

    /** x + a_old·g(v) + a_new·g(v'), and v' = network(x + a_in·g(v)). */
    const evaluate = (
      type: "predict" | "refine",
      sigma: number,
      aIn: number,
      aOld: number,
      aNew: number,
      given: FloatTensor | null = velocity,
    ) => {
      const table = stage.positions[type].tensor;
      const old = given ?? each([rows, ...shape.slice(1)], () => 0);
      const next = each(old.shape, (row, place) => {
        const point = float(at(x, row, place) + float(float(aIn) * guided(old, row % batch, place)));
        const body =
          type === "predict"
            ? float(float(point * 0.5) + float(sigma))
            : float(float(float(point * 0.75) + at(old, row, place)) - float(float(sigma) * 0.5));
        const context = float(body + float(at(request.context, row, place) * 0.25));
        const pooled = float(context + float(at(request.pooled, row, place) * 0.125));
        return float(pooled + float(at(table, row, place) * 0.0625));
      });
      const moved = each(shape, (row, place) => {
        const first = float(at(x, row, place) + float(float(aOld) * guided(old, row, place)));
        return float(first + float(float(aNew) * guided(next, row, place)));
      });
      return { moved, next };
    };
    /** Evaluates, then corrects with the mean of two slopes. @returns the velocity that the correction computed */
    const correct = (type: "predict" | "refine", from: number, to: number): FloatTensor => {
      const { moved, next } = evaluate(type, to, to - from, (to - from) / 2, (to - from) / 2);
      x = moved;
      return next;
    };

    for (const [block, kind] of stage.schedule.blocks.entries()) {
      const [from, to] = [stage.schedule.sigmas[block]!, stage.schedule.sigmas[block + 1]!];
      if (kind === "E") {
        const { moved, next } = evaluate("predict", from, 0, 0, to - from);
        x = moved;
        [velocity, level] = [next, from];
      } else if (kind === "R") {
        [velocity, level] = [evaluate("refine", from, 0, 0, 0).next, from];
        correct("refine", from, to);
      } else if (kind === "C") {
        const now = evaluate("predict", from, 0, 0, 0).next;
        const weight = velocity && float((to - from) / (2 * (from - level)));
        const ahead = each(now.shape, (row, place) => {
          const own = at(now, row, place);
          return velocity ? float(own + float(weight! * float(own - at(velocity, row, place)))) : own;
        });
        x = evaluate("refine", (from + to) / 2, (to - from) / 2, 0, to - from, ahead).moved;
        [velocity, level] = [now, from];
      } else {
        if (kind === "H" || velocity === null) [velocity, level] = [evaluate("predict", from, 0, 0, 0).next, from];
        const corrected = correct("predict", from, to);
        // C extrapolates from the beginning of the block before it.
        if (stage.schedule.blocks[block + 1] !== "C") [velocity, level] = [corrected, to];
      }
      if (stage.mask && init) {
        const { mask } = stage;
        const blend = (fresh: FloatTensor, known: (row: number, place: number) => number) =>
          each(fresh.shape, (row, place) => {
            const share = at(mask, row, place);
            return float(float(share * at(fresh, row, place)) + float(float(1 - share) * known(row, place)));
          });
        const known = mix(init, noise, to);
        x = blend(x, (row, place) => at(known, row, place));
        velocity = blend(velocity, (row, place) => float(at(noise, row, place) - at(init, row, place)));
      }
      steps.push(x.data);
    }
    latents = x;
  }
  const [, , height, width] = latents!.shape as [number, number, number, number];
  const image = each([batch, 3, height * factor, width * factor], (row, place) =>
    float(float(at(latents!, row, place) * 0.5) + 0.25),
  );
  return { latents: latents!.data, image: image.data, steps };
}
