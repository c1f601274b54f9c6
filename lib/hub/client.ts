/**
 * Requests to the hub. The listing of a model is @huggingface/hub's: `modelInfo` and `listFiles`, with its pages. Its
 * downloads are not used, since `downloadFileToCacheDir` begins anew after a break, checks neither size nor hash, takes no
 * signal, and lets two processes write one file; nor are its errors, which do not keep the header that tells a gated model from a missing
 * one. So every request goes through `#request` here.
 */

import { following } from "../common/abort.js";
import { Dependency } from "../common/dependency.js";
import { HubError, type HubReason } from "../errors.js";
import { type HubName, isSafePath } from "./name.js";
import { retryAfterOf, TransientError, withRetries } from "./retry.js";
import type { HubSettings } from "./settings.js";

export const huggingFaceHub = new Dependency(
  "@huggingface/hub",
  () => import("@huggingface/hub"),
  () => null,
  () => "Install flowturbo again.",
);

/** A file of a repository, as its listing says. */
export interface HubFile {
  readonly path: string;
  readonly size: number;
  /** Of the contents: SHA-256 (64 digits) of what is stored in LFS, or the hash that git gives a blob (40 digits). It is also the ETag. */
  readonly digest: string;
}

/** A repository at one commit. */
export interface HubListing {
  readonly commit: string;
  readonly files: ReadonlyMap<string, HubFile>;
}

/** More than any repository of a model has. */
const mostFiles = 100_000;

const transientStatuses = [408, 429, 500, 502, 503, 504];

/** The server sent nothing for too long. */
const silent = new Error("no answer");

export class HubClient {
  constructor(
    private readonly settings: HubSettings,
    private readonly name: HubName,
    private readonly signal: AbortSignal | undefined,
  ) {}

  /** The commit of the revision, and its files. @throws HubError; `signal.reason` after an abort */
  async list(): Promise<HubListing> {
    const { modelInfo, listFiles } = await huggingFaceHub.load();
    const { repository, revision } = this.name;
    const common = { hubUrl: this.settings.endpoint, fetch: this.#buffered };
    const files = new Map<string, HubFile>();
    let commit: unknown;
    try {
      ({ sha: commit } = await modelInfo({ ...common, name: repository, revision, additionalFields: ["sha"] }));
      if (typeof commit !== "string" || !/^[0-9a-f]{40}$/.test(commit)) throw new TypeError("it names no commit");
      for await (const entry of listFiles({ ...common, repo: repository, revision: commit, recursive: true })) {
        const { type, path } = entry;
        if (type !== "file") continue;
        if (!isSafePath(path))
          throw this.#error("refused", `names the file ${JSON.stringify(path)}, which leaves its folder`);
        const { oid: digest = "", size } = entry.lfs ?? entry;
        // It becomes the name of a file.
        if (!/^(?:[0-9a-f]{40}|[0-9a-f]{64})$/.test(digest) || !Number.isSafeInteger(size) || size < 0)
          throw new TypeError(`it says of ${path} neither hash nor size`);
        files.set(path, { path, size, digest });
        if (files.size > mostFiles) throw new TypeError(`it has more than ${mostFiles} files`);
      }
      return { commit, files };
    } catch (error) {
      throw error instanceof SyntaxError || error instanceof TypeError
        ? this.#error(
            "refused",
            `is listed by ${this.settings.endpoint} in a form that is not the hub's: ${error.message}`,
            error,
          )
        : this.failure(error);
    }
  }

  /**
   * Opens a file from an offset on.
   * @param use reads the response; `alive` has to be called for each part that arrives
   * @throws TransientError, HubError; what `use` throws; `signal.reason` after an abort
   */
  openFile<T>(
    { path, commit }: { path: string; commit: string },
    offset: number,
    use: (response: Response, alive: () => void) => Promise<T>,
  ): Promise<T> {
    const { endpoint } = this.settings;
    const url = `${endpoint}/${this.name.repository}/resolve/${commit}/${path.split("/").map(encodeURIComponent).join("/")}`;
    const headers = new Headers({ "accept-encoding": "identity" });
    if (offset > 0) headers.set("range", `bytes=${offset}-`);
    return this.#request(url, { headers }, use);
  }

  retrying<T>(work: () => Promise<T>): Promise<T> {
    return withRetries(this.settings, this.signal, work);
  }

  /** The HubError for a failure that is not repeated any more; every other error as it is. */
  failure(error: unknown): unknown {
    if (!(error instanceof TransientError)) return error;
    const { reason, message } = error;
    const rest = "What has been downloaded is kept: the same command goes on from there.";
    return this.#error(reason, `cannot be downloaded from ${this.settings.endpoint}: ${message}. ${rest}`, error);
  }

  /** For @huggingface/hub: the whole answer, so that a connection that breaks in the middle of it is a failure of the request. */
  readonly #buffered: typeof fetch = (input, init) =>
    this.retrying(() =>
      this.#request(String(input), init, async (response, alive) => {
        const parts: Uint8Array[] = [];
        for await (const part of response.body ?? []) {
          alive();
          parts.push(part);
        }
        const headers = new Headers(response.headers);
        headers.delete("content-encoding");
        // @huggingface/hub takes a relative address of the next page for the end of the listing.
        const next = headers.get("link")?.replace(/<([^>]+)>/g, (_, to) => `<${new URL(to, response.url)}>`);
        if (next) headers.set("link", next);
        return new Response(Buffer.concat(parts), { status: response.status, headers });
      }),
    );

  async #request<T>(
    url: string,
    init: RequestInit | undefined,
    use: (response: Response, alive: () => void) => Promise<T>,
  ): Promise<T> {
    const { endpoint, token, timeoutMs } = this.settings;
    const headers = new Headers(init?.headers);
    headers.set("user-agent", "flowturbo");
    const { origin } = new URL(endpoint);
    // A listing's next page may be anywhere. fetch itself takes the header away when it is redirected to another origin.
    if (token && new URL(url).origin === origin) headers.set("authorization", `Bearer ${token.value}`);
    const { controller, unfollow } = following(this.signal);
    const timer = setTimeout(() => controller.abort(silent), timeoutMs);
    try {
      const response = await fetch(url, { ...init, headers, signal: controller.signal });
      timer.refresh();
      if (!response.ok) throw this.#refusal(response, new URL(response.url).origin === origin);
      return await use(response, () => timer.refresh());
    } catch (error) {
      this.signal?.throwIfAborted();
      if (error === silent || controller.signal.aborted)
        throw new TransientError(`no answer for ${timeoutMs / 1000} s (HF_HUB_DOWNLOAD_TIMEOUT)`, "unreachable");
      // What undici throws when there is no connection, or when it breaks.
      const { cause } = error as { cause?: NodeJS.ErrnoException };
      if (error instanceof TypeError && cause)
        throw new TransientError(cause.message || cause.code || error.message, "unreachable", null, false, { cause });
      throw error;
    } finally {
      clearTimeout(timer);
      unfollow();
      // Frees the connection of a body that was not read to its end.
      controller.abort(silent);
    }
  }

  /** What an answer means that has no contents. The hub says it in a header, and says 401 of whatever it does not show. */
  #refusal(response: Response, isHub: boolean): Error {
    const { status, headers } = response;
    const { endpoint, token } = this.settings;
    const { repository, revision } = this.name;
    const page = `${endpoint}/${repository}`;
    const code = headers.get("x-error-code");
    const said = headers.get("x-error-message");
    const answer = `${status}${said ? ` (${said})` : ""}`;
    // The address that a file was redirected to is good for a while only, and each try gets a new one.
    if (transientStatuses.includes(status) || (!isHub && status === 403)) {
      const wait = retryAfterOf(headers);
      const again = wait === null ? "" : `, to be asked again in ${Math.ceil(wait / 1000)} s`;
      return new TransientError(`${new URL(response.url).host} answered ${answer}${again}`, "unreachable", wait);
    }
    if (!isHub) return this.#error("refused", `cannot be downloaded: ${new URL(response.url).host} answered ${answer}`);
    if (code === "GatedRepo")
      return this.#error(
        "gated",
        `is gated: its licence has to be accepted. Sign in at ${page}, read and accept it there` +
          (token
            ? `, with the account whose token ${token.from} has; some owners have to approve it first. A fine-grained token also needs the permission to read gated repositories (${endpoint}/settings/tokens).`
            : `. ${this.#tokenSteps()}`),
      );
    if (code === "RevisionNotFound")
      return this.#error("no_revision", `has no revision "${revision}". ${page} lists its branches and tags.`);
    if (code === "EntryNotFound") return this.#error("layout", `lacks the file ${new URL(response.url).pathname}.`);
    if (status === 401 && token && said?.startsWith("Invalid"))
      return this.#error(
        "unauthorized",
        `cannot be downloaded: ${endpoint} does not accept the token of ${token.from}. ${this.#tokenSteps()}`,
      );
    if (code === "RepoNotFound" || status === 401 || status === 404)
      return this.#error(
        "not_found",
        `is no model of ${endpoint}, or it is private. Check the name` +
          (token
            ? `, and that the token of ${token.from} may read it.`
            : `. For a private model: ${this.#tokenSteps()}`),
      );
    const remedy = status === 403 && token ? ` The token of ${token.from} may lack the permission.` : "";
    return this.#error("refused", `cannot be downloaded: ${endpoint} answered ${answer}.${remedy}`);
  }

  #tokenSteps(): string {
    const { endpoint, tokenFile } = this.settings;
    return `Make a token that can read at ${endpoint}/settings/tokens, and put it into the variable HF_TOKEN or the file ${tokenFile}.`;
  }

  #error(reason: HubReason, said: string, cause?: unknown): HubError {
    const { repository } = this.name;
    return new HubError(repository, reason, `${repository} ${said}${/[.]$/.test(said) ? "" : "."}`, { cause });
  }
}
