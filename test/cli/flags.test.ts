// What the help of each command says of its flags.
import { Command, type Option } from "commander";
import { describe, expect, it } from "vitest";
import { z } from "zod";
import { calibrateCommand } from "../../lib/cli/calibrate.js";
import { compileCommand } from "../../lib/cli/compile.js";
import { addModelFlags, modelName, readFlags } from "../../lib/cli/flags.js";
import { generateCommand } from "../../lib/cli/generate.js";
import { profileCommand } from "../../lib/cli/profile.js";
import {
  calibrateSchema,
  compileSchema,
  generateSchema,
  loadSchema,
  optionMeta,
  profileSchema,
} from "../../lib/options.js";

const { signal } = new AbortController();
const commands = [
  ["generate", generateCommand, [loadSchema, generateSchema]],
  ["compile", compileCommand, [compileSchema]],
  ["profile", profileCommand, [loadSchema, profileSchema]],
  ["calibrate", calibrateCommand, [loadSchema, calibrateSchema]],
] as const;
const defaultsIn = (text: string) => [...text.matchAll(/\(default: ([^)]*)\)/g)].map(([, value]) => value);

describe.each(commands)("the help of %s", (name, add, schemas: readonly z.ZodObject[]) => {
  const command = new Command(name);
  add(command, signal);
  const help = command.createHelp();
  const fields = schemas.flatMap((schema) => Object.values(schema.shape) as z.ZodType[]);
  const optionOf = (field: z.ZodType) => command.options.find(({ flags }) => flags === optionMeta(field).flag);

  it("says the default of each flag that has one, once", () => {
    const shown = fields.filter((field) => {
      const option = optionOf(field);
      const { success, data } = field.safeParse(undefined);
      return option && !option.negate && success && data !== undefined && data !== false;
    });
    expect(shown.length).toBeGreaterThan(1);
    for (const field of shown) {
      const { data } = field.safeParse(undefined);
      const expected = Array.isArray(data) ? data.join(",") || "none" : String(data);
      expect(defaultsIn(help.optionDescription(optionOf(field) as Option)), optionMeta(field).flag).toEqual([expected]);
    }
  });

  it("says no flag's default twice, and none of a switch", () => {
    for (const option of help.visibleOptions(command)) {
      const text = help.optionDescription(option);
      expect(defaultsIn(text).length, option.flags).toBeLessThanOrEqual(1);
      if (!option.required && !option.optional) expect(defaultsIn(text), option.flags).toEqual([]);
    }
  });

  it("does not take a default for a flag that was given", () => {
    // Commander itself has true for what a flag turns off.
    const given = schemas.flatMap((schema) => Object.values(readFlags(schema, command.opts())));
    expect(given.filter((value) => value !== true)).toEqual([]);
  });
});

describe("flags that share a name", () => {
  const schema = z.strictObject({
    textEncoder3: loadSchema.shape.textEncoder3,
    t5Weights: z
      .enum(["stored", "int8"])
      .default("stored")
      .meta({ flag: "--t5 <weights>", description: "T5's weights" }),
  });
  const given = (...flags: string[]) => {
    const command = new Command().exitOverride();
    addModelFlags(command, schema);
    return readFlags(schema, command.parse(flags, { from: "user" }).opts());
  };

  it.each([
    [[], {}],
    [["--no-t5"], { textEncoder3: false }],
    [["--t5", "int8"], { t5Weights: "int8" }],
    // As everywhere, the last one counts.
    [["--t5", "int8", "--no-t5"], { textEncoder3: false }],
    [["--no-t5", "--t5", "int8"], { t5Weights: "int8" }],
  ])("%j", (flags, options) => {
    expect(given(...flags)).toEqual(options);
  });
});

it.each([
  [generateCommand, "--guidance <scale>", "4.5, or 1 for a distilled model"],
  [generateCommand, "--guidance-stop <part>", "1"],
  [calibrateCommand, "--steps <list>", "3,4,5,6,7,8,9,10,11,12"],
  [calibrateCommand, "--pictures <n>", "16"],
  [profileCommand, "--batches <list>", "1,2,4,8"],
  [compileCommand, "--with <list>", "none"],
])("%o says of %s that the default is %s", (add, flag, value) => {
  const command = new Command();
  add(command, signal);
  const option = command.options.find(({ flags }) => flags === flag)!;
  expect(command.createHelp().optionDescription(option)).toMatch(`(default: ${value})`);
});

it("a model is called by its folder, or by its name on the hub", () => {
  for (const [model, name] of [
    ["/models/sd3.5-large", "sd3.5-large"],
    ["./no/such/folder", "folder"],
    ["stabilityai/stable-diffusion-3.5-medium", "stable-diffusion-3.5-medium"],
    ["owner/name@refs/pr/1", "name"],
    ["owner/name/sd3.safetensors@main", "sd3"],
    // A folder of that name comes first.
    ["lib/hub", "hub"],
  ] as const)
    expect(modelName(model)).toBe(name);
});
