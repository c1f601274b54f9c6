/** The packages that only a fleet needs: optional peers, which are loaded at first use. */

import { Dependency } from "../common/dependency.js";

const all = ["bullmq@5", "ioredis@5"];
const remedy = () => `A fleet needs packages that flowturbo does not bring: npm install ${all.join(" ")}`;

const optional = <T>(name: string, load: () => Promise<T>) => new Dependency(name, load, () => null, remedy);

/** What is used of them: the rest has types that declaration files cannot name. */
export type BullMq = Pick<typeof import("bullmq"), "Queue" | "Worker" | "UnrecoverableError">;
export type IoRedis = Pick<typeof import("ioredis"), "Redis">;

export const bullmq = optional<BullMq>("bullmq", () => import("bullmq"));
export const ioredis = optional<IoRedis>("ioredis", () => import("ioredis"));

/** @throws InstallationError if one of them is missing */
export async function loadPackages(): Promise<void> {
  for (const each of [bullmq, ioredis]) await each.load();
}
