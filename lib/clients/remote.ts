/**
 * Draws over the HTTP interface of `flowturbo serve`. A request that is to be followed step by step is a job there, whose events
 * are read; any other is one request, which ends when the connection is closed.
 */

import { onAbort } from "../common/abort.js";
import { packageVersion } from "../common/package.js";
import { seedToJson } from "../common/seed.js";
import { clipped, messageOf } from "../common/text.js";
import type { QualityName } from "../schedule/index.js";
import type { DrawControls, Drawer, DrawerInfo, Drawn, DrawRequest } from "./drawer.js";
import { transparentMask } from "./masks.js";

/** Where a server is, and what it wants to see. */
export interface RemoteSettings {
  /** Address with or without `/v1` at its end. */
  readonly baseURL: string;
  readonly apiKey?: string | undefined;
  readonly headers?: Readonly<Record<string, string | undefined>> | undefined;
  readonly fetch?: typeof globalThis.fetch | undefined;
}

/** The server refused a request, failed, or cannot be reached. */
export class RemoteError extends Error {
  override readonly name = "RemoteError";
  /** HTTP status; null where there was no answer. */
  readonly status: number | null;
  /** Of the answer, in lower case. */
  readonly headers: Readonly<Record<string, string>>;
  /** The answer's text; null where there was none. */
  readonly body: string | null;
  /** The field `error` of the answer, if it has one. */
  readonly error: ServerError | null;
  /** Whether the same request may succeed later. */
  readonly isRetryable: boolean;
  readonly url: string;
  /** What was sent, with texts in place of pictures; undefined for a request without a body. */
  readonly request: unknown;

  constructor(
    message: string,
    { cause, ...rest }: Omit<RemoteError, "name" | "message" | "stack" | "cause"> & { cause?: unknown },
  ) {
    super(message, { cause });
    this.status = rest.status;
    this.headers = rest.headers;
    this.body = rest.body;
    this.error = rest.error;
    this.isRetryable = rest.isRetryable;
    this.url = rest.url;
    this.request = rest.request;
  }
}

/** What an answer says of an error. */
export interface ServerError {
  readonly message: string;
  readonly type?: string | null;
  readonly param?: string | null;
  readonly code?: string | null;
}

/** The HTTP interface has OpenAI's names for the qualities. */
const qualities: Record<QualityName, string> = { fast: "low", balanced: "medium", best: "high" };

/** @param model its id at the server; null for the one that the server draws with by default */
export function remoteDrawer(settings: RemoteSettings, model: string | null): Drawer {
  const address = baseOf(settings.baseURL);
  const call = (method: string, path: string, body: object | undefined, controls: DrawControls) =>
    request(settings, method, `${address}/${path}`, body, controls);
  return {
    address,
    async info(controls = {}): Promise<DrawerInfo> {
      const path = model === null ? "models" : `models/${encodeURIComponent(model)}`;
      const response = await call("GET", path, undefined, controls);
      const answer = await json<ModelAnswer & { readonly data?: readonly ModelAnswer[] }>(response, undefined);
      const found = answer.data?.[0] ?? answer;
      if (!found.native_size) {
        const told = { status: 503, headers: headersOf(response), body: null, error: null, isRetryable: true };
        throw new RemoteError(`The model ${found.id} is still loading.`, {
          ...told,
          url: response.url,
          request: undefined,
        });
      }
      const [width, height] = found.native_size.split("x").map(Number) as [number, number];
      return { name: found.id, nativeSize: { width, height }, maxImages: found.limits.max_images };
    },
    async draw(wanted, controls = {}): Promise<Drawn> {
      const body = await bodyOf(wanted, model);
      if (controls.onStep) return drawJob(call, body, controls);
      const response = await call("POST", wanted.image ? "images/edits" : "images/generations", body, controls);
      return drawnOf(await json<Answer>(response, body), headersOf(response));
    },
  };
}

/** A model as the server describes it. */
interface ModelAnswer {
  readonly id: string;
  /** null while it loads. */
  readonly native_size: string | null;
  readonly limits: { readonly max_images: number };
}

/** What the server answers when pictures are drawn. */
interface Answer {
  readonly data: readonly { readonly b64_json: string }[];
  readonly size: string;
  readonly usage: { readonly input_tokens: number; readonly output_tokens: number };
  readonly model: string;
  readonly seeds: readonly (number | string)[];
  readonly blocks: string;
  readonly evaluations: Drawn["evaluations"];
  readonly timings: Drawn["timings"];
  readonly deadline: Drawn["deadline"];
  readonly warnings: readonly string[];
}

type Call = (method: string, path: string, body: object | undefined, controls: DrawControls) => Promise<Response>;

/** @throws TypeError for what is no address */
function baseOf(address: string): string {
  const { origin, pathname } = new URL(address);
  const path = pathname.replace(/\/+$/, "");
  return `${origin}${path.endsWith("/v1") ? path : `${path}/v1`}`;
}

async function bodyOf(wanted: DrawRequest, model: string | null): Promise<Record<string, unknown>> {
  const { width, height, quality, image, mask } = wanted;
  return {
    prompt: wanted.prompt,
    ...(model !== null && { model }),
    n: wanted.count,
    ...(width !== undefined && height !== undefined && { size: `${width}x${height}` }),
    ...(quality !== undefined && { quality: qualities[quality] }),
    output_format: wanted.format,
    ...(wanted.format !== "png" && { output_compression: wanted.compression }),
    ...(wanted.seed !== undefined && { seed: seedToJson(wanted.seed) }),
    seeds: wanted.seeds?.map(seedToJson),
    num_inference_steps: wanted.steps,
    guidance_scale: wanted.guidanceScale,
    skip_layers: wanted.skipLayers,
    loras: wanted.loras,
    controls: wanted.controls?.map(({ image: picture, mask: painted, pixelRange, ...control }) => ({
      ...{ ...control, pixel_range: pixelRange, image: base64(picture) },
      // The server reads such masks in both ways.
      ...(painted && { mask: base64(painted) }),
    })),
    negative_prompt: wanted.negativePrompt,
    prompt_2: wanted.prompt2,
    prompt_3: wanted.prompt3,
    negative_prompt_2: wanted.negativePrompt2,
    negative_prompt_3: wanted.negativePrompt3,
    clip_skip: wanted.clipSkip,
    prompt_weighting: wanted.promptWeighting,
    max_sequence_length: wanted.maxSequenceLength,
    blocks: wanted.blocks,
    sampler: wanted.sampler,
    deadline_ms: wanted.deadlineMs,
    stages: wanted.stages,
    ...(image && { image: base64(image) }),
    ...(mask && { mask: base64(await transparentMask(mask)) }),
    strength: wanted.strength,
    padding_mask_crop: wanted.paddingMaskCrop,
  };
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("base64");
}

function drawnOf(answer: Answer, headers: Readonly<Record<string, string>>): Drawn {
  const { seeds, blocks, evaluations, timings, deadline, warnings, model, usage } = answer;
  const [width, height] = answer.size.split("x").map(Number) as [number, number];
  return {
    pictures: answer.data.map(({ b64_json }) => b64_json),
    ...{ width, height, seeds, blocks, evaluations, timings, deadline, warnings, model, headers },
    usage: { input: usage.input_tokens, output: usage.output_tokens },
  };
}

/** Draws as a job, so that its steps can be followed; an abort cancels it. */
async function drawJob(call: Call, body: object, controls: DrawControls): Promise<Drawn> {
  const { signal, onStep } = controls;
  const accepted = await call("POST", "jobs", body, controls);
  const { id } = await json<{ readonly id: string }>(accepted, body);
  // The work belongs to the server: closing the stream of events would not end it.
  const cancel = () =>
    void call("DELETE", `jobs/${id}`, undefined, { ...controls, signal: undefined })
      .then((response) => response.body?.cancel())
      .catch(() => undefined);
  const stop = onAbort(signal, cancel);
  try {
    signal?.throwIfAborted();
    const response = await call("GET", `jobs/${id}/events`, undefined, controls);
    for await (const event of eventsOf(response)) {
      if (event.type === "job.progress") await onStep!(event.step, event.steps);
      if (event.type === "job.completed") return drawnOf(event.job.result, headersOf(response));
      if (event.type === "job.failed" || event.type === "job.cancelled") throw failedJob(event, response, body);
    }
    throw new RemoteError(`The events of the job ${id} ended before it was done.`, {
      ...{ status: null, headers: headersOf(response), body: null, error: null, isRetryable: true },
      ...{ url: response.url, request: withoutPictures(body) },
    });
  } catch (error) {
    signal?.throwIfAborted();
    throw error;
  } finally {
    stop();
  }
}

type JobEvent =
  | { readonly type: "job.progress"; readonly step: number; readonly steps: number }
  | { readonly type: "job.completed"; readonly job: { readonly result: Answer } }
  | { readonly type: "job.failed" | "job.cancelled"; readonly error?: ServerError }
  | { readonly type: "job.queued" | "job.started" | "job.partial_image" };

function failedJob(event: { readonly error?: ServerError }, response: Response, body: object): RemoteError {
  const error = event.error ?? { message: "The job was cancelled at the server." };
  return new RemoteError(error.message, {
    ...{ status: null, headers: headersOf(response), body: JSON.stringify(event), error, isRetryable: false },
    ...{ url: response.url, request: withoutPictures(body) },
  });
}

/** The data of server-sent events. */
async function* eventsOf(response: Response): AsyncGenerator<JobEvent> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of response.body as unknown as AsyncIterable<Uint8Array>) {
    text += decoder.decode(chunk, { stream: true });
    // What follows the last empty line is an event of which more is to come.
    const events = text.split(/\r?\n\r?\n/);
    text = events.pop()!;
    for (const event of events) {
      const data = event
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart());
      if (data.length > 0) yield JSON.parse(data.join("\n"));
    }
  }
}

/** @throws RemoteError for an answer that is no success, and where there is none */
async function request(
  settings: RemoteSettings,
  method: string,
  url: string,
  body: object | undefined,
  { signal, headers }: DrawControls,
): Promise<Response> {
  const fetching = settings.fetch ?? globalThis.fetch;
  const sent = withoutPictures(body);
  let response: Response;
  try {
    response = await fetching(url, {
      method,
      headers: headersFor(settings, headers, body !== undefined),
      ...(body && { body: JSON.stringify(body) }),
      ...(signal && { signal }),
    });
  } catch (cause) {
    signal?.throwIfAborted();
    // fetch says "fetch failed", and what happened in its cause.
    const reason = messageOf((cause as Error).cause ?? cause) || messageOf(cause);
    throw new RemoteError(
      `The server at ${new URL(url).origin} cannot be reached: ${reason}. Start it with \`flowturbo serve\`, or correct the address.`,
      { cause, status: null, headers: {}, body: null, error: null, isRetryable: true, url, request: sent },
    );
  }
  if (response.ok) return response;
  const text = await response.text();
  const found = errorOf(text);
  const message = found?.message ?? `The server answered with status ${response.status}: ${clipped(text, 200)}`;
  const told = response.headers.get("x-should-retry");
  const { status } = response;
  throw new RemoteError(message, {
    ...{ status, headers: headersOf(response), body: text, error: found, url, request: sent },
    isRetryable: told === null ? status === 408 || status === 429 || status >= 500 : told === "true",
  });
}

function headersFor(
  { apiKey, headers: own }: RemoteSettings,
  given: DrawControls["headers"],
  hasBody: boolean,
): Record<string, string> {
  const headers = new Headers();
  if (apiKey !== undefined) headers.set("authorization", `Bearer ${apiKey}`);
  if (hasBody) headers.set("content-type", "application/json");
  for (const [name, value] of [...Object.entries(own ?? {}), ...Object.entries(given ?? {})])
    if (value !== undefined) headers.set(name, value);
  headers.set("user-agent", [headers.get("user-agent"), ownAgent()].filter(Boolean).join(" "));
  return Object.fromEntries(headers);
}

/** Code that talks to a server may be bundled, unlike code that draws; then it does not know its version. */
function ownAgent(): string {
  try {
    return `flowturbo/${packageVersion()}`;
  } catch {
    return "flowturbo";
  }
}

/** @throws RemoteError for what is no JSON */
async function json<T>(response: Response, body: object | undefined): Promise<T> {
  const text = await response.text();
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new RemoteError(
      `The answer of ${response.url} is not JSON: ${clipped(text, 80)} Is it the address of \`flowturbo serve\`?`,
      {
        ...{ cause, status: response.status, headers: headersOf(response), body: text, error: null },
        ...{ isRetryable: false, url: response.url, request: withoutPictures(body) },
      },
    );
  }
}

function headersOf(response: Response): Record<string, string> {
  return Object.fromEntries(response.headers);
}

function errorOf(text: string): ServerError | null {
  try {
    const { error } = JSON.parse(text);
    return typeof error?.message === "string" ? error : null;
  } catch {
    return null;
  }
}

/** For errors, which are printed: of base64 texts their length. */
function withoutPictures(body: object | undefined): unknown {
  if (!body) return undefined;
  const shown = (name: string, value: unknown) =>
    (name === "image" || name === "mask") && typeof value === "string" && value.length > 1000
      ? `(${value.length} characters)`
      : value;
  return JSON.parse(JSON.stringify(body, shown));
}
