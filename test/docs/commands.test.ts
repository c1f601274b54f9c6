// The commands that the documents and the help texts show: each is parsed as the command line would, nothing is run.
import { existsSync, readdirSync } from "node:fs";
import path from "node:path";
import { Command } from "commander";
import { describe, expect, it } from "vitest";
import { readRequestAdapters } from "../../lib/cli/adapters.js";
import { cacheCommand } from "../../lib/cli/cache.js";
import { calibrateCommand } from "../../lib/cli/calibrate.js";
import { compileCommand } from "../../lib/cli/compile.js";
import { doctorCommand } from "../../lib/cli/doctor.js";
import { readFlags, readLoadFlags } from "../../lib/cli/flags.js";
import { fleetCommand } from "../../lib/cli/fleet.js";
import { generateCommand } from "../../lib/cli/generate.js";
import { inspectCommand } from "../../lib/cli/inspect.js";
import { mcpCommand } from "../../lib/cli/mcp.js";
import { profileCommand } from "../../lib/cli/profile.js";
import { pruneCommand } from "../../lib/cli/prune.js";
import { pullCommand } from "../../lib/cli/pull.js";
import { serveCommand } from "../../lib/cli/serve.js";
import { workerCommand } from "../../lib/cli/worker.js";
import { workerSchema } from "../../lib/fleet/options.js";
import {
  calibrateSchema,
  checkOptions,
  compileSchema,
  generateSchema,
  loadSchema,
  profileSchema,
} from "../../lib/options.js";
import { parseBlocks } from "../../lib/schedule/index.js";
import { root } from "../support/fixtures.js";
import { documents, read } from "./documents.js";

const { scripts, devDependencies } = JSON.parse(read("package.json")) as Record<
  "scripts" | "devDependencies",
  Record<string, string>
>;

/** Words as a shell would split them. */
const wordsOf = (line: string) =>
  [...line.replace(/\s#.*$/, "").matchAll(/"([^"]*)"|'([^']*)'|(\S+)/g)].map(
    (match) => match[1] ?? match[2] ?? match[3]!,
  );

/** Lines with a $ before them, and all lines of sh blocks. */
function commandsOf(text: string): string[] {
  const found: string[] = [];
  for (const [, language, body] of text.matchAll(/^```(\w*)\n([\s\S]*?)^```/gm))
    for (const line of body!.split("\n"))
      if (language === "sh" ? line.trim() : line.startsWith("$ ")) found.push(line.replace(/^\$ /, ""));
  return found.flatMap((line) => line.split("&&")).map((line) => line.trim());
}

interface Shown {
  readonly where: string;
  readonly command: string;
}
const shown: Shown[] = documents.flatMap((where) => commandsOf(read(where)).map((command) => ({ where, command })));
for (const file of readdirSync(path.join(root, "lib/cli")))
  for (const [, command] of read(`lib/cli/${file}`).matchAll(/^ {2}\$ (flowturbo .*?)`?,?$/gm))
    shown.push({ where: `lib/cli/${file}`, command: command! });

/** The command line with commands that do nothing but keep their flags. */
function commandLine(ran: (name: string, words: string[], flags: Record<string, unknown>) => void): Command {
  const { signal } = new AbortController();
  const program = new Command("flowturbo").exitOverride();
  generateCommand(program.command("generate"), signal);
  inspectCommand(program.command("inspect"));
  compileCommand(program.command("compile"), signal);
  profileCommand(program.command("profile"), signal);
  calibrateCommand(program.command("calibrate"), signal);
  cacheCommand(program.command("cache"), signal);
  serveCommand(program.command("serve"), signal, () => {});
  workerCommand(program.command("worker"), signal, () => {});
  fleetCommand(program.command("fleet"), signal);
  mcpCommand(program.command("mcp"), signal, () => {});
  pullCommand(program.command("pull"), signal);
  doctorCommand(program.command("doctor"));
  pruneCommand(program.command("prune"));
  const visit = (command: Command) => {
    command.exitOverride().configureOutput({ writeErr: () => {} });
    if (command.commands.length > 0) for (const child of command.commands) visit(child);
    else command.action(() => ran(command.name(), command.args, command.opts()));
  };
  for (const command of program.commands) visit(command);
  return program;
}

function checkFlowturbo(words: string[]): void {
  let found = "";
  commandLine((name, prompts, flags) => {
    found = name;
    const options = (schema: typeof compileSchema | typeof profileSchema | typeof calibrateSchema) =>
      readFlags(schema, flags);
    if (name === "compile") checkOptions(compileSchema, options(compileSchema), "compile");
    if (name === "profile") checkOptions(profileSchema, options(profileSchema), "profile");
    if (name === "calibrate") checkOptions(calibrateSchema, options(calibrateSchema), "calibrate");
    if (["calibrate", "profile", "generate", "serve", "worker", "mcp"].includes(name))
      checkOptions(loadSchema, readLoadFlags(flags), "load");
    if (name === "worker")
      checkOptions(workerSchema.omit({ models: true, redis: true }), readFlags(workerSchema, flags), "worker");
    if (name !== "generate") return;
    const { blocks } = checkOptions(
      generateSchema,
      {
        ...readFlags(generateSchema, flags),
        ...readRequestAdapters(flags),
        prompt: flags.from === undefined ? prompts : "of a file",
      },
      "generate",
    );
    if (blocks !== undefined) parseBlocks(blocks);
    for (const stage of (flags.stage ?? []) as string[]) {
      const [, schedule] = stage.match(/^\d+x\d+:(\w+)(?:@0?\.\d+)?(?::(?:pixels|latents))?$/)!;
      parseBlocks(schedule!);
    }
  }).parse(words, { from: "user" });
  expect(found).not.toBe("");
}

/** Flags that a script's source knows. */
const flagsOf = (source: string) =>
  new Set(
    [...source.matchAll(/"--([\w-]+)"|^ {4,}"?([\w-]+)"?: \{ type: "|--([\w-]+) [A-Z<]/gm)].flatMap((match) =>
      match.slice(1),
    ),
  );

function checkFlags(words: string[], known: ReadonlySet<string | undefined>): void {
  for (const word of words)
    if (word.startsWith("--") && word !== "--") expect(known, word).toContain(word.slice(2).split("=")[0]!);
}

function check(words: string[]): void {
  const [program, ...rest] = words.slice(words.findIndex((word) => !/^[A-Z_]+=/.test(word))) as [string, ...string[]];
  const exists = (...parts: string[]) => expect(existsSync(path.join(root, ...parts)), parts.join("/")).toBe(true);
  if (program === "flowturbo") checkFlowturbo(rest);
  else if (program === "npx" && rest[0] === "flowturbo") checkFlowturbo(rest.slice(1));
  else if (program === "npm" && rest[0] === "install")
    // What works beside flowturbo, of a version that the tests run with.
    for (const name of rest.slice(1)) {
      const [, bare, major] = name.match(/^(.+?)(?:@(\d+))?$/)!;
      expect(Object.keys(devDependencies)).toContain(bare);
      if (major) expect(devDependencies[bare!]).toMatch(new RegExp(`^\\^${major}\\.`));
    }
  else if (program === "npm" && rest[0] !== "run") expect(["ci --ignore-scripts", "test"]).toContain(rest.join(" "));
  else if (program === "npm") {
    expect(scripts).toHaveProperty([rest[1]!]);
    const file = scripts[rest[1]!]!.match(/[\w/-]+\.(ts|mjs)/g)?.at(-1);
    checkFlags(rest, flagsOf(file ? read(file) : ""));
  } else if (program === "pip") {
    const place = rest[1]!.match(/^\.\/(\w+)/)?.[1];
    if (place) exists(place, "pyproject.toml");
  } else if (program === "pytest") expect(rest).toEqual(["training"]);
  else if (program === "python" || program === "accelerate") {
    const module =
      /^(python|accelerate launch) -m flowturbo_training (--help|shapes|refiner|lora|controlnet|features)\b/;
    expect(words.join(" ")).toMatch(module);
    checkFlags(rest, flagsOf(`${read("training/flowturbo_training/__main__.py")}"--help"`));
  } else if (program === "bash") {
    // Of the folder that `npm run pack:gpu` makes.
    expect(rest).toEqual([".gpu/run.sh"]);
    const variables = [...read("verify/run.sh").matchAll(/^# {3}([A-Z]+) {2,}/gm)].map(([, name]) => name);
    for (const word of words.slice(0, words.indexOf(program))) expect(variables).toContain(word.split("=")[0]);
  } else throw new Error(`This test does not know how to check "${words.join(" ")}".`);
}

describe("the commands that are shown", () => {
  it("are found", () => {
    expect(shown.length).toBeGreaterThan(40);
    expect(new Set(shown.map(({ where }) => where)).size).toBe(25);
  });

  it.each(shown)("$where: $command", ({ command }) => check(wordsOf(command)));

  it("would be refused with a flag, a value or a script that does not exist", () => {
    for (const wrong of [
      "flowturbo generate x --bloks H1",
      "flowturbo generate x --blocks H1Q2",
      "flowturbo generate x --steps none",
      "flowturbo compile --targets 89",
      "flowturbo draw x",
      "npm run bench:nothing",
      "npm run verify:gpu -- --folder x",
      "npm run pack:gpu -- --folder x",
      "BUGET=420 bash .gpu/run.sh",
      "python -m flowturbo_training refiner --pictures x",
    ])
      expect(() => check(wordsOf(wrong)), wrong).toThrow();
  });

  it("are the only flags and scripts that the text speaks of", () => {
    const known = new Set<string | undefined>(["help", "page", "ignore-scripts"]);
    // Of npm and esbuild.
    for (const flag of ["include", "external", "format"]) known.add(flag);
    const add = (command: Command): void => {
      for (const option of command.options) known.add(option.long!.slice(2));
      for (const child of command.commands) add(child);
    };
    add(commandLine(() => {}));
    const others = ["verify/gpu.ts", "training/flowturbo_training/__main__.py"];
    for (const file of [...others, "scripts/build-native.mjs", "scripts/pack-gpu.mjs"])
      for (const flag of flagsOf(read(file))) known.add(flag);
    for (const file of readdirSync(path.join(root, "bench")).filter((name) => name.endsWith(".ts")))
      for (const flag of flagsOf(read(`bench/${file}`))) known.add(flag);
    for (const where of documents)
      for (const [, code] of read(where)
        .replace(/^```[\s\S]*?^```/gm, "")
        .matchAll(/`([^`]+)`/g)) {
        for (const [, flag] of code!.matchAll(/(?:^|\s)--([\w-]+)/g))
          expect(known, `${where}: ${code}`).toContain(flag);
        for (const [, script] of code!.matchAll(/npm run ([\w:-]+)(?!:?[<*])/g))
          if (!script!.endsWith(":")) expect(scripts, `${where}: ${code}`).toHaveProperty([script!]);
      }
  });
});
