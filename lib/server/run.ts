/**
 * One call of `generate` that any number of clients follow: the one who asked, one who asks again with the same Idempotency-Key, those who
 * read its events. It is stopped when the last of them has left.
 */

import { seedToJson } from "../common/seed.js";
import type { ImageModel } from "../model.js";
import { type Answer, answerOf, type PictureFacts, partialOf, qualityOf, seconds } from "./answer.js";
import { type Failure, failureOf, HangUp } from "./failure.js";
import type { Settled } from "./settle.js";

/** A picture as it is now. */
export interface Partial extends PictureFacts {
  readonly b64_json: string;
  /** From 0. */
  readonly partial_image_index: number;
  /** Which of the pictures, from 0. */
  readonly image_index: number;
  /** Step that it was seen after, from 1. */
  readonly step: number;
}

export type RunEvent =
  | {
      readonly type: "accepted";
      readonly place: number;
      readonly predictedMs: number | null;
      readonly blocks: string;
      readonly seeds: readonly (number | string)[];
    }
  | { readonly type: "started"; readonly queuedMs: number; readonly blocks: string }
  | { readonly type: "step"; readonly step: number; readonly steps: number; readonly sigma: number }
  | { readonly type: "partial"; readonly partial: Partial };

export type RunStatus = "asked" | "queued" | "in_progress" | "completed" | "failed" | "cancelled";

export interface RunOptions {
  readonly id: string;
  readonly model: ImageModel;
  /** Id of the model. */
  readonly modelId: string;
  readonly settled: Settled;
  /** Whether partial pictures are as large as the picture, whatever they are made of. */
  readonly fullSize: boolean;
}

export class Run {
  readonly id: string;
  readonly modelId: string;
  readonly isEdit: boolean;
  readonly startedAt = performance.now();
  /** Resolves when the request has been accepted. @throws Failure if it is refused */
  readonly accepted: Promise<void>;
  /** @throws Failure, or HangUp */
  readonly answer: Promise<Answer>;
  status: RunStatus = "asked";
  /** Place in the queue when it was accepted; null before, and 0 once its turn has come. */
  place: number | null = null;
  /** Milliseconds from the call to the pictures, as predicted. */
  predictedMs: number | null = null;
  readonly #controller = new AbortController();
  readonly #listeners = new Set<(event: RunEvent) => void>();
  /** That it was accepted, and has started: whoever follows later hears of both. */
  readonly #milestones: RunEvent[] = [];
  #followers = 0;

  constructor({ id, model, modelId, settled, fullSize }: RunOptions) {
    this.id = id;
    this.modelId = modelId;
    this.isEdit = settled.isEdit;
    let accept = (): void => {};
    const accepted = new Promise<void>((resolve) => {
      accept = resolve;
    });
    this.answer = this.#draw(model, settled, fullSize, accept);
    // Whoever waits for it hears of the failure.
    this.answer.catch(() => {});
    this.accepted = Promise.race([accepted, this.answer.then(() => {})]);
    this.accepted.catch(() => {});
  }

  get isOver(): boolean {
    return this.status === "completed" || this.status === "failed" || this.status === "cancelled";
  }

  /** Keeps the run going until the function that it returns is called. @param listener hears that it was accepted and has started, and what happens from now on */
  follow(listener?: (event: RunEvent) => void): () => void {
    this.#followers++;
    for (const event of this.#milestones) listener?.(event);
    if (listener) this.#listeners.add(listener);
    let isFollowing = true;
    return () => {
      if (!isFollowing) return;
      isFollowing = false;
      if (listener) this.#listeners.delete(listener);
      // Most leave when it is over. An error takes time to make, as its stack is walked.
      if (--this.#followers === 0 && !this.isOver) this.stop(new HangUp());
    };
  }

  /** Ends it, if it has not ended: its followers get the reason. */
  stop(reason: Failure | HangUp): void {
    if (!this.isOver) this.#controller.abort(reason);
  }

  async #draw(model: ImageModel, settled: Settled, fullSize: boolean, accept: () => void): Promise<Answer> {
    const { options, rendering } = settled;
    const { signal } = this.#controller;
    const background = "opaque" as const;
    const size = options.stages?.at(-1) ?? { width: options.width!, height: options.height! };
    let partials = 0;
    try {
      const result = await model.generate({
        ...options,
        include: [],
        signal,
        onAccept: ({ place, predictedMs, blocks, seeds }) => {
          Object.assign(this, { status: "queued", place, predictedMs });
          accept();
          this.#tell({ type: "accepted", place, predictedMs, blocks, seeds: seeds.map(seedToJson) });
        },
        onStart: ({ queuedMs, blocks }) => {
          Object.assign(this, { status: "in_progress", place: 0 });
          this.#tell({ type: "started", queuedMs, blocks });
        },
        onStep: ({ step, steps, sigma, previews }) => {
          this.#tell({ type: "step", step: step + 1, steps, sigma });
          if (previews.length === 0) return;
          const index = partials++;
          // The next event waits until these pictures are encoded; drawing does not.
          const encoding = previews.map((picture) => partialOf(picture, rendering, fullSize ? size : null));
          return Promise.all(encoding).then((files) => {
            for (const [image_index, b64_json] of files.entries()) {
              const { width, height } = fullSize ? size : previews[image_index]!;
              this.#tell({
                type: "partial",
                partial: {
                  ...{ b64_json, partial_image_index: index, image_index, step: step + 1, background },
                  ...{ output_format: rendering.format, size: `${width}x${height}` },
                  quality: rendering.asked ?? qualityOf(steps),
                },
              });
            }
          });
        },
      });
      const answer = await answerOf(result, settled, this.modelId);
      this.status = "completed";
      return answer;
    } catch (error) {
      this.status = error instanceof HangUp ? "cancelled" : "failed";
      throw error instanceof HangUp ? error : failureOf(error);
    }
  }

  #tell(event: RunEvent): void {
    if (event.type === "accepted" || event.type === "started") this.#milestones.push(event);
    for (const listener of [...this.#listeners]) listener(event);
  }
}

/** Events of a stream as OpenAI's API names them. */
export function streamEvent(isEdit: boolean, event: "partial_image" | "completed"): string {
  return `${isEdit ? "image_edit" : "image_generation"}.${event}`;
}

/** The events that end a stream: one for each picture. */
export function completedEvents({ data, created: _, ...facts }: Answer, isEdit: boolean): Record<string, unknown>[] {
  const type = streamEvent(isEdit, "completed");
  return data.map(({ b64_json }, image_index) => ({ type, b64_json, image_index, created_at: seconds(), ...facts }));
}
