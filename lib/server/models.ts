/** The models of a server: some may still load, and are drawn with once before the server says that it is ready. */

import { publicMessage } from "../errors.js";
import type { ImageModel, Size } from "../model.js";
import { seconds } from "./answer.js";
import { Failure } from "./failure.js";

interface Entry {
  readonly id: string;
  model: ImageModel | null;
  isWarm: boolean;
  error: unknown;
}

export class Models {
  readonly #entries = new Map<string, Entry>();
  readonly created = seconds();
  /** Resolves when every model has been loaded and warmed up. @throws what that throws */
  readonly ready: Promise<void>;

  /** @param warm sizes to draw once; null for the native size */
  constructor(given: Readonly<Record<string, ImageModel | PromiseLike<ImageModel>>>, warm: readonly Size[] | null) {
    const ready = Object.entries(given).map(async ([id, promise]) => {
      const entry: Entry = { id, model: isModel(promise) ? promise : null, isWarm: false, error: null };
      this.#entries.set(id, entry);
      try {
        const model = await promise;
        entry.model = model;
        for (const size of warm ?? [model.nativeSize])
          await model.generate({ prompt: "", steps: 2, width: size.width, height: size.height });
        entry.isWarm = true;
      } catch (error) {
        entry.error = error;
        throw error;
      }
    });
    this.ready = Promise.all(ready).then(() => {});
    this.ready.catch(() => {});
  }

  get ids(): string[] {
    return [...this.#entries.keys()];
  }

  /** Those that are loaded. */
  get loaded(): ReadonlyMap<string, ImageModel> {
    const loaded = [...this.#entries.values()].flatMap(({ id, model }) => (model ? [[id, model] as const] : []));
    return new Map(loaded);
  }

  /** What keeps the server from being ready, in sentences for clients; empty if nothing does. */
  get obstacles(): string[] {
    return [...this.#entries.values()].flatMap(({ id, model, isWarm, error }) => {
      if (error) return [`The model ${id} could not be loaded: ${publicMessage(error)}`];
      if (!model) return [`The model ${id} is loading.`];
      if (!isWarm) return [`The model ${id} is warming up.`];
      return model.health().ready ? [] : [`The model ${id} is not ready.`];
    });
  }

  /** Whether no other process is needed. */
  get isLive(): boolean {
    return [...this.loaded.values()].every((model) => model.health().live);
  }

  has(id: string): boolean {
    return this.#entries.has(id);
  }

  /**
   * A model by its id; without one the first.
   * @throws Failure with 404 for one that there is not, 503 for one that is not loaded
   */
  get(id: string | undefined): { readonly id: string; readonly model: ImageModel } {
    const entry = id === undefined ? [...this.#entries.values()][0]! : this.#entries.get(id);
    if (!entry) {
      const name = JSON.stringify(id!.slice(0, 64));
      throw new Failure(404, `There is no model ${name} here; there is ${this.ids.join(", ")}.`, {
        ...{ param: "model", code: "model_not_found" },
      });
    }
    const { model, error } = entry;
    if (model) return { id: entry.id, model };
    if (error) throw new Failure(503, `The model ${entry.id} could not be loaded.`, { code: "model_unavailable" });
    throw new Failure(503, `The model ${entry.id} is loading.`, {
      ...{ code: "model_loading", retryable: true, retryAfterMs: 1000 },
    });
  }
}

function isModel(value: ImageModel | PromiseLike<ImageModel>): value is ImageModel {
  return "generate" in value;
}
