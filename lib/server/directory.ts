/** What a server draws with: models by id, which may come and go. Those that a process has loaded are one such directory, and a fleet is another. */

import type { ImageModel } from "../model.js";

/** A model and the id that requests name it by. */
export interface NamedModel {
  readonly id: string;
  readonly model: ImageModel;
}

/** Models that come and go, for `imageServer`. All that it says is of this moment. */
export interface ModelDirectory {
  /** Ids that requests may name, that of the model for requests that name none first. */
  readonly ids: readonly string[];
  /** The models that there are, by id; one that still loads is left out. */
  readonly models: ReadonlyMap<string, ImageModel>;
  /** What keeps the server from being ready, in sentences for clients; empty if nothing does. */
  readonly obstacles: readonly string[];
  /** Settles once, when the models have been prepared, or with what prevents it. Default: they are. */
  readonly ready?: Promise<void>;
  /** What it counts itself, beside what its models do. Default: nothing. */
  readonly metrics?: readonly DirectoryMetric[];
  /**
   * The model for a request; null where there is none of that id.
   * @param id undefined for requests that name none
   * @throws what the request is refused with while the model, or any, cannot be had
   */
  find(id: string | undefined): NamedModel | null | Promise<NamedModel | null>;
  /** Brings everything up to date before metrics are read. Default: it always is. */
  look?(): Promise<void>;
}

/** A metric for Prometheus, read when it is asked for. */
export interface DirectoryMetric {
  readonly name: string;
  readonly help: string;
  readonly type: "gauge" | "counter";
  values(): readonly { readonly labels: Readonly<Record<string, string>>; readonly value: number }[];
}
