/**
 * A hub of its own, on two origins: one that lists models and answers for files (what the hub keeps in git itself, redirects
 * for what is in LFS), and one that has the contents of LFS. Answers are those of huggingface.co as its clients read them; faults
 * are told by path and by how often the contents have been asked for.
 */

import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** What happens to one request for contents. */
export interface Fault {
  readonly status?: number;
  readonly headers?: Readonly<Record<string, string>>;
  /** The connection breaks after so many bytes. */
  readonly breakAfter?: number;
  /** Nothing more is sent after so many bytes, and the connection stays. */
  readonly stallAfter?: number;
  /** So many bytes, one after another, with so many milliseconds between. */
  readonly slowly?: { readonly bytes: number; readonly ms: number };
  /** All bytes are others. */
  readonly wrongBytes?: boolean;
  /** More bytes than there are. */
  readonly extraBytes?: number;
  /** All of it, whatever range was asked for. */
  readonly ignoreRange?: boolean;
  /** A range that begins elsewhere. */
  readonly wrongRange?: boolean;
}

export interface FakeRepository {
  readonly files: Map<string, Buffer>;
  /** Revisions besides `main` and the commit itself: tags, branches, pull requests. */
  readonly refs?: Record<string, string>;
  /** Commits besides the present one, each with its files. */
  readonly commits?: Record<string, Map<string, Buffer>>;
  /** Who may read it: `gated` those whose token is in `readers`, `private` the same, and others do not even see it. */
  readonly access?: "gated" | "private";
}

export interface Seen {
  readonly host: "hub" | "cdn";
  readonly method: string;
  readonly path: string;
  readonly authorization: string | undefined;
  readonly range: string | undefined;
}

const isLarge = (path: string) => path.endsWith(".safetensors") || path.endsWith(".model");
const sha256 = (data: Buffer) => createHash("sha256").update(data).digest("hex");
/** As git names a blob. */
const gitHash = (data: Buffer) => createHash("sha1").update(`blob ${data.length}\0`).update(data).digest("hex");

/** The digest by which a cache names a file. */
export function digestOf(path: string, data: Buffer): string {
  return isLarge(path) ? sha256(data) : gitHash(data);
}

export class FakeHub {
  readonly repositories = new Map<string, FakeRepository>();
  /** Tokens that are known; those that may also read gated and private models. */
  readonly tokens = new Set<string>();
  readonly readers = new Set<string>();
  readonly seen: Seen[] = [];
  /** Files of a listing's page. */
  pageSize = 1000;
  /** How the hub spells an ETag. */
  etag: (digest: string) => string = (digest) => `"${digest}"`;
  /** For requests of a path: the nth one's fault, counted from 1. Paths of listings are `api`. */
  readonly faults = new Map<string, (nth: number) => Fault | undefined>();
  /** Whether a listing names its next page without the host. */
  relativePages = false;
  /** Address of the next page that a listing names, whatever there is. */
  nextPage: string | null = null;
  /** Changes what a listing says. */
  editListing: (entries: Record<string, unknown>[]) => void = () => {};

  readonly #counts = new Map<string, number>();
  readonly #blobs = new Map<string, { path: string; data: Buffer }>();
  /** The addresses of the two origins, also when they are gone. */
  url = "";
  cdnUrl = "";
  #hub!: Server;
  #cdn!: Server;

  static async start(): Promise<FakeHub> {
    const hub = new FakeHub();
    const listen = async (
      host: Seen["host"],
      answer: (request: IncomingMessage, response: ServerResponse) => unknown,
    ) => {
      const server = createServer((request, response) => {
        const { authorization, range } = request.headers;
        const path = decodeURIComponent(request.url!);
        hub.seen.push({ host, method: request.method!, path, authorization, range });
        answer(request, response);
      });
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
      return server;
    };
    hub.#hub = await listen("hub", (request, response) => hub.#answer(request, response));
    hub.#cdn = await listen("cdn", (request, response) => hub.#answerBlob(request, response));
    const addressOf = (server: Server) => `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    hub.url = addressOf(hub.#hub);
    hub.cdnUrl = addressOf(hub.#cdn);
    return hub;
  }

  async stop(): Promise<void> {
    for (const server of [this.#hub, this.#cdn]) {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    }
  }

  /** Adds a model. @returns its commit */
  add(name: string, repository: FakeRepository): string {
    this.repositories.set(name, repository);
    return commitOf(repository.files);
  }

  /** Requests for contents of this path, at either origin. */
  requestsFor(path: string): Seen[] {
    return this.seen.filter(({ host, method, path: asked }) => {
      const isRedirect = host === "hub" && isLarge(path);
      return method === "GET" && !isRedirect && asked.endsWith(`/${path}`);
    });
  }

  #answer(request: IncomingMessage, response: ServerResponse): unknown {
    const url = new URL(request.url!, this.url);
    const segments = url.pathname.split("/").slice(1).map(decodeURIComponent);
    const isApi = segments[0] === "api";
    const name = (isApi ? segments.slice(2, 4) : segments.slice(0, 2)).join("/");
    const kind = isApi ? segments[4]! : segments[2]!;
    const token = request.headers.authorization?.replace("Bearer ", "");
    const refuse = (status: number, code: string | null, message: string) => {
      const headers = { ...(code && { "x-error-code": code }), "x-error-message": message };
      response.writeHead(status, headers).end(JSON.stringify({ error: message }));
    };

    const fault = isApi ? this.#faultFor("api") : undefined;
    if (fault?.status) return response.writeHead(fault.status, fault.headers).end();
    if (token !== undefined && !this.tokens.has(token))
      return refuse(401, null, "Invalid credentials in Authorization header");
    const repository = this.repositories.get(name);
    const mayRead = token !== undefined && this.readers.has(token);
    if (!repository || (repository.access === "private" && !mayRead))
      // The hub does not tell strangers which of the two it is.
      return refuse(token === undefined ? 401 : 404, "RepoNotFound", "Repository not found");

    const commits: Record<string, Map<string, Buffer>> = {
      ...repository.commits,
      [commitOf(repository.files)]: repository.files,
    };
    const refs: Record<string, string> = { main: commitOf(repository.files), ...repository.refs };
    const rest = segments.slice(isApi ? 5 : 3);
    const find = (length: number): string | undefined => {
      const revision = rest.slice(0, length).join("/");
      return refs[revision] ?? (commits[revision] ? revision : undefined);
    };
    const length = rest[0] === "refs" ? 3 : 1;
    const commit = find(length);
    if (!commit) return refuse(404, "RevisionNotFound", "Invalid rev id");
    const files = commits[commit]!;

    if (isApi && kind === "revision") {
      const siblings = [...files.keys()].map((rfilename) => ({ rfilename }));
      return json(response, { _id: "1", id: name, sha: commit, siblings, lastModified: "2024-10-22T14:29:57.000Z" });
    }
    if (isApi && kind === "tree") {
      const entries: Record<string, unknown>[] = [...files].map(([path, data]) => ({
        ...{ type: "file", path, size: data.length, oid: gitHash(data) },
        ...(isLarge(path) && {
          lfs: { oid: sha256(data), size: data.length, pointerSize: 135 },
          xetHash: sha256(Buffer.concat([data, data])),
        }),
      }));
      for (const folder of new Set([...files.keys()].map((path) => path.split("/").slice(0, -1).join("/"))))
        if (folder !== "")
          entries.push({ type: "directory", path: folder, size: 0, oid: gitHash(Buffer.from(folder)) });
      this.editListing(entries);
      const start = Number(url.searchParams.get("cursor") ?? 0);
      const end = start + this.pageSize;
      const next = new URL(url);
      next.searchParams.set("cursor", String(end));
      if (this.nextPage !== null) response.setHeader("link", `<${this.nextPage}>; rel="next"`);
      else if (end < entries.length) {
        const { href, pathname, search } = next;
        response.setHeader("link", `<${this.relativePages ? pathname + search : href}>; rel="next"`);
      }
      return json(response, entries.slice(start, end));
    }

    const path = rest.slice(length).join("/");
    const data = files.get(path);
    if (!data) return refuse(404, "EntryNotFound", "Entry not found");
    if (repository.access === "gated" && !mayRead)
      return refuse(token === undefined ? 401 : 403, "GatedRepo", `Access to model ${name} is restricted.`);
    response.setHeader("x-repo-commit", commit);
    const digest = digestOf(path, data);
    if (!isLarge(path)) {
      response.setHeader("etag", this.etag(digest));
      return this.#send(request, response, path, data);
    }
    this.#blobs.set(digest, { path, data });
    response.writeHead(302, {
      location: `${this.cdnUrl}/${digest}/${path}`,
      "x-linked-etag": this.etag(digest),
      "x-linked-size": data.length,
    });
    response.end();
  }

  #answerBlob(request: IncomingMessage, response: ServerResponse): void {
    const blob = this.#blobs.get(request.url!.split("/")[1]!);
    if (!blob) return void response.writeHead(404).end();
    const { path, data } = blob;
    // Of the CDN's own, as everywhere: it names nothing.
    response.setHeader("etag", `"${createHash("md5").update(data).digest("hex")}-1"`);
    this.#send(request, response, path, data);
  }

  #faultFor(path: string): Fault | undefined {
    const nth = (this.#counts.get(path) ?? 0) + 1;
    this.#counts.set(path, nth);
    return this.faults.get(path)?.(nth);
  }

  #send(request: IncomingMessage, response: ServerResponse, path: string, data: Buffer): unknown {
    response.setHeader("accept-ranges", "bytes");
    if (request.method === "HEAD") return response.setHeader("content-length", data.length).end();
    const fault = this.#faultFor(path) ?? {};
    if (fault.status) return response.writeHead(fault.status, fault.headers).end();
    const asked = fault.ignoreRange ? undefined : request.headers.range?.match(/^bytes=(\d+)-$/)?.[1];
    const start = fault.wrongRange && asked !== undefined ? Number(asked) + 1 : Number(asked ?? 0);
    if (asked !== undefined && start >= data.length) return response.writeHead(416).end();
    let body = data.subarray(start);
    if (fault.wrongBytes) body = Buffer.from(body.map((byte) => byte ^ 255));
    if (fault.extraBytes) body = Buffer.concat([body, Buffer.alloc(fault.extraBytes)]);
    if (asked !== undefined) response.setHeader("content-range", `bytes ${start}-${data.length - 1}/${data.length}`);
    response.writeHead(asked === undefined ? 200 : 206, { "content-length": body.length });
    if (fault.breakAfter !== undefined)
      return response.write(body.subarray(0, fault.breakAfter), () => response.destroy());
    if (fault.stallAfter !== undefined) return response.write(body.subarray(0, fault.stallAfter));
    return fault.slowly ? trickle(response, body, fault.slowly) : response.end(body);
  }
}

async function trickle(response: ServerResponse, body: Buffer, { bytes, ms }: NonNullable<Fault["slowly"]>) {
  for (let at = 0; at < body.length && !response.destroyed; at += bytes) {
    response.write(body.subarray(at, at + bytes));
    await new Promise((resolve) => setTimeout(resolve, ms));
  }
  response.end();
}

/** A name of the contents, as a commit is. */
export function commitOf(files: ReadonlyMap<string, Buffer>): string {
  const hash = createHash("sha1");
  for (const [path, data] of files) hash.update(path).update(data);
  return hash.digest("hex");
}

function json(response: ServerResponse, value: unknown): unknown {
  return response.writeHead(200, { "content-type": "application/json; charset=utf-8" }).end(JSON.stringify(value));
}
