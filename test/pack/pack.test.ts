// The package as a user gets it: what the tarball holds, and that it works in an empty folder with node and npm alone.
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import os from "node:os";
import path from "node:path";
import { afterAll, beforeAll, describe, expect, inject, it } from "vitest";
import { root } from "../support/fixtures.js";

let folder: string;
let tarball: string;
let files: string[];
let sizes: { size: number; unpackedSize: number };
const { lacksAddons } = inject("native");

beforeAll(() => {
  if (lacksAddons === null)
    execFileSync(process.execPath, [path.join(root, "scripts/prebuild.mjs")], { cwd: root, stdio: "ignore" });
  folder = mkdtempSync(path.join(os.tmpdir(), "flowturbo-pack-"));
  // dist/ is built; the script `prepare` would build it again while other tests read it.
  const args = ["pack", "--json", "--ignore-scripts", "--pack-destination", folder];
  const [report] = JSON.parse(
    execFileSync("npm", args, { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }),
  );
  tarball = path.join(folder, report.filename);
  sizes = report;
  files = report.files.map((file: { path: string }) => file.path);
}, 300_000);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe("the package", () => {
  it("holds what a user needs and nothing else", () => {
    for (const file of [
      "bin/flowturbo.js",
      "dist/index.js",
      "dist/index.d.ts",
      "dist/schema.js",
      "dist/schema.d.ts",
      "dist/server.js",
      "dist/server.d.ts",
      "dist/ai.js",
      "dist/ai.d.ts",
      "page/index.html",
      "dist/cli.js",
      "dist/onnxruntime-host.js",
      "dist/adapters-probe.js",
      "dist/zod.LICENSE",
      "LICENSE",
      "README.md",
      "docs/guides/bundlers.md",
      "examples/Dockerfile",
      "examples/service.js",
    ])
      expect(files).toContain(file);
    expect(files).toContain("models/shapes/transformer/diffusion_pytorch_model.safetensors");
    expect(files).toContain("models/tokenizers/tokenizer/LICENSE");
    const ladder = "models/shapes/schedules.json";
    expect(files.includes(ladder)).toBe(existsSync(path.join(root, ladder)));
    const expected =
      /^(bin\/flowturbo\.js|dist\/[^/]+\.(js|d\.ts|LICENSE)|native\/tensorrt(-rtx)?\/prebuilds\/linux-x64\/flowturbo_tensorrt(_rtx)?\.glibc\.node|models\/(shapes|tokenizers)\/|page\/[\w-]+\.(html|css|js)$|docs\/(guides|images)\/[\w-]+\.(md|png)$|examples\/|bench\/results\/[\w.-]+\.(md|svg)$|LICENSE$|README\.md$|CHANGELOG\.md$|package\.json$)/;
    expect(files.filter((file) => !expected.test(file))).toEqual([]);
    expect(files.filter((file) => file.includes("reference."))).toEqual([]);
  });

  it("has the size that CONTRIBUTING.md accounts for", () => {
    const text = readFileSync(path.join(root, "CONTRIBUTING.md"), "utf8");
    const [, packed, unpacked] = text.match(/`npm pack` makes (\d+) MB, (\d+) MB unpacked/)!.map(Number);
    expect(Math.abs(sizes.size / 1e6 / packed! - 1)).toBeLessThan(0.1);
    expect(Math.abs(sizes.unpackedSize / 1e6 / unpacked! - 1)).toBeLessThan(0.1);
  });

  it.skipIf(lacksAddons !== null)(`carries both addons${lacksAddons ? ` (skipped: ${lacksAddons})` : ""}`, () => {
    const addons = files.filter((file) => file.endsWith(".node"));
    expect(addons.sort()).toEqual([
      "native/tensorrt-rtx/prebuilds/linux-x64/flowturbo_tensorrt_rtx.glibc.node",
      "native/tensorrt/prebuilds/linux-x64/flowturbo_tensorrt.glibc.node",
    ]);
    for (const addon of addons) {
      const content = readFileSync(path.join(root, addon), "latin1");
      // Built from sources of this repository's alone, and with no path of this machine in them.
      expect(content).not.toContain(root);
    }
  });

  it("links to nothing that it does not hold", () => {
    const dead: string[] = [];
    const pages = files.filter((file) => file.endsWith(".md"));
    expect(pages.length).toBeGreaterThan(10);
    for (const page of pages)
      for (const [, link] of readFileSync(path.join(root, page), "utf8").matchAll(
        /\]\((?!https?:|#)([^)#\s]+)[^)]*\)/g,
      )) {
        const target = path.posix.join(path.posix.dirname(page), link!);
        if (!files.some((file) => file === target || file.startsWith(`${target}/`))) dead.push(`${page}: ${link}`);
      }
    expect(dead).toEqual([]);
  });

  it("says where it comes from", () => {
    const { repository } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
    expect(repository).toEqual({ type: "git", url: expect.stringMatching(/^git\+https:\/\/.*\.git$/) });
  });
});

describe("the package, installed with nothing but node and npm on the PATH", () => {
  let app: string;
  let bin: string;
  const run = (command: string, ...args: string[]) => {
    const { stdout, stderr, status } = spawnSync(path.join(bin, command), args, {
      cwd: app,
      encoding: "utf8",
      env: { ...process.env, PATH: bin, ONNXRUNTIME_NODE_INSTALL: "skip" },
    });
    return { stdout, stderr, status };
  };
  const cli = (...args: string[]) => run("node", path.join(app, "node_modules/.bin/flowturbo"), ...args);

  beforeAll(() => {
    bin = path.join(folder, "bin");
    mkdirSync(bin);
    const npm = execFileSync("sh", ["-c", "command -v npm"], { encoding: "utf8" }).trim();
    symlinkSync(process.execPath, path.join(bin, "node"));
    symlinkSync(npm, path.join(bin, "npm"));
    // npm runs scripts with sh, which is no compiler.
    symlinkSync("/bin/sh", path.join(bin, "sh"));
    app = path.join(folder, "app");
    mkdirSync(app);
    writeFileSync(path.join(app, "package.json"), '{ "name": "app", "private": true, "type": "module" }');
    const { status, stderr } = run("npm", "install", "--no-audit", "--no-fund", tarball);
    expect(status, stderr).toBe(0);
  }, 180_000);

  it("imports and draws", () => {
    expect(cli("generate", "a large red square", "--seed", "1").stdout).toBe("flowturbo-1.png\n");
    expect(existsSync(path.join(app, "flowturbo-1.png"))).toBe(true);
    const { stdout: doctor } = cli("doctor");
    expect(doctor).toMatch(/✔ onnxruntime/);
    expect(doctor).toMatch(/✔ sharp \d+\.\d+\.\d+, libvips \d+/);
    expect(doctor).toMatch(/✔ @huggingface\/tokenizers/);
    // The addons load, find none of NVIDIA's libraries, and say so.
    if (lacksAddons === null) expect(doctor).toMatch(/✘ tensorrt\n\s+TensorRT 11 was not found/);
    if (lacksAddons === null) expect(doctor).not.toMatch(/no native addon|cannot be loaded/);
    writeFileSync(
      path.join(app, "index.js"),
      `import { FlowTurbo } from "flowturbo";
       const model = await FlowTurbo.load();
       const { images } = await model.generate({ prompt: "a red circle", steps: 2 });
       console.log(images[0].width, images[0].height);
       await model.dispose();`,
    );
    expect(run("node", "index.js").stdout).toBe("64 64\n");
    writeFileSync(
      path.join(app, "schema.js"),
      `import { requestJsonSchema } from "flowturbo/schema";
       console.log(requestJsonSchema.anyOf.map(({ required }) => required[0]), Object.keys(requestJsonSchema.properties).length > 20);`,
    );
    expect(run("node", "schema.js").stdout).toBe("[ 'prompt', 'promptEmbeds' ] true\n");
  }, 180_000);

  it("serves once the packages of the server are there, and says which until then", async () => {
    const { stderr, status } = cli("serve", "--port", "0");
    expect(status).toBe(1);
    const command = stderr
      .match(/npm install ((?:[@\w/-]+ ?)+)$/m)![1]!
      .trim()
      .split(" ");
    expect(stderr).toMatch(/^error: fastify cannot be loaded/);
    expect(cli("mcp").stderr).toContain("npm install @modelcontextprotocol/sdk");
    const installed = run("npm", "install", "--no-audit", "--no-fund", ...command);
    expect(installed.status, installed.stderr).toBe(0);
    const child = spawn(path.join(bin, "node"), ["node_modules/.bin/flowturbo", "serve", "--port", "0"], {
      ...{ cwd: app, env: { ...process.env, PATH: bin }, stdio: ["ignore", "pipe", "inherit"] },
    });
    let log = "";
    child.stdout!.on("data", (chunk) => {
      log += chunk;
    });
    try {
      await expect.poll(() => log, { timeout: 30_000 }).toMatch(/listening at http/);
      const url = log.match(/listening at (http:[\w.:/]+)/)![1]!;
      await expect.poll(async () => (await fetch(`${url}/readyz`)).status, { timeout: 30_000 }).toBe(200);
      expect(await (await fetch(url)).text()).toContain("<title>");
      const body = JSON.stringify({ prompt: "a red circle", num_inference_steps: 2 });
      const headers = { "content-type": "application/json" };
      const drawn = await fetch(`${url}/v1/images/generations`, { method: "POST", headers, body });
      expect(((await drawn.json()) as { data: unknown[] }).data).toHaveLength(1);
    } finally {
      child.kill("SIGTERM");
    }
    expect(await once(child, "close")).toEqual([0, null]);
  }, 180_000);

  it("pruned, it draws the same picture", () => {
    const before = readFileSync(path.join(app, "flowturbo-1.png"));
    const binaries = path.join(app, "node_modules/onnxruntime-node/bin/napi-v6");
    const platforms = () => readdirSync(binaries);
    const all = platforms();
    const dry = JSON.parse(cli("prune", "--dry-run", "--json").stdout);
    expect([dry.removed, dry.bytes > 200e6]).toEqual([false, true]);
    expect(platforms()).toEqual(all);
    const pruned = JSON.parse(cli("prune", "--json").stdout);
    expect(pruned).toEqual({ ...dry, removed: true });
    expect(platforms()).toEqual([process.platform]);
    expect(readdirSync(path.join(binaries, process.platform))).toEqual([process.arch]);
    expect(cli("prune").stdout).toMatch(/nothing to remove\n$/);
    rmSync(path.join(app, "flowturbo-1.png"));
    expect(cli("generate", "a large red square", "--seed", "1").stdout).toBe("flowturbo-1.png\n");
    expect(readFileSync(path.join(app, "flowturbo-1.png")).equals(before)).toBe(true);
  }, 180_000);

  describe("doctor runs without", () => {
    /** The report, while packages are not where they belong; and what load() says then. */
    function without(...packages: string[]) {
      const modules = path.join(app, "node_modules");
      const away = mkdtempSync(path.join(folder, "away-"));
      const moved = packages.map((name, at) => [path.join(modules, name), path.join(away, String(at))] as const);
      for (const [from, to] of moved) renameSync(from, to);
      try {
        return {
          plain: cli("doctor"),
          json: JSON.parse(cli("doctor", "--json").stdout),
          load: run("node", "index.js"),
        };
      } finally {
        for (const [from, to] of moved) renameSync(to, from);
      }
    }
    const named = (all: { name: string }[], name: string) => all.find((each) => each.name === name);

    it("sharp's binaries", () => {
      const binaries = readdirSync(path.join(app, "node_modules/@img")).filter((name) =>
        /^sharp-(?!libvips)/.test(name),
      );
      const { plain, json, load } = without(...binaries.map((name) => `@img/${name}`));
      expect(plain.status).toBe(1);
      expect(plain.stdout).toMatch(/✔ onnxruntime/);
      expect(plain.stdout).toMatch(/✘ sharp: .*\n\s+Run `npm install --include=optional sharp`.*--os=/);
      expect(named(json.packages, "sharp")).toMatchObject({ available: false, version: null });
      expect(load.stderr).toMatch(/InstallationError: sharp cannot be loaded: .*--include=optional/);
    });

    it("sharp itself, the tokenizers, ONNX Runtime and what finds the addons", () => {
      const { plain, json, load } = without("sharp", "@huggingface/tokenizers", "onnxruntime-node", "node-gyp-build");
      expect(plain.status).toBe(1);
      expect(plain.stderr).toBe("");
      for (const name of ["sharp", "@huggingface/tokenizers"])
        expect(named(json.packages, name)).toMatchObject({
          available: false,
          remedy: expect.stringMatching(/npm install/),
        });
      expect(named(json.runtimes, "onnxruntime")).toMatchObject({
        available: false,
        reason: expect.stringMatching(/onnxruntime-node/),
        remedy: expect.stringMatching(/npm install onnxruntime-node/),
      });
      if (process.platform === "linux" && process.arch === "x64")
        expect(named(json.runtimes, "tensorrt")).toMatchObject({ reason: expect.stringMatching(/node-gyp-build/) });
      expect(load.stderr).toMatch(/InstallationError: \S+ cannot be loaded/);
    });
  });

  it("without a package that the command line itself needs, that is said in one sentence", () => {
    const [from, to] = [path.join(app, "node_modules/commander"), path.join(folder, "commander")];
    renameSync(from, to);
    const { status, stderr } = cli("doctor");
    renameSync(to, from);
    expect([status, stderr]).toEqual([
      1,
      expect.stringMatching(/^error: Cannot find package 'commander'.*Run `npm install` again\.\n$/),
    ]);
  });

  // Real binaries from npm. The versions between, Bun and Deno are tried by `npm run test:nodes`.
  it("draws with the oldest Node that it supports and with the newest, and names one that is older", () => {
    const args = [path.join(root, "scripts/node-versions.mjs"), "--app", app, "--brief", "20.9", "20.10", "26"];
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { cwd: root, encoding: "utf8" });
    expect(status, stdout + stderr).toBe(0);
    expect(stdout).toMatch(/✔ Node 20\.10\.0: import\n/);
    expect(stdout).toMatch(/✔ Node 26\.\d+\.\d+: import\n/);
  }, 300_000);
});
