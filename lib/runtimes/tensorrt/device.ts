/**
 * A GPU as one runtime holds it: opened at its first use, given up when it is lost or the runtime is disposed of. All
 * runtimes of a process share one executor for it. A GPU that is lost is lost for the process: TensorRT's own CUDA runtime
 * holds the device's primary context until the process ends, so that nothing here could replace it. Where one runtime
 * notices the loss, all runtimes of its thread on that GPU give it up, and every later call says that the process must be
 * restarted. Other GPUs go on.
 */

import type { DeviceLostError } from "../../errors.js";
import type { RuntimeListener } from "../runtime.js";
import type { Addon, NativeError, NativeExecutor } from "./addon.js";
import { explainDevice, explainLoss } from "./failures.js";
import type { TensorRtKind } from "./flavours.js";

export interface DeviceOptions {
  readonly kind: TensorRtKind;
  readonly addon: Addon;
  /** Files, or names for the loader. */
  readonly library: string;
  readonly parser: string;
  /** Number of the GPU, in the order of CUDA; default: 0. */
  readonly ordinal?: number | undefined;
  /** Hears of the loss. */
  readonly listener?: RuntimeListener | undefined;
}

export class SharedDevice {
  /** Those of this thread that are open. */
  static readonly #open = new Set<SharedDevice>();
  readonly #options: DeviceOptions;
  readonly #release: () => void;
  #opening: Promise<NativeExecutor> | null = null;
  #executor: NativeExecutor | null = null;
  #lost: DeviceLostError | null = null;
  /** Ends when what was given up has been freed. */
  #closing: Promise<void> = Promise.resolve();

  /** @param release releases everything that is on the device, when it is given up */
  constructor(options: DeviceOptions, release: () => void) {
    this.#options = options;
    this.#release = release;
  }

  /** Null before it has been opened, and after it was given up. */
  get executor(): NativeExecutor | null {
    return this.#executor;
  }

  /** What every call rejects with once the device is lost. */
  get lost(): DeviceLostError | null {
    return this.#lost;
  }

  /**
   * The same for all that call while it opens: nothing here depends on a caller's signal.
   * @throws RuntimeUnavailableError, DeviceLostError
   */
  async open(): Promise<NativeExecutor> {
    if (this.#lost) throw this.#lost;
    const { addon, library, parser, kind } = this.#options;
    this.#opening ??= addon.openExecutor(library, parser, this.#ordinal).promise.then(
      (executor) => {
        this.#executor = executor;
        SharedDevice.#open.add(this);
        return executor;
      },
      (error: NativeError) => {
        this.#opening = null;
        if (error.code === "DEVICE_LOST") this.#lose(error);
        throw this.#lost ?? explainDevice(error, kind);
      },
    );
    return this.#opening;
  }

  /** To be called with every error of an executor: if the device is lost, all that hold it give it up. */
  note(error: NativeError): void {
    if (error.code !== "DEVICE_LOST") return;
    for (const device of [this, ...SharedDevice.#open]) if (device.#ordinal === this.#ordinal) device.#lose(error);
  }

  get #ordinal(): number {
    return this.#options.ordinal ?? 0;
  }

  /** Frees everything. Resolves when the device has been closed. */
  async close(): Promise<void> {
    await this.#opening?.catch(() => undefined);
    this.#giveUp();
    await this.#closing;
  }

  #lose(error: NativeError): void {
    if (this.#lost) return;
    this.#lost = explainLoss(error);
    this.#options.listener?.lost(this.#lost);
    this.#giveUp();
  }

  #giveUp(): void {
    const executor = this.#executor;
    if (!executor) return;
    this.#executor = null;
    this.#opening = null;
    SharedDevice.#open.delete(this);
    this.#release();
    this.#closing = executor.close().promise;
    // Nobody may be waiting for it.
    this.#closing.catch(() => undefined);
  }
}
