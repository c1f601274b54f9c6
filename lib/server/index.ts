/** `flowturbo/server`: a server for models, as a Fastify plugin for an app of yours, or as an app of its own. */

import { randomUUID } from "node:crypto";
import { type IncomingMessage, STATUS_CODES } from "node:http";
import type { Socket } from "node:net";
import type { FastifyInstance, FastifyReply, FastifyRequest, FastifyServerOptions } from "fastify";
import { Failure, failureOf } from "./failure.js";
import type { ImageServerOptions } from "./options.js";
import { fastify } from "./packages.js";
import { imageServer, lingerAtEnd } from "./plugin.js";

export type { Answer, Usage } from "./answer.js";
export type { DirectoryMetric, ModelDirectory, NamedModel } from "./directory.js";
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
    // What reaches no route has the same form of answer.
    frameworkErrors: (error, request, reply) =>
      refuse(error.code === "FST_ERR_MAX_PARAM_LENGTH" ? notFound() : failureOf(error), request, reply),
    clientErrorHandler: refuseConnection,
  });
  app.setNotFoundHandler((request, reply) => refuse(notFound(), request, reply));
  // Bodies to addresses that there are not.
  app.setErrorHandler((error, request, reply) => refuse(failureOf(error), request, reply));
  await app.register(imageServer, options);
  return app;
}

const notFound = () => new Failure(404, "There is nothing at this address.", { code: "not_found" });

function refuse(failure: Failure, request: FastifyRequest, reply: FastifyReply): void {
  if (!request.raw.complete) lingerAtEnd(request, reply);
  void reply
    .code(failure.status)
    .headers({ ...failure.allHeaders, "x-request-id": request.id })
    .send(failure.envelope);
}

/** Answers bytes that are no request, in whole or in time, and closes the connection. */
function refuseConnection(this: FastifyInstance, error: NodeJS.ErrnoException, socket: Socket): void {
  this.log.debug({ code: error.code }, "no request");
  // In the middle of an answer another one would be a part of it.
  const { _httpMessage: answer } = socket as { _httpMessage?: { _headerSent: boolean } };
  if (socket.writable && !answer?._headerSent && error.code !== "ECONNRESET") {
    const failure = brokenRequests[error.code ?? ""] ?? brokenRequest;
    const body = JSON.stringify(failure.envelope);
    const headers = {
      "content-type": "application/json; charset=utf-8",
      "content-length": Buffer.byteLength(body),
      connection: "close",
      "x-request-id": randomUUID(),
      ...failure.allHeaders,
    };
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
    socket.write(`HTTP/1.1 ${failure.status} ${STATUS_CODES[failure.status]}\r\n${lines.join("")}\r\n${body}`);
  }
  socket.destroySoon();
}

const brokenRequest = new Failure(400, "What came is not a request of HTTP/1.1.", { code: "invalid_request" });
/** By the codes of Node's errors. */
const brokenRequests: Record<string, Failure> = {
  ERR_HTTP_REQUEST_TIMEOUT: new Failure(408, "The request did not come in time.", {
    ...{ code: "request_timeout", retryable: true },
  }),
  HPE_HEADER_OVERFLOW: new Failure(431, "The headers are too large.", { code: "headers_too_large" }),
  HPE_CHUNK_EXTENSIONS_OVERFLOW: new Failure(413, "The body is too large.", { code: "invalid_request" }),
};

/** The id that a proxy or client gave, if it is one, so that its log and this one's can be compared. */
function requestId({ headers }: IncomingMessage): string {
  const given = headers["x-request-id"];
  return typeof given === "string" && /^[\w.:-]{1,64}$/.test(given) ? given : randomUUID();
}
