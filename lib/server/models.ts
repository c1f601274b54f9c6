/** The models of a process as a directory: some may still load, and are drawn with once before the server says that it is ready. */

import { publicMessage } from "../errors.js";
import type { ImageModel, Size } from "../model.js";
import type { ModelDirectory, NamedModel } from "./directory.js";
import { Failure } from "./failure.js";

/** Models by id; a promise is one that still loads. */
export type GivenModels = Readonly<Record<string, ImageModel | PromiseLike<ImageModel>>>;

interface Entry {
  readonly id: string;
  model: ImageModel | null;
  isWarm: boolean;
  error: unknown;
}

export class LoadedModels implements ModelDirectory {
  readonly #entries = new Map<string, Entry>();
  /** Resolves when every model has been loaded and warmed up. @throws what that throws */
  readonly ready: Promise<void>;

  /** @param warm sizes to draw once; null for the native size */
  constructor(given: GivenModels, warm: readonly Size[] | null) {
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

  get models(): ReadonlyMap<string, ImageModel> {
    const loaded = [...this.#entries.values()].flatMap(({ id, model }) => (model ? [[id, model] as const] : []));
    return new Map(loaded);
  }

  get obstacles(): string[] {
    return [...this.#entries.values()].flatMap(({ id, model, isWarm, error }) => {
      if (error) return [`The model ${id} could not be loaded: ${publicMessage(error)}`];
      if (!model) return [`The model ${id} is loading.`];
      if (!isWarm) return [`The model ${id} is warming up.`];
      return model.health().ready ? [] : [`The model ${id} is not ready.`];
    });
  }

  /** @throws Failure with 503 for one that is not loaded */
  find(id: string | undefined): NamedModel | null {
    const entry = id === undefined ? [...this.#entries.values()][0] : this.#entries.get(id);
    if (!entry) return null;
    const { model, error } = entry;
    if (model) return { id: entry.id, model };
    if (error) throw new Failure(503, `The model ${entry.id} could not be loaded.`, { code: "model_unavailable" });
    throw new Failure(503, `The model ${entry.id} is loading.`, {
      ...{ code: "model_loading", retryable: true, retryAfterMs: 1000 },
    });
  }
}

/** @param warm of models that this process loads; those of a directory are prepared by whoever has them */
export function directoryOf(given: GivenModels | ModelDirectory, warm: readonly Size[] | null): ModelDirectory {
  return isDirectory(given) ? given : new LoadedModels(given, warm);
}

/** A model may be called "find", but is no function. */
function isDirectory(given: GivenModels | ModelDirectory): given is ModelDirectory {
  return typeof given.find === "function";
}

function isModel(value: ImageModel | PromiseLike<ImageModel>): value is ImageModel {
  return "generate" in value;
}
