// A service in one file, to be copied: one model, loaded once, whose callers share launches.
//
//   node examples/service.js [--host 127.0.0.1] [--port 8080] [--model <checkpoint folder>] [--drain <seconds>]
//
//   GET /generate?prompt=a+large+red+square&steps=4   a PNG; the parameters are those of `clientOptions` below
//   POST /generate                                    the same from a JSON body, as requestFromJson() takes it (see
//                                                     flowturbo/schema): pictures to edit are bytes in base64
//   GET /health                                       200 while it takes requests, 503 once it ends or cannot draw
//   GET /live                                         503 once it has to be restarted: it has lost its GPU
//   GET /stats                                        counters and histograms
//
// Errors are JSON, { code, message }, with the status of the table of errors: 400 for a wrong option, 429 for a full
// queue and for a time limit that cannot be met now; Retry-After where waiting helps. Messages hold nothing of the
// server. A client that closes its connection aborts its call. SIGTERM and SIGINT end the service: it accepts nothing
// more, and what is in flight has --drain seconds to finish. A second signal ends it at once.
import { once } from "node:events";
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { errorTable, FlowTurbo, publicMessage, requestFromJson } from "flowturbo";

/** Ends with one sentence. */
function fail(message, code) {
  console.error(message);
  process.exit(code);
}

function flagsOf() {
  const options = {
    // Other interfaces only on purpose: there is no authentication here.
    host: { type: "string", default: "127.0.0.1" },
    port: { type: "string", default: "8080" },
    model: { type: "string" },
    drain: { type: "string", default: "30" },
  };
  try {
    const { host, port, model, drain } = parseArgs({ options }).values;
    if (!/^\d+$/.test(port) || Number(port) > 65535)
      throw new Error(`Expected a whole number from 0 to 65535 for --port but received "${port}".`);
    if (!/^\d+(\.\d+)?$/.test(drain) || Number(drain) > 1e6)
      throw new Error(`Expected a number of seconds from 0 to 1000000 for --drain but received "${drain}".`);
    return { host, port: Number(port), model, drainMs: 1000 * Number(drain) };
  } catch (error) {
    return fail(error.message, 2);
  }
}

const flags = flagsOf();

/** What clients may choose. Not how many pictures, nor their priority: one picture a request, the first come first. */
const clientOptions = {
  numbers: ["seed", "steps", "width", "height", "guidanceScale", "deadlineMs", "strength"],
  texts: ["prompt", "negativePrompt", "sampler", "blocks"],
  pictures: ["image", "mask"],
};
/** Bytes of a body: two pictures in base64. */
const maxBody = 32e6;

/** An answer that is no picture, for the client's eyes. */
class Refusal extends Error {
  constructor(status, message, headers = {}) {
    super(message);
    this.status = status;
    this.headers = headers;
  }
}

const ending = new AbortController();
for (const [signal, code] of [
  ["SIGTERM", 143],
  ["SIGINT", 130],
])
  process.on(signal, () => (ending.signal.aborted ? process.exit(code) : ending.abort()));

// Requests are served from the first one on as fast as later ones: one picture is drawn before the service listens.
const model = await FlowTurbo.load(flags.model, {
  logger: console,
  maxQueue: 16,
  // No string that a client sends is taken for a file of this machine.
  allowPaths: false,
  signal: ending.signal,
}).catch((error) => {
  if (ending.signal.aborted) process.exit(0);
  throw error;
});
await model.generate({ prompt: "", steps: 1 });

const routes = new Map([
  ["/generate", { GET: draw, POST: draw }],
  ["/health", { GET: health, HEAD: health }],
  ["/live", { GET: live, HEAD: live }],
  ["/stats", { GET: () => json(200, model.stats()) }],
]);

/** Requests that are not answered yet. */
const open = new Set();

// A client that sends its request slower than that is cut off. Both limits are given: Node takes the greater one for the
// whole request, and its own for the head is a minute.
const limits = { requestTimeout: 30_000, headersTimeout: 10_000, connectionsCheckingInterval: 5_000 };
const server = createServer(limits, async (request, response) => {
  const { socket } = request;
  const call = new AbortController();
  const entry = { call, socket };
  entry.closed = new Promise((resolve) => {
    entry.close = resolve;
  });
  open.add(entry);
  response.once("close", entry.close);
  if (socket.destroyed) entry.close();
  void entry.closed.then(() => {
    open.delete(entry);
    call.abort();
  });
  const answer = await answerTo(request, call.signal).catch(toAnswer);
  if (response.destroyed || socket.destroyed) return;
  const { status, headers, body } = answer;
  response.writeHead(status, {
    ...headers,
    "content-length": Buffer.byteLength(body),
    "cache-control": "no-store",
    // A connection that is kept would outlive the service.
    ...(ending.signal.aborted && { connection: "close" }),
  });
  if (!request.complete) {
    // What is left of a body is no request. It is thrown away for a moment, since a connection that is closed while data
    // comes in is reset, and the client may lose the answer.
    request.resume();
    response.once("finish", () => setTimeout(() => socket.destroy(), 500).unref());
  }
  response.end(body);
});
// Nobody wants the pictures of a client that has closed its connection. The response alone does not tell: where requests are
// sent without waiting for answers, only the first one's has the connection.
server.on("connection", (socket) => {
  socket.once("close", () => {
    for (const entry of open) if (entry.socket === socket) entry.close();
  });
});

async function answerTo(request, signal) {
  const url = URL.canParse(request.url, "http://localhost") ? new URL(request.url, "http://localhost") : null;
  if (!url) throw new Refusal(400, "The address is malformed.");
  const methods = routes.get(url.pathname);
  if (!methods) throw new Refusal(404, "There is nothing at this address.");
  if (!Object.hasOwn(methods, request.method)) {
    const allow = Object.keys(methods).join(", ");
    throw new Refusal(405, `This address takes ${allow} only.`, { allow });
  }
  return methods[request.method](request, url, signal);
}

async function draw(request, url, signal) {
  if (ending.signal.aborted) throw new Refusal(503, "The service is ending.");
  const options = request.method === "POST" ? await bodyOptions(request) : queryOptions(url.searchParams);
  const { images, seeds, blocks } = await model.generate({ ...options, metadata: "parameters", signal });
  const headers = { "content-type": "image/png", "x-seed": String(seeds[0]), "x-blocks": blocks };
  return { status: 200, headers, body: await images[0].toPNG() };
}

function queryOptions(query) {
  const { numbers, texts } = clientOptions;
  const options = {};
  for (const name of new Set(query.keys())) {
    const [value, ...others] = query.getAll(name);
    if (others.length > 0) throw new Refusal(400, `The parameter ${name} is given more than once.`);
    if (!numbers.includes(name) && !texts.includes(name))
      throw new Refusal(400, `There is no parameter "${name}"; there are ${[...texts, ...numbers].join(", ")}.`);
    // What is no number stays a text, which generate() refuses by name.
    const isNumber = numbers.includes(name) && /^-?\d+(\.\d+)?$/.test(value);
    options[name] = isNumber ? Number(value) : value;
  }
  return options;
}

async function bodyOptions(request) {
  if (!/^application\/json\b/i.test(request.headers["content-type"] ?? ""))
    throw new Refusal(415, "Expected a body of type application/json.");
  const body = await bodyOf(request);
  if (typeof body !== "object" || body === null || Array.isArray(body))
    throw new Refusal(400, "Expected an object of options.");
  // Before anything reads the values: what clients may not choose costs nothing.
  const { numbers, texts, pictures } = clientOptions;
  const allowed = [...texts, ...numbers, ...pictures];
  for (const name of Object.keys(body))
    if (!allowed.includes(name))
      throw new Refusal(400, `Expected only ${allowed.join(", ")} but received ${name.slice(0, 40)}.`);
  for (const name of texts)
    if (body[name] !== undefined && typeof body[name] !== "string")
      throw new Refusal(400, `Expected a string for ${name}.`);
  return requestFromJson(body);
}

async function bodyOf(request) {
  const tooLarge = new Refusal(413, `Expected a body of at most ${maxBody} bytes.`);
  if (Number(request.headers["content-length"]) > maxBody) throw tooLarge;
  const chunks = [];
  let bytes = 0;
  try {
    // The stream must outlive this loop, since the answer goes over the same connection.
    for await (const chunk of request.iterator({ destroyOnReturn: false })) {
      bytes += chunk.length;
      if (bytes > maxBody) throw tooLarge;
      chunks.push(chunk);
    }
  } catch (error) {
    // A client that hangs up is no fault of the service.
    throw error === tooLarge ? error : new Refusal(400, "The body broke off.");
  }
  try {
    return JSON.parse(Buffer.concat(chunks).toString("utf8"));
  } catch {
    throw new Refusal(400, "The body is not JSON.");
  }
}

function health() {
  const { ready, degraded, restarts } = model.health();
  const status = ending.signal.aborted ? "ending" : !ready ? "unavailable" : degraded ? "degraded" : "ready";
  return json(ready && !ending.signal.aborted ? 200 : 503, { status, model: model.name, restarts });
}

function live() {
  const isLive = model.health().live;
  return json(isLive ? 200 : 503, { live: isLive });
}

function json(status, value, headers = {}) {
  const body = `${JSON.stringify(value)}\n`;
  return { status, headers: { "content-type": "application/json; charset=utf-8", ...headers }, body };
}

/** What a client is told of an error: never more than its public message. */
function toAnswer(error) {
  if (error instanceof Refusal) return json(error.status, { code: null, message: error.message }, error.headers);
  // Only the end of the service aborts a call whose client is still there.
  if (error?.name === "AbortError") return json(503, { code: null, message: "The service is ending." });
  const status = errorTable[error?.code]?.status ?? 500;
  const message = publicMessage(error);
  // What the client is not told is for the log.
  if (status >= 500 && message !== error?.message) console.error(error);
  const wait = error?.retryAfterMs;
  const headers = wait ? { "retry-after": String(Math.ceil(wait / 1000)) } : {};
  return json(status, { code: errorTable[error?.code] ? error.code : null, message }, headers);
}

/** Ends the service: no new connections, some time for what is in flight, then an abort. */
async function drain() {
  // Also closes the connections that wait for a next request.
  server.close();
  const answered = () => Promise.all([...open].map(({ closed }) => closed));
  const within = (ms) => Promise.race([answered(), sleep(ms, undefined, { ref: false })]);
  await within(flags.drainMs);
  for (const { call } of open) call.abort();
  // Aborted calls are answered, too.
  await within(1000);
  server.closeAllConnections();
  await model.dispose();
}

if (ending.signal.aborted) await model.dispose();
else {
  ending.signal.addEventListener("abort", drain);
  server.listen(flags.port, flags.host);
  await once(server, "listening").catch(({ code, message }) => {
    const reason = code === "EADDRINUSE" ? "another program listens there; choose another --port" : message;
    fail(`Cannot listen on ${flags.host}:${flags.port}: ${reason}.`, 1);
  });
  const { address, family, port } = server.address();
  console.log(`listening on http://${family === "IPv6" ? `[${address}]` : address}:${port}`);
}
