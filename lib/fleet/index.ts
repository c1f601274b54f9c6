/** `flowturbo/fleet`: many machines that draw as one, on Redis. Workers draw; whoever has a `FleetModel` asks. */

import { FleetEmptyError, OptionError } from "../errors.js";
import type { ImageModel } from "../model.js";
import { FleetDirectory, type FleetMetric } from "./directory.js";
import { Fleet as Connection } from "./fleet.js";
import type { ConnectFleetOptions } from "./options.js";
import type { FleetStatus } from "./status.js";

export type { FleetMetric } from "./directory.js";
export type { ConnectFleetOptions, FleetOptions, FleetWorkerOptions } from "./options.js";
export type { FleetModelStatus, FleetStatus, FleetWorkerStatus } from "./status.js";
export { type FleetWorker, startWorker } from "./worker.js";

/** A fleet as those see it who ask it for pictures. */
export interface Fleet extends AsyncDisposable {
  /** Ids of the models that live workers draw with; those of most workers first. */
  readonly ids: readonly string[];
  /** A model by its id, whether or not there is a worker for it now. */
  model(id: string): FleetModel;
  /** Who is in the fleet and how much there is to do, as it is now. @throws RedisError while Redis is away */
  status(): Promise<FleetStatus>;
  /** Leaves the fleet when the calls of its models are over. Safe to call twice. */
  close(): Promise<void>;
}

/**
 * A model of a fleet: its calls are drawn by whichever worker has it. Besides what an `ImageModel` throws, calls reject with a FleetEmptyError at once if no
 * worker has the model, with a RedisError at once while Redis cannot be reached, and with a PoisonousJobError if two workers ended while they drew it. A request
 * without a seed gets one, so that it is drawn alike however often it is begun; `costs` are the workers', the cheapest of each launch.
 */
export interface FleetModel extends ImageModel {
  /** Its id in the fleet. */
  readonly id: string;
  /** The fleet that it is of. */
  readonly fleet: Fleet;
  /** Requests that wait for a worker, of all who ask, as they were seen last. */
  readonly waiting: number;
  /** Seconds until everything that was accepted is done, by all workers together, as it was seen last: what workers are added by. */
  backlogSeconds(): number;
}

/**
 * A model of a fleet, for whatever draws with an `ImageModel`: `disposing` of it leaves the fleet.
 * @throws OptionError for a wrong option; InstallationError if a package is missing; RedisError if Redis does not answer; OutputError for a folder of
 *   results that cannot be written; FleetEmptyError without the option `model` while there is no worker
 */
export async function connectFleet(options: ConnectFleetOptions): Promise<FleetModel> {
  const fleet = await Connection.connect(options);
  const id = options.model ?? fleet.ids[0];
  if (id === undefined) {
    await fleet.close();
    throw new FleetEmptyError(
      "No worker of the fleet takes jobs: which models there will be is not known yet. Name one (model), or start a worker: flowturbo worker --redis <address>.",
    );
  }
  return fleet.model(id).own();
}

/**
 * A fleet with all its models, for a server: see `connectFleet`.
 * @throws as `connectFleet`, but for a fleet without workers
 */
export function openFleet(options: ConnectFleetOptions): Promise<Fleet> {
  return Connection.connect(options);
}

/** The models of a fleet as a server has them. */
export interface FleetModels {
  /** Ids of the models that live workers draw with; that of most workers first. */
  readonly ids: readonly string[];
  /** Those that there are workers for, or were within a week, by id. */
  readonly models: ReadonlyMap<string, FleetModel>;
  /** Why the fleet cannot draw now, in sentences; empty if it can. */
  readonly obstacles: readonly string[];
  /** Workers, backlog and demand of each model, for Prometheus. */
  readonly metrics: readonly FleetMetric[];
  /**
   * The model for a request, without an id the one that most workers have; null where there are only others.
   * @throws RedisError while Redis cannot be reached; FleetEmptyError at once if there is no such model, nor any other
   */
  find(id: string | undefined): Promise<{ readonly id: string; readonly model: FleetModel } | null>;
  /** Brings metrics up to date. @throws RedisError while Redis cannot be reached */
  look(): Promise<void>;
}

/**
 * The models of a fleet as a server takes them: `createServer({ models: modelsOf(fleet) })` is a gateway. The fleet stays yours: close it after the
 * server.
 * @throws OptionError for what is no fleet of `openFleet`
 */
export function modelsOf(fleet: Fleet): FleetModels {
  if (fleet instanceof Connection) return new FleetDirectory(fleet);
  throw new OptionError("fleet", "Expected a fleet of openFleet() for modelsOf().");
}
