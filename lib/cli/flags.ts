/**
 * Flags of the command line from the schema of the options: their names, help texts and checks are written once, in
 * lib/options.ts. The few flags that are no options of the library are here where several commands have them.
 */

import { existsSync } from "node:fs";
import { type Command, Option } from "commander";
import type * as z from "zod";
import { checkpointName } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import { parseHubName } from "../hub/index.js";
import type { Size } from "../model.js";
import { loadSchema, optionMeta } from "../options.js";
import { addLoadAdapters, readLoadAdapters } from "./adapters.js";

/** Flags of commands that are no options of the library. */
export interface CommonFlags {
  model?: string;
  cache?: string;
  json?: boolean;
}

/** Adds `--model`, and the flag of every field that has one. */
export function addModelFlags(command: Command, ...schemas: readonly z.ZodObject[]): void {
  command.option(
    "--model <path>",
    "checkpoint: a folder in the diffusers layout, one .safetensors file, or a model of the Hugging Face hub as owner/name[@revision] (default: the embedded shapes model)",
  );
  addFlags(command, ...schemas);
}

/** The options of `load` that were given. @throws OptionError for an adapter that cannot be read */
export function readLoadFlags(given: object): Record<string, unknown> {
  return { ...readFlags(loadSchema, given), ...readLoadAdapters(given) };
}

/** Where nothing is loaded. @throws OptionError for the first flag of a model that was given */
export function refuseLoadFlags(given: object, message: string): void {
  const usual = loadSchema.parse({}) as Record<string, unknown>;
  const needless = Object.entries(readLoadFlags(given)).find(([name, value]) => value !== usual[name])?.[0];
  if (needless === undefined) return;
  // Of adapters the schema knows no flags.
  const named = { loras: "--lora, --dynamic-lora: ", controlNets: "--control-net: " }[needless] ?? "";
  throw new OptionError(needless, `${named}${message}`);
}

/** What clients call the model of a folder, or of the hub. */
export function modelName(model: string): string {
  const name = existsSync(model) ? null : parseHubName(model);
  return checkpointName(name ? (name.file ?? name.repository) : model);
}

/** Adds the flag of every field that has one, and for what a model is loaded with those of adapters. */
export function addFlags(command: Command, ...schemas: readonly z.ZodObject[]): void {
  for (const field of schemas.flatMap((schema) => Object.values(schema.shape) as z.ZodType[])) {
    const { flag, description, help = description } = optionMeta(field);
    if (!flag) continue;
    const preset = new Option(flag).negate ? null : presetText(field);
    // In the text: a default of commander's would be among the flags that were given.
    command.addOption(new Option(flag, preset === null ? help : `${help} (default: ${preset})`));
    if (hasOpposite(field, flag)) command.addOption(new Option(flag.replace("--", "--no-"), `the opposite of ${flag}`));
  }
  if (schemas.includes(loadSchema)) addLoadAdapters(command);
}

/** Whether a switch may be on, off, or not given, which is a third thing. */
function hasOpposite(field: z.ZodType, flag: string): boolean {
  const { negate, required, optional } = new Option(flag);
  return !(negate || required || optional) && field.safeParse(undefined).data === undefined;
}

/** A field's default as a flag would say it; null for one that has none, and for a switch that is off. */
function presetText(field: z.ZodType): string | null {
  const { success, data } = field.safeParse(undefined);
  if (!success || data === undefined || data === false) return null;
  if (Array.isArray(data) && data.length === 0) return "none";
  const { width, height } = data as Partial<Size>;
  return width === undefined ? String(data) : `${width}x${height}`;
}

export function addJsonFlag(command: Command): Command {
  return command.option("--json", "print one JSON object");
}

/** The flags that were given, under the names of the options, as the values that the schema takes. */
export function readFlags(schema: z.ZodObject, given: object): Record<string, unknown> {
  const options: Record<string, unknown> = {};
  for (const [name, field] of Object.entries(schema.shape) as [string, z.ZodType][]) {
    const { flag } = optionMeta(field);
    if (!flag) continue;
    const option = new Option(flag);
    const value = (given as Record<string, unknown>)[option.attributeName()];
    // Commander has one attribute for --no-x and --x <text>: false from the former, a text from the latter, true from neither.
    const switched = hasOpposite(field, flag) ? value !== undefined : value === !option.negate;
    const isOwn = option.required ? typeof value === "string" : switched;
    if (isOwn) options[name] = typeof value === "string" ? readText(field, value) : value;
  }
  return options;
}

/**
 * The first reading of a flag's text that a field takes: as it is, as a number, as false or true, as a list of texts, numbers or sizes.
 * Without one, the schema refuses what was given.
 */
function readText(field: z.ZodType, text: string): unknown {
  const items = text.split(",").map((item) => item.trim());
  const readings = [
    text,
    number(text),
    text === "false" ? false : text,
    text === "true" ? true : text,
    items,
    items.map(number),
    items.map(size),
  ];
  return readings.find((reading) => field.safeParse(reading).success) ?? number(text);
}

/** A text that is not a number, or whose whole number would become another, is returned as text. */
function number(text: string): number | string {
  const isNumber = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text);
  return isNumber && (!/^[+-]?\d+$/.test(text) || Number.isSafeInteger(Number(text))) ? Number(text) : text;
}

function size(text: string): { width: number; height: number } | null {
  const match = text.match(/^(\d+)x(\d+)$/);
  return match && { width: Number(match[1]), height: Number(match[2]) };
}

/** `width` → `--width`, for messages. */
export function flagOf(schema: z.ZodObject, option: string): string | undefined {
  const field = schema.shape[option] as z.ZodType | undefined;
  return field && optionMeta(field).flag?.split(" ")[0];
}
