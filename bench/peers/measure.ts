/** Measures one contender in turn with our Euler steps. */

import { mkdirSync, writeFileSync } from "node:fs";
import path from "node:path";
import { measureProcess, paired, ratios, spread } from "../support.js";
import type { Contender, PictureRequest, Place, Session } from "./contender.js";
import { baseline, type OurSession, readFloats } from "./flowturbo.js";
import type { Row, Start } from "./result.js";

const colours = ["red", "orange", "yellow", "green", "blue", "purple", "white", "black"];
let asked = 0;
/** A prompt that no contender has encoded yet. */
function freshPrompt(): string {
  const k = asked++;
  const [a, b, ground] = [k % 8, Math.floor(k / 8) % 8, Math.floor(k / 64) % 8].map((i) => colours[i]);
  return `a ${a} circle above a ${b} square on a ${ground} background`;
}

function freshRequest({ subject: { steps, guidance, size, tokens }, work }: Place): PictureRequest {
  const prompt = freshPrompt();
  return { prompt, steps, guidance, size, tokens, seed: asked, out: path.join(work, "picture.png") };
}

/** Our picture of a fixed request, which those of the contenders are compared with. */
export interface Reference {
  readonly request: PictureRequest;
  readonly pixels: Float32Array;
}

export async function reference(place: Place, ours: OurSession): Promise<Reference> {
  mkdirSync(place.work, { recursive: true });
  const noise = path.join(place.work, "noise.f32");
  const count = (await ours.noiseShape()).reduce((a, b) => a * b, 1);
  writeFileSync(noise, gaussian(count));
  const { steps, guidance, size, tokens } = place.subject;
  const prompt = "a red circle above a blue square";
  const request = { ...{ prompt, steps, guidance, size, tokens, noise }, seed: 1 };
  const pixels = path.join(place.work, "ours.f32");
  await ours.draw({ ...request, pixels });
  return { request, pixels: readFloats(pixels) };
}

function gaussian(count: number): Float32Array {
  const uniform = () => Math.random() || Number.MIN_VALUE;
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()),
  );
}

/** Every other round backwards, a warm-up first. @throws Error if the contender fails, or draws another picture where it must not */
export async function measure(
  place: Place,
  contender: Contender,
  ours: OurSession,
  { request, pixels }: Reference,
): Promise<Row> {
  const session = await contender.open(place);
  try {
    let agreement: Row["agreement"];
    if (!contender.ownNoise && !(contender.ours && contender.skips)) {
      const file = path.join(place.work, "theirs.f32");
      await session.draw({ ...request, pixels: file });
      agreement = difference(readFloats(file), pixels);
      if (contender.precision === "float32" && !(agreement.difference < 1e-2))
        throw new Error(`it draws another picture: values differ by ${agreement.difference.toFixed(3)} of 1`);
    }
    const parts: Record<string, { step: number[]; picture: number[] }> = {};
    const timed = (name: string, { draw }: Pick<Session, "draw">) => {
      const into = { step: [] as number[], picture: [] as number[] };
      parts[name] = into;
      return async () => {
        const { milliseconds, denoise, evaluations } = await draw(freshRequest(place));
        into.step.push(denoise / evaluations);
        into.picture.push(milliseconds);
        return milliseconds;
      };
    };
    const { rounds } = place.subject;
    const sessions = {
      ours: (each: PictureRequest) => ours.draw(each),
      theirs: (each: PictureRequest) => session.draw(each),
    };
    const turns = Object.entries(sessions).map(([name, draw]) => [name, timed(name, { draw })] as const);
    await paired(Object.fromEntries(turns), rounds, 1);
    // The first of each was the warm-up.
    const measured = (values: readonly number[]) => values.slice(-rounds);
    const [a, b] = [parts.ours!, parts.theirs!];
    const { name, precision, skips, ours: isOurs } = contender;
    return {
      ...{ name, precision, ...(skips ? { skips } : {}), ...(isOurs ? { ours: true } : {}) },
      step: spread(measured(b.step)),
      picture: spread(measured(b.picture)),
      stepRatio: ratios(measured(b.step), measured(a.step)),
      pictureRatio: ratios(measured(b.picture), measured(a.picture)),
      baseline: { step: spread(measured(a.step)), picture: spread(measured(a.picture)) },
      ...(agreement ? { agreement } : {}),
    };
  } finally {
    await session.close();
  }
}

function difference(theirs: Float32Array, ours: Float32Array): NonNullable<Row["agreement"]> {
  if (theirs.length !== ours.length) throw new Error(`its picture has ${theirs.length} values, ours ${ours.length}`);
  let [largest, squares] = [0, 0];
  for (let i = 0; i < ours.length; i++) {
    const delta = Math.abs(theirs[i]! - ours[i]!);
    largest = Math.max(largest, delta);
    squares += delta ** 2;
  }
  return { difference: largest, psnr: -10 * Math.log10(Math.max(squares / ours.length, 1e-12)) };
}

/** A new process each time: start, load, encode, the same steps, decode, PNG. Undefined for a contender that has none. */
export async function fromProcessStart(place: Place, contender: Contender): Promise<Start | undefined> {
  if (!contender.process) return undefined;
  const commands = { ours: await baseline.process!(place), theirs: await contender.process(place) };
  const peaks = { ours: [] as number[], theirs: [] as number[] };
  const rounds = Math.min(place.subject.rounds, 3);
  const turn = (name: "ours" | "theirs") => async () => {
    const { file, args } = commands[name];
    const { milliseconds, peak } = await measureProcess(file, args(freshRequest(place)));
    peaks[name].push(peak);
    return milliseconds;
  };
  const times = await paired({ ours: turn("ours"), theirs: turn("theirs") }, rounds, 1);
  const peak = (name: "ours" | "theirs") => spread(peaks[name].slice(-rounds));
  return {
    name: contender.name,
    time: spread(times.theirs!),
    ratio: ratios(times.theirs!, times.ours!),
    peak: peak("theirs"),
    baseline: { time: spread(times.ours!), peak: peak("ours") },
  };
}
