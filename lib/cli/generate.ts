/**
 * `flowturbo generate`: flags to options, a picture to files. All checks that need no model come before it is loaded.
 */

import { randomInt } from "node:crypto";
import type { Command } from "commander";
import { nameOfLora, readSafetensorsHeader, readTensor, writeSafetensors } from "../checkpoint/index.js";
import { seedOf, seedsFrom, seedToJson } from "../common/seed.js";
import type { FloatTensor } from "../common/tensor.js";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";
import type { FlowTurbo } from "../flowturbo.js";
import { formatOf, resized } from "../generation/image.js";
import { inspect, optionsOf, overridden, type Parameters } from "../generation/parameters.js";
import { sharp } from "../generation/sharp.js";
import type { GenerateOptions, GenerateResult, LoraSource, RgbPicture, Stage } from "../model.js";
import {
  checkGuidanceInterval,
  checkOptions,
  checkSeeds,
  checkSigmas,
  generateSchema,
  loadSchema,
  refusePaths,
} from "../options.js";
import { parseBlocks } from "../schedule/index.js";
import {
  addRequestAdapters,
  type LoadAdapterFlags,
  type RequestAdapterFlags,
  readLoadAdapters,
  readRequestAdapters,
} from "./adapters.js";
import { addJsonFlag, addModelFlags, type CommonFlags, readFlags, readLoadFlags } from "./flags.js";
import { outputFiles, prepareOutputs } from "./outputs.js";
import { print, rounded } from "./print.js";
import type { Progress } from "./progress.js";
import { withModel } from "./with-model.js";

const usualFiles = "flowturbo-{seed}.png";

interface Flags extends CommonFlags, LoadAdapterFlags, RequestAdapterFlags {
  out?: string;
  from?: string;
  noise?: string;
  seeds?: string;
  saveLatents?: string;
  stage?: string[];
  preview?: string;
}

export function generateCommand(command: Command, signal: AbortSignal): void {
  command
    .description("Draw a picture for each prompt.")
    .argument("[prompt...]", "what to draw; several prompts form one batch");
  addModelFlags(command, loadSchema, generateSchema);
  addRequestAdapters(command);
  addJsonFlag(command);
  command
    .option(
      "--out <file>",
      `file or pattern with {seed} and {index} (from 0); .png, .jpg or .webp (default: ${usualFiles})`,
    )
    .option(
      "--from <picture>",
      "draw a picture of flowturbo again: options are those in its file, where none are given",
    )
    .option(
      "--stage <WxH:blocks@sigma:upscale>",
      "a size to run through, from coarse to fine (repeatable), as 128x128:H1P1@0.6 or 128x128:H1P1@0.6:latents",
      (stage: string, before: string[] = []) => [...before, stage],
    )
    .option("--preview <file>", "rewrite this file after each step with the first picture as it is then")
    .option("--noise <file>", "start from `noise` [B,C,h,w] of a .safetensors file (later stages: `noise_2`, …)")
    .option("--save-latents <file>", "write `latents` and decoded `image` (if any) to a .safetensors file")
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo generate "a red circle above a blue square"
  $ flowturbo generate "a lighthouse at dusk" --model ./stable-diffusion-3.5-medium --quality best --seed 7
  $ flowturbo generate "a cat" "a dog" --count 2 --out "pets/{index}-{seed}.webp" --json
  $ flowturbo generate "a red circle" --stage 64x64:H1P2R1 --stage 128x128:H1P1@0.6
  $ flowturbo generate "a bowl of lemons" --image table.jpg --mask bowl.png --strength 0.8
  $ flowturbo generate --from flowturbo-7.png --steps 20`,
    )
    .action((prompts: string[], flags: Flags) => generate(prompts, flags, signal));
}

async function generate(prompts: string[], flags: Flags, signal: AbortSignal): Promise<void> {
  const stages = flags.stage?.map(parseStage);
  const noise = flags.noise === undefined ? undefined : await readNoise(flags.noise, stages?.length ?? 1);
  const given: Record<string, unknown> = {
    ...readFlags(generateSchema, flags),
    ...readRequestAdapters(flags),
    ...(prompts.length > 0 && { prompt: prompts }),
    ...(noise && { noise }),
    ...(stages && { stages }),
  };
  const drawn = flags.from === undefined ? null : await readFrom(flags.from, given, readLoadAdapters(flags).loras);
  const loadOptions = { ...drawn?.loadOptions, ...readLoadFlags(flags), signal };
  const options: Record<string, unknown> = {
    ...(!noise && (drawn?.options ?? given).seeds === undefined && { seed: randomInt(2 ** 32) }),
    ...(drawn?.options ?? given),
    signal,
    ...(flags.preview !== undefined && { preview: "fast" }),
  };
  if (options.prompt === undefined)
    throw new OptionError("prompt", "Expected a prompt, or a picture of flowturbo with --from.");

  // 1. What can be checked without the model.
  checkOptions(loadSchema, loadOptions, "generate");
  const checked = checkOptions(generateSchema, options, "generate");
  if (checked.blocks !== undefined) parseBlocks(checked.blocks);
  checkGuidanceInterval(checked);
  checkSigmas(checked.sigmas);
  refusePaths(checked);
  const rows = [checked.prompt].flat().length * checked.count;
  checkSeeds(checked, rows);
  const isLatent = checked.outputType === "latent";
  if (isLatent && flags.saveLatents === undefined)
    throw new OptionError(
      "outputType",
      'With "latent" there are no pictures to write; say with --save-latents where the latents go.',
    );
  if (isLatent && flags.out !== undefined)
    throw new OptionError("out", "With --output-type latent there are no pictures to write; leave out --out.");
  const seeds = noise
    ? new Array<null>(rows).fill(null)
    : (checked.seeds?.map(seedOf) ?? seedsFrom(checked.seed!, rows));
  const files = isLatent ? [] : outputFiles(flags.out ?? usualFiles, seeds);
  if (flags.preview !== undefined) formatOf(flags.preview);
  const written = isLatent ? [flags.saveLatents!] : files;
  const others = [flags.saveLatents, flags.preview].filter((file) => file !== undefined);
  const undoOutputs = await prepareOutputs([...files, ...others]);

  // 2. Load, draw, write.
  const report = await withModel(flags, loadOptions, checked, async (model, progress) => {
    const include = flags.saveLatents === undefined || isLatent ? [] : (["latents", "pixels"] as const);
    const isOther = drawn?.model !== undefined && drawn.model !== model.name;
    // What was calibrated for one model is of no use to another.
    const isOpen = isOther && given.grid === undefined && checked.grid === "calibrated";
    const settled = { ...checked, ...(isOpen && { grid: undefined }), include };
    const { result, warnings } = await draw(model, settled, flags.preview, progress);
    progress.show("writing");
    // Its process ends while the files are written.
    void model.dispose().catch(() => undefined);
    for (const [index, file] of files.entries()) await result.images[index]!.toFile(file);
    if (flags.saveLatents) {
      const { latents, pixels } = result;
      await writeSafetensors(flags.saveLatents, { latents: latents!, ...(pixels && { image: pixels }) });
    }
    const other = isOther ? [otherModel(drawn.model!, model.name)] : [];
    const unused = unusedLoras(model, checked);
    return {
      ...summary(written, result, model),
      warnings: [...(drawn?.warnings ?? []), ...other, ...unused, ...warnings],
    };
  }).catch(async (error) => {
    await undoOutputs();
    throw error;
  });

  // 3. Say what was done.
  print(flags.json, report, written.join("\n"));
}

/**
 * The options in a picture's file, under those that are given.
 * @throws OptionError for a file without them, and where something is needed that no file holds
 */
/** @param loras that this call loads */
async function readFrom(file: string, given: Readonly<Record<string, unknown>>, loras: readonly LoraSource[] = []) {
  const { writer, parameters } = await inspect(file, "from");
  if (!parameters)
    throw new OptionError(
      "from",
      writer
        ? `The picture "${file}" for --from was written by ${writer}, whose parameters are others. \`flowturbo inspect\` prints them; give a prompt and flags.`
        : `The picture "${file}" for --from holds no parameters of flowturbo: it was not drawn by flowturbo, was drawn with --metadata false, or went through a program that removed them. Give a prompt and flags.`,
    );
  const { options: own, unknown, needs } = optionsOf(parameters);
  const absent = needs.find((name) => given[name] === undefined && !(name === "noise" && given.seed !== undefined));
  if (absent)
    throw new OptionError(
      absent,
      `The picture "${file}" was drawn from ${needed[absent].what}, which no picture's file holds. ${needed[absent].remedy}${absent === "controls" ? controlsIn(parameters) : ""}.`,
    );
  const options = overridden(own, given);
  const truncated = [parameters.truncated ?? []].flat().map(String);
  const isShort = truncated.filter((name) => given[name] === undefined);
  const merged = mergedIn(parameters);
  const now = await mergedBy(loras);
  return {
    options,
    loadOptions: parameters.textEncoder3 === false ? { textEncoder3: false } : {},
    model: typeof parameters.model === "string" ? parameters.model : undefined,
    warnings: [
      ...mergedWarning(file, merged, now),
      ...isShort.map(
        (name) =>
          `The file ${file} had no room for all of its parameters: ${clipped(name, 80)} was shortened or left out, so that this is another picture.`,
      ),
      ...unknown.map(
        (name) =>
          `The parameter ${clipped(name, 80)} in ${file} is not one that this version of flowturbo takes, and was left out.`,
      ),
    ],
  };
}

const needed = {
  prompt: { what: "embeddings of prompts", remedy: "Give a prompt, for another picture" },
  image: { what: "an original", remedy: "Give it with --image" },
  mask: { what: "a mask", remedy: "Give it with --mask" },
  noise: { what: "noise that was given", remedy: "Give it with --noise, or another start with --seed" },
  controls: { what: "control pictures", remedy: "Give each ControlNet and its picture with --control" },
} as const;

/** LoRAs in the weights, as `name:scale`, sorted. */
type Merged = readonly string[];

/** What a file says of LoRAs that were in the weights. */
function mergedIn({ mergedLoras }: Parameters): Merged {
  return (Array.isArray(mergedLoras) ? mergedLoras : [])
    .flatMap((each: { name?: unknown; scale?: unknown } | null) =>
      typeof each?.name === "string" ? `${each.name}:${each.scale}` : [],
    )
    .sort();
}

/** Those that a call merges. */
async function mergedBy(loras: readonly LoraSource[]): Promise<Merged> {
  const merged = loras.filter(({ dynamic, scale = 1 }) => !dynamic && scale !== 0);
  const named = merged.map(async ({ file, name, scale = 1 }) => `${name ?? (await nameOfLora(file))}:${scale}`);
  return (await Promise.all(named)).sort();
}

/** Of LoRAs that are given to a picture that was drawn without any nothing is said: they are meant to change it. */
function mergedWarning(file: string, before: Merged, now: Merged): string[] {
  if (before.length === 0 || before.join("\n") === now.join("\n")) return [];
  const text = (each: Merged) => clipped(each.join(", "), 200);
  const was = `${file} was drawn with LoRAs in the weights (${text(before)}), whose files no picture holds`;
  return [
    now.length === 0
      ? `${was}: name them with --lora, or this is another picture.`
      : `${was}, and is drawn again with ${text(now)}: if these are not the same, this is another picture.`,
  ];
}

/** What a file says of its controls, in a message. */
function controlsIn({ controls }: Parameters): string {
  return `; they were ${clipped(JSON.stringify(controls), 300)}`;
}

/** What is to be said of dynamic LoRAs that the picture does not name. */
function unusedLoras({ adapters }: FlowTurbo, { loras = [] }: Pick<GenerateOptions, "loras">): string[] {
  const used = new Set(loras.map(({ name }) => name));
  return adapters.loras
    .filter((name) => !used.has(name))
    .map((name) => `The LoRA "${name}" of --dynamic-lora is not in the picture: name it with --use-lora ${name}.`);
}

function otherModel(before: string, now: string): string {
  return `The picture was drawn by the model "${clipped(before, 80)}" and is drawn again by "${now}", so that it is another one. Give --model to choose.`;
}

/** Draws, and rewrites the preview's file on the way: it is written, or given up, when this returns. */
async function draw(model: FlowTurbo, options: GenerateOptions, preview: string | undefined, progress: Progress) {
  let writing: Promise<unknown> | undefined;
  // A preview that cannot be written is no reason to lose the picture.
  const lost = new Set<string>();
  progress.show("encoding the prompt");
  const drawing = model.generate({
    ...options,
    // Which takes a while, and is needed when the pictures are there: where it fails, nothing is drawn to no end.
    onStart: () => (options.outputType === "latent" ? undefined : sharp.load()),
    onStep: ({ step, steps, stage, stages, block, milliseconds, previews: [picture] }) => {
      const where = stages > 1 ? `stage ${stage + 1} of ${stages}, ` : "";
      progress.show(`${where}${block}, ${Math.round(milliseconds)} ms`, step + 1, steps);
      if (!picture) return;
      writing = writePreview(preview!, picture).catch(() => lost.add(`Previews could not be written to ${preview}.`));
      // The next event waits for the file; previews that are overtaken meanwhile are not written.
      return writing;
    },
  });
  // After an abort, too, the file is whole.
  const result = await drawing.finally(() => writing);
  return { result, warnings: [...result.warnings, ...lost] };
}

function summary(files: string[], result: GenerateResult, model: FlowTurbo) {
  const { seeds, width, height, blocks, sigmas, stages, evaluations, timings, deadline } = result;
  const milliseconds = Object.entries(timings).map(([name, spent]: [string, number | readonly number[]]) => [
    name,
    typeof spent === "number" ? rounded(spent) : spent.map(rounded),
  ]);
  return {
    files,
    seeds: seeds.map(seedToJson),
    size: { width, height },
    ...{ blocks, sigmas, stages, evaluations },
    milliseconds: Object.fromEntries(milliseconds),
    ...(deadline && {
      deadline: { ...deadline, predictedMs: rounded(deadline.predictedMs), actualMs: rounded(deadline.actualMs) },
    }),
    runtime: model.runtime.name,
    model: model.folder,
  };
}

/** `noise`, `noise_2`, … for as many stages. */
async function readNoise(file: string, stages: number): Promise<FloatTensor[]> {
  const header = await readSafetensorsHeader(file);
  const names = Array.from({ length: stages }, (_, index) => (index === 0 ? "noise" : `noise_${index + 1}`));
  return Promise.all(
    names.map((name) => {
      const entry = header.get(name);
      if (!entry)
        throw new OptionError(
          "noise",
          `Expected a tensor named "${name}" in ${file} but it holds ${[...header.keys()].join(", ")}.`,
        );
      if (entry.shape.length !== 4)
        throw new OptionError(
          "noise",
          `Expected shape [B, C, h, w] for "${name}" in ${file} but found [${entry.shape.join(", ")}].`,
        );
      return readTensor(file, entry);
    }),
  );
}

/** `128x128:H1P1@0.6:latents` → a stage; what follows the blocks may be left out. */
function parseStage(text: string): Stage {
  const match = text.match(/^(\d+)x(\d+):([^@:]+)(?:@(\d*\.?\d+))?(?::([^@:]+))?$/i);
  if (!match)
    throw new OptionError(
      "stages",
      `Expected WIDTHxHEIGHT:BLOCKS or WIDTHxHEIGHT:BLOCKS@SIGMA, with or without :UPSCALE, for --stage but received "${text}".`,
    );
  const [, width, height, blocks, sigma, upscale] = match;
  return {
    width: Number(width),
    height: Number(height),
    blocks: blocks!,
    ...(sigma !== undefined && { sigma: Number(sigma) }),
    // Names that there are not are refused as they are from code.
    ...(upscale !== undefined && { upscale: upscale as Stage["upscale"] }),
  };
}

/** At the size of a picture of 256 pixels a side and more, so that one sees something. */
async function writePreview(file: string, preview: RgbPicture): Promise<void> {
  const scale = Math.max(1, Math.ceil(256 / Math.min(preview.width, preview.height)));
  await (await resized(preview, preview.width * scale, preview.height * scale)).toFile(file);
}
