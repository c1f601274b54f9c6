// `flowturbo serve` as a process of its own: for what signals, limits of the system and memory do to it.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import net from "node:net";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { root } from "../support/fixtures.js";

export interface Line {
  readonly level: number;
  readonly msg: string;
  readonly [field: string]: unknown;
}

export interface ServerProcess {
  readonly child: ChildProcess;
  /** `http://127.0.0.1:<port>` */
  readonly url: string;
  readonly port: number;
  readonly ended: Promise<{ code: number | null; signal: string | null }>;
  /** Lines of its log that are JSON. */
  log(): Line[];
  /** Lines of its log that tell of answers. */
  answers(): Line[];
  stderr(): string;
  /** Processes that run graphs for it. */
  hosts(): number[];
  /** Bytes of it that are in memory: now, and the most that ever were. */
  memory(): { readonly now: number; readonly most: number };
  /** Value of a metric, summed over its labels. */
  metric(name: string): Promise<number>;
}

const started: ServerProcess[] = [];

export interface ProcessOptions {
  readonly env?: NodeJS.ProcessEnv;
  /** What the shell does before, such as `ulimit -f 0`. */
  readonly before?: string;
  /** Where its stdout goes; its address then has to be known from its flags. */
  readonly stdout?: { readonly file: string; readonly port: number };
  /** Whether to wait until it is ready; otherwise until it listens. */
  readonly isReady?: boolean;
}

/** @param flags of `flowturbo serve` besides the port and the form of the log */
export async function startProcess(
  flags: readonly string[] = [],
  options: ProcessOptions = {},
): Promise<ServerProcess> {
  const { env, before, stdout, isReady = true } = options;
  const command = [path.join(root, "bin/flowturbo.js"), "serve", "--port", String(stdout?.port ?? 0)];
  const node = [process.execPath, ...command, "--log-format", "json", ...flags];
  const quoted = node.map((text) => `'${text.replaceAll("'", "'\\''")}'`).join(" ");
  const script = `${before ? `${before}; ` : ""}exec ${quoted}${stdout ? ` > ${stdout.file}` : ""}`;
  const child = spawn("/bin/sh", ["-c", script], {
    stdio: ["ignore", "pipe", "pipe"],
    env: { ...process.env, ...env },
  });
  let [text, errors] = ["", ""];
  child.stdout!.setEncoding("utf8").on("data", (chunk: string) => {
    text += chunk;
  });
  child.stderr!.setEncoding("utf8").on("data", (chunk: string) => {
    errors += chunk;
  });
  const ended = once(child, "close").then(([code, signal]) => ({ code, signal }));
  let isOver = false;
  void ended.then(() => {
    isOver = true;
  });
  const log = () =>
    text.split("\n").flatMap((line) => {
      try {
        return [JSON.parse(line) as Line];
      } catch {
        return [];
      }
    });
  const addressOf = () =>
    stdout
      ? `http://127.0.0.1:${stdout.port}`
      : log()
          .find(({ msg }) => msg?.startsWith("Server listening at "))
          ?.msg.match(/http:\S+/)?.[0];
  const until = async (is: () => boolean | Promise<boolean>) => {
    while (!(await is())) {
      if (isOver) throw new Error(`flowturbo serve ended with ${(await ended).code}: ${errors}${text}`);
      await sleep(20);
    }
  };
  await until(() => addressOf() !== undefined);
  const url = addressOf()!;
  const isOk = async (address: string) => (await fetch(`${url}${address}`).catch(() => null))?.ok === true;
  await until(() => isOk(isReady ? "/readyz" : "/livez"));
  const server: ServerProcess = {
    ...{ child, url, port: Number(new URL(url).port), ended, log },
    answers: () => log().filter(({ msg }) => msg === "answered"),
    stderr: () => errors,
    hosts: () => childrenOf(child.pid!),
    memory: () => {
      const status = readFileSync(`/proc/${child.pid}/status`, "utf8");
      const bytes = (name: string) => 1024 * Number(status.match(new RegExp(`^${name}:\\s+(\\d+) kB`, "m"))![1]);
      return { now: bytes("VmRSS"), most: bytes("VmHWM") };
    },
    metric: async (name) => sumOf(await (await fetch(`${url}/metrics`)).text(), name),
  };
  started.push(server);
  return server;
}

/** Ends all that were started. */
export async function killAll(): Promise<void> {
  for (const { child, ended } of started.splice(0)) {
    child.kill("SIGKILL");
    await ended;
  }
}

/** A metric of Prometheus' text, summed over its labels. */
export function sumOf(text: string, name: string): number {
  const values = [...text.matchAll(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, "gm"))].map(([, value]) =>
    Number(value),
  );
  if (values.length === 0) throw new Error(`There is no metric ${name}.`);
  return values.reduce((sum, value) => sum + value, 0);
}

/** Children of a process that run, by /proc; Linux only. */
function childrenOf(pid: number): number[] {
  return readdirSync("/proc")
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
}

export interface Connection {
  readonly socket: net.Socket;
  readonly closed: Promise<void>;
  /** All that came, a character a byte. */
  received(): string;
  send(text: string | Uint8Array): void;
}

/** A connection on which a test writes what it likes. */
export function connect({ port }: { readonly port: number }): Connection {
  const socket = net.connect(port, "127.0.0.1");
  let received = "";
  socket.setEncoding("latin1").on("data", (text) => {
    received += text;
  });
  socket.on("error", () => {});
  const closed = new Promise<void>((resolve) => socket.once("close", () => resolve()));
  return { socket, closed, received: () => received, send: (text) => void socket.write(text) };
}

/** A POST as bytes. @param extra further lines of its head */
export function postText(address: string, body: string, extra = ""): string {
  const length = Buffer.byteLength(body);
  return `POST ${address} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: ${length}\r\n${extra}\r\n${body}`;
}

export interface RawAnswer {
  readonly status: number;
  readonly head: string;
  // biome-ignore lint/suspicious/noExplicitAny: whatever the server sends
  readonly body: any;
}

/** The first answer among what a connection received. */
export function answerIn(text: string): RawAnswer {
  const end = text.indexOf("\r\n\r\n");
  const head = text.slice(0, end);
  const length = Number(head.match(/content-length: (\d+)/i)?.[1] ?? 0);
  const body = Buffer.from(text.slice(end + 4, end + 4 + length), "latin1").toString("utf8");
  return { status: Number(head.match(/^HTTP\/1\.1 (\d+)/)?.[1]), head, body: body === "" ? null : JSON.parse(body) };
}
