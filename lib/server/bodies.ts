/** A body → checked fields, whichever of the two forms it came in: JSON, or multipart/form-data. */

import * as z from "zod";
import { nearest } from "../common/near.js";
import { clipped } from "../common/text.js";
import { type Failure, invalid } from "./failure.js";
import { type BodySchemas, type Fields, refusedFields } from "./fields.js";

/**
 * A body in multipart/form-data: texts, and files as bytes, by the names of their fields. Of names that end in `[]` there may be several. Fields
 * of a list of objects are named with the place: `controls[0][name]`.
 */
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
    const { values, files } = readFields(body, schema);
    return { fields: check(schema, values), files };
  }
  if (typeof body !== "object" || body === null || Array.isArray(body))
    throw invalid(null, "Expected a JSON object as the body.");
  // OpenAI's own types allow null for what is left out.
  const given = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
  return { fields: check(schema, given), files: {} };
}

/** Where a value of a form belongs: the field, and in a field of several values the keys and places on the way. */
interface Place {
  readonly field: string;
  readonly way: readonly (string | number)[];
  /** Whether there may be several, which are a list. */
  readonly isList: boolean;
}

/** `image[]` is another name of `image`; `controls[0][scale]` is the scale of the first of `controls`. */
function placeOf(name: string): Place {
  const [, field, keys = "", list] = /^([^[\]]+)((?:\[[^[\]]+\])*)(\[\])?$/.exec(name) ?? [];
  if (field === undefined) return { field: name, way: [], isList: false };
  const way = [...keys.matchAll(/\[([^\]]+)\]/g)].map(([, key]) => (/^\d{1,4}$/.test(key!) ? Number(key) : key!));
  return { field, way, isList: list !== undefined };
}

/** Values by their keys, in a form that takes any of them: `__proto__` is one like others. */
type Tree = Map<string | number, unknown>;

/** The fields of a form, not checked. Files are pictures: those of fields of several values become base64, as JSON has them. */
function readFields({ texts, files }: Form, schema: z.ZodObject) {
  const tree: Tree = new Map();
  const pictures: { image?: Uint8Array; mask?: Uint8Array } = {};
  for (const [given, values] of files) {
    const { field, way } = placeOf(given);
    const key = way.at(-1) ?? field;
    if (!Object.hasOwn(schema.shape, field)) throw unknown(field, Object.keys(schema.shape));
    const param = [field, ...way].join(".");
    const isPicture = (key === "image" || key === "mask") && (way.length === 0 || field === "controls");
    if (!isPicture) throw invalid(param, `Expected a text for ${param} but received a file.`);
    if (values.length > 1 || (way.length === 0 && pictures[key]))
      throw invalid(param, `Expected one picture for ${param} but received several.`);
    if (way.length === 0) pictures[key] = values[0]!;
    else put(tree, [field, ...way], Buffer.from(values[0]!).toString("base64"));
  }
  for (const [given, list] of texts) {
    const { field, way, isList } = placeOf(given);
    const found = Object.hasOwn(schema.shape, field) ? within(schema.shape[field] as z.ZodType, way) : undefined;
    put(tree, [field, ...way], readValue(list, isList, found));
  }
  return { values: plain(tree) as Record<string, unknown>, files: pictures };
}

/** The value of texts: the first reading that the schema accepts. */
function readValue(list: readonly string[], isList: boolean, schema: z.ZodType | undefined): unknown {
  const [text] = list as [string];
  const readings = [
    ...(list.length === 1 ? [() => text, () => number(text), () => JSON.parse(text)] : []),
    ...(isList ? [() => list, () => list.map(number)] : []),
  ];
  for (const reading of readings)
    try {
      const value = reading();
      if (schema?.safeParse(value).success) return value;
    } catch {
      // Not JSON.
    }
  return list.length === 1 ? text : list;
}

/** The schema of what is inside a field; undefined where the field has nothing there. */
function within(schema: z.ZodType, way: Place["way"]): z.ZodType | undefined {
  let at: z.ZodType | undefined = schema;
  for (const key of way) {
    if (at instanceof z.ZodOptional) at = at.unwrap() as z.ZodType;
    if (at instanceof z.ZodArray && typeof key === "number") at = at.element as z.ZodType;
    else if (at instanceof z.ZodObject && Object.hasOwn(at.shape, key)) at = at.shape[key] as z.ZodType;
    else return undefined;
  }
  return at;
}

/** @throws Failure where something is there already */
function put(tree: Tree, [first, ...way]: readonly (string | number)[], value: unknown): void {
  let at = tree;
  let key = first!;
  for (const next of way) {
    if (!at.has(key)) at.set(key, new Map());
    const inner = at.get(key);
    if (!(inner instanceof Map)) break;
    at = inner;
    key = next;
  }
  if (at.has(key))
    throw invalid(clipped(String(first), 64), `The field ${shown(String(first))} is given more than once.`);
  at.set(key, value);
}

/** Trees as objects, and those of numbers from 0 as lists. */
function plain(value: unknown): unknown {
  if (!(value instanceof Map)) return value;
  const entries = [...value].map(([key, inner]) => [key, plain(inner)] as const);
  const isList = entries.every(([key]) => typeof key === "number" && key < entries.length);
  if (!isList || entries.length === 0) return Object.fromEntries(entries);
  return entries.sort(([a], [b]) => Number(a) - Number(b)).map(([, inner]) => inner);
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
  if (valueAt(given, issue.path) === undefined)
    throw invalid(param, `Expected a value for ${param}, which is required.`, "missing_required_parameter");
  throw invalid(param, `Wrong value for ${param}: ${sentence(issue)}`);
}

function valueAt(value: unknown, path: readonly PropertyKey[]): unknown {
  return path.reduce((at: unknown, key) => (at as Record<PropertyKey, unknown> | undefined)?.[key], value);
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
