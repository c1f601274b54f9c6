/**
 * What a dynamic LoRA costs on the CPU: a step with a low-rank branch of rank 16 beside all linear layers against one without, and
 * against one with the LoRA merged into the weights; four rows with adapters of their own in one launch; the first picture with an adapter, whose
 * matrices are packed and sent to the process of the graphs, against the next one. On the embedded model, and on a transformer of SD3.5-medium's
 * width with random weights. Runs are taken in turn, and ratios are of runs beside each other. Rounds are reported on standard error: on
 * two cores one of the wide transformer at 512 x 512 takes half a minute or more.
 *
 *   npx tsx bench/loras.ts [--rounds N] [--layers N] [--size pixels]
 */

import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { embeddedModel, FlowTurbo, type GenerateOptions } from "flowturbo";
import { openCheckpoint, writeSafetensors } from "../lib/checkpoint/index.js";
import { type FloatTensor, float32 } from "../lib/common/tensor.js";
import { randomCheckpoint } from "./random-checkpoint.js";
import { machineLine, paired, ratios, report, root, type Spread, table } from "./support.js";

const { values } = parseArgs({
  options: {
    rounds: { type: "string", default: "15" },
    layers: { type: "string", default: "2" },
    size: { type: "string", default: "256" },
  },
});
const rounds = Number(values.rounds);
const layers = Number(values.layers);
const wideSize = Number(values.size);
const rank = 16;
/** Rounds before those that count: graphs are compiled, and batches of four are new. */
const warmUp = 2;
const adapters = ["first", "second", "third", "fourth"];

mkdirSync(path.join(root, "bench/.work"), { recursive: true });
const folder = mkdtempSync(path.join(root, "bench/.work/loras-"));

/** A LoRA of rank 16 on all layers of the blocks that trainers change by default: attention and feed-forward. */
async function adapter(checkpoint: string, name: string): Promise<string> {
  const { transformer } = await openCheckpoint(checkpoint);
  const tensors: Record<string, FloatTensor> = {};
  const numbers = (...shape: number[]) =>
    float32(
      shape,
      Float32Array.from({ length: shape[0]! * shape[1]! }, () => (Math.random() - 0.5) / 100),
    );
  for (let block = 0; block < transformer.config.numLayers; block++)
    for (const part of ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]) {
      const layer = `transformer_blocks.${block}.${part}`;
      const [to, from] = transformer.weights.find(`${layer}.weight`)!.shape as [number, number];
      tensors[`transformer.${layer}.lora_A.weight`] = numbers(rank, from);
      tensors[`transformer.${layer}.lora_B.weight`] = numbers(to, rank);
    }
  const file = path.join(folder, `${name}.safetensors`);
  await writeSafetensors(file, tensors);
  return file;
}

interface Row {
  readonly what: string;
  readonly milliseconds: Readonly<Record<string, number>>;
  readonly dynamic: Spread;
  readonly merged: Spread;
  readonly four: Spread;
  readonly first: { readonly milliseconds: number; readonly next: number };
}

async function measure(what: string, checkpoint: string, size: number): Promise<Row> {
  const cache = path.join(folder, "cache");
  const files = [];
  for (const name of adapters) files.push(await adapter(checkpoint, `${name}-${size}`));
  const common = { cache, measureCosts: false, weights: "folded" } as const;
  const model = await FlowTurbo.load(checkpoint, {
    ...common,
    loras: files.map((file, index) => ({ file, name: adapters[index]!, dynamic: true })),
  });
  const merged = await FlowTurbo.load(checkpoint, { ...common, loras: [{ file: files[0]!, name: "first" }] });
  const picture: GenerateOptions = {
    ...{ prompt: "a red circle", seed: 1, width: size, height: size, outputType: "latent" },
    ...{ sampler: "euler", steps: 2 },
  };
  /** Milliseconds of a step. */
  const step = async (each: FlowTurbo, options: Partial<GenerateOptions> = {}) => {
    const { timings } = await each.generate({ ...picture, ...options });
    return timings.steps.reduce((sum, time) => sum + time, 0) / timings.steps.length;
  };
  /** Milliseconds of a step that four pictures share. */
  const four = async (loras: (index: number) => GenerateOptions["loras"]) => {
    const requests = adapters.map((_, index) => step(model, { seed: index, loras: loras(index) }));
    return Math.max(...(await Promise.all(requests)));
  };
  try {
    const before = performance.now();
    await model.generate({ ...picture, loras: [{ name: "first" }] });
    const first = performance.now() - before;
    // The second one is that of a graph that has been compiled, with another adapter.
    const timed = async (name: string) => {
      const start = performance.now();
      await model.generate({ ...picture, loras: [{ name }] });
      return performance.now() - start;
    };
    const [fresh, next] = [await timed("second"), await timed("second")];
    let round = 0;
    const times = await paired(
      {
        none: () => {
          console.error(`${what}: round ${++round} of ${rounds + warmUp}`);
          return step(model);
        },
        dynamic: () => step(model, { loras: [{ name: "first", scale: 0.8 }] }),
        merged: () => step(merged),
        "four alike": () => four(() => undefined),
        "four adapters": () => four((index) => [{ name: adapters[index]! }]),
      },
      rounds,
      warmUp,
    );
    const median = (each: readonly number[]) => [...each].sort((a, b) => a - b)[each.length >> 1]!;
    return {
      what,
      milliseconds: { ...Object.fromEntries(Object.entries(times).map(([name, each]) => [name, median(each)])), first },
      dynamic: ratios(times.dynamic!, times.none!),
      merged: ratios(times.merged!, times.none!),
      four: ratios(times["four adapters"]!, times["four alike"]!),
      first: { milliseconds: fresh, next },
    };
  } finally {
    await Promise.all([model.dispose(), merged.dispose()]);
  }
}

try {
  const wide = await randomCheckpoint(layers);
  const rows = [
    await measure("the embedded model, 128 x 128", embeddedModel, 128),
    await measure(
      `${layers} ${layers === 1 ? "block" : "blocks"} of SD3.5-medium's width, ${wideSize} x ${wideSize}`,
      wide.folder,
      wideSize,
    ),
  ];
  const ratio = ({ median, min, max }: Spread) => `${median.toFixed(2)} (${min.toFixed(2)} to ${max.toFixed(2)})`;
  const page = [
    "# Dynamic LoRAs on the CPU",
    "",
    `Steps with guidance, with a LoRA of rank ${rank} whose matrices are inputs of the graph, by ratios of runs taken in turn: medians of ${rounds}, with the least and the greatest. ` +
      "Merged: the LoRA is in the weights. Four adapters: four requests at once with an adapter each in one launch, against four without. " +
      "The last two columns are whole pictures of two steps: the first with an adapter, whose matrices are packed and sent, and the next one. `npm run bench:loras`.",
    "",
    table([
      ["", "a step, ms", "dynamic / none", "merged / none", "four adapters / four without", "first, ms", "next, ms"],
      ...rows.map(({ what, milliseconds, dynamic, merged, four, first }) => [
        ...[what, milliseconds.none!.toFixed(0), ratio(dynamic), ratio(merged), ratio(four)],
        ...[first.milliseconds.toFixed(0), first.next.toFixed(0)],
      ]),
    ]),
    "",
    machineLine(),
  ];
  await report("loras", { rank, rounds, rows }, page.join("\n"));
} finally {
  rmSync(folder, { recursive: true, force: true });
}
