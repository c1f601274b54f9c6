// An app of one's own on Fastify, with flowturbo's server as a part of it: under a prefix, behind the app's own keys, beside
// the app's own routes, which draw with the same model.
//
//   npm install flowturbo fastify @fastify/busboy @fastify/cors prom-client
//   APP_KEYS=ann:key-of-ann,bob:key-of-bob node fastify.js [port]
//
//   GET /                                  without a key
//   GET /card.png                          a picture by the app's own route
//   POST /pictures/v1/images/generations   OpenAI's images API, as all else of the server: http://127.0.0.1:8080/pictures/v1
import fastify from "fastify";
import { errorTable, FlowTurbo, publicMessage } from "flowturbo";
import { imageServer } from "flowturbo/server";

/** Names by key. */
const users = new Map((process.env.APP_KEYS ?? "").split(",").map((user) => user.split(":").reverse()));

// Requests for a model that still loads are answered with 503, and /pictures/readyz says so.
const loading = FlowTurbo.load(undefined, { logger: console });

const app = fastify({
  logger: true,
  // Requests under way have as long as `drainMs` says when the app closes, and are answered then.
  ...{ pluginTimeout: 0, return503OnClosing: false, forceCloseConnections: true },
  // A client that sends its request slower than that is cut off.
  requestTimeout: 30_000,
});

app.get("/", async () => "An app with pictures.\n");

// Hooks of a scope are those of what is registered in it, the server among it.
app.register(async (members) => {
  members.decorateRequest("user", "");
  members.addHook("onRequest", async (request, reply) => {
    const [, key = ""] = request.headers.authorization?.match(/^Bearer (\S+)$/) ?? [];
    request.user = users.get(key) ?? "";
    if (request.user === "")
      return reply.code(401).send({ error: { message: "Expected a key.", type: "authentication_error" } });
  });

  members.get("/card.png", async (request, reply) => {
    const gone = new AbortController();
    reply.raw.once("close", () => gone.abort());
    try {
      const model = await loading;
      const { images } = await model.generate({ prompt: "a red circle", guidanceScale: 2, signal: gone.signal });
      return reply.type("image/png").send(await images[0].toPNG());
    } catch (error) {
      request.log.error(error);
      return reply.code(errorTable[error.code]?.status ?? 500).send({ error: { message: publicMessage(error) } });
    }
  });

  members.register(imageServer, {
    prefix: "/pictures",
    models: { shapes: loading },
    // A browser that opens an address sends no key.
    page: false,
    maxSteps: 30,
    drainMs: 20_000,
  });
});

// The app takes no more requests and waits for those under way; then nothing uses the model.
for (const signal of ["SIGTERM", "SIGINT"])
  process.once(signal, async () => {
    await app.close();
    await (await loading).dispose();
  });

await app.listen({ host: "127.0.0.1", port: Number(process.argv[2] ?? 8080) });
