// examples/service.js as a process of its own: what it answers, what cannot end it, and how it ends.
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import net from "node:net";
import path from "node:path";
import { errorTable } from "flowturbo";
import sharp from "sharp";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { root } from "../support/fixtures.js";

interface Service {
  readonly child: ChildProcess;
  readonly url: string;
  readonly port: number;
  readonly ended: Promise<{ code: number | null; signal: string | null }>;
  /** What it has written to its standard error. */
  stderr(): string;
}

const services: Service[] = [];
let service: Service;
const start = (...args: string[]) => startWith({}, ...args);
async function startWith(env: NodeJS.ProcessEnv, ...args: string[]): Promise<Service> {
  const child = spawn(process.execPath, [path.join(root, "examples/service.js"), "--port", "0", ...args], {
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, ...env },
  });
  let stderr = "";
  child.stderr!.on("data", (chunk) => {
    stderr += chunk;
  });
  const ended = once(child, "close").then(([code, signal]) => ({ code, signal }));
  const url = await new Promise<string>((resolve, reject) => {
    child.stdout!.on("data", (chunk) => {
      const found = String(chunk).match(/http:\S+/)?.[0];
      if (found) resolve(found);
    });
    void ended.then(({ code }) => reject(new Error(`the service ended with code ${code}: ${stderr}`)));
  });
  const started = { child, url, port: Number(new URL(url).port), ended, stderr: () => stderr };
  services.push(started);
  return started;
}
afterEach(async () => {
  for (const { child, ended } of services.splice(0)) {
    child.kill("SIGKILL");
    await ended;
  }
});

/** A connection on which a test writes what it likes. */
function connect({ port }: Service) {
  const socket = net.connect(port, "127.0.0.1");
  let received = "";
  socket.setEncoding("latin1").on("data", (text) => {
    received += text;
  });
  socket.on("error", () => {});
  const closed = new Promise((resolve) => socket.once("close", resolve));
  return { socket, closed, received: () => received, send: (text: string) => socket.write(text) };
}
/** All that the service answers to some bytes, on a connection that it closes. */
async function raw(to: Service, text: string): Promise<string> {
  const connection = connect(to);
  connection.send(text);
  await connection.closed;
  return connection.received();
}
const get = (target: string, method = "GET") => `${method} ${target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n`;
const post = (to: Service, body: unknown, type = "application/json") =>
  fetch(`${to.url}/generate`, {
    method: "POST",
    headers: { "content-type": type },
    body: typeof body === "string" ? body : JSON.stringify(body),
  });
const stats = async ({ url }: Service) =>
  (await fetch(`${url}/stats`)).json() as Promise<{ running: { requests: number }; requests: Record<string, number> }>;
/** Waits until the service draws. */
const drawing = (to: Service) => vi.waitFor(async () => expect((await stats(to)).running.requests).toBeGreaterThan(0), { timeout: 20_000, interval: 20 }); // biome-ignore format: one line
/** Hosts of ONNX Runtime that a process has started, by /proc. */
const hostsOf = (pid: number) =>
  readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .filter((name) => {
      try {
        const text = readFileSync(`/proc/${name}/stat`, "utf8");
        const [state, parent] = text.slice(text.lastIndexOf(")") + 2).split(" ");
        return Number(parent) === pid && state !== "Z";
      } catch {
        return false;
      }
    })
    .map(Number);
const isRunning = (pid: number) => {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, "utf8");
    return !text.slice(text.lastIndexOf(")") + 2).startsWith("Z");
  } catch {
    return false;
  }
};
const hasProc = process.platform === "linux";

describe("answers", () => {
  beforeEach(async () => {
    service = await start();
  });

  it("with a picture, and the same one for the same seed, by GET and by POST", async () => {
    expect(service.url).toMatch(/^http:\/\/127\.0\.0\.1:/);
    const drawn = async (response: Response) => {
      expect([response.status, response.headers.get("content-type"), response.headers.get("x-seed")]).toEqual([
        200,
        "image/png",
        "4",
      ]);
      return Buffer.from(await response.arrayBuffer());
    };
    const query = `${service.url}/generate?prompt=a+large+blue+square&seed=4&steps=3&guidanceScale=2.5`;
    const body = { prompt: "a large blue square", seed: 4, steps: 3, guidanceScale: 2.5 };
    const [first, ...others] = await Promise.all([fetch(query), fetch(query), post(service, body)].map((each) => each.then(drawn))); // biome-ignore format: one line
    for (const other of others) expect(first!.equals(other)).toBe(true);
    const { width, comments } = await sharp(first!).metadata();
    expect(width).toBe(64);
    // Nothing of the server is in the file.
    expect(comments![0]!.text).toMatch(/"seed":4/);
    expect(comments![0]!.text).not.toMatch(/"model"|"runtime"/);
    const edited = await post(service, { ...body, image: { file: first!.toString("base64") }, strength: 0.5 });
    expect((await drawn(edited)).equals(first!)).toBe(false);
  });

  it("wrong requests with a status and words for the client, and serves on", async () => {
    const wrong: [number, RegExp, Promise<Response>][] = [
      [
        400,
        /Expected a whole number from 1 to 1000 for steps but received 0/,
        fetch(`${service.url}/generate?prompt=x&steps=0`),
      ],
      [400, /for steps but received "many"/, fetch(`${service.url}/generate?prompt=x&steps=many`)],
      [400, /for seed but received ""/, fetch(`${service.url}/generate?prompt=x&seed=`)],
      [400, /for width but received "1e9"/, fetch(`${service.url}/generate?prompt=x&width=1e9`)],
      [400, /for deadlineMs but received "NaN"/, fetch(`${service.url}/generate?prompt=x&deadlineMs=NaN`)],
      [400, /for prompt but received undefined/, fetch(`${service.url}/generate`)],
      [400, /no parameter "priority"/, fetch(`${service.url}/generate?prompt=x&priority=100`)],
      [400, /no parameter "image"/, fetch(`${service.url}/generate?prompt=x&image=/etc/passwd`)],
      [400, /no parameter "__proto__"/, fetch(`${service.url}/generate?prompt=x&__proto__=1`)],
      [400, /seed is given more than once/, fetch(`${service.url}/generate?prompt=x&seed=1&seed=2`)],
      [400, /not JSON/, post(service, "{")],
      [400, /a string for prompt/, post(service, { prompt: 3 })],
      [400, /request is wrong at prompt/, post(service, {})],
      [400, /an object of options/, post(service, "null")],
      [400, /an object of options/, post(service, [])],
      [400, /received no{39}\.$/, post(service, { [`n${"o".repeat(1e6)}`]: 1 })],
      [400, /at most 8192 characters|<=8192/, post(service, { prompt: "x", blocks: "H".repeat(6e6) })],
      [400, /wrong at image/, post(service, { prompt: "x", image: "/etc/passwd" })],
      [400, /allowPaths/, post(service, { prompt: "x", allowPaths: true })],
      [400, /received count/, post(service, { prompt: "x", count: 1000 })],
      [400, /received priority/, post(service, { prompt: "x", priority: 100 })],
      [400, /a string for prompt/, post(service, { prompt: ["x", "y"] })],
      [400, /picture of at most 100 megapixels/, post(service, { prompt: "x", image: { file: "AAAA" } })],
      [415, /application\/json/, post(service, { prompt: "x" }, "text/plain")],
      [404, /nothing/, fetch(`${service.url}/`)],
      [404, /nothing/, fetch(`${service.url}/favicon.ico`)],
      [404, /nothing/, fetch(`${service.url}/generate/`)],
      [405, /GET, POST/, fetch(`${service.url}/generate`, { method: "PUT" })],
      [405, /GET, POST/, fetch(`${service.url}/generate`, { method: "DELETE" })],
      [405, /GET/, fetch(`${service.url}/stats`, { method: "POST" })],
    ];
    for (const [status, message, answer] of wrong) {
      const response = await answer;
      const { code, message: said } = (await response.json()) as { code: string | null; message: string };
      expect(said).toMatch(message);
      expect(response.status, said).toBe(status);
      expect(said).not.toContain(root);
      if (code !== null) expect(errorTable).toHaveProperty(code);
      if (status === 405) expect(response.headers.get("allow")).toMatch(/GET/);
    }
    const { requests } = await stats(service);
    // The picture that was drawn before it listened, and none of these.
    expect(requests.completed).toBe(1);
    expect(service.stderr()).toBe("");
    expect((await fetch(`${service.url}/generate?prompt=x&steps=1`)).status).toBe(200);
  });

  it("bytes that no client of good will sends, and serves on", async () => {
    expect(await raw(service, get("//"))).toMatch(/^HTTP\/1\.1 400 /);
    expect(await raw(service, get("//generate"))).toMatch(/^HTTP\/1\.1 404 /);
    expect(await raw(service, get("http://[/"))).toMatch(/^HTTP\/1\.1 400 /);
    expect(await raw(service, get("/%"))).toMatch(/^HTTP\/1\.1 404 /);
    expect(await raw(service, get("*", "OPTIONS"))).toMatch(/^HTTP\/1\.1 40[45] /);
    expect(await raw(service, get("/generate", "BREW"))).toMatch(/^HTTP\/1\.1 400 /);
    expect(await raw(service, get("x:1", "CONNECT"))).not.toMatch(/ 200 /);
    expect(await raw(service, "nonsense\r\n\r\n")).toMatch(/^HTTP\/1\.1 400 /);
    expect(await raw(service, get("/__proto__"))).toMatch(/^HTTP\/1\.1 404 /);
    const half = connect(service);
    half.send("POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{");
    await new Promise((resolve) => setTimeout(resolve, 50));
    half.socket.destroy();
    expect((await fetch(`${service.url}/health`)).status).toBe(200);
    expect(service.child.exitCode).toBe(null);
    // A client that hangs up is nothing for the log.
    expect(service.stderr()).toBe("");
  });

  it("lists of millions of wrong entries without reading them", async () => {
    const zeros = (key: string) => post(service, `{${key}[${"0,".repeat(15.9e6 - 50)}0]}`);
    for (const [key, message] of [
      ['"prompt":', /a string for prompt/],
      ['"prompt":"x","negativePrompt":', /a string for negativePrompt/],
      ['"prompt":"x","noise":', /received noise/],
      ['"prompt":"x","stages":', /received stages/],
      ['"prompt":"x","seed":', /at most 1024 entries for seed/],
    ] as const) {
      const response = await zeros(key);
      expect(((await response.json()) as Error).message).toMatch(message);
      expect(response.status).toBe(400);
    }
    expect((await fetch(`${service.url}/health`)).status).toBe(200);
    expect(service.stderr()).toBe("");
  }, 60_000);

  it("a body that is too large before it has come, announced or not", async () => {
    const head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
    const announced = connect(service);
    announced.send(`${head}Content-Length: 99000000\r\n\r\n`);
    await announced.closed;
    expect(announced.received()).toMatch(/^HTTP\/1\.1 413 /);
    const chunked = connect(service);
    chunked.send(`${head}Transfer-Encoding: chunked\r\n\r\n`);
    const megabyte = `100000\r\n${"x".repeat(0x100000)}\r\n`;
    let sent = 0;
    while (!chunked.socket.destroyed && chunked.received() === "" && sent++ < 60)
      await new Promise((resolve) => chunked.socket.write(megabyte, resolve));
    await vi.waitFor(() => expect(chunked.received()).toMatch(/^HTTP\/1\.1 413 /));
    expect(sent).toBeLessThan(60);
    await chunked.closed;
    expect((await fetch(`${service.url}/health`)).status).toBe(200);
  });

  it("health and statistics, by HEAD or GET on a connection that is kept", async () => {
    expect(await (await fetch(`${service.url}/health`)).json()).toEqual({
      status: "ready",
      model: "shapes",
      restarts: 0,
    });
    expect((await fetch(`${service.url}/health`, { method: "HEAD" })).status).toBe(200);
    const live = await fetch(`${service.url}/live`);
    expect({ status: live.status, body: await live.json() }).toEqual({ status: 200, body: { live: true } });
    const kept = connect(service);
    for (const count of [1, 2]) {
      kept.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
      await vi.waitFor(() => expect(kept.received().match(/HTTP\/1\.1 200/g)).toHaveLength(count));
    }
    expect(kept.received()).not.toMatch(/connection: close/i);
    kept.socket.destroy();
    expect(Object.keys(await stats(service))).toContain("requests");
  });

  it("a full queue with 429 and Retry-After, and a limit that nothing meets with the table's status", async () => {
    const limit = await fetch(`${service.url}/generate?prompt=x&deadlineMs=0.001`);
    expect(await limit.json()).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE" });
    expect(limit.status).toBe(422);
    const hangUp = new AbortController();
    const calls = Array.from({ length: 60 }, (_, seed) =>
      fetch(`${service.url}/generate?prompt=x&steps=900&seed=${seed}`, { signal: hangUp.signal }).catch(() => null),
    );
    const full = (await Promise.race(calls))!;
    expect([full.status, await full.json()]).toMatchObject([429, { code: "ERR_FLOWTURBO_QUEUE_FULL" }]);
    expect(full.headers.get("retry-after")).toMatch(/^[1-9]\d*$/);
    hangUp.abort();
    await Promise.all(calls);
    // All of them have left, and the service draws for others.
    await vi.waitFor(async () => expect((await stats(service)).running.requests).toBe(0), { timeout: 20_000 });
    expect((await fetch(`${service.url}/generate?prompt=x&steps=1`)).status).toBe(200);
    expect(service.stderr()).toBe("");
  });
});

describe("a client that hangs up", () => {
  it("aborts its call", async () => {
    service = await start();
    const hangUp = new AbortController();
    const call = fetch(`${service.url}/generate?prompt=x&steps=1000`, { signal: hangUp.signal }).catch(() => null);
    await drawing(service);
    hangUp.abort();
    await call;
    await vi.waitFor(async () => expect((await stats(service)).requests.aborted).toBe(1), { timeout: 20_000 });
    expect((await fetch(`${service.url}/generate?prompt=x&steps=1`)).status).toBe(200);
  });
});

describe("a client that sends requests without waiting for answers", () => {
  it("aborts all of them when it hangs up", async () => {
    service = await start();
    const client = connect(service);
    for (const seed of [1, 2, 3])
      client.send(`GET /generate?prompt=x&steps=900&seed=${seed} HTTP/1.1\r\nHost: x\r\n\r\n`);
    await vi.waitFor(async () => expect((await stats(service)).running.requests).toBe(3), { timeout: 20_000, interval: 20 }); // biome-ignore format: one line
    client.socket.destroy();
    await vi.waitFor(async () => expect((await stats(service)).requests.aborted).toBe(3), { timeout: 20_000 });
    expect((await stats(service)).requests.completed).toBe(1);
    expect(service.stderr()).toBe("");
  }, 60_000);
});

describe("a client that is slow to send", () => {
  it("is cut off, with its head as with its body", async () => {
    // A hundredth of the times that the service asks for.
    const preload = `
      import http from "node:http";
      import { syncBuiltinESMExports } from "node:module";
      const { createServer } = http;
      http.createServer = (limits, ...rest) =>
        createServer(Object.fromEntries(Object.entries(limits).map(([name, ms]) => [name, ms / 100])), ...rest);
      syncBuiltinESMExports();`;
    service = await startWith({ NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(preload)}` });
    const silent = connect(service);
    silent.send("GET /health HTTP/1.1\r\nHost: ");
    const slow = connect(service);
    slow.send("POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{");
    await Promise.all([silent.closed, slow.closed]);
    for (const { received } of [silent, slow]) expect(received()).toMatch(/^HTTP\/1\.1 408 /);
    expect((await fetch(`${service.url}/health`)).status).toBe(200);
    expect(service.stderr()).toBe("");
  }, 20_000);
});

describe("a start that cannot be", () => {
  it.each([
    [["--port", "abc"], /whole number from 0 to 65535 for --port but received "abc"/],
    [["--port", "70000"], /for --port but received "70000"/],
    [["--port", "0", "--drain", "soon"], /number of seconds .*for --drain but received "soon"/],
    [["--pot", "1"], /--pot/],
  ])("%j ends at once with one sentence", (args, message) => {
    const { status, stderr } = spawnSync(process.execPath, [path.join(root, "examples/service.js"), ...args], {
      encoding: "utf8",
      // One that starts all the same would serve for ever.
      timeout: 20_000,
    });
    expect(stderr).toMatch(message);
    expect(stderr.trim().split("\n")).toHaveLength(1);
    expect(status).toBe(2);
  });

  it("says that another program listens there", async () => {
    const other = net.createServer().listen(0, "127.0.0.1");
    await once(other, "listening");
    const { port } = other.address() as net.AddressInfo;
    try {
      const failed = start("--port", String(port));
      await expect(failed).rejects.toThrow(/code 1: Cannot listen on 127\.0\.0\.1:\d+: another program listens there; choose another --port\.\n$/); // biome-ignore format: one line
    } finally {
      other.close();
    }
  });
});

describe("SIGTERM", () => {
  it("lets what is in flight finish, closes what is idle, accepts nothing more, and ends with code 0", async () => {
    service = await start();
    const idle = connect(service);
    idle.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
    await vi.waitFor(() => expect(idle.received()).toMatch(/"ready"/));
    const busy = connect(service);
    busy.send("GET /generate?prompt=x&steps=400&seed=1 HTTP/1.1\r\nHost: x\r\n\r\n");
    await drawing(service);
    service.child.kill("SIGTERM");
    await idle.closed;
    const refused = await fetch(`${service.url}/health`).catch((error) => error.cause.code);
    // A connection of the pool may just have been closed.
    expect(refused).toMatch(/^(ECONN(REFUSED|RESET)|UND_ERR_SOCKET)$/);
    expect(busy.received()).toBe("");
    await busy.closed;
    const answer = busy.received();
    expect(answer).toMatch(/^HTTP\/1\.1 200 [\s\S]*connection: close/i);
    const length = Number(answer.match(/content-length: (\d+)/i)![1]);
    const body = Buffer.from(answer.slice(answer.indexOf("\r\n\r\n") + 4), "latin1");
    expect(body).toHaveLength(length);
    expect((await sharp(body).metadata()).format).toBe("png");
    expect(await service.ended).toEqual({ code: 0, signal: null });
    expect(service.stderr()).toBe("");
  });

  it("answers 503 to what does not finish in time, and ends with code 0", async () => {
    service = await start("--drain", "0.2");
    const call = fetch(`${service.url}/generate?prompt=x&steps=1000&width=128&height=128`);
    await drawing(service);
    service.child.kill("SIGTERM");
    const response = await call;
    expect([response.status, await response.json()]).toEqual([503, { code: null, message: "The service is ending." }]);
    expect(await service.ended).toEqual({ code: 0, signal: null });
  });

  it("ends an idle service, however many connections are open", async () => {
    service = await start();
    const silent = connect(service);
    await once(silent.socket, "connect");
    service.child.kill("SIGINT");
    expect(await service.ended).toEqual({ code: 0, signal: null });
    await silent.closed;
  });

  it("sent twice ends it at once, with its children", async () => {
    service = await start("--drain", "600");
    const call = fetch(`${service.url}/generate?prompt=x&steps=1000&width=128&height=128`).catch(() => "cut off");
    await drawing(service);
    const hosts = hasProc ? hostsOf(service.child.pid!) : [];
    if (hasProc) expect(hosts.length).toBeGreaterThan(0);
    service.child.kill("SIGTERM");
    await vi.waitFor(() => expect(fetch(`${service.url}/health`)).rejects.toThrow());
    service.child.kill("SIGTERM");
    expect(await service.ended).toEqual({ code: 143, signal: null });
    expect(await call).toBe("cut off");
    await vi.waitFor(() => expect(hosts.filter(isRunning)).toEqual([]));
  });
});
