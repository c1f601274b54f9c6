/** The OpenAPI document: bodies are the schemas that requests are checked with. */

import * as z from "zod";
import { packageVersion } from "../common/package.js";
import type { BodySchemas } from "./fields.js";

type Json = Record<string, unknown>;

const ref = (name: string) => ({ $ref: `#/components/schemas/${name}` });
const json = (schema: Json) => ({ "application/json": { schema } });

/** @param hasKeys whether requests need a key */
export function openApiDocument(schemas: BodySchemas, hasKeys: boolean): Json {
  const bodies = Object.fromEntries(
    Object.entries(schemas).map(([name, schema]) => {
      const { $schema: _, ...rest } = z.toJSONSchema(schema, { target: "draft-2020-12", io: "input" }) as Json;
      return [bodyNames[name]!, rest];
    }),
  );
  const error = (description: string, headers?: Json) => ({
    description,
    ...(headers && { headers }),
    content: json(ref("Error")),
  });
  const waiting = {
    "Retry-After": { description: "Seconds until there will be room.", schema: { type: "integer" } },
    "retry-after-ms": { description: "The same in milliseconds.", schema: { type: "integer" } },
  };
  const errors = {
    "400": error("A field is wrong; param names it."),
    ...(hasKeys && { "401": error("The key is missing or wrong.") }),
    "404": error("There is no such model."),
    "409": error("The Idempotency-Key came with another request before."),
    "413": error("The body is too large."),
    "415": error("The body is of another type."),
    "422": error("No schedule fits the time limit, whatever else is drawn."),
    "429": error("The queue is full, or nothing fits the time limit beside the requests of others.", waiting),
    "500": error("Something failed that was no fault of the request."),
    "503": error("The server loads its models, ends, or has lost its runtime.", waiting),
  };
  const idempotency = {
    ...{ name: "Idempotency-Key", in: "header", required: false, schema: { type: "string", maxLength: 255 } },
    description: "Requests with the same key and body are one run with one answer. Kept for ten minutes.",
  };
  const draw = (name: string, isForm: boolean, what: string) => ({
    post: {
      operationId: name === "ImageEdit" ? "editImage" : "generateImage",
      summary: what,
      parameters: [idempotency],
      requestBody: {
        required: true,
        content: {
          ...json(ref(name)),
          ...(isForm && { "multipart/form-data": { schema: formOf(bodies[name] as Json) } }),
        },
      },
      responses: {
        "200": {
          description: "The pictures; with stream the events of their making.",
          content: { ...json(ref("Images")), "text/event-stream": { schema: { type: "string" } } },
        },
        ...errors,
      },
    },
  });
  const idParameter = { name: "id", in: "path", required: true, schema: { type: "string" } };
  const job = { description: "The job.", content: json(ref("Job")) };
  const noJob = { "404": error("There is no such job, or not any more."), ...(hasKeys && { "401": errors["401"] }) };
  const text = (description: string, type = "text/plain") => ({
    description,
    content: { [type]: { schema: { type: "string" } } },
  });
  return {
    openapi: "3.1.0",
    info: {
      title: "flowturbo",
      version: packageVersion(),
      description: "Text-to-image with SD3 and SD3.5 class models: OpenAI's images API, jobs, probes and metrics.",
    },
    ...(hasKeys && { security: [{ key: [] }] }),
    paths: {
      "/v1/images/generations": draw("ImageGeneration", false, "Draws pictures of a prompt."),
      "/v1/images/edits": draw("ImageEdit", true, "Draws a picture anew, or parts of it."),
      "/v1/models": {
        get: {
          operationId: "listModels",
          summary: "The models.",
          responses: {
            "200": { description: "The models.", content: json(ref("ModelList")) },
            ...(hasKeys && { "401": errors["401"] }),
          },
        },
      },
      "/v1/models/{id}": {
        get: {
          ...{ operationId: "getModel", summary: "One model.", parameters: [idParameter] },
          responses: {
            "200": { description: "The model.", content: json(ref("Model")) },
            "404": errors["404"],
            ...(hasKeys && { "401": errors["401"] }),
          },
        },
      },
      "/v1/jobs": {
        post: {
          ...{ operationId: "createJob", summary: "Draws without a connection.", parameters: [idempotency] },
          requestBody: { required: true, content: json(ref("NewJob")) },
          responses: {
            "202": { ...job, headers: { Location: { description: "Where the job is.", schema: { type: "string" } } } },
            ...errors,
          },
        },
      },
      "/v1/jobs/{id}": {
        get: {
          operationId: "getJob",
          summary: "A job as it is now.",
          parameters: [idParameter],
          responses: { "200": job, ...noJob },
        },
        delete: {
          operationId: "cancelJob",
          summary: "Stops a job.",
          parameters: [idParameter],
          responses: { "200": job, ...noJob },
        },
      },
      "/v1/jobs/{id}/events": {
        get: {
          operationId: "readJob",
          summary: "The events of a job, those that were and those to come.",
          parameters: [
            idParameter,
            {
              name: "Last-Event-ID",
              in: "header",
              required: false,
              schema: { type: "integer", minimum: 0 },
              description: "Reads on after this event.",
            },
          ],
          responses: { "200": text("Events.", "text/event-stream"), "400": errors["400"], ...noJob },
        },
      },
      "/livez": {
        get: {
          operationId: "live",
          security: [],
          summary: "Whether the process works.",
          responses: { "200": text("It does."), "503": text("It has to be restarted.") },
        },
      },
      "/readyz": {
        get: {
          operationId: "ready",
          security: [],
          summary: "Whether requests are worked on.",
          responses: { "200": text("They are."), "503": text("They are not, now.") },
        },
      },
      "/metrics": {
        get: {
          operationId: "metrics",
          summary: "Metrics for Prometheus.",
          responses: { "200": text("Metrics."), ...(hasKeys && { "401": errors["401"] }) },
        },
      },
      "/openapi.json": {
        get: {
          operationId: "openapi",
          security: [],
          summary: "This document.",
          responses: { "200": { description: "It.", content: json({ type: "object" }) } },
        },
      },
    },
    components: {
      ...(hasKeys && { securitySchemes: { key: { type: "http", scheme: "bearer" } } }),
      schemas: { ...bodies, ...answers },
    },
  };
}

const bodyNames: Record<string, string> = { generation: "ImageGeneration", edit: "ImageEdit", job: "NewJob" };

/** The same fields in a form: pictures are files. */
function formOf(body: Json): Json {
  const file = { type: "string", contentMediaType: "application/octet-stream" };
  const { images: _, ...properties } = body.properties as Json;
  return { ...body, properties: { ...properties, image: file, mask: file } };
}

const nullable = (...types: string[]) => ({ type: [...types, "null"] });
const integer = { type: "integer" };
const text = { type: "string" };
const number = { type: "number" };
const object = (properties: Json): Json => ({ type: "object", properties, required: Object.keys(properties) });
const details = object({ text_tokens: integer, image_tokens: integer });

/** What the server answers. */
const answers: Json = {
  Error: object({ error: object({ message: text, type: text, param: nullable("string"), code: nullable("string") }) }),
  Images: object({
    created: integer,
    data: { type: "array", items: object({ b64_json: text }) },
    ...{
      background: { const: "opaque" },
      output_format: { enum: ["png", "jpeg", "webp"] },
      quality: { enum: ["low", "medium", "high"] },
      size: text,
    },
    usage: object({
      ...{
        input_tokens: integer,
        input_tokens_details: details,
        output_tokens: integer,
        output_tokens_details: details,
        total_tokens: integer,
      },
    }),
    model: text,
    seeds: { type: "array", items: { type: ["integer", "string"] } },
    blocks: text,
    evaluations: object({ predictor: number, refiner: number, rows: number }),
    timings: { type: "object", additionalProperties: true },
    deadline: { type: ["object", "null"] },
    warnings: { type: "array", items: text },
  }),
  Model: object({
    ...{
      id: text,
      object: { const: "model" },
      created: integer,
      owned_by: text,
      native_size: nullable("string"),
      has_refiner: nullable("boolean"),
      loras: { type: ["array", "null"], items: text },
      control_nets: { type: ["array", "null"], items: text },
    },
    limits: object({ max_images: integer, max_pixels: integer, max_steps: integer, max_controls: integer }),
  }),
  ModelList: object({
    object: { const: "list" },
    data: { type: "array", items: { $ref: "#/components/schemas/Model" } },
  }),
  Job: object({
    ...{
      id: text,
      object: { const: "job" },
      status: { enum: ["queued", "in_progress", "completed", "failed", "cancelled"] },
      model: text,
    },
    ...{
      created_at: integer,
      started_at: nullable("integer"),
      completed_at: nullable("integer"),
      expires_at: nullable("integer"),
    },
    ...{
      place: nullable("integer"),
      predicted_ms: nullable("number"),
      progress: object({ step: integer, steps: nullable("integer") }),
    },
    result: { anyOf: [{ $ref: "#/components/schemas/Images" }, { type: "null" }] },
    error: { type: ["object", "null"] },
  }),
};
