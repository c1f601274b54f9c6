// An app that esbuild has bundled: external, as the guide says, it draws; bundled, it says which setting to take. The other
// bundlers are tried by `npm run test:bundlers`.
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { build } from "esbuild";
import { afterAll, beforeAll, expect, it } from "vitest";
import { root } from "../support/fixtures.js";

const app = `
  import { FlowTurbo, embeddedModel } from "flowturbo";
  async function main() {
    console.log(typeof embeddedModel);
    const model = await FlowTurbo.load();
    const { images } = await model.generate({ prompt: "a red circle", steps: 2, seed: 1 });
    console.log("drawn", images[0].width);
    await model.dispose();
  }
  main().catch((error) => console.log(error.code, error.message));`;

let folder: string;
beforeAll(() => {
  // Outside the repository, where the package is found only if it is installed.
  folder = mkdtempSync(path.join(tmpdir(), "flowturbo-bundle-"));
  mkdirSync(path.join(folder, "external/node_modules"), { recursive: true });
  symlinkSync(root, path.join(folder, "external/node_modules/flowturbo"));
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

async function bundled(name: string, format: "esm" | "cjs", external: string[]): Promise<string> {
  const outfile = path.join(folder, name, format === "esm" ? "app.mjs" : "app.cjs");
  await build({
    stdin: { contents: app, resolveDir: root },
    ...{ bundle: true, platform: "node", format, outfile, external, logLevel: "error" },
    ...(external.length === 0 && { alias: { flowturbo: path.join(root, "dist/index.js") } }),
  });
  const { stdout, stderr } = spawnSync(process.execPath, [outfile], { cwd: folder, encoding: "utf8" });
  return stdout + stderr;
}

const formats = ["esm", "cjs"] as const;

it.each(formats)("external, %s: draws", async (format) => {
  expect(await bundled("external", format, ["flowturbo"])).toBe("string\ndrawn 64\n");
});

it.each(formats)("bundled, %s: names the settings", async (format) => {
  const output = await bundled("bundled", format, []);
  // Of webpack the one for its default output first.
  const webpack = 'webpack externals: { flowturbo: "commonjs flowturbo" }, or "module flowturbo" with output.module';
  expect(output).toMatch(/^string\nERR_FLOWTURBO_INSTALLATION flowturbo was bundled/);
  for (const setting of ["esbuild --external:flowturbo", webpack, "Vite ssr", "serverExternalPackages"])
    expect(output).toContain(setting);
});

it("the guide has the settings that the trials of Next.js build with", () => {
  const guide = readFileSync(path.join(root, "docs/guides/bundlers.md"), "utf8");
  const trials = readFileSync(path.join(root, "scripts/bundlers.mjs"), "utf8");
  const listed = [...guide.matchAll(/^ +"(\.\/node_modules\/.*)",$/gm)].map(([, glob]) => glob!);
  const built = [...trials.matchAll(/^ +["`](\.\/node_modules\/.*)["`],$/gm)].map(([, glob]) =>
    glob!.replace(`\${process.platform}/\${process.arch}`, "linux/x64"),
  );
  expect(listed.length).toBe(4);
  expect(listed).toEqual(built);
});
