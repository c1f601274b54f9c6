/** The options of workers and gateways as zod schemas: checks, defaults and flags. Their types, with what each means, are below. */

import * as z from "zod";
import type { Logger } from "../common/logger.js";
import type { ImageModel } from "../model.js";
import { worded } from "../options.js";

/** What workers and gateways of one fleet have in common. */
export interface FleetOptions {
  /**
   * Address of the Redis (7 or later) or Valkey that all of the fleet use: `redis://127.0.0.1:6379`, or `rediss://user:password@host:6380` with TLS. Whoever
   * can write to it can have pictures drawn, so it needs a password wherever others reach it; a certificate of your own is named by `NODE_EXTRA_CA_CERTS`.
   */
  redis: string;
  /** What all keys of the fleet begin with, 1 to 64 letters, digits, `.`, `_` and `-`; fleets of different prefixes share a Redis. Default: `"flowturbo"`. */
  prefix?: string | undefined;
  /**
   * Folder of results, on a volume that all workers and gateways share. Files are readable by their owner alone, so that all have to run as
   * one user. Default: results are in Redis.
   */
  results?: string | undefined;
  /** How long results and errors are kept, in milliseconds, 10000 to 86400000: who asks for the same within it gets the same, without work. Default: 600000. */
  keepResultsMs?: number | undefined;
  /** Receives warnings and notes; `console` is one. Default: none. */
  logger?: Logger | undefined;
}

/** Options of `startWorker`. */
export interface FleetWorkerOptions extends FleetOptions {
  /** The models that it draws with, by the ids that requests name. They stay yours: the worker does not dispose of them. */
  models: Readonly<Record<string, ImageModel>>;
  /**
   * Pictures of each model that it takes at a time, 1 to 1024. Default: the batch beyond which a picture gets no cheaper, by the model's costs (4 where they
   * are not known), and as many again when one of its jobs is about to end.
   */
  take?: number | undefined;
  /** How long a job's lock lasts, in milliseconds, 1000 to 600000: a worker that is gone is noticed after it, and its jobs start again elsewhere. Default: 15000. */
  lockMs?: number | undefined;
}

/** Options of `connectFleet`. */
export interface ConnectFleetOptions extends FleetOptions {
  /** Id of the model that is drawn with. Default: the one that most workers have. */
  model?: string | undefined;
  /** Requests of a model that may wait for a worker, 0 to 1000000; more are refused with a QueueFullError. Default: 64 for each worker. */
  maxQueue?: number | undefined;
  /** As the option of `FlowTurbo.load`: whether requests may name pictures by a path of this machine. Their bytes travel in any case. Default: true. */
  allowPaths?: boolean | undefined;
}

const described = <T extends z.ZodType>(schema: T, expects: string, description: string, flag?: string) =>
  worded(schema.meta({ description }), { expects, ...(flag && { flag }) });
const whole = (least: number, most: number) => z.int().min(least).max(most);
const wholeText = (least: number, most: number) => `a whole number from ${least} to ${most}`;

const shared = {
  redis: described(z.string().min(1), "the address of a Redis", "address of the Redis of the fleet"),
  prefix: described(
    z
      .string()
      .regex(/^[\w.-]{1,64}$/)
      .default("flowturbo"),
    "1 to 64 letters, digits, dots, hyphens and underscores",
    "what all keys of the fleet begin with in Redis",
    "--prefix <text>",
  ),
  results: described(
    z.string().min(1).optional(),
    "the path of a folder",
    "folder of results, on a volume that all workers and gateways share (default: results are in Redis)",
    "--results <folder>",
  ),
  keepResultsMs: described(
    whole(10_000, 86_400_000).default(600_000),
    wholeText(10_000, 86_400_000),
    "how long results are kept, in milliseconds",
    "--keep-results <ms>",
  ),
  logger: described(
    z.custom<Logger>((value) => typeof value === "object" && value !== null).optional(),
    "an object with methods debug, info and warn",
    "receives warnings and notes",
  ),
};

/** What `flowturbo worker` has flags for, and `startWorker` options. */
export const workerSchema = z.strictObject({
  ...shared,
  models: described(
    z.custom<FleetWorkerOptions["models"]>(
      (value) => typeof value === "object" && value !== null && Object.keys(value).length > 0,
    ),
    "an object of at least one model by its id",
    "models by id",
  ),
  take: described(
    whole(1, 1024).optional(),
    wholeText(1, 1024),
    "pictures of each model that are taken at a time (default: as many as keep launches full, by the costs)",
    "--take <n>",
  ),
  lockMs: described(
    whole(1000, 600_000).default(15_000),
    wholeText(1000, 600_000),
    "after how many milliseconds of silence the jobs of a worker start again elsewhere",
    "--lock <ms>",
  ),
});

/** What `flowturbo serve --redis` has flags for, and `connectFleet` options. */
export const connectSchema = z.strictObject({
  ...shared,
  model: described(z.string().min(1).optional(), "the id of a model", "id of the model that is drawn with"),
  maxQueue: described(
    whole(0, 1_000_000).optional(),
    wholeText(0, 1_000_000),
    "requests of a model that may wait for a worker (default: 64 for each)",
  ),
  allowPaths: described(z.boolean().default(true), "true or false", "whether requests may name pictures by a path"),
});
