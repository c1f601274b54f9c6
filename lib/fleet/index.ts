/** `flowturbo/fleet`: many machines that draw as one, on Redis. Workers draw; whoever has a `FleetModel` asks. */

import { FleetEmptyError } from "../errors.js";
import { Fleet } from "./fleet.js";
import type { FleetModel } from "./model.js";
import type { ConnectFleetOptions } from "./options.js";

export type { Fleet } from "./fleet.js";
export type { FleetModel } from "./model.js";
export type { ConnectFleetOptions, FleetOptions, FleetWorkerOptions } from "./options.js";
export type { FleetModelStatus, FleetStatus, FleetWorkerStatus } from "./status.js";
export { type FleetWorker, startWorker } from "./worker.js";

/**
 * A model of a fleet, for whatever draws with an `ImageModel`: `disposing` of it leaves the fleet.
 * @throws OptionError for a wrong option; InstallationError if a package is missing; RedisError if Redis does not answer; OutputError for a folder of
 *   results that cannot be written; FleetEmptyError without the option `model` while there is no worker
 */
export async function connectFleet(options: ConnectFleetOptions): Promise<FleetModel> {
  const fleet = await openFleet(options);
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
  return Fleet.connect(options);
}
