// A minimal service: GET /?prompt=a+large+red+square answers with a PNG, &deadline=2000 within two seconds. One model,
// loaded once, whose callers share launches; a client that closes its connection aborts its call. The table of errors has
// the HTTP status of each: 400 for a wrong option, 429 for a full queue, 503 for a deadline that cannot be met. GET /stats
// has the counters.
//
//   node examples/service.js [port] [checkpoint folder]
import { createServer } from "node:http";
import { errorTable, FlowTurbo } from "flowturbo";

const [port = "8080", folder] = process.argv.slice(2);
const model = await FlowTurbo.load(folder, { logger: console, maxQueue: 16 });

const server = createServer(async (request, response) => {
  const { pathname, searchParams: query } = new URL(request.url, "http://localhost");
  if (pathname === "/stats") return response.end(`${JSON.stringify(model.stats())}\n`);
  const gone = new AbortController();
  response.on("close", () => gone.abort());
  try {
    const { images, seeds } = await model.generate({
      prompt: query.get("prompt") ?? "a large red square",
      ...(query.has("seed") && { seed: Number(query.get("seed")) }),
      ...(query.has("steps") && { steps: Number(query.get("steps")) }),
      ...(query.has("deadline") && { deadlineMs: Number(query.get("deadline")) }),
      signal: gone.signal,
    });
    response.writeHead(200, { "content-type": "image/png", "x-seed": String(seeds[0]) });
    response.end(await images[0].toPNG());
  } catch (error) {
    if (gone.signal.aborted) return;
    const status = errorTable[error.code]?.status ?? 500;
    const headers = { "content-type": "text/plain; charset=utf-8" };
    if (error.retryAfterMs) headers["retry-after"] = Math.ceil(error.retryAfterMs / 1000);
    response.writeHead(status, headers).end(`${error.message}\n`);
  }
});
server.listen(Number(port), () => console.log(`listening on http://localhost:${server.address().port}`));

for (const signal of ["SIGINT", "SIGTERM"])
  process.once(signal, async () => {
    server.close();
    server.closeAllConnections();
    await model.dispose();
  });
