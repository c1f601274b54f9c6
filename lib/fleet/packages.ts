/** The packages that only a fleet needs: optional peers, which are loaded at first use. */

import { Dependency } from "../common/dependency.js";

const all = ["bullmq@5", "ioredis@5"];
const remedy = () => `A fleet needs packages that flowturbo does not bring: npm install ${all.join(" ")}`;

const optional = <T>(name: string, load: () => Promise<T>) => new Dependency(name, load, () => null, remedy);

// Said in so many words: what the packages do not export has no name in declaration files.
export const bullmq: Dependency<typeof import("bullmq")> = optional("bullmq", () => import("bullmq"));
export const ioredis: Dependency<typeof import("ioredis")> = optional("ioredis", () => import("ioredis"));

/** @throws InstallationError if one of them is missing */
export async function loadPackages(): Promise<void> {
  for (const each of [bullmq, ioredis]) await each.load();
}
