/** `flowturbo pull`: downloads a model of the Hugging Face hub, so that later runs find it. */

import type { Command } from "commander";
import { checkModelIndex } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import { nameForm, parseHubName, pull } from "../hub/index.js";
import { checkOptions, loadSchema } from "../options.js";
import { addFlags, addJsonFlag, readFlags } from "./flags.js";
import { megabytes, print } from "./print.js";
import { showDownload, withProgress } from "./progress.js";

interface Flags {
  t5: boolean;
  json?: boolean;
}

const pullSchema = loadSchema.pick({ variant: true });

export function pullCommand(command: Command, signal: AbortSignal): void {
  command
    .description("Download a model of the Hugging Face hub into the cache that Python's programs share.")
    .argument(
      "<name>",
      "the model, or an autoencoder for --preview-vae: owner/name or owner/name@revision (a branch, a tag or a commit)",
    );
  addFlags(command, pullSchema);
  command.option("--no-t5", "leave the third text encoder out, which is the largest part");
  addJsonFlag(command)
    .addHelpText(
      "after",
      `
It prints the folder, which --model takes, as it takes the name. A download that was stopped goes on where it was.
HF_TOKEN has the token for gated and private models, HF_HOME and HF_HUB_CACHE say where the cache is.

Examples:
  $ flowturbo pull stabilityai/stable-diffusion-3.5-medium
  $ flowturbo pull stabilityai/stable-diffusion-3-medium-diffusers@main --variant fp16 --no-t5
  $ flowturbo pull madebyollin/taesd3`,
    )
    .action((name: string, flags: Flags) => run(name, flags, signal));
}

async function run(text: string, { json, ...flags }: Flags, signal: AbortSignal): Promise<void> {
  const { variant } = checkOptions(pullSchema, readFlags(pullSchema, flags), "pull");
  const name = parseHubName(text);
  if (!name) throw new OptionError("name", `Expected a model of the hub, as ${nameForm}, but received "${text}".`);
  const { path, ...report } = await withProgress(!json, async (progress) => {
    progress.show(`asking for ${name.repository}`);
    const wanted = { variant, textEncoder3: flags.t5 };
    const onDownload = showDownload(progress);
    const pulled = await pull(name, { ...wanted, signal, onDownload, checkIndex: checkModelIndex });
    const { files, bytes, downloaded } = pulled;
    progress.keep(`${files} files, ${megabytes(bytes)}, of which ${megabytes(downloaded)} were downloaded`);
    return pulled;
  });
  print(json, { model: name.repository, revision: name.revision, path, ...report }, path);
}
