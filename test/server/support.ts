// A server over the embedded model, at a port of its own.
import type { AddressInfo } from "node:net";
import type { FastifyInstance } from "fastify";
import { FlowTurbo, type ImageModel, type LoadOptions } from "flowturbo";
import { type CreateServerOptions, createServer } from "flowturbo/server";

export interface TestServer {
  readonly app: FastifyInstance;
  readonly model: FlowTurbo;
  /** `http://127.0.0.1:<port>` */
  readonly url: string;
  /** Lines of its log. */
  readonly log: string[];
  close(): Promise<void>;
}

/** A model with `shapes` options that is drawn with at once: costs are not measured in the background. */
export async function startServer(
  options: Partial<CreateServerOptions> = {},
  load: LoadOptions = {},
): Promise<TestServer> {
  const model = await FlowTurbo.load(undefined, { measureCosts: false, allowPaths: false, ...load });
  const server = await serverOf({ shapes: model }, options);
  return {
    ...{ ...server, model },
    close: async () => {
      await server.close();
      await model.dispose();
    },
  };
}

/** A server over given models. */
export async function serverOf(models: CreateServerOptions["models"], options: Partial<CreateServerOptions> = {}) {
  const log: string[] = [];
  const app = await createServer({
    models,
    drainMs: 5000,
    warm: [],
    logger: { level: "debug", stream: { write: (line: string) => void log.push(line) } },
    ...options,
  });
  await app.listen({ host: "127.0.0.1", port: 0 });
  const { port } = app.server.address() as AddressInfo;
  return { app, log, url: `http://127.0.0.1:${port}`, close: async () => void (await app.close()) };
}

/** Few steps with the guidance that the model is used with. */
export const quick = { prompt: "a red circle", num_inference_steps: 3, guidance_scale: 2, seed: 7 };

/** A POST of JSON. */
export async function post(url: string, body: unknown, headers: Record<string, string> = {}, signal?: AbortSignal) {
  const response = await fetch(url, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
    ...(signal && { signal }),
  });
  const text = await response.text();
  return { status: response.status, headers: response.headers, body: text === "" ? null : JSON.parse(text) };
}

/** A model whose calls wait until they are let go: for what happens meanwhile. */
export function heldModel(model: ImageModel): ImageModel & { release(): void; readonly calls: number } {
  let calls = 0;
  let release = () => {};
  const held = new Promise<void>((resolve) => {
    release = resolve;
  });
  return new Proxy(model, {
    get(target, name) {
      if (name === "release") return release;
      if (name === "calls") return calls;
      if (name === "generate")
        return async (options: Parameters<ImageModel["generate"]>[0]) => {
          calls++;
          await Promise.race([
            held,
            new Promise((_, reject) => options.signal?.addEventListener("abort", () => reject(options.signal!.reason))),
          ]);
          return target.generate(options);
        };
      const value = Reflect.get(target, name, target);
      return typeof value === "function" ? value.bind(target) : value;
    },
  }) as never;
}

export interface SentEvent {
  readonly id: string | null;
  readonly event: string;
  // biome-ignore lint/suspicious/noExplicitAny: whatever the server sends
  readonly data: any;
}

/** Events of a stream, as the specification of server-sent events reads them. */
export async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<SentEvent> {
  let text = "";
  for await (const chunk of body.pipeThrough(new TextDecoderStream() as never)) {
    text += chunk as unknown as string;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const fields = new Map(
        text
          .slice(0, end)
          .split("\n")
          .map((line) => line.split(/: ?(.*)/s) as [string, string]),
      );
      text = text.slice(end + 2);
      const data = fields.get("data");
      if (data !== undefined)
        yield { id: fields.get("id") ?? null, event: fields.get("event") ?? "message", data: JSON.parse(data) };
    }
  }
}
