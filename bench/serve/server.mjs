// The server that bench/serve.ts measures: `createServer` with the embedded model. Its log is written to stdout, as by default.
//
//   node --expose-gc bench/serve/server.mjs '{"load": {}, "server": {}}'   (with a channel to whoever started it)
import { FlowTurbo } from "flowturbo";
import { createServer } from "flowturbo/server";
import { answerCalls } from "./calls.mjs";

const options = JSON.parse(process.argv[2]);
const model = await FlowTurbo.load(undefined, options.load);
const app = await new Promise((resolve, reject) => {
  const creating = createServer({
    models: { shapes: model },
    ...options.server,
    onReady: (error) => (error ? reject(error) : resolve(creating)),
  });
});
await app.listen({ host: "127.0.0.1", port: 0 });

answerCalls({
  port: () => app.server.address().port,
  profile: (options) => model.profile(options).then(() => null),
  stats: () => model.stats(),
  collect() {
    // What the first one finalizes, the second one frees.
    globalThis.gc();
    globalThis.gc();
  },
  async close() {
    await app.close();
    await model.dispose();
    setImmediate(() => process.disconnect());
  },
});
