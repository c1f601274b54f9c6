/**
 * Probes and metrics of models, without anything that draws: for a process whose work comes from elsewhere. Orchestrators and Prometheus ask for the
 * same addresses as of the server.
 */

import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import type { ImageModel } from "../model.js";
import { ModelMetrics } from "./metrics.js";

/** What is answered to a probe. */
export interface Probe {
  readonly status: 200 | 503;
  readonly text: string;
}

/** @param obstacles why not, in sentences; empty for a process that can */
export function probeOf(obstacles: readonly string[]): Probe {
  return obstacles.length === 0 ? { status: 200, text: "ok\n" } : { status: 503, text: `${obstacles.join("\n")}\n` };
}

/** Whether no other process is needed. */
export function livenessOf(models: ReadonlyMap<string, ImageModel>): Probe {
  const isLive = [...models.values()].every((model) => model.health().live);
  return probeOf(isLive ? [] : ["A model has lost its GPU; the process has to be restarted."]);
}

export interface ProbeServerOptions {
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  /** Those that are loaded, by id, when it is called. */
  readonly models: () => ReadonlyMap<string, ImageModel>;
  /** What keeps the process from being ready. */
  readonly obstacles: () => readonly string[];
}

export interface ProbeServer {
  /** `http://127.0.0.1:9100` */
  readonly address: string;
  close(): Promise<void>;
}

/** @throws InstallationError without prom-client; what `listen` says of the port */
export async function startProbes({ host, port, models, obstacles }: ProbeServerOptions): Promise<ProbeServer> {
  const metrics = await ModelMetrics.create(models);
  const answers: Record<string, () => Probe | Promise<string>> = {
    "/livez": () => livenessOf(models()),
    "/readyz": () => probeOf(obstacles()),
    "/metrics": () => metrics.text(),
  };
  const server = createServer(async ({ method, url = "" }, response) => {
    const answer = answers[url.split("?")[0]!];
    const isRead = method === "GET" || method === "HEAD";
    response.setHeader("cache-control", "no-store");
    if (!answer || !isRead) {
      response.writeHead(answer ? 405 : 404, answer && { allow: "GET, HEAD" }).end();
      return;
    }
    try {
      const found = await answer();
      const [status, type, text] =
        typeof found === "string"
          ? [200, metrics.contentType, found]
          : [found.status, "text/plain; charset=utf-8", found.text];
      response.writeHead(status, { "content-type": type }).end(text);
    } catch {
      response.writeHead(500).end();
    }
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject).listen(port, host, () => resolve());
  });
  const { address, port: taken } = server.address() as AddressInfo;
  return {
    address: `http://${address.includes(":") ? `[${address}]` : address}:${taken}`,
    async close() {
      server.closeAllConnections();
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
}
