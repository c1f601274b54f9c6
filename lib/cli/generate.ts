/**
 * `flowturbo generate`: flags to options, a picture to files. All checks that need no model come before it is loaded.
 */

import { randomInt } from "node:crypto";
import { type Command, Option } from "commander";
import { readSafetensorsHeader, readTensor, writeSafetensors } from "../checkpoint/index.js";
import { CheckpointError, OptionError } from "../errors.js";
import { checkOptions, generateSchema, loadSchema } from "../options.js";
import { FlowTurbo, type GenerateResult } from "../pipeline.js";
import { parseBlocks } from "../schedule/index.js";
import type { FloatTensor } from "../tensor.js";
import { addFlags, readFlags } from "./flags.js";
import { outputFiles, prepareOutputs } from "./outputs.js";
import { createProgress } from "./progress.js";

interface OwnFlags {
  model?: string;
  out: string;
  json?: boolean;
  noise?: string;
  saveLatents?: string;
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
    .addOption(new Option("--noise <file>", "start from the tensor `noise` [B,C,h,w] of a .safetensors file"))
    .addOption(new Option("--save-latents <file>", "write `latents` and decoded `image` to a .safetensors file"))
    .addOption(new Option("--json", "print one JSON object instead of file names"))
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo generate "a red circle above a blue square"
  $ flowturbo generate "a lighthouse at dusk" --model ./stable-diffusion-3.5-medium --blocks H1P9 --seed 7
  $ flowturbo generate "a cat" "a dog" --count 2 --out "pets/{index}-{seed}.webp" --json`,
    )
    .action((prompts: string[], flags: OwnFlags) => generate(prompts, flags, signal));
}

async function generate(prompts: string[], flags: OwnFlags, signal: AbortSignal): Promise<void> {
  const given = flags as unknown as Record<string, unknown>;
  const loadOptions = { ...readFlags(loadSchema, given), signal };
  const noise = flags.noise === undefined ? undefined : await readNoise(flags.noise);
  const seed = given.seed ?? (noise ? undefined : String(randomInt(2 ** 32)));
  const options = {
    ...readFlags(generateSchema, { ...given, seed, noise: undefined }),
    prompt: prompts,
    signal,
    ...(noise && { noise }),
  };

  // 1. What can be checked without the model.
  checkOptions(loadSchema, loadOptions, "generate");
  const checked = checkOptions(generateSchema, options, "generate");
  if (checked.blocks !== undefined) parseBlocks(checked.blocks);
  const rows = prompts.length * checked.count;
  const seeds = Array.from({ length: rows }, (_, index) => (noise ? null : checked.seed! + index));
  const files = outputFiles(flags.out, seeds);
  const undoOutputs = await prepareOutputs(flags.saveLatents ? [...files, flags.saveLatents] : files);

  // 2. Load, draw, write.
  const progress = createProgress(!flags.json);
  let model: FlowTurbo | undefined;
  let result: GenerateResult;
  try {
    progress.show("loading the model");
    model = await FlowTurbo.load(flags.model, loadOptions);
    progress.show("encoding the prompt");
    result = await model.generate({
      ...checked,
      onStep: ({ step, steps, block, milliseconds }) =>
        progress.show(`${block}, ${Math.round(milliseconds)} ms`, step + 1, steps),
    });
    progress.show("writing");
    for (const [index, file] of files.entries()) await result.images[index]!.toFile(file);
    if (flags.saveLatents) await writeSafetensors(flags.saveLatents, { latents: result.latents, image: result.pixels });
  } catch (error) {
    await undoOutputs();
    throw error;
  } finally {
    progress.clear();
    await model?.dispose();
  }

  // 3. Say what was done.
  if (!flags.json) for (const warning of result.warnings) process.stderr.write(`warning: ${warning}\n`);
  process.stdout.write(flags.json ? `${JSON.stringify(summary(files, result, model))}\n` : `${files.join("\n")}\n`);
}

function summary(files: string[], result: GenerateResult, model: FlowTurbo) {
  const round = (milliseconds: number) => Math.round(milliseconds * 1000) / 1000;
  const { load, encode, steps, decode, total } = result.timings;
  return {
    files,
    seeds: result.seeds,
    size: { width: result.width, height: result.height },
    blocks: result.blocks,
    sigmas: result.sigmas,
    evaluations: result.evaluations,
    milliseconds: {
      load: round(load),
      encode: round(encode),
      steps: steps.map(round),
      decode: round(decode),
      total: round(total),
    },
    runtime: model.runtime.name,
    model: model.folder,
    warnings: result.warnings,
  };
}

async function readNoise(file: string): Promise<FloatTensor> {
  const header = await readSafetensorsHeader(file);
  const entry = header.get("noise");
  if (!entry)
    throw new OptionError(
      "noise",
      `Expected a tensor named "noise" in ${file} but it holds ${[...header.keys()].join(", ")}.`,
    );
  if (entry.shape.length !== 4)
    throw new CheckpointError(
      file,
      `Expected shape [B, C, h, w] for "noise" in ${file} but found [${entry.shape.join(", ")}].`,
    );
  return readTensor(file, entry);
}
