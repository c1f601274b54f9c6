// Closed forms for all graphs of a checkpoint, for engines of the simulated device.
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { graphKey } from "../../lib/networks/index.js";
import type { ClosedForm } from "../runtimes/models.js";
import { samplingForms } from "./sampling.js";

/** The form of a graph by its name; undefined for one that has none. */
export async function formsOf(folder: string): Promise<(name: string) => ClosedForm | undefined> {
  const { textEncoder, textEncoder2, textEncoder3, vae } = await openCheckpoint(folder);
  const clip = (config: { hiddenSize: number; projectionDim: number }): ClosedForm => ({
    inputs: { ids: "int64" },
    outputs: ({ ids }) => ({ hidden: [...ids!, config.hiddenSize], pooled: [ids![0]!, config.projectionDim] }),
    formulas: ["hidden ids 0.01 *", "pooled ids 0.02 *"],
  });
  const forms: Record<string, ClosedForm> = {
    clip_l: clip(textEncoder!.config),
    clip_g: clip(textEncoder2!.config),
    t5: {
      inputs: { ids: "int64", relative_buckets: "int64" },
      outputs: ({ ids }) => ({ hidden: [...ids!, textEncoder3!.config.dModel] }),
      formulas: ["hidden ids 0.03 * relative_buckets 0.04 * +"],
    },
  };
  const preview = (guided: boolean): ClosedForm => ({
    inputs: Object.fromEntries(
      ["x", "velocity", "sigma", ...(guided ? ["guidance"] : []), "map", "bias"].map((name) => [name, "float32"]),
    ),
    outputs: ({ x }) => ({ latents: x!, image: [x![0]!, 3, x![2]!, x![3]!] }),
    formulas: [`latents x sigma velocity${guided ? ".c" : ""} * -`, "image latents 0.5 * 0.25 +"],
  });
  forms.vae_encoder = {
    ...samplingForms(true, vae.config.factor).vae_encoder!,
    outputs: ({ image }) => {
      const [rows, , height, width] = image as [number, number, number, number];
      return { latents: [rows, vae.config.latentChannels, height / vae.config.factor, width / vae.config.factor] };
    },
  };
  const guided: Record<string, ClosedForm> = { ...samplingForms(true, vae.config.factor), preview: preview(true) };
  const unguided: Record<string, ClosedForm> = { ...samplingForms(false, vae.config.factor), preview: preview(false) };
  return (name) => {
    const { network, guidance, lora } = graphKey(name);
    const form = forms[network] ?? (guidance ? guided : unguided)[network];
    const branch = { lora_down: "float32", lora_up: "float32", lora_scale: "float32" } as const;
    return form && lora ? { ...form, inputs: { ...form.inputs, ...branch } } : form;
  };
}
