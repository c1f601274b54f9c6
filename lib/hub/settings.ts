/**
 * What the environment says of the hub, by the variables that Python's huggingface_hub reads, so that one set-up serves both.
 * They are read at each call: a program may set them after it imported this package.
 */

import { readFile } from "node:fs/promises";
import { homedir } from "node:os";
import path from "node:path";
import { HubError } from "../errors.js";

export interface HubSettings {
  /** Such as https://huggingface.co, without a slash at the end. */
  readonly endpoint: string;
  /** Folder of the models' folders. */
  readonly cache: string;
  /** The token, and where it comes from, for messages. */
  readonly token: { readonly value: string; readonly from: string } | null;
  /** Where a token is looked for when no variable has one. */
  readonly tokenFile: string;
  /** The variable that forbids requests; null if none does. */
  readonly offline: string | null;
  /** How long a server may be silent. */
  readonly timeoutMs: number;
  /** Wait before the first repetition of a request that failed; doubled for each further one. */
  readonly backoffMs: number;
  /** How often the same request may fail in a row. */
  readonly attempts: number;
}

type Environment = Readonly<Record<string, string | undefined>>;

/** @throws HubError for an endpoint that is no address, or a token that cannot be sent */
export async function readSettings(env: Environment = process.env): Promise<HubSettings> {
  const home = expanded(
    env.HF_HOME || path.join(env.XDG_CACHE_HOME || path.join(homedir(), ".cache"), "huggingface"),
    env,
  );
  const tokenFile = expanded(env.HF_TOKEN_PATH || path.join(home, "token"), env);
  const offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].find((name) => env[name]);
  const seconds = Number(env.HF_HUB_DOWNLOAD_TIMEOUT);
  return {
    endpoint: endpointOf(env),
    cache: path.resolve(expanded(env.HF_HUB_CACHE || env.HUGGINGFACE_HUB_CACHE || path.join(home, "hub"), env)),
    token: await readToken(env, tokenFile),
    tokenFile,
    offline: offline !== undefined && isTrue(env[offline]!) ? offline : null,
    timeoutMs: seconds > 0 ? 1000 * seconds : 10_000,
    ...{ backoffMs: 1000, attempts: 5 },
  };
}

function isTrue(value: string): boolean {
  return ["1", "ON", "YES", "TRUE"].includes(value.toUpperCase());
}

function endpointOf(env: Environment): string {
  const text = (env.HF_ENDPOINT || "https://huggingface.co").trim().replace(/\/+$/, "");
  if (URL.canParse(text) && /^https?:$/.test(new URL(text).protocol)) return text;
  throw new HubError("", "refused", `HF_ENDPOINT is "${text}"; expected an address such as https://huggingface.co.`);
}

async function readToken(env: Environment, file: string): Promise<HubSettings["token"]> {
  for (const from of ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", file]) {
    const text = from === file ? await readFile(file, "utf8").catch(() => "") : env[from];
    const value = text?.trim();
    if (!value) continue;
    if (/^[\x21-\x7e]+$/.test(value)) return { value, from };
    throw new HubError("", "unauthorized", `The token of ${from} has characters that no token has. Copy it again.`);
  }
  return null;
}

/** As Python's expanduser and expandvars do it. */
function expanded(text: string, env: Environment): string {
  return text
    .replace(/^~(?=$|[/\\])/, homedir())
    .replace(/\$(?:(\w+)|\{(\w+)\})/g, (all, plain, braced) => env[plain ?? braced] ?? all);
}
