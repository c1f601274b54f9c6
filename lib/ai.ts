/**
 * `flowturbo/ai`: a provider for `generateImage` of the Vercel AI SDK, over a model of this process or a server of
 * `flowturbo serve`. It implements version 3 of the SDK's specification, which AI SDK 6 uses and AI SDK 7 takes as well.
 */

import { ArgumentError, callError, NoModelError } from "./ai/errors.js";
import { readOptions } from "./ai/options.js";
import { parseRatio, parseSize, sizeOfRatio } from "./ai/sizes.js";
import type { ImageCallOptions, ImageCallResult, ImageFile, ImageWarning, JsonValue } from "./ai/specification.js";
import type { Drawer, Drawn, DrawRequest } from "./clients/drawer.js";
import { localDrawer } from "./clients/local.js";
import { remoteDrawer } from "./clients/remote.js";
import { following, untilAborted } from "./common/abort.js";
import { seedOf } from "./common/seed.js";
import { OptionError } from "./errors.js";
import type { ImageModel } from "./model.js";

export type { FlowTurboControl, FlowTurboImageOptions } from "./ai/options.js";
export type { ImageCallOptions, ImageCallResult, ImageFile, ImageWarning, JsonValue } from "./ai/specification.js";

/** Draws in this process. */
export interface InProcessSettings {
  /**
   * The model, a promise of it, or a function that gives one for the id that `image(id)` was called with. The function is called once
   * for each id, when a picture is first asked for, and again after it failed. Default: loads the embedded model.
   */
  model?: ImageModel | PromiseLike<ImageModel> | ((id: string) => ImageModel | PromiseLike<ImageModel>) | undefined;
}

/** Draws at a server. */
export interface ServerSettings {
  /** Address of `flowturbo serve`, with or without `/v1`, such as `"http://127.0.0.1:7860"`. */
  baseURL: string;
  /** Sent as `Authorization: Bearer …`. Default: the environment variable `FLOWTURBO_API_KEY`, or none. */
  apiKey?: string | undefined;
  /** Further headers of each request. Default: none. */
  headers?: Record<string, string | undefined> | undefined;
  /** In place of the global `fetch`. */
  fetch?: typeof globalThis.fetch | undefined;
}

/** A model of the AI SDK: give it to `generateImage`. Assignable to its `ImageModelV3`. */
export interface FlowTurboImageModel {
  readonly specificationVersion: "v3";
  readonly provider: "flowturbo.image";
  readonly modelId: string;
  /** Picture k of a call has the seed + k: one call draws all pictures, so that no two have the same. */
  readonly maxImagesPerCall: number;
  readonly supportsFileInputs: true;
  readonly supportsMaskInputs: true;
  /**
   * Draws. `generateImage` calls it.
   * @throws the AI SDK's `InvalidArgumentError` for options that are wrong; its `APICallError` for what else goes wrong, with the
   *   status and `isRetryable` of `errorTable` and the error as `cause`, or those of the server's answer; the signal's reason after an abort
   */
  doGenerate(options: ImageCallOptions): Promise<ImageCallResult>;
}

/** A provider of the AI SDK. Assignable to its `ProviderV3`. */
export interface FlowTurboProvider extends AsyncDisposable {
  (id?: string): FlowTurboImageModel;
  readonly specificationVersion: "v3";
  /**
   * A model by its id: at a server one of `/v1/models`, in this process what the function `model` is called with. Default: the
   * one model that there is, or the server's default.
   * @throws the AI SDK's `NoSuchModelError` where one model of another name was given
   */
  image(id?: string): FlowTurboImageModel;
  /** As `image`. */
  imageModel(id: string): FlowTurboImageModel;
  /** @throws the AI SDK's `NoSuchModelError`: flowturbo draws pictures only; so do the other kinds of models */
  languageModel(id: string): never;
  embeddingModel(id: string): never;
  textEmbeddingModel(id: string): never;
  transcriptionModel(id: string): never;
  speechModel(id: string): never;
  rerankingModel(id: string): never;
  /** Disposes the models that this provider had loaded: not those that were given to it. */
  dispose(): Promise<void>;
}

const defaultId = "default";
const maxImagesPerCall = 1024;
const otherKinds = [
  "languageModel",
  "embeddingModel",
  "textEmbeddingModel",
  "transcriptionModel",
  "speechModel",
  "rerankingModel",
] as const;

/**
 * A provider for the AI SDK.
 * @param settings a model of this process (default: the embedded one, loaded when it is first needed), or where a server is
 * @throws OptionError for settings that are wrong
 */
export function createFlowTurbo(settings: InProcessSettings | ServerSettings = {}): FlowTurboProvider {
  checkSettings(settings);
  const source = "baseURL" in settings ? serverSource(settings) : processSource(settings);
  const image = (id: string = defaultId) => imageModel(source.drawer(id), source.nameOf(id));
  const kinds = Object.fromEntries(otherKinds.map((kind) => [kind, (id: string) => refuseKind(id, kind)]));
  return Object.assign((id?: string) => image(id), {
    specificationVersion: "v3" as const,
    ...{ image, imageModel: image },
    ...(kinds as Record<(typeof otherKinds)[number], (id: string) => never>),
    dispose: source.dispose,
    [Symbol.asyncDispose]: source.dispose,
  });
}

function checkSettings(settings: object): void {
  if (typeof settings !== "object" || settings === null)
    throw new OptionError("settings", "Expected { model } or { baseURL } for createFlowTurbo().");
  const names = "baseURL" in settings ? ["baseURL", "apiKey", "headers", "fetch"] : ["model"];
  for (const name of Object.keys(settings))
    if (!names.includes(name))
      throw new OptionError(
        name,
        `createFlowTurbo({ ${names[0]} }) has no setting "${name}"; it has ${names.join(", ")}.`,
      );
  if ("baseURL" in settings && !(typeof settings.baseURL === "string" && URL.canParse(settings.baseURL)))
    throw new OptionError("baseURL", 'Expected an address such as "http://127.0.0.1:7860" for baseURL.');
}

/** Where models come from. */
interface Source {
  drawer(id: string): Drawer;
  /** What the AI SDK shows. @throws NoModelError for a model that there is not */
  nameOf(id: string): string;
  dispose(): Promise<void>;
}

function serverSource(settings: ServerSettings): Source {
  const remote = { ...settings, apiKey: settings.apiKey ?? (process.env.FLOWTURBO_API_KEY || undefined) };
  return {
    drawer: (id) => remoteDrawer(remote, id === defaultId ? null : id),
    nameOf: (id) => id,
    dispose: async () => undefined,
  };
}

function processSource({ model }: InProcessSettings): Source {
  if (model !== undefined && typeof model !== "function") {
    const name = "then" in model ? null : model.name;
    const known = (id: string) => id === defaultId || name === null || id === name;
    return {
      drawer: () => localDrawer(() => model),
      nameOf(id) {
        if (known(id)) return name ?? id;
        throw new NoModelError(id, "imageModel", `No such imageModel: ${id}. The model that was given is "${name}".`);
      },
      dispose: async () => undefined,
    };
  }
  const load = model ?? loadEmbedded;
  const loading = new Map<string, Promise<ImageModel>>();
  const open = (id: string, signal: AbortSignal | undefined): Promise<ImageModel> => {
    let promise = loading.get(id);
    if (!promise) {
      promise = Promise.resolve().then(() => load(id));
      loading.set(id, promise);
      // The next call tries again.
      promise.catch(() => loading.delete(id));
    }
    // Others may wait for the same model: an abort ends the waiting, not the loading.
    return untilAborted(promise, signal);
  };
  return {
    drawer: (id) => localDrawer((signal) => open(id, signal)),
    nameOf(id) {
      if (model || id === defaultId || id === embeddedName) return model ? id : embeddedName;
      throw new NoModelError(id, "imageModel", `No such imageModel: ${id}. Give createFlowTurbo() a model for it.`);
    },
    async dispose() {
      const loaded = [...loading.values()];
      loading.clear();
      await Promise.all(
        loaded.map((promise) =>
          promise.then(
            (each) => each.dispose(),
            () => undefined,
          ),
        ),
      );
    },
  };
}

const embeddedName = "shapes";

/** Imported at its first use: who draws at a server needs none of it. */
async function loadEmbedded(): Promise<ImageModel> {
  const { FlowTurbo } = await import("./flowturbo.js");
  return FlowTurbo.load();
}

function refuseKind(modelId: string, kind: (typeof otherKinds)[number]): never {
  const type = kind === "textEmbeddingModel" ? "embeddingModel" : kind;
  throw new NoModelError(modelId, type, `No such ${type}: ${modelId}. flowturbo has image models only.`);
}

/** A plain object without `this`: AI SDK 7 wraps it in a proxy. */
function imageModel(drawer: Drawer, modelId: string): FlowTurboImageModel {
  return {
    ...{ specificationVersion: "v3", provider: "flowturbo.image", modelId, maxImagesPerCall },
    ...{ supportsFileInputs: true, supportsMaskInputs: true },
    async doGenerate(options) {
      const timestamp = new Date();
      const { abortSignal: signal, headers } = options;
      let wanted: DrawRequest | undefined;
      try {
        signal?.throwIfAborted();
        const warnings: ImageWarning[] = [];
        wanted = await requestOf(options, drawer, warnings);
        const drawn = await drawAll(drawer, wanted, { signal, headers });
        for (const message of new Set(drawn.flatMap(({ warnings }) => warnings)))
          warnings.push({ type: "other", message });
        return resultOf(drawn, warnings, timestamp);
      } catch (error) {
        const { image, mask, controls, ...values } = wanted ?? {};
        throw callError(error, drawer.address, values);
      }
    },
  };
}

async function requestOf(
  { prompt, n, size, aspectRatio, seed, files, mask, providerOptions, abortSignal, headers }: ImageCallOptions,
  drawer: Drawer,
  warnings: ImageWarning[],
): Promise<DrawRequest> {
  const options = readOptions(providerOptions.flowturbo);
  const [file, ...others] = files ?? [];
  if (mask && !file)
    throw new ArgumentError(
      "prompt",
      "Expected a picture in prompt.images for prompt.mask, which says where to paint it.",
    );
  if (others.length > 0)
    warnings.push({
      type: "unsupported",
      feature: "prompt.images",
      details: `One picture is edited: the first of ${others.length + 1}.`,
    });
  if (options.paddingMaskCrop !== undefined && !mask)
    throw new ArgumentError(
      "providerOptions",
      "The option providerOptions.flowturbo.paddingMaskCrop says what is drawn around a mask; give prompt.images and prompt.mask, or leave it out.",
    );
  checkSeeds(options.seeds, seed, n);
  const image = file && bytesOf(file, "prompt.images");
  const painted = mask && bytesOf(mask, "prompt.mask");
  const sized = size !== undefined || options.stages !== undefined;
  if (aspectRatio !== undefined && sized)
    warnings.push({
      type: "unsupported",
      feature: "aspectRatio",
      details: `The size is given by ${size === undefined ? "stages" : "size"}.`,
    });
  return {
    ...{ prompt: prompt ?? "", count: n, seed, format: "png", image, mask: painted, ...options },
    ...(size !== undefined && parseSize(size)),
    ...(aspectRatio !== undefined &&
      !sized &&
      (await ratioSize(aspectRatio, drawer, { signal: abortSignal, headers }, warnings))),
  };
}

function checkSeeds(seeds: DrawRequest["seeds"], seed: number | undefined, n: number): void {
  const name = "providerOptions.flowturbo.seeds";
  if (seeds && seed !== undefined)
    throw new ArgumentError("providerOptions", `Both seed and ${name} say what pictures start from; leave out one.`);
  if (seeds && seeds.length !== n)
    throw new ArgumentError(
      "providerOptions",
      `Expected as many seeds as pictures, n (${n}), for ${name} but received ${seeds.length}. Change one of them, and leave out maxImagesPerCall, which splits n.`,
    );
}

async function ratioSize(
  aspectRatio: string,
  drawer: Drawer,
  controls: Parameters<Drawer["info"]>[0],
  warnings: ImageWarning[],
) {
  const ratio = parseRatio(aspectRatio);
  const { nativeSize } = await drawer.info(controls);
  const { width, height } = sizeOfRatio(ratio, nativeSize);
  const drawn = width / height;
  if (Math.abs(Math.log(drawn / ratio)) > 0.01)
    warnings.push({
      type: "compatibility",
      feature: "aspectRatio",
      details: `Drawn at ${width}x${height}, a ratio of ${drawn.toFixed(2)} in place of ${ratio.toFixed(2)}: sides are multiples of 16.`,
    });
  return { width, height };
}

/** @throws ArgumentError for an address: whatever stands behind it, this process does not ask for it in a caller's name */
function bytesOf(file: ImageFile, argument: string): Uint8Array {
  if (file.type === "url")
    throw new ArgumentError(
      "prompt",
      `Expected a picture's bytes, base64 or a data: URL for ${argument} but received an address. flowturbo downloads nothing: fetch it, and give its bytes.`,
    );
  return typeof file.data === "string" ? new Uint8Array(Buffer.from(file.data, "base64")) : file.data;
}

/** In as many requests as the server's limit asks for; of several, the failure of one ends the others. */
async function drawAll(
  drawer: Drawer,
  request: DrawRequest,
  controls: NonNullable<Parameters<Drawer["draw"]>[1]>,
): Promise<readonly Drawn[]> {
  const most = request.count === 1 ? 1 : (await drawer.info(controls)).maxImages;
  if (request.count <= most) return [await drawer.draw(request, controls)];
  const { controller: ending, unfollow } = following(controls.signal);
  const starts = Array.from({ length: Math.ceil(request.count / most) }, (_, index) => index * most);
  try {
    return await Promise.all(
      starts.map((start) => {
        const seed = request.seed === undefined ? undefined : seedOf(BigInt(request.seed) + BigInt(start));
        const count = Math.min(most, request.count - start);
        const seeds = request.seeds?.slice(start, start + count);
        return drawer.draw({ ...request, seed, seeds, count }, { ...controls, signal: ending.signal });
      }),
    );
  } catch (error) {
    ending.abort(error);
    throw error;
  } finally {
    unfollow();
  }
}

function resultOf(drawn: readonly Drawn[], warnings: ImageWarning[], timestamp: Date): ImageCallResult {
  const images = drawn.flatMap((part) =>
    part.pictures.map((_, index) => ({ ...metadataOf(part), seed: part.seeds[index] ?? null })),
  );
  const inputTokens = drawn.reduce((sum, { usage }) => sum + usage.input, 0);
  const outputTokens = drawn.reduce((sum, { usage }) => sum + usage.output, 0);
  const [{ model, headers }] = drawn as [Drawn];
  return {
    // All of one kind: they come from one drawer.
    images: drawn.flatMap(({ pictures }) => [...pictures]) as string[] | Uint8Array[],
    warnings,
    providerMetadata: { flowturbo: { images } },
    response: { timestamp, modelId: model, headers: headers ? { ...headers } : undefined },
    usage: { inputTokens, outputTokens, totalTokens: inputTokens + outputTokens },
  };
}

/** Of each picture of a call; times and tokens are those of the whole call. */
function metadataOf({ width, height, blocks, evaluations, timings, deadline, usage }: Drawn) {
  return {
    ...{ width, height, blocks },
    evaluations: { ...evaluations },
    timings: { ...timings, steps: [...timings.steps] },
    deadline: deadline && { ...deadline },
    usage: { ...usage },
  } satisfies Record<string, JsonValue>;
}
