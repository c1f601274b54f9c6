// The package as a user gets it: what the tarball holds, and that it works in an empty folder with node and npm alone.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
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
      "dist/cli.js",
      "dist/onnxruntime-host.js",
      "LICENSE",
      "README.md",
    ])
      expect(files).toContain(file);
    expect(files).toContain("models/shapes/transformer/diffusion_pytorch_model.safetensors");
    const ladder = "models/shapes/schedules.json";
    expect(files.includes(ladder)).toBe(existsSync(path.join(root, ladder)));
    const expected =
      /^(bin\/flowturbo\.js|dist\/[^/]+\.(js|d\.ts)|native\/tensorrt(-rtx)?\/prebuilds\/linux-x64\/flowturbo_tensorrt(_rtx)?\.glibc\.node|models\/shapes\/|LICENSE$|README\.md$|CHANGELOG\.md$|package\.json$)/;
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

  it("installs, imports and draws with nothing but node and npm on the PATH", () => {
    const bin = path.join(folder, "bin");
    mkdirSync(bin);
    const npm = execFileSync("sh", ["-c", "command -v npm"], { encoding: "utf8" }).trim();
    symlinkSync(process.execPath, path.join(bin, "node"));
    symlinkSync(npm, path.join(bin, "npm"));
    // npm runs scripts with sh, which is no compiler.
    symlinkSync("/bin/sh", path.join(bin, "sh"));
    const app = path.join(folder, "app");
    mkdirSync(app);
    writeFileSync(path.join(app, "package.json"), '{ "name": "app", "private": true, "type": "module" }');
    const run = (command: string, ...args: string[]) =>
      execFileSync(path.join(bin, command), args, {
        cwd: app,
        encoding: "utf8",
        env: { ...process.env, PATH: bin, ONNXRUNTIME_NODE_INSTALL: "skip" },
        stdio: ["ignore", "pipe", "pipe"],
      });
    run("npm", "install", "--no-audit", "--no-fund", tarball);
    const cli = path.join(app, "node_modules/.bin/flowturbo");
    expect(run("node", cli, "generate", "a large red square", "--seed", "1")).toBe("flowturbo-1.png\n");
    expect(existsSync(path.join(app, "flowturbo-1.png"))).toBe(true);
    const doctor = run("node", cli, "doctor");
    expect(doctor).toMatch(/✔ onnxruntime/);
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
    expect(run("node", "index.js")).toBe("64 64\n");
    writeFileSync(
      path.join(app, "schema.js"),
      `import { requestJsonSchema } from "flowturbo/schema";
       console.log(requestJsonSchema.required, Object.keys(requestJsonSchema.properties).length > 20);`,
    );
    expect(run("node", "schema.js")).toBe("[ 'prompt' ] true\n");
  }, 180_000);
});
