/**
 * Flags of the command line from the schema of the options: their names, help texts and checks are written once, in
 * lib/options.ts.
 */

import { type Command, Option } from "commander";
import type { z } from "zod";
import { optionMeta } from "../options.js";

/** Adds the flag of every field that has one. */
export function addFlags(command: Command, schema: z.ZodObject): void {
  for (const field of Object.values(schema.shape) as z.ZodType[]) {
    const { flag, description } = optionMeta(field);
    if (!flag) continue;
    const option = new Option(flag, description);
    const preset = field.safeParse(undefined);
    // The default of a flag that turns something off is not to be off: that goes without saying.
    if (preset.success && preset.data !== undefined && preset.data !== false && !option.negate)
      option.default(undefined, String(preset.data));
    command.addOption(option);
  }
}

/** The flags that were given, under the names of the options, numbers as numbers. */
export function readFlags(schema: z.ZodObject, given: Record<string, unknown>): Record<string, unknown> {
  const options: Record<string, unknown> = {};
  for (const [name, field] of Object.entries(schema.shape) as [string, z.ZodType][]) {
    const { flag } = optionMeta(field);
    if (!flag) continue;
    const value = given[new Option(flag).attributeName()];
    if (value === undefined) continue;
    // A text that is no number stays one, so that the schema's complaint shows it.
    options[name] = takesNumber(field) && typeof value === "string" && numeric.test(value) ? Number(value) : value;
  }
  return options;
}

const numeric = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

function takesNumber(field: z.ZodType): boolean {
  return field.safeParse(1).success || field.safeParse(2).success;
}

/** `width` → `--width`, for messages. */
export function flagOf(schema: z.ZodObject, option: string): string | undefined {
  const field = schema.shape[option] as z.ZodType | undefined;
  return field && optionMeta(field).flag?.split(" ")[0];
}

/** Lists that were given as text. Anything that is none stays as it is, so that the schema's complaint shows it. */
export function readLists(options: Record<string, unknown>): Record<string, unknown> {
  const lists: Record<string, (text: string) => unknown> = {
    sizes: (text) => {
      const match = text.match(/^(\d+)x(\d+)$/);
      return match ? { width: Number(match[1]), height: Number(match[2]) } : null;
    },
    batches: (text) => (/^\d+$/.test(text) ? Number(text) : null),
    targets: (text) => text,
    features: (text) => text,
  };
  const read: Record<string, unknown> = { ...options };
  for (const [name, parse] of Object.entries(lists)) {
    const value = options[name];
    if (typeof value !== "string") continue;
    const items = value.split(",").map((item) => parse(item.trim()));
    read[name] = items.includes(null) ? value : items;
  }
  return read;
}
