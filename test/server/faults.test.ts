// What befalls a server: a runtime that dies, signals, clients that are slow, leave or send what no client of good will sends, pictures that
// are bombs, and a disk that is full. It answers, within bounded memory, and serves on.

import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import Fastify from "fastify";
import { imageServer } from "flowturbo/server";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import { answerIn, connect, killAll, postText, type ServerProcess, startProcess } from "./process.js";
import { stubModel } from "./stub.js";
import { events, quick as few, post, serverOf } from "./support.js";

const hasProc = process.platform === "linux";
const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-faults-"));
afterAll(() => rmSync(cache, { recursive: true, force: true }));
const start = (flags: readonly string[] = [], options: Parameters<typeof startProcess>[1] = {}) =>
  startProcess(["--max-steps", "1000", "--cache", cache, ...flags], options);

const drawing = "/v1/images/generations";
/** About a hundredth of a second for each step. */
const long = (steps = 1000) => ({ prompt: "x", num_inference_steps: steps, guidance_scale: 1 });
const quick = { ...few, num_inference_steps: 2, guidance_scale: 1 };
const draw = (server: ServerProcess, body: unknown, signal?: AbortSignal) =>
  post(`${server.url}${drawing}`, body, {}, signal);
/** Waits until so many requests have been admitted, and are drawn. */
async function running(server: ServerProcess, count: number): Promise<void> {
  await vi.waitFor(async () => expect(await server.metric("flowturbo_requests_running")).toBe(count), waiting);
  await sleep(200);
}
const waiting = { timeout: 20_000, interval: 30 };
const nothingOpen = (server: ServerProcess) =>
  vi.waitFor(async () => {
    expect(await server.metric("flowturbo_runs_open")).toBe(0);
    expect(await server.metric("flowturbo_requests_running")).toBe(0);
    expect(await server.metric("flowturbo_queue_waiting")).toBe(0);
  }, waiting);

type Answer = Awaited<ReturnType<typeof post>>;
function expectFailure({ status, headers, body }: Answer, wanted: { status: number; code: string; retry: boolean }) {
  expect(body, JSON.stringify(body)).toEqual({
    error: { message: expect.any(String), type: expect.any(String), param: null, code: wanted.code },
  });
  expect([status, headers.get("x-should-retry")]).toEqual([wanted.status, String(wanted.retry)]);
}
/** All events of a stream. */
async function readAll(response: Response) {
  expect(response.status).toBe(200);
  const all = [];
  for await (const event of events(response.body!)) all.push(event);
  return all;
}
const stream = (server: ServerProcess, body: object) =>
  fetch(`${server.url}${drawing}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
  });

describe.skipIf(!hasProc)("a runtime whose process is killed", () => {
  let server: ServerProcess;
  beforeAll(async () => {
    server = await start();
  });
  afterAll(killAll);
  const kill = () => {
    const hosts = server.hosts();
    expect(hosts.length).toBeGreaterThan(0);
    for (const pid of hosts) process.kill(pid, "SIGKILL");
  };

  /** Kills it while something is done, until that fails: between two launches its death is nothing that a request notices. */
  async function failed<T>(begin: () => Promise<T>, hasFailed: (outcome: T) => boolean): Promise<T> {
    for (let attempt = 0; attempt < 5; attempt++) {
      const outcome = begin();
      await running(server, 1);
      kill();
      if (hasFailed(await outcome)) return outcome;
    }
    throw new Error("No request failed.");
  }

  it("fails a request that was alone in its launch so that it can be sent again: as an answer, in a stream, as a job", async () => {
    const large = { ...long(16), size: "256x256" };
    const answer = await failed(
      () => draw(server, large),
      ({ status }) => status !== 200,
    );
    expectFailure(answer, { status: 503, code: "runtime_died", retry: true });
    expect((await draw(server, quick)).status).toBe(200);

    const sent = await failed(
      () => stream(server, large).then(readAll),
      (all) => all.at(-1)?.event !== "image_generation.completed",
    );
    expect(sent).toMatchObject([{ event: "error", data: { error: { code: "runtime_died", type: "server_error" } } }]);

    const told = await failed(
      async () => {
        const { body: job } = await post(`${server.url}/v1/jobs`, large);
        return readAll(await fetch(`${server.url}/v1/jobs/${job.id}/events`));
      },
      (all) => all.at(-1)?.event !== "job.completed",
    );
    expect(told.at(-1)).toMatchObject({
      event: "job.failed",
      data: { error: { code: "runtime_died" }, job: { status: "failed" } },
    });
    expect((await draw(server, quick)).status).toBe(200);
  });

  it("is nothing that those notice who share launches, nor the probes", async () => {
    const before = await server.metric("flowturbo_runtime_restarts_total");
    const calls = [1, 2, 3, 4].map((seed) => draw(server, { ...long(200), seed }));
    await running(server, 4);
    kill();
    let isOver = false;
    const all = Promise.all(calls).finally(() => {
      isOver = true;
    });
    while (!isOver) {
      expect((await fetch(`${server.url}/livez`)).status).toBe(200);
      await sleep(50);
    }
    const statuses = (await all).map(({ status }) => status);
    expect(statuses).toEqual([200, 200, 200, 200]);
    expect(await server.metric("flowturbo_runtime_restarts_total")).toBeGreaterThan(before);
    expect((await fetch(`${server.url}/readyz`)).status).toBe(200);
    await nothingOpen(server);
    expect(server.child.exitCode).toBe(null);
    expect(server.stderr()).toBe("");
  });
});

describe("a signal to end", () => {
  afterEach(killAll);
  const probe = async (server: ServerProcess) => (await fetch(`${server.url}/readyz`)).status;
  const toldToEnd = (server: ServerProcess) => vi.waitFor(async () => expect(await probe(server)).toBe(503), { timeout: 2000, interval: 10 }); // biome-ignore format: one line

  it("lets what was accepted finish, refuses what comes, and ends with code 0", async () => {
    const server = await start(["--drain", "60"]);
    const idle = connect(server);
    idle.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n");
    const calls = [1, 2].map((seed) => draw(server, { ...long(300), seed }));
    const streamed = stream(server, { ...long(300), partial_images: 2 }).then(readAll);
    const { body: job } = await post(`${server.url}/v1/jobs`, long(300));
    const told = fetch(`${server.url}/v1/jobs/${job.id}/events`).then(readAll);
    await running(server, 4);
    server.child.kill("SIGTERM");
    await toldToEnd(server);
    const refused = await draw(server, quick);
    expectFailure(refused, { status: 503, code: "draining", retry: true });
    expect(refused.headers.get("retry-after")).toMatch(/^\d+$/);
    expectFailure(await post(`${server.url}/v1/jobs`, quick), { status: 503, code: "draining", retry: true });
    expectFailure(await post(`${server.url}/v1/images/edits`, quick), { status: 503, code: "draining", retry: true });
    // What is under way can still be asked about.
    expect((await fetch(`${server.url}/livez`)).status).toBe(200);
    expect(await (await fetch(`${server.url}/v1/jobs/${job.id}`)).json()).toMatchObject({ status: "in_progress" });
    for (const { status, body } of await Promise.all(calls)) expect([status, body.data.length]).toEqual([200, 1]);
    expect((await streamed).map(({ event }) => event)).toEqual([
      ...Array(2).fill("image_generation.partial_image"),
      "image_generation.completed",
    ]);
    expect((await told).at(-1)).toMatchObject({ event: "job.completed", data: { job: { status: "completed" } } });
    expect(await server.ended).toEqual({ code: 0, signal: null });
    await idle.closed;
    expect(server.answers().filter(({ status }) => status === 499)).toEqual([]);
    expect(server.stderr()).toBe("");
  });

  it.each([
    ["SIGTERM", "0.3"],
    ["SIGINT", "0"],
  ] as const)("aborts what takes longer than it may, which is told so: %s, --drain %s", async (signal, seconds) => {
    const server = await start(["--drain", seconds]);
    const call = draw(server, long());
    const streamed = stream(server, long()).then(readAll);
    const { body: job } = await post(`${server.url}/v1/jobs`, long());
    const told = fetch(`${server.url}/v1/jobs/${job.id}/events`).then(readAll);
    // A client that takes nothing, and some that send nothing or half of it, do not keep it from ending.
    const silent = ["", "GET /livez HTTP/1.1\r\nHo", postText(drawing, JSON.stringify(quick)).slice(0, -3)].map(
      (text) => {
        const connection = connect(server);
        connection.send(text);
        return connection;
      },
    );
    await running(server, 3);
    const from = performance.now();
    server.child.kill(signal);
    expectFailure(await call, { status: 503, code: "draining", retry: true });
    expect((await streamed).at(-1)).toMatchObject({ event: "error", data: { error: { code: "draining" } } });
    expect((await told).at(-1)).toMatchObject({ event: "job.failed", data: { error: { code: "draining" } } });
    expect(await server.ended).toEqual({ code: 0, signal: null });
    // The time for the last words, and what the runtime needs to end.
    expect(performance.now() - from).toBeLessThan(8000);
    await Promise.all(silent.map(({ closed }) => closed));
    expect(server.stderr()).toBe("");
  });

  it.each([
    ["SIGTERM", 143],
    ["SIGINT", 130],
  ] as const)("sent twice ends it at once, with its children: %s", async (signal, code) => {
    const server = await start(["--drain", "600"]);
    const call = draw(server, long()).catch(() => "cut off");
    await running(server, 1);
    const hosts = hasProc ? server.hosts() : [];
    server.child.kill(signal);
    await toldToEnd(server);
    server.child.kill(signal);
    expect(await server.ended).toEqual({ code, signal: null });
    expect(await call).toBe("cut off");
    const areAlive = () => hosts.filter((pid) => isRunning(pid));
    await vi.waitFor(() => expect(areAlive()).toEqual([]), waiting);
  });

  it("ends a server whose model still loads", async () => {
    const server = await start([], { isReady: false });
    server.child.kill("SIGTERM");
    expect(await server.ended).toEqual({ code: 0, signal: null });
    expect(server.stderr()).toBe("");
  });
});

function isRunning(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

describe("an app that closes", () => {
  const body = { prompt: "x", num_inference_steps: 1 };
  const ask = (url: string) => post(`${url}${drawing}`, body);

  it("gives what is under way longer than Fastify gives its hooks, if it may", async () => {
    const { url, app } = await serverOf({ stub: stubModel({ side: 16, stepMs: 11_000 }) }, { drainMs: 60_000 });
    const answer = ask(url);
    await sleep(300);
    const closed = app.close();
    expect((await answer).status).toBe(200);
    await closed;
  }, 40_000);

  it("as a part of another app has as long as that one gives its hooks, and says so", async () => {
    const lines: string[] = [];
    const app = Fastify({ pluginTimeout: 4000, logger: { level: "warn", stream: { write: (line) => void lines.push(line) } } }); // biome-ignore format: one line
    await app.register(imageServer, { models: { stub: stubModel({ side: 16, stepMs: 30_000 }) }, warm: [] });
    const url = await app.listen({ host: "127.0.0.1", port: 0 });
    expect(lines.map((line) => JSON.parse(line).msg)).toEqual([
      "Requests under way have 1000 ms when the app closes, not 30000: Fastify's pluginTimeout is 4000 ms. Give fastify() a longer one, or 0.",
    ]);
    const answer = ask(url);
    await sleep(300);
    const from = performance.now();
    await app.close();
    expect(performance.now() - from).toBeLessThan(3900);
    expectFailure(await answer, { status: 503, code: "draining", retry: true });
  });
});

describe.skipIf(!hasProc)("a disk that is full", () => {
  afterEach(killAll);
  const folders: string[] = [];
  afterAll(() => {
    for (const folder of folders) rmSync(folder, { recursive: true, force: true });
  });
  const folder = () => {
    const made = mkdtempSync(path.join(os.tmpdir(), "flowturbo-full-"));
    folders.push(made);
    return made;
  };
  async function expectService(server: ServerProcess): Promise<void> {
    // Costs are measured meanwhile, and written.
    for (const seed of [1, 2, 3]) expect((await draw(server, { ...quick, seed })).status).toBe(200);
    await sleep(2000);
    expect((await draw(server, { ...quick, n: 2 })).status).toBe(200);
    server.child.kill("SIGTERM");
    expect(await server.ended).toEqual({ code: 0, signal: null });
    expect(server.log().filter(({ level }) => level >= 50)).toEqual([]);
    expect(server.stderr()).toBe("");
  }

  it("takes no byte of the cache: the server starts, draws and ends all the same", async () => {
    const tables = (of: string) =>
      readdirSync(of, { recursive: true, withFileTypes: true }).filter((entry) => entry.name.endsWith(".json"));
    const [empty, full] = [folder(), folder()];
    // It would write: what launches cost.
    await expectService(await startProcess(["--cache", empty]));
    expect(tables(empty)).toHaveLength(1);
    await expectService(await startProcess(["--cache", full], { before: "ulimit -f 0" }));
    expect(tables(full)).toEqual([]);
  });

  it("or a cache that is no folder: the same", async () => {
    const file = path.join(folder(), "cache");
    writeFileSync(file, "no folder");
    await expectService(await startProcess(["--cache", path.join(file, "below")]));
  });

  it("under its log: it draws on", async () => {
    const { port } = await new Promise<{ port: number }>((resolve) => {
      const other = net.createServer().listen(0, "127.0.0.1", () => {
        const address = other.address() as net.AddressInfo;
        other.close(() => resolve(address));
      });
    });
    const server = await startProcess(["--cache", cache], { stdout: { file: "/dev/full", port } });
    await expectService(server);
  });
});

describe("clients that are slow to send", () => {
  afterEach(killAll);

  it("are cut off, with their head as with their body, and keep no others from being served", async () => {
    // A tenth of the times that the server asks for, so that the test is short.
    const preload = `
      import http from "node:http";
      import { syncBuiltinESMExports } from "node:module";
      const { createServer } = http;
      http.createServer = ({ headersTimeout, connectionsCheckingInterval, ...options }, ...rest) => {
        if (!headersTimeout || !connectionsCheckingInterval) throw new Error("The server sets no limits.");
        const times = { headersTimeout: headersTimeout / 10, connectionsCheckingInterval: connectionsCheckingInterval / 10 };
        const server = createServer({ ...options, ...times }, ...rest);
        let milliseconds = 0;
        Object.defineProperty(server, "requestTimeout", {
          get: () => milliseconds,
          set(value) { milliseconds = value / 10; },
        });
        return server;
      };
      syncBuiltinESMExports();`;
    const server = await start([], {
      env: { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(preload)}` },
    });
    const idle = Array.from({ length: 300 }, () => connect(server));
    const drip = (head: string, rest: string) => {
      const connection = connect(server);
      connection.send(head);
      const timer = setInterval(() => connection.send(rest), 100);
      const from = performance.now();
      return connection.closed.then(() => {
        clearInterval(timer);
        return { answer: answerIn(connection.received()), ms: performance.now() - from };
      });
    };
    const form = "multipart/form-data; boundary=x";
    const slow = [
      drip("GET /livez HTTP/1.1\r\nHost: x\r\n", "x-filler: 1\r\n"),
      drip("POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{", " "),
      drip(`POST ${drawing} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n`, "1\r\n \r\n"), // biome-ignore format: one line
      drip(`POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: ${form}\r\nContent-Length: 1000\r\n\r\n--x\r\n`, "x"), // biome-ignore format: one line
    ];
    const from = performance.now();
    expect((await draw(server, quick)).status).toBe(200);
    expect(performance.now() - from).toBeLessThan(3000);
    const [head, ...bodies] = await Promise.all(slow);
    for (const { answer } of [head!, ...bodies]) {
      expect(answer.status).toBe(408);
      expect(answer.body).toMatchObject({ error: { type: "invalid_request_error", code: "request_timeout" } });
    }
    // 1 s and 3 s, and up to 0.2 s until it is looked at.
    expect(head!.ms).toBeGreaterThan(900);
    expect(head!.ms).toBeLessThan(2900);
    for (const { ms } of bodies) expect(ms).toBeGreaterThan(2900);
    for (const { ms } of bodies) expect(ms).toBeLessThan(8000);
    for (const { socket } of idle) socket.destroy();
    await nothingOpen(server);
    expect(server.stderr()).toBe("");
  });
});
