// Imports between the rooms of lib/ point down: a room is imported only by the rooms that this file lists for it.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const lib = path.resolve(import.meta.dirname, "../lib");

/** Each room, and the rooms that it may import from besides itself; `common` and `errors` are open to all. */
const rooms: Record<string, string[]> = {
  cli: [
    "flowturbo",
    "server",
    "fleet",
    "mcp",
    "clients",
    "generation",
    "options",
    "model",
    "checkpoint",
    "hub",
    "runtimes",
    "schedule",
  ],
  ai: ["flowturbo", "clients", "options", "model", "schedule"],
  mcp: ["clients", "generation", "options", "model"],
  clients: ["generation", "model", "schedule"],
  fleet: ["json", "codecs", "generation", "options", "model", "serving"],
  server: ["generation", "options", "model", "serving", "schedule"],
  index: ["flowturbo", "json", "generation", "model", "serving", "networks", "runtimes", "schedule"],
  flowturbo: ["generation", "options", "model", "serving", "networks", "runtimes", "checkpoint", "hub", "program", "schedule", "onnx"], // biome-ignore format: one line
  json: ["codecs", "generation", "options", "model"],
  schema: ["codecs"],
  codecs: ["options", "model"],
  generation: [
    "options",
    "model",
    "serving",
    "networks",
    "runtimes",
    "checkpoint",
    "hub",
    "program",
    "schedule",
    "onnx",
  ],
  options: ["model", "networks", "runtimes", "schedule"],
  model: ["serving", "networks", "runtimes", "schedule"],
  serving: ["runtimes", "program"],
  runtimes: ["program", "onnx"],
  networks: ["checkpoint", "onnx"],
  checkpoint: [],
  hub: [],
  schedule: [],
  program: [],
  onnx: [],
  common: [],
  errors: [],
};
const open = ["common", "errors"];

function roomOf(file: string): string {
  const [room] = path.relative(lib, file).replace(/\.ts$/, "").split(path.sep);
  if (room && room in rooms) return room;
  throw new Error(`lib/${path.relative(lib, file)} has no room; give it one in this test and in ARCHITECTURE.md`);
}

const files = readdirSync(lib, { recursive: true, encoding: "utf8" })
  .filter((name) => name.endsWith(".ts"))
  .map((name) => path.join(lib, name));

const imports = (file: string): string[] =>
  [...readFileSync(file, "utf8").matchAll(/(?:from|import)\s*\(?\s*"([^"]+)"/g)].map((match) => match[1]!);

describe("imports", () => {
  it("finds the files and their imports", () => {
    expect(files.length).toBeGreaterThan(25);
    expect(imports(path.join(lib, "flowturbo.ts"))).toContain("./checkpoint/index.js");
  });

  it("point down", () => {
    const wrong: string[] = [];
    for (const file of files)
      for (const target of imports(file).filter((name) => name.startsWith("."))) {
        const from = roomOf(file);
        const to = roomOf(path.resolve(path.dirname(file), target.replace(/\.js$/, ".ts")));
        if (from !== to && !open.includes(to) && !rooms[from]!.includes(to))
          wrong.push(`${path.relative(lib, file)} (${from}) imports ${target} (${to})`);
      }
    expect(wrong).toEqual([]);
  });

  it("have an order: no room imports from one that imports from it", () => {
    const reaches = (from: string, seen = new Set<string>()): Set<string> => {
      for (const room of rooms[from]!)
        if (!seen.has(room)) {
          seen.add(room);
          reaches(room, seen);
        }
      return seen;
    };
    for (const room of Object.keys(rooms)) expect([...reaches(room)], room).not.toContain(room);
  });

  it("leave aborts to one place, so that a signal has one listener", () => {
    const users = files.filter((file) => /EventListener\("abort"/.test(readFileSync(file, "utf8")));
    expect(users.map((file) => path.relative(lib, file))).toEqual(["common/abort.ts"]);
  });

  it("reach native code and the network's runtime in one place only", () => {
    const users = files.filter((file) => imports(file).some((name) => name.startsWith("onnxruntime-")));
    expect(users.map((file) => path.relative(lib, file))).toEqual(
      users.map((file) => path.relative(lib, file)).filter((name) => name.startsWith("runtimes/onnxruntime/")),
    );
    expect(
      files.filter((file) => /\.node["'`]/.test(readFileSync(file, "utf8")) && !file.endsWith("tensorrt/addon.ts")),
    ).toEqual([]);
  });
});
