/** What `flowturbo doctor` says of LoRAs and ControlNets: whether they fit a model, before anything is drawn with them. */

import {
  type Checkpoint,
  checkControlNetFits,
  checkControlNetValues,
  checkpointName,
  type Lora,
  nameOfLora,
  openCheckpoint,
  openControlNet,
  partTitles,
  readLora,
} from "../checkpoint/index.js";
import { gigabytes } from "../common/memory.js";
import type { LoadOptions } from "../model.js";
import { graphName } from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import { checkControlNetName, twoControlNetsOfOneName } from "./control-nets.js";
import { locateAll } from "./locate.js";
import { LoraInputs } from "./lora-inputs.js";
import { namedLoras, twoLorasOfOneName } from "./loras.js";

/** An adapter as it was found. */
export interface AdapterExamination {
  readonly kind: "LoRA" | "ControlNet";
  readonly name: string;
  /** File or folder, as it was given. */
  readonly place: string;
  readonly fits: boolean;
  /** What it holds, where it fits. */
  readonly about: string | null;
  /** Why it cannot be used, with the remedy. */
  readonly reason: string | null;
}

type Adapter = Pick<AdapterExamination, "kind" | "name" | "place">;

/**
 * Reads each adapter for the model. Nothing is merged, and no weights of the model are read.
 * @param model folder, file or name on the hub
 * @returns those of a name that one before them has do not fit either, as `load` would refuse both
 * @throws CheckpointError or HubError for a model that cannot be opened
 */
export async function examineAdapters(
  model: string,
  { loras = [], controlNets = [] }: Pick<LoadOptions, "loras" | "controlNets">,
): Promise<AdapterExamination[]> {
  const { path, controlNets: folders } = await locateAll(model, { controlNets });
  const checkpoint = await openCheckpoint(path);
  const found: AdapterExamination[] = [];
  const examine = async (what: Adapter, about: () => Promise<string>): Promise<void> => {
    const before = found.find(({ kind, name }) => kind === what.kind && name === what.name);
    const settled = await about()
      .then((text) => {
        if (before) throw twoOfOneName(before, what);
        return text;
      })
      .then(
        (text) => ({ fits: true, about: text, reason: null }),
        (error: Error) => ({ fits: false, about: null, reason: error.message }),
      );
    found.push({ ...what, ...settled });
  };
  for (const source of loras) {
    // One that cannot be found is called as it was given.
    const name = source.name ?? (await nameOfLora(source.file).catch(() => checkpointName(source.file)));
    await examine({ kind: "LoRA", name, place: source.file }, async () => {
      const [{ file, dynamic }] = (await namedLoras([source])) as [Awaited<ReturnType<typeof namedLoras>>[number]];
      const lora = await readLora(file, checkpoint, { name });
      if (dynamic) new LoraInputs(new GraphLibrary(checkpoint), [{ ...lora, defaultScale: 1 }]).check();
      return aboutLora(lora);
    });
  }
  for (const [index, { folder, name = checkpointName(folder) }] of controlNets.entries())
    await examine({ kind: "ControlNet", name, place: folder }, async () => {
      checkControlNetName(name, folder);
      return aboutControlNet(folders[index]!, checkpoint);
    });
  return found;
}

function twoOfOneName(first: Adapter, second: Adapter): Error {
  return second.kind === "LoRA"
    ? twoLorasOfOneName(second.name, [first.place, second.place])
    : twoControlNetsOfOneName(second.name);
}

/** `rank 16; 288 layers of the transformer, 24 of the first text encoder (CLIP-L)` */
function aboutLora({ parts }: Lora): string {
  if (parts.size === 0) return "all of its matrices are zero, so that it changes nothing";
  const layers = [...parts.values()].flatMap((each) => [...each.values()]);
  const ranks = [...new Set(layers.map(({ rank }) => rank))].sort((a, b) => a - b);
  const counts = [...parts].map(([part, each]) => `${each.size} layers of the ${partTitles[part]}`);
  return `rank ${ranks.length > 1 ? `${ranks[0]} to ${ranks.at(-1)}` : ranks[0]}; ${counts.join(", ")}`;
}

/** `12 blocks with text, 1 more channel for a mask; 1.20 GB of weights` */
async function aboutControlNet(folder: string, checkpoint: Checkpoint): Promise<string> {
  const controlNet = await openControlNet(folder);
  checkControlNetFits(controlNet, checkpoint);
  const { id, config, weights } = controlNet;
  // Names and shapes of all of its weights.
  const controlNets = new Map([[id, controlNet]]);
  new GraphLibrary({ ...checkpoint, controlNets }).get(graphName({ network: "predict", controls: id }));
  await checkControlNetValues(controlNet);
  const bytes = Object.values(weights.bytesByDType).reduce((sum, each) => sum + each, 0);
  const text = config.jointAttentionDim === null ? "without text" : "with text";
  const more = config.extraConditioningChannels;
  const mask = more > 0 ? `, ${more} more channel${more > 1 ? "s" : ""} for a mask` : "";
  return `${config.numLayers} blocks ${text}${mask}; ${gigabytes(bytes)} GB of weights`;
}
