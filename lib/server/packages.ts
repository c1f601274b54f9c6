/** The packages that only the server needs: optional peers, which are loaded at first use. */

import { Dependency } from "../common/dependency.js";

const all = ["fastify", "@fastify/busboy", "@fastify/cors", "prom-client"];
const remedy = () => `The server needs packages that flowturbo does not bring: npm install ${all.join(" ")}`;

export const fastify = new Dependency(
  "fastify",
  () => import("fastify"),
  () => null,
  remedy,
);
export const busboy = new Dependency(
  "@fastify/busboy",
  () => import("@fastify/busboy"),
  () => null,
  remedy,
);
export const cors = new Dependency(
  "@fastify/cors",
  () => import("@fastify/cors"),
  () => null,
  remedy,
);
export const promClient = new Dependency(
  "prom-client",
  () => import("prom-client"),
  () => null,
  remedy,
);

/** @throws InstallationError if one of them is missing */
export async function loadPackages(): Promise<void> {
  for (const each of [fastify, busboy, cors, promClient]) await each.load();
}
