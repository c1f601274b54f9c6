/** The option `controls` × a model → the controls of a request. Every refusal that needs no picture is here. */

import type { ControlNet } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import type { PictureSource, PixelRange } from "../model.js";
import { controlChannels } from "../networks/index.js";
import type { ResolvedGenerateOptions } from "../options.js";
import { type ControlKind, controlledStages } from "./additions.js";
import type { Candidate, CandidateFacts } from "./candidates.js";
import { ControlNets, type KnownControlNets } from "./control-nets.js";
import { checkControlSizes } from "./sizes.js";

/** How 8-bit values become what the autoencoder encodes. */
export const pixelRanges: Readonly<Record<PixelRange, (value: number) => number>> = {
  signed: (value) => value / 127.5 - 1,
  // Of the model card, for pixels in [0, 1]: image * 255 * 0.5 + 0.5.
  stability_canny: (value) => value * 0.5 + 0.5,
};

/** One control of a request, settled. */
export interface ControlRequest {
  readonly controlNet: ControlNet;
  /** Its place in the option. */
  readonly index: number;
  /** What the ControlNet is called: in pictures' parameters, too. */
  readonly name: string;
  readonly image: PictureSource;
  /** Where an inpainting ControlNet paints; null for others. */
  readonly mask: PictureSource | null;
  readonly scale: number;
  /** The part of the steps that it is used in: see `controlledStages`. */
  readonly start: number;
  readonly stop: number;
  readonly preprocess: "canny" | null;
  readonly pixelRange: PixelRange;
  /** What the caller should know. */
  readonly warnings: readonly string[];
}

/** Its configuration says nothing of pixels: it is that of Stability's other ControlNets of SD3.5-large. */
function looksLikeStabilitysCanny(name: string, { folder, config }: ControlNet): boolean {
  return config.jointAttentionDim === null && [name, folder].some((text) => /canny/i.test(text));
}

function otherRange(name: string): string {
  return (
    `The ControlNet "${name}" may be Stability's Canny of SD3.5-large, which was trained with other values of pixels than all others: then give ` +
    'pixelRange: "stability_canny" for it (--control-range stability_canny); otherwise "signed".'
  );
}

/** A control as far as programs know of it. */
export function controlKind({ controlNet: { id, config }, scale, start, stop }: ControlRequest): ControlKind {
  return { id, channels: controlChannels(config), scale, start, stop };
}

/**
 * The controls of a request without those of scale 0, which change nothing, and of its candidates those in which each control has a step.
 * @throws OptionError for a ControlNet that is not known, an interval without a step, a mask that is missing or needless, and a size that
 *   a ControlNet has no positions for
 */
export function settleControls(
  { controls = [], allowPaths }: ResolvedGenerateOptions,
  model: Pick<CandidateFacts, "checkpoint"> & {
    readonly allowPaths: boolean;
    readonly controlNets: KnownControlNets | undefined;
  },
  candidates: readonly [Candidate, ...Candidate[]],
): { readonly controls: readonly ControlRequest[]; readonly candidates: readonly [Candidate, ...Candidate[]] } {
  const { checkpoint, controlNets: nets = ControlNets.none(checkpoint) } = model;
  const settled = controls.map((control, index): ControlRequest => {
    const { folder, image, mask, scale = 1, start = 0, stop = 1, preprocess = null, pixelRange = "signed" } = control;
    const refuse = (message: string): never => {
      throw new OptionError("controls", message);
    };
    const field = `controls[${index}]`;
    const { name, controlNet } = nets.get(folder, allowPaths && model.allowPaths);
    const { takesMask } = controlNet.config;
    if (takesMask && mask === undefined)
      refuse(
        `The ControlNet "${name}" is one for inpainting; give ${field}.mask (--control-mask), white where it is to paint.`,
      );
    if (!takesMask && mask !== undefined)
      refuse(`The ControlNet "${name}" takes no mask (it is none for inpainting); leave out ${field}.mask.`);
    if (start >= stop) refuse(`Expected ${field}.start (${start}) below ${field}.stop (${stop}).`);
    const warnings =
      control.pixelRange === undefined && looksLikeStabilitysCanny(name, controlNet) ? [otherRange(name)] : [];
    return { controlNet, index, name, image, mask: mask ?? null, scale, start, stop, preprocess, pixelRange, warnings };
  });
  const used = settled.filter(({ scale }) => scale !== 0);
  const hasSteps = ({ stages }: Candidate) =>
    used.every((control) => controlledStages(control, stages).some((isControlled) => isControlled));
  const [first, ...others] = candidates.filter(hasSteps);
  if (!first) throw withoutStep(used, candidates[0]);
  for (const { controlNet, name, ...control } of used) {
    const isControlled = controlledStages(control, first.stages);
    const sizes = first.stages.filter((_, index) => isControlled[index]);
    checkControlSizes(controlNet, checkpoint, sizes, name);
  }
  return { controls: used, candidates: [first, ...others] };
}

function withoutStep(controls: readonly ControlRequest[], { stages }: Candidate): OptionError {
  const { index, start, stop } = controls.find((control) => !controlledStages(control, stages).includes(true))!;
  const { steps } = stages[0]!.place;
  return new OptionError(
    "controls",
    `With controls[${index}].start ${start} and controls[${index}].stop ${stop} no step would be controlled: step i of ${steps}, from 0, is where i / ${steps} ≥ start and (i + 1) / ${steps} ≤ stop, and where it is run and is none of the refiner. Give a wider interval, or more steps.`,
  );
}
