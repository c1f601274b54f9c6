/**
 * `flowturbo serve`: flags to a server. All checks that need no model come before one is loaded; the server listens while they load. With
 * `--redis` it is a gateway: the models are those of a fleet, and none is loaded here.
 */

import { readFileSync } from "node:fs";
import type { Command } from "commander";
import type { FastifyInstance } from "fastify";
import type { Logger } from "../common/logger.js";
import { OptionError } from "../errors.js";
import { FleetDirectory } from "../fleet/directory.js";
import { Fleet } from "../fleet/fleet.js";
import { type ConnectFleetOptions, connectSchema } from "../fleet/options.js";
import { checkOptions, loadSchema } from "../options.js";
import { type CreateServerOptions, createServer } from "../server/index.js";
import { serverSchema } from "../server/options.js";
import { loadPackages } from "../server/packages.js";
import { addBoard, loadBoard } from "./board.js";
import { addFlags, readFlags, refuseLoadFlags } from "./flags.js";
import { portError, untilEnd } from "./listening.js";
import { type LogFormat, logger, logLevels } from "./log.js";
import { number, whole } from "./numbers.js";
import { addRedisFlag, type RedisFlag, redisOf } from "./redis.js";
import { addServedModels, foldersOf, loadServed, repeated, servedLoadOptions } from "./served-models.js";

/** What only a gateway has flags for. */
const gatewaySchema = connectSchema.pick({ prefix: true, results: true, keepResultsMs: true });

interface Flags {
  model?: string[];
  redis?: RedisFlag;
  board?: boolean;
  host: string;
  port: string;
  apiKey?: string[];
  apiKeyFile?: string;
  insecure?: boolean;
  maxQueue?: string;
  warm?: string;
  drain: string;
  webhookHost?: string[];
  logLevel: string;
  logFormat?: LogFormat;
}

/** @param whenEnded called when the server has ended as it should after a signal */
export function serveCommand(command: Command, signal: AbortSignal, whenEnded: () => void): void {
  command.description(
    "Serve models over HTTP: OpenAI's images API with pictures that appear as they are drawn, jobs, metrics and a page.",
  );
  addServedModels(command);
  addRedisFlag(command, "draw with the workers of the fleet at this Redis, in place of models of this process");
  command
    .option(
      "--host <address>",
      "address to listen at; another one than this machine's own needs a key, or --insecure",
      "127.0.0.1",
    )
    .option("--port <n>", "port to listen at; 0 takes a free one", "7860")
    .option(
      "--api-key <key>",
      "key of which requests must have one (repeatable; also FLOWTURBO_API_KEY, which other users of this machine cannot read)",
      repeated,
    )
    .option("--api-key-file <file>", "file of such keys, one a line")
    .option("--insecure", "listen for other machines without a key")
    .option(
      "--max-queue <n>",
      "requests of a model that may wait; more are answered with 429 (default: 64; with --redis 64 for each worker)",
    );
  addFlags(command, serverSchema, gatewaySchema, loadSchema);
  command.option("--board", "with --redis: show the fleet's queues at /board, prompts included; a key is the password");
  command
    .option("--drain <seconds>", "time that requests under way have after SIGTERM", "30")
    .option(
      "--webhook-host <host>",
      "host that webhooks of jobs may be sent to (repeatable); FLOWTURBO_WEBHOOK_SECRET signs them",
      repeated,
    )
    .option("--log-level <level>", `what is logged: ${logLevels.join(", ")}`, "info")
    .option("--log-format <format>", "json, or text for people (default: text on a terminal)")
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo serve
  $ flowturbo serve --model ./stable-diffusion-3.5-medium --warm 1024x1024,832x1216
  $ flowturbo serve --model fast=./sd3.5-large-turbo --model best=./sd3.5-large --host 0.0.0.0 --api-key-file keys.txt
  $ flowturbo serve --redis redis://127.0.0.1:6379

Then http://127.0.0.1:7860 is a page, and http://127.0.0.1:7860/v1 the address for clients of OpenAI's API.`,
    )
    .action((flags: Flags) => serve(flags, signal, whenEnded));
}

async function serve(flags: Flags, signal: AbortSignal, whenEnded: () => void): Promise<void> {
  // 1. What can be checked without a model.
  const port = whole("port", flags.port, 65_535);
  const drainSeconds = number("drain", flags.drain, 3600);
  const maxQueue = flags.maxQueue === undefined ? undefined : whole("maxQueue", flags.maxQueue, 1_000_000);
  const log = logger(flags.logLevel, flags.logFormat);
  const source =
    flags.redis === undefined
      ? processSource(flags, maxQueue, signal, log.child)
      : fleetSource(flags, flags.redis, maxQueue, log.child);
  const apiKeys = keysOf(flags);
  refuseOpenDoor(flags, apiKeys);
  const settings = {
    ...readFlags(serverSchema, flags),
    ...{ apiKeys, drainMs: 1000 * drainSeconds },
    ...webhooksOf(flags),
  };
  checkOptions(serverSchema.omit({ models: true }), settings, "serve");

  await loadPackages();
  if (flags.board) await loadBoard();

  // 2. Models load while the server listens: probes tell how far it is.
  const ending = new AbortController();
  const end = (error: unknown) => ending.abort(error);
  const { models, addTo, close } = await source.open(end);
  try {
    const options: CreateServerOptions = {
      ...{ ...settings, models, logger: log.options },
      onReady: (error) => {
        if (error) end(error);
      },
    };
    const app = await createServer(options);
    try {
      await addTo?.(app, apiKeys);
      const address = await app.listen({ host: flags.host, port }).catch((error: NodeJS.ErrnoException) => {
        throw portError("--port", flags.host, port, error);
      });
      log.announce(address);
      await untilEnd(signal, ending.signal);
    } finally {
      await app.close();
    }
  } finally {
    await close();
  }
  if (signal.aborted) whenEnded();
  else throw ending.signal.reason;
}

/** Where the models come from. */
interface Source {
  /** @param end called when the process is of no use any more */
  open(end: (error: unknown) => void): Promise<{
    readonly models: CreateServerOptions["models"];
    /** What the app has besides. */
    addTo?(app: FastifyInstance, apiKeys: readonly string[]): Promise<void>;
    close(): Promise<void>;
  }>;
}

/** Models of this process. @throws OptionError for a flag that is wrong */
function processSource(flags: Flags, maxQueue: number | undefined, signal: AbortSignal, logger: Logger): Source {
  if (flags.board)
    throw new OptionError("board", "--board shows the queues of a fleet; give --redis too, or leave it out.");
  const needless = Object.keys(readFlags(gatewaySchema, flags))[0];
  if (needless !== undefined)
    throw new OptionError(needless, "This flag is for a gateway; give --redis too, or leave it out.");
  const options = servedLoadOptions(flags, "serve", { ...(maxQueue !== undefined && { maxQueue }), signal });
  const folders = foldersOf(flags.model);
  return {
    async open(end) {
      const { loading, dispose } = loadServed(folders, options, logger, end);
      return { models: loading, close: dispose };
    },
  };
}

/** Those of a fleet. @throws OptionError for a flag that is wrong */
function fleetSource(flags: Flags, redis: RedisFlag, maxQueue: number | undefined, logger: Logger): Source {
  const message = "With --redis no model is loaded here; leave this flag out, and give it to `flowturbo worker`.";
  refuseLoadFlags(flags, message);
  if (flags.model !== undefined) throw new OptionError("model", `--model: ${message}`);
  if (flags.warm !== undefined) throw new OptionError("warm", message);
  const options: ConnectFleetOptions = {
    ...readFlags(gatewaySchema, flags),
    ...(maxQueue !== undefined && { maxQueue }),
    ...{ redis: redisOf(redis), allowPaths: false, logger },
  };
  checkOptions(connectSchema, options, "serve");
  return {
    async open() {
      const fleet = await Fleet.connect(options);
      const models = new FleetDirectory(fleet);
      return {
        models,
        close: () => fleet.close(),
        ...(flags.board && {
          addTo: (app, apiKeys) => addBoard(app, fleet, () => models.models.keys(), apiKeys),
        }),
      };
    },
  };
}

/** @throws OptionError for a file that cannot be read, or has no key */
function keysOf({ apiKey = [], apiKeyFile }: Flags): string[] {
  const fromEnvironment = process.env.FLOWTURBO_API_KEY ? [process.env.FLOWTURBO_API_KEY] : [];
  const keys = [...apiKey, ...fromEnvironment, ...(apiKeyFile === undefined ? [] : keysIn(apiKeyFile))];
  // It has to fit into a header.
  for (const key of keys)
    if (!/^[\x21-\x7e]+$/.test(key))
      throw new OptionError("apiKey", "Expected keys of printable ASCII characters without spaces for --api-key.");
  return [...new Set(keys)];
}

function keysIn(file: string): string[] {
  let text: string;
  try {
    text = readFileSync(file, "utf8");
  } catch (cause) {
    throw new OptionError("apiKeyFile", `The file of keys cannot be read: ${(cause as Error).message}`, { cause });
  }
  const keys = text
    .split(/\r?\n/)
    .map((line) => line.trim())
    .filter((line) => line !== "");
  if (keys.length === 0) throw new OptionError("apiKeyFile", `The file of keys, ${file}, has none; write one a line.`);
  return keys;
}

/** @throws OptionError for other machines without a key */
function refuseOpenDoor({ host, insecure }: Flags, keys: readonly string[]): void {
  const isOwn = host === "localhost" || host === "::1" || /^127(\.\d{1,3}){3}$/.test(host);
  if (isOwn || keys.length > 0 || insecure) return;
  throw new OptionError(
    "host",
    `At ${host} other machines could draw without a key. Give --api-key or FLOWTURBO_API_KEY, or say --insecure.`,
  );
}

function webhooksOf({ webhookHost }: Flags) {
  if (webhookHost === undefined) return {};
  const secret = process.env.FLOWTURBO_WEBHOOK_SECRET ?? "";
  if (secret.length < 16)
    throw new OptionError(
      "webhooks",
      "Expected a secret of at least 16 characters in FLOWTURBO_WEBHOOK_SECRET for --webhook-host.",
    );
  return { webhooks: { hosts: webhookHost, secret } };
}
