/**
 * One stage against two on captions of the shapes model, from its native size to twice that and from there to twice that
 * again: time (each way of drawing in turn on the same captions, as ratios within the round) and quality
 * (bench/shapes/detector.ts). Two stages run a part of the blocks at the smaller size, where a step is cheap, and the rest at the
 * target; σ says how far what was enlarged is noised again. Between the two either the finished picture is enlarged, through
 * the autoencoder (pixels), or the latents while they are noisy (latents). Writes bench/results/stages.{json,md} and a plot of each.
 *
 *   npm run bench:stages [-- --captions 96 --larger 24 --batch 8 --guidance 2]
 */

import { writeFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { FlowTurbo, type GenerateOptions, type UpscaleName } from "flowturbo";
import { type Series, svg } from "./plot.js";
import { type Score, score, type Verdict } from "./shapes/detector.js";
import { draw, judged, shareInterval } from "./shapes/pictures.js";
import { drawScenes } from "./shapes/world.js";
import { environment, format, report, resultsFolder, type Spread, spread } from "./support.js";

const { values } = parseArgs({
  options: {
    captions: { type: "string", default: "96" },
    larger: { type: "string", default: "24" },
    batch: { type: "string", default: "8" },
    guidance: { type: "string", default: "2" },
  },
});
const [batch, guidanceScale] = [Number(values.batch), Number(values.guidance)];

const model = await FlowTurbo.load(undefined, { measureCosts: false });
const { width: native } = model.nativeSize;
const sigmas = [0.3, 0.45, 0.6, 0.75];
const upscales: readonly UpscaleName[] = ["pixels", "latents"];
/** Blocks of the coarse and the fine stage: as few as show a difference, and as many as a single stage would have. */
const lists = [
  { coarse: "H1P1", fine: "H1" },
  { coarse: "H1P4", fine: "H1P2" },
  { coarse: "H1P7", fine: "H1P1" },
];

interface Contender {
  readonly name: string;
  readonly group: string;
  readonly options: Omit<GenerateOptions, "prompt" | "seed">;
  /** Of two stages: what is enlarged between them. */
  readonly upscale?: UpscaleName | undefined;
}

interface Row extends Pick<Contender, "name" | "group" | "upscale"> {
  readonly score: Score;
  readonly milliseconds: Spread;
  readonly upscaleMilliseconds: Spread;
  /** Sampling time over that of the reference in the same round. */
  readonly ratio: Spread;
}

interface Level {
  /** Pixels of the coarse and the fine stage. */
  readonly coarse: number;
  readonly fine: number;
  readonly captions: number;
  readonly rows: readonly Row[];
}

const referenceName = "H1P7";
const square = (side: number) => ({ width: side, height: side });
const isTwo = ({ upscale }: Pick<Row, "upscale">) => upscale !== undefined;

function contendersOf(coarse: number, fine: number): Contender[] {
  return [
    ...["H1P2", "H1P3", "H1P4", referenceName].map((blocks) => ({
      name: blocks,
      group: `one stage of ${fine} px`,
      options: { ...square(fine), blocks },
    })),
    ...lists.flatMap((list) =>
      upscales.flatMap((upscale) =>
        sigmas.map((sigma) => ({
          name: `${list.coarse} + ${list.fine} @ ${sigma}, ${upscale}`,
          group: `${coarse} px ${list.coarse}, then ${fine} px ${list.fine}, ${upscale}`,
          options: {
            stages: [
              { ...square(coarse), blocks: list.coarse },
              { ...square(fine), blocks: list.fine, sigma, upscale },
            ],
          },
          upscale,
        })),
      ),
    ),
  ];
}

async function measure(coarse: number, fine: number, captions: number): Promise<Level> {
  const contenders = contendersOf(coarse, fine);
  const reference = contenders.find(({ name }) => name === referenceName)!;
  const scenes = drawScenes(6_000_011, captions);
  const lists = () => new Map<Contender, number[]>(contenders.map((contender) => [contender, []]));
  const [times, upscales] = [lists(), lists()];
  const verdicts = new Map<Contender, Verdict[]>(contenders.map((contender) => [contender, []]));
  for (let start = -batch; start < captions; start += batch) {
    const part = scenes.slice(Math.max(0, start), Math.max(0, start) + batch);
    const order = (start / batch) % 2 ? contenders : [...contenders].reverse();
    for (const contender of order) {
      const result = await draw(model, part, Math.max(0, start), { ...contender.options, guidanceScale });
      if (start < 0) continue; // The first round warms up.
      const { steps, upscale } = result.timings;
      times.get(contender)!.push(steps.reduce((sum, step) => sum + step, upscale) / part.length);
      upscales.get(contender)!.push(upscale / part.length);
      verdicts.get(contender)!.push(...judged(result, part));
    }
    if (process.stderr.isTTY)
      process.stderr.write(`\r${coarse} to ${fine} px: ${Math.max(0, start + batch)} of ${captions} captions `);
  }
  const rows = contenders.map(
    (contender): Row => ({
      ...{ name: contender.name, group: contender.group, upscale: contender.upscale },
      score: score(verdicts.get(contender)!),
      milliseconds: spread(times.get(contender)!),
      upscaleMilliseconds: spread(upscales.get(contender)!),
      ratio: spread(times.get(contender)!.map((time, round) => time / times.get(reference)![round]!)),
    }),
  );
  return { coarse, fine, captions, rows };
}

function tableOf({ fine, rows }: Level): string {
  return [
    `| sampling | time / ${referenceName} at ${fine} px | of it the upscale | ground | colours | shapes | relations |`,
    "|---|---|---|---|---|---|---|",
    ...rows.map(({ name, ratio, upscaleMilliseconds, milliseconds, score: s }) => {
      const share = upscaleMilliseconds.median / milliseconds.median;
      const shares = [s.ground, s.colours, s.shapes, s.relation].map((share) => share.toFixed(3)).join(" | ");
      return `| ${name} | ${format(ratio)} | ${share > 0 ? `${(100 * share).toFixed(0)} %` : ""} | ${shares} |`;
    }),
  ].join("\n");
}

function chartOf({ coarse, fine, captions, rows }: Level): string {
  return svg({
    title: `Stages: ${coarse} → ${fine} px against ${fine} px, ${captions} captions`,
    x: { label: `sampling time, as a part of ${referenceName} at ${fine} px`, from: 0 },
    y: { label: "pictures whose shapes are right (95 % interval)", to: 1 },
    series: [...new Set(rows.map(({ group }) => group))].map((group): Series => {
      const members = rows.filter((row) => row.group === group);
      return {
        name: group,
        line: true,
        points: members.map(({ name, ratio, score: s }) => {
          const [low, high] = shareInterval(s.shapes, captions);
          const label = name.match(/@ [\d.]+/)?.[0] ?? name;
          return { x: ratio.median, y: s.shapes, low, high, label };
        }),
      };
    }),
  });
}

/** What the table says, in words: where two stages pay and where not. */
function findingsOf({ captions, rows }: Level): string {
  const ones = rows.filter((row) => !isTwo(row));
  const share = (value: number) => value.toFixed(3);
  return rows
    .filter(isTwo)
    .map((two) => {
      const [low, high] = shareInterval(two.score.shapes, captions);
      const against = (one: Row) => {
        const [from, to] = shareInterval(one.score.shapes, captions);
        return low > to ? "better" : from > high ? "worse" : "equal";
      };
      const rivals = ones.filter(({ ratio }) => ratio.median <= two.ratio.median * 1.05);
      const best = rivals.reduce<Row | null>((a, b) => (a && a.score.shapes >= b.score.shapes ? a : b), null);
      const [reference] = ones.filter(({ name }) => name === referenceName) as [Row];
      const named = (row: Row) => `${row.name} (${share(row.score.shapes)})`;
      const inTime = !best
        ? "no single stage is as fast"
        : {
            better: `pays: better than ${named(best)}, the best single stage in no more time`,
            worse: `does not pay: worse than ${named(best)} in no more time`,
            equal: `no difference that ${captions} captions could show from ${named(best)}, the best single stage in no more time`,
          }[against(best)];
      const ofReference = {
        better: "better than",
        worse: "worse than",
        equal: "as good, as far as these captions tell, as",
      }[against(reference)];
      return `- ${two.name} (shapes ${share(two.score.shapes)}): ${inTime}; ${ofReference} ${named(reference)} in ${(100 * two.ratio.median).toFixed(0)} % of its time.`;
    })
    .join("\n");
}

/** Latents against pixels: with the same blocks and σ, and at equal time. */
function comparisonOf({ captions, rows }: Level): string {
  const twos = rows.filter(isTwo);
  const pixels = twos.filter(({ upscale }) => upscale === "pixels");
  const verdict = (row: Row, other: Row) => {
    const [low, high] = shareInterval(row.score.shapes, captions);
    const [from, to] = shareInterval(other.score.shapes, captions);
    return low > to ? "**better**" : from > high ? "**worse**" : "no difference shown";
  };
  const described = (row: Row) => `${row.score.shapes.toFixed(3)} in ${row.ratio.median.toFixed(2)}`;
  const lines = twos
    .filter(({ upscale }) => upscale === "latents")
    .map((row) => {
      const same = pixels.find(({ name }) => name === row.name.replace("latents", "pixels"))!;
      const rivals = pixels.filter(({ ratio }) => ratio.median <= row.ratio.median * 1.05);
      const best = rivals.reduce<Row | null>((a, b) => (a && a.score.shapes >= b.score.shapes ? a : b), null);
      const atEqualTime = best ? `${best.name}: ${described(best)} | ${verdict(row, best)}` : "none is as fast | ";
      const name = row.name.replace(", latents", "");
      return `| ${name} | ${described(row)} | ${described(same)} | ${verdict(row, same)} | ${atEqualTime} |`;
    });
  return [
    "| blocks @ σ | latents: shapes, time | pixels, the same blocks | latents are | best of pixels in no more time (5 %) | latents are |",
    "|---|---|---|---|---|---|",
    ...lines,
  ].join("\n");
}

const levels = [
  await measure(native, 2 * native, Number(values.captions)),
  await measure(2 * native, 4 * native, Number(values.larger)),
];
await model.dispose();

/** Part of the sampling time that the upscale takes, least to greatest. */
function upscaleShare(way: UpscaleName): string {
  const shares = levels.flatMap(({ rows }) =>
    rows
      .filter(({ upscale }) => upscale === way)
      .map((row) => (100 * row.upscaleMilliseconds.median) / row.milliseconds.median),
  );
  return `${Math.min(...shares).toFixed(1)} to ${Math.max(...shares).toFixed(1)} %`;
}
const { cpu, cores, node, onnxruntime, commit } = environment() as Record<string, string>;
await report("stages", { batch, guidanceScale, native, levels });
for (const level of levels) await writeFile(path.join(resultsFolder, `stages-${level.fine}.svg`), chartOf(level));
await writeFile(
  path.join(resultsFolder, "stages.md"),
  `# One stage against two

\`npm run bench:stages -- --captions ${values.captions} --larger ${values.larger} --batch ${batch} --guidance ${guidanceScale}\` on ${cpu}, ${cores} cores, Node ${node}, ONNX Runtime ${onnxruntime}, commit ${commit}.

The embedded model in one stage, and in two, half the size first. Between two either the finished picture is enlarged, with a decode before
and an encode after it (*pixels*, the default), or the latents, at the noise level where the coarse stage then ends, with their noise
completed (*latents*: \`upscale: "latents"\`, RALU, arXiv 2507.08422). @ is the level σ at which the fine stage starts. Times are sampling with the upscale, without text encoders and
the last decoding, as ratios within one round (median, least to greatest); shares are of pictures that the detector finds right.
${levels
  .map(
    (level) => `
## ${level.coarse} to ${level.fine} px, ${level.captions} captions

${tableOf(level)}

![time against quality](stages-${level.fine}.svg)

${findingsOf(level)}

### Latents against pixels at ${level.fine} px

${comparisonOf(level)}
`,
  )
  .join("")}
Two stages save steps at the larger size and pay for the upscale: in pixels (decoding, enlarging, encoding) ${upscaleShare("pixels")} of the sampling
time here, in latents ${upscaleShare("latents")}. In latents all blocks of the coarse stage are spent above the level where it hands over. They pay where the coarse stage has settled what the picture shows and the fine one only draws it sharper; a high σ gives
the fine stage more to decide again, in fewer steps than a single stage has. The model has learnt ${native} and ${2 * native} px; ${4 * native} px are
beyond what it has seen, so that there the coarse stage also brings what a single one cannot draw.
`,
);
for (const level of levels)
  console.log(`\n${level.coarse} to ${level.fine} px\n${tableOf(level)}\n${findingsOf(level)}\n${comparisonOf(level)}`);
