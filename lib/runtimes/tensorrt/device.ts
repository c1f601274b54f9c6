/**
 * The GPU as one runtime holds it: opened at its first use, given up when it is lost or the runtime is disposed of. All
 * runtimes of a process share one executor for it, and a device that was lost can be opened again only when no runtime holds
 * the old one any more; so where one runtime notices the loss, all runtimes of its thread give it up.
 */

import { setTimeout } from "node:timers/promises";
import type { RuntimeListener } from "../runtime.js";
import type { Addon, NativeError, NativeExecutor } from "./addon.js";
import { explainDevice } from "./failures.js";
import type { TensorRtKind } from "./flavours.js";

export interface DeviceOptions {
  readonly kind: TensorRtKind;
  readonly addon: Addon;
  /** Files, or names for the loader. */
  readonly library: string;
  readonly parser: string;
  /** Hears of losses, and of opening the device again. */
  readonly listener?: RuntimeListener | undefined;
}

/** Milliseconds that are waited at most, doubling from 1, between attempts to open a device that was lost. */
const longestPause = 512;

export class SharedDevice {
  /** Those of this thread that are open. */
  static readonly #open = new Set<SharedDevice>();
  /** Ends when all that were given up have been freed; says whether the device was ever lost. */
  static #closings: Promise<boolean> = Promise.resolve(false);
  readonly #options: DeviceOptions;
  readonly #release: () => void;
  #opening: Promise<NativeExecutor> | null = null;
  #executor: NativeExecutor | null = null;
  /** Whether it was lost and has not been opened again. */
  #isLost = false;

  /** @param release releases everything that is on the device, when it is given up */
  constructor(options: DeviceOptions, release: () => void) {
    this.#options = options;
    this.#release = release;
  }

  /** Null before it has been opened, and after it was given up. */
  get executor(): NativeExecutor | null {
    return this.#executor;
  }

  /**
   * The same for all that call while it opens: nothing here depends on a caller's signal.
   * @throws RuntimeUnavailableError, DeviceLostError
   */
  open(): Promise<NativeExecutor> {
    const { addon, library, parser, kind } = this.#options;
    const attempt = async (pause: number): Promise<NativeExecutor> => {
      try {
        return await addon.openExecutor(library, parser, 0).promise;
      } catch (error) {
        // The lost one may still be held: by a run that has just ended, or by another thread.
        if ((error as NativeError).code !== "DEVICE_LOST" || pause > longestPause) throw error;
        await setTimeout(pause);
        return attempt(2 * pause);
      }
    };
    this.#opening ??= SharedDevice.#closings
      .then((lost) => attempt(lost ? 1 : Number.POSITIVE_INFINITY))
      .then(
        (executor) => {
          this.#executor = executor;
          SharedDevice.#open.add(this);
          if (this.#isLost) this.#options.listener?.restarted();
          this.#isLost = false;
          return executor;
        },
        (error: NativeError) => {
          this.#opening = null;
          throw explainDevice(error, kind);
        },
      );
    return this.#opening;
  }

  /** To be called with every error of an executor: if the device is lost, all give it up. */
  note(error: NativeError, executor: NativeExecutor): void {
    if (error.code !== "DEVICE_LOST" || this.#executor !== executor) return;
    for (const device of [...SharedDevice.#open]) {
      device.#isLost = true;
      device.#options.listener?.lost(explainDevice(error, device.#options.kind));
      void device.#giveUp();
    }
    SharedDevice.#closings = SharedDevice.#closings.then(() => true);
  }

  /** Frees everything. Resolves when the device has been closed. */
  async close(): Promise<void> {
    await this.#opening?.catch(() => undefined);
    await this.#giveUp();
  }

  /** The next call of `open` opens it again. */
  async #giveUp(): Promise<void> {
    const executor = this.#executor;
    if (!executor) return;
    this.#executor = null;
    this.#opening = null;
    SharedDevice.#open.delete(this);
    this.#release();
    const closed = executor.close().promise;
    const before = SharedDevice.#closings;
    SharedDevice.#closings = closed.then(() => before);
    await closed;
  }
}
