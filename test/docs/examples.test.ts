// What the documents show, run as a reader would run it.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import sharp from "sharp";
import { afterAll, describe, expect, it } from "vitest";
import { figures, readResults, withFigures } from "../../bench/readme.js";
import { errorTable, FlowTurboError } from "../../lib/errors.js";
import { FlowTurbo } from "../../lib/index.js";
import { createServer } from "../../lib/server/index.js";
import { root } from "../support/fixtures.js";
import { noRedis, TestRedis } from "../support/redis.js";
import { documents, read } from "./documents.js";

/** The fenced blocks of a document. */
const blocksOf = (markdown: string) =>
  [...markdown.matchAll(/^```(\S*)\n([\s\S]*?)^```/gm)].map(([, language, code]) => ({ language, code: code! }));
const samplesOf = (markdown: string) =>
  blocksOf(markdown).flatMap(({ language, code }) => (language === "js" ? [code] : []));

/** The address that documents have for a server. */
const address = "http://127.0.0.1:7860";
let serving: Promise<{ readonly address: string; end(): Promise<void> }> | null = null;
/** The address that they have for the Redis of a fleet. */
const redisAddress = "redis://127.0.0.1:6379";
let redis: Promise<TestRedis> | null = null;
afterAll(async () => {
  await (await serving)?.end();
  await (await redis)?.stop();
});

/** A server for the samples that need one. */
async function serve() {
  const model = await FlowTurbo.load(undefined, { measureCosts: false });
  const app = await createServer({ models: { shapes: model }, page: false, logger: false });
  const address = await app.listen({ port: 0 });
  while ((await fetch(`${address}/readyz`)).status !== 200) await new Promise((resolve) => setTimeout(resolve, 50));
  const end = async () => {
    await app.close();
    await model.dispose();
  };
  return { address, end };
}

/** Runs a sample in a folder of its own, then `check` on what it left there. */
async function runSample(sample: string, check?: (folder: string) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-sample-"));
  try {
    // The reader's checkpoint is not here: the embedded model stands in for it.
    serving ??= sample.includes(address) ? serve() : null;
    redis ??= sample.includes(redisAddress) ? TestRedis.start() : null;
    const code = sample
      .replace('"./stable-diffusion-3.5-medium"', "undefined")
      .replaceAll(/"flowturbo(?:\/(\w+))?"/g, (_, entry = "index") =>
        JSON.stringify(path.join(root, `dist/${entry}.js`)),
      )
      .replaceAll(address, (await serving)?.address ?? address)
      .replaceAll(redisAddress, (await redis)?.url ?? redisAddress);
    // Other packages as the reader has installed them.
    symlinkSync(path.join(root, "node_modules"), path.join(folder, "node_modules"));
    // What samples for a clone name.
    symlinkSync(path.join(root, "models"), path.join(folder, "models"));
    writeFileSync(path.join(folder, "sample.mjs"), code);
    const child = spawn(process.execPath, ["sample.mjs"], { cwd: folder, stdio: ["ignore", "ignore", "inherit"] });
    expect(await new Promise((resolve) => child.once("exit", resolve))).toBe(0);
    await check?.(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

describe("the documents", () => {
  const samples = documents
    .filter((document) => document !== "README.md")
    .flatMap((document) => samplesOf(read(document)).map((code, at) => ({ document, at, code })));

  it("show code in languages that are checked: js, json and python here, sh and $ lines in commands.test.ts", () => {
    for (const document of documents)
      for (const { language, code } of blocksOf(read(document))) {
        expect(["", "js", "json", "python", "sh"], `${document}: ${code}`).toContain(language);
        if (language === "") expect(code, document).not.toMatch(/\b(import|await|const) /);
        if (language === "json") expect(() => JSON.parse(code), `${document}: ${code}`).not.toThrow();
      }
  });

  const hasPython = spawnSync("python3", ["--version"]).status === 0;
  it.skipIf(!hasPython)("show Python that is Python", () => {
    const parse = "import ast, sys; ast.parse(sys.stdin.read())";
    for (const document of documents)
      for (const { language, code } of blocksOf(read(document))) {
        if (language !== "python") continue;
        const { status, stderr } = spawnSync("python3", ["-c", parse], { input: code, encoding: "utf8" });
        expect(status, `${document}: ${code}\n${stderr}`).toBe(0);
      }
  });

  it.for(samples)("$document shows code that runs ($at)", ({ code }, { skip }) => {
    if (noRedis && code.includes(redisAddress)) skip(noRedis);
    return runSample(code);
  });

  it("link to files and headings that exist", () => {
    const slug = (heading: string) =>
      heading.toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, "").replaceAll(" ", "-"); // biome-ignore format: one line
    const headings = (text: string) => [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading]) => slug(heading!));
    for (const document of documents)
      for (const [, link, anchor] of read(document).matchAll(/\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)/g)) {
        const file = link ? path.join(path.dirname(document), link) : document;
        expect(existsSync(path.join(root, file)), `${document}: ${link}`).toBe(true);
        if (anchor) expect(headings(read(file)), `${document}: #${anchor}`).toContain(anchor);
      }
  });
});

describe("README.md", () => {
  const readme = readFileSync(path.join(root, "README.md"), "utf8");

  it("has a Quick start of exactly two sh blocks of one line each", () => {
    const section = readme.match(/^## Quick start\n([\s\S]*?)^## /m)![1]!;
    const blocks = [...section.matchAll(/```(\w*)\n([\s\S]*?)```/g)];
    expect(blocks.map(([, language]) => language)).toEqual(["sh", "sh"]);
    for (const [, , body] of blocks) expect(body!.trim().split("\n")).toHaveLength(1);
  });

  it("shows code that runs", async () => {
    const [first, ...others] = samplesOf(readme);
    await runSample(first!, async (folder) => {
      expect((await sharp(path.join(folder, "lighthouse.png")).metadata()).format).toBe("png");
    });
    for (const sample of others) await runSample(sample);
  });

  it("has the API in ten lines", () => {
    expect(samplesOf(readme)[0]!.trim().split("\n").length).toBeLessThanOrEqual(10);
  });

  it("quotes the figures that are in bench/results, and no others", () => {
    expect(withFigures(readme, figures(readResults()))).toBe(readme);
  });

  it("names every option", async () => {
    const { generateSchema, loadSchema } = await import("../../lib/options.js");
    for (const option of [...Object.keys(generateSchema.shape), ...Object.keys(loadSchema.shape)])
      expect(readme).toContain(`\`${option}\``);
  });

  it("has the table of errors, whose classes are all exported", async () => {
    const api: Record<string, unknown> = await import("../../lib/index.js");
    const errors: Record<string, unknown> = await import("../../lib/errors.js");
    const rows = Object.entries(errorTable).map(
      ([code, { type, status, retryable }]) =>
        `| \`${code}\` | \`${type.name}\` | ${status} | ${retryable ? "yes" : "no"} |`,
    );
    const shown = [...readme.matchAll(/^(\| `ERR_FLOWTURBO_\w+` \|.*?\|.*?\|.*?\|)/gm)].map(([, row]) => row);
    expect(shown).toEqual(rows);
    const inTable = new Set<unknown>(Object.values(errorTable).map(({ type }) => type));
    for (const [name, value] of Object.entries(errors)) {
      expect(api[name], name).toBe(value);
      if (typeof value === "function" && value.prototype instanceof FlowTurboError)
        expect(inTable.has(value), name).toBe(true);
    }
  });
});
