/** The log of `flowturbo serve` and `flowturbo worker`: lines of JSON on stdout, or of text where people read them. */

import { Writable } from "node:stream";
import type { Logger } from "../common/logger.js";
import { OptionError } from "../errors.js";
import type { CreateServerOptions } from "../server/index.js";

export const logLevels = ["fatal", "error", "warn", "info", "debug", "trace", "silent"];

export type LogFormat = "json" | "text";

/** A line of pino's. */
interface Line {
  readonly level: number;
  readonly time: number;
  readonly msg?: string;
  readonly err?: { readonly stack?: string; readonly message?: string };
  readonly [field: string]: unknown;
}

/** @throws OptionError for a level or a format that there is not */
export function logger(level: string, format: LogFormat = process.stdout.isTTY ? "text" : "json") {
  if (!logLevels.includes(level))
    throw new OptionError("logLevel", `Expected ${logLevels.join(", ")} for --log-level but received "${level}".`);
  if (format !== "json" && format !== "text")
    throw new OptionError("logFormat", `Expected json or text for --log-format but received "${format}".`);
  // A disk that is full, or a reader that has left, takes no lines. What is served goes on without them, and they come again once they are taken.
  process.stdout.removeAllListeners("error").on("error", () => {});
  const stream = format === "text" ? textStream() : process.stdout;
  const options: CreateServerOptions["logger"] = { level, stream };
  const write = (number: number, msg: string, fields: object = {}) => {
    if (logLevels.indexOf(level) < logLevels.indexOf(levelNames[number]!)) return;
    stream.write(`${JSON.stringify({ level: number, time: Date.now(), pid: process.pid, ...fields, msg })}\n`);
  };
  const child: Logger = {
    debug: (text) => write(20, text),
    info: (text) => write(30, text),
    // What quotes a prompt is for its client, among the answer's warnings.
    warn: (text) => void (text.startsWith('The prompt "') || write(40, text)),
  };
  return {
    options,
    /** What the models warn of. */
    child,
    /** A line for those who watch the process. */
    note: (msg: string, fields?: object) => write(30, msg, fields),
    announce(address: string): void {
      if (format === "text")
        process.stdout.write(
          `flowturbo is listening at ${address} (a page) and ${address}/v1 (OpenAI's API). Ctrl-C ends it.\n`,
        );
    },
  };
}

const levelNames: Record<number, string> = {
  10: "trace",
  20: "debug",
  30: "info",
  40: "warn",
  50: "error",
  60: "fatal",
};

/** `12:03:11 POST /v1/images/generations 200 412 ms shapes`: the rest of a line follows as it is. */
function textStream(): Writable {
  return new Writable({
    write(chunk: Buffer, _encoding, done) {
      const text = chunk
        .toString("utf8")
        .split("\n")
        // What Fastify says of its address is announced with more words.
        .filter((line) => line !== "" && !line.includes('"msg":"Server listening at'))
        .map((line) => `${textOf(line)}\n`)
        .join("");
      process.stdout.write(text, () => done());
    },
  });
}

function textOf(line: string): string {
  let fields: Line;
  try {
    fields = JSON.parse(line);
  } catch {
    return line;
  }
  const { level, time, msg = "", err, pid: _, hostname: __, reqId: ___, run: ____, ...rest } = fields;
  const clock = new Date(time).toTimeString().slice(0, 8);
  const { method, route, status, ms, ...others } = rest;
  const what = msg === "answered" ? `${method} ${route} ${status} ${ms} ms` : msg;
  const further = Object.entries(others).map(([name, value]) => `${name}=${shown(value)}`);
  const name = level >= 40 ? `${levelNames[level]}: ` : "";
  const error = err ? `\n${err.stack ?? err.message}` : "";
  return `${clock} ${name}${[what, ...further].join(" ")}${error}`;
}

/** What clients name may hold anything, and a terminal obeys some of it. */
function shown(value: unknown): string {
  if (typeof value === "string" && /^[\w.:/-]+$/.test(value)) return value;
  const text = JSON.stringify(value) ?? "";
  return text.replace(/[^\x20-\x7e]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
