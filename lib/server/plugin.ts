/** The server as a Fastify plugin: its routes, who may use them, and how it ends. What requests mean is in the other files. */

import { createHash } from "node:crypto";
import type { IncomingMessage } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import type { FastifyInstance, FastifyPluginAsync, FastifyReply, FastifyRequest } from "fastify";
import { currentTraceparent, withTraceparent } from "../common/tracing.js";
import { checkOptions } from "../options.js";
import { type Answer, seconds } from "./answer.js";
import { type Body, isForm, readBody } from "./bodies.js";
import type { ModelDirectory, NamedModel } from "./directory.js";
import { whenOver } from "./endings.js";
import { EventStream } from "./event-stream.js";
import { Failure, failureOf, HangUp } from "./failure.js";
import { bodySchemas, type Kind } from "./fields.js";
import { IdempotencyKeys, idempotencyKeyOf } from "./idempotency.js";
import { type Job, JobStore } from "./jobs.js";
import { Keys } from "./keys.js";
import { Metrics } from "./metrics.js";
import { directoryOf } from "./models.js";
import { readForm } from "./multipart.js";
import { openApiDocument } from "./openapi.js";
import { type ImageServerOptions, limitsOf, type ServerSettings, serverSchema } from "./options.js";
import { cors } from "./packages.js";
import { addPage } from "./page.js";
import { livenessOf, type Probe, probeOf } from "./probes.js";
import { completedEvents, Run, type RunEvent, streamEvent } from "./run.js";
import { settle } from "./settle.js";
import { Webhooks } from "./webhooks.js";

declare module "fastify" {
  interface FastifyContextConfig {
    /** Whether no key is needed. */
    isOpen?: boolean;
    /** Whether it may be used while the server ends. */
    isForAll?: boolean;
  }
  interface FastifyRequest {
    /** What the log says of the request besides. */
    flowturbo: Record<string, unknown>;
  }
}

/** Milliseconds that aborted requests have to be answered. */
const lastWords = 1000;
/** Milliseconds that the rest of a refused body is read. */
const lingerMs = 500;

/**
 * OpenAI's images API, jobs, probes, metrics and a page, over models of yours. When the app that it is part of closes, it takes
 * no more requests, and those under way have `drainMs` to end. The log is the app's: a line for each answer, without keys, prompts or
 * pictures.
 * @throws OptionError for a wrong option, InstallationError if a package that it needs is missing
 */
export const imageServer: FastifyPluginAsync<ImageServerOptions> = async (app, given) => {
  const { prefix: _, ...options } = given as ImageServerOptions & { prefix?: string };
  const settings = checkOptions(serverSchema, options, "imageServer()");
  const service = new ImageService(app, { ...settings, models: given.models });
  await service.register();
};

type Resolved = ServerSettings & Pick<ImageServerOptions, "models">;

class ImageService {
  readonly #app: FastifyInstance;
  readonly #settings: Resolved;
  readonly #limits;
  readonly #schemas;
  readonly #keys: Keys;
  readonly #models: ModelDirectory;
  readonly #created = seconds();
  readonly #jobs: JobStore;
  readonly #webhooks: Webhooks;
  readonly #runs = new Set<Run>();
  readonly #runsByKey = new IdempotencyKeys<Promise<Run>>();
  readonly #jobsByKey = new IdempotencyKeys<Promise<Job>>();
  /** Answers under way. */
  readonly #open = new Set<FastifyReply>();
  readonly #ended = new AbortController();
  /** What each address takes. */
  readonly #methods: Record<string, string[]> = {};
  #metrics!: Metrics;
  #isDraining = false;

  constructor(app: FastifyInstance, settings: Resolved) {
    this.#app = app;
    this.#settings = settings;
    this.#limits = limitsOf(settings);
    this.#schemas = bodySchemas(this.#limits);
    this.#keys = new Keys(settings.apiKeys);
    this.#models = directoryOf(settings.models, settings.warm ?? null);
    this.#jobs = new JobStore({ keepMs: settings.keepJobsMs, keep: settings.keepJobs, keepBytes: 256 * 2 ** 20 });
    this.#webhooks = new Webhooks(settings.webhooks);
  }

  async register(): Promise<void> {
    const app = this.#app;
    const { maxBodyBytes, page, cors: origins, onReady } = this.#settings;
    this.#metrics = await Metrics.create(
      () => this.#models.models,
      this.#models.metrics,
      () => this.#runs.size,
    );
    app.decorateRequest("flowturbo");
    app.addHook("onRequest", async (request, reply) => this.#arrive(request, reply));
    if (origins.length > 0)
      await app.register((await cors.load()).default, {
        origin: origins.includes("*") ? "*" : [...origins],
        methods: ["GET", "HEAD", "POST", "DELETE"],
        exposedHeaders: ["location", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry"],
        maxAge: 600,
      });
    app.addHook("onRequest", async (request) => this.#admit(request));
    app.setErrorHandler((error, request, reply) => this.#fail(error, request, reply));
    // Fastify reads texts too, and the app around may read forms.
    for (const type of ["text/plain", "multipart/form-data"])
      if (app.hasContentTypeParser(type)) app.removeContentTypeParser(type);
    app.addContentTypeParser("multipart/form-data", (_request: FastifyRequest, payload: IncomingMessage) =>
      readForm(payload, payload.headers, maxBodyBytes),
    );
    app.addHook("preClose", () => this.#drain());
    if (this.#drainMs < this.#settings.drainMs)
      app.log.warn(
        `Requests under way have ${this.#drainMs} ms when the app closes, not ${this.#settings.drainMs}: Fastify's pluginTimeout is ${app.initialConfig.pluginTimeout} ms. Give fastify() a longer one, or 0.`,
      );

    app.addHook("onRoute", ({ url, method }) => {
      // Under a prefix "/" is also the prefix alone, and of the two Fastify tells one whole.
      const address = url.slice(app.prefix.length) || "/";
      this.#methods[address] = [...(this.#methods[address] ?? []), ...[method].flat()];
    });

    app.post("/v1/images/generations", { bodyLimit: maxBodyBytes }, (request, reply) =>
      this.#draw("generation", request, reply),
    );
    app.post("/v1/images/edits", { bodyLimit: maxBodyBytes }, (request, reply) => this.#draw("edit", request, reply));
    app.get("/v1/models", async () => ({ object: "list", data: this.#models.ids.map((id) => this.#modelView(id)) }));
    app.get<{ Params: { "*": string } }>("/v1/models/*", async ({ params }) => this.#modelView(params["*"]));
    app.post("/v1/jobs", { bodyLimit: maxBodyBytes }, (request, reply) => this.#createJob(request, reply));
    app.get<{ Params: { id: string } }>(
      "/v1/jobs/:id",
      { config: { isForAll: true } },
      async (request) => this.#job(request).view,
    );
    app.delete<{ Params: { id: string } }>("/v1/jobs/:id", { config: { isForAll: true } }, async (request) =>
      this.#cancel(this.#job(request)),
    );
    app.get<{ Params: { id: string } }>("/v1/jobs/:id/events", { config: { isForAll: true } }, (request, reply) =>
      this.#readJob(request, reply),
    );

    const open = { config: { isOpen: true, isForAll: true } };
    app.get("/livez", open, async (_request, reply) => answerProbe(reply, livenessOf(this.#models.models)));
    app.get("/readyz", open, async (_request, reply) =>
      answerProbe(reply, probeOf(this.#isDraining ? ["The server is ending."] : this.#models.obstacles)),
    );
    app.get("/metrics", { config: { isForAll: true } }, async (_request, reply) => {
      // What cannot be brought up to date is left out by whoever tells it; the rest is as true as before.
      await this.#models.look?.().catch(() => {});
      return reply.type(this.#metrics.contentType).send(await this.#metrics.text());
    });
    const document = JSON.stringify(openApiDocument(this.#schemas, this.#keys.areNeeded));
    app.get("/openapi.json", open, async (_request, reply) =>
      reply.type("application/json; charset=utf-8").send(document),
    );
    if (page) addPage(app);
    this.#refuseOtherMethods();
    void Promise.resolve(this.#models.ready).then(
      () => {
        app.log.info({ models: this.#models.ids }, "ready");
        onReady?.(null);
      },
      (error: Error) => {
        app.log.error({ err: error }, "a model is not ready");
        onReady?.(error);
      },
    );
  }

  /** An address that there is, with a method that it does not take. */
  #refuseOtherMethods(): void {
    const all = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] as const;
    for (const [url, taken] of Object.entries(this.#methods)) {
      const others = all.filter((method) => !taken.includes(method));
      this.#app.route({
        ...{ method: others, url, config: { isForAll: true } },
        handler: () => {
          throw new Failure(405, `This address takes ${taken.join(", ")} only.`, {
            ...{ code: "method_not_allowed", headers: { allow: taken.join(", ") } },
          });
        },
      });
    }
  }

  /** The first that happens to a request. */
  #arrive(request: FastifyRequest, reply: FastifyReply): void {
    const start = performance.now();
    // As far as it is one.
    const traceparent = traced(request, currentTraceparent);
    request.flowturbo = traceparent ? { trace_id: traceparent.split("-")[1] } : {};
    reply.header("x-request-id", request.id);
    reply.header("x-content-type-options", "nosniff");
    this.#open.add(reply);
    let isSent = false;
    // Node says so of an answer too whose connection was closed in the middle of it.
    reply.raw.once("finish", () => {
      isSent = !request.raw.socket.destroyed;
    });
    whenOver(request.raw, reply.raw, () => {
      this.#open.delete(reply);
      const status = isSent ? reply.raw.statusCode : 499;
      const milliseconds = performance.now() - start;
      const route = request.routeOptions.url ?? "none";
      this.#metrics.answered(route, request.method, status, milliseconds);
      const line = { method: request.method, route, status, ms: Math.round(milliseconds), ...request.flowturbo };
      // Probes and the page's files come often and say little.
      const isOpen = request.routeOptions.config.isOpen === true;
      request.log[isOpen ? "debug" : status >= 500 ? "error" : "info"](line, "answered");
      linger(request, reply);
    });
  }

  /** Whether the request may go on. */
  #admit(request: FastifyRequest): void {
    const { isOpen, isForAll } = request.routeOptions.config;
    if (isOpen || request.is404) return;
    const owner = this.#keys.ownerOf(request.headers.authorization);
    if (owner === null)
      throw new Failure(401, "Expected a valid key in the header Authorization: Bearer <key>.", {
        ...{ code: "invalid_api_key", headers: { "www-authenticate": "Bearer" } },
      });
    if (this.#keys.areNeeded) request.flowturbo.key = owner;
    if (this.#isDraining && !isForAll)
      throw new Failure(503, "The server is ending. Send the request to another one.", {
        ...{ code: "draining", retryable: true, retryAfterMs: 1000 },
      });
  }

  async #draw(kind: Exclude<Kind, "job">, request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    if (kind === "generation" && isForm(request.body))
      throw new Failure(415, "Expected a body of type application/json.", { code: "invalid_request" });
    const body = readBody(this.#schemas[kind], request.body);
    const key = this.#keyOf(request, kind);
    const begin = () => this.#begin(kind, body, request);
    const starting = key === null ? begin() : this.#runsByKey.valueOf(key, body, begin);
    if (key !== null) this.#keep(key, starting);
    const run = await starting;
    this.#note(request, run, body);
    return body.fields.stream ? this.#stream(run, request, reply) : this.#answer(run, request, reply);
  }

  async #answer(run: Run, request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    const leave = this.#follow(run, request, reply);
    try {
      return reply.send(await run.answer);
    } catch (error) {
      // Nobody is there to be told.
      if (reply.raw.destroyed || request.raw.socket.destroyed) return reply.hijack();
      throw error instanceof HangUp ? stopped() : error;
    } finally {
      leave();
    }
  }

  async #stream(run: Run, request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    let stream: EventStream | null = null;
    const leave = this.#follow(run, request, reply, (event) => {
      if (event.type !== "partial") return;
      const { step: _, ...partial } = event.partial;
      const type = streamEvent(run.isEdit, "partial_image");
      stream?.send({ type, data: { type, ...partial, created_at: seconds() }, isDroppable: true });
    });
    try {
      // What is refused is refused with a status.
      await run.accepted;
      if (request.raw.socket.destroyed) return reply.hijack();
      stream = new EventStream(reply, { onDrop: () => this.#metrics.droppedPartial() });
      const answer = await run.answer;
      for (const event of completedEvents(answer, run.isEdit)) stream.send({ type: event.type as string, data: event });
    } catch (error) {
      if (!stream && request.raw.socket.destroyed) return reply.hijack();
      const failure = error instanceof HangUp ? stopped() : failureOf(error);
      if (!stream) throw failure;
      this.#logFailure(failure, request);
      stream.send({ type: "error", data: { type: "error", ...failure.envelope } });
    } finally {
      stream?.end();
      leave();
    }
    return reply;
  }

  async #createJob(request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    if (isForm(request.body))
      throw new Failure(415, "Expected a body of type application/json; pictures in it are base64.", {
        code: "invalid_request",
      });
    const body = readBody(this.#schemas.job, request.body);
    const { webhook } = body.fields;
    if (webhook !== undefined) this.#webhooks.check(webhook);
    const owner = this.#ownerOf(request);
    const key = this.#keyOf(request, "job");
    const begin = async () => {
      const run = await this.#begin("job", body, request);
      const job = this.#jobs.add(run, owner, (ended) => {
        if (key !== null) this.#jobsByKey.weigh(key, starting, ended.bytes);
        this.#jobEnded(ended, webhook);
      });
      await run.accepted.catch((error) => {
        // What is refused was never a job.
        this.#jobs.remove(job);
        throw error;
      });
      return job;
    };
    const starting = key === null ? begin() : this.#jobsByKey.valueOf(key, body, begin);
    if (key !== null) starting.catch(() => this.#jobsByKey.forget(key, starting));
    const job = await starting;
    this.#note(request, job.run, body);
    return reply.code(202).header("location", `${this.#app.prefix}/v1/jobs/${job.id}`).send(job.view);
  }

  #jobEnded(job: Job, webhook: string | undefined): void {
    if (!job.wasAccepted) return;
    this.#metrics.jobEnded(job.status);
    if (webhook === undefined) return;
    const { result: _, ...data } = job.view;
    void this.#webhooks.send(webhook, `job.${job.status}`, data, this.#ended.signal).then((wasTaken) => {
      if (!wasTaken) this.#app.log.warn({ job: job.id }, "the webhook of a job was not taken");
    });
  }

  #job(request: FastifyRequest<{ Params: { id: string } }>): Job {
    return this.#jobs.get(request.params.id, this.#ownerOf(request));
  }

  #cancel(job: Job) {
    job.cancel();
    return job.view;
  }

  async #readJob(request: FastifyRequest<{ Params: { id: string } }>, reply: FastifyReply): Promise<unknown> {
    const job = this.#job(request);
    const header = request.headers["last-event-id"];
    const after =
      header === undefined ? 0 : typeof header === "string" && /^\d{1,15}$/.test(header) ? Number(header) : null;
    if (after === null)
      throw new Failure(400, "Expected the id of an event for the header Last-Event-ID.", { code: "invalid_value" });
    const stream = new EventStream(reply, { onDrop: () => this.#metrics.droppedPartial() });
    await new Promise<void>((resolve) => {
      const stop = job.read(after, ({ id, type, data }) => {
        stream.send({ id, type, data, isDroppable: type === "job.partial_image" });
        // The job's own status is the last event's name.
        if (["job.completed", "job.failed", "job.cancelled"].includes(type)) resolve();
      });
      // A client that has all of it gets the end at once.
      if (job.isOver) resolve();
      whenOver(request.raw, reply.raw, () => {
        stop();
        resolve();
      });
    });
    stream.end();
    return reply;
  }

  async #begin(kind: Kind, body: Body, request: FastifyRequest): Promise<Run> {
    const { id, model } = await this.#find(body.fields.model);
    const settled = await settle(body, model, this.#limits, kind);
    // Who is refused and asks again for the same has the room that it was told of.
    const ticket = ticketOf(body, this.#keyOf(request, kind) ?? String(this.#ownerOf(request)));
    // Tracers learn which trace the call belongs to.
    const create = () =>
      new Run({
        id: `${kind === "job" ? "job" : "img"}_${crypto.randomUUID()}`,
        ...{ model, modelId: id, fullSize: kind !== "job" },
        settled: { ...settled, options: { ...settled.options, ticket } },
      });
    const run = traced(request, create);
    this.#runs.add(run);
    void run.answer
      .then(
        (answer) => this.#metrics.drawn(answer),
        (error) => {
          if (error instanceof Failure && kind === "job") this.#logFailure(error, request);
        },
      )
      .then(() => this.#runs.delete(run));
    return run;
  }

  /** A run that has an Idempotency-Key is kept with its answer, or forgotten if trying again is of use. */
  #keep(key: string, starting: Promise<Run>): void {
    const forget = () => this.#runsByKey.forget(key, starting);
    void starting
      .then((run) => run.answer)
      .then(
        ({ data }: Answer) =>
          this.#runsByKey.weigh(
            key,
            starting,
            data.reduce((sum, { b64_json }) => sum + b64_json.length, 0),
          ),
        (error) => {
          if (!(error instanceof Failure) || error.retryable || error.status >= 500) forget();
        },
      );
  }

  /** Keeps a run going while the client is there. @returns what says that it need not be kept going any more */
  #follow(run: Run, request: FastifyRequest, reply: FastifyReply, listener?: (event: RunEvent) => void): () => void {
    const unfollow = run.follow(listener);
    const forget = whenOver(request.raw, reply.raw, unfollow);
    return () => {
      forget();
      unfollow();
    };
  }

  #fail(error: unknown, request: FastifyRequest, reply: FastifyReply): FastifyReply {
    const failure = failureOf(error);
    this.#logFailure(failure, request);
    if (!request.raw.complete) lingerAtEnd(request, reply);
    return reply.code(failure.status).headers(failure.allHeaders).send(failure.envelope);
  }

  /** What the client is not told is for the log. */
  #logFailure(failure: Failure, request: FastifyRequest): void {
    // A hook of the app around may have thrown before anything here was asked.
    request.flowturbo ??= {};
    request.flowturbo.code = failure.code;
    if (failure.status < 500) return;
    const { cause } = failure;
    request.log.error({ err: cause ?? failure, code: failure.code }, "failed");
  }

  #note(request: FastifyRequest, run: Run, { fields }: Body): void {
    Object.assign(request.flowturbo, {
      ...{ run: run.id, model: run.modelId, pictures: fields.n ?? 1 },
      ...(fields.user !== undefined && { user: fields.user }),
    });
  }

  #ownerOf(request: FastifyRequest): number {
    return this.#keys.ownerOf(request.headers.authorization) ?? 0;
  }

  #keyOf(request: FastifyRequest, kind: Kind): string | null {
    const key = idempotencyKeyOf(request.headers["idempotency-key"]);
    return key === null ? null : `${this.#ownerOf(request)} ${kind} ${key}`;
  }

  /** @throws Failure with 404 for a model that there is not, or what keeps it from being had */
  async #find(id: string | undefined): Promise<NamedModel> {
    const found = await this.#models.find(id);
    if (!found) throw this.#noModel(id);
    return found;
  }

  #noModel(id = ""): Failure {
    const { ids } = this.#models;
    const others = ids.length > 0 ? `; there is ${ids.join(", ")}` : " now";
    return new Failure(404, `There is no model ${JSON.stringify(id.slice(0, 64))} here${others}.`, {
      ...{ param: "model", code: "model_not_found" },
    });
  }

  #modelView(id: string) {
    if (!this.#models.ids.includes(id)) throw this.#noModel(id);
    const model = this.#models.models.get(id);
    const { maxImages, maxPixels, maxSteps, maxControls } = this.#limits;
    const { loras = [], controlNets = [] } = model?.adapters ?? {};
    return {
      ...{ id, object: "model", created: this.#created, owned_by: "flowturbo" },
      native_size: model ? `${model.nativeSize.width}x${model.nativeSize.height}` : null,
      has_refiner: model ? model.hasRefiner : null,
      loras: model ? [...loras] : null,
      control_nets: model ? [...controlNets] : null,
      limits: { max_images: maxImages, max_pixels: maxPixels, max_steps: maxSteps, max_controls: maxControls },
    };
  }

  /** Fastify stops waiting for the hooks of an app that ends after its `pluginTimeout`: by then all is said. */
  get #drainMs(): number {
    const { drainMs } = this.#settings;
    const { pluginTimeout = 0 } = this.#app.initialConfig;
    return pluginTimeout > 0 ? Math.min(drainMs, Math.max(0, pluginTimeout - 3 * lastWords)) : drainMs;
  }

  /** Takes no more requests; what is under way has some time, and is then aborted. */
  async #drain(): Promise<void> {
    this.#isDraining = true;
    const isOver = () => this.#runs.size === 0 && this.#open.size === 0;
    const waitFor = async (milliseconds: number) => {
      const end = performance.now() + milliseconds;
      while (!isOver() && performance.now() < end) await sleep(Math.min(20, Math.max(1, end - performance.now())));
    };
    const sent = this.#webhooks.idle();
    await waitFor(this.#drainMs);
    for (const run of this.#runs)
      run.stop(
        new Failure(503, "The server ended before the pictures were done.", {
          code: "draining",
          retryable: true,
          retryAfterMs: 1000,
        }),
      );
    await waitFor(lastWords);
    await Promise.race([sent, sleep(lastWords, undefined, { ref: false })]);
    this.#ended.abort();
  }
}

function traced<T>({ headers: { traceparent } }: FastifyRequest, fn: () => T): T {
  return withTraceparent(typeof traceparent === "string" ? traceparent : null, fn);
}

/** The same for a client that asks again for the same; of pictures their sizes say enough. */
function ticketOf({ fields, files }: Body, client: string): string {
  const short = (_name: string, value: unknown) =>
    typeof value === "string" && value.length > 1e5 ? `${value.slice(0, 1000)}${value.length}` : value;
  const sizes = Object.values(files).map(({ length }) => length);
  return createHash("sha256")
    .update(JSON.stringify([client, fields, sizes], short))
    .digest("base64");
}

function answerProbe(reply: FastifyReply, { status, text }: Probe): FastifyReply {
  return reply.code(status).type("text/plain; charset=utf-8").header("cache-control", "no-store").send(text);
}

/** Of a run that others stopped. */
function stopped(): Failure {
  return new Failure(503, "The request was stopped. Try again.", { code: "stopped", retryable: true });
}

/**
 * Ends a connection on which a body still comes in: the answer goes out with the end of what the server sends, and the rest of the body is
 * thrown away for a moment. A connection that is closed while data comes in is reset, and the client may lose the answer.
 */
export function lingerAtEnd({ raw }: FastifyRequest, reply: FastifyReply): void {
  const { socket } = raw;
  reply.header("connection", "close");
  // Node's HTTP server calls it after the last answer.
  socket.destroySoon = () => {
    raw.resume();
    socket.end();
    setTimeout(() => socket.destroy(), lingerMs).unref();
  };
}

/** The same for connections that are kept: what is left of a body is no request. */
function linger({ raw }: FastifyRequest, reply: FastifyReply): void {
  if (raw.complete || raw.destroyed || reply.raw.destroyed === false) return;
  raw.resume();
  setTimeout(() => raw.destroy(), lingerMs).unref();
}
