// Spans of OpenTelemetry for pictures, to be copied. Needs @opentelemetry/api and a tracer provider, such as the one that
// @opentelemetry/sdk-node registers; import this file and call trace() once, before or after the model is loaded.
//
//   generate_content shapes          a call of generate(), by the conventions for generative AI
//   ├─ queue                         until its turn has come
//   ├─ launch clip_l                 each launch of a network, as long as it took; others may have shared it
//   └─ launch predict.guidance
//
// Where withTraceparent() was told the header `traceparent` of a request, that is the parent, else the active span.
import { tracingChannel } from "node:diagnostics_channel";
import { context, SpanKind, SpanStatusCode, trace as traces } from "@opentelemetry/api";

const names = ["generate", "queue", "launch"];

/** Starts tracing. @returns a function that ends it */
export function trace(tracer = traces.getTracer("flowturbo")) {
  /** Spans under way, by their call. */
  const spans = new WeakMap();
  const queues = new WeakMap();
  const under = (call) => traces.setSpan(context.active(), spans.get(call));

  const subscribers = {
    generate: {
      start(call) {
        const { model, operation, options, traceparent } = call;
        const attributes = {
          "gen_ai.operation.name": operation,
          "gen_ai.provider.name": "flowturbo",
          "gen_ai.request.model": model,
          "gen_ai.output.type": "image",
          ...(Number.isSafeInteger(options?.seed) && { "gen_ai.request.seed": options.seed }),
        };
        // The model runs in this process.
        const about = { kind: SpanKind.INTERNAL, attributes };
        spans.set(call, tracer.startSpan(`${operation} ${model}`, about, parentOf(traceparent)));
      },
      asyncEnd(call) {
        const span = spans.get(call);
        const { pictures = 1, width, height, steps, blocks, runtime, result, error } = call;
        if (pictures > 1) span?.setAttribute("gen_ai.request.choice.count", pictures);
        const own = { pictures, width, height, steps, blocks, runtime };
        for (const [name, value] of Object.entries(own))
          if (value !== undefined) span?.setAttribute(`flowturbo.${name}`, value);
        if (result) {
          span?.setAttribute("gen_ai.usage.input_tokens", result.tokens.text);
          span?.setAttribute("gen_ai.usage.output_tokens", result.tokens.image * result.images.length);
        }
        ended(span, error);
      },
    },
    queue: {
      start(queue) {
        if (!spans.has(queue.generate)) return;
        const attributes = { "flowturbo.queue.place": queue.place };
        queues.set(queue, tracer.startSpan("queue", { attributes }, under(queue.generate)));
      },
      asyncEnd(queue) {
        ended(queues.get(queue), queue.error);
      },
    },
    launch: {
      // Published when it is over.
      end({ generate, graph, size, batch, rows, milliseconds }) {
        if (!spans.has(generate)) return;
        const now = Date.now();
        const attributes = { "flowturbo.size": size, "flowturbo.batch": batch, "flowturbo.rows": rows };
        const about = { attributes, startTime: now - milliseconds };
        tracer.startSpan(`launch ${graph}`, about, under(generate)).end(now);
      },
    },
  };
  for (const name of names) tracingChannel(`flowturbo:${name}`).subscribe(subscribers[name]);
  return () => {
    for (const name of names) tracingChannel(`flowturbo:${name}`).unsubscribe(subscribers[name]);
  };
}

/** The context of the request that is answered. flowturbo has checked its form. */
function parentOf(traceparent) {
  if (traceparent === null) return context.active();
  const [, traceId, spanId, flags] = traceparent.split("-");
  return traces.setSpanContext(context.active(), {
    traceId,
    spanId,
    traceFlags: Number.parseInt(flags, 16),
    isRemote: true,
  });
}

function ended(span, error) {
  if (error !== undefined) {
    // Messages may name files of this machine, and go wherever spans go; the code does not.
    const code = typeof error?.code === "string" ? error.code : error?.name;
    span?.setAttribute("error.type", code ?? "_OTHER");
    span?.setStatus({ code: SpanStatusCode.ERROR });
  }
  span?.end();
}
