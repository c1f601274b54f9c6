// A route handler of Next.js (App Router) that draws: copy this file to app/api/image/route.js.
//
//   GET /api/image?prompt=a+large+red+square&seed=7&steps=8&width=64&height=64   a PNG
//
// flowturbo has a process of its own that runs the graphs, so it must not be bundled. In next.config.mjs:
//
//   export default { serverExternalPackages: ["flowturbo"] };
//
// With output: "standalone" that file needs some lines more: see "Next.js" in docs/guides/bundlers.md.
// FLOWTURBO_MODEL names the folder of a checkpoint; without it the small embedded model draws.
//
// A browser that goes away aborts its picture. At SIGTERM Next.js finishes the requests under way, and the process that runs the graphs
// ends with it. Nobody is asked who they are here, and everybody may draw: put your own check before `draw`.
import { errorTable, FlowTurbo, publicMessage } from "flowturbo";

// Not "edge": there are no processes. Not cached: two requests without a seed get two pictures.
export const runtime = "nodejs";
export const dynamic = "force-dynamic";

const numbers = ["seed", "steps", "width", "height", "guidanceScale"];
const texts = ["prompt", "negativePrompt", "sampler"];
const most = { steps: 50, width: 1536, height: 1536 };

/** One model for the process. In development modules are loaded again when they change; what is global stays. */
function model() {
  globalThis.flowturboModel ??= FlowTurbo.load(process.env.FLOWTURBO_MODEL || undefined, { maxQueue: 16 });
  const loading = globalThis.flowturboModel;
  // The next request tries again.
  loading.catch(() => {
    if (globalThis.flowturboModel === loading) globalThis.flowturboModel = undefined;
  });
  return loading;
}

export async function GET(request) {
  try {
    const options = optionsOf(new URL(request.url).searchParams);
    const { images, seeds, blocks } = await (await model()).generate({
      ...options,
      metadata: "parameters",
      signal: request.signal,
    });
    const headers = { "content-type": "image/png", "cache-control": "no-store" };
    return new Response(await images[0].toPNG(), { headers: { ...headers, "x-seed": seeds[0], "x-blocks": blocks } });
  } catch (error) {
    // Nobody reads this answer: 499 is for the log.
    if (request.signal.aborted) return new Response(null, { status: 499 });
    return refusal(error);
  }
}

/** What clients may choose: one picture, up to a size and a number of steps. */
function optionsOf(query) {
  const options = {};
  for (const [name, value] of query) {
    if (!numbers.includes(name) && !texts.includes(name))
      throw new RangeError(
        `There is no parameter "${name.slice(0, 40)}"; there are ${[...texts, ...numbers].join(", ")}.`,
      );
    // What is no number stays a text, which generate() refuses by name.
    options[name] = numbers.includes(name) && /^\d+(\.\d+)?$/.test(value) ? Number(value) : value;
    if (options[name] > most[name]) throw new RangeError(`Expected at most ${most[name]} for ${name}.`);
  }
  return options;
}

/** Never more than the public message, which names nothing of this machine. */
function refusal(error) {
  const isOurs = error instanceof RangeError;
  const status = isOurs ? 400 : (errorTable[error?.code]?.status ?? 500);
  if (status >= 500) console.error(error);
  const wait = error?.retryAfterMs;
  const headers = wait ? { "retry-after": String(Math.ceil(wait / 1000)) } : {};
  return Response.json({ message: isOurs ? error.message : publicMessage(error) }, { status, headers });
}
