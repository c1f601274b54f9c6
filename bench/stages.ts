/**
 * One stage against two at twice the model's native size, on captions of the shapes model: time (each way of drawing in
 * turn on the same captions, as ratios within the round) and quality (bench/shapes/detector.ts). Two stages run half the
 * blocks at the native size, where a step is cheap, and the rest at the target; σ_j says how far the enlarged picture is
 * noised again. Writes bench/results/stages.{json,md,svg}.
 *
 *   npm run bench:stages [-- --captions 96 --batch 8 --guidance 2]
 */

import { writeFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { type Series, svg } from "./plot.js";
import { type Score, score, type Verdict } from "./shapes/detector.js";
import { draw, judged, shareInterval } from "./shapes/pictures.js";
import { drawScenes } from "./shapes/world.js";
import { environment, format, report, root, type Spread, spread } from "./support.js";

const { values } = parseArgs({
  options: {
    captions: { type: "string", default: "96" },
    batch: { type: "string", default: "8" },
    guidance: { type: "string", default: "2" },
  },
});
const [captions, batch, guidanceScale] = [values.captions, values.batch, values.guidance].map(Number) as [
  number,
  number,
  number,
];

const model = await FlowTurbo.load();
const { width: native } = model.nativeSize;
const size = 2 * native;
const sigmas = [0.3, 0.45, 0.6, 0.75];
/** Blocks of the coarse and the fine stage. */
const lists = [
  { coarse: "H1P4", fine: "H1P2" },
  { coarse: "H1P7", fine: "H1P1" },
];

interface Contender {
  readonly name: string;
  readonly group: string;
  readonly options: Omit<GenerateOptions, "prompt" | "seed">;
}

const square = (side: number) => ({ width: side, height: side });
const contenders: Contender[] = [
  ...["H1P2", "H1P3", "H1P4", "H1P7"].map((blocks) => ({
    name: blocks,
    group: `one stage of ${size} px`,
    options: { ...square(size), blocks },
  })),
  ...lists.flatMap(({ coarse, fine }) =>
    sigmas.map((sigma) => ({
      name: `${coarse} + ${fine} @ ${sigma}`,
      group: `${native} px ${coarse}, then ${size} px ${fine}`,
      options: {
        stages: [
          { ...square(native), blocks: coarse },
          { ...square(size), blocks: fine, sigma },
        ],
      },
    })),
  ),
];
const reference = contenders.find(({ name }) => name === "H1P7")!;

const scenes = drawScenes(6_000_011, captions);
const times = new Map<Contender, number[]>(contenders.map((contender) => [contender, []]));
const joins = new Map<Contender, number[]>(contenders.map((contender) => [contender, []]));
const verdicts = new Map<Contender, Verdict[]>(contenders.map((contender) => [contender, []]));
for (let start = -batch; start < captions; start += batch) {
  const part = scenes.slice(Math.max(0, start), Math.max(0, start) + batch);
  const order = (start / batch) % 2 ? contenders : [...contenders].reverse();
  for (const contender of order) {
    const result = await draw(model, part, Math.max(0, start), { ...contender.options, guidanceScale });
    if (start < 0) continue; // The first round warms up.
    const { steps, join } = result.timings;
    times.get(contender)!.push(steps.reduce((sum, step) => sum + step, join) / part.length);
    joins.get(contender)!.push(join / part.length);
    verdicts.get(contender)!.push(...judged(result, part));
  }
  if (process.stderr.isTTY) process.stderr.write(`\r${Math.max(0, start + batch)} of ${captions} captions `);
}
await model.dispose();

interface Row {
  readonly name: string;
  readonly group: string;
  readonly score: Score;
  readonly milliseconds: Spread;
  readonly joinMilliseconds: Spread;
  /** Sampling time over that of the reference in the same round. */
  readonly ratio: Spread;
}
const rows = contenders.map(
  (contender): Row => ({
    name: contender.name,
    group: contender.group,
    score: score(verdicts.get(contender)!),
    milliseconds: spread(times.get(contender)!),
    joinMilliseconds: spread(joins.get(contender)!),
    ratio: spread(times.get(contender)!.map((time, round) => time / times.get(reference)![round]!)),
  }),
);

const table = [
  `| sampling | time / ${reference.name} at ${size} px | of it the join | ground | colours | shapes | relations |`,
  "|---|---|---|---|---|---|---|",
  ...rows.map(({ name, ratio, joinMilliseconds, milliseconds, score: s }) => {
    const join = joinMilliseconds.median / milliseconds.median;
    const shares = [s.ground, s.colours, s.shapes, s.relation].map((share) => share.toFixed(3)).join(" | ");
    return `| ${name} | ${format(ratio)} | ${join > 0 ? `${(100 * join).toFixed(0)} %` : ""} | ${shares} |`;
  }),
].join("\n");
const chart = svg({
  title: `Stages: ${native} → ${size} px against ${size} px, ${captions} captions`,
  x: { label: `sampling time, as a part of ${reference.name} at ${size} px`, from: 0 },
  y: { label: "pictures whose shapes are right (95 % interval)", to: 1 },
  series: [...new Set(rows.map(({ group }) => group))].map((group): Series => {
    const members = rows.filter((row) => row.group === group);
    return {
      name: group,
      line: true,
      points: members.map(({ name, ratio, score: s }) => {
        const [low, high] = shareInterval(s.shapes, captions);
        const label = name.includes("@") ? name.slice(name.indexOf("@")) : name;
        return { x: ratio.median, y: s.shapes, low, high, label };
      }),
    };
  }),
});

/** What the table says, in words: where two stages pay and where not. */
function findings(): string {
  const ones = rows.filter(({ name }) => !name.includes("@"));
  const lines = rows
    .filter(({ name }) => name.includes("@"))
    .map((two) => {
      const rival = ones.filter(({ ratio }) => ratio.median <= two.ratio.median * 1.05);
      const best = rival.reduce<Row | null>((a, b) => (a && a.score.shapes >= b.score.shapes ? a : b), null);
      if (!best) return `- ${two.name} is faster than every single stage here.`;
      const [low, high] = shareInterval(two.score.shapes, captions);
      const [rivalLow, rivalHigh] = shareInterval(best.score.shapes, captions);
      const unclear = `no difference that ${captions} captions could show`;
      const verdict = low > rivalHigh ? "pays" : rivalLow > high ? "does not pay" : unclear;
      return `- ${two.name}: ${verdict} (shapes ${two.score.shapes.toFixed(3)} against ${best.score.shapes.toFixed(3)} of ${best.name} in no more time).`;
    });
  return lines.join("\n");
}

const shares = rows
  .filter(({ name }) => name.includes("@"))
  .map((r) => r.joinMilliseconds.median / r.milliseconds.median);
const joinShare = `${(100 * Math.min(...shares)).toFixed(0)} to ${(100 * Math.max(...shares)).toFixed(0)} %`;
const { cpu, cores, node, onnxruntime, commit } = environment() as Record<string, string>;
const folder = path.join(root, "bench/results");
await report("stages", { captions, batch, guidanceScale, native, size, rows });
await writeFile(path.join(folder, "stages.svg"), chart);
await writeFile(
  path.join(folder, "stages.md"),
  `# One stage against two

\`npm run bench:stages -- --captions ${captions} --batch ${batch} --guidance ${guidanceScale}\` on ${cpu}, ${cores} cores, Node ${node}, ONNX Runtime ${onnxruntime}, commit ${commit}.

The embedded model at ${size} × ${size} pixels: in one stage, and in two, ${native} px first. Times are sampling with the join,
without text encoders and the last decoding, as ratios within one round (median, least to greatest); shares are of pictures
that the detector finds right.

${table}

![time against quality](stages.svg)

${findings()}

Two stages save steps at the larger size and pay for the join (decoding, enlarging, encoding): ${joinShare} of the sampling time
here. They pay where the coarse stage has settled what the picture shows and the fine one only draws it sharper; a high σ_j gives
the fine stage more to decide again, in fewer steps than a single stage has.
`,
);
console.log(table);
