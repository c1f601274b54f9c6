/**
 * Files that are no SD3 or SD3.5 checkpoint, each named for what it is, with what to do about it. A file is known by its first bytes or
 * by the names of its tensors, never by its own name: only a shard, which may hold any of them, says what it is there alone.
 */

import { open } from "node:fs/promises";
import { CheckpointError } from "../../errors.js";
import { toRead } from "../files.js";
import type { SafetensorsHeader } from "../safetensors.js";

/** A kind of file: "FILE is a LoRA. Do this." */
interface Kind {
  /** One of its tensors' names is like this. */
  readonly names: RegExp;
  readonly what: string;
  readonly remedy: string;
}

const needed = "Pass an SD3 or SD3.5 checkpoint";
const anotherModel = `Only Stable Diffusion 3 and 3.5 can be drawn with. ${needed}.`;
const asPart = `${needed}, in one file with all parts or as a diffusers folder.`;

/** What is tested first: these hold names of a transformer, too. */
const alike: readonly Kind[] = [
  {
    // These hold the names of plain LoRAs, too.
    names:
      /(^|[._])(lora_mid|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|dora_scale|oft_(blocks|diag)|on_input)([._]|$)|\.diff(_b)?$/,
    what: "an adapter of LyCORIS or another form than plain LoRA, which only changes a checkpoint",
    remedy: "Merge it into its checkpoint with the trainer's own script or in ComfyUI, and pass that checkpoint.",
  },
  {
    names: /(^|[._])(lora_(A|B|a|b|down|up)|lora\.(down|up))([._]|$)/,
    what: "a LoRA, which only changes a checkpoint",
    remedy: "Pass its checkpoint as the model, and this file as one of loras (--lora <file>).",
  },
  {
    names: /^(control_model\.|controlnet_|pos_embed_input\.|input_hint_block\.)/,
    what: "a ControlNet, which only guides a checkpoint",
    remedy: `${needed}.`,
  },
  {
    names: /^(ip_adapter|image_proj)\./,
    what: "an IP-Adapter, which only guides a checkpoint",
    remedy: `${needed}.`,
  },
  {
    names: /(^|\.)(double_blocks|single_transformer_blocks|single_blocks)\.\d+\./,
    what: "a checkpoint of Flux or of a model like it",
    remedy: anotherModel,
  },
  {
    names:
      /^((model\.)?diffusion_model\.)?(transformer_blocks\.\d+\.(attn1|img_mod)|adaln_single|caption_projection|scale_shift_table)(\.|$)/,
    what: "a transformer of another model, such as PixArt, Sana, LTX or Qwen-Image",
    remedy: anotherModel,
  },
];

/** What is tested where there is no transformer of SD3. */
const others: readonly Kind[] = [
  {
    names: /\.(joint_blocks\.\d+\.x_block|transformer_blocks\.\d+\.norm1_context)\./,
    what: "a file that has something else before the names of its transformer's tensors than is known",
    remedy:
      'Rename them: "model.diffusion_model.", "diffusion_model." or nothing may be before "joint_blocks." or "transformer_blocks.".',
  },
  {
    names: /^conditioner\.embedders\.|^model\.diffusion_model\.label_emb\.|^add_embedding\.linear_1\./,
    what: "a checkpoint of SDXL",
    remedy: anotherModel,
  },
  {
    names: /(^|\.)input_blocks\.\d+\.|^cond_stage_model\.|^down_blocks\.\d+\.(attentions|resnets)\./,
    what: "a checkpoint of Stable Diffusion 1 or 2",
    remedy: anotherModel,
  },
  {
    names: /(^|\.)(down|up|down_blocks|up_blocks)\.\d+\.(block|resnets)\.\d+\.conv1\.|^(quant_conv|decoder\.conv_in)\./,
    what: "a VAE alone",
    remedy: asPart,
  },
  {
    names: /(^|\.)encoder\.block\.\d+\.layer\.\d+\.|(^|\.)text_model\.|^resblocks\.|^transformer\.resblocks\./,
    what: "a text encoder alone",
    remedy: asPart,
  },
  { names: /^(emb_params|string_to_param|clip_[lg])$/, what: "a textual inversion embedding", remedy: `${needed}.` },
];

/** First bytes of files that are not .safetensors. */
const formats: readonly { readonly begins: string; readonly what: string }[] = [
  { begins: "GGUF", what: "a GGUF file, as programs like llama.cpp read them" },
  {
    begins: "PK\x03\x04",
    what: "a ZIP archive, as are files of PyTorch (.ckpt, .pt, .bin), which can run any code when they are read",
  },
  { begins: "\x80", what: "a pickle of Python (.ckpt, .pt, .bin), which can run any code when it is read" },
  { begins: "\x89HDF", what: "an HDF5 file" },
];

const formatRemedy = "Only .safetensors files are read: download the model as one, or as a diffusers folder.";

/** @throws CheckpointError for a file of another format. What cannot be read at all is found out where it is read. */
export async function refuseOtherFormats(file: string): Promise<void> {
  const handle = await open(file, toRead).catch(() => null);
  if (!handle) return;
  try {
    // A pipe or a device is refused by what reads the header.
    if (!(await handle.stat()).isFile()) return;
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(4), 0, 4, 0);
    const start = buffer.toString("latin1", 0, bytesRead);
    const format = formats.find(({ begins }) => start.startsWith(begins));
    // The first bytes of a .safetensors file are a length, which may be any of these; then a brace follows.
    const isBrace = (await handle.read(Buffer.alloc(1), 0, 1, 8)).buffer.toString("latin1") === "{";
    if (format && !isBrace) throw new CheckpointError(file, `${file} is ${format.what}. ${formatRemedy}`);
  } finally {
    await handle.close();
  }
}

/** @throws CheckpointError for what only adds to a checkpoint, and for transformers of other models whose names are like SD3's */
export function refuseAlike(file: string, header: SafetensorsHeader): void {
  refuseKinds(file, header, alike);
}

/** @throws CheckpointError for one of several files that hold a part's tensors together */
export function refuseShards(file: string): void {
  const total = Number(/-\d+-of-(\d+)\.safetensors$/.exec(file)?.[1] ?? 1);
  if (total > 1)
    throw new CheckpointError(
      file,
      `${file} is one of ${total} files (shards) that hold one part of a model together. Pass the folder of the whole model, which has model_index.json.`,
    );
}

/** Says what a file is that has no transformer of SD3. */
export function refuseOthers(file: string, header: SafetensorsHeader): never {
  refuseKinds(file, header, others);
  const [first] = header.keys();
  throw new CheckpointError(
    file,
    `${file} is no checkpoint of Stable Diffusion 3 or 3.5: it has ` +
      `${first === undefined ? "no tensors" : `tensors such as "${first}", but none of the transformer's`}. ${asPart}`,
  );
}

function refuseKinds(file: string, header: SafetensorsHeader, kinds: readonly Kind[]): void {
  for (const { names, what, remedy } of kinds)
    for (const name of header.keys())
      if (names.test(name)) throw new CheckpointError(file, `${file} is ${what}. ${remedy}`);
}
