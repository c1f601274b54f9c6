/** What the processes of a fleet under test say to the process that started them, and hear from it. */

import { createHash } from "node:crypto";
import type { Json } from "../../../lib/json.js";
import type { GenerateOptions, GenerateResult } from "../../../lib/model.js";

/** Id of the model that all of them serve. */
export const modelId = "waiting";

interface Common {
  readonly redis: string;
  readonly prefix: string;
  readonly keepResultsMs: number;
}

export interface WorkerSettings extends Common {
  readonly role: "worker";
  readonly model: {
    readonly msPerLaunch: number;
    readonly msPerRow: number;
    readonly maxBatch?: number;
    readonly sizes?: readonly { readonly width: number; readonly height: number }[];
  };
  /** Folder of costs, which all processes share. */
  readonly cache: string;
  readonly lockMs?: number;
  readonly take?: number;
  /** Workers in this process. Default: 1. */
  readonly workers?: number;
  /** Whether it tells of each drawing: begin, steps, end. */
  readonly tells: boolean;
}

export interface GatewaySettings extends Common {
  readonly role: "gateway";
  readonly maxQueue?: number;
  /** Whether it has an HTTP server besides. */
  readonly http?: boolean;
}

/** A model without a fleet. */
export interface LibrarySettings extends Pick<WorkerSettings, "model" | "cache"> {
  readonly role: "library";
}

export type Settings = WorkerSettings | GatewaySettings | LibrarySettings;

/** A request in the JSON form of the library: `encode` has a prompt alone. */
export interface AskedFor {
  readonly op: "draw" | "encode";
  readonly request: { readonly [name: string]: Json };
}

export type ToProcess =
  | ({ readonly type: "ask"; readonly ask: number } & AskedFor)
  | { readonly type: "cancel"; readonly ask: number }
  /** Callers that each ask again as soon as they are answered. */
  | { readonly type: "load"; readonly callers: number; readonly jobs: number; readonly asked: AskedFor }
  | { readonly type: "usage" }
  | { readonly type: "stop" };

export interface Drawn {
  readonly digest: string;
  readonly seeds: readonly string[];
  readonly blocks: string;
}

/** How a request ended. */
export type Ended =
  | Drawn
  | { readonly code: string | null; readonly name: string; readonly message: string; readonly retryAfterMs: number | null }; // biome-ignore format: one line

export type FromProcess =
  /** `port` of the HTTP server, if there is one. */
  | { readonly type: "ready"; readonly port: number | null }
  | { readonly type: "accepted"; readonly ask: number }
  | { readonly type: "ended"; readonly ask: number; readonly ended: Ended; readonly steps: readonly number[]; readonly milliseconds: number } // biome-ignore format: one line
  /** `ends`: moments at which requests were answered, by `Date.now()`, in order. */
  | { readonly type: "loaded"; readonly latencies: readonly number[]; readonly ends: readonly number[] }
  /** Processor time of the process so far. */
  | { readonly type: "usage"; readonly milliseconds: number }
  /** A drawing by a worker; `drawing` is a number of its own in the process, `at` by `Date.now()`. */
  | { readonly type: "drawing"; readonly what: "begin" | "step" | "drawn" | "failed"; readonly drawing: number; readonly key: string; readonly at: number }; // biome-ignore format: one line

/** Names what is drawn: jobs of the same are one while they are under way. */
export function keyOf(options: Pick<GenerateOptions, "prompt" | "seed" | "seeds" | "preview">): string {
  const { prompt, seed, seeds, preview } = options;
  const noise = seeds?.join() ?? seed;
  return noise === undefined ? `encode ${prompt}` : `${noise}${preview ? ` ${preview}` : ""}`;
}

/** A digest of all that was drawn. */
export function digestOf({ images, latents }: GenerateResult): string {
  const hash = createHash("sha256");
  for (const { width, height, data } of images) hash.update(`${width}x${height}`).update(data);
  if (latents) hash.update(JSON.stringify(latents.shape)).update(Buffer.from(latents.data.buffer));
  return hash.digest("hex").slice(0, 16);
}

/** A digest of prompts that were encoded. */
export function digestOfEmbeds(embeds: object): string {
  const hash = createHash("sha256");
  for (const name of Object.keys(embeds).sort()) {
    const tensor = (embeds as Record<string, { readonly data: Float32Array } | undefined>)[name];
    if (tensor?.data instanceof Float32Array)
      hash.update(name).update(new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength));
  }
  return hash.digest("hex").slice(0, 16);
}
