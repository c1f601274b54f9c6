/** A body → checked fields, whichever of the two forms it came in: JSON, or multipart/form-data. */

import type { z } from "zod";
import { nearest } from "../common/near.js";
import { clipped } from "../common/text.js";
import { type Failure, invalid } from "./failure.js";
import { type BodySchemas, type Fields, refusedFields } from "./fields.js";

/** A body in multipart/form-data: texts, and files as bytes, by the names of their fields. Of names that end in `[]` there may be several. */
export interface Form {
  readonly texts: ReadonlyMap<string, readonly string[]>;
  readonly files: ReadonlyMap<string, readonly Uint8Array[]>;
}

export function isForm(body: unknown): body is Form {
  return body instanceof Object && "texts" in body && body.texts instanceof Map;
}

/** Checked fields, and the pictures that came as files. */
export interface Body {
  readonly fields: Fields;
  readonly files: { readonly image?: Uint8Array; readonly mask?: Uint8Array };
}

/** @throws Failure with status 400 that names the field and what was expected */
export function readBody(schema: BodySchemas[keyof BodySchemas], body: unknown): Body {
  if (isForm(body)) {
    const { image, mask } = filesOf(body, schema);
    const fields = check(schema, textsOf(body, schema));
    return { fields, files: { ...(image && { image }), ...(mask && { mask }) } };
  }
  if (typeof body !== "object" || body === null || Array.isArray(body))
    throw invalid(null, "Expected a JSON object as the body.");
  // OpenAI's own types allow null for what is left out.
  const given = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
  return { fields: check(schema, given), files: {} };
}

/** `image[]` is another name of `image`. */
const plainName = (name: string) => name.replace(/\[\]$/, "");

function filesOf({ files }: Form, schema: z.ZodObject) {
  const found: { image?: Uint8Array; mask?: Uint8Array } = {};
  for (const [given, values] of files) {
    const name = plainName(given);
    if (!Object.hasOwn(schema.shape, name)) throw unknown(name, Object.keys(schema.shape));
    if (name !== "image" && name !== "mask") throw invalid(name, `Expected a text for ${name} but received a file.`);
    if (values.length > 1 || found[name]) throw invalid(name, `Expected one picture for ${name} but received several.`);
    found[name] = values[0]!;
  }
  return found;
}

/** Texts as the values that their fields take: the first reading that the schema accepts. */
function textsOf({ texts }: Form, schema: z.ZodObject): Record<string, unknown> {
  const values = new Map<string, unknown>();
  for (const [given, list] of texts) {
    const name = plainName(given);
    const [text] = list as [string];
    if (values.has(name)) throw invalid(clipped(name, 64), `The field ${shown(name)} is given more than once.`);
    const field = Object.hasOwn(schema.shape, name) ? (schema.shape[name] as z.ZodType) : undefined;
    const readings = [
      ...(list.length === 1 ? [() => text, () => number(text), () => JSON.parse(text)] : []),
      ...(name === given ? [] : [() => list, () => list.map(number)]),
    ];
    values.set(name, list.length === 1 ? text : list);
    for (const reading of readings)
      try {
        const value = reading();
        if (!field?.safeParse(value).success) continue;
        values.set(name, value);
        break;
      } catch {
        // Not JSON.
      }
  }
  // Whatever they are called, they are the object's own.
  return Object.fromEntries(values);
}

const shown = (name: string) => JSON.stringify(clipped(name, 64));

/** Numbers as people write them, with or without a sign and a fraction. */
function number(text: string): unknown {
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text.trim()) ? Number(text) : text;
}

function check(schema: z.ZodObject, given: Record<string, unknown>): Fields {
  const names = Object.keys(schema.shape);
  // Before anything reads the values: what there is no place for costs nothing.
  for (const name of Object.keys(given)) if (!names.includes(name)) throw unknown(name, names);
  const { success, data, error } = schema.safeParse(given);
  if (success) return data as Fields;
  const issue = error.issues[0]!;
  const param = issue.path.join(".") || null;
  const [field] = issue.path;
  if (given[String(field)] === undefined)
    throw invalid(param, `Expected a value for ${param}, which is required.`, "missing_required_parameter");
  throw invalid(param, `Wrong value for ${param}: ${sentence(issue)}`);
}

/** Of a union the schema says only that nothing fitted: what it wanted is in its parts. */
function sentence(issue: z.core.$ZodIssue): string {
  const parts =
    issue.code === "invalid_union" ? issue.errors.flatMap((errors) => errors.slice(0, 1).map(sentence)) : [];
  if (parts.length > 0) return [...new Set(parts)].join(" Or: ");
  if (issue.code === "unrecognized_keys") return `there is no ${issue.keys.map((key) => clipped(key, 40)).join(", ")}.`;
  return `${clipped(issue.message, 200).replace(/\.$/, "")}.`;
}

function unknown(name: string, names: readonly string[]): Failure {
  const reason = Object.hasOwn(refusedFields, name) ? refusedFields[name] : undefined;
  if (reason) return invalid(name, `The field ${shown(name)} is not supported. ${reason}`, "unsupported_parameter");
  const near = nearest(name, names);
  const advice = near ? `Did you mean "${near}"?` : `There are ${names.join(", ")}.`;
  return invalid(clipped(name, 64), `There is no field ${shown(name)} here. ${advice}`, "unknown_parameter");
}
