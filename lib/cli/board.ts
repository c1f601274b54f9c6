/**
 * Bull Board, a view of BullMQ's queues in a browser, at `/board` of a gateway. It shows whole requests, prompts included, so it needs a key where there are
 * keys. Nothing can be changed there: gateways and workers know of a job what BullMQ does not.
 */

import type { FastifyInstance, FastifyReply, FastifyRequest } from "fastify";
import { Dependency } from "../common/dependency.js";
import { clipped } from "../common/text.js";
import type { Fleet } from "../fleet/fleet.js";
import { Keys } from "../server/keys.js";

const all = ["@bull-board/api", "@bull-board/fastify"];
const remedy = () => `--board needs packages that flowturbo does not bring: npm install ${all.join(" ")}`;
const optional = <T>(name: string, load: () => Promise<T>) => new Dependency(name, load, () => null, remedy);

/** What is used of them. */
type Api = Pick<typeof import("@bull-board/api"), "createBullBoard">;
type Adapters = Pick<typeof import("@bull-board/api/bullMQAdapter"), "BullMQAdapter">;
type ForFastify = Pick<typeof import("@bull-board/fastify"), "FastifyAdapter">;
const api = optional<Api>("@bull-board/api", () => import("@bull-board/api"));
const adapters = optional<Adapters>("@bull-board/api", () => import("@bull-board/api/bullMQAdapter"));
const forFastify = optional<ForFastify>("@bull-board/fastify", () => import("@bull-board/fastify"));

const address = "/board";
/** Pictures in a request are left out of what is shown beyond so many letters. */
const longest = 2000;
/** Its page names a font of another host. Without it it looks much the same, and nobody else learns that it is looked at. */
const policy =
  "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; object-src 'none'";

/** @throws InstallationError if one of its packages is missing */
export async function loadBoard(): Promise<void> {
  for (const each of [api, adapters, forFastify]) await each.load();
}

/**
 * Adds the board to an app that does not listen yet.
 * @param ids of the models whose queues are shown, when it is called
 * @param apiKeys one of which is the password; none where nobody needs one
 */
export async function addBoard(
  app: FastifyInstance,
  fleet: Fleet,
  ids: () => Iterable<string>,
  apiKeys: readonly string[],
): Promise<void> {
  const [{ createBullBoard }, { BullMQAdapter }, { FastifyAdapter }] = [
    await api.load(),
    await adapters.load(),
    await forFastify.load(),
  ];
  const serverAdapter = new FastifyAdapter();
  serverAdapter.setBasePath(address);
  const board = createBullBoard({
    queues: [],
    serverAdapter,
    options: { uiConfig: { boardTitle: "flowturbo", hideRedisDetails: true, showWorkers: false } },
  });
  const known = new Map<string, InstanceType<Adapters["BullMQAdapter"]>>();
  const queueOf = (id: string) => {
    const queue =
      known.get(id) ??
      new BullMQAdapter(fleet.redis.queue(id), { readOnlyMode: true, allowRetries: false, displayName: id });
    if (!known.has(id)) queue.setFormatter("data", shortened);
    known.set(id, queue);
    return queue;
  };
  const keys = new Keys(apiKeys);
  await app.register(async (scope) => {
    scope.addHook("onRequest", async (request, reply) => {
      reply.headers({
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
      });
      if (!isAllowed(request, keys)) return refuse(reply);
      if (request.method !== "GET" && request.method !== "HEAD")
        return reply.code(405).header("allow", "GET, HEAD").send();
      board.replaceQueues([...ids()].map(queueOf));
    });
    await scope.register(serverAdapter.registerPlugin(), { prefix: address });
  });
}

/** Browsers send no key of their own: they ask for a name and a password, which is the key. Programs may send it as to the API. */
function isAllowed({ headers: { authorization = "" } }: FastifyRequest, keys: Keys): boolean {
  const [, encoded] = authorization.match(/^Basic +(\S+) *$/i) ?? [];
  if (encoded === undefined) return keys.ownerOf(authorization) !== null;
  const [, password = ""] =
    Buffer.from(encoded, "base64")
      .toString("utf8")
      .match(/^[^:]*:(.*)$/s) ?? [];
  return keys.ownerOf(`Bearer ${password}`) !== null;
}

function refuse(reply: FastifyReply): FastifyReply {
  return reply
    .code(401)
    .header("www-authenticate", 'Basic realm="flowturbo", charset="UTF-8"')
    .type("text/plain; charset=utf-8")
    .send("A key of the server is the password. The name may be anything.\n");
}

/** The same with long texts cut: they are pictures. */
function shortened(value: unknown): unknown {
  return JSON.parse(
    JSON.stringify(value ?? null, (_name, each) =>
      typeof each === "string" && each.length > longest ? `${clipped(each, 40)} (${each.length} characters)` : each,
    ),
  );
}
