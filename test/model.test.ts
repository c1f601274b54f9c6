// The published types: each option's interface is what its schema takes, and everything exported explains itself where
// people read it, in dist/index.d.ts.
import path from "node:path";
import ts from "typescript";
import { describe, expect, expectTypeOf, it } from "vitest";
import type { z } from "zod";
import type {
  CompileEnginesOptions,
  EncodeOptions,
  GenerateOptions,
  ImageModel,
  LoadOptions,
  ProfileOptions,
} from "../lib/index.js";
import { FlowTurbo } from "../lib/index.js";
import { compileSchema, encodeSchema, generateSchema, loadSchema, optionMeta, profileSchema } from "../lib/options.js";
import { blockTable, samplers, sigmaGrids } from "../lib/schedule/index.js";
import { root } from "./support/fixtures.js";

it("the interfaces of the options are what the schemas take", () => {
  expectTypeOf<LoadOptions>().toEqualTypeOf<z.input<typeof loadSchema>>();
  expectTypeOf<GenerateOptions>().toEqualTypeOf<z.input<typeof generateSchema>>();
  expectTypeOf<EncodeOptions>().toEqualTypeOf<z.input<typeof encodeSchema>>();
  expectTypeOf<ProfileOptions>().toEqualTypeOf<z.input<typeof profileSchema>>();
  expectTypeOf<CompileEnginesOptions>().toEqualTypeOf<z.input<typeof compileSchema>>();
  expectTypeOf<FlowTurbo>().toExtend<ImageModel>();
  // The types above are checked by `npm run typecheck`; this one can fail here.
  expect(typeof FlowTurbo.prototype.generate).toBe("function");
});

it("every field of a schema describes itself", () => {
  for (const schema of [loadSchema, generateSchema, encodeSchema, profileSchema, compileSchema])
    for (const [name, field] of Object.entries(schema.shape)) {
      const { description, expects } = optionMeta(field as z.ZodType);
      expect(description, name).toMatch(/\w{3}/);
      expect(expects, name).toMatch(/\w{3}/);
    }
});

const file = path.join(root, "dist/index.d.ts");
const program = ts.createProgram([file], { skipLibCheck: true, module: ts.ModuleKind.NodeNext, strict: true });
const checker = program.getTypeChecker();
const documentation = (symbol: ts.Symbol) => ts.displayPartsToString(symbol.getDocumentationComment(checker)).trim();

/** Everything that is declared there, what the package exports and what that refers to, with all members. */
function published(): { name: string; symbol: ts.Symbol }[] {
  const found: { name: string; symbol: ts.Symbol }[] = [];
  const members = (name: string, all: Iterable<ts.TypeElement | ts.ClassElement>) => {
    for (const member of all) {
      const own = member.name && checker.getSymbolAtLocation(member.name);
      if (!own || ts.isPrivateIdentifier(member.name)) continue;
      found.push({ name: `${name}.${own.name}`, symbol: own });
      const type = ts.isPropertySignature(member) ? member.type : undefined;
      if (type && ts.isTypeLiteralNode(type) && own.name !== "nativeSize") members(`${name}.${own.name}`, type.members);
    }
  };
  // What several entry points declare is in files of its own, which this one imports.
  const parts = program.getSourceFiles().filter(({ fileName }) => path.dirname(fileName) === path.dirname(file));
  for (const statement of parts.flatMap(({ statements }) => [...statements])) {
    const isNamed =
      ts.isInterfaceDeclaration(statement) ||
      ts.isClassDeclaration(statement) ||
      ts.isTypeAliasDeclaration(statement) ||
      ts.isFunctionDeclaration(statement);
    if (!isNamed) continue;
    const symbol = checker.getSymbolAtLocation(statement.name!)!;
    found.push({ name: symbol.name, symbol });
    if (ts.isInterfaceDeclaration(statement) || ts.isClassDeclaration(statement))
      members(symbol.name, statement.members);
  }
  return found;
}

describe("dist/index.d.ts", () => {
  it("has a comment for everything that it declares, and for every member of it", () => {
    const all = published();
    expect(all.length).toBeGreaterThan(250);
    expect(all.filter(({ symbol }) => documentation(symbol).length < 5).map(({ name }) => name)).toEqual([]);
  });

  it("says for every option what happens without it", () => {
    for (const options of [
      "LoadOptions",
      "GenerateOptions",
      "TextOptions",
      "ProfileOptions",
      "CompileEnginesOptions",
    ]) {
      const members = published().filter(({ name }) => name.startsWith(`${options}.`));
      expect(members.length).toBeGreaterThan(5);
      // Absent, these do nothing.
      const plain = ["signal", "onProgress", "onAccept", "onStart", "onStep", "prompt"];
      for (const { name, symbol } of members)
        if (!plain.includes(name.split(".").at(-1)!)) expect(documentation(symbol), name).toMatch(/Default: /);
    }
  });

  it("names every row of the tables, and the bounds that the schemas check", () => {
    const all = published();
    // An interface has those of the one that it extends.
    const of = (name: string) => {
      const inherited = name.replace(/^\w+/, "TextOptions");
      return documentation(all.find((each) => each.name === name || each.name === inherited)!.symbol);
    };
    const { sampler, steps, grid, blocks } = {
      ...{ sampler: of("GenerateOptions.sampler"), steps: of("GenerateOptions.steps") },
      ...{ grid: of("GenerateOptions.grid"), blocks: of("GenerateOptions.blocks") },
    };
    for (const [name, row] of Object.entries(samplers)) {
      expect(sampler).toContain(`"${name}"`);
      expect(steps).toContain(String(row.steps));
    }
    for (const name of Object.keys(sigmaGrids)) expect(grid).toContain(`"${name}"`);
    for (const [letter, { name }] of Object.entries(blockTable)) expect(blocks).toContain(`\`${letter}\` ${name}`);

    const schemas = { LoadOptions: loadSchema, GenerateOptions: generateSchema, EncodeOptions: encodeSchema, ProfileOptions: profileSchema, CompileEnginesOptions: compileSchema }; // biome-ignore format: one line
    for (const [options, schema] of Object.entries(schemas))
      for (const [name, field] of Object.entries(schema.shape)) {
        // "a whole number from 1 to 1024" → both, in the comment.
        const bounds = optionMeta(field as z.ZodType).expects.match(/from (-?\d+) to (\d+)/);
        const text = of(`${options}.${name}`).replace("−", "-");
        for (const bound of bounds?.slice(1) ?? []) expect(text, `${options}.${name}`).toContain(bound);
      }
  });

  it("explains in an editor's hover where an option comes from", () => {
    const of = (name: string) => documentation(published().find((each) => each.name === name)!.symbol);
    expect(of("GenerateOptions.sampler")).toContain("2409.18128");
    expect(of("GenerateOptions.grid")).toContain("Esser");
    expect(of("GenerateOptions.guidanceScale")).toContain("u + g·(c − u)");
    expect(of("Timings.total")).toBeTruthy();
  });
});
