/**
 * `flowturbo generate`: flags to options, a picture to files. All checks that need no model come before it is loaded.
 */

import { randomInt } from "node:crypto";
import { type Command, Option } from "commander";
import { readSafetensorsHeader, readTensor, writeSafetensors } from "../checkpoint/index.js";
import type { FloatTensor } from "../common/tensor.js";
import { OptionError } from "../errors.js";
import { FlowTurbo } from "../flowturbo.js";
import { formatOf, resized } from "../generation/image.js";
import type { GenerateResult, RgbPicture, Stage } from "../model.js";
import { checkOptions, generateSchema, loadSchema } from "../options.js";
import { parseBlocks } from "../schedule/index.js";
import { addFlags, readFlags } from "./flags.js";
import { outputFiles, prepareOutputs } from "./outputs.js";
import { createProgress } from "./progress.js";

interface OwnFlags {
  model?: string;
  out: string;
  json?: boolean;
  noise?: string;
  saveLatents?: string;
  stage?: string[];
  preview?: string;
}

export function generateCommand(command: Command, signal: AbortSignal): void {
  command
    .description("Draw a picture for each prompt.")
    .argument("<prompt...>", "what to draw; several prompts form one batch")
    .addOption(
      new Option("--model <folder>", "checkpoint in the diffusers layout (default: the embedded shapes model)"),
    );
  addFlags(command, loadSchema);
  addFlags(command, generateSchema);
  command
    .addOption(
      new Option("--out <file>", "file or pattern with {seed} and {index} (from 0); .png, .jpg or .webp").default(
        "flowturbo-{seed}.png",
      ),
    )
    .addOption(
      new Option(
        "--stage <WxH:blocks@sigma>",
        "a size to run through, from coarse to fine (repeatable), as 128x128:H1P1@0.6",
      ).argParser((stage: string, before: string[] = []) => [...before, stage]),
    )
    .addOption(new Option("--preview <file>", "rewrite this file after each step with the first picture as it is then"))
    .addOption(
      new Option("--noise <file>", "start from `noise` [B,C,h,w] of a .safetensors file (later stages: `noise_2`, …)"),
    )
    .addOption(new Option("--save-latents <file>", "write `latents` and decoded `image` to a .safetensors file"))
    .addOption(new Option("--json", "print one JSON object instead of file names"))
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo generate "a red circle above a blue square"
  $ flowturbo generate "a lighthouse at dusk" --model ./stable-diffusion-3.5-medium --blocks H1P9 --seed 7
  $ flowturbo generate "a cat" "a dog" --count 2 --out "pets/{index}-{seed}.webp" --json
  $ flowturbo generate "a red circle" --stage 64x64:H1P2R1 --stage 128x128:H1P1@0.6
  $ flowturbo generate "a bowl of lemons" --image table.jpg --mask bowl.png --strength 0.8`,
    )
    .action((prompts: string[], flags: OwnFlags) => generate(prompts, flags, signal));
}

async function generate(prompts: string[], flags: OwnFlags, signal: AbortSignal): Promise<void> {
  const given = flags as unknown as Record<string, unknown>;
  // This process ends after its pictures: measuring in the background would only delay that.
  const loadOptions = { ...readFlags(loadSchema, given), signal, measureCosts: false };
  const stages = flags.stage?.map(parseStage);
  const noise = flags.noise === undefined ? undefined : await readNoise(flags.noise, stages?.length ?? 1);
  const seed = given.seed ?? (noise ? undefined : String(randomInt(2 ** 32)));
  const options = {
    ...readFlags(generateSchema, { ...given, seed }),
    prompt: prompts,
    signal,
    ...(noise && { noise }),
    ...(stages && { stages }),
    ...(flags.preview !== undefined && { preview: "fast" }),
  };

  // 1. What can be checked without the model.
  checkOptions(loadSchema, loadOptions, "generate");
  const checked = checkOptions(generateSchema, options, "generate");
  if (checked.blocks !== undefined) parseBlocks(checked.blocks);
  const rows = prompts.length * checked.count;
  const seeds = Array.from({ length: rows }, (_, index) => (noise ? null : checked.seed! + index));
  const files = outputFiles(flags.out, seeds);
  if (flags.preview !== undefined) formatOf(flags.preview);
  const others = [flags.saveLatents, flags.preview].filter((file) => file !== undefined);
  const undoOutputs = await prepareOutputs([...files, ...others]);

  // 2. Load, draw, write.
  const progress = createProgress(!flags.json);
  let model: FlowTurbo | undefined;
  let result: GenerateResult;
  let previewed: Promise<unknown> = Promise.resolve();
  // A preview that cannot be written is no reason to lose the picture.
  const lost = new Set<string>();
  try {
    progress.show("loading the model");
    model = await FlowTurbo.load(flags.model, loadOptions);
    progress.show("encoding the prompt");
    result = await model.generate({
      ...checked,
      onStep: ({ step, steps, stage, stages, block, milliseconds, previews: [preview] }) => {
        const where = stages > 1 ? `stage ${stage + 1} of ${stages}, ` : "";
        progress.show(`${where}${block}, ${Math.round(milliseconds)} ms`, step + 1, steps);
        if (preview)
          previewed = previewed
            .then(() => writePreview(flags.preview!, preview))
            .catch(() => lost.add(`Previews could not be written to ${flags.preview}.`));
      },
    });
    progress.show("writing");
    await previewed;
    for (const [index, file] of files.entries()) await result.images[index]!.toFile(file);
    if (flags.saveLatents) await writeSafetensors(flags.saveLatents, { latents: result.latents, image: result.pixels });
  } catch (error) {
    await previewed;
    await undoOutputs();
    throw error;
  } finally {
    progress.clear();
    await model?.dispose();
  }

  // 3. Say what was done.
  const warnings = [...result.warnings, ...lost];
  if (!flags.json) for (const warning of warnings) process.stderr.write(`warning: ${warning}\n`);
  process.stdout.write(
    flags.json ? `${JSON.stringify({ ...summary(files, result, model), warnings })}\n` : `${files.join("\n")}\n`,
  );
}

function summary(files: string[], result: GenerateResult, model: FlowTurbo) {
  const round = (milliseconds: number) => Math.round(milliseconds * 1000) / 1000;
  const { load, queue, encode, steps, upscale, edit, decode, total } = result.timings;
  const { deadline } = result;
  return {
    files,
    seeds: result.seeds,
    size: { width: result.width, height: result.height },
    blocks: result.blocks,
    sigmas: result.sigmas,
    stages: result.stages,
    evaluations: result.evaluations,
    milliseconds: {
      load: round(load),
      queue: round(queue),
      encode: round(encode),
      steps: steps.map(round),
      upscale: round(upscale),
      edit: round(edit),
      decode: round(decode),
      total: round(total),
    },
    ...(deadline && {
      deadline: { ...deadline, predictedMs: round(deadline.predictedMs), actualMs: round(deadline.actualMs) },
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

/** `128x128:H1P1@0.6` → a stage. */
function parseStage(text: string): Stage {
  const match = text.match(/^(\d+)x(\d+):([^@]+)(?:@(\d*\.?\d+))?$/i);
  if (!match)
    throw new OptionError(
      "stages",
      `Expected WIDTHxHEIGHT:BLOCKS or WIDTHxHEIGHT:BLOCKS@SIGMA for --stage but received "${text}".`,
    );
  const [, width, height, blocks, sigma] = match;
  return {
    width: Number(width),
    height: Number(height),
    blocks: blocks!,
    ...(sigma !== undefined && { sigma: Number(sigma) }),
  };
}

/** At the size of a picture of 256 pixels a side and more, so that one sees something. */
async function writePreview(file: string, preview: RgbPicture): Promise<void> {
  const scale = Math.max(1, Math.ceil(256 / Math.min(preview.width, preview.height)));
  await (await resized(preview, preview.width * scale, preview.height * scale)).toFile(file);
}
