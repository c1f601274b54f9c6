/**
 * TAESD's own files: one for the decoder, one for the encoder, whose tensors are named by their places in a sequence of layers, as in
 * madebyollin/taesd and ComfyUI's vae_approx. diffusers' AutoencoderTiny is the same network: its decoder counts one layer less, since it
 * does not count the bound of the latents.
 */

import { realpath } from "node:fs/promises";
import { type FileVersion, versionOf } from "../../common/files.js";
import { encoderBeside } from "../../common/weight-names.js";
import { CheckpointError } from "../../errors.js";
import type { TinyVaeConfig } from "../configs.js";
import { exists } from "../files.js";
import type { LocatedEntry } from "../quantised.js";
import { readSafetensorsHeader, type SafetensorsHeader } from "../safetensors.js";
import { locatedWeights, type Weights } from "../weights.js";
import { refuseAlike, refuseOtherFormats } from "./kinds.js";

const halves = {
  /** Its layer 0 is the bound of the latents. */
  decoder: { first: 1 },
  encoder: { first: 0 },
} as const;

type HalfName = keyof typeof halves;

/** A convolution, `3.weight`, or one of a block's three, `3.conv.0.weight`. Numbers have no zeros before them, so that no two names become one. */
const tensorName = /^(0|[1-9]\d{0,3})\.(conv\.[024]\.)?(weight|bias)$/;

/** One of the two files. */
interface Half {
  readonly name: HalfName;
  readonly path: string;
  readonly header: SafetensorsHeader;
  /** Shapes of the convolutions outside of blocks, in order; the first and the last are those of input and output. */
  readonly convolutions: readonly (readonly number[])[];
  /** Blocks between each convolution and the next. */
  readonly blocks: readonly number[];
}

export interface Taesd {
  readonly config: TinyVaeConfig;
  readonly weights: Weights;
  /** Whether the encoder's file lies beside the decoder's. */
  readonly canEncode: boolean;
}

/**
 * Reads the header of TAESD's decoder, and that of its encoder where that lies beside it under the same name. Their latents are those
 * of the transformer as they are.
 * @throws CheckpointError for a file that is none, with what it is instead. `signal.reason` after an abort.
 */
export async function readTaesd(path: string, signal?: AbortSignal): Promise<Taesd> {
  const decoder = await readHalf(path, signal);
  if (decoder.name === "encoder")
    throw new CheckpointError(
      path,
      `${path} is TAESD's encoder alone, and previews are decoded: pass the decoder's file, such as taesd3_decoder.safetensors. The encoder's is found beside it.`,
    );
  const beside = encoderBeside(path);
  const encoder = beside !== null && (await exists(beside)) ? await readHalf(beside, signal) : null;
  const { latentChannels, channels, pictureChannels, blocks } = read(decoder);
  const other = encoder && read(encoder);
  if (encoder && (encoder.name !== "encoder" || other!.latentChannels !== latentChannels))
    throw new CheckpointError(
      encoder.path,
      `${encoder.path} is not the encoder of ${path}: it is ${encoder.name === "encoder" ? `one for ${other!.latentChannels} channels of latents, and not ${latentChannels}` : "a decoder"}. Remove or replace it.`,
    );
  const found = [decoder, ...(encoder ? [encoder] : [])];
  return {
    config: {
      ...{ kind: "tiny", latentChannels, scalingFactor: 1, shiftFactor: 0, outChannels: pictureChannels },
      // Of an encoder that is not there nothing is asked.
      ...{ inChannels: other?.pictureChannels ?? pictureChannels, numEncoderBlocks: other?.blocks ?? [] },
      encoderBlockOutChannels: other?.blocks.map(() => other.channels) ?? [],
      numDecoderBlocks: blocks,
      ...{ decoderBlockOutChannels: blocks.map(() => channels), blockOutChannels: blocks.map(() => channels) },
      factor: 2 ** (blocks.length - 1),
    },
    weights: await weightsOf(path, found),
    canEncode: encoder !== null,
  };
}

async function readHalf(path: string, signal: AbortSignal | undefined): Promise<Half> {
  await refuseOtherFormats(path);
  const header = await readSafetensorsHeader(path, { signal });
  refuseAlike(path, header);
  const names = [...header.keys()];
  const other = names.find((name) => !tensorName.test(name));
  const wanted =
    "Pass TAESD's taesd3_decoder.safetensors, or a folder with config.json and weights, such as a downloaded taesd3.";
  if (names.some((name) => name.startsWith("decoder.layers.")))
    throw new CheckpointError(
      path,
      `${path} holds the weights of diffusers' AutoencoderTiny without its configuration: pass the folder with that file and config.json.`,
    );
  const layers = layersOf(header);
  const convolutions = layers.filter((shape) => shape !== null);
  if (other !== undefined || convolutions.length < 2 || convolutions.some(({ length }) => length !== 4))
    throw new CheckpointError(
      path,
      `${path} is no decoder of TAESD: it has ${names.length === 0 ? "no tensors" : `tensors such as "${other ?? names[0]}"`}. ${wanted}`,
    );
  const blocks: number[] = [];
  for (const shape of layers) {
    if (shape) blocks.push(0);
    else if (blocks.length > 0) blocks[blocks.length - 1]!++;
  }
  return { name: header.has("0.weight") ? "encoder" : "decoder", path, header, convolutions, blocks };
}

/** The layers that have weights, in order: convolutions with their shapes, blocks with null. */
function layersOf(header: SafetensorsHeader): (readonly number[] | null)[] {
  const layers = new Map<number, readonly number[] | null>();
  for (const [name, { shape }] of header) {
    const [, number, inBlock, kind] = tensorName.exec(name) ?? [];
    if (inBlock) layers.set(Number(number), null);
    else if (kind === "weight") layers.set(Number(number), shape);
  }
  return [...layers].sort(([a], [b]) => a - b).map(([, shape]) => shape);
}

/** What the shapes of [outputs, inputs, 3, 3] say. */
function read({ name, convolutions, blocks }: Half) {
  const [channels, inputs] = convolutions[0] as [number, number];
  const [outputs] = convolutions.at(-1) as [number];
  const [latentChannels, pictureChannels] = name === "decoder" ? [inputs, outputs] : [outputs, inputs];
  // Of a decoder the first convolution is followed by the blocks of the smallest pictures, each further one by those of pictures twice as large.
  return { latentChannels, pictureChannels, channels, blocks: blocks.slice(0, -1) };
}

async function weightsOf(origin: string, found: readonly Half[]): Promise<Weights> {
  const tensors = new Map<string, LocatedEntry>();
  const files: FileVersion[] = [];
  for (const { name: half, path, header } of found) {
    // Without links, as runtimes open it.
    const file = await realpath(path);
    files.push(await versionOf(file));
    for (const entry of header.values()) tensors.set(diffusersName(half, entry.name), { file, entry });
  }
  return {
    ...locatedWeights(origin, files, tensors),
    storedName: (name) =>
      name.replace(/^(decoder|encoder)\.layers\.(\d+)/, (_, half: HalfName, layer) =>
        String(Number(layer) + halves[half].first),
      ),
  };
}

/** `3.conv.0.weight` of the decoder → `decoder.layers.2.conv.0.weight` */
function diffusersName(half: HalfName, name: string): string {
  return name.replace(/^\d+/, (layer) => `${half}.layers.${Number(layer) - halves[half].first}`);
}
