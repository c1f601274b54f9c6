/**
 * What a worker says of a job while it works on it, to those who wait for the job: on a channel of Redis, which keeps nothing. How a job ended is
 * kept besides (results, failures), so that a message that is lost costs time only.
 */

import * as z from "zod";
import { tensorJson } from "../codecs.js";
import { picture } from "../json.js";
import type { StepEvent } from "../model.js";
import { seedJson } from "../options.js";

const milliseconds = z.number();
const stepSchema = z.strictObject({
  ...{ step: z.int(), steps: z.int(), stage: z.int(), stages: z.int() },
  ...{ block: z.string(), sigma: z.number(), milliseconds },
  previews: z.array(picture),
  latents: tensorJson.nullable(),
});
const messageSchema = z.discriminatedUnion("type", [
  z.strictObject({
    type: z.literal("accept"),
    predictedMs: milliseconds.nullable(),
    place: z.int(),
    blocks: z.string(),
    seeds: z.array(seedJson),
    aloneMs: milliseconds.nullable(),
    leastMs: milliseconds.nullable(),
  }),
  z.strictObject({ type: z.literal("start"), worker: z.string(), blocks: z.string() }),
  z.strictObject({ type: z.literal("steps"), steps: z.array(stepSchema) }),
  z.strictObject({ type: z.literal("done") }),
  z.strictObject({ type: z.literal("failed"), failure: z.looseObject({}) }),
  /** Everybody who waited for it had left. */
  z.strictObject({ type: z.literal("cancelled") }),
]);

export type Message = z.output<typeof messageSchema>;

export function encodeMessage(message: Message): string {
  return JSON.stringify(z.encode(messageSchema, message));
}

/** Null for what is none. */
export function decodeMessage(text: string): Message | null {
  try {
    return z.decode(messageSchema, JSON.parse(text));
  } catch {
    return null;
  }
}

/** A step as it is sent. */
export function stepMessage(step: StepEvent): Extract<Message, { type: "steps" }>["steps"][number] {
  return { ...step, previews: [...step.previews] };
}
