/**
 * What the names of a LoRA file's tensors say, as tables: which matrix of a layer a tensor is, and what is before the layer's own name.
 * diffusers, PEFT, sd-scripts, OneTrainer, LyCORIS, ComfyUI, ai-toolkit and SimpleTuner each have names of their own. Whatever else is
 * trained beside two matrices, or in place of them, is named for what it is.
 */

/** A matrix of a layer, W + scale · up · down, or the number that its scale follows from. */
export type LoraRole = "down" | "up" | "alpha";

export interface LoraKey {
  readonly role: LoraRole;
  /** The layer's name as the file has it, with all that is before it. */
  readonly layer: string;
}

/** The ends of names, as regular expressions. Between PEFT's and ".weight" there may be the adapter's name. */
const endings: readonly { readonly role: LoraRole; readonly end: RegExp }[] = [
  { role: "down", end: /\.lora_[Aa](\.[\w-]+)?\.weight$/ },
  { role: "up", end: /\.lora_[Bb](\.[\w-]+)?\.weight$/ },
  { role: "down", end: /\.lora_down\.weight$/ },
  { role: "up", end: /\.lora_up\.weight$/ },
  { role: "down", end: /(\.lora|\.lora_linear_layer|_lora)\.down\.weight$/ },
  { role: "up", end: /(\.lora|\.lora_linear_layer|_lora)\.up\.weight$/ },
  { role: "alpha", end: /(\.lora|\.lora_linear_layer|_lora)?\.alpha$/ },
];

/** @returns null for a name that is of no matrix of a LoRA */
export function parseKey(name: string): LoraKey | null {
  for (const { role, end } of endings)
    if (end.test(name)) return { role, layer: name.replace(end, "").replaceAll(".processor.", ".") };
  return null;
}

/** What a file is that one of whose tensors has such a name. */
interface Form {
  readonly names: RegExp;
  readonly what: string;
}

/** Forms of adapters that are more than two matrices for a layer. */
const forms: readonly Form[] = [
  {
    names: /\.(dora_scale|lora_magnitude_vector(\.[\w-]+)*)$/,
    what: "DoRA, whose magnitudes scale the rows of the sum",
  },
  { names: /\.lora_mid\.weight$/, what: "a LoRA in Tucker form (lora_mid), which has a third matrix" },
  { names: /\.lokr_(w[12](_[ab])?|t2)(\.[\w-]+)?$/, what: "LoKr, which has Kronecker products" },
  { names: /\.hada_(w[12]_[ab]|t[12])(\.[\w-]+)?$/, what: "LoHa, which has elementwise products" },
  { names: /\.[ab][12]\.weight$/, what: "GLoRA, which has four matrices for a layer" },
  { names: /\.(oft_(blocks|diag|R)|b?oft_[\w.]+|rescale)$/, what: "OFT or BOFT, which rotates weights" },
  { names: /\.(on_input|ia3_l(\.[\w-]+)?)$/, what: "IA3, which scales inputs and outputs" },
  {
    names: /\.(diff|diff_b|set_weight|w_norm|b_norm)$/,
    what: "a file of whole differences of weights, biases or norms",
  },
  { names: /\.lora_(A|B|down|up)(\.[\w-]+)?\.bias$|\.lora_bias$/, what: "a LoRA with biases of its own" },
  { names: /\.lora_embedding_[AB](\.[\w-]+)?$/, what: "a LoRA of tables of embeddings" },
  {
    names: /\.vera_lambda_[bd](\.[\w-]+)?$|^.*vera_[AB](\.[\w-]+)?$/,
    what: "VeRA, whose matrices are random and shared",
  },
  {
    names:
      /\.(adamss|beft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hira|hra|lily|ln_tuning|miss|osf|peanut|poly|psoft|pvera|randlora|road|shadow|shira|supertuning|tinylora|unilora|vblora|waveft)_[\w.-]+$|\.lora_(E|diag)(\.[\w-]+)?$/,
    what: "an adapter of PEFT of another kind than LoRA",
  },
  { names: /^bundle_emb\.|^emb_params$|^string_to_param$/, what: "a file with a textual inversion embedding" },
];

/** What a tensor is of, where that is another form of adapter; null for none. */
export function formOf(name: string): string | null {
  return forms.find(({ names }) => names.test(name))?.what ?? null;
}

/** LoRAs of other models, by the names of their layers. Dots may be underscores. */
const others: readonly Form[] = [
  {
    names: /(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]\d/,
    what: "a LoRA of FLUX or of a model like it",
  },
  {
    names: /(^|[._])transformer_blocks[._]\d+[._](img_mod|img_mlp|txt_mod|txt_mlp)([._]|$)/,
    what: "a LoRA of Qwen-Image",
  },
  {
    names: /(^|[._])joint_transformer_blocks[._]\d|(^|[._])double_layers[._]\d/,
    what: "a LoRA of AuraFlow",
  },
  {
    names: /(^|[._])lora_prior_(unet|te)_/,
    what: "a LoRA of Stable Cascade",
  },
  {
    names: /(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)([._]|$)|(^|\.)blocks\.\d+\.attn[12]\./,
    what: "a LoRA of Wan or of another video model",
  },
  {
    names: /(^|[._])layers[._]\d+[._](attention|feed_forward|adaLN_modulation)([._]|$)/,
    what: "a LoRA of Z-Image, Lumina or a model like them",
  },
  {
    names: /(^|[._])model[._]layers[._]\d+[._](self_attn|mlp)[._]/,
    what: "a LoRA of a language model",
  },
  {
    names: /(^|[._])transformer_blocks[._]\d+[._]attn1[._]/,
    what: "a LoRA of PixArt, Sana, LTX or a model like them",
  },
];

/** The U-Net of Stable Diffusion 1, 2 and XL. */
const unet = /(^|[._])(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]/;
/** Its layer that reads the text, whose width tells the models apart. */
const textLayer = /attn2[._](processor[._])?to_k/;
const unetsByWidth: Readonly<Record<number, string>> = {
  768: "Stable Diffusion 1",
  1024: "Stable Diffusion 2",
  2048: "SDXL",
};

/** The model that a LoRA is of, where its names are those of another one; null where they may be SD3's. */
export function otherModelOf(
  keys: Iterable<{ readonly name: string; readonly shape: readonly number[] }>,
): string | null {
  const all = [...keys];
  if (!all.some(({ name }) => unet.test(name)))
    return others.find(({ names }) => all.some(({ name }) => names.test(name)))?.what ?? null;
  const width = all.find(({ name }) => textLayer.test(name) && parseKey(name)?.role === "down")?.shape[1];
  const isOfXl = all.some(({ name }) => /^(lora_te2_|text_encoder_2\.)/.test(name));
  return `a LoRA of ${unetsByWidth[width ?? 0] ?? (isOfXl ? "SDXL" : "Stable Diffusion 1, 2 or XL")}`;
}
