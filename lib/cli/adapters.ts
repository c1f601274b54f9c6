/** Flags of adapters and of skip-layer guidance: texts such as `file:scale@start-stop`, read from the right, since paths may hold colons. */

import { existsSync } from "node:fs";
import type { Command } from "commander";
import { checkpointName, nameOfLora } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import type {
  AdapterNames,
  Control,
  ControlNetSource,
  LoadOptions,
  LoraSource,
  LoraUse,
  PixelRange,
  SkipLayers,
} from "../model.js";
import { adapterScale } from "../options.js";

/** Flags of what a model is loaded with. */
export interface LoadAdapterFlags {
  lora?: string[];
  dynamicLora?: string[];
  controlNet?: string[];
}

/** Flags of what a picture is drawn with. */
export interface RequestAdapterFlags {
  useLora?: string[];
  control?: string[];
  controlMask?: string[];
  canny?: boolean;
  controlRange?: string;
  skipLayers?: string;
}

/** Options that each command has a flag of its own for: `--lora`, `--use-lora` or `--loras`. What is wrong with them names it. */
export const namedByCommand: readonly string[] = ["loras", "controls"];

const repeated = (text: string, before: string[] = []) => [...before, text];

/** Adds the flag of LoRAs that are merged into the weights. */
export function addMergedLoras(command: Command): Command {
  const description = "LoRA that is merged into the weights (repeatable), as style.safetensors:0.8";
  return command.option("--lora <file:scale>", description, repeated);
}

/** Adds the flags of adapters that a model is loaded with. */
export function addLoadAdapters(command: Command): void {
  addMergedLoras(command)
    .option(
      "--dynamic-lora <name=file:scale>",
      "LoRA that requests name (repeatable), as style=style.safetensors; the scale is for requests that say none",
      repeated,
    )
    .option(
      "--control-net <name=folder>",
      "ControlNet that requests name (repeatable), as canny=./controlnet",
      repeated,
    );
}

/** Adds the flags of adapters that a picture is drawn with. */
export function addRequestAdapters(command: Command): void {
  command
    .option("--use-lora <name:scale>", "dynamic LoRA of this picture (repeatable), as style:0.8", repeated)
    .option(
      "--control <folder:image:scale@start-stop>",
      "ControlNet and its control picture (repeatable), as ./canny:edges.png:0.8@0-0.7",
      repeated,
    )
    .option(
      "--control-mask <picture>",
      "where a ControlNet for inpainting paints, white; repeated, one for each --control in their order",
      repeated,
    )
    .option("--canny", "make the control pictures of the edges of those that --control names")
    .option(
      "--control-range <name>",
      "values of the control pictures' pixels: signed (-1 to 1), or stability_canny, which Stability's Canny ControlNet of SD3.5-large was trained with (default: signed)",
    )
    .option(
      "--skip-layers <blocks:scale@start-stop>",
      "skip-layer guidance without these blocks, as 7,8,9:2.8@0.01-0.2; for SD3.5-medium, it harms large",
    );
}

/** Options of `load` that the flags stand for. @throws OptionError for a text that cannot be read */
export function readLoadAdapters(flags: LoadAdapterFlags): {
  loras?: LoraSource[];
  controlNets?: ControlNetSource[];
} {
  const loras = [
    ...(flags.lora ?? []).map((text): LoraSource => {
      const { rest: file, scale } = checkedLora("--lora", text, scaledFile(text, "--lora"));
      return { file, ...(scale !== undefined && { scale }) };
    }),
    ...(flags.dynamicLora ?? []).map((text): LoraSource => {
      const { name, rest } = named(text);
      const { rest: file, scale } = checkedLora("--dynamic-lora", text, scaledFile(rest, "--dynamic-lora"));
      return { ...{ file, dynamic: true }, ...(name !== undefined && { name }), ...(scale !== undefined && { scale }) };
    }),
  ];
  const controlNets = (flags.controlNet ?? []).map((text): ControlNetSource => {
    const { name, rest: folder } = named(text);
    return { folder, ...(name !== undefined && { name }) };
  });
  return { ...(loras.length > 0 && { loras }), ...(controlNets.length > 0 && { controlNets }) };
}

/**
 * What requests call the adapters of `load`, before the model is loaded.
 * @throws CheckpointError for a folder that holds no LoRA, or several
 */
export async function adapterNames({
  loras = [],
  controlNets = [],
}: Pick<LoadOptions, "loras" | "controlNets">): Promise<AdapterNames> {
  const dynamic = loras.filter((lora) => lora.dynamic);
  return {
    loras: await Promise.all(dynamic.map(async ({ name, file }) => name ?? (await nameOfLora(file)))),
    controlNets: controlNets.map(({ name, folder }) => name ?? checkpointName(folder)),
  };
}

/** Options of `generate` that the flags stand for. @throws OptionError for a text that cannot be read */
export function readRequestAdapters(flags: RequestAdapterFlags): {
  loras?: LoraUse[];
  controls?: Control[];
  skipLayers?: SkipLayers;
} {
  const loras = flags.useLora?.map((text): LoraUse => {
    const { rest: name, scale } = checkedLora("--use-lora", text, scaled(text));
    return { name, ...(scale !== undefined && { scale }) };
  });
  const { controlRange: pixelRange, controlMask: masks = [] } = flags;
  const controls = flags.control?.map((text, index) => ({
    ...readControl(text, flags.canny ?? false),
    ...(masks[index] !== undefined && { mask: masks[index] }),
    // Names that there are not are refused as they are from code.
    ...(pixelRange !== undefined && { pixelRange: pixelRange as PixelRange }),
  }));
  if (pixelRange !== undefined && !controls)
    throw new OptionError(
      "controlRange",
      "The flag --control-range is about control pictures; name a ControlNet with --control too.",
    );
  if (masks.length > (controls?.length ?? 0))
    throw new OptionError(
      "controlMask",
      "The flag --control-mask is of the --control in the same place; name the ControlNet for inpainting before others, and give one mask for each.",
    );
  if (flags.canny && !controls)
    throw new OptionError("canny", "The flag --canny makes control pictures; name a ControlNet with --control too.");
  return {
    ...(loras && { loras }),
    ...(controls && { controls }),
    ...(flags.skipLayers !== undefined && { skipLayers: readSkipLayers(flags.skipLayers) }),
  };
}

function readControl(text: string, canny: boolean): Control {
  const { rest: places, start, stop } = within(text);
  const { rest, scale } = scaled(places);
  // The division at which both sides are there, or else the last but for the drive of a Windows path.
  const colons = [...rest.matchAll(/:/g)].map(({ index }) => index).filter((at) => !isDrive(rest, at));
  const found = colons.filter((at) => existsSync(rest.slice(at + 1))).at(0) ?? colons.at(-1);
  if (found === undefined || found === 0 || found === rest.length - 1)
    throw new OptionError(
      "controls",
      `Expected a ControlNet's folder and a picture as folder:image, such as ./canny:edges.png:0.8@0-0.7, for --control but received "${text}".`,
    );
  const end = colons.at(-1)!;
  if (
    found === end &&
    colons.some((at) => at < end && existsSync(rest.slice(at + 1, end))) &&
    !existsSync(rest.slice(end + 1))
  )
    throw new OptionError(
      "controls",
      `Expected a scale, or a scale and an interval, such as 0.8@0-0.7 behind the picture for --control but received "${rest.slice(end + 1)}" in "${text}".`,
    );
  return {
    ...{ folder: rest.slice(0, found), image: rest.slice(found + 1) },
    ...(scale !== undefined && { scale }),
    ...(start !== undefined && { start, stop }),
    ...(canny && { preprocess: "canny" as const }),
  };
}

/** Whether a colon belongs to the drive of a Windows path: C:\ or C:/ at the beginning, or behind another colon. */
function isDrive(text: string, at: number): boolean {
  return /(^|:)[A-Za-z]$/.test(text.slice(0, at)) && /^[\\/]/.test(text.slice(at + 1));
}

function readSkipLayers(text: string): SkipLayers {
  const { rest: places, start, stop } = within(text);
  const { rest, scale } = scaled(places);
  const layers = rest.split(",").map((each) => each.trim());
  if (!layers.every((each) => /^\d+$/.test(each)))
    throw new OptionError(
      "skipLayers",
      `Expected numbers of blocks such as 7,8,9:2.8@0.01-0.2 for --skip-layers but received "${text}".`,
    );
  return {
    layers: layers.map(Number),
    ...(scale !== undefined && { scale }),
    ...(start !== undefined && { start, stop }),
  };
}

const number = "[+-]?(?:\\d+\\.?\\d*|\\.\\d+)(?:[eE][+-]?\\d+)?";

/** `rest:scale`, if a number follows the last colon. */
function scaled(text: string): { rest: string; scale?: number } {
  const [, rest, scale] = new RegExp(`^(.+):(${number})$`, "s").exec(text) ?? [];
  return rest === undefined ? { rest: text } : { rest, scale: Number(scale) };
}

/** `read` of the text of a flag. @throws OptionError that names the flag, for no name or a scale out of range */
function checkedLora(flag: string, text: string, read: ReturnType<typeof scaled>): ReturnType<typeof scaled> {
  if (read.rest !== "" && adapterScale.optional().safeParse(read.scale).success) return read;
  const wanted =
    flag === "--use-lora" ? "the name of a LoRA, such as style" : "the file of a LoRA, such as style.safetensors";
  throw new OptionError(
    "loras",
    `Expected ${wanted}, and where it has a scale a number from -100 to 100 behind a colon for ${flag} but received "${text}".`,
  );
}

/**
 * `file:scale`. What is there only as a whole, such as a folder "epoch:10", has no scale.
 * @throws OptionError for a file that is there with something else than a number behind it
 */
function scaledFile(text: string, flag: string): ReturnType<typeof scaled> {
  const parts = scaled(text);
  const isThere = existsSync(text);
  if (parts.scale !== undefined) return isThere && !existsSync(parts.rest) ? { rest: text } : parts;
  if (!isThere && existsSync(text.slice(0, Math.max(0, text.lastIndexOf(":")))))
    throw new OptionError(
      "loras",
      `Expected a file with a number behind it, such as style.safetensors:0.8, for ${flag} but received "${text}".`,
    );
  return parts;
}

/** `rest@start-stop`, if it ends so. */
function within(text: string): { rest: string; start?: number; stop?: number } {
  const [, rest, start, stop] = /^(.+)@(\d*\.?\d+)-(\d*\.?\d+)$/s.exec(text) ?? [];
  return rest === undefined ? { rest: text } : { rest, start: Number(start), stop: Number(stop) };
}

/** `name=rest`, unless the whole is a path that is there, or a path comes before the sign. */
function named(text: string): { name?: string; rest: string } {
  const [, name, rest] = /^([^=/\\]+)=(.+)$/s.exec(text) ?? [];
  return name === undefined || existsSync(text) ? { rest: text } : { name, rest: rest! };
}
