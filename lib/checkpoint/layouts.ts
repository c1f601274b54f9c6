/** Folders and files that people have instead of a folder in the diffusers layout, each with what to do about it. */

import { readdir } from "node:fs/promises";
import { dirname, join } from "node:path";
import { indexFiles } from "../common/model-index.js";
import { CheckpointError } from "../errors.js";
import { exists } from "./files.js";
import { indexOf } from "./model-index.js";
import { refuseFolderOf } from "./single-file/index.js";

const layout =
  "A diffusers folder holds model_index.json beside transformer/, vae/, scheduler/, text_encoder/, tokenizer/ and so on.";

/** What may be passed, of a model and of a base. */
const modelForms = "Pass a downloaded checkpoint's folder, its .safetensors file, or owner/name of a model on the hub.";
export const baseForms = "A base is a folder in the diffusers layout, or owner/name of such a model on the hub.";

/** @throws CheckpointError for what is no folder with an index, or is of ONNX */
export async function explainOtherLayouts(root: string, forms = modelForms): Promise<void> {
  const names = await readdir(root).catch((cause: NodeJS.ErrnoException) => {
    throw new CheckpointError(root, unreadable(root, forms, cause), { cause });
  });
  const transformer = await readdir(join(root, "transformer")).catch((): string[] => []);
  const refuse = (message: string): never => {
    throw new CheckpointError(root, message);
  };
  if (transformer.some((name) => name.endsWith(".onnx")) && !transformer.some((name) => name.includes(".safetensors")))
    refuse(
      `${root} is an ONNX folder (as optimum exports them): its networks are already exported, which cannot be read. Pass the ` +
        `diffusers folder that it was exported from. ${layout}`,
    );
  if (indexFiles.some((name) => names.includes(name))) return;
  if (names.includes("snapshots")) {
    const commits = await readdir(join(root, "snapshots")).catch((): string[] => []);
    refuse(
      `${root} is a model's folder in a Hugging Face cache. Pass one of its snapshots: ` +
        `${commits.map((commit) => join(root, "snapshots", commit)).join(", ") || "there is none yet, download the model"}.`,
    );
  }
  const parent = dirname(root);
  if (names.includes("config.json") && (await exists(await indexOf(parent))))
    refuse(`${root} is the folder of one part of a model. Pass the folder of the whole model, ${parent}.`);
  const single = names.filter((name) => name.endsWith(".safetensors"));
  if (single.length > 0)
    await refuseFolderOf(
      root,
      single.map((name) => join(root, name)),
    );
  refuse(`${root} is not a checkpoint: it has no model_index.json. ${layout}`);
}

function unreadable(root: string, forms: string, { code, message }: NodeJS.ErrnoException): string {
  if (code === "ENOENT") return `The folder or file ${root} does not exist. ${forms} ${layout}`;
  if (code !== "ENOTDIR") return `Cannot read the folder ${root}: ${message}`;
  return `${root} is not a folder. ${forms} ${layout}`;
}
