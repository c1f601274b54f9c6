/**
 * Tells an address that a job has ended, as the specification Standard Webhooks says: signed with HMAC-SHA256, and sent again when it was
 * not taken. The message has no pictures: who gets it asks for the job. Only hosts that the server was told of are called, since a client
 * could otherwise reach what only the server can reach.
 */

import { createHmac, randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { seconds } from "./answer.js";
import { invalid } from "./failure.js";

export interface WebhookOptions {
  readonly hosts: readonly string[];
  /** What signs: `whsec_` and base64, or any text. */
  readonly secret: string;
  /** Milliseconds before each attempt. */
  readonly delays?: readonly number[];
  /** Milliseconds that an attempt may take. */
  readonly timeoutMs?: number;
}

export class Webhooks {
  readonly #options: Required<WebhookOptions> | null;
  readonly #pending = new Set<Promise<boolean>>();

  constructor(options: WebhookOptions | undefined) {
    this.#options = options ? { delays: [0, 1000, 5000, 30_000, 120_000], timeoutMs: 10_000, ...options } : null;
  }

  /** @throws Failure for an address that is not to be called */
  check(address: string): void {
    const { host, hostname, username, password } = new URL(address);
    if (username || password) throw invalid("webhook", "Expected an address without a user name for webhook.");
    if (!this.#options)
      throw invalid("webhook", "This server sends no webhooks. Ask for the job instead.", "unsupported_value");
    if (!this.#options.hosts.includes(host) && !this.#options.hosts.includes(hostname))
      throw invalid(
        "webhook",
        "This server sends no webhooks to that host. Its owner has to allow it.",
        "unsupported_value",
      );
  }

  /** @returns whether it was taken, after as many attempts as it took */
  send(address: string, type: string, data: unknown, signal: AbortSignal): Promise<boolean> {
    const sending = this.#send(address, type, data, signal);
    this.#pending.add(sending);
    void sending.then(() => this.#pending.delete(sending));
    return sending;
  }

  /** Resolves when nothing is being sent. */
  async idle(): Promise<void> {
    while (this.#pending.size > 0) await Promise.all(this.#pending);
  }

  async #send(address: string, type: string, data: unknown, signal: AbortSignal): Promise<boolean> {
    const { secret, delays, timeoutMs } = this.#options!;
    const id = `msg_${randomUUID()}`;
    const body = JSON.stringify({
      type,
      timestamp: new Date().toISOString(),
      created_at: seconds(),
      id,
      data,
    });
    for (const delay of delays) {
      try {
        await sleep(delay, undefined, { signal, ref: false });
        const timestamp = String(seconds());
        const headers = {
          "content-type": "application/json",
          ...{ "webhook-id": id, "webhook-timestamp": timestamp },
          "webhook-signature": signatureOf(secret, `${id}.${timestamp}.${body}`),
        };
        const within = AbortSignal.any([signal, AbortSignal.timeout(timeoutMs)]);
        // An address that sends elsewhere could send to a host that is not allowed.
        const response = await fetch(address, { method: "POST", headers, body, redirect: "error", signal: within });
        await response.body?.cancel();
        if (response.ok) return true;
        // Gone: nobody wants it any more.
        if (response.status === 410) return false;
      } catch {
        if (signal.aborted) return false;
      }
    }
    return false;
  }
}

/** `v1,` and the signature in base64. */
function signatureOf(secret: string, content: string): string {
  const key = secret.startsWith("whsec_") ? Buffer.from(secret.slice(6), "base64") : Buffer.from(secret);
  return `v1,${createHmac("sha256", key).update(content).digest("base64")}`;
}
