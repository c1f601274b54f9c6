// The service that bench/operation.ts tries: one model behind HTTP on loopback. POST /generate takes the options of
// generate() as JSON and answers with a PNG, POST /profile measures costs, GET /state has statistics, health and drift, POST
// /collect collects garbage. A client that hangs up aborts its call. It prints its port when it listens.
//
//   node --expose-gc bench/operation/server.mjs '{"maxQueue": 16}'
import { createServer } from "node:http";
import { monitorEventLoopDelay } from "node:perf_hooks";
import { errorTable, FlowTurbo, publicMessage } from "flowturbo";

const model = await FlowTurbo.load(undefined, JSON.parse(process.argv[2] ?? "{}"));
const delay = monitorEventLoopDelay({ resolution: 5 });
delay.enable();

async function body(request) {
  const parts = [];
  for await (const part of request) parts.push(part);
  return JSON.parse(Buffer.concat(parts).toString() || "{}");
}

const routes = {
  async "/generate"(request, response, signal) {
    const { images, blocks, deadline, timings } = await model.generate({ ...(await body(request)), signal });
    const about = { blocks, total: timings.total, predictedMs: deadline?.predictedMs ?? null };
    response.writeHead(200, { "content-type": "image/png", "x-about": JSON.stringify(about) });
    response.end(await images[0].toPNG());
  },
  async "/profile"(request, response) {
    const { entries } = await model.profile(await body(request));
    response.end(JSON.stringify({ entries: entries.length }));
  },
  async "/collect"(_request, response) {
    globalThis.gc();
    response.end("{}");
  },
  async "/state"(_request, response) {
    const state = { stats: model.stats(), health: model.health(), drift: model.costs.drift };
    response.end(JSON.stringify({ ...state, rss: process.memoryUsage().rss, loopP99: delay.percentile(99) / 1e6 }));
    delay.reset();
  },
};

const server = createServer(async (request, response) => {
  const gone = new AbortController();
  response.on("close", () => gone.abort());
  try {
    await routes[request.url](request, response, gone.signal);
  } catch (error) {
    if (gone.signal.aborted) return;
    const { code = null, retryAfterMs = null, bestMs = null } = error;
    response.writeHead(errorTable[code]?.status ?? 500, { "content-type": "application/json" });
    response.end(JSON.stringify({ code, message: publicMessage(error), retryAfterMs, bestMs }));
  }
});
server.keepAliveTimeout = 60_000;
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.once("SIGTERM", async () => {
  server.close();
  server.closeAllConnections();
  await model.dispose();
});
