/** The packages that only the server needs: optional peers, which are loaded at first use. */

import { Dependency } from "../common/dependency.js";

const all = ["fastify", "@fastify/busboy", "@fastify/cors", "prom-client"];
const remedy = () => `The server needs packages that flowturbo does not bring: npm install ${all.join(" ")}`;

const optional = <T>(name: string, load: () => Promise<T>) => new Dependency(name, load, () => null, remedy);

export const fastify = optional("fastify", () => import("fastify"));
export const busboy = optional("@fastify/busboy", () => import("@fastify/busboy"));
export const cors = optional("@fastify/cors", () => import("@fastify/cors"));
export const promClient = optional("prom-client", () => import("prom-client"));

/** @throws InstallationError if one of them is missing */
export async function loadPackages(): Promise<void> {
  for (const each of [fastify, busboy, cors, promClient]) await each.load();
}
