/**
 * What tracers learn of a call: the contexts of the tracing channels, filled in as it goes on. Whoever draws tells a `CallTrace`; there is
 * none where nobody has subscribed.
 */

import { currentTraceparent, type Span, Tracing } from "../common/tracing.js";
import type { GenerateOptions, GenerateResult, GenerateTrace, LaunchTrace, QueueTrace } from "../model.js";
import type { Admitted } from "../serving/service.js";
import type { Request } from "./request.js";
import { blocksOf } from "./result.js";
import type { PreparedCandidate } from "./templates.js";

const generateTracing = new Tracing<GenerateTrace>("flowturbo:generate");
const queueTracing = new Tracing<QueueTrace>("flowturbo:queue");
const launchTracing = new Tracing<LaunchTrace>("flowturbo:launch");

type Writable<T> = { -readonly [Key in keyof T]: T[Key] };

/** Traces a call. @param work gets null where nobody has subscribed to any of the channels */
export function traced(
  about: Pick<GenerateTrace, "model" | "runtime">,
  options: GenerateOptions,
  work: (trace: CallTrace | null) => Promise<GenerateResult>,
): Promise<GenerateResult> {
  if (![generateTracing, queueTracing, launchTracing].some(({ hasSubscribers }) => hasSubscribers)) return work(null);
  const context = { operation: "generate_content", ...about, traceparent: currentTraceparent(), options } as const;
  return generateTracing.around(context, () => work(new CallTrace(context)));
}

/** The trace of one call. */
export class CallTrace {
  readonly #context: Writable<GenerateTrace>;
  #queue: { readonly context: Writable<QueueTrace>; readonly span: Span } | null = null;

  constructor(context: GenerateTrace) {
    this.#context = context;
  }

  /** Its options have been checked. */
  settled({ pictures, seeds, candidates }: Request): void {
    const { width, height } = candidates[0].stages.at(-1)!;
    Object.assign(this.#context, { pictures, seeds, width, height });
  }

  /** It waits for its turn, with the schedule that it is expected to have. */
  accepted(candidate: PreparedCandidate, { place, predictedMs }: Pick<QueueTrace, "place" | "predictedMs">): void {
    this.#drawn(candidate);
    const context = { generate: this.#context, place, predictedMs };
    this.#queue = { context, span: queueTracing.begin(context) };
  }

  /** Its turn has come. */
  started(candidate: PreparedCandidate, queuedMs: number): void {
    this.#drawn(candidate);
    if (!this.#queue) return;
    this.#queue.context.queuedMs = queuedMs;
    this.#queue.span.end();
  }

  /** It has left the queue, or was refused. */
  left(error: unknown): void {
    this.#queue?.span.fail(error);
  }

  /**
   * What runs its programs, observed. Each launch is then reported as soon as it is done: reports that come bunched would not say when it
   * was.
   */
  observed(admitted: Admitted): Admitted {
    if (!launchTracing.hasSubscribers) return admitted;
    return {
      ...admitted,
      run: (job) =>
        admitted.run({
          ...job,
          reports: "each",
          onLaunch: (row, report, first) => {
            const { launch, batch, rows, milliseconds } = report;
            const { graph, sharing } = launch;
            if (first)
              launchTracing.over({ generate: this.#context, graph, size: sharing!.size, batch, rows, milliseconds });
            job.onLaunch?.(row, report, first);
          },
        }),
    };
  }

  #drawn({ stages }: PreparedCandidate): void {
    this.#context.blocks = blocksOf(stages);
    this.#context.steps = stages.reduce((sum, { schedule }) => sum + schedule.blocks.length, 0);
  }
}
