/** The options of the server as a zod schema: checks, defaults and flags. Their types, with what each means, are below. */

import * as z from "zod";
import type { ImageModel, Size } from "../model.js";
import { mostControls, worded } from "../options.js";
import type { ModelDirectory } from "./directory.js";

/** Options of the plugin `imageServer`. */
export interface ImageServerOptions {
  /**
   * The models by id, the first one for requests that name none. A promise is a model that is still loading: requests for it are answered
   * with 503 until then. The models stay yours: nothing here disposes them. Models that come and go are a directory, such as `modelsOf` of
   * `flowturbo/fleet` makes.
   */
  models: Readonly<Record<string, ImageModel | PromiseLike<ImageModel>>> | ModelDirectory;
  /** Keys of which requests must have one: `Authorization: Bearer <key>`. Default: none, and everybody may draw. */
  apiKeys?: readonly string[] | undefined;
  /** Milliseconds that a request which names no `deadline_ms` may take, above 0 and up to 2³¹; see the option `deadlineMs` of `generate`. Default: no limit. */
  deadlineMs?: number | undefined;
  /** Largest picture, by its pixels: a size, of which the product counts. Default: 1536 × 1536. */
  maxSize?: Size | undefined;
  /** Most steps of a request, 1 to 1000; the default allows every quality. A schedule that a time limit chooses is limited by that. Default: 50. */
  maxSteps?: number | undefined;
  /** Most pictures of a request, 1 to 1024. Default: 10. */
  maxImages?: number | undefined;
  /** Most ControlNets of a request, 1 to 8: each is one more network in every step. Default: 3. */
  maxControls?: number | undefined;
  /** Largest body of a request, in bytes, 1024 to 2³⁰. Default: 32 MiB. */
  maxBodyBytes?: number | undefined;
  /** Most pixels of a picture in a body, 1 to 268402689. Default: 64 million. */
  maxInputPixels?: number | undefined;
  /** Origins whose pages may call the server from a browser, such as `"https://example.org"`, or `"*"`. Default: none. */
  cors?: readonly string[] | undefined;
  /** Milliseconds that requests under way have when the server ends, until they are aborted; 0 to 3600000. Default: 30000. */
  drainMs?: number | undefined;
  /** Sizes that every model draws once before `/readyz` says that it is ready. Default: the model's native size. */
  warm?: readonly Size[] | undefined;
  /** Whether there is a page at `/`. Default: true. */
  page?: boolean | undefined;
  /** How long jobs are kept when they have ended, in milliseconds, 1000 to 86400000. Default: 600000. */
  keepJobsMs?: number | undefined;
  /** How many jobs are kept when they have ended, 1 to 100000; the oldest go first, and when their results take more than 256 MiB. Default: 1000. */
  keepJobs?: number | undefined;
  /**
   * Webhooks of jobs: the hosts that they may be sent to, and the secret that signs them, of at least 16 characters (`whsec_` and base64, or any
   * text). Default: none are sent.
   */
  webhooks?: { hosts: readonly string[]; secret: string } | undefined;
  /** Called once, when every model has been loaded and has drawn, or with what prevents it. Default: none. */
  onReady?: ((error: Error | null) => void) | undefined;
}

/** What limits requests. */
export interface Limits {
  readonly deadlineMs: number | null;
  readonly maxPixels: number;
  readonly maxSteps: number;
  readonly maxImages: number;
  readonly maxControls: number;
  readonly maxBodyBytes: number;
  readonly maxInputPixels: number;
}

const described = <T extends z.ZodType>(schema: T, expects: string, description: string, flag?: string) =>
  worded(schema.meta({ description }), { expects, ...(flag && { flag }) });
const whole = (least: number, most: number) => z.int().min(least).max(most);
const wholeText = (least: number, most: number) => `a whole number from ${least} to ${most}`;
const side = z.int().min(1).max(99_999);
const size = z.strictObject({ width: side, height: side });
const texts = z.array(z.string().min(1)).max(1024);

/** What `flowturbo serve` has flags for, and the plugin options for. */
export const serverSchema = z.strictObject({
  models: described(
    z.custom<ImageServerOptions["models"]>(
      (value) =>
        typeof value === "object" &&
        value !== null &&
        (Object.keys(value).length > 0 || typeof (value as { find?: unknown }).find === "function"),
    ),
    "an object of at least one model by its id, or a directory of models",
    "models by id",
  ),
  apiKeys: described(texts.default([]), "a list of keys", "keys of which requests must have one"),
  deadlineMs: described(
    z
      .number()
      .gt(0)
      .max(2 ** 31)
      .optional(),
    "a positive number of milliseconds",
    "milliseconds that a request which names no deadline_ms may take (default: no limit)",
    "--deadline <ms>",
  ),
  maxSize: described(
    size.default({ width: 1536, height: 1536 }),
    "a size such as 1024x1024",
    "largest picture, by its pixels",
    "--max-size <WxH>",
  ),
  maxSteps: described(whole(1, 1000).default(50), wholeText(1, 1000), "most steps of a request", "--max-steps <n>"),
  maxImages: described(
    whole(1, 1024).default(10),
    wholeText(1, 1024),
    "most pictures of a request",
    "--max-images <n>",
  ),
  maxControls: described(
    whole(1, mostControls).default(3),
    wholeText(1, mostControls),
    "most ControlNets of a request",
    "--max-controls <n>",
  ),
  maxBodyBytes: described(
    whole(1024, 2 ** 30).default(32 * 2 ** 20),
    wholeText(1024, 2 ** 30),
    "largest body of a request, in bytes",
    "--max-body <bytes>",
  ),
  maxInputPixels: described(
    whole(1, 268_402_689).default(64_000_000),
    wholeText(1, 268_402_689),
    "most pixels of a picture in a body",
  ),
  cors: described(
    texts.default([]),
    "a list of origins",
    "origins whose pages may call the server from a browser, such as https://example.org, or *",
    "--cors <origins>",
  ),
  drainMs: described(
    z.number().min(0).max(3_600_000).default(30_000),
    "a number of milliseconds from 0 to 3600000",
    "milliseconds that requests under way have when the server ends",
  ),
  warm: described(
    z.array(size).max(64).optional(),
    "sizes such as 1024x1024",
    "sizes to draw once before the server is ready, such as 1024x1024,832x1216 (default: the model's native size)",
    "--warm <sizes>",
  ),
  page: described(z.boolean().default(true), "true or false", "serve no page at /", "--no-page"),
  keepJobsMs: described(
    z.number().min(1000).max(86_400_000).default(600_000),
    "a number of milliseconds from 1000 to 86400000",
    "how long jobs are kept when they have ended",
  ),
  keepJobs: described(
    whole(1, 100_000).default(1000),
    wholeText(1, 100_000),
    "how many jobs are kept when they have ended",
  ),
  webhooks: described(
    z.strictObject({ hosts: texts.min(1), secret: z.string().min(16) }).optional(),
    "{ hosts, secret } with a secret of at least 16 characters",
    "hosts that webhooks may be sent to, and the secret that signs them",
  ),
  onReady: described(
    z.custom<(error: Error | null) => void>((value) => typeof value === "function").optional(),
    "a function",
    "called when every model has drawn",
  ),
});

export type ServerSettings = z.output<typeof serverSchema>;

export function limitsOf(settings: ServerSettings): Limits {
  const { deadlineMs = null, maxSize, maxSteps, maxImages, maxControls, maxBodyBytes, maxInputPixels } = settings;
  const maxPixels = maxSize.width * maxSize.height;
  return { deadlineMs, maxPixels, maxSteps, maxImages, maxControls, maxBodyBytes, maxInputPixels };
}
