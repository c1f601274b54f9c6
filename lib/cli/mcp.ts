/**
 * `flowturbo mcp`: tools that draw, for programs that speak the Model Context Protocol over stdin and stdout. Nothing but the protocol
 * is written to stdout. The model is loaded by the first call: such programs start their servers with themselves, and
 * most of the time nobody draws.
 */

import type { Command } from "commander";
import type { Drawer } from "../clients/drawer.js";
import { localDrawer } from "../clients/local.js";
import { remoteDrawer } from "../clients/remote.js";
import { onAbort, untilAborted } from "../common/abort.js";
import { OptionError } from "../errors.js";
import { embeddedModel, FlowTurbo } from "../flowturbo.js";
import { OutputFolder } from "../mcp/outputs.js";
import { mcpSdk } from "../mcp/sdk.js";
import { createMcpServer } from "../mcp/server.js";
import type { AdapterNames, ImageFormat, LoadOptions } from "../model.js";
import { checkOptions, loadSchema } from "../options.js";
import { adapterNames } from "./adapters.js";
import { addModelFlags, modelName, readLoadFlags, refuseLoadFlags } from "./flags.js";

interface Flags {
  model?: string;
  url?: string;
  apiKey?: string;
  outDir?: string;
  format: string;
}

const formats: readonly ImageFormat[] = ["png", "jpeg", "webp"];

/** Characters of one message from the client: two pictures in base64. */
const longestMessage = 256 * 2 ** 20;

/** @param whenEnded called when the server has ended as it should, after a signal too */
export function mcpCommand(command: Command, signal: AbortSignal, whenEnded: () => void): void {
  command.description(
    "Give programs that speak the Model Context Protocol tools that draw and edit pictures, over stdin and stdout.",
  );
  addModelFlags(command, loadSchema);
  command
    .option(
      "--url <address>",
      "draw at a server of `flowturbo serve` in place of this process; --model is then its id there",
    )
    .option(
      "--api-key <key>",
      "key for that server (default: FLOWTURBO_API_KEY, which other users of this machine cannot read)",
    )
    .option(
      "--out-dir <folder>",
      "folder that pictures may be saved in, if a call asks for it (default: none are saved)",
    )
    .option("--format <name>", "format of pictures whose format a call leaves open: png, jpeg or webp", "png")
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo mcp
  $ flowturbo mcp --model ./stable-diffusion-3.5-medium --out-dir ./pictures --format jpeg
  $ flowturbo mcp --url http://127.0.0.1:7860`,
    )
    .action((flags: Flags) => serve(flags, signal, whenEnded));
}

/** Where pictures come from, and what is to be freed at the end. */
interface Source {
  readonly drawer: Drawer;
  readonly model: string;
  /** What the model is loaded with; null where that is not known. */
  readonly adapters: AdapterNames | null;
  dispose(): Promise<void>;
}

async function serve(flags: Flags, signal: AbortSignal, whenEnded: () => void): Promise<void> {
  // 1. What can be wrong without a client.
  const format = formats.find((name) => name === flags.format);
  if (!format)
    throw new OptionError("format", `Expected png, jpeg or webp for --format but received "${flags.format}".`);
  const ending = new AbortController();
  const source = flags.url === undefined ? await processSource(flags, ending.signal) : serverSource(flags, flags.url);
  const { StdioServerTransport } = await mcpSdk.load();
  const outputs = flags.outDir === undefined ? null : await OutputFolder.open(flags.outDir);
  const { drawer, model, adapters } = source;
  const server = await createMcpServer({ drawer, model, adapters, outputs, format, signal: ending.signal });

  // 2. Until the client leaves, or a signal comes.
  try {
    await new Promise<void>((resolve, reject) => {
      onAbort(signal, resolve);
      process.stdin.once("end", resolve).once("close", resolve);
      server.server.onclose = resolve;
      server.server.onerror = (error) => process.stderr.write(`warning: ${error.message}\n`);
      const transport = new StdioServerTransport(process.stdin, process.stdout, { maxBufferSize: longestMessage });
      server.connect(transport).catch(reject);
    });
  } finally {
    ending.abort(new Error("The server has ended."));
    await server.close();
    await source.dispose();
    // A client that is still there would keep this process.
    process.stdin.destroy();
  }
  whenEnded();
}

async function processSource(flags: Flags, signal: AbortSignal): Promise<Source> {
  if (flags.apiKey !== undefined)
    throw new OptionError("apiKey", "The flag --api-key is for a server; give --url too.");
  const options: LoadOptions = { ...readLoadFlags(flags), signal };
  checkOptions(loadSchema, options, "mcp");
  const adapters = await adapterNames(options);
  const folder = flags.model ?? embeddedModel;
  let loading: Promise<FlowTurbo> | null = null;
  const open = (waiting: AbortSignal | undefined) => {
    loading ??= FlowTurbo.load(folder, { ...options, logger: { warn } }).catch((error) => {
      // The next call tries again.
      loading = null;
      throw error;
    });
    return untilAborted(loading, waiting);
  };
  return {
    drawer: localDrawer(open),
    model: modelName(folder),
    adapters,
    async dispose() {
      const model = await loading?.catch(() => null);
      await model?.dispose();
    },
  };
}

function serverSource(flags: Flags, url: string): Source {
  if (!URL.canParse(url) || !/^https?:$/.test(new URL(url).protocol))
    throw new OptionError("url", `Expected an address such as http://127.0.0.1:7860 for --url but received "${url}".`);
  refuseLoadFlags(flags, "With --url nothing is loaded here; leave this flag out, and give it to `flowturbo serve`.");
  const apiKey = flags.apiKey ?? (process.env.FLOWTURBO_API_KEY || undefined);
  return {
    drawer: remoteDrawer({ baseURL: url, apiKey }, flags.model ?? null),
    adapters: null,
    model: flags.model ?? `of ${new URL(url).host}`,
    dispose: async () => undefined,
  };
}

/** What quotes a prompt is for the one who called, and among the warnings of the answer. */
function warn(text: string): void {
  if (!text.startsWith('The prompt "')) process.stderr.write(`warning: ${text}\n`);
}
