/**
 * What a job is on Redis: its data, which a worker checks as a request from outside; the hash that its result is kept under; and its kind, by
 * which gateways know what it costs.
 */

import { createHash, randomInt } from "node:crypto";
import * as z from "zod";
import { clipped } from "../common/text.js";
import { OptionError } from "../errors.js";
import type { Json } from "../json.js";

/** Of jobs as this version writes them, and the newest that it reads. */
export const jobFormat = 1;

type JsonObject = { readonly [key: string]: Json };

/** What admission has to know of a job that waits: the ledger holds it. */
export interface JobFacts {
  readonly kind: string;
  /** Width x height of the pictures, or "text". */
  readonly size: string;
  readonly pictures: number;
  /** `priority` of the request. */
  readonly level: number;
  /** By the fleet's clock, as all moments here. */
  readonly arrival: number;
  /** The moment that it was promised; null without a promise. */
  readonly due: number | null;
}

const moment = z.number().nonnegative();
const factsSchema = z.strictObject({
  kind: z.string().max(64),
  size: z.string().max(32),
  pictures: z.int().min(1).max(1_000_000),
  level: z.number().min(-100).max(100),
  arrival: moment,
  due: moment.nullable(),
});

const dataSchema = z.strictObject({
  format: z.int().positive(),
  op: z.enum(["draw", "encode"]),
  request: z.record(z.string(), z.json()),
  hash: z.string().regex(/^[0-9a-f]{64}$/),
  facts: factsSchema,
  /** Whether a time limit was promised by the gateway: then it is drawn, late if need be, and not refused any more. */
  promised: z.boolean(),
  /** Whether the caller has named the seed, and so may ask for the same again. */
  repeatable: z.boolean(),
  traceparent: z.string().max(256).nullable(),
});

/** The data of a job. */
export type JobData = Omit<z.output<typeof dataSchema>, "request" | "facts"> & {
  readonly request: JsonObject;
  readonly facts: JobFacts;
};

/** The format of a job, whatever else it is; null if it has none. */
export function formatOf(data: unknown): number | null {
  const format = (data as { format?: unknown } | null | undefined)?.format;
  return typeof format === "number" ? format : null;
}

/** The facts of a job, whatever else it is; null if it has none. */
export function factsOf(data: unknown): JobFacts | null {
  const { success, data: facts } = factsSchema.safeParse((data as { facts?: unknown } | null | undefined)?.facts);
  return success ? facts : null;
}

/** @throws OptionError for data that no gateway of this version writes */
export function readJob(model: string, data: unknown): JobData {
  const { success, data: read, error } = dataSchema.safeParse(data);
  if (success) {
    const job = read as JobData;
    if (job.hash === hashOf(model, job.op, job.request)) return job;
    throw new OptionError("job", "The job's hash is not that of its request.");
  }
  const { path, message } = error.issues[0]!;
  throw new OptionError("job", `The job's data are wrong at ${path.join(".")}: ${clipped(message, 200)}.`);
}

/** What changes nothing about the result. */
const passing = ["priority", "ticket", "timeoutMs", "reports", "preview", "previewCount", "stepLatents"];
/** What changes nothing about how long it takes. Of these only whether they are there counts, but for texts and seeds. */
const uncounted = ["seed", "seeds", "ticket", "priority", "timeoutMs", "metadata", "prefer", "reports"];
const presence = ["image", "mask", "noise", "promptEmbeds", "deadlineMs"];

/** Whether a request says all that its result depends on. */
export function namesItsNoise({ seed, seeds, noise }: JsonObject): boolean {
  return seed !== undefined || seeds !== undefined || noise !== undefined;
}

/** A request with its seed, so that it is drawn alike wherever and however often. */
export function withSeed(request: JsonObject): JsonObject {
  return namesItsNoise(request) ? request : { ...request, seed: randomInt(2 ** 32) };
}

/** The name of its result: a digest of the model and of all that the result depends on. */
export function hashOf(model: string, op: JobData["op"], request: JsonObject): string {
  return digest({ format: jobFormat, model, op, request: without(request, passing) });
}

/** Those with the same name that are under way at the same time are one job. Unlike results they differ in what is shown on the way. */
export function followedAs(hash: string, request: JsonObject): string {
  const shown = Object.entries(request).filter(([name]) => ["preview", "previewCount", "stepLatents"].includes(name));
  return shown.length === 0 ? hash : digest({ hash, shown: Object.fromEntries(shown) });
}

/** Requests of one kind take equally long on one worker. */
export function kindOf(op: JobData["op"], request: JsonObject, pictures: number): string {
  const kind: Record<string, Json> = { op, pictures };
  for (const [name, value] of Object.entries(request)) {
    if (uncounted.includes(name)) continue;
    if (presence.includes(name)) kind[name] = true;
    else if (/prompt/i.test(name) && (typeof value === "string" || Array.isArray(value)))
      kind[name] = Array.isArray(value) ? value.length : 1;
    else if (name === "controls" && Array.isArray(value))
      kind[name] = value.map((control) => without(control as JsonObject, ["image", "mask"]));
    else kind[name] = value;
  }
  return digest(kind).slice(0, 16);
}

function without(fields: JsonObject, names: readonly string[]): JsonObject {
  return Object.fromEntries(Object.entries(fields).filter(([name]) => !names.includes(name)));
}

/** SHA-256 of JSON, whatever order its fields are in. */
function digest(value: Json): string {
  const hash = createHash("sha256");
  const write = (each: Json) => {
    if (Array.isArray(each)) {
      hash.update("[");
      for (const item of each) {
        write(item);
        hash.update(",");
      }
      hash.update("]");
    } else if (typeof each === "object" && each !== null) {
      hash.update("{");
      for (const name of Object.keys(each).sort()) {
        hash.update(`${JSON.stringify(name)}:`);
        write((each as JsonObject)[name]!);
        hash.update(",");
      }
      hash.update("}");
    } else hash.update(JSON.stringify(each));
  };
  write(value);
  return hash.digest("hex");
}
