// Bodies, headers and addresses made of the server's own OpenAPI document: valid, nearly valid and wild. No answer is 5xx, every one is what the
// document says, what the document and its words allow is drawn, and the server still draws afterwards.
//   FUZZ_SEED=123 FUZZ_RUNS=20000 npx vitest run test/server/fuzz.test.ts

import { Ajv2020, type ValidateFunction } from "ajv/dist/2020.js";
import addFormats from "ajv-formats";
import fc from "fast-check";
import sharp from "sharp";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { stubModel } from "./stub.js";
import { post, quick, serverOf, startServer } from "./support.js";

// biome-ignore lint/suspicious/noExplicitAny: a document of whatever form
type Json = any;
type Fields = Record<string, Json>;

// Other cases at each run, but for CI, which compares commits.
const seed = Number(process.env.FUZZ_SEED ?? (process.env.CI ? 1 : Math.floor(Math.random() * 2 ** 31)));
const runs = Number(process.env.FUZZ_RUNS ?? 2000);
const options = (part: number) => ({ seed, numRuns: Math.max(1, Math.round(runs * part)), endOnFailure: false });

let server: { url: string; close(): Promise<void> };
let document: Json;
let ajv: InstanceType<typeof Ajv2020>;
let picture: Buffer;
let mask: Buffer;
const checks = new Map<object, ValidateFunction>();

beforeAll(async () => {
  console.log(`fuzz: FUZZ_SEED=${seed}`);
  server = await serverOf({ stub: stubModel({ side: 8 }), other: stubModel({ side: 8 }) }, { logger: false });
  document = await (await fetch(`${server.url}/openapi.json`)).json();
  ajv = new Ajv2020({ strict: false, allErrors: false });
  addFormats.default(ajv as never);
  ajv.addSchema({ $id: "api", ...document });
  const plain = { width: 64, height: 64, channels: 4 as const };
  picture = await sharp({ create: { ...plain, background: "#c04020" } })
    .png()
    .toBuffer();
  mask = await sharp({ create: { ...plain, background: "#00000000" } })
    .png()
    .toBuffer();
});
afterAll(() => server.close());

const resolved = (schema: Json): Json =>
  schema.$ref
    ? resolved(
        schema.$ref
          .slice(2)
          .split("/")
          .reduce((at: Json, name: string) => at[name], document),
      )
    : schema;
/** A schema of the document as a check. */
function checkOf(schema: Json): ValidateFunction {
  const known = checks.get(schema);
  if (known) return known;
  const absolute = JSON.parse(JSON.stringify(schema).replaceAll('"#/', '"api#/'));
  const check = ajv.compile(absolute);
  checks.set(schema, check);
  return check;
}

/** Values that cannot be found by chance: text with a grammar of its own. */
const known: Record<string, () => fc.Arbitrary<Json>> = {
  blocks: () => fc.constantFrom("H1", "H1P2", "P3", "HPPR", "H1P5R3", "U2", "H20P30"),
  size: () =>
    fc.oneof(
      fc.constant("auto"),
      fc.tuple(side(), side()).map(([w, h]) => `${w}x${h}`),
    ),
  model: () => fc.constantFrom("stub", "other"),
  width: () => side(),
  height: () => side(),
  image: () => fc.constantFrom(picture.toString("base64"), `data:image/png;base64,${picture.toString("base64")}`, [picture.toString("base64")]), // biome-ignore format: one line
  images: () => fc.constant([{ image_url: `data:image/png;base64,${picture.toString("base64")}` }]),
  // Mostly as many as there are pictures.
  seeds: () => fc.array(fc.nat(), { minLength: 1, maxLength: 4, size: "xsmall" }),
  controls: () =>
    fc.array(
      fc.record(
        {
          name: fc.string({ minLength: 1, maxLength: 20 }),
          image: fc.constantFrom(picture.toString("base64"), `data:image/png;base64,${picture.toString("base64")}`),
          mask: fc.constantFrom(mask.toString("base64"), picture.toString("base64")),
          scale: fc.double({ min: -100, max: 100, noNaN: true }),
          start: fc.double({ min: 0, max: 1, noNaN: true }),
          preprocess: fc.constant("canny"),
        },
        { requiredKeys: ["name", "image"] },
      ),
      { minLength: 1, maxLength: 3 },
    ),
  mask: () => fc.constantFrom(mask.toString("base64"), { image_url: mask.toString("base64") }),
  // None may be sent.
  webhook: () => fc.constant("http://127.0.0.1:9/hook"),
};
const side = () => fc.integer({ min: 1, max: 60 }).map((times) => 16 * times);

/** Values that a schema allows. @param name of the field, where it has one */
function valuesOf(given: Json, name = ""): fc.Arbitrary<Json> {
  const schema = resolved(given);
  if (known[name]) return known[name]();
  if (schema.const !== undefined) return fc.constant(schema.const);
  if (schema.enum) return fc.constantFrom(...schema.enum);
  const parts = schema.anyOf ?? schema.oneOf;
  if (parts) return fc.oneof(...parts.map((part: Json) => valuesOf(part, name)));
  if (Array.isArray(schema.type))
    return fc.oneof(...schema.type.map((type: string) => valuesOf({ ...schema, type }, name)));
  switch (schema.type) {
    case "string":
      if (schema.pattern) return fc.stringMatching(new RegExp(schema.pattern));
      if (schema.format === "uri") return fc.webUrl();
      return fc.string({
        unit: "grapheme",
        minLength: schema.minLength ?? 0,
        maxLength: Math.min(schema.maxLength ?? 40, 40),
      });
    case "integer":
      return fc.integer({
        min: schema.minimum ?? -1000,
        max: Math.min(schema.maximum ?? 1000, Number.MAX_SAFE_INTEGER),
      });
    case "number": {
      const low = schema.exclusiveMinimum ?? schema.minimum ?? -1000;
      const high = schema.exclusiveMaximum ?? schema.maximum ?? 1000;
      return fc.double({
        ...{ min: low, max: high, noNaN: true },
        ...{ minExcluded: schema.exclusiveMinimum !== undefined, maxExcluded: schema.exclusiveMaximum !== undefined },
      });
    }
    case "boolean":
      return fc.boolean();
    case "null":
      return fc.constant(null);
    case "array":
      return fc.array(valuesOf(schema.items ?? {}, ""), {
        minLength: schema.minItems ?? 0,
        maxLength: Math.min(schema.maxItems ?? 4, 4),
      });
    case "object":
      return objectsOf(schema);
    default:
      return fc.jsonValue();
  }
}
/** Each field that need not be there is there once in six times, and picture and mask, without which there is no edit of a part, mostly. */
function objectsOf(schema: Json): fc.Arbitrary<Fields> {
  const { properties = {}, required = [] } = schema;
  const entries = Object.entries(properties).map(([name, field]) => {
    const present = valuesOf(field, name).map((value) => [[name, value] as const]);
    const weights = ["image", "mask"].includes(name) ? { absent: 1, present: 4 } : { absent: 5, present: 1 };
    return required.includes(name)
      ? present
      : fc.oneof(
          { weight: weights.absent, arbitrary: fc.constant([]) },
          { weight: weights.present, arbitrary: present },
        );
  });
  return fc.tuple(...entries).map((all) => Object.fromEntries(all.flat() as [string, Json][]));
}

/** What the document says in words: which fields go together. @returns the first rule that a body breaks, or null */
function brokenRule(kind: Kind, body: Fields): string | null {
  const has = (name: string) => body[name] !== undefined && body[name] !== null;
  const isPreset = has("quality") && body.quality !== "auto";
  const edits = kind !== "generation" && (has("image") || has("images"));
  const steps = (blocks: string) =>
    [...blocks.matchAll(/[A-Z](\d*)/g)].reduce((sum, [, count]) => sum + Number(count || 1), 0);
  const stages: Fields[] = body.stages ?? [];
  const rules: Record<string, boolean> = {
    "one says how many steps": [isPreset, has("num_inference_steps"), has("blocks"), has("stages")].filter(Boolean).length > 1, // biome-ignore format: one line
    "stages say the size and the sampler": has("stages") && ((has("size") && body.size !== "auto") || has("sampler")),
    "at most 50 steps": stages.reduce((sum, { blocks }) => sum + steps(blocks), steps(body.blocks ?? "")) > 50,
    "no transparency": body.background === "transparent",
    "no addresses of pictures": body.response_format === "url",
    "png has no quality": has("output_compression") && (body.output_format ?? "png") === "png",
    "partial images are of streams": kind !== "job" && Boolean(body.partial_images) && !body.stream,
    "a preview is of partial images": has("preview") && !body.partial_images,
    "one picture is edited": has("image") && has("images"),
    "edits need a picture": kind === "edit" && !edits,
    "a mask and strength need a picture": kind === "job" && !edits && (has("mask") || has("strength")),
    "only edits with a mask cut it out, or keep the rest": !(edits && has("mask")) && (has("padding_mask_crop") || has("keep_original")), // biome-ignore format: one line
    "there is one seed for each picture": has("seeds") && (has("seed") || body.seeds.length !== (body.n ?? 1)),
    "nothing is sent to that host": has("webhook"),
    "prompts are not empty": body.prompt === "",
  };
  return Object.entries(rules).find(([, isBroken]) => isBroken)?.[0] ?? null;
}

type Kind = "generation" | "edit" | "job";
const operations: Record<Kind, { readonly address: string; readonly schema: string; readonly ok: number }> = {
  generation: { address: "/v1/images/generations", schema: "ImageGeneration", ok: 200 },
  edit: { address: "/v1/images/edits", schema: "ImageEdit", ok: 200 },
  job: { address: "/v1/jobs", schema: "NewJob", ok: 202 },
};
const kinds = Object.keys(operations) as Kind[];
const bodies = (kind: Kind) => objectsOf(document.components.schemas[operations[kind].schema]);

interface Answer {
  readonly status: number;
  readonly type: string;
  readonly text: string;
  readonly body: Json;
}
async function send(address: string, init: RequestInit): Promise<Answer> {
  const response = await fetch(`${server.url}${address}`, init);
  const text = await response.text();
  const type = response.headers.get("content-type") ?? "";
  expect(response.headers.get("x-request-id")).toBeTruthy();
  if (response.status >= 400) expect(response.headers.get("x-should-retry")).toMatch(/^(true|false)$/);
  return {
    status: response.status,
    type,
    text,
    body: text !== "" && type.startsWith("application/json") ? JSON.parse(text) : null,
  };
}
const sendJson = (address: string, body: string | Uint8Array, headers: Record<string, string> = {}) =>
  send(address, { method: "POST", headers: { "content-type": "application/json", ...headers }, body: body as never });

/** That an answer is one of those that the document has for its operation. */
function expectDocumented(template: string, method: string, answer: Answer): void {
  const { status, type, body, text } = answer;
  expect(status, text.slice(0, 300)).toBeLessThan(500);
  const responses = document.paths[template][method].responses;
  expect(Object.keys(responses), `${method} ${template}: ${text.slice(0, 300)}`).toContain(String(status));
  const { content } = responses[status];
  const media = type.split(";")[0]!;
  expect(Object.keys(content)).toContain(media);
  if (media !== "application/json") return;
  const check = checkOf(content[media].schema);
  expect(check(body), `${text.slice(0, 500)}: ${JSON.stringify(check.errors)}`).toBe(true);
  if (status >= 400) expect(Object.keys(body.error).sort()).toEqual(["code", "message", "param", "type"]);
}
/** The last event of a stream. */
function lastEvent(text: string): { event: string; data: Json } {
  const block = text.trimEnd().split("\n\n").at(-1)!;
  return { event: block.match(/^event: (.*)$/m)![1]!, data: JSON.parse(block.match(/^data: (.*)$/m)![1]!) };
}
function expectPictures(kind: Kind, body: Fields, answer: Answer): void {
  const count = body.n ?? 1;
  if (kind === "job") return;
  if (!body.stream) {
    expect(answer.body.data).toHaveLength(count);
    return;
  }
  const type = kind === "edit" ? "image_edit" : "image_generation";
  expect(lastEvent(answer.text)).toMatchObject({ event: `${type}.completed`, data: { image_index: count - 1 } });
}

describe("the server, by its own document", () => {
  it("draws what the document allows, and says why where its words forbid it", async () => {
    const counts = { drawn: 0, refused: 0 };
    const cases = fc.constantFrom(...kinds).chain((kind) => fc.tuple(fc.constant(kind), bodies(kind)));
    await fc.assert(
      fc.asyncProperty(cases, async ([kind, body]) => {
        const { address, schema, ok } = operations[kind];
        expect(checkOf(document.components.schemas[schema])(body)).toBe(true);
        const answer = await sendJson(address, JSON.stringify(body));
        expectDocumented(address, "post", answer);
        const broken = brokenRule(kind, body);
        if (broken === null) {
          expect(answer.status, answer.text.slice(0, 500)).toBe(ok);
          expectPictures(kind, body, answer);
          counts.drawn++;
        } else {
          expect(answer.status, broken).toBe(400);
          counts.refused++;
        }
      }),
      options(0.35),
    );
    console.log(`fuzz: ${counts.drawn} of ${counts.drawn + counts.refused} valid bodies were drawn`);
    // Otherwise only refusals are tested.
    expect(counts.drawn / (counts.drawn + counts.refused)).toBeGreaterThan(0.25);
    expect(counts.refused).toBeGreaterThan(0);
  });

  it("reads the same fields from forms", async () => {
    let drawn = 0;
    await fc.assert(
      fc.asyncProperty(
        bodies("edit"),
        fc.boolean(),
        async ({ images: _, image: __, mask: hasMask, ...body }, isList) => {
          const form = new FormData();
          for (const [name, value] of Object.entries(body))
            form.append(name, typeof value === "string" ? value : JSON.stringify(value));
          form.append(isList ? "image[]" : "image", new Blob([picture as never]), "picture.png");
          if (hasMask) form.append("mask", new Blob([mask as never]), "mask.png");
          const answer = await send("/v1/images/edits", { method: "POST", body: form });
          expectDocumented("/v1/images/edits", "post", answer);
          // A form's lines end in CR LF, which its texts then have too.
          const broken = brokenRule("edit", { ...body, image: "x", mask: hasMask });
          expect(answer.status, `${broken} ${answer.text.slice(0, 500)}`).toBe(broken === null ? 200 : 400);
          if (answer.status !== 200) return;
          drawn++;
          expectPictures("edit", body, answer);
        },
      ),
      options(0.1),
    );
    expect(drawn).toBeGreaterThan(0.25 * 0.1 * runs);
  });

  it("names the field of a body that is nearly valid", async () => {
    const wrong = fc.oneof(
      fc.constantFrom<Json>(-1, 1.5, 2 ** 53, "", "x", [], {}, [[]], true, false, "1", "\0", "99999x99999", 1e308),
      fc.jsonValue(),
    );
    const names = (kind: Kind) => Object.keys(document.components.schemas[operations[kind].schema].properties);
    const changes = (kind: Kind) =>
      fc.oneof(
        fc.record({ name: fc.constantFrom(...names(kind)), value: wrong }),
        // Names that there are not, some of which are nearly one.
        fc.record({ name: fc.oneof(fc.string(), fc.constantFrom("Prompt", "promt", "steps", "style", "__proto__", "constructor", "toString", "image[]")), value: wrong }), // biome-ignore format: one line
      );
    const cases = fc.constantFrom(...kinds).chain((kind) => fc.tuple(fc.constant(kind), bodies(kind), changes(kind)));
    await fc.assert(
      fc.asyncProperty(cases, async ([kind, body, { name, value }]) => {
        const { address, schema, ok } = operations[kind];
        const entries = [...Object.entries(body).filter(([key]) => key !== name), [name, value]];
        // Written by hand, so that __proto__ is a field.
        const text = `{${entries.map(([key, each]) => `${JSON.stringify(key)}:${JSON.stringify(each)}`).join()}}`;
        const answer = await sendJson(address, text);
        expectDocumented(address, "post", answer);
        const given = Object.fromEntries(entries.filter(([, each]) => each !== null)) as Fields;
        const check = checkOf(document.components.schemas[schema]);
        const isValid = check(given) && name !== "__proto__";
        // The document does not say which texts are blocks, pictures or models.
        if (!isValid) expect(answer.status, text).toBe(400);
        else if (brokenRule(kind, given) !== null) expect([400, 404], text).toContain(answer.status);
        else expect([ok, 400, 404], text).toContain(answer.status);
        const isUnknown = !(name in document.components.schemas[schema].properties);
        if (isUnknown && value !== null && name !== "__proto__" && answer.status === 400)
          expect(answer.body.error.param).toBe(name.length > 64 ? answer.body.error.param : name);
      }),
      options(0.25),
    );
  });

  it("refuses wild bodies of every type", async () => {
    const wild = fc.oneof(
      fc.json().map((text) => Buffer.from(text)),
      fc
        .jsonValue()
        .map((value) => Buffer.from(JSON.stringify({ prompt: value, image: value, mask: value, stages: value }))),
      fc.uint8Array({ maxLength: 400 }).map((bytes) => Buffer.from(bytes)),
      fc.string({ unit: "binary", maxLength: 200 }).map((text) => Buffer.from(`{"prompt":"${text}"}`)),
      fc.tuple(fc.array(fc.tuple(fc.string(), fc.string({ unit: "binary" }))), fc.boolean()).map(
        ([parts, isWhole]) =>
        Buffer.from(parts.map(([name, text]) => `--x\r\ncontent-disposition: form-data; name="${name}"\r\n\r\n${text}\r\n`).join("") + (isWhole ? "--x--\r\n" : "")), // biome-ignore format: one line
      ),
      fc.uint8Array({ maxLength: 400 }).map((bytes) => Buffer.concat([Buffer.from('--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'), bytes, Buffer.from("\r\n--x--\r\n")])), // biome-ignore format: one line
    );
    const types = fc.constantFrom("application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "application/json; charset=x", "application/x-www-form-urlencoded"); // biome-ignore format: one line
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...kinds), types, wild, async (kind, type, body) => {
        const { address } = operations[kind];
        expectDocumented(address, "post", await sendJson(address, body, { "content-type": type }));
      }),
      options(0.15),
    );
  });

  it("takes any headers, ids and methods", async () => {
    const text = fc
      .string({ minLength: 1, maxLength: 300 })
      .map((value) => value.trim())
      .filter((value) => value !== "");
    const header = fc.oneof(
      text,
      fc.constantFrom("0", "-1", "1", "999999999999999999", "NaN", "x".repeat(256), "00-0-0-00"),
    );
    const id = fc.oneof(fc.string({ unit: "grapheme", minLength: 1, maxLength: 80 }).map(encodeURIComponent), fc.constantFrom("%00", "..%2f..", "job_", "%E0%A4%A", "x".repeat(300), "stub", "*")); // biome-ignore format: one line
    const headers = fc.record(
      { "last-event-id": header, "idempotency-key": header, traceparent: header, "x-request-id": header, authorization: header, accept: header, origin: header }, // biome-ignore format: one line
      { requiredKeys: [] },
    );
    const address = fc.oneof(
      fc.constantFrom("/livez", "/readyz", "/v1/models", "/openapi.json", "/metrics"),
      id.map((each) => `/v1/models/${each}`),
      id.map((each) => `/v1/jobs/${each}`),
      id.map((each) => `/v1/jobs/${each}/events`),
      id.map((each) => `/${each}`),
    );
    const method = fc.constantFrom("GET", "GET", "HEAD", "DELETE", "PUT", "PATCH", "OPTIONS", "POST");
    await fc.assert(
      fc.asyncProperty(address, method, headers, async (to, how, given) => {
        const answer = await send(to, { method: how, headers: given as Record<string, string> });
        expect(answer.status, answer.text.slice(0, 300)).toBeLessThan(500);
        if (answer.status >= 400 && how !== "HEAD")
          expect(checkOf({ $ref: "#/components/schemas/Error" })(answer.body), `${how} ${to}: ${answer.text}`).toBe(
            true,
          );
      }),
      options(0.1),
    );
  });

  it("keeps jobs as the document says, with any keys and positions", async () => {
    const key = fc.option(fc.constantFrom("a", "b", "c"), { nil: undefined });
    await fc.assert(
      fc.asyncProperty(bodies("job"), key, fc.integer({ min: 0, max: 200 }), async (body, name, after) => {
        const headers: Record<string, string> = name === undefined ? {} : { "idempotency-key": name };
        const created = await sendJson("/v1/jobs", JSON.stringify(body), headers);
        expectDocumented("/v1/jobs", "post", created);
        if (created.status !== 202) return;
        const { id } = created.body;
        const told = await send(`/v1/jobs/${id}/events`, { headers: { "last-event-id": String(after) } });
        expectDocumented("/v1/jobs/{id}/events", "get", told);
        const ids = [...told.text.matchAll(/^id: (\d+)$/gm)].map(([, each]) => Number(each));
        expect(ids).toEqual([...ids].sort((a, b) => a - b));
        for (const each of ids) expect(each).toBeGreaterThan(after);
        if (ids.length > 0)
          expect(lastEvent(told.text)).toMatchObject({ event: "job.completed", data: { job: { id } } });
        for (const method of ["GET", "DELETE"]) {
          const answer = await send(`/v1/jobs/${id}`, { method });
          expectDocumented("/v1/jobs/{id}", method.toLowerCase(), answer);
          expect(answer.body.status).toBe("completed");
        }
      }),
      options(0.05),
    );
  });

  it("still draws", async () => {
    const answer = await sendJson("/v1/images/generations", JSON.stringify({ prompt: "x" }));
    expect(answer.status).toBe(200);
    expect(await (await fetch(`${server.url}/metrics`)).text()).toMatch(/^flowturbo_runs_open 0$/m);
  });
});

it("the embedded model draws what the document allows", async () => {
  const real = await startServer({ maxSteps: 6, logger: false });
  const stub = server;
  server = real;
  try {
    let drawn = 0;
    const cases = fc
      .constantFrom<Kind>("generation", "edit")
      .chain((kind) => fc.tuple(fc.constant(kind), bodies(kind)));
    await fc.assert(
      fc.asyncProperty(cases, fc.integer({ min: 1, max: 6 }), async ([kind, body], steps) => {
        // Small, so that it is quick.
        const { stages: _, quality: __, blocks: ___, deadline_ms: ____, model: _____, n: ______, ...rest } = body;
        const small: Fields = { ...rest, size: "64x64", num_inference_steps: steps };
        // What the model's encoders have, and texts that are no weights.
        Object.assign(small, { clip_skip: Math.min(1, rest.clip_skip ?? 0), prompt_weighting: false });
        small.max_sequence_length = Math.min(16, rest.max_sequence_length ?? 16);
        if (small.seeds) small.seeds = small.seeds.slice(0, 1);
        // What goes together with a number of steps, and with a scheduler that does not shift by size.
        for (const name of ["sigmas", "mu", "guidance_start", "guidance_stop", "guidance_mode"]) delete small[name];
        if (small.grid === "calibrated") delete small.grid;
        // The model has five blocks, no LoRAs and no ControlNets; the first step has no skip-layer guidance, and one alone none.
        for (const name of ["loras", "controls"]) delete small[name];
        const isGuided = ([small.guidance_scale ?? 4.5].flat() as number[])[0]! > 1;
        // A strength of about 0 leaves no step at all.
        const hasSteps = kind !== "edit" || Math.trunc(steps - steps * ((small.strength as number) ?? 0.6)) < steps;
        if (small.skip_layers && isGuided && steps > 1 && hasSteps)
          small.skip_layers = { ...small.skip_layers, layers: [small.skip_layers.layers[0] % 5], start: 0, stop: 1 };
        else delete small.skip_layers;
        if (Array.isArray(small.guidance_scale)) small.guidance_scale = Array(steps).fill(small.guidance_scale[0]);
        if (kind === "edit") Object.assign(small, { image: picture.toString("base64"), images: null });
        const answer = await sendJson(operations[kind].address, JSON.stringify(small));
        expectDocumented(operations[kind].address, "post", answer);
        const { images: _______, ...given } = small;
        const broken = brokenRule(kind, given);
        expect(answer.status, `${broken} ${answer.text.slice(0, 300)}`).toBe(broken === null ? 200 : 400);
        if (answer.status !== 200) return;
        drawn++;
        expectPictures(kind, small, answer);
      }),
      { seed, numRuns: 60, endOnFailure: true },
    );
    expect(drawn).toBeGreaterThan(15);
    expect((await post(`${real.url}/v1/images/generations`, quick)).status).toBe(200);
  } finally {
    server = stub;
    await real.close();
  }
});
