// A minimal service: GET /?prompt=a+large+red+square answers with a PNG. One model, loaded once; a client that hangs up
// frees its turn; a wrong option is the client's mistake (400), a full queue means "later" (503).
//
//   node examples/service.js [port] [checkpoint folder]
import { createServer } from "node:http";
import { FlowTurbo, FlowTurboError } from "flowturbo";

const [port = "8080", folder] = process.argv.slice(2);
const model = await FlowTurbo.load(folder, { logger: console });
const maxWaiting = 16;
let waiting = 0;

const server = createServer(async (request, response) => {
  const query = new URL(request.url, "http://localhost").searchParams;
  if (waiting >= maxWaiting) return response.writeHead(503, { "retry-after": "5" }).end("The queue is full.\n");
  const gone = new AbortController();
  response.on("close", () => gone.abort());
  waiting++;
  try {
    const { images, seeds } = await model.generate({
      prompt: query.get("prompt") ?? "a large red square",
      ...(query.has("seed") && { seed: Number(query.get("seed")) }),
      ...(query.has("steps") && { steps: Number(query.get("steps")) }),
      signal: gone.signal,
    });
    response.writeHead(200, { "content-type": "image/png", "x-seed": String(seeds[0]) });
    response.end(await images[0].toPNG());
  } catch (error) {
    if (gone.signal.aborted) return;
    const status = error instanceof FlowTurboError && error.code === "ERR_FLOWTURBO_OPTION" ? 400 : 500;
    response.writeHead(status, { "content-type": "text/plain; charset=utf-8" }).end(`${error.message}\n`);
  } finally {
    waiting--;
  }
});
server.listen(Number(port), () => console.log(`listening on http://localhost:${server.address().port}`));

for (const signal of ["SIGINT", "SIGTERM"])
  process.once(signal, async () => {
    server.close();
    server.closeAllConnections();
    await model.dispose();
  });
