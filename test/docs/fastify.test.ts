// examples/fastify.js as a process of its own: its own routes and keys, the server under its prefix, and its end.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import net from "node:net";
import path from "node:path";
import sharp from "sharp";
import { afterAll, beforeAll, expect, it, vi } from "vitest";
import { root } from "../support/fixtures.js";

const file = path.join(root, "examples/fastify.js");
let child: ChildProcess;
let url: string;
let log = "";

beforeAll(async () => {
  const probe = net.createServer().listen(0, "127.0.0.1");
  await once(probe, "listening");
  const { port } = probe.address() as net.AddressInfo;
  probe.close();
  child = spawn(process.execPath, [file, String(port)], {
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, APP_KEYS: "ann:key-of-ann,bob:key-of-bob" },
  });
  for (const stream of [child.stdout!, child.stderr!]) stream.on("data", (chunk) => (log += chunk));
  url = `http://127.0.0.1:${port}`;
  const ready = async () => expect((await get("/pictures/readyz")).status).toBe(200);
  await vi.waitFor(ready, { timeout: 60_000, interval: 50 });
}, 90_000);
afterAll(() => child.kill("SIGKILL"));

const get = (at: string, key = "key-of-ann") => fetch(`${url}${at}`, { headers: { authorization: `Bearer ${key}` } });
const draw = (body: object, key: string) =>
  fetch(`${url}/pictures/v1/images/generations`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
    body: JSON.stringify(body),
  });

it("has routes of its own beside the server's, with the same keys", async () => {
  expect(await (await fetch(url)).text()).toBe("An app with pictures.\n");
  for (const at of ["/card.png", "/pictures/v1/models", "/pictures/readyz"]) {
    const refused = await get(at, "another");
    expect([refused.status, await refused.json()], at).toMatchObject([
      401,
      { error: { type: "authentication_error" } },
    ]);
  }
  const card = await get("/card.png");
  expect([card.status, card.headers.get("content-type")]).toEqual([200, "image/png"]);
  expect((await sharp(await card.arrayBuffer()).metadata()).width).toBe(64);

  const drawn = await draw({ prompt: "a red circle", num_inference_steps: 2, seed: 3 }, "key-of-bob");
  expect([drawn.status, await drawn.json()]).toMatchObject([200, { model: "shapes", seeds: [3] }]);
  const refused = await draw({ prompt: "a red circle", num_inference_steps: 31 }, "key-of-bob");
  expect([refused.status, await refused.json()]).toMatchObject([400, { error: { param: "num_inference_steps" } }]);
});

it("answers what is under way at SIGTERM, and ends with code 0", async () => {
  const answer = draw({ prompt: "a red circle", num_inference_steps: 30, size: "128x128" }, "key-of-ann");
  const running = async () =>
    (await (await get("/pictures/metrics")).text()).match(/^flowturbo_runs_open (\d+)$/m)?.[1];
  await expect.poll(running, { interval: 10 }).toBe("1");
  const ended = once(child, "close");
  child.kill("SIGTERM");
  expect((await answer).status).toBe(200);
  expect(await ended).toEqual([0, null]);
  expect(log).not.toMatch(/key-of-|red circle/);
});

it("is short enough to be copied, and needs what it says", () => {
  const text = readFileSync(file, "utf8");
  expect([...text.matchAll(/from "([^"]+)"/g)].map(([, name]) => name)).toEqual([
    ...["fastify", "flowturbo", "flowturbo/server"],
  ]);
  expect(text.split("\n").length).toBeLessThan(85);
});
