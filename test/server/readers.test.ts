// Clients that are slow to read, that leave, or that send many requests at once: others are served, memory is bounded, and nothing stays behind.
import http from "node:http";
import type { AddressInfo, Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import Fastify, { type FastifyInstance } from "fastify";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from "vitest";
import { EventStream, type EventStreamOptions } from "../../lib/server/event-stream.js";
import { answerIn, connect, killAll, type Line, postText, type ServerProcess, startProcess, sumOf } from "./process.js";
import { stubModel } from "./stub.js";
import { events, quick as few, post, serverOf } from "./support.js";

const drawing = "/v1/images/generations";
const quick = { ...few, num_inference_steps: 2, guidance_scale: 1 };
const long = { prompt: "x", num_inference_steps: 1000, guidance_scale: 1 };
const waiting = { timeout: 20_000, interval: 30 };

describe("a stream of events", () => {
  let app: FastifyInstance;
  let stream: EventStream;
  let port: number;
  let dropped: number;
  afterEach(() => app.close());
  /** A server of one stream, and a client that takes nothing of it until it is told to. */
  async function open(options: EventStreamOptions) {
    dropped = 0;
    app = Fastify({ forceCloseConnections: true });
    const opened = new Promise<void>((resolve) => {
      app.get("/", (_request, reply) => {
        stream = new EventStream(reply, { onDrop: () => dropped++, ...options });
        resolve();
      });
    });
    await app.listen({ port: 0, host: "127.0.0.1" });
    port = (app.server.address() as AddressInfo).port;
    const client = connect({ port });
    client.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    await opened;
    await vi.waitFor(() => expect(client.received().includes("\r\n\r\n")).toBe(true), waiting);
    return client;
  }
  const partial = (text: string) => ({ type: "partial", data: { text }, isDroppable: true });

  it("drops what a later event makes up for while its reader is slow, and nothing else", async () => {
    const client = await open({ maxWaiting: 64 * 1024 });
    client.socket.pause();
    const text = "p".repeat(256 * 1024);
    // What the system's own buffers take is not known; it is megabytes.
    for (let index = 0; index < 100; index++) {
      stream.send(partial(text));
      await sleep(1);
    }
    expect(dropped).toBeGreaterThan(20);
    const before = dropped;
    for (let index = 0; index < 5; index++) stream.send({ type: "kept", data: { index }, id: index });
    expect(dropped).toBe(before);
    stream.end();
    client.socket.resume();
    await vi.waitFor(() => expect(/\r\n0\r\n\r\n$/.test(client.received())).toBe(true), waiting);
    const received = client.received();
    expect(received.match(/event: partial/g)).toHaveLength(100 - dropped);
    expect([...received.matchAll(/id: (\d)\nevent: kept\ndata: \{"index":(\d)\}\n\n/g)].map(([, id]) => id)).toEqual([..."01234"]); // biome-ignore format: one line
  });

  it("cuts off a reader that takes nothing, and no other", async () => {
    const client = await open({ maxWaiting: 1024, stuckMs: 600, keepAliveMs: 150 });
    const from = performance.now();
    client.socket.pause();
    for (let index = 0; index < 80; index++) stream.send({ type: "kept", data: { text: "k".repeat(256 * 1024) } });
    const connections = () => new Promise<number>((resolve) => app.server.getConnections((_, count) => resolve(count)));
    await vi.waitFor(async () => expect(await connections()).toBe(0), waiting);
    expect(performance.now() - from).toBeGreaterThan(500);
    // What is sent to nobody is nothing.
    stream.send({ type: "kept", data: {} });
    stream.end();
  });

  it("keeps a reader that is slow but takes", async () => {
    const client = await open({ maxWaiting: 1024, stuckMs: 600, keepAliveMs: 150 });
    client.socket.pause();
    for (let index = 0; index < 40; index++) stream.send({ type: "kept", data: { text: "k".repeat(256 * 1024) } });
    for (let index = 0; index < 20; index++) {
      await sleep(100);
      client.socket.resume();
      await sleep(5);
      client.socket.pause();
    }
    client.socket.resume();
    stream.end();
    await vi.waitFor(() => expect(/\r\n0\r\n\r\n$/.test(client.received())).toBe(true), waiting);
    expect(client.received().match(/event: kept/g)).toHaveLength(40);
  });

  it("sends comments while nothing is to be said, none to a reader that is slow, and none after its end", async () => {
    const client = await open({ keepAliveMs: 60, stuckMs: 60_000 });
    await vi.waitFor(() => expect(client.received().match(/: keep-alive\n\n/g)?.length).toBeGreaterThan(2), waiting);
    stream.send({ type: "kept", data: {} });
    stream.end();
    await vi.waitFor(() => expect(/\r\n0\r\n\r\n$/.test(client.received())).toBe(true), waiting);
    const { length } = client.received();
    await sleep(300);
    expect(client.received()).toHaveLength(length);
  });
});

describe("a client that does not read", () => {
  // So many pixels of noise are two megabytes in base64. The system's own buffers take forty at most.
  const model = stubModel({ side: 720, stepMs: 30 });
  const size = "720x720";
  let server: Awaited<ReturnType<typeof serverOf>>;
  const metric = async (name: string) => sumOf(await (await fetch(`${server.url}/metrics`)).text(), name);
  const port = () => (server.app.server.address() as AddressInfo).port;
  beforeEach(async () => {
    server = await serverOf({ stub: model }, { drainMs: 0, maxImages: 30 });
  });
  afterEach(() => server.close());

  it("of a stream loses partial images, not the pictures, and delays nobody", async () => {
    let largest = 0;
    const watch = setInterval(() => {
      for (const socket of held) largest = Math.max(largest, socket.writableLength);
    }, 5);
    const held = new Set<Socket>();
    server.app.server.on("connection", (socket: Socket) => held.add(socket));
    const client = connect({ port: port() });
    const body = { prompt: "x", size, num_inference_steps: 8, n: 10, stream: true, partial_images: 3 };
    client.send(postText(drawing, JSON.stringify(body)));
    await vi.waitFor(() => expect(client.received().includes("text/event-stream")).toBe(true), waiting);
    client.socket.pause();
    await vi.waitFor(async () => expect(await metric("flowturbo_dropped_partials_total")).toBeGreaterThan(5), waiting);
    const from = performance.now();
    const answer = await post(`${server.url}${drawing}`, { prompt: "x", num_inference_steps: 2 });
    expect([answer.status, performance.now() - from < 3000]).toEqual([200, true]);
    await vi.waitFor(async () => expect(await metric("flowturbo_runs_open")).toBe(0), waiting);
    clearInterval(watch);
    const dropped = await metric("flowturbo_dropped_partials_total");
    client.socket.resume();
    await vi.waitFor(() => expect(/\r\n0\r\n\r\n$/.test(client.received())).toBe(true), waiting);
    expect(client.received().match(/event: image_generation.completed/g)).toHaveLength(10);
    expect(client.received().match(/event: image_generation.partial_image/g) ?? []).toHaveLength(30 - dropped);
    // The ten pictures, which nothing makes up for, and a megabyte or two.
    expect(largest / 2 ** 20).toBeLessThan(25);
  });

  it("of a job's events loses partial images, and reads to the end later", async () => {
    const body = { prompt: "x", size, num_inference_steps: 40, partial_images: 30 };
    const { body: job } = await post(`${server.url}/v1/jobs`, body);
    const client = connect({ port: port() });
    client.send(`GET /v1/jobs/${job.id}/events HTTP/1.1\r\nHost: x\r\n\r\n`);
    await vi.waitFor(() => expect(client.received().includes("job.queued")).toBe(true), waiting);
    client.socket.pause();
    const all = [];
    for await (const event of events((await fetch(`${server.url}/v1/jobs/${job.id}/events`)).body!))
      all.push(event.event);
    expect(all.filter((type) => type === "job.progress")).toHaveLength(40);
    expect(all.at(-1)).toBe("job.completed");
    expect(await metric("flowturbo_dropped_partials_total")).toBeGreaterThan(5);
    client.socket.resume();
    await vi.waitFor(
      () => expect(/event: job.completed[\s\S]*\r\n0\r\n\r\n$/.test(client.received())).toBe(true),
      waiting,
    );
    expect(client.received().match(/event: job.progress/g)).toHaveLength(40);
  });

  it("of an answer, and hangs up in the middle of it, is one that hung up", async () => {
    const client = connect({ port: port() });
    client.send(postText(drawing, JSON.stringify({ prompt: "x", size, num_inference_steps: 2, n: 30 })));
    client.socket.pause();
    await sleep(100);
    await vi.waitFor(async () => expect(await metric("flowturbo_runs_open")).toBe(0), waiting);
    client.socket.destroy();
    await vi.waitFor(() => expect(answersOf(server.log.map((line) => JSON.parse(line)))).toEqual([499]), waiting);
  });
});

const answersOf = (lines: readonly Line[], route = drawing) =>
  lines.filter((line) => line.msg === "answered" && line.route === route).map(({ status }) => status as number);

describe("clients that leave", () => {
  let server: ServerProcess;
  beforeAll(async () => {
    server = await startProcess(["--max-steps", "1000", "--max-batch", "2", "--max-queue", "1000"]);
  });
  afterAll(killAll);
  const metric = (name: string) => server.metric(name);
  const nothingOpen = () =>
    vi.waitFor(async () => {
      for (const name of ["runs_open", "requests_running", "pictures_running", "queue_waiting"])
        expect([name, await metric(`flowturbo_${name}`)]).toEqual([name, 0]);
    }, waiting);
  /** Statuses that were logged since. */
  const since = () => {
    const { length } = answersOf(server.log());
    // The answers that tests give to themselves, to see that it serves, are 200.
    return () =>
      answersOf(server.log())
        .slice(length)
        .filter((status) => status !== 200);
  };

  it("while their body is uploaded", async () => {
    const statuses = since();
    const head = `POST ${drawing} HTTP/1.1\r\nHost: x\r\n`;
    const clients = [
      `${head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"prompt":`,
      `${head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"p`,
      `${head}Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx`,
    ].map((text) => {
      const client = connect(server);
      client.send(text);
      return client;
    });
    await sleep(200);
    for (const { socket } of clients) socket.destroy();
    await vi.waitFor(() => expect(statuses()).toEqual([499, 499, 499]), waiting);
    await nothingOpen();
    expect((await post(`${server.url}${drawing}`, quick)).status).toBe(200);
  });

  it("while they wait, or are drawn", async () => {
    const statuses = since();
    const before = await metric("flowturbo_requests_total");
    const clients = Array.from({ length: 8 }, (_, seed) => {
      const client = connect(server);
      client.send(postText(drawing, JSON.stringify({ ...long, n: 2, seed, stream: seed % 2 === 1 })));
      return client;
    });
    await vi.waitFor(async () => {
      expect(await metric("flowturbo_requests_running")).toBeGreaterThan(0);
      expect((await metric("flowturbo_queue_waiting")) + (await metric("flowturbo_requests_running"))).toBe(8);
    }, waiting);
    for (const { socket } of clients) socket.destroy();
    await nothingOpen();
    await vi.waitFor(() => expect(statuses()).toEqual(Array(8).fill(499)), waiting);
    expect(await metric("flowturbo_requests_total")).toBe(before + 8);
    expect((await post(`${server.url}${drawing}`, quick)).status).toBe(200);
  });

  it("with many requests that they sent without waiting for answers: all of them are stopped", async () => {
    const statuses = since();
    const client = connect(server);
    for (let seed = 0; seed < 30; seed++)
      client.send(postText(drawing, JSON.stringify({ ...long, seed, stream: seed === 3 })));
    await vi.waitFor(async () => expect(await metric("flowturbo_runs_open")).toBe(30), waiting);
    client.socket.destroy();
    await nothingOpen();
    await vi.waitFor(() => expect(statuses()).toEqual(Array(30).fill(499)), waiting);
    expect((await post(`${server.url}${drawing}`, quick)).status).toBe(200);
    expect(server.stderr()).toBe("");
  });

  it("and those who stay get the answers to such requests in their order", async () => {
    const client = connect(server);
    for (const seed of [1, 2, 3]) client.send(postText(drawing, JSON.stringify({ ...quick, seed })));
    await vi.waitFor(() => expect(client.received().match(/HTTP\/1\.1 200/g)).toHaveLength(3), waiting);
    const answers = client.received().split("HTTP/1.1 200").slice(1);
    expect(answers.map((text) => answerIn(`HTTP/1.1 200${text}`).body.seeds)).toEqual([[1], [2], [3]]);
    client.socket.destroy();
  });

  it("or do not: two hundred requests at once, on connections that are kept, are answered without a warning", async () => {
    const agent = new http.Agent({ keepAlive: true, maxSockets: 25 });
    const ask = (seed: number) =>
      new Promise<number>((resolve, reject) => {
        const body = JSON.stringify({ ...quick, seed, stream: seed % 4 === 0 });
        const request = http.request(
          `${server.url}${drawing}`,
          { method: "POST", agent, headers: { "content-type": "application/json" } },
          (response) => {
            // biome-ignore format: one line
            response.resume().once("end", () => resolve(response.statusCode!));
          },
        );
        request.once("error", reject);
        request.end(body);
      });
    const statuses = await Promise.all(Array.from({ length: 200 }, (_, seed) => ask(seed)));
    agent.destroy();
    expect(statuses).toEqual(Array(200).fill(200));
    await nothingOpen();
    expect(server.stderr()).toBe("");
  });

  it("leave nothing that keeps the server from ending at once", async () => {
    await nothingOpen();
    const from = performance.now();
    server.child.kill("SIGTERM");
    expect(await server.ended).toEqual({ code: 0, signal: null });
    // It would wait half a minute for whatever is under way.
    expect(performance.now() - from).toBeLessThan(10_000);
    expect(server.stderr()).toBe("");
  });
});
