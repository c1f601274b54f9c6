/** A process of a fleet under test: a worker with a model that waits, a gateway, or such a model without a fleet. See protocol.ts. */

import type { AddressInfo } from "node:net";
import { connectFleet, startWorker } from "../../../lib/fleet/index.js";
import { requestFromJson } from "../../../lib/json.js";
import type { EncodeOptions, GenerateOptions, ImageModel } from "../../../lib/model.js";
import { createServer } from "../../../lib/server/index.js";
import { loadWaiting } from "../waiting.js";
import {
  type AskedFor,
  digestOf,
  digestOfEmbeds,
  type Ended,
  type FromProcess,
  keyOf,
  modelId,
  type Settings,
  type ToProcess,
} from "./protocol.js";

const settings = JSON.parse(process.argv[2]!) as Settings;
const tell = (message: FromProcess) => void (process.connected && process.send!(message));
const logger = { warn: (text: string) => console.error(text), debug: (text: string) => console.error(text) };
// Nobody is there to ask for anything.
process.once("disconnect", () => process.exit(1));

/** What ends before the process. */
const closing: (() => Promise<unknown>)[] = [];
const controllers = new Map<number, AbortController>();

async function outcomeOf(model: ImageModel, { op, request }: AskedFor, more: Partial<GenerateOptions>): Promise<Ended> {
  try {
    if (op === "encode") {
      const { signal } = more;
      const embeds = await model.encode({ ...(request as unknown as EncodeOptions), ...(signal && { signal }) });
      return { digest: digestOfEmbeds(embeds), seeds: [], blocks: "" };
    }
    const result = await model.generate({ ...requestFromJson(request), ...more });
    return { digest: digestOf(result), seeds: result.seeds.map(String), blocks: result.blocks };
  } catch (error) {
    const { code, name, message, retryAfterMs } = error as Error & { code?: unknown; retryAfterMs?: unknown };
    return {
      ...{ code: typeof code === "string" ? code : null, name, message },
      retryAfterMs: typeof retryAfterMs === "number" ? retryAfterMs : null,
    };
  }
}

/** Answers what it is asked with a model. */
function answer(model: ImageModel): void {
  process.on("message", async (message: ToProcess) => {
    if (message.type === "cancel") controllers.get(message.ask)?.abort(new DOMException("Cancelled.", "AbortError"));
    else if (message.type === "ask") {
      const { ask } = message;
      const controller = new AbortController();
      controllers.set(ask, controller);
      const steps: number[] = [];
      const start = performance.now();
      const ended = await outcomeOf(model, message, {
        signal: controller.signal,
        onAccept: () => tell({ type: "accepted", ask }),
        onStep: ({ step }) => void steps.push(step),
      });
      controllers.delete(ask);
      tell({ type: "ended", ask, ended, steps, milliseconds: performance.now() - start });
    } else if (message.type === "load") {
      const { callers, jobs, asked } = message;
      const latencies: number[] = [];
      const ends: number[] = [];
      let next = 0;
      const first = Math.floor(Math.random() * 2 ** 31);
      const call = async () => {
        while (next < jobs) {
          const request = { ...asked.request, seed: first + next++ };
          const from = performance.now();
          const ended = await outcomeOf(model, { ...asked, request }, {});
          if ("code" in ended) throw new Error(`${ended.code}: ${ended.message}`);
          latencies.push(performance.now() - from);
          ends.push(performance.timeOrigin + performance.now());
        }
      };
      await Promise.all(Array.from({ length: callers }, call));
      tell({ type: "loaded", latencies, ends });
    }
  });
}

let drawings = 0;

/** A model that tells of what it draws. */
function telling(model: ImageModel): ImageModel {
  const around = async <T>(key: string, draw: (step: () => void) => Promise<T>) => {
    const drawing = drawings++;
    const say = (what: "begin" | "step" | "drawn" | "failed") =>
      tell({ type: "drawing", what, drawing, key, at: Date.now() });
    say("begin");
    try {
      const result = await draw(() => say("step"));
      say("drawn");
      return result;
    } catch (error) {
      say("failed");
      throw error;
    }
  };
  const own: Pick<ImageModel, "generate" | "encode"> = {
    generate: (options) =>
      around(keyOf(options), (step) =>
        model.generate({
          ...options,
          onStep: (event, context) => {
            step();
            return options.onStep?.(event, context);
          },
        }),
      ),
    encode: (options) => around(keyOf({ prompt: options.prompt }), () => model.encode(options)),
  };
  return new Proxy(model, {
    get: (target, name) => {
      if (name in own) return own[name as keyof typeof own];
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}

process.on("message", (message: ToProcess) => {
  if (message.type === "usage") {
    const { user, system } = process.cpuUsage();
    tell({ type: "usage", milliseconds: (user + system) / 1000 });
  } else if (message.type === "stop")
    void (async () => {
      for (const close of closing) await close();
      process.exit(0);
    })();
});

let port: number | null = null;
if (settings.role === "gateway") {
  const { redis, prefix, keepResultsMs, maxQueue, http } = settings;
  const model = await connectFleet({ redis, prefix, keepResultsMs, maxQueue, model: modelId, logger });
  if (http) {
    const app = await createServer({ models: { [modelId]: model }, logger: false });
    await app.listen({ host: "127.0.0.1", port: 0 });
    port = (app.server.address() as AddressInfo).port;
    closing.push(() => app.close());
  }
  closing.push(() => model.dispose());
  answer(model);
} else if (settings.role === "worker") {
  const { redis, prefix, keepResultsMs, lockMs, take, workers = 1, model: waiting, cache, tells } = settings;
  for (let index = 0; index < workers; index++) {
    const model = await loadWaiting({ ...waiting, cache, maxQueue: 1000, measureCosts: false });
    const worker = await startWorker({
      ...{ redis, prefix, keepResultsMs, lockMs, take, logger },
      models: { [modelId]: tells ? telling(model) : model },
    });
    closing.push(() => worker.close({ drainMs: 0 }).then(() => model.dispose()));
  }
} else {
  const model = await loadWaiting({ ...settings.model, cache: settings.cache, maxQueue: 1000, measureCosts: false });
  closing.push(() => model.dispose());
  answer(model);
}
tell({ type: "ready", port });
