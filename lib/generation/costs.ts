/** What the costs of a model's launches depend on: whatever shares all of it shares a table. */

import { createHash } from "node:crypto";
import os from "node:os";
import type { GraphLibrary } from "../networks/library.js";
import type { CostSubject } from "../serving/store.js";

/**
 * @param runtime its name, version and settings
 * @returns the graphs by their fingerprints, as engines are keyed: fine-tunes of one model cost the same
 */
export function costSubject(graphs: GraphLibrary, runtime: Readonly<Record<string, unknown>>): CostSubject {
  const model = createHash("sha256");
  for (const name of graphs.essential) model.update(graphs.get(name).fingerprint);
  return {
    model: model.digest("hex"),
    runtime,
    machine: { cpu: os.cpus()[0]?.model ?? "unknown", cores: os.availableParallelism(), arch: process.arch },
  };
}
