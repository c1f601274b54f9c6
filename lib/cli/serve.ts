/** `flowturbo serve`: flags to a server. All checks that need no model come before one is loaded; the server listens while they load. */

import { readFileSync } from "node:fs";
import type { Command } from "commander";
import { DeviceLostError, OptionError } from "../errors.js";
import { embeddedModel, FlowTurbo } from "../flowturbo.js";
import type { LoadOptions } from "../model.js";
import { checkOptions, loadSchema } from "../options.js";
import { type CreateServerOptions, createServer } from "../server/index.js";
import { serverSchema } from "../server/options.js";
import { loadPackages } from "../server/packages.js";
import { addFlags, modelName, readFlags, readLoadFlags } from "./flags.js";
import { type LogFormat, logger, logLevels } from "./log.js";

interface Flags {
  model?: string[];
  host: string;
  port: string;
  apiKey?: string[];
  apiKeyFile?: string;
  insecure?: boolean;
  maxQueue?: string;
  drain: string;
  webhookHost?: string[];
  logLevel: string;
  logFormat?: LogFormat;
}

const repeated = (value: string, before: string[] = []) => [...before, value];

/** @param whenEnded called when the server has ended as it should after a signal */
export function serveCommand(command: Command, signal: AbortSignal, whenEnded: () => void): void {
  command
    .description(
      "Serve models over HTTP: OpenAI's images API with pictures that appear as they are drawn, jobs, metrics and a page.",
    )
    .option(
      "--model <[name=]path>",
      "checkpoint (a folder, one .safetensors file, or owner/name[@revision] of a model of the hub) to serve under that name, or its own (repeatable; default: the embedded shapes model)",
      repeated,
    )
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
    .option("--max-queue <n>", "requests of a model that may wait; more are answered with 429 (default: 64)");
  addFlags(command, serverSchema, loadSchema);
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

Then http://127.0.0.1:7860 is a page, and http://127.0.0.1:7860/v1 the address for clients of OpenAI's API.`,
    )
    .action((flags: Flags) => serve(flags, signal, whenEnded));
}

async function serve(flags: Flags, signal: AbortSignal, whenEnded: () => void): Promise<void> {
  // 1. What can be checked without a model.
  const port = whole("port", flags.port, 65_535);
  const drainSeconds = number("drain", flags.drain, 3600);
  const loadOptions: LoadOptions = {
    ...readLoadFlags(flags),
    ...(flags.maxQueue !== undefined && { maxQueue: whole("maxQueue", flags.maxQueue, 1_000_000) }),
    ...{ allowPaths: false, signal },
  };
  checkOptions(loadSchema, loadOptions, "serve");
  const folders = foldersOf(flags.model ?? []);
  const apiKeys = keysOf(flags);
  refuseOpenDoor(flags, apiKeys);
  const log = logger(flags.logLevel, flags.logFormat);
  const settings = {
    ...readFlags(serverSchema, flags),
    ...{ apiKeys, drainMs: 1000 * drainSeconds },
    ...webhooksOf(flags),
  };
  checkOptions(serverSchema, { ...settings, models: folders }, "serve");

  await loadPackages();

  // 2. Models load while the server listens: probes tell how far it is.
  const ending = new AbortController();
  const end = (error: unknown) => ending.abort(error);
  const models = Object.fromEntries(
    Object.entries(folders).map(([id, folder]) => {
      const loading = FlowTurbo.load(folder, { ...loadOptions, logger: log.child });
      // Only another process gets a GPU again that is lost for good: whoever restarts services has to see the end of this one.
      const watch = (model: FlowTurbo) =>
        model.on("lost", ({ error }) => {
          if (error instanceof DeviceLostError && error.permanent) end(error);
        });
      loading.then(watch, end);
      return [id, loading];
    }),
  );
  const options: CreateServerOptions = {
    ...{ ...settings, models, logger: log.options },
    onReady: (error) => {
      if (error) end(error);
    },
  };
  const app = await createServer(options);
  try {
    const address = await app.listen({ host: flags.host, port }).catch((error: NodeJS.ErrnoException) => {
      const reason =
        error.code === "EADDRINUSE" ? "another program listens there; choose another --port" : error.message;
      throw new OptionError("port", `Cannot listen at ${flags.host}:${port}: ${reason}.`);
    });
    log.announce(address);
    await new Promise<void>((resolve) => {
      const stop = () => resolve();
      if (signal.aborted || ending.signal.aborted) stop();
      signal.onabort = stop;
      ending.signal.onabort = stop;
    });
  } finally {
    await app.close();
    const loaded = await Promise.allSettled(Object.values(models));
    await Promise.all(loaded.map((each) => (each.status === "fulfilled" ? each.value.dispose() : undefined)));
  }
  if (signal.aborted) whenEnded();
  else throw ending.signal.reason;
}

/** Folders by the ids of their models. @throws OptionError for two of one name */
function foldersOf(given: readonly string[]): Record<string, string> {
  const folders: Record<string, string> = {};
  for (const text of given.length > 0 ? given : [embeddedModel]) {
    const [, name, folder] = text.match(/^([\w.:-]+)=(.+)$/s) ?? [null, null, text];
    const id = name ?? modelName(folder!);
    if (folders[id] !== undefined)
      throw new OptionError("model", `Two models are called "${id}". Name them: --model <name>=<path>.`);
    folders[id] = folder!;
  }
  return folders;
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

function number(option: string, text: string, most: number): number {
  const value = /^\d+(\.\d+)?$/.test(text) ? Number(text) : Number.NaN;
  if (!(value <= most))
    throw new OptionError(option, `Expected a number from 0 to ${most} for ${flag(option)} but received "${text}".`);
  return value;
}

function whole(option: string, text: string, most: number): number {
  const value = number(option, text, most);
  if (!Number.isInteger(value))
    throw new OptionError(option, `Expected a whole number for ${flag(option)} but received "${text}".`);
  return value;
}

/** `maxQueue` → `--max-queue` */
function flag(option: string): string {
  return `--${option.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}
