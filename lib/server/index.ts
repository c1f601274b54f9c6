/** `flowturbo/server`: a server for models, as a Fastify plugin for an app of yours, or as an app of its own. */

import { randomUUID } from "node:crypto";
import type { IncomingMessage } from "node:http";
import type { FastifyInstance, FastifyServerOptions } from "fastify";
import { Failure } from "./failure.js";
import type { ImageServerOptions } from "./options.js";
import { fastify } from "./packages.js";
import { imageServer } from "./plugin.js";

export type { Answer, Usage } from "./answer.js";
export type { ErrorEnvelope } from "./failure.js";
export type { JobView } from "./jobs.js";
export type { ImageServerOptions } from "./options.js";
export { imageServer };

/** Options of `createServer`. */
export interface CreateServerOptions extends ImageServerOptions {
  /** Fastify's option: pino's options, or false. Default: a line of JSON for each answer on stdout. */
  logger?: FastifyServerOptions["logger"];
  /** Fastify's option: whose `X-Forwarded-…` headers are believed. Default: nobody's. */
  trustProxy?: FastifyServerOptions["trustProxy"];
}

/**
 * An app with the server in it, and with limits for clients that send slowly. It still has to `listen`; `close` ends it: what is under way
 * has `drainMs`.
 * @throws OptionError for a wrong option, InstallationError if a package that it needs is missing
 */
export async function createServer({
  logger = true,
  trustProxy = false,
  ...options
}: CreateServerOptions): Promise<FastifyInstance> {
  const { default: create, LogController } = await fastify.load();
  // The plugin writes the lines. Fastify before 5.9 has no LogController, and later ones warn of the option.
  const disableRequestLogging = true;
  const silent: FastifyServerOptions = LogController
    ? { logController: new LogController({ disableRequestLogging }) }
    : { disableRequestLogging };
  const app = create({
    ...{ ...silent, logger, trustProxy },
    // While it ends, the plugin answers: probes, jobs, and what was accepted.
    return503OnClosing: false,
    forceCloseConnections: true,
    // Fastify's limit is also one for ending, and requests under way may have longer than its ten seconds: `drainMs` says it.
    pluginTimeout: 0,
    genReqId: requestId,
    // A client that sends its request slower than that is cut off.
    requestTimeout: 30_000,
    http: { headersTimeout: 10_000, connectionsCheckingInterval: 2_000, maxHeaderSize: 16_384 },
    routerOptions: { maxParamLength: 256 },
    keepAliveTimeout: 10_000,
  });
  app.setNotFoundHandler((request, reply) => {
    const failure = new Failure(404, "There is nothing at this address.", { code: "not_found" });
    return reply
      .code(404)
      .headers({ ...failure.allHeaders, "x-request-id": request.id })
      .send(failure.envelope);
  });
  await app.register(imageServer, options);
  return app;
}

/** The id that a proxy or client gave, if it is one, so that its log and this one's can be compared. */
function requestId({ headers }: IncomingMessage): string {
  const given = headers["x-request-id"];
  return typeof given === "string" && /^[\w.:-]{1,64}$/.test(given) ? given : randomUUID();
}
