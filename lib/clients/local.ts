/**
 * Draws with a model of this process. What a request leaves open of an edit is as over HTTP: a picture of the original's
 * proportions, and with a mask all of the schedule.
 */

import { seedToJson } from "../common/seed.js";
import { sharp } from "../generation/sharp.js";
import { sizeLike } from "../generation/sizes.js";
import type { Control, GenerateOptions, ImageModel, Size } from "../model.js";
import type { DrawControls, Drawer, DrawerInfo, Drawn, DrawRequest, NamedControl } from "./drawer.js";
import { sharedOptions, textOptions } from "./drawer.js";
import { whiteMask } from "./masks.js";

/** Pictures of one call of `generate`. */
const maxImages = 1024;

/** @param open gives the model: it is called for each request, and loads the model when it is first called, if it likes */
export function localDrawer(open: (signal?: AbortSignal) => PromiseLike<ImageModel> | ImageModel): Drawer {
  return {
    address: "flowturbo:in-process",
    async info({ signal } = {}): Promise<DrawerInfo> {
      const { name, nativeSize } = await open(signal);
      return { name, nativeSize, maxImages };
    },
    async draw(request, { signal, onStep }: DrawControls = {}): Promise<Drawn> {
      const mask = request.mask && (await whiteMask("mask", request.mask));
      const controls = request.controls && (await Promise.all(request.controls.map(ownControl)));
      const model = await open(signal);
      signal?.throwIfAborted();
      const result = await model.generate({
        ...shared(request),
        ...(request.image && (await editDefaults(request, request.image, model))),
        ...{ prompt: request.prompt, count: request.count },
        ...{ image: request.image, mask, controls, signal, include: [] },
        // Pictures are bytes, and ControlNets are those that the model was loaded with.
        allowPaths: false,
        // Who asked for the picture knows what they asked for; they need not be told of this machine.
        metadata: "parameters",
        ...(onStep && { reports: "each" as const, onStep: ({ step, steps }) => onStep(step + 1, steps) }),
      });
      const { width, height, seeds, blocks, evaluations, deadline, warnings, tokens } = result;
      const { load: _, ...timings } = result.timings;
      const quality = request.compression === undefined ? {} : { quality: Math.max(1, request.compression) };
      return {
        pictures: await Promise.all(result.images.map((image) => image.encode(request.format, quality))),
        ...{
          width,
          height,
          seeds: seeds.map(seedToJson),
          blocks,
          evaluations,
          timings,
          deadline,
          warnings,
          model: model.name,
        },
        usage: {
          input: tokens.text + (request.image ? tokens.image : 0),
          output: tokens.image * result.images.length,
        },
        headers: null,
      };
    },
  };
}

function shared(request: DrawRequest): Partial<GenerateOptions> {
  return Object.fromEntries([...textOptions, ...sharedOptions].map((name) => [name, request[name]]));
}

async function ownControl({ name, mask, ...control }: NamedControl): Promise<Control> {
  return { ...control, folder: name, ...(mask && { mask: await whiteMask("controls", mask) }) };
}

/** Where a request to edit says neither size nor strength. What is no picture is for the model to refuse. */
async function editDefaults(request: DrawRequest, image: Uint8Array, { nativeSize }: ImageModel) {
  // What surrounds a mask does not have the picture's proportions.
  const isCut = request.paddingMaskCrop !== undefined;
  const isSized = request.width !== undefined || request.stages !== undefined || isCut;
  const found = isSized ? null : await sizeOfPicture(image);
  return {
    ...(found && sizeLike(found, nativeSize)),
    strength: request.strength ?? (request.mask ? 1 : undefined),
  };
}

/** Upright; null for what is no picture. */
async function sizeOfPicture(image: Uint8Array): Promise<Size | null> {
  const read = await sharp.load();
  return read(image)
    .metadata()
    .then(
      ({ autoOrient }) => autoOrient,
      () => null,
    );
}
