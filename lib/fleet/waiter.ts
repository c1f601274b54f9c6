/**
 * Who waits for a job: hears what its worker says, and how it ended, whether or not that was heard. Messages are not kept by Redis, so the outcome is
 * looked for now and then, and at once when Redis is back; a job that Redis has lost is added anew.
 */

import { setTimeout as sleep } from "node:timers/promises";
import { RuntimeError } from "../errors.js";
import { failureFromJson } from "./failure.js";
import type { Fleet } from "./fleet.js";
import type { JobData } from "./job.js";
import { decodeMessage, type Message } from "./messages.js";

/** The outcome is looked for so often, in milliseconds. */
const lookMs = 5000;
/** A file is seen on other machines within so many milliseconds. */
const volumeMs = 10_000;
/** Who has not said for so long that it waits, in milliseconds, is gone: a gateway that was ended. */
const silentMs = 4 * lookMs;
/** What a waiter has in Redis is forgotten so long after it last said that it waits. */
const followedMs = 60_000;
/** A worker learns within it that a job was cancelled, in milliseconds, or not at all. */
const cancelledMs = 60_000;

/** Everybody who waited for the job had left, just before. */
export class JobCancelled extends Error {}

export interface QueuedJob {
  readonly model: string;
  readonly id: string;
  readonly data: JobData;
  readonly priority: number;
  /** Jobs of the same are one while they are under way. */
  readonly sameAs: string;
}

export class Waiter {
  readonly #fleet: Fleet;
  readonly #job: QueuedJob;
  readonly #onMessage: (message: Message) => void;
  /** The job that is waited for: another's of the same, where there is one. */
  #id: string;
  #stop: () => void = () => {};
  #settle: { resolve: (bytes: Buffer) => void; reject: (error: unknown) => void } | null = null;
  readonly outcome: Promise<Buffer>;
  #timer: NodeJS.Timeout | null = null;
  #missing = 0;
  /** Whether a worker said that the result is there. */
  #doneAt: number | null = null;
  #isOver = false;
  #isLooking = false;
  #looksAgain = false;
  /** One look at a time: what two that overlap see is older than it seems. */
  readonly #look = async () => {
    this.#looksAgain = true;
    if (this.#isLooking) return;
    this.#isLooking = true;
    while (this.#looksAgain) {
      this.#looksAgain = false;
      await this.#lookForOutcome().catch(() => {});
    }
    this.#isLooking = false;
  };

  /** Adds the job, and listens before that. When this returns, its entry in the ledger is on its way. @throws what Redis says */
  static async add(fleet: Fleet, job: QueuedJob, onMessage: (message: Message) => void): Promise<Waiter> {
    const waiter = new Waiter(fleet, job, onMessage);
    try {
      await waiter.#add();
      return waiter;
    } catch (error) {
      await waiter.leave();
      throw error;
    }
  }

  private constructor(fleet: Fleet, job: QueuedJob, onMessage: (message: Message) => void) {
    this.#fleet = fleet;
    this.#job = job;
    this.#id = job.id;
    this.#onMessage = onMessage;
    this.outcome = new Promise((resolve, reject) => {
      this.#settle = { resolve, reject };
    });
    // Whoever has left does not hear of it.
    this.outcome.catch(() => {});
  }

  /** Nobody waits here any more. If nobody does elsewhere, the job is cancelled. Never rejects. */
  async leave(): Promise<void> {
    if (this.#isOver) return;
    this.#end();
    const { redis } = this.#fleet;
    try {
      const followers = redis.key("followers", this.#id);
      const cancelled = redis.key("cancelled", this.#id);
      // After Redis was away others say only now that they wait.
      const oldest = redis.awayMs > 0 && redis.readyForMs < silentMs ? 0 : redis.now() - silentMs;
      const [, , others] = await redis.atOnce<[number, number, number]>((commands) =>
        commands.zrem(followers, this.#follower).zremrangebyscore(followers, 0, oldest).zcard(followers),
      );
      if (others > 0) return;
      await redis.client.set(cancelled, "1", "PX", cancelledMs);
      await redis.client.publish(redis.key("cancel"), this.#id);
      const queue = redis.queue(this.#job.model);
      // One that is at work is locked: its worker ends it, and removes what says that it is to.
      const isGone = await queue.remove(this.#id).catch(() => 0);
      await redis.client.hdel(redis.ledger(queue.name), this.#id);
      if (isGone === 1) await redis.client.del(cancelled, redis.key("starts", this.#id));
    } catch {
      // A job that nobody waits for is drawn to its end, then.
    }
  }

  get #follower(): string {
    return `${this.#fleet.id}:${this.#job.id}`;
  }

  async #add(): Promise<void> {
    await this.#put(this.#follow(this.#job.id));
    this.#timer = setInterval(this.#look, lookMs);
    this.#fleet.onBack.add(this.#look);
  }

  async #follow(id: string): Promise<void> {
    this.#stop();
    this.#id = id;
    const { redis } = this.#fleet;
    this.#stop = await redis.listen(redis.key("events", id), (text) => {
      const message = decodeMessage(text);
      if (message) this.#heard(message);
    });
  }

  /** @param following has to be over before the job is there */
  async #put(following: Promise<void>): Promise<void> {
    const { redis } = this.#fleet;
    const { model, id, data, priority, sameAs } = this.#job;
    const queue = redis.queue(model);
    const [ledger, followers] = [redis.ledger(queue.name), redis.key("followers", id)];
    const known = redis.together((commands) =>
      commands
        .hset(ledger, id, JSON.stringify(data.facts))
        .pexpire(ledger, 3_600_000)
        .zadd(followers, redis.now(), this.#follower)
        .pexpire(followers, followedMs),
    );
    await Promise.all([following, known]);
    const added = await queue.add(data.op, data, {
      ...{ jobId: id, priority, attempts: 1, removeOnComplete: true, removeOnFail: true },
      deduplication: { id: sameAs },
    });
    if (added.id === id || added.id === undefined) return;
    // Somebody has asked for the same already.
    const theirs = redis.key("followers", added.id);
    await redis.together((commands) =>
      commands.hdel(ledger, id).del(followers).zadd(theirs, redis.now(), this.#follower).pexpire(theirs, followedMs),
    );
    await this.#follow(added.id);
    // It goes by the more urgent of all who wait for it.
    const job = await queue.getJob(added.id);
    if (job && job.priority > priority) await job.changePriority({ priority }).catch(() => {});
    // It may have ended meanwhile.
    void this.#look();
  }

  #heard(message: Message): void {
    if (this.#isOver) return;
    if (message.type === "done") {
      this.#doneAt = performance.now();
      void this.#look();
    } else if (message.type === "failed") this.#fail(failureFromJson(message.failure));
    else if (message.type === "cancelled") this.#fail(new JobCancelled());
    else this.#onMessage(message);
  }

  async #lookForOutcome(): Promise<void> {
    if (this.#isOver || !this.#fleet.redis.isReady) return;
    const { redis, results } = this.#fleet;
    const bytes = await results.get(this.#job.data.hash);
    if (bytes) {
      this.#succeed(bytes);
      return;
    }
    const failure = await this.#fleet.failureOf(this.#id);
    if (failure) {
      this.#fail(failure);
      return;
    }
    const queue = redis.queue(this.#job.model);
    const state = await queue.getJobState(this.#id);
    if (state !== "unknown") {
      this.#missing = 0;
      if (this.#isOver) return;
      // Where it is there: if the job has ended meanwhile, nobody would remove it any more.
      const followers = redis.key("followers", this.#id);
      await redis.together((commands) =>
        commands.zadd(followers, "XX", redis.now(), this.#follower).pexpire(followers, followedMs),
      );
      return;
    }
    // Its end may be on its way.
    if (++this.#missing < 2 || this.#isOver) {
      if (this.#missing === 1) void sleep(200).then(this.#look);
      return;
    }
    this.#missing = 0;
    // Not where Redis was away since: it may have lost the result.
    const sinceDoneMs = this.#doneAt === null ? Number.POSITIVE_INFINITY : performance.now() - this.#doneAt;
    if (sinceDoneMs < redis.readyForMs) {
      // A volume that is shared over a network may show it later.
      if (sinceDoneMs < volumeMs) {
        void sleep(1000).then(this.#look);
        return;
      }
      this.#fail(
        new RuntimeError(
          "The job was drawn, and its result is not where this process looks for it. Workers and gateways need the same results: the same folder (--results), on a volume that they share, or Redis for all.",
        ),
      );
      return;
    }
    // Of one that Redis has lost in part something may be in the way.
    const { id, sameAs } = this.#job;
    if (this.#id === id) await queue.remove(id).catch(() => 0);
    if ((await queue.getDeduplicationJobId(sameAs)) === this.#id) await queue.removeDeduplicationKey(sameAs);
    await this.#put(this.#id === id ? Promise.resolve() : this.#follow(id));
  }

  #succeed(bytes: Buffer): void {
    if (this.#isOver) return;
    this.#end();
    this.#forget();
    this.#settle!.resolve(bytes);
  }

  #fail(error: unknown): void {
    if (this.#isOver) return;
    this.#end();
    this.#forget();
    this.#settle!.reject(error);
  }

  #forget(): void {
    const { redis } = this.#fleet;
    redis.client.zrem(redis.key("followers", this.#id), this.#follower).catch(() => {});
  }

  #end(): void {
    this.#isOver = true;
    this.#stop();
    if (this.#timer) clearInterval(this.#timer);
    this.#fleet.onBack.delete(this.#look);
  }
}
