// ARCHITECTURE.md against the code: the rooms and their floors, the files that it names, and the walks.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { root } from "../support/fixtures.js";
import { documents, read } from "./documents.js";

const text = read("ARCHITECTURE.md");
const section = (heading: string) => text.match(new RegExp(`^## ${heading}\n([\\s\\S]*?)(?=^## )`, "m"))![1]!;
const stepsOf = (walk: string) =>
  [...walk.matchAll(/^\| `([\w/.-]+)` \| `(#?\w+)` \| (\w+) \|$/gm)].map(([, file, name, value]) => {
    return { file: file!, name: name!, value: value! };
  });
const singular = (name: string) => name.replace(/s$/, "");
const codeBlocks = (markdown: string) => [...markdown.matchAll(/^```\n([\s\S]*?)^```/gm)].map(([, code]) => code!);

const ignored = new Set(["node_modules", ".git", ".cache", "dist", "build", "site"]);
function filesBelow(folder: string): string[] {
  return readdirSync(path.join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const name = path.posix.join(folder, entry.name);
    if (ignored.has(entry.name)) return [];
    return entry.isDirectory() ? filesBelow(name) : [name];
  });
}
const files = filesBelow("");
const library = files.filter((file) => file.startsWith("lib/") && file.endsWith(".ts"));
const roomOf = (file: string) => file.split("/")[1]!.replace(/\.ts$/, "");

describe("the rooms", () => {
  const [tree, floors] = codeBlocks(section("Rooms")) as [string, string];

  it("are all listed", () => {
    const listed = [...tree.match(/^lib\/\n([\s\S]*?)^\S/m)![1]!.matchAll(/^ {2}([\w-]+)(?:\/|\.ts)/gm)];
    expect(listed.map(([, room]) => room).sort()).toEqual([...new Set(library.map(roomOf))].sort());
  });

  it("import only from the floors below them", () => {
    const floorOf = new Map(
      floors
        .trim()
        .split("\n")
        .flatMap((line, floor) => line.split(/\s+/).map((room) => [room, floor] as const)),
    );
    for (const file of library)
      for (const [, name] of read(file).matchAll(/(?:from|import)\s*\(?\s*"(\.[^"]+)"/g)) {
        const target = roomOf(path.posix.join(path.posix.dirname(file), name!.replace(/\.js$/, ".ts")));
        const [from, to] = [roomOf(file), target];
        // All may import these two.
        if (from === to || to === "common" || to === "errors") continue;
        expect(floorOf.get(to), `${file} imports ${name}`).toBeGreaterThan(floorOf.get(from)!);
      }
  });
});

it("documents name files that exist, or that a build makes", () => {
  for (const document of documents)
    for (const [, name] of read(document).matchAll(
      /`((?:[\w.-]+\/)+[\w.-]+\.(?:ts|js|mjs|h|cpp|py)|[\w-]+\.(?:ts|mjs))`/g,
    ))
      expect(
        name!.startsWith("dist/") || files.some((file) => file === name || file.endsWith(`/${name}`)),
        `${document}: ${name}`,
      ).toBe(true);
});

describe("the walk of", () => {
  const walks = section("Walks")
    .split(/^### /m)
    .slice(1)
    .map((walk) => ({ option: walk.match(/^`?(\w+)`?$/m)![1]!, steps: stepsOf(walk) }));
  const [programs, ...options] = walks;

  it("programs, and of five options", () => {
    expect(programs!.option).toBe("Programs");
    expect(options.map(({ option }) => option)).toEqual(["prompt", "blocks", "image", "signal", "deadlineMs"]);
  });

  it.each(options)("$option enters no file twice, and changes its name at most twice", ({ option, steps }) => {
    expect(steps.length).toBeGreaterThan(4);
    // One that ends where a program is written goes on as programs do.
    const isInProgram = !/^(?:serving|runtimes)\//.test(steps.at(-1)!.file);
    const all = isInProgram ? [...steps, ...programs!.steps] : steps;
    expect(new Set(all.map(({ file }) => file)).size).toBe(all.length);
    expect(steps[0]).toEqual({ file: "flowturbo.ts", name: "generate", value: option });
    const names = steps.map(({ value }) => singular(value));
    expect(names.filter((name, index) => index > 0 && name !== names[index - 1]).length).toBeLessThanOrEqual(2);
  });

  it.each(walks)("$option names functions that exist, in files that know the value by that name", ({ steps }) => {
    for (const { file, name, value } of steps) {
      const source = readFileSync(path.join(root, "lib", file), "utf8");
      expect(source, `${file} has no ${name}`).toMatch(new RegExp(`^ *(?:[a-z]+ )*${name}(?:<.+>)?\\(`, "m"));
      // The first takes the options as a whole.
      if (name === "generate") continue;
      const code = source.replace(/\/\*[\s\S]*?\*\/|\/\/.*/g, "");
      expect(code, `${file} has no ${value}`).toMatch(new RegExp(`\\b${value}\\b`));
    }
  });
});
