/**
 * What a model offers to those who call it: the interface, its options, events and results. `FlowTurbo`
 * implements it. Servers, queues and remote models see this file, errors.ts, and the JSON form of requests and results
 * (json.ts).
 */

import type { Logger } from "./common/logger.js";
import type { Seed } from "./common/seed.js";
import type { FloatTensor } from "./common/tensor.js";
import type { Feature, LoraRank, UpscaleName } from "./networks/index.js";
import type { BuilderName, RuntimeChoice, RuntimeName } from "./runtimes/index.js";
import type { Block, Evaluations, GridName, QualityName, SamplerName } from "./schedule/index.js";
import type { CostEntry } from "./serving/costs.js";
import type { Health, ModelEvents } from "./serving/health.js";
import type { Stats } from "./serving/stats.js";

/** A text-to-image model that serves many callers at once. */
export interface ImageModel extends AsyncDisposable {
  /**
   * For people and for APIs: the name of the checkpoint's folder, without a path, or of the repository whose snapshot in a Hugging
   * Face cache it is; "shapes" for the embedded model.
   */
  readonly name: string;
  /** Size of a picture that the model was trained for, in pixels. */
  readonly nativeSize: { readonly width: number; readonly height: number };
  /** Whether schedules may have blocks that evaluate the velocity refiner (`R` and `C`). */
  readonly hasRefiner: boolean;
  /** What requests may name besides; undefined where that is not known. */
  readonly adapters?: AdapterNames | undefined;
  /** What launches cost, as it is known now. */
  readonly costs: Costs;
  /**
   * Draws `count` pictures for each prompt. Calls made at the same time share launches and are answered when they are done.
   * @throws OptionError before any work if an option is wrong or does not fit the model; DeadlineError before any work if
   *   no schedule is done within `deadlineMs`; QueueFullError if too many requests wait; NotFiniteError naming the step
   *   if the network's values overflow; MemoryError if a GPU cannot hold what a picture takes; RuntimeDiedError if the runtime's process ended while it worked on this call;
   *   TimeoutError after `timeoutMs`; DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  generate(options: GenerateOptions): Promise<GenerateResult>;
  /**
   * As `generate`, to be iterated over: `for await (const event of model.generateStream({ prompt }))`. The call starts at once; its events
   * come in order, the result last, and what it rejects with is thrown after the events that came before. Drawing never waits for who
   * reads. Leaving the loop ends the call. Handlers among the options are called as well.
   */
  generateStream(options: GenerateOptions): GenerateStream;
  /**
   * What the text encoders make of prompts, for `generate({ promptEmbeds })`: to encode once what is drawn often, or to change it in
   * between. It waits for its turn as a call of `generate` does.
   * @throws OptionError before any work if an option is wrong or does not fit the model; QueueFullError if too many requests wait;
   *   NotFiniteError if an encoder's values overflow; RuntimeDiedError if the runtime's process ended while it worked on this call;
   *   DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  encode(options: EncodeOptions): Promise<PromptEmbeds>;
  /** Counters and histograms of all calls since the model was loaded. */
  stats(): Stats;
  /** Whether calls are answered, and what is wrong if something is: for the probes of an orchestrator. */
  health(): Health;
  /**
   * Calls `listener` whenever the runtime is lost (`"lost"`), works again after that (`"restart"`), or a launch takes far
   * longer than it costs (`"slow"`). An error that it throws is an uncaught exception, as from a timer.
   */
  on<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this;
  /** Undoes one `on` with the same name and listener. */
  off<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this;
  /**
   * Takes no new calls from now on: they reject with a DrainingError, and `health().ready` is false. Resolves when the work of calls
   * under way is done (not handlers of their events); `dispose` then frees everything. Every call gives the same promise. Of a model that
   * is disposed it resolves as well.
   */
  drain(): Promise<void>;
  /** Waits for the work of calls under way (not for handlers of their events), then frees everything. Safe to call twice. */
  dispose(): Promise<void>;
}

/** Adapters that a model was loaded with, by the names that requests have for them. */
export interface AdapterNames {
  /** Dynamic LoRAs: see `GenerateOptions.loras`. Those that were merged into the weights are no names for requests. */
  readonly loras: readonly string[];
  /** ControlNets: see `GenerateOptions.controls`. */
  readonly controlNets: readonly string[];
}

/** 8-bit RGB values of a picture. */
export interface RgbPicture {
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Row-major RGB, 3 bytes a pixel. */
  readonly data: Uint8Array;
}

/** Formats that pictures are encoded in. */
export type ImageFormat = "png" | "jpeg" | "webp";

/** A picture that can be encoded and written. */
export interface Picture extends RgbPicture {
  /** How it was made, as far as the option `metadata` says; encoded files carry it as text. */
  readonly parameters: Readonly<Record<string, unknown>>;
  /**
   * The encoded file, with the parameters as text where there are any (PNG: the chunk "parameters"; JPEG and WebP: EXIF ImageDescription,
   * in which there is room for 64,800 characters: longer texts are shortened, and the field `truncated` names them).
   * @param options `quality` of jpeg and webp, 1 to 100; default: 95
   * @throws OptionError for another quality, or one for png, which loses nothing
   */
  encode(format: ImageFormat, options?: { quality?: number | undefined }): Promise<Buffer>;
  /** As `encode("png")`. */
  toPNG(): Promise<Buffer>;
  /**
   * Writes the picture; the extension (.png, .jpg, .jpeg, .webp) decides the format. The file appears whole or not at all.
   * @throws OptionError for another extension, OutputError if it cannot be written
   */
  toFile(file: string): Promise<void>;
}

/**
 * A picture to read: the path of a file, an encoded file (PNG, JPEG, WebP, …), or 8-bit RGB values. A service that passes on
 * what its clients send refuses paths: `allowPaths`.
 */
export type PictureSource = string | Uint8Array | RgbPicture;

/** Sent while a model loads. */
export interface LoadProgress {
  /**
   * `download`: files of the hub that are not in the cache, of `previewVae`, the model and `base` in this order, each counted from 0; `checkpoint`: configs, headers and tokenizers are read; `graphs`: the
   * graphs are listed; `runtime`: a runtime starts, and graphs are emitted for it.
   */
  readonly phase: "download" | "checkpoint" | "graphs" | "runtime";
  /** Phases that are done, of the three after `download`; while downloading, bytes. */
  readonly done: number;
  /** Phases that there are, or bytes: more of those become known when the indexes of shards have been read. */
  readonly total: number;
  /** While downloading: the files under way, with their bytes. */
  readonly files?: readonly { readonly path: string; readonly done: number; readonly total: number }[];
}

/** Options of `FlowTurbo.load`. */
export interface LoadOptions {
  /**
   * What runs the graphs: TensorRT 11 or TensorRT-RTX on an NVIDIA GPU, from engines that are built; ONNX Runtime on an NVIDIA
   * GPU (`"cuda"`), on a GPU of any vendor (`"webgpu"`) or on the CPU (`"onnxruntime"`). `"auto"` takes the first
   * of the table that can be used here; `model.runtime` says which, and why others were passed over. Default: `"auto"`.
   */
  runtime?: "auto" | RuntimeName | undefined;
  /**
   * The GPUs that draw together, with a copy of the weights on each: `"all"` that the runtime can use and that the model fits on (others are left
   * out with a warning, and are in `model.runtime.leftOut`), or a list of different numbers from 0, in the order of CUDA, of which CUDA_VISIBLE_DEVICES
   * decides. The pictures of all requests are shared out over them by what launches cost on each, so that they may be of different kinds; a
   * picture is drawn on one of them. Where one is lost for good, its requests start again on the others. Of the runtimes `"tensorrt"`, `"tensorrt-rtx"` and `"cuda"`; with `runtime: "auto"` others are
   * passed over, and one that is named is an OptionError, as is a number that there is not. Default: one, the first that can be used.
   */
  devices?: "all" | readonly number[] | undefined;
  /** Folder with TensorRT's or TensorRT-RTX's libraries. Default: looked for in the environment, in Python's packages and on the loader's path. */
  tensorrtFolder?: string | undefined;
  /**
   * Folder with ONNX Runtime's CUDA provider (`libonnxruntime_providers_cuda.so`), of exactly onnxruntime-node's version.
   * Default: looked for in the environment, beside onnxruntime-node's library and in Python's packages.
   */
  cudaProviderFolder?: string | undefined;
  /**
   * Folder of engines and costs, of weights that were merged with LoRAs or quantised, of optimised graphs (64 MB at most), of references of `calibrate`, and of schedules that were found for models whose folder cannot be written.
   * Default: `$XDG_CACHE_HOME/flowturbo`, or `~/.cache/flowturbo`.
   */
  cache?: string | undefined;
  /**
   * On a GPU: each picture is a program of its own, replayed as one CUDA graph from its second run on. That is the least
   * latency for one picture at a time, but launches are not shared (a `pinBatch` above 1 is refused), and the steps of a picture are
   * reported together. The matrices of dynamic LoRAs are uploaded with each picture. Ignored on the CPU. Default: false.
   */
  capture?: boolean | undefined;
  /** Whether text encoders stay in memory. `false` frees them after each use; a new prompt loads them again. Default: true. */
  keepTextEncoders?: boolean | undefined;
  /** Precision variant of the weight files to read, such as `"fp16"`. Default: the files without a variant. */
  variant?: string | undefined;
  /**
   * Whether T5, the third and largest text encoder, is used where the model has it. `false` leaves it out, as
   * `text_encoder_3=None` does in diffusers: its part of the context is zeros, and neither its files nor its tokenizer's are read. A model whose files of T5 are missing is drawn without it in any case, and says so in `warnings`. Default: true.
   */
  textEncoder3?: boolean | undefined;
  /**
   * Whether the model was distilled to few steps without guidance. Such a model draws by default with the sampler `"euler"`, the 4 or 8
   * steps that it was made for, and `guidanceScale: 1`; options of a request win. `calibrate` refuses it. Default: it is recognised by the
   * word turbo, TurboX, lightning, flash or LCM in the name of its folder, repository or file or in `_name_or_path` of its configs, or by a
   * FlowMatchLCMScheduler, whose word counts for requests that name no `sampler`; `model.defaults` says what was found, and `logger.info` why.
   */
  distilled?: boolean | undefined;
  /**
   * For a checkpoint in one file: a folder in the diffusers layout, from which is taken what the file does not hold or say (text encoders,
   * VAE, tokenizers, scheduler, numbers of heads), or a model of the hub as `owner/name` or `owner/name@revision`, of which that alone is
   * downloaded; a path of that name comes first. Its transformer's weights may be missing. A CheckpointError for a folder whose
   * configurations are not those of the file's shapes, and for a model that is a folder itself; a HubError if it cannot be downloaded.
   * Default: the values of the public SD3 and SD3.5 models, and the tokenizers that come with the package.
   */
  base?: string | undefined;
  /**
   * Another autoencoder of the same latents, a small one such as TAESD3 (`AutoencoderTiny`): a folder with config.json and
   * diffusion_pytorch_model.safetensors, the hub's name of such a model (`"madebyollin/taesd3"`, a path of that name comes first), or TAESD's
   * own decoder, such as taesd3_decoder.safetensors, whose encoder is taken from the file of the same name with "encoder" in it beside it.
   * `preview: "decoded"` decodes with it, and `upscale: "pixels"` between stages decodes and encodes with it, unless it is a decoder alone; pictures
   * are decoded, and originals encoded, by the model's own. A CheckpointError if it is none, or of other latents; a HubError if it cannot be
   * downloaded. Default: the model's own for all.
   */
  previewVae?: string | undefined;
  /**
   * LoRAs, each by a name of its own and with a scale from −100 to 100: merged into the weights as the model is loaded (the merged weights
   * are kept in the cache), or dynamic, for requests to name. Default: none.
   */
  loras?: readonly LoraSource[] | undefined;
  /** ControlNets that are opened with the model, so that requests can name them without a path. Default: none. */
  controlNets?: readonly ControlNetSource[] | undefined;
  /**
   * Threads of the CPU runtime, 1 to 1024. Default: one for each physical core that this process may run on, and on Linux
   * no more than the processor time that its control groups grant: 1 for a quota of 1.5.
   */
  threads?: number | undefined;
  /**
   * How the CPU runtime computes with weights. Those of 16 bits: `"lazy"` widens them at each use, `"folded"` once at load (faster,
   * twice the memory), `"auto"` folds where six times their bytes are free; the command `flowturbo generate`, which draws one request, then only folds networks
   * that a picture evaluates more than 12 times (small ones, 30), unless it has a time limit. `"int8"` has the linear layers of attention and MLP multiplied as
   * 8-bit integers, with a scale for each output and each token: of the transformer, the refiner, the text encoders and the ControlNets that are named here,
   * with LoRAs merged into them. That is faster than `"folded"`, and these weights take a quarter of its memory; pictures differ a little. All else stays in float32, its
   * 16-bit weights as with `"auto"`. The first load of a checkpoint examines it, some minutes for a published model, leaves layers in float32 that lose too much, and
   * writes the weights into the folder `weights` of `cache`, one byte a weight; parts whose results are off by more than 3 % are in `model.warnings`. Only the CPU
   * runtime has them: with `runtime: "auto"` others are passed over, and one that is named is an OptionError. Default: `"auto"`, which is never `"int8"`.
   */
  weights?: "auto" | "lazy" | "folded" | "int8" | undefined;
  /**
   * How the CPU runtime holds the weights of T5's linear layers, in place of what `weights` says of them. `"stored"`: as they are in the checkpoint. `"int8"`: quantised, with a
   * scale for each 16 values, and computed with in float32, which takes 1.25 bytes a weight and changes the embedding by less than one hundredth. The first load of a
   * checkpoint writes them into the folder `weights` of `cache`. Only the CPU runtime has them: with `runtime: "auto"` others are
   * passed over, and one that is named is an OptionError. Weights that are in 8 bits already stay as they
   * are; where all of them are, it has no effect, and a warning says so. Nor has it without T5. Default: as `weights` says: `"stored"`, or multiplied in 8 bits with the others.
   */
  t5Weights?: "stored" | "int8" | undefined;
  /** At most so many pictures share a launch, of one request or of several; 1 to 256. Default: 8. */
  maxBatch?: number | undefined;
  /**
   * Numbers of pictures that a launch may have, 1 to 256 each, such as those that engines were compiled for; in place of
   * `maxBatch`. Default: 1, 2, 4, … up to `maxBatch`.
   */
  batches?: readonly number[] | undefined;
  /** Milliseconds that a launch that does not fill the device may be held back for others to share it; 0 to 60000. Default: 20. */
  maxWaitMs?: number | undefined;
  /** Pads every launch to so many pictures, 1 to 256, so that no bit of a picture depends on what else is drawn. Default: no padding. */
  pinBatch?: number | undefined;
  /** Requests that may wait, 0 to 1000000; more are refused with a QueueFullError. Default: 64. */
  maxQueue?: number | undefined;
  /**
   * Milliseconds, 1000 to 600000, that the runtime's process may give no sign of life while it owes an answer, until it is
   * replaced; requests that waited for it start again. Also the least time after which a launch counts as slow, which is
   * ten times its cost; one that takes five times as long is taken for hung: the process is replaced, and its request
   * fails with a RuntimeDiedError. The first launch of a kind may take sixty times as long. TensorRT cannot be replaced: with it
   * a slow launch is only reported. Of models that share a process on a GPU the shortest time counts. Default: 10000.
   */
  watchdogMs?: number | undefined;
  /**
   * Whether a request may name a picture (`image`, `mask`) by the path of a file of this machine. With `false` no request can,
   * whatever its own `allowPaths` says: for services, whose clients could otherwise have any file of the server read. Default: true.
   */
  allowPaths?: boolean | undefined;
  /**
   * Whether costs that are not known are measured in the background, while no request is under way. Where each batch
   * needs an engine, only if `batches` are named. Default: true.
   */
  measureCosts?: boolean | undefined;
  /** Receives warnings and notes; `console` is one. The library never prints. Default: none. */
  logger?: Logger | undefined;
  /** Aborts loading: the call rejects with `signal.reason`. */
  signal?: AbortSignal | undefined;
  /** Called as loading proceeds. */
  onProgress?: ((progress: LoadProgress) => void) | undefined;
}

/** What a model draws with where a request says nothing. */
export interface ModelDefaults {
  /** Whether the model was distilled to few steps without guidance: see `LoadOptions.distilled`. */
  readonly distilled: boolean;
  /** Sampler without `blocks`, `stages` and `ladder`, which are flowturbo's. */
  readonly sampler: SamplerName;
  /** Steps of that sampler; of a distilled model those of every sampler. */
  readonly steps: number;
  /** Scale of classifier-free guidance; 1 is none. */
  readonly guidanceScale: number;
}

/** One size of a run from coarse to fine. */
export interface Stage {
  /** Pixels; as `GenerateOptions.width`. Not below the stage before. */
  width: number;
  /** Pixels; as `GenerateOptions.height`. Not below the stage before. */
  height: number;
  /** Its schedule, such as `"H1P4R2"`. */
  blocks: string;
  /**
   * Noise level, above 0 and below 1, that the upscaled picture of the stage before is brought to; 0.3 to 0.75 is
   * sensible. Not for the first stage. Default: 0.6.
   */
  sigma?: number | undefined;
  /**
   * What is enlarged of the stage before. `"pixels"`: its finished picture, between a decode and an encode. `"latents"`: its
   * latents, without the autoencoder (arXiv 2507.08422): the stage before then ends at a noise level above 0 that follows from
   * `sigma` and both sizes, at twice the size σ / (2 − σ), and its blocks go only as far. Not for the first stage. Default: `"pixels"`.
   */
  upscale?: UpscaleName | undefined;
}

/** A LoRA of `LoadOptions.loras`. */
export interface LoraSource {
  /**
   * The adapter's .safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`. In the layout of diffusers and PEFT, or
   * that of kohya's sd-scripts, OneTrainer, ai-toolkit, SimpleTuner and ComfyUI.
   */
  file: string;
  /** How much of the adapter is added, −100 to 100; 1 is as it was trained. For a dynamic one: where a request says nothing. Default: 1. */
  scale?: number | undefined;
  /** What requests and pictures call it. Default: the name of the file without ".safetensors". */
  name?: string | undefined;
  /**
   * `false` merges it into the weights: W + scale · (alpha / rank) · B·A. `true` leaves the weights as they are: requests name it
   * (`GenerateOptions.loras`), each with its own scale. Default: false.
   */
  dynamic?: boolean | undefined;
}

/** A ControlNet of `LoadOptions.controlNets`. */
export interface ControlNetSource {
  /** Folder of a ControlNet in the diffusers layout: `config.json` of an `SD3ControlNetModel`, and its weights. */
  folder: string;
  /** What requests call it. Default: the name of the folder. */
  name?: string | undefined;
}

/** A LoRA of a request. */
export interface LoraUse {
  /** Name of one that `load` was given as dynamic. */
  name: string;
  /** How much of it is added, −100 to 100; 0 is as without it. Default: the scale that `load` was given. */
  scale?: number | undefined;
}

/** A ControlNet of a request, with its control picture. */
export interface Control {
  /** Name of a ControlNet that `load` was given, or where `allowPaths` is true the path of its folder. */
  folder: string;
  /** Picture that guides, of the kind that the ControlNet was trained with; resized to the size of each stage without keeping its aspect, as diffusers does. */
  image: PictureSource;
  /** For ControlNets of inpainting, and only for them: where to paint, white is drawn anew. Default: none. */
  mask?: PictureSource | undefined;
  /** What its residuals are multiplied by, −100 to 100; 0 is as without it. Default: 1. */
  scale?: number | undefined;
  /** Part of the steps, 0 to 1, before which it does not guide: step i of n does where i / n ≥ start. Default: 0. */
  start?: number | undefined;
  /** Part of the steps, 0 to 1, after which it does not guide: step i of n does where (i + 1) / n ≤ stop. Default: 1. */
  stop?: number | undefined;
  /** `"canny"` makes the control picture of `image`: its edges, white on black, found at the size that is drawn. Default: `image` is the control picture. */
  preprocess?: "canny" | undefined;
  /** Values that the pixels are encoded as, which the ControlNet was trained with: see `PixelRange`. Default: `"signed"`. */
  pixelRange?: PixelRange | undefined;
}

/**
 * Values of a control picture's pixels. `"signed"`: −1 to 1, as of nearly all ControlNets. `"stability_canny"`: 0.5 to 128 (x · 255 · 0.5 + 0.5 of
 * x from 0 to 1), as Stability's Canny ControlNet of SD3.5-large was trained, and no other that is known; its model card's
 * SD3CannyImageProcessor is the same.
 */
export type PixelRange = "signed" | "stability_canny";

/** Skip-layer guidance of a request: v = u + g·(c − u) + scale·(c − w), w the conditional velocity without some blocks of the transformer. */
export interface SkipLayers {
  /** Numbers of the blocks that are left out, from 0. For SD3.5-medium Stability recommends 7, 8 and 9. */
  layers: readonly number[];
  /** How far from the prediction without them, 0 to 100; 0 is as without skip-layer guidance. Default: 2.8. */
  scale?: number | undefined;
  /** Part of the steps, 0 to 1: step i of n is guided so where n·start < i < n·stop. Default: 0.01. */
  start?: number | undefined;
  /** See `start`. Default: 0.2. */
  stop?: number | undefined;
}

/** How texts are encoded: options of `ImageModel.generate` and of `ImageModel.encode`. */
export interface TextOptions {
  /**
   * What the second text encoder (CLIP-G) reads in place of `prompt`: one text for all prompts, or one for each. As diffusers' `prompt_2`.
   * Default: `prompt`.
   */
  prompt2?: string | readonly string[] | undefined;
  /**
   * What the third text encoder (T5) reads in place of `prompt`: one text for all prompts, or one for each. As diffusers' `prompt_3`. A
   * model without T5 has no use for it, which is a warning of the result. Default: `prompt`.
   */
  prompt3?: string | readonly string[] | undefined;
  /**
   * What the pictures should not show: one for all prompts, or one for each. Without guidance it has no effect, which is a warning of the
   * result. Default: `""`.
   */
  negativePrompt?: string | readonly string[] | undefined;
  /** As `prompt2`, of the negative prompt. Default: `negativePrompt`. */
  negativePrompt2?: string | readonly string[] | undefined;
  /** As `prompt3`, of the negative prompt. Default: `negativePrompt`. */
  negativePrompt3?: string | readonly string[] | undefined;
  /**
   * As diffusers' `clip_skip`: both CLIP encoders give the hidden states k layers before the last but one, hidden_states[−(k + 2)], a whole
   * number of at least 0 and below the layers of each. Of the prompt only: the negative prompt and the pooled embeddings stay as they
   * are. Values above 0 have graphs of their own, one of each encoder for all of them, with its weights once more. Default: 0.
   */
  clipSkip?: number | undefined;
  /**
   * Whether prompts may say how much their parts count, as the Python library compel has it: `(text:1.3)` or `(text)1.3`, from 0 to 100;
   * `(text)++`, `word++` and `word--` are 1.1 and 0.9 for each sign; groups in groups multiply; `\(` is a parenthesis. Each token is moved away
   * from the empty text's embedding, or below 1 towards it, and parts below 1 (16 of a text at most) are also blended with what the
   * encoders make of the text where no token attends to them. For that they have graphs of their own, with the weights once more.
   * Pooled embeddings are of the text without weights. Default: false.
   */
  promptWeighting?: boolean | undefined;
  /** Tokens of the T5 encoder, 1 to 512 and at most what its tokenizer takes. Default: 256, or what it takes if that is less. */
  maxSequenceLength?: number | undefined;
}

/** Options of `ImageModel.encode`. */
export interface EncodeOptions extends TextOptions {
  /** What to encode: a string, or several, which are rows. */
  prompt: string | readonly string[];
  /**
   * Dynamic LoRAs, as `GenerateOptions.loras`, with scales from −100 to 100: the texts are read with those that change text encoders. Give
   * `generate` the same. Default: none.
   */
  loras?: readonly LoraUse[] | undefined;
  /** Aborts: the call rejects with `signal.reason`. */
  signal?: AbortSignal | undefined;
}

/**
 * Embeddings of n prompts, as diffusers' `encode_prompt` returns them: what `ImageModel.encode` gives, and the option `promptEmbeds` of
 * `generate` takes. T tokens: those of CLIP (77) and those of T5 (zeros for a model without it).
 */
export interface PromptEmbeds {
  /** [n, T, joint], what the transformer attends to. */
  promptEmbeds: FloatTensor;
  /** [n, pooled], of both CLIP encoders. */
  pooledPromptEmbeds: FloatTensor;
  /** As `promptEmbeds`, of the negative prompts; `generate` needs it only with guidance. */
  negativePromptEmbeds?: FloatTensor | undefined;
  /** As `pooledPromptEmbeds`, of the negative prompts; together with `negativePromptEmbeds`. */
  negativePooledPromptEmbeds?: FloatTensor | undefined;
  /**
   * The dynamic LoRAs that changed the text encoders. Where `generate` is to draw with one that is not among them, with another
   * scale, or without one that is, a warning of its result says so. Default: none.
   */
  loras?: readonly LoraUse[] | undefined;
  /** As `GenerateResult.tokens.text`, which it becomes in turn. */
  tokens?: number | undefined;
  /** What the caller of `encode` should know, such as a prompt that was cut; `generate` takes no notice. */
  warnings?: readonly string[] | undefined;
}

/** Options of `ImageModel.generate`. */
export interface GenerateOptions extends TextOptions {
  /**
   * What to draw: a string, or several for one batch. Text encoders read a few hundred tokens; a warning says what of a longer
   * prompt they ignore. Of a word (what stands between white space) of more than 1024 characters the rest is ignored. Required, but with
   * `promptEmbeds`.
   */
  prompt?: string | readonly string[] | undefined;
  /**
   * Embeddings in place of texts, such as `encode` gives: `count` pictures are drawn for each row. Options that say how texts are encoded
   * are refused beside it. LoRAs that change text encoders too have to be given to `encode` as well. Default: none; `prompt` is encoded.
   */
  promptEmbeds?: PromptEmbeds | undefined;
  /** Pixels, a multiple of the autoencoder's factor and the patch size (16 for SD3). Default: the model's native width. */
  width?: number | undefined;
  /** Pixels, as `width`. Default: the model's native height. */
  height?: number | undefined;
  /**
   * How a number of steps becomes a schedule, of one evaluation a step but for heun. `"flowturbo"`: a schedule that was calibrated for the
   * model (`calibrate`), or else UniPC where guidance is mild and a multistep method that holds extrapolation back where it is strong; with
   * `blocks` any schedule, those of FlowTurbo (arXiv 2409.18128) among them. `"euler"`: as diffusers draws. `"dpmpp_2m"`: DPM-Solver++(2M), as diffusers'
   * DPMSolverMultistepScheduler with `use_flow_sigmas` (arXiv 2211.01095). `"unipc"`: UniPC of order 2, as its UniPCMultistepScheduler
   * (arXiv 2302.04867). `"heun"`: second order, two evaluations a step. Where the model's scheduler is of the class
   * of dpmpp_2m or unipc, order, solver type and last steps are those of its config; a config that they cannot follow is refused.
   * Default: `"flowturbo"`, or `"euler"` for a distilled model.
   */
  sampler?: SamplerName | undefined;
  /** Number of blocks, 1 to 1000. Default: 10 for flowturbo, 28 for euler and heun, 20 for dpmpp_2m and unipc; for a distilled model the steps that it was made for. */
  steps?: number | undefined;
  /**
   * Number of steps by what counts, for flowturbo: `"fast"` 6, `"balanced"` 10, `"best"` 20; for a distilled model half the steps that it was
   * made for, those, and 8, with euler. In place of `steps`. Where the model's
   * schedules.json has a `ladder`, its schedules count instead: `"best"` is the first, `"balanced"` the one in the middle (of an even
   * number the earlier one), `"fast"` the last; a named `grid: "calibrated"` passes over it. Default: the `steps` of the sampler.
   */
  quality?: QualityName | undefined;
  /**
   * The schedule itself, in place of `steps`: one letter a block from noise to image, each with an optional count, such as
   * `"H1P5R3"` or `"HPPPPPRRR"`. `E` Euler, `H` Heun, `A` Adams-Bashforth, `P` pseudo corrector, `R` velocity refiner, `C` refined midpoint (Adams-Bashforth with one evaluation of the refiner besides), `S` skip (no evaluation: it extrapolates
   * the last two velocities), `M` damped DPM-Solver++(2M), `D` DPM-Solver++(2M), `U` UniPC. At most 1000 blocks in 8192 characters.
   * Default: what the sampler makes.
   */
  blocks?: string | undefined;
  /**
   * Spacing of the noise levels: `"eased"`, denser at both ends and shifted further where few steps meet strong guidance; `"shifted"`, σ = s·u / (1 + (s − 1)·u) over an even u (Esser et al. 2024, section 5.3.2);
   * `"diffusers"`, those of its FlowMatchEulerDiscreteScheduler, or for dpmpp_2m and unipc of its scheduler of that kind (with heun the last step is then Euler's, as there); `"karras"`
   * (arXiv 2206.00364), `"exponential"` (even in log σ) and `"beta"` (arXiv 2407.12173), between the ends of that scheduler's. `"calibrated"` is what
   * was calibrated for the model, and is refused where nothing was.
   * Default: what was calibrated for the model, or `"eased"`, for flowturbo; `"shifted"` for heun and for `blocks`; otherwise `"diffusers"`.
   */
  grid?: GridName | "calibrated" | undefined;
  /**
   * Noise levels in place of `grid`: for each step the one where it starts, falling, above 0 and up to 1, such as `[1, 0.9, 0.5]`.
   * 0 at the end may be given or left out. As in diffusers they are shifted as the scheduler shifts; with `shift: 1` they are used as
   * they are. With a scheduler that has `shift_terminal` they are stretched after, so that the last one is that. Default: those of `grid`.
   */
  sigmas?: readonly number[] | undefined;
  /**
   * Shift s of the noise levels towards noise, 0.01 to 100: σ = s·u / (1 + (s − 1)·u). Default: the scheduler's `shift`, or
   * with `use_dynamic_shifting` what it makes of the picture's size.
   */
  shift?: number | undefined;
  /**
   * With a scheduler that has `use_dynamic_shifting`: its parameter μ, -10 to 10, in place of the one for the picture's size; the shift
   * is e^μ, or μ where `time_shift_type` is `"linear"`. Refused with other schedulers. Default: by the picture's size.
   */
  mu?: number | undefined;
  /**
   * Scale g of classifier-free guidance, 0 to 1000: the velocity is u + g·(c − u) for the unconditional u and the
   * conditional c. 1 or less turns it off and halves the work. A list has one scale for each step (with `stages`: of all stages
   * together; with `image`: of the whole schedule, of which `strength` leaves the end). What A and P reuse is guided with their own scale
   * where both steps are guided; other methods remember velocities as they were guided where they were computed. `R` blocks are guided
   * as the block before them. With one scale and no interval a calibrated schedule says which of its steps are guided, and by what multiple
   * of the scale; without calibration the default sampler takes less of one scale in steps that go far, the last above all (see the guide
   * to schedules). A list, given blocks and the other samplers take scales as they are. Default: 4.5, or 1 for a distilled model.
   */
  guidanceScale?: number | readonly number[] | undefined;
  /**
   * Where guidance begins, as a part of the steps from 0 to 1: of n steps those from ⌊n·start⌋ to ⌊n·stop⌋ − 1 are guided, as by
   * diffusers' guiders. The others draw with the prompt alone, at half the cost. An interval in which no step is guided is refused, and
   * `deadlineMs` leaves out schedules that have none. Below `guidanceStop`. Default: 0.
   */
  guidanceStart?: number | undefined;
  /** Where guidance ends, as a part of the steps from 0 to 1; see `guidanceStart`. Default: 1. */
  guidanceStop?: number | undefined;
  /**
   * `"cfg"`: classifier-free guidance. `"cfg_zero"`: CFG-Zero* (arXiv 2503.18886): u is scaled by ⟨u, c⟩ / ⟨u, u⟩ first, and the first step
   * is left out where it starts from noise (its velocity counts as zero), so that one step less is run. It does so without an `image`, and
   * with one where `strength` keeps the whole schedule and that begins at σ = 1. Default: `"cfg"`.
   */
  guidanceMode?: "cfg" | "cfg_zero" | undefined;
  /**
   * Skip-layer guidance, as `skip_guidance_layers` of diffusers' pipeline: a third row for each picture in some steps, half as much work
   * again. Only in steps that are guided. `layers` are numbers of blocks from 0; `start` and `stop` are parts of the steps, from 0 to 1. It sharpens what SD3.5-medium draws, and harms SD3.5-large. Default: none.
   */
  skipLayers?: SkipLayers | undefined;
  /** LoRAs of this request, of those that `load` was given as dynamic; each once, with a scale from −100 to 100. Default: none. */
  loras?: readonly LoraUse[] | undefined;
  /** ControlNets that guide this request, up to 8, in the steps of their intervals. Default: none. */
  controls?: readonly Control[] | undefined;
  /**
   * Seed of the first picture, a whole number from 0 to 18446744073709551615 (2⁶⁴ − 1); one above 9007199254740991, which a number cannot hold
   * exactly, as a BigInt or as text of digits. Picture k uses seed + k (0 follows the largest), from a generator of its own, so that it can be drawn again
   * alone. The noise is that of torch's CPU generator, which looks at the low 32 bits. Default: random.
   */
  seed?: number | bigint | string | undefined;
  /**
   * In place of `seed`: the seed of each picture, prompt by prompt, as many as there are pictures, from 0 to 18446744073709551615 each and given as
   * `seed` is. Refused beside `seed` and `noise`. Default: from `seed` on.
   */
  seeds?: readonly (number | bigint | string)[] | undefined;
  /** Pictures for each prompt; at most 1024 pictures in one call. Default: 1. */
  count?: number | undefined;
  /** Sizes to run through from coarse to fine, in place of width, height, sampler, steps, blocks, grid and sigmas. Default: one size. */
  stages?: readonly Stage[] | undefined;
  /** Picture to start from: turned upright, transparency on white, resized and cropped to cover the size. Default: none. */
  image?: PictureSource | undefined;
  /** Where to paint (inpainting): white, or opaque where it has an alpha channel, is drawn anew; the rest of `image` is kept. Default: all of it. */
  mask?: PictureSource | undefined;
  /**
   * Part of the schedule that runs on `image`, above 0 and up to 1: the first ⌊n − min(n·strength, n)⌋ of n blocks are
   * skipped, as in diffusers. Default: 0.6.
   */
  strength?: number | undefined;
  /** With `mask`: whether the kept part is the original pixel for pixel; otherwise it goes through the autoencoder. Default: true. */
  keepOriginal?: boolean | undefined;
  /**
   * With `mask`: draws only a part of `image`, so that small things get all of the model's pixels. As diffusers' `padding_mask_crop` it is the rectangle around
   * what is not black in the mask, with so many pixels more on each side (a whole number from 0), grown to the shape of `width` × `height`. It is drawn at that size and put back:
   * the pictures have the size of `image`, and outside the rectangle they are `image` to the pixel; inside too where the mask is black, mixed where it is grey, unless
   * `keepOriginal` is false. `latents`, `pixels` and previews are of the part. Default: all of `image` is drawn.
   */
  paddingMaskCrop?: number | undefined;
  /**
   * What step events show in `previews`: `"fast"`, a linear map of the latents to colours, one pixel a latent; or
   * `"decoded"`, the full decoder, which costs a decode for each block that shows one. Default: nothing.
   */
  preview?: "fast" | "decoded" | undefined;
  /**
   * With `preview`: at most so many steps have previews, 1 to 1000; only for those are they computed. Of n steps (of all stages
   * together) they are the k numbered ⌈i·n/(k + 1)⌉ for i = 1 to k, counted from 1, and never the last; k is this number, or n − 1 if that
   * is less. Events of the other steps have no previews. Default: every step.
   */
  previewCount?: number | undefined;
  /**
   * Whether step events hold the `latents` after the step, as diffusers gives them to `callback_on_step_end`. They are copied only if this is true and
   * events are listened to. Default: false.
   */
  stepLatents?: boolean | undefined;
  /**
   * `"image"`, or `"latent"`, as diffusers' `output_type`: the decoder is left out, in costs and time limits too. The result has no `images`, and `latents` whatever
   * `include` says, before any decoding: a part that a mask keeps is what the autoencoder makes of the original, since `keepOriginal` is about pixels.
   * Refused with `include` of `"pixels"`, and with `paddingMaskCrop`. Default: `"image"`.
   */
  outputType?: "image" | "latent" | undefined;
  /**
   * What the pictures' files say about themselves (`Picture.parameters`): `"parameters"`, what it takes to draw them again, such as
   * prompts, seed, size and schedule; `"full"`, the names of model, software and runtime too; `false`, nothing. Never a path.
   * Default: `"full"`.
   */
  metadata?: "full" | "parameters" | false | undefined;
  /** Starting noise [B, C, h, w] in place of a seed, with h and w in latents; one tensor, or one for each stage. Default: drawn from the seed. */
  noise?: FloatTensor | readonly FloatTensor[] | undefined;
  /**
   * Milliseconds from the call to the pictures, above 0 and up to 2³¹. Where `sampler`, `quality`, `steps`, `blocks`, `sigmas` and `stages`
   * leave the schedule open, one of the ladder that fits is taken, by measured costs and by `prefer`; if none fits the call rejects with a DeadlineError before
   * any work. Once accepted, a request is drawn to its end: new ones are accepted only as far as they do not make it late,
   * and a shorter schedule is taken if its turn comes late. If the machine is slower than it was measured, the pictures
   * still come, late (`stats().requests.late`). Use `timeoutMs` to end a call in any case. Default: no limit.
   */
  deadlineMs?: number | undefined;
  /**
   * Milliseconds from the call, above 0 and below 2³¹, after which it is stopped between two steps and rejects with a
   * TimeoutError at once, whatever it waits for. Default: no limit.
   */
  timeoutMs?: number | undefined;
  /**
   * With `deadlineMs`: schedules to choose from, the richest first; 1 to 64. Default: the ladder of the model's schedules.json, or what was
   * calibrated for it and the usual schedules of other numbers of steps.
   */
  ladder?: readonly string[] | undefined;
  /**
   * With `deadlineMs`: what counts more. `"admission"`: the richest schedule of the ladder that leaves room, within the same limit, for
   * the requests that are expected at the present load; on an idle model the richest that fits. `"quality"`: always the richest that
   * fits, even if later requests are refused for it. Default: `"admission"`.
   */
  prefer?: "admission" | "quality" | undefined;
  /**
   * Names the caller from one call to the next, 1 to 256 characters. One that was refused and comes back with the same ticket when it was told to
   * (`retryAfterMs`) has the room that it was told of: other calls leave it free, as far as such callers come. Default: none; room that is told of is then
   * kept for nobody.
   */
  ticket?: string | undefined;
  /** Order of requests, −100 to 100: higher numbers first, then earlier deadlines. Each 10 s of waiting raise it by one. Default: 0. */
  priority?: number | undefined;
  /** Pads every launch of this call to so many pictures, 1 to 256. Default: the option of `load`. */
  pinBatch?: number | undefined;
  /**
   * Values that the result holds besides the pictures. Those that are left out are not copied from the runtime; `[]` is for none. Latents
   * of SD3 are a twelfth of what is copied for the picture in any case. Default: `["latents"]`.
   */
  include?: readonly ("latents" | "pixels")[] | undefined;
  /**
   * Whether `image` and `mask` may be paths of files; `false` refuses a path with an OptionError before any file is looked at. Where
   * the option of `load` is false, true does not help. Default: true.
   */
  allowPaths?: boolean | undefined;
  /** Aborts between steps: the call rejects with `signal.reason`. One signal may serve any number of calls. */
  signal?: AbortSignal | undefined;
  /**
   * Called once, when the request has been accepted: a request that is refused has no events. Handlers are called one
   * at a time, in the order of the events. If one returns a promise, the next event waits for it, drawing does not, and
   * the call resolves after the last of them. An error that a handler throws, or a promise that it rejects, ends the call
   * with that error.
   */
  onAccept?: ((event: AcceptEvent, options: HandlerOptions) => unknown) | undefined;
  /** Called once, when the request's turn has come; as `onAccept`. */
  onStart?: ((event: StartEvent, options: HandlerOptions) => unknown) | undefined;
  /**
   * Called after each block, in order; as `onAccept`. No event is left out, but one that is overtaken while it waits
   * for a promise loses its `previews` and its `latents`.
   */
  onStep?: ((event: StepEvent, options: HandlerOptions) => unknown) | undefined;
  /**
   * When step events come: `"each"` as soon as the block is done, which takes a few percent of the speed of steps of a few
   * milliseconds; `"bunched"` those of 200 ms together, or earlier where launches are shared. A launch that is shared
   * is reported at once if one of its requests asks for it. Default: `"each"` with `preview` or `stepLatents`, otherwise `"bunched"`.
   */
  reports?: "each" | "bunched" | undefined;
}

/** What the handlers of events get besides the event. */
export interface HandlerOptions {
  /** Aborts when nobody waits for the handler any more, with what the call rejects with. */
  readonly signal: AbortSignal;
}

/** Sent when a request has been accepted: it will be drawn when its turn has come. */
export interface AcceptEvent {
  /** Milliseconds from the call to the pictures, as far as they can be predicted beside the other requests; null where costs are not known yet. */
  readonly predictedMs: number | null;
  /** Its place in the queue: 0 starts at once, 1 is the next of those that wait. Requests that go first may come later. */
  readonly place: number;
  /** The schedule, as `GenerateResult.blocks`; with a time limit a shorter one may be drawn in the end. */
  readonly blocks: string;
  /** Seed of each picture, a BigInt where a number would not be exact; empty if the noise was given. */
  readonly seeds: readonly Seed[];
  /** Milliseconds that it takes on an idle model, by measured costs; null where they are not known yet. */
  readonly aloneMs: number | null;
  /** As `aloneMs`, with the shortest schedule that its time limit leaves to choose; without a time limit the same. */
  readonly leastMs: number | null;
}

/** Sent when a request's turn has come. */
export interface StartEvent {
  /** Milliseconds from the call until now. */
  readonly queuedMs: number;
  /** The schedule that is drawn, as `GenerateResult.blocks`. */
  readonly blocks: string;
}

/** Sent after each finished block of a schedule. */
export interface StepEvent {
  /** Index of the block, from 0, over all stages. */
  readonly step: number;
  /** Number of blocks, over all stages. */
  readonly steps: number;
  /** Index of the stage, from 0. */
  readonly stage: number;
  /** Number of stages. */
  readonly stages: number;
  /** Letter of the block. */
  readonly block: Block;
  /** Noise level reached, from 1 (noise) to 0 (image). */
  readonly sigma: number;
  /** Milliseconds that the block took in the runtime. A launch that was shared counts in full. */
  readonly milliseconds: number;
  /**
   * If the option `preview` asks for them, and `previewCount` at this step: each picture as the run sees it now, the estimate x − σ·v. Those
   * of `"fast"` have one pixel for each latent. Otherwise empty, and where a later event came before the handler had time for this one.
   */
  readonly previews: readonly Picture[];
  /**
   * If the option `stepLatents` asks for them: x after the block at this noise level, [B, C, h, w] of the block's stage, as diffusers' `latents` at the end of a
   * step: with a mask, after the known region was put back. Those of the last block are `GenerateResult.latents`. Otherwise null, and where a later event came before
   * the handler had time for this one.
   */
  readonly latents: FloatTensor | null;
}

/** What a stream of a call has: its events, named by `type`, and at the end its result. */
export type GenerateEvent =
  | (AcceptEvent & { readonly type: "accept" })
  | (StartEvent & { readonly type: "start" })
  | (StepEvent & { readonly type: "step" })
  | { readonly type: "result"; readonly result: GenerateResult };

/**
 * A call of `generateStream`: an async iterator for one reader. Leaving it before its end, by `break`, `return()` or `await using`, aborts
 * the call and waits until it has ended.
 */
export interface GenerateStream extends AsyncIterable<GenerateEvent>, AsyncDisposable {
  /**
   * The next event. Events that nobody has asked for wait, any number of them; of the step events that wait only the newest keeps its
   * `previews` and `latents`.
   * @throws once, after the last event, what `generate` rejects with
   */
  next(): Promise<IteratorResult<GenerateEvent, undefined>>;
  /** Ends the call, unless it has ended, and gives up what waits. Resolves when it has ended. */
  return(): Promise<IteratorResult<GenerateEvent, undefined>>;
  /** The stream itself. */
  [Symbol.asyncIterator](): GenerateStream;
  /** As `return`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Where the time of a call went, in milliseconds. Launches that were shared count in full. */
export interface Timings {
  /** Loading the model; the same in every result of one model. */
  readonly load: number;
  /** Waiting to be let in. */
  readonly queue: number;
  /** Encoding the prompts; near 0 when all were cached. */
  readonly encode: number;
  /** Each block of the schedule, over all stages. */
  readonly steps: readonly number[];
  /** Upscaling pictures from one stage to the next. */
  readonly upscale: number;
  /** Encoding an original and keeping its known region. */
  readonly edit: number;
  /** Decoding latents to pixels. */
  readonly decode: number;
  /** The whole call, waiting included. */
  readonly total: number;
}

/** How a time limit was kept. Milliseconds count from the call. */
export interface DeadlineResult {
  /** The limit that was asked for. */
  readonly deadlineMs: number;
  /** The schedule that was chosen. */
  readonly blocks: string;
  /** Why that one, in a sentence. */
  readonly reason: string;
  /** What it was predicted to take. */
  readonly predictedMs: number;
  /** What it took. */
  readonly actualMs: number;
}

/** What launches cost on one of several devices. */
export interface DeviceCosts extends Pick<Costs, "entries" | "folder" | "drift" | "estimate"> {
  /** Its number, in the order of CUDA. */
  readonly number: number;
  /** Its name, as the driver says. */
  readonly name: string;
}

/** What launches cost, as it is known now: measured by `profile`, in the background, or while drawing. */
export interface Costs {
  /** One for each (graph, size, batch); graph "host" is what is not in launches. */
  readonly entries: readonly CostEntry[];
  /** Folder that the table is kept in. */
  readonly folder: string;
  /** How much slower launches are now than the table says, as a factor. */
  readonly drift: number;
  /** Milliseconds of a launch now, by the nearest batches that are known; null if nothing is known about it. */
  estimate(graph: string, size: string, batch: number): number | null;
  /**
   * Of a model that was loaded with `devices`: the table of each, in their order. All else here is of the first. Devices of one
   * kind keep their tables in one folder. Absent otherwise.
   */
  readonly devices?: readonly DeviceCosts[];
  /**
   * Forgets the table, of all devices, here and on disk, for other processes too: they drop theirs when they next store it or are idle. What is
   * needed is measured again. @throws the file system's error
   */
  reset(): Promise<void>;
}

/** One size of a run, as it was run. */
export interface StageResult {
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Its schedule, such as "H1P7R2". */
  readonly blocks: string;
  /** Its noise levels from 1 (noise) to 0 (image), one more than blocks. */
  readonly sigmas: readonly number[];
}

/** What a call of `generate` results in. B pictures: prompt by prompt, `count` for each. */
export interface GenerateResult {
  /** The pictures, B of them; none with `outputType` `"latent"`. */
  readonly images: readonly Picture[];
  /** Final latents, [B, C, H/f, W/f], as the transformer sees them; null where `include` leaves them out. */
  readonly latents: FloatTensor | null;
  /** Decoded values, [B, 3, H, W], nominally in [-1, 1], not clamped; null unless `include` asks for them. */
  readonly pixels: FloatTensor | null;
  /** Seed of each picture, a BigInt where a number would not be exact; empty if the noise was given. */
  readonly seeds: readonly Seed[];
  /** Pixels of the pictures; with `paddingMaskCrop` those of the original, and `stages` has what was drawn. */
  readonly width: number;
  /** Pixels, as `width`. */
  readonly height: number;
  /** The schedule that ran, such as "H1P7R2"; those of several stages follow each other after a space. */
  readonly blocks: string;
  /** Its noise levels, one more than blocks; stage after stage. */
  readonly sigmas: readonly number[];
  /** The sizes that were run through; one without the option `stages`. */
  readonly stages: readonly StageResult[];
  /** Evaluations of the two networks for one picture. */
  readonly evaluations: Evaluations;
  /** What the networks read, in tokens. */
  readonly tokens: {
    /**
     * Of the prompts, all of the call together: of each as many as the text encoder that reads most of it reads, special tokens
     * included and padding not. Negative prompts do not count, nor does how many pictures are drawn of a prompt.
     */
    readonly text: number;
    /** Patches of one picture in the transformer, at its final size. */
    readonly image: number;
  };
  /** Where the time went. */
  readonly timings: Timings;
  /** How the time limit was kept; null without one. */
  readonly deadline: DeadlineResult | null;
  /** What the caller should know, such as a prompt that was cut. */
  readonly warnings: readonly string[];
}

/**
 * The context of the tracing channel `flowturbo:generate` of `node:diagnostics_channel`: one object for each call of `generate`, filled in as
 * the call goes on.
 */
export interface GenerateTrace {
  /** What the call does, by OpenTelemetry's name for it. */
  readonly operation: "generate_content";
  /** As `ImageModel.name`. */
  readonly model: string;
  /** Name of the runtime that it runs on. */
  readonly runtime: string;
  /** The W3C header `traceparent` of the request that is answered, as `withTraceparent` was told it; null without one. */
  readonly traceparent: string | null;
  /** The options as they were given, prompts and pictures among them. */
  readonly options: GenerateOptions;
  /** Pictures that are drawn. This and what follows is absent until it is known. */
  readonly pictures?: number;
  /** Seed of each picture, as `GenerateResult.seeds`. */
  readonly seeds?: readonly Seed[];
  /** Pixels. */
  readonly width?: number;
  /** Pixels. */
  readonly height?: number;
  /** Blocks of the schedule, over all stages; from when it is accepted. With a time limit fewer may be drawn in the end. */
  readonly steps?: number;
  /** The schedule, as `GenerateResult.blocks`; as `steps`. */
  readonly blocks?: string;
  /** What the call results in. */
  readonly result?: GenerateResult;
  /** What the call rejects with: an error, or the reason of an abort. */
  readonly error?: unknown;
}

/** The context of the tracing channel `flowturbo:queue`: a call from when it is accepted until its turn has come. */
export interface QueueTrace {
  /** The call's own context. */
  readonly generate: GenerateTrace;
  /** As `AcceptEvent.place`. */
  readonly place: number;
  /** As `AcceptEvent.predictedMs`. */
  readonly predictedMs: number | null;
  /** As `StartEvent.queuedMs`; absent until its turn has come. */
  readonly queuedMs?: number;
  /** What ended the call before its turn came. */
  readonly error?: unknown;
}

/**
 * The context of the tracing channel `flowturbo:launch`: a launch with pictures or texts of a call, when it is over. One that several calls
 * share is published for each of them.
 */
export interface LaunchTrace {
  /** The call's own context. */
  readonly generate: GenerateTrace;
  /** Name of the graph that was launched. */
  readonly graph: string;
  /** What it ran on besides rows, such as "64x64", in pixels, or "77 tokens". */
  readonly size: string;
  /** Rows that were computed: those of all calls in it, and padding. A row is one picture or text. */
  readonly batch: number;
  /** Rows of all calls in it, without padding. */
  readonly rows: number;
  /** How long it took, all rows together. It ended about when this is published. */
  readonly milliseconds: number;
}

/** Sent while costs are measured. */
export interface ProfileProgress {
  /** Launches that are done. */
  readonly done: number;
  /** Launches that there will be at most. */
  readonly total: number;
}

/** A size of pictures, in pixels. */
export interface Size {
  /** Pixels. */
  width: number;
  /** Pixels. */
  height: number;
}

/** Options of `FlowTurbo.profile`. */
export interface ProfileOptions {
  /** Sizes of pictures. Default: the model's native size. */
  sizes?: readonly Size[] | undefined;
  /** Numbers of pictures in a launch, 1 to 256 each. Default: 1, 2, 4, 8. */
  batches?: readonly number[] | undefined;
  /** Steps with classifier-free guidance, without, or both; a number from 0 is a guidance scale, which says whether there is guidance. Default: `"on"`, or `"off"` for a distilled model. */
  guidance?: "on" | "off" | "both" | number | undefined;
  /** How guided steps are guided: as the option of `generate`. Each mode has launches of its own. Default: `"cfg"`. */
  guidanceMode?: "cfg" | "cfg_zero" | undefined;
  /** Measures steps with these dynamic LoRAs together, too, by their names. Which they are does not matter, but for the rank that they need together. Default: none. */
  loras?: readonly string[] | undefined;
  /** Measures steps with these ControlNets together, too, by their names. Default: none. */
  controls?: readonly string[] | undefined;
  /** Measures guided steps with skip-layer guidance that leaves out these blocks, too. With `loras` and `controls`: steps that have all of it. Default: none. */
  skipLayers?: readonly number[] | undefined;
  /** Timed runs of each launch, 1 to 1000. Default: 9. */
  rounds?: number | undefined;
  /** Forgets the table before: also what was measured at other sizes and batches. Default: false. */
  reset?: boolean | undefined;
  /** Tokens of the T5 encoder, 1 to 512 and at most what its tokenizer takes. Default: 256, or what it takes if that is less. */
  maxSequenceLength?: number | undefined;
  /** Aborts measuring: the call rejects with `signal.reason`. */
  signal?: AbortSignal | undefined;
  /** Called as measuring proceeds. */
  onProgress?: ((progress: ProfileProgress) => void) | undefined;
}

/** Options of `FlowTurbo.calibrate`. */
export interface CalibrateOptions {
  /** Sizes of pictures. Default: the model's native size. */
  sizes?: readonly Size[] | undefined;
  /** Guidance scales, 1 to 1000; 1 is without guidance. Scales between two of them are interpolated. Default: `[4.5]`. */
  guidanceScales?: readonly number[] | undefined;
  /** Numbers of steps, 2 to 28 each. Default: 3 to 12. */
  steps?: readonly number[] | undefined;
  /**
   * Whether schedules are found too that leave the first or the last steps without guidance, which costs half as much: one for each number of
   * steps, and further ones as long as they come nearer than all of no more rows. `steps` and `quality` draw with the nearest of their
   * number of steps, `deadlineMs` chooses from all, and requests whose `guidanceStart`, `guidanceStop` or list of scales guides the same steps draw
   * with them. Steps without guidance are other graphs: `compile` and `profile` of a model with such schedules include them. Default: true.
   */
  intervals?: boolean | undefined;
  /**
   * What the pictures show that schedules are fitted to: at least 2 prompts such as the model will be used with, as many as there are pictures at
   * most. The first two fifths of them are fitted to, the next fifth decides between fits, and the rest says how near they come. Default: `prompts.txt` in the model's folder, one a line, or a list of the package's.
   */
  prompts?: readonly string[] | undefined;
  /** Pictures that are fitted to, 2 to 256; half as many decide between fits, and as many say how near they come. Default: 16. */
  pictures?: number | undefined;
  /** Seed of the first picture, as `GenerateOptions.seed`. Default: 0. */
  seed?: number | bigint | string | undefined;
  /** Pictures in a launch, 1 to 256. Default: 8, or 1 where each batch needs an engine. */
  batch?: number | undefined;
  /**
   * File to write. A model reads no other than its own: put it into the model's folder as `schedules.json`. Default: that file, or one in
   * the cache, which is read too, if that folder cannot be written.
   */
  file?: string | undefined;
  /**
   * Fits again what the file holds already, in place of going on. What it holds of other `pictures`, `seed`, `prompts` or
   * `maxSequenceLength` than those that are named is fitted again in any case. Default: false.
   */
  reset?: boolean | undefined;
  /** Tokens of the T5 encoder, 1 to 512 and at most what its tokenizer takes. Default: 256, or what it takes if that is less. */
  maxSequenceLength?: number | undefined;
  /** Aborts calibrating: the call rejects with `signal.reason`. What was found until then is kept. */
  signal?: AbortSignal | undefined;
  /** Called as calibrating proceeds. */
  onProgress?: ((progress: CalibrateProgress) => void) | undefined;
}

/** Sent while a model is calibrated. */
export interface CalibrateProgress {
  /** `reference`: runs of many steps; `fitting`: a schedule is fitted to them. */
  readonly phase: "reference" | "fitting";
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Guidance scale of the present schedules. */
  readonly guidanceScale: number;
  /** Schedules and references that are done, of a reference under way its part. */
  readonly done: number;
  /** Schedules that were asked for, and a reference for each size and scale. */
  readonly total: number;
  /** Launches of this calibration so far, of at most `batch` pictures each. */
  readonly launches: number;
}

/** A calibrated schedule as schedules.json holds it. */
export interface CalibratedEntry {
  /** Pixels of the pictures that it was fitted to. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Guidance scale that it was fitted to; 1 for none. */
  readonly guidanceScale: number;
  /** For each step whether it is guided. */
  readonly guided: readonly boolean[];
  /** Rows of the transformer for a picture: two for a guided step. */
  readonly rows: number;
  /** For each step the guidance scale that it runs with, as a multiple of `guidanceScale`; absent where all are 1. */
  readonly scales?: readonly number[] | undefined;
  /** Noise levels, one more than steps, from 1 to 0. */
  readonly sigmas: readonly number[];
  /** For each step the weights of the velocity that it evaluates, of the one before and of the one before that. */
  readonly weights: readonly (readonly [now: number, old: number, older: number])[];
  /** Whether the model's refiner, if it has one, corrects the last step (a block C): it was trained for this schedule. Absent for false. */
  readonly refined?: boolean | undefined;
  /** Mean PSNR to the reference of 100 evaluations, dB. */
  readonly psnr: {
    /** Of the pictures that it was fitted to. */
    readonly fitted: number;
    /** Of pictures that were neither fitted to nor decided between fits. */
    readonly held: number;
    /** Of the latter with the usual schedule of as many steps, the same of them guided. */
    readonly uncalibrated: number;
  };
  /** Pictures that it was fitted to. */
  readonly pictures: number;
  /** Seed of the first of them; text of digits where a number would not be exact. */
  readonly seed: number | string;
  /** Digest of the prompts that they show. */
  readonly prompts: string;
}

/** What `FlowTurbo.calibrate` gives. */
export interface Calibration {
  /** The file that holds the schedules. */
  readonly file: string;
  /** The schedules for all that was asked for. */
  readonly schedules: readonly CalibratedEntry[];
}

/** Sent while engines are compiled. */
export interface EngineProgress {
  /** Name of the engine's graph. */
  readonly graph: string;
  /** Index of the engine, from 0. */
  readonly engine: number;
  /** Number of engines. */
  readonly engines: number;
  /** `weights`: their digest is computed; `waiting`: for memory, or for another process that builds the same engine. */
  readonly phase: "weights" | "waiting" | "building" | "done";
  /** What the library says that it does. */
  readonly detail: string;
  /** Progress of this engine in steps, from 0 to `total`; never decreases. */
  readonly done: number;
  /** Steps of an engine; constant. */
  readonly total: number;
}

/** Options of `compileEngines`. */
export interface CompileEnginesOptions {
  /** Library to build with. Default: `"auto"`, the first that can build here. */
  runtime?: "auto" | BuilderName | undefined;
  /** Folder with the library. Default: looked for in the environment, in Python's packages and on the loader's path. */
  tensorrtFolder?: string | undefined;
  /** Precision variant of the weight files to read, such as `"fp16"`. Default: the files without a variant. */
  variant?: string | undefined;
  /**
   * Whether T5, the third and largest text encoder, is used where the model has it. `false` leaves it out, as
   * `text_encoder_3=None` does in diffusers: its part of the context is zeros, and neither its files nor its tokenizer's are read. No engine is built for it. Default: true.
   */
  textEncoder3?: boolean | undefined;
  /**
   * For a checkpoint in one file: a folder in the diffusers layout, from which is taken what the file does not hold or say (text encoders,
   * VAE, tokenizers, scheduler, numbers of heads), or a model of the hub as `owner/name` or `owner/name@revision`, of which that alone is
   * downloaded; a path of that name comes first. Its transformer's weights may be missing. A CheckpointError for a folder whose
   * configurations are not those of the file's shapes, and for a model that is a folder itself; a HubError if it cannot be downloaded.
   * Default: the values of the public SD3 and SD3.5 models, and the tokenizers that come with the package.
   */
  base?: string | undefined;
  /** As the option of `load`: builds the engines of that autoencoder too. Default: the engines of the model alone. */
  previewVae?: string | undefined;
  /** Sizes of pictures. Default: the model's native size. */
  sizes?: readonly Size[] | undefined;
  /** Numbers of pictures in a launch, 1 to 1024 each. Default: 1. */
  batches?: readonly number[] | undefined;
  /** Compute capabilities to build for, such as `"8.9"`; TensorRT-RTX only. Default: that of the present GPU. */
  targets?: readonly string[] | undefined;
  /** Steps with classifier-free guidance, without, or both; a number from 0 is a guidance scale, which says whether there is guidance. Default: `"on"`, or `"off"` for a distilled model. */
  guidance?: "on" | "off" | "both" | number | undefined;
  /** How guided steps are guided: as the option of `generate`. Each mode has engines of its own. Default: `"cfg"`. */
  guidanceMode?: "cfg" | "cfg_zero" | undefined;
  /** LoRAs that are merged into the weights, as the option of `load`: engines hold weights; scales from −100 to 100. Dynamic ones need `lorasRank` alone. Default: none. */
  loras?: readonly LoraSource[] | undefined;
  /** Also the engines of steps with dynamic LoRAs of up to this rank: 8, 16, 32, 64 or 128. Default: none. */
  lorasRank?: LoraRank | undefined;
  /** Also the engines of steps with these ControlNets together: folders. Default: none. */
  controls?: readonly string[] | undefined;
  /** Also the engines of steps with skip-layer guidance that leaves out these blocks. Default: none. */
  skipLayers?: readonly number[] | undefined;
  /** Also what only some pictures need: stages, editing, previews. Default: none. */
  features?: readonly Feature[] | undefined;
  /** Tokens of the T5 encoder, 1 to 512 and at most what its tokenizer takes. Default: 256, or what it takes if that is less. */
  maxSequenceLength?: number | undefined;
  /** Folder of the cache: engines are in `engines`. Default: `$XDG_CACHE_HOME/flowturbo`, or `~/.cache/flowturbo`. */
  cache?: string | undefined;
  /** Engines that are built at the same time, 1 to 64. Default: 1. */
  jobs?: number | undefined;
  /** Bytes of memory that builds may take, above 0. Default: what is available. */
  memory?: number | undefined;
  /** Aborts compiling: the call rejects with `signal.reason`; nothing partial stays. */
  signal?: AbortSignal | undefined;
  /** Called as compiling proceeds. */
  onProgress?: ((progress: EngineProgress) => void) | undefined;
}

export type { RuntimeChoice };
