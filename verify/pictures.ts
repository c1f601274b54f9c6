/**
 * What the product runs, and single programs do not: requests that differ in size, steps, guidance and seed, drawn at the
 * same time through `FlowTurbo`, so that their rows are gathered into shared launches in pieces of one workspace. The
 * reference is the same requests on the CPU.
 */

import type { Checkpoint } from "../lib/checkpoint/index.js";
import type { Tensor } from "../lib/common/tensor.js";
import { FlowTurbo } from "../lib/flowturbo.js";
import { requiredEngines } from "../lib/generation/engines.js";
import { sharp } from "../lib/generation/sharp.js";
import type { GenerateOptions, GenerateResult } from "../lib/model.js";
import type { GraphLibrary } from "../lib/networks/library.js";
import type { ProfileShapes } from "../lib/runtimes/builder.js";
import type { TensorRtKind } from "../lib/runtimes/tensorrt/flavours.js";
import type { Pictures, ReferencedPicture } from "./bundle.js";
import type { Size } from "./cases.js";
import { type Bar, compare, type Difference, isWithin } from "./check.js";

/** Options of `generate` that mean the same on every machine. */
export interface PictureRequest {
  readonly name: string;
  /** Whether it belongs to the small set. */
  readonly quick: boolean;
  readonly options: GenerateOptions;
}

export function pictureRequests({ refiner }: Checkpoint, sizes: readonly Size[]): PictureRequest[] {
  const [size] = sizes as [Size, ...Size[]];
  const other = sizes[1] ?? size;
  const [short, long] = refiner ? ["H1P1R1", "H1P3R2"] : ["H1P2", "H1P5"];
  const requests: PictureRequest[] = [
    {
      ...{ name: `${short}, guidance 4`, quick: true },
      options: { prompt: "a red circle above a blue square", ...size, blocks: short, guidanceScale: 4, seed: 1 },
    },
    {
      ...{ name: `${long}, guidance 6, negative prompt`, quick: true },
      options: {
        ...{ prompt: "a harbour in the morning fog", negativePrompt: "people", ...size },
        ...{ blocks: long, guidanceScale: 6, seed: 2 },
      },
    },
    {
      ...{ name: "two pictures, Euler, another size", quick: false },
      options: {
        ...{ prompt: "a lighthouse at dusk", ...other, sampler: "euler", steps: 3 },
        ...{ guidanceScale: 2.5, seed: 3, count: 2 },
      },
    },
    {
      ...{ name: "without guidance", quick: false },
      options: { prompt: "two green triangles", ...size, blocks: short, guidanceScale: 1, seed: 5 },
    },
  ];
  if (size.width <= other.width && size.height <= other.height && size !== other)
    requests.push({
      ...{ name: "two stages", quick: false },
      options: {
        ...{ prompt: "a bowl of lemons", guidanceScale: 3, seed: 6 },
        stages: [
          { ...size, blocks: "H1P1" },
          { ...other, blocks: "P2" },
        ],
      },
    });
  return requests;
}

/** What ONNX Runtime draws for the requests. @param folder of the checkpoint */
export async function referencePictures(
  folder: string,
  requests: readonly PictureRequest[],
  say: (line: string) => void,
): Promise<ReferencedPicture[]> {
  withoutSharp();
  const model = await FlowTurbo.load(folder, { runtime: "onnxruntime", measureCosts: false });
  try {
    const drawn: ReferencedPicture[] = [];
    for (const request of requests) {
      say(`reference picture ${drawn.length + 1} of ${requests.length}: ${request.name}`);
      drawn.push({ request, expected: valuesOf(await model.generate(wanted(request))) });
    }
    return drawn;
  } finally {
    await model.dispose();
  }
}

/** Shapes that engines need so that none has to be built while pictures are drawn. */
export function pictureProfiles(
  graphs: GraphLibrary,
  pictures: Pictures,
  quick: boolean,
): { readonly graph: string; readonly inputs: ProfileShapes }[] {
  const requests = requestsOf(pictures, quick).map(({ request: { options } }) => options);
  const needed = requiredEngines(graphs, {
    sizes: requests.flatMap((options): Size[] => (options.stages ? [options.stages].flat() : [options as Size])),
    batches: quick ? [Math.max(...pictures.batches)] : pictures.batches,
    guidance: quick ? "on" : "both",
    features: requests.some(({ stages }) => stages) ? ["stages"] : [],
  });
  return needed.flatMap(({ graph, profiles }) => profiles.map(({ inputs }) => ({ graph, inputs })));
}

function requestsOf({ requests }: Pictures, quick: boolean): readonly ReferencedPicture[] {
  return requests.filter(({ request }) => !quick || request.quick);
}

/** A way to draw all requests at the same time. */
export interface PictureSet {
  readonly name: string;
  readonly capture: boolean;
  readonly more: Partial<GenerateOptions>;
  /** How often: a program is recorded at its first run and replayed after that. */
  readonly times: number;
}

export function pictureSets({ batches }: Pictures, quick: boolean): PictureSet[] {
  const most = Math.max(...batches);
  const padded = { name: `padded to ${most}`, capture: false, more: { pinBatch: most }, times: 1 };
  if (quick) return [padded];
  return [
    { name: "at the same time", capture: false, more: {}, times: 1 },
    padded,
    { name: "captured", capture: true, more: {}, times: 2 },
  ];
}

export interface PictureFinding {
  readonly name: string;
  readonly bar: Bar;
  readonly passed: boolean;
  readonly differences: readonly Difference[];
  /** Milliseconds from call to result. */
  readonly total: number;
  readonly problems: readonly string[];
}

export interface PictureOptions {
  readonly kind: TensorRtKind;
  readonly folder: string | undefined;
  readonly cache: string | undefined;
  readonly bar: Bar;
  readonly quick: boolean;
  /** Submissions that ran as one CUDA graph, since the process began. */
  replays(): number;
}

/** Never rejects: what goes wrong is in the findings. @param model folder of the checkpoint */
export async function checkPictures(
  model: string,
  pictures: Pictures,
  { name, capture, more, times }: PictureSet,
  { kind, folder, cache, bar, quick, replays }: PictureOptions,
): Promise<PictureFinding[]> {
  withoutSharp();
  const findings: PictureFinding[] = [];
  try {
    const built: string[] = [];
    await using product = await FlowTurbo.load(model, {
      logger: { info: (words) => (words.includes("it is being built") ? built.push(words) : undefined) },
      ...{ runtime: kind, tensorrtFolder: folder, cache, capture, measureCosts: false },
      // Long enough for requests of the same moment to share their launches.
      ...{ batches: [...pictures.batches], maxWaitMs: 100 },
    });
    const before = replays();
    for (let time = 0; time < times; time++)
      findings.push(
        ...(await Promise.all(
          requestsOf(pictures, quick).map((picture) => checkPicture(product, picture, name, bar, more)),
        )),
      );
    const { launches, rowsPerLaunch } = product.stats();
    const shared = Object.keys(rowsPerLaunch).some((rows) => Number(rows) > 1);
    // All engines were built before, for these very shapes.
    if (built.length > 0) findings.push(failed(`all requests, ${name}`, bar, built));
    if (capture && replays() === before)
      findings.push(failed(`all requests, ${name}`, bar, ["no program was replayed as one CUDA graph"]));
    if (!capture && Math.max(...pictures.batches) > 1 && !shared)
      findings.push(failed(`all requests, ${name}`, bar, [`none of ${launches.count} launches was shared`]));
  } catch (error) {
    findings.push(failed(`all requests, ${name}`, bar, [describe(error)]));
  }
  return findings;
}

async function checkPicture(
  product: FlowTurbo,
  { request, expected }: ReferencedPicture,
  how: string,
  bar: Bar,
  more: Partial<GenerateOptions>,
): Promise<PictureFinding> {
  const name = `${request.name}, ${how}`;
  const start = performance.now();
  try {
    const drawn = valuesOf(await product.generate({ ...wanted(request), ...more }));
    const differences = compare(drawn, expected);
    const total = performance.now() - start;
    return { name, bar, passed: isWithin(differences, bar), differences, total, problems: [] };
  } catch (error) {
    return failed(name, bar, [describe(error)]);
  }
}

function failed(name: string, bar: Bar, problems: readonly string[]): PictureFinding {
  return { name, bar, passed: false, differences: [], total: Number.NaN, problems };
}

function describe(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}

function wanted({ options }: PictureRequest): GenerateOptions {
  return { ...options, include: ["latents", "pixels"] };
}

function valuesOf({ latents, pixels }: GenerateResult): Record<string, Tensor> {
  return { latents: latents!, pixels: pixels! };
}

/** Values are compared and no file is written: what encodes pictures need not be there. */
function withoutSharp(): void {
  const none: unknown = () => {
    throw new Error("verify:gpu encodes no pictures.");
  };
  sharp.replaceWith(none as Awaited<ReturnType<typeof sharp.load>>);
}
