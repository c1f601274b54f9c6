// The house rule: imports point down. Rooms may be entered only from the rooms listed for them.
import { readdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";

const lib = path.resolve(import.meta.dirname, "../lib");

/** Each room, and the rooms that it may import from besides itself and the leaves. */
const rooms: Record<string, string[]> = {
  cli: ["pipeline", "checkpoint", "schedule", "runtimes"],
  pipeline: ["checkpoint", "networks", "onnx", "schedule", "serving", "runtimes", "program"],
  serving: ["schedule", "runtimes", "program"],
  checkpoint: [],
  networks: ["onnx"],
  onnx: [],
  schedule: ["program"],
  runtimes: ["program"],
  program: [],
  leaf: [],
};
const leaves = ["errors.ts", "folders.ts", "options.ts", "recent.ts", "tensor.ts"];
/** Files that are the pipeline: its recipe and the helpers that only it uses. */
const pipeline = [
  "index.ts",
  "pipeline.ts",
  "costs.ts",
  "drawing.ts",
  "engines.ts",
  "graphs.ts",
  "prompts.ts",
  "image.ts",
  "memory.ts",
  "noise.ts",
  "resample.ts",
  "preview.ts",
];

function roomOf(file: string): string {
  const relative = path.relative(lib, file);
  if (relative.includes(path.sep)) return relative.split(path.sep)[0]!;
  if (leaves.includes(relative)) return "leaf";
  if (relative === "program.ts") return "program";
  if (pipeline.includes(relative)) return "pipeline";
  throw new Error(`lib/${relative} has no room; give it one in this test and in ARCHITECTURE.md`);
}

const files = readdirSync(lib, { recursive: true, encoding: "utf8" })
  .filter((name) => name.endsWith(".ts"))
  .map((name) => path.join(lib, name));

const imports = (file: string): string[] =>
  [...readFileSync(file, "utf8").matchAll(/(?:from|import)\s*\(?\s*"([^"]+)"/g)].map((match) => match[1]!);

describe("imports", () => {
  it("finds the files and their imports", () => {
    expect(files.length).toBeGreaterThan(25);
    expect(imports(path.join(lib, "pipeline.ts"))).toContain("./checkpoint/index.js");
  });

  it("point down", () => {
    const wrong: string[] = [];
    for (const file of files)
      for (const target of imports(file).filter((name) => name.startsWith("."))) {
        const from = roomOf(file);
        const to = roomOf(path.resolve(path.dirname(file), target.replace(/\.js$/, ".ts")));
        if (from !== to && to !== "leaf" && !rooms[from]!.includes(to))
          wrong.push(`${path.relative(lib, file)} (${from}) imports ${target} (${to})`);
      }
    expect(wrong).toEqual([]);
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
