/**
 * A model that waits in place of computing, for tests and benchmarks of many processes on few cores. All of it is the product's own (a
 * checkpoint, settling, programs, costs, service, pictures) but for the runtime: a launch takes a time that is given, of the clock and not of the
 * processor, and its values are made of a digest of what each row reads. So a picture is a function of its settled request, as with any runtime:
 * the same alone and beside others, and another one for another prompt, seed, size or schedule.
 */

import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { elementCount, type Tensor } from "../../lib/common/tensor.js";
import { DisposedError, RuntimeError } from "../../lib/errors.js";
import { embeddedModel, FlowTurbo } from "../../lib/flowturbo.js";
import type { LoadOptions, Size } from "../../lib/model.js";
import { graphKey, type Network, networks } from "../../lib/networks/index.js";
import { cpuEmitOptions, type OnnxGraph } from "../../lib/onnx/index.js";
import type { Constant, CopyRows, Launch, Program, Register, StoredConstant } from "../../lib/program/program.js";
import { runtimes } from "../../lib/runtimes/index.js";
import {
  type Capabilities,
  type CompilableGraph,
  Preempted,
  type RunOptions,
  type Runtime,
  type RuntimeRow,
  type SubmissionOptions,
  type Workspace,
} from "../../lib/runtimes/runtime.js";
import { isPerRow } from "../../lib/serving/rows.js";
import { batchesUpTo } from "../../lib/serving/service.js";

/** A launch that is about to take its time. */
export interface WaitingLaunch {
  /** Such as `predict.guidance`. */
  readonly graph: string;
  /** Rows that it computes, padding included. */
  readonly rows: number;
  /** Milliseconds that it takes. */
  readonly milliseconds: number;
}

export interface WaitingOptions extends Omit<LoadOptions, "runtime"> {
  /** Milliseconds of the launch of a step, whatever its rows. Text encoders take a quarter, the autoencoder a half, arithmetic without weights a twentieth. */
  readonly msPerLaunch: number;
  /** Milliseconds that each row adds at the native size; in proportion to the pixels at others. */
  readonly msPerRow: number;
  /** Everything takes this part of its time: 2 is twice as fast. Default: 1. */
  readonly speed?: number;
  /** What the model is called. A name with "turbo" or the like in it makes a distilled model of it, as any folder's does. Default: that of the embedded model. */
  readonly name?: string;
  /** Side of its native size in pixels: a multiple of 8, at most 256, for which the embedded model has positions. Default: 64. */
  readonly nativeSide?: number;
  /** Whether submissions can be preempted: so it is with ONNX Runtime, and not with TensorRT. Default: true. */
  readonly preemption?: boolean;
  /** Folder of costs, which processes may share: one of them measures. Default: one of its own, which is removed as the process ends. */
  readonly cache?: string;
  /** Sizes whose costs are known besides those of the native size. Others become known as anywhere: before a promise, and while the model is idle. */
  readonly sizes?: readonly Size[];
  /** Called before each launch of a request: what it returns are the milliseconds that it takes in place of the usual ones; what it throws, the launch fails with. */
  readonly onLaunch?: (launch: WaitingLaunch) => number | undefined;
}

/**
 * Loads the embedded model on a runtime that waits, with costs that are known. To be disposed of like any other.
 * @throws RangeError for launches that take no time, or a size for which there are no positions
 */
export async function loadWaiting(options: WaitingOptions): Promise<FlowTurbo> {
  const { msPerLaunch, msPerRow, speed = 1, name, nativeSide, preemption = true, onLaunch, ...rest } = options;
  const { sizes = [], cache = ownFolder("cache"), ...load } = rest;
  if (
    !(msPerLaunch >= 0 && msPerRow >= 0 && msPerLaunch + msPerRow > 0 && speed > 0 && speed < Number.POSITIVE_INFINITY)
  )
    throw new RangeError("A launch has to take some time.");
  const folder = name === undefined && nativeSide === undefined ? embeddedModel : variant(name, nativeSide);
  const capabilities: Capabilities = { preemption, capture: false, anyShape: true };
  const settings = { msPerLaunch, msPerRow, speed, nativeSide: nativeSide ?? null };
  const open = (waits: boolean, more: LoadOptions) => {
    const row: RuntimeRow = {
      ...{ name: "waiting", runsOn: "nothing", capabilities },
      open: async () => ({
        runtime: new WaitingRuntime(capabilities, settings, waits, waits ? onLaunch : undefined),
        // Tables of costs are kept by these.
        settings: { version: 1, ...settings },
        device: null,
        emitOptions: () => cpuEmitOptions,
      }),
      find: async () => ({ name: "waiting", available: true, version: "1", reason: null, remedy: null }),
    };
    return inPlaceOf(place, row, () => FlowTurbo.load(folder, { ...more, cache, runtime: place }));
  };
  const profiled = JSON.stringify([folder, cache, settings, load.maxBatch, load.batches, sizes]);
  if (!known.has(profiled)) {
    // By another model, so that this one has counted nothing yet.
    await using model = await open(false, { measureCosts: false });
    const batches = load.batches ?? batchesUpTo(load.maxBatch ?? 8);
    const wanted = [model.nativeSize, ...sizes];
    const isKnown = wanted.every(
      ({ width, height }) =>
      batches.every((batch) => model.costs.entries.some(({ graph, size, batch: rows }) => graph === "predict.guidance" && size === `${width}x${height}` && rows === batch)), // biome-ignore format: one line
    );
    if (!isKnown) await model.profile({ sizes: wanted, batches: [...batches], rounds: 1 });
    known.add(profiled);
  }
  return open(true, load);
}

/** What has been measured in this process. */
const known = new Set<string>();

/** The runtime whose name it is loaded by: options name rows that the table had from the beginning. */
const place = "webgpu";

let turn: Promise<unknown> = Promise.resolve();

/** One after another: a row is in another's place for as long as a model is loaded. */
function inPlaceOf<T>(name: string, row: RuntimeRow, work: () => Promise<T>): Promise<T> {
  const done = turn.then(async () => {
    const usual = runtimes[name]!;
    runtimes[name] = row;
    try {
      return await work();
    } finally {
      runtimes[name] = usual;
    }
  });
  turn = done.catch(() => undefined);
  return done;
}

let own: string | undefined;

/** A folder of this process. */
function ownFolder(name: string): string {
  if (own === undefined) {
    removeOld();
    own = mkdtempSync(path.join(os.tmpdir(), prefix));
    process.once("exit", () => rmSync(own!, { recursive: true, force: true }));
  }
  const folder = path.join(own, name);
  mkdirSync(folder, { recursive: true });
  return folder;
}

const prefix = "flowturbo-waiting-";

/** Removes what processes that were killed have left: no test and no benchmark takes a day. */
function removeOld(): void {
  for (const name of readdirSync(os.tmpdir())) {
    const folder = path.join(os.tmpdir(), name);
    const made = name.startsWith(prefix) ? statSync(folder, { throwIfNoEntry: false })?.mtimeMs : undefined;
    if (made !== undefined && Date.now() - made > 24 * 3600_000) rmSync(folder, { recursive: true, force: true });
  }
}

/** The embedded model by another name, or with another native size: links to its files. */
function variant(name = path.basename(embeddedModel), nativeSide?: number): string {
  const folder = path.join(ownFolder(`models/${nativeSide ?? ""}`), name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder);
  const link = (...parts: string[]) => symlinkSync(path.join(embeddedModel, ...parts), path.join(folder, ...parts));
  // Its schedules are for its own size.
  const left = ["transformer", ...(nativeSide === undefined ? [] : ["schedules.json"])];
  for (const part of readdirSync(embeddedModel)) if (!left.includes(part)) link(part);
  mkdirSync(path.join(folder, "transformer"));
  for (const file of readdirSync(path.join(embeddedModel, "transformer"))) {
    if (file !== "config.json" || nativeSide === undefined) {
      link("transformer", file);
      continue;
    }
    const config = JSON.parse(readFileSync(path.join(embeddedModel, "transformer", file), "utf8"));
    config.sample_size = nativeSide / pixelsOfLatent;
    if (!Number.isInteger(config.sample_size / config.patch_size) || nativeSide > 256)
      throw new RangeError(`The embedded model has no positions for ${nativeSide} pixels.`);
    writeFileSync(path.join(folder, "transformer", file), JSON.stringify(config));
  }
  return folder;
}

/** Of the embedded model: pixels of an element of its latents, along a side. */
const pixelsOfLatent = 4;

/** What a kind of network takes of the time of a step. */
const shares: Record<Network["role"], number> = { step: 1, image: 1 / 2, text: 1 / 4, edit: 1 / 20 };

interface WaitingSettings {
  readonly msPerLaunch: number;
  readonly msPerRow: number;
  readonly speed: number;
  readonly nativeSide: number | null;
}

/** What is known of a graph. */
interface Shape {
  readonly share: number;
  /** A number of its name. */
  readonly digest: number;
  /** An output that has one row for each row of a launch; null where there is none. */
  readonly output: string | null;
  /** Inputs that have a row, or a group of rows, for each. */
  readonly perRow: ReadonlySet<string>;
}

/** A register or constant: a digest for each of its rows, in place of values. */
interface Held {
  readonly rows: Uint32Array;
  readonly shape: readonly number[];
}

class WaitingRuntime implements Runtime {
  readonly name = "waiting";
  readonly capabilities: Capabilities;
  readonly #settings: WaitingSettings;
  readonly #waits: boolean;
  readonly #onLaunch: WaitingOptions["onLaunch"];
  readonly #nativeArea: number;
  readonly #graphs = new Map<string, Shape>();
  #turn: Promise<unknown> = Promise.resolve();
  /** The moment at which it is done with what it was given: launches follow each other on time, however late timers are. */
  #free = 0;
  #isDisposed = false;

  /** @param waits whether launches take their time, or only say that they did */
  constructor(
    capabilities: Capabilities,
    settings: WaitingSettings,
    waits: boolean,
    onLaunch: WaitingOptions["onLaunch"],
  ) {
    this.capabilities = capabilities;
    this.#settings = settings;
    this.#waits = waits;
    this.#onLaunch = onLaunch;
    this.#nativeArea = ((settings.nativeSide ?? 64) / pixelsOfLatent) ** 2;
  }

  add(graph: CompilableGraph): void {
    const { name, inputs, outputs } = graph as OnnxGraph;
    const perRow = [...inputs].filter(([, dimensions]) => isPerRow(dimensions)).map(([input]) => input);
    this.#graphs.set(name, {
      share: shares[networks[graphKey(name).network]!.role],
      digest: digestOfText(name),
      output: [...outputs].find(([, dimensions]) => dimensions[0] === "rows")?.[0] ?? null,
      perRow: new Set(perRow),
    });
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  /** Measuring, and the fit of the preview's colours: they take no time, so that costs are known at once. */
  async run(program: Program, { signal, onBegin, onLaunch }: RunOptions = {}): Promise<Record<string, Tensor>> {
    this.#checkOpen();
    signal?.throwIfAborted();
    const values = new Map<string, Held>();
    this.#begin(program, values);
    onBegin?.();
    let index = 0;
    for (const instruction of program.instructions) {
      if (instruction.op === "copy") copy(instruction, program, values);
      else {
        const { milliseconds } = this.#cost(instruction, program, values);
        this.#compute(instruction, program, values);
        onLaunch?.({
          launch: instruction,
          index: index++,
          milliseconds,
          values: reported(instruction, program, values),
        });
      }
    }
    return resultsOf(program, program.results, values);
  }

  open(): Workspace {
    this.#checkOpen();
    const values = new Map<string, Held>();
    return {
      lost: false,
      submit: (program, options = {}) => {
        this.#checkOpen();
        const given = performance.now();
        const done = this.#turn.then(() => this.#work(program, options, values, given));
        this.#turn = done.catch(() => undefined);
        return done;
      },
      free: (names) => {
        this.#turn = this.#turn.then(() => {
          for (const name of names) values.delete(name);
        });
      },
      close: () => values.clear(),
    };
  }

  async dispose(): Promise<void> {
    this.#isDisposed = true;
    await this.#turn;
  }

  #checkOpen(): void {
    if (this.#isDisposed) throw new DisposedError("The waiting runtime");
  }

  async #work(
    program: Program,
    { signal, preempt, onBegin, onLaunch }: SubmissionOptions,
    values: Map<string, Held>,
    given: number,
  ): Promise<Record<string, Tensor>> {
    this.#checkOpen();
    signal?.throwIfAborted();
    onBegin?.();
    this.#begin(program, values);
    // It was there when the one before ended, though this process may have been told later.
    this.#free = Math.max(this.#free, given);
    let index = 0;
    for (const instruction of program.instructions) {
      if (instruction.op === "copy") {
        copy(instruction, program, values);
        continue;
      }
      signal?.throwIfAborted();
      this.#checkOpen();
      if (this.capabilities.preemption && preempt?.aborted) {
        const written = program.results.filter((name) => values.has(name));
        throw new Preempted(index, resultsOf(program, written, values));
      }
      const launch = this.#cost(instruction, program, values);
      const milliseconds = this.#onLaunch?.(launch) ?? launch.milliseconds;
      this.#free += milliseconds;
      if (this.#waits) await until(this.#free);
      this.#compute(instruction, program, values);
      onLaunch?.({ launch: instruction, index: index++, milliseconds, values: reported(instruction, program, values) });
    }
    return resultsOf(program, program.results, values);
  }

  #begin({ constants }: Program, values: Map<string, Held>): void {
    for (const name in constants) values.set(name, heldOf(constants[name]!));
  }

  #cost({ graph, inputs, outputs }: Launch, program: Program, values: Map<string, Held>): WaitingLaunch {
    const { share, output } = this.#shape(graph);
    const { msPerLaunch, msPerRow, speed } = this.#settings;
    const rows = output === null ? 1 : program.registers[outputs[output]!]!.shape[0]!;
    // The autoencoder has pixels on one side and latents on the other: these count.
    let area = Number.POSITIVE_INFINITY;
    const see = (shape: readonly number[] | undefined) => {
      if (shape?.length === 4) area = Math.min(area, shape[2]! * shape[3]!);
    };
    for (const input in inputs) see(values.get(inputs[input]!)?.shape);
    for (const output in outputs) see(program.registers[outputs[output]!]!.shape);
    const size = Number.isFinite(area) ? area / this.#nativeArea : 1;
    return { graph, rows, milliseconds: (share * (msPerLaunch + rows * msPerRow * size)) / speed };
  }

  /** Digests of what a launch writes: for each row of all that the row reads, and of nothing else. */
  #compute({ graph, inputs, outputs }: Launch, program: Program, values: Map<string, Held>): void {
    const { digest, output, perRow } = this.#shape(graph);
    const batch = output === null ? 1 : program.registers[outputs[output]!]!.shape[0]!;
    const made = new Uint32Array(batch).fill(digest);
    for (const input in inputs) {
      const rows = values.get(inputs[input]!)?.rows;
      if (!rows) throw new RuntimeError(`"${inputs[input]}" has no value.`);
      const name = digestOfText(input);
      const isShared = !perRow.has(input);
      const groups = isShared ? rows.length : rows.length / batch;
      for (let index = 0; index < batch; index++) {
        let own = name;
        for (let part = 0; part < groups; part++) own = mixed(own, rows[isShared ? part : part * batch + index]!);
        // In whatever order the inputs come.
        made[index]! += own;
      }
    }
    for (const output in outputs) {
      const { shape } = program.registers[outputs[output]!]!;
      const groups = shape[0]! / batch;
      const rows = new Uint32Array(shape[0]!);
      const name = digestOfText(output);
      for (let part = 0; part < groups; part++)
        for (let index = 0; index < batch; index++) rows[part * batch + index] = mixed(mixed(made[index]!, name), part);
      values.set(outputs[output]!, { rows, shape });
    }
  }

  #shape(graph: string): Shape {
    const shape = this.#graphs.get(graph);
    if (!shape) throw new RuntimeError(`There is no graph "${graph}".`);
    return shape;
  }
}

/** Resolves at a moment, to a millisecond; at once where it has passed. */
function until(moment: number): Promise<void> | undefined {
  const milliseconds = Math.round(moment - performance.now());
  return milliseconds <= 0 ? undefined : new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function copy({ from, fromRow, to, toRow, rows }: CopyRows, program: Program, values: Map<string, Held>): void {
  const source = values.get(from);
  if (!source) throw new RuntimeError(`"${from}" has no value.`);
  let target = values.get(to);
  if (!target) {
    const { shape } = program.registers[to]!;
    target = { rows: new Uint32Array(shape[0]!), shape };
    values.set(to, target);
  }
  for (let row = 0; row < rows; row++) target.rows[toRow + row] = source.rows[fromRow + row]!;
}

function reported(launch: Launch, program: Program, values: Map<string, Held>): Record<string, Tensor> {
  return launch.reported ? resultsOf(program, launch.reported, values) : none;
}
const none = {};

function resultsOf(program: Program, names: readonly string[], values: Map<string, Held>): Record<string, Tensor> {
  const results: Record<string, Tensor> = {};
  for (const name of names) results[name] = tensorOf(program.registers[name]!, values.get(name)!.rows);
  return results;
}

/**
 * Values from −1 to 1 that follow from the digests. Of pictures: eight fields along each side, which are soon made, and soon encoded; of
 * others: a few numbers again and again.
 */
function tensorOf({ dtype, shape }: Register, rows: Uint32Array): Tensor {
  if (dtype === "int64") throw new RuntimeError("Only float32 is made.");
  const data = new Float32Array(elementCount(shape));
  const length = data.length / rows.length;
  const [, channels, height, width] = shape as [number, number, number, number];
  for (let row = 0; row < rows.length; row++) {
    const start = row * length;
    let state = rows[row]!;
    const next = () => {
      state = mixed(state, 1);
      return state / 2 ** 31 - 1;
    };
    if (shape.length !== 4 || width < 8 || height < 8) {
      const first = Math.min(length, 64);
      for (let index = 0; index < first; index++) data[start + index] = next();
      for (let filled = first; filled > 0 && filled < length; filled *= 2)
        data.copyWithin(start + filled, start, start + Math.min(filled, length - filled));
      continue;
    }
    const fields = 8;
    for (let channel = 0; channel < channels; channel++)
      for (let field = 0; field < fields; field++) {
        const top = Math.floor((field * height) / fields);
        const bottom = Math.floor(((field + 1) * height) / fields);
        const line = start + (channel * height + top) * width;
        let value = 0;
        for (let column = 0, end = 0; column < width; column++) {
          if (column >= end) {
            value = next();
            end = ((Math.floor((column * fields) / width) + 1) * width) / fields;
          }
          data[line + column] = value;
        }
        for (let y = top + 1; y < bottom; y++) data.copyWithin(line + (y - top) * width, line, line + width);
      }
  }
  return { dtype: "float32", shape, data };
}

const digested = new WeakMap<object, Held>();

/** A constant with a digest of each of its rows. */
function heldOf(constant: Constant): Held {
  if (constant.kind === "slot") throw new RuntimeError("A slot has no value.");
  const isValue = constant.kind === "value";
  // Coefficients are new in each submission: remembering them costs more than it saves.
  if (isValue && constant.tensor.data.length <= 64) return digestedTensor(constant.tensor);
  const subject = isValue ? constant.tensor.data : constant;
  let held = digested.get(subject);
  if (!held) {
    held = isValue ? digestedTensor(constant.tensor) : digestedStored(constant);
    digested.set(subject, held);
  }
  return held;
}

/** Of a tensor in a file: where it is, since values are not read. */
function digestedStored({ source, shape, firstElement, rowElements, strideElements, rows }: StoredConstant): Held {
  const place = [source.offset, firstElement, rowElements, strideElements, rows, ...shape];
  return { shape, rows: new Uint32Array(shape[0] ?? 1).fill(place.reduce(mixed, 0)) };
}

/** A row has about so many values that its digest is made of: others are passed over, evenly. */
const digestedValues = 1024;

function digestedTensor({ shape, data }: Tensor): Held {
  const rows = new Uint32Array(shape[0] ?? 1);
  const words = new Int32Array(data.buffer, data.byteOffset, data.byteLength / 4);
  const length = words.length / rows.length;
  // Odd, so that all columns of a matrix occur.
  const stride = Math.max(1, 2 * Math.ceil(length / digestedValues / 2) - 1);
  for (let row = 0; row < rows.length; row++) {
    let digest = length;
    const end = (row + 1) * length;
    for (let at = row * length; at < end; at += stride) digest = mixed(digest, words[at]!);
    rows[row] = digest;
  }
  return { rows, shape };
}

const texts = new Map<string, number>();

function digestOfText(text: string): number {
  let digest = texts.get(text);
  if (digest === undefined) {
    digest = 0;
    for (let at = 0; at < text.length; at++) digest = mixed(digest, text.charCodeAt(at));
    texts.set(text, digest);
  }
  return digest;
}

/** One word more in a digest of 32 bits. */
function mixed(digest: number, word: number): number {
  let mix = Math.imul((digest + 0x9e3779b9) ^ word, 0x85ebca6b);
  mix = Math.imul(mix ^ (mix >>> 15), 0xc2b2ae35);
  return (mix ^ (mix >>> 13)) >>> 0;
}
