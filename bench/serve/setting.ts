/** What the parts of bench/serve.ts share: the request that they draw, the processes, and how they report. */

import { Process } from "./process.js";

/** The picture of every request, as the server and as the library take it. */
export const steps = 6;
export const body = { num_inference_steps: steps, guidance_scale: 2 };
export const libraryOptions = { steps, guidanceScale: 2, width: 64, height: 64, allowPaths: false };

export interface Setting {
  /** Folder of costs, which all processes share. */
  readonly cache: string;
  /** Turns of whatever is compared. */
  readonly rounds: number;
  /** Folder of processor profiles of the server and of the library; null for none. */
  readonly profiles: string | null;
}

export interface Answered {
  readonly milliseconds: number;
  /** As the server says it, from the call to the pictures. */
  readonly total: number;
}

const loadOptions = (cache: string) => ({ cache, measureCosts: false, allowPaths: false });

function profileFlags({ profiles }: Setting): string[] {
  return profiles === null ? [] : ["--cpu-prof", `--cpu-prof-dir=${profiles}`];
}

/** A library process that knows its costs and has drawn. */
export async function openLibrary(setting: Setting): Promise<Process> {
  const library = await Process.start("library.mjs", { load: loadOptions(setting.cache) }, profileFlags(setting));
  await measureCosts(library);
  await library.call("closed", { options: libraryOptions, previewCount: 2, callers: 8, requests: 16 });
  return library;
}

export interface Service {
  readonly server: Process;
  readonly client: Process;
  stop(): Promise<void>;
}

/** A server that knows its costs and has drawn, and its clients. */
export async function openService(setting: Setting, options: Record<string, unknown> = {}): Promise<Service> {
  const flags = ["--expose-gc", ...profileFlags(setting)];
  const server = await Process.start("server.mjs", { load: loadOptions(setting.cache), server: options }, flags);
  const client = await Process.start("client.mjs");
  await measureCosts(server);
  await client.call("connect", await server.call("port"));
  await client.call("closed", { body, callers: 8, requests: 16 });
  return {
    ...{ server, client },
    stop: async () => {
      await client.stop();
      await server.stop();
    },
  };
}

/** What is in the cache is not measured again. */
async function measureCosts(process: Process): Promise<void> {
  await process.call("profile", { batches: [1, 2, 4, 8], rounds: 5 });
}
