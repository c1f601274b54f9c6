/**
 * A Redis of one's own, for tests and benchmarks of the fleet: `REDIS_SERVER`, or redis-server on the PATH. Tests on it say why they are
 * skipped where it is absent.
 */

import { accessSync, constants, readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { GuardedProcess } from "./processes.js";

const executable = [
  process.env.REDIS_SERVER,
  ...(process.env.PATH ?? "").split(path.delimiter).map((folder) => path.join(folder, "redis-server")),
].find((file) => {
  try {
    if (file) accessSync(file, constants.X_OK);
    return Boolean(file);
  } catch {
    return false;
  }
});

/** Why there is none here; null if there is. */
export const noRedis = executable
  ? null
  : "there is no redis-server (apt-get install redis-server, or REDIS_SERVER=<its executable>)";

// In CI it is always there, so that nothing is skipped silently.
if (noRedis && process.env.CI) throw new Error(`Redis: ${noRedis}.`);

export interface RedisOptions {
  /**
   * When its log of writes is flushed to the disk: `"everysec"`, or `"always"` before each answer. A process that is killed loses little or nothing
   * by either: what the system has taken, the system keeps. `"none"`: there is no log, and it is empty after each restart. Default: `"everysec"`.
   */
  readonly log?: "everysec" | "always" | "none";
  /** What clients have to say, where its flags ask for one. */
  readonly password?: string;
  /** Further flags, such as `["--maxmemory", "50mb"]`. */
  readonly flags?: readonly string[];
}

/** A redis-server on a port of 127.0.0.1, with its files in a folder of its own. It keeps both for as long as it is not stopped. */
export class TestRedis {
  readonly port: number;
  readonly folder: string;
  readonly #options: RedisOptions;
  #server: GuardedProcess | null = null;

  private constructor(port: number, folder: string, options: RedisOptions) {
    this.port = port;
    this.folder = folder;
    this.#options = options;
  }

  /** @throws Error where there is none, or where it does not start */
  static async start(options: RedisOptions = {}): Promise<TestRedis> {
    if (noRedis) throw new Error(`Redis: ${noRedis}.`);
    const folder = await mkdtemp(path.join(os.tmpdir(), "flowturbo-redis-"));
    let failure: unknown;
    // Another process may take the port before the server does.
    for (let attempt = 0; attempt < 5; attempt++) {
      const redis = new TestRedis(await freePort(), folder, options);
      try {
        await redis.start();
        return redis;
      } catch (error) {
        failure = error;
      }
    }
    await rm(folder, { recursive: true, force: true });
    throw failure;
  }

  /** `redis://127.0.0.1:<port>` */
  get url(): string {
    return `redis://127.0.0.1:${this.port}`;
  }

  /** @throws Error while it does not run */
  get pid(): number {
    if (!this.#server) throw new Error("This Redis does not run.");
    return this.#server.pid;
  }

  /** Starts it where it does not run, and waits until it answers: its log has been read then. */
  async start(): Promise<void> {
    if (this.#server) return;
    const { log = "everysec", flags = [] } = this.#options;
    const server = new GuardedProcess(
      executable!,
      [
        ...["--port", String(this.port), "--bind", "127.0.0.1", "--dir", this.folder, "--save", ""],
        ...(log === "none" ? ["--appendonly", "no"] : ["--appendonly", "yes", "--appendfsync", log]),
        ...flags,
      ],
      { cwd: this.folder },
    );
    this.#server = server;
    // Asked whose process answers: another server may have the port.
    const isReady = (answer: string) => answer.includes(`process_id:${server.pid}\r`) && answer.includes("loading:0\r");
    while (!isReady(await answerOf(this.port, this.#options.password))) {
      if (server.ending) {
        this.#server = null;
        throw new Error(`redis-server ended: ${server.lines.slice(-5).join("\n")}\n${server.errors}`);
      }
      await sleep(5);
    }
  }

  /** Ends it, and keeps port and folder. SIGTERM has it write and flush its log; with SIGKILL it is gone at once. */
  async kill(signal: "SIGTERM" | "SIGKILL" = "SIGKILL"): Promise<void> {
    const server = this.#server;
    this.#server = null;
    await server?.stop(signal);
  }

  /** Ends it and starts it again: connections are lost, its data are there (but for `log: "none"`). */
  async restart(signal: "SIGTERM" | "SIGKILL" = "SIGTERM"): Promise<void> {
    await this.kill(signal);
    await this.start();
  }

  /** It is gone for so many milliseconds: connections are refused. Resolves when it answers again. */
  async pause(milliseconds: number, signal: "SIGTERM" | "SIGKILL" = "SIGKILL"): Promise<void> {
    await this.kill(signal);
    await sleep(milliseconds);
    await this.start();
  }

  /** It hangs for so many milliseconds: connections stay, and nothing is answered. */
  async freeze(milliseconds: number): Promise<void> {
    this.#server?.kill("SIGSTOP");
    await sleep(milliseconds);
    this.#server?.kill("SIGCONT");
  }

  /** Ends it and removes its files. Safe to call twice. */
  async stop(): Promise<void> {
    await this.kill();
    await rm(this.folder, { recursive: true, force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }
}

/**
 * A port that nobody listens at, and that the system gives to no connection of its own: while the server is away, a client that tries
 * again and again could otherwise be connected to itself, and keep the port.
 */
async function freePort(): Promise<number> {
  const end = firstOwnPort();
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * (end - 10_000));
    const isFree = await new Promise<boolean>((resolve) => {
      const server = net.createServer();
      server.once("error", () => resolve(false));
      server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
    });
    if (isFree) return port;
  }
}

/** The first port that the system gives to connections. */
function firstOwnPort(): number {
  try {
    const first = Number(readFileSync("/proc/sys/net/ipv4/ip_local_port_range", "utf8").split(/\s/)[0]);
    return first > 11_000 ? first : 32_768;
  } catch {
    // Another system: all of them begin later.
    return 32_768;
  }
}

/** What a server says of itself; empty where none answers. */
function answerOf(port: number, password?: string): Promise<string> {
  return new Promise((resolve) => {
    let text = "";
    const socket = net.connect(port, "127.0.0.1", () => {
      if (password) socket.write(`AUTH ${password}\r\n`);
      socket.write("INFO server\r\nINFO persistence\r\nQUIT\r\n");
    });
    socket.setTimeout(1000, () => socket.destroy());
    socket.setEncoding("utf8").on("data", (chunk) => {
      text += chunk;
    });
    socket.on("error", () => {});
    socket.once("close", () => resolve(text));
  });
}
