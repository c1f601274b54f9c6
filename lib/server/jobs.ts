/**
 * Jobs: runs for clients who cannot hold a connection. A job keeps its events, so that a client that comes back reads on where it stopped,
 * and its result for a bounded time. Jobs belong to the key that they were asked for with.
 */

import type { Answer } from "./answer.js";
import { type ErrorEnvelope, Failure, HangUp } from "./failure.js";
import type { Partial, Run, RunEvent } from "./run.js";

/** What clients see of a job. */
export interface JobView {
  readonly id: string;
  readonly object: "job";
  readonly status: "queued" | "in_progress" | "completed" | "failed" | "cancelled";
  /** Id of the model. */
  readonly model: string;
  /** Seconds since 1970, as all moments here. */
  readonly created_at: number;
  readonly started_at: number | null;
  readonly completed_at: number | null;
  /** When it is forgotten; null while it is not over. */
  readonly expires_at: number | null;
  /** Its place in the queue: 1 is the next, 0 is at work; null when it is over. */
  readonly place: number | null;
  /** Milliseconds from now to the pictures, as predicted; null where that is not known. */
  readonly predicted_ms: number | null;
  readonly progress: { readonly step: number; readonly steps: number | null };
  readonly result: Answer | null;
  readonly error: ErrorEnvelope["error"] | null;
}

/** An event of a job. */
export interface JobEvent {
  /** From 1. */
  readonly id: number;
  readonly type: string;
  readonly data: Record<string, unknown>;
}

export interface JobStoreOptions {
  readonly keepMs: number;
  readonly keep: number;
  /** Bytes that the results may take that are kept. */
  readonly keepBytes: number;
}

/** What a job is given beside its run. */
export interface JobOptions {
  /** Number of the key that it was asked for with. */
  readonly owner: number;
  readonly keepMs: number;
  /** How many jobs of its model wait that were accepted earlier. */
  readonly waitingBefore: (job: Job) => number;
  /** Called once, when it is over. */
  readonly onEnd: (job: Job) => void;
}

export class Job {
  readonly id: string;
  readonly owner: number;
  readonly run: Run;
  readonly createdAt = Date.now();
  startedAt: number | null = null;
  endedAt: number | null = null;
  /** Bytes of its result. */
  bytes = 0;
  answer: Answer | null = null;
  failure: Failure | null = null;
  #events: JobEvent[] = [];
  readonly #readers = new Set<(event: JobEvent) => void>();
  readonly #options: JobOptions;
  readonly #leave: () => void;
  #sequence = 0;
  #progress: { step: number; steps: number | null } = { step: 0, steps: null };
  #isCancelled = false;

  constructor(run: Run, options: JobOptions) {
    this.id = run.id;
    this.run = run;
    this.owner = options.owner;
    this.#options = options;
    this.#leave = run.follow((event) => this.#observe(event));
    run.answer
      .then(
        (answer) => {
          this.answer = answer;
          this.bytes = answer.data.reduce((sum, { b64_json }) => sum + b64_json.length, 0);
        },
        (error) => {
          if (error instanceof HangUp) this.#isCancelled = true;
          else this.failure = error as Failure;
        },
      )
      .then(() => {
        this.endedAt = Date.now();
        this.#end();
        options.onEnd(this);
      });
  }

  get isOver(): boolean {
    return this.endedAt !== null;
  }

  /** Whether it was more than asked for. */
  get wasAccepted(): boolean {
    return this.run.place !== null;
  }

  get status(): JobView["status"] {
    if (this.#isCancelled) return "cancelled";
    if (this.failure) return "failed";
    if (this.answer) return "completed";
    return this.startedAt === null ? "queued" : "in_progress";
  }

  /** The run's followers are this job and whoever asked with the same key: it ends for all. */
  cancel(): void {
    if (this.isOver) return;
    this.#isCancelled = true;
    this.run.stop(new HangUp());
  }

  get view(): JobView {
    const { keepMs, waitingBefore } = this.#options;
    const { run, startedAt, endedAt, status, answer, failure } = this;
    const isWaiting = status === "queued";
    const place = run.place === null ? null : Math.min(run.place, 1 + waitingBefore(this));
    const predicted = run.predictedMs === null ? null : run.predictedMs - (performance.now() - run.startedAt);
    const inSeconds = (at: number | null) => (at === null ? null : Math.floor(at / 1000));
    return {
      ...{ id: this.id, object: "job", status, model: run.modelId, created_at: inSeconds(this.createdAt)! },
      ...{ started_at: inSeconds(startedAt), completed_at: inSeconds(endedAt) },
      expires_at: endedAt === null ? null : Math.ceil((endedAt + keepMs) / 1000),
      place: this.isOver || status === "cancelled" ? null : isWaiting ? place : 0,
      predicted_ms: this.isOver || predicted === null ? null : Math.max(0, Math.round(predicted)),
      ...{ progress: this.#progress, result: answer, error: failure?.envelope.error ?? null },
    };
  }

  /**
   * Sends the events after an id, those that are kept and those to come.
   * @returns stops it
   */
  read(after: number, reader: (event: JobEvent) => void): () => void {
    for (const event of this.#events) if (event.id > after) reader(event);
    if (this.isOver) return () => {};
    this.#readers.add(reader);
    return () => this.#readers.delete(reader);
  }

  /** The last event; its data are the job, which only now is what it will be. */
  #end(): void {
    this.#leave();
    const error = this.failure && { error: this.failure.envelope.error };
    // The result makes up for them.
    this.#events = this.#events.filter(({ type }) => type !== "job.partial_image");
    this.#add(`job.${this.status}`, { ...error, job: this.view });
    this.#readers.clear();
  }

  #observe(event: RunEvent): void {
    if (event.type === "accepted") {
      const { place, predictedMs, blocks, seeds } = event;
      this.#add("job.queued", { place, predicted_ms: predictedMs, blocks, seeds });
    } else if (event.type === "started") {
      this.startedAt = Date.now();
      this.#add("job.started", { queued_ms: event.queuedMs, blocks: event.blocks });
    } else if (event.type === "step") {
      const { step, steps, sigma } = event;
      this.#progress = { step, steps };
      this.#add("job.progress", { step, steps, sigma });
    } else this.#addPartial(event.partial);
  }

  #addPartial({ size: _, quality: __, background: ___, ...partial }: Partial): void {
    const { partial_image_index: index } = partial;
    // Those who come late need the latest.
    this.#events = this.#events.filter(
      ({ type, data }) => type !== "job.partial_image" || data.partial_image_index === index,
    );
    this.#add("job.partial_image", partial);
  }

  #add(type: string, data: Record<string, unknown>): void {
    const event = { id: ++this.#sequence, type, data: { type, ...data } };
    this.#events.push(event);
    for (const reader of [...this.#readers]) reader(event);
  }
}

export class JobStore {
  readonly #jobs = new Map<string, Job>();
  readonly #options: JobStoreOptions;

  constructor(options: JobStoreOptions) {
    this.#options = options;
  }

  /** A job for a run. @param onEnd called once, when it is over */
  add(run: Run, owner: number, onEnd: (job: Job) => void): Job {
    const job = new Job(run, {
      ...{ owner, keepMs: this.#options.keepMs },
      waitingBefore: (before) => this.#waitingBefore(before),
      onEnd: (ended) => {
        this.#forgetOld();
        onEnd(ended);
      },
    });
    this.#jobs.set(job.id, job);
    return job;
  }

  /** @throws Failure with 404 for one that there is not, or that belongs to another key */
  get(id: string, owner: number): Job {
    this.#forgetOld();
    const job = this.#jobs.get(id);
    if (!job || job.owner !== owner)
      throw new Failure(404, "There is no such job; results are kept for a limited time.", { code: "job_not_found" });
    return job;
  }

  remove(job: Job): void {
    this.#jobs.delete(job.id);
  }

  #waitingBefore(job: Job): number {
    let waiting = 0;
    for (const other of this.#jobs.values()) {
      if (other === job) break;
      if (other.run.modelId === job.run.modelId && other.status === "queued") waiting++;
    }
    return waiting;
  }

  /** Jobs come in the order in which they were asked for. */
  #forgetOld(): void {
    const { keepMs, keep, keepBytes } = this.#options;
    const over = [...this.#jobs.values()].filter(({ isOver }) => isOver).sort((a, b) => a.endedAt! - b.endedAt!);
    let bytes = over.reduce((sum, job) => sum + job.bytes, 0);
    for (const [index, job] of over.entries()) {
      const isOld = Date.now() - job.endedAt! >= keepMs;
      if (!isOld && over.length - index <= keep && bytes <= keepBytes) break;
      this.#jobs.delete(job.id);
      bytes -= job.bytes;
    }
  }
}
