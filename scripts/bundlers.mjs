/**
 * `npm run test:bundlers`: an app that imports flowturbo is built with esbuild, webpack, Vite (SSR) and Next.js, and run. With
 * flowturbo external, as docs/guides/bundlers.md says, it draws a picture; bundled, it says in one sentence which setting to
 * take. Bundles run in a folder of their own, where node_modules has what an installation has and nothing more.
 *
 *   node scripts/bundlers.mjs [--tarball FILE] [esbuild|webpack|vite|next ...]
 */

import { spawn } from "node:child_process";
import { cpSync, mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import path from "node:path";
import { parseArgs } from "node:util";
import { fail, root } from "./headers.mjs";
import { Checks, fetched, install, pack, run, temporaryFolder } from "./installed.mjs";

const { values, positionals } = parseArgs({ options: { tarball: { type: "string" } }, allowPositionals: true });
/** Each with the packages that it needs. */
const bundlers = {
  esbuild: ["esbuild"],
  webpack: ["webpack@5", "webpack-cli@6"],
  vite: ["vite"],
  next: ["next@16", "react@19", "react-dom@19"],
};
const wanted = positionals.length > 0 ? positionals : Object.keys(bundlers);
for (const name of wanted)
  if (!(name in bundlers)) fail(`Expected one of ${Object.keys(bundlers).join(", ")} but received ${name}.`);

const sentence =
  /flowturbo was bundled, or copied in part: .*Mark it as external.*esbuild --external:flowturbo.*webpack externals: \{ flowturbo: "commonjs flowturbo" \}, or "module flowturbo" with output\.module.*Vite ssr.*Next\.js serverExternalPackages/;
const checks = new Checks();
const tarball = values.tarball ?? pack();
/** What the machine has that runs the bundle: flowturbo and what it needs. */
const deployed = install(temporaryFolder(), [tarball]);
const cli = path.join(deployed, "node_modules/flowturbo/bin/flowturbo.js");
checks.expect("the installation is pruned", await run(deployed, [process.execPath, cli, "prune"]), /removed \d+/);
const app = `
  import { FlowTurbo } from "flowturbo";
  async function main() {
    const model = await FlowTurbo.load();
    const { images } = await model.generate({ prompt: "a red circle", steps: 2, seed: 1 });
    console.log("drawn", images[0].width, (await images[0].toPNG()).length > 1000);
    await model.dispose();
  }
  main().catch((error) => { console.error(error.message); process.exitCode = 1; });`;

/** A folder with the app, flowturbo and the bundler. Next.js reads no packages through links, hence copies for it. */
function project(name, files) {
  const folder = path.join(temporaryFolder(), "app");
  mkdirSync(folder);
  const modules = path.join(folder, "node_modules");
  cpSync(path.join(deployed, "node_modules"), modules, { recursive: true });
  cpSync(fetched(`bundlers/${name}`, bundlers[name]), modules, { recursive: true, force: false, verbatimSymlinks: true });
  writeFileSync(path.join(folder, "package.json"), JSON.stringify({ name: "app", private: true }));
  for (const [file, text] of Object.entries(files)) {
    mkdirSync(path.dirname(path.join(folder, file)), { recursive: true });
    writeFileSync(path.join(folder, file), text);
  }
  return folder;
}

/** Builds; then runs what was built away from where it was built, and where the package is no longer installed. */
async function build(title, folder, command, env = {}) {
  rmSync(path.join(folder, "out"), { recursive: true, force: true });
  const built = await run(folder, [process.execPath, ...command], { env, seconds: 300 });
  checks.expect(`${title}: builds`, built, /(?:)/);
  return async (file, expected, code) => {
    const away = path.join(temporaryFolder(), "out");
    cpSync(path.join(folder, "out"), away, { recursive: true });
    const hidden = path.join(folder, "hidden");
    renameSync(path.join(folder, "node_modules"), hidden);
    if (code === 0) symlinkSync(path.join(deployed, "node_modules"), path.join(path.dirname(away), "node_modules"));
    checks.expect(`${title}: ${file} ${code === 0 ? "draws" : "names the setting"}`, await run(away, [process.execPath, file]), expected, code);
    renameSync(hidden, path.join(folder, "node_modules"));
  };
}
const drawn = /drawn 64 true$/;

const trials = {
  async esbuild() {
    const folder = project("esbuild", { "app.mjs": app });
    for (const format of ["esm", "cjs"])
      for (const external of [true, false]) {
        const file = format === "esm" ? "app.mjs" : "app.cjs";
        const flags = ["--bundle", "--platform=node", `--format=${format}`, `--outfile=out/${file}`];
        const command = ["node_modules/esbuild/bin/esbuild", "app.mjs", ...flags, ...(external ? ["--external:flowturbo"] : [])];
        // What npm installs there is a binary once its script has run; here it is a script of Node.
        const start = await build(`esbuild, ${format}, ${external ? "external" : "bundled"}`, folder, command);
        await start(file, external ? drawn : sentence, external ? 0 : 1);
      }
  },

  async webpack() {
    const config = `
      const external = process.env.EXTERNAL === "1";
      const common = { mode: "production", target: "node", entry: "./app.mjs" };
      module.exports = [
        { ...common, output: { path: __dirname + "/out", filename: "app.cjs" },
          externals: external ? { flowturbo: "commonjs flowturbo" } : {} },
        { ...common, experiments: { outputModule: true },
          output: { path: __dirname + "/out", filename: "app.mjs", module: true, chunkFormat: "module" },
          externals: external ? { flowturbo: "module flowturbo" } : {} },
      ];`;
    const folder = project("webpack", { "app.mjs": app, "webpack.config.cjs": config });
    for (const external of [true, false]) {
      const title = `webpack, ${external ? "external" : "bundled"}`;
      const start = await build(title, folder, ["node_modules/webpack/bin/webpack.js"], { EXTERNAL: external ? "1" : "0" });
      for (const file of ["app.cjs", "app.mjs"]) await start(file, external ? drawn : sentence, external ? 0 : 1);
    }
  },

  async vite() {
    const config = `export default { build: { ssr: "app.mjs", outDir: "out" }, ssr: process.env.SSR ? JSON.parse(process.env.SSR) : {} };`;
    const folder = project("vite", { "app.mjs": app, "vite.config.mjs": config });
    const settings = [
      ["as it is", undefined, true],
      ["noExternal but flowturbo", { noExternal: true, external: ["flowturbo"] }, true],
      ["bundled", { noExternal: true }, false],
    ];
    for (const [name, ssr, external] of settings) {
      const env = ssr ? { SSR: JSON.stringify(ssr) } : {};
      const start = await build(`Vite SSR, ${name}`, folder, ["node_modules/vite/bin/vite.js", "build"], env);
      await start("app.mjs", external ? drawn : sentence, external ? 0 : 1);
    }
  },

  async next() {
    // As docs/guides/bundlers.md has it; a test holds the two together.
    const includes = [
      "./node_modules/flowturbo/**/*",
      "./node_modules/onnxruntime-common/**/*",
      "./node_modules/onnxruntime-node/{package.json,dist/**/*}",
      `./node_modules/onnxruntime-node/bin/napi-v6/${process.platform}/${process.arch}/*`,
    ];
    const config = `
      const setting = process.env.SETTING;
      export default {
        output: "standalone",
        outputFileTracingRoot: import.meta.dirname,
        ...(setting !== "bundled" && { serverExternalPackages: ["flowturbo"] }),
        ...(setting === "external" && { outputFileTracingIncludes: { "/*": ${JSON.stringify(includes)} } }),
      };`;
    const route = `
      import { FlowTurbo } from "flowturbo";
      export const dynamic = "force-dynamic";
      let model;
      export async function GET() {
        try {
          model ??= FlowTurbo.load();
          const { images } = await (await model).generate({ prompt: "a red circle", steps: 2, seed: 1 });
          return new Response("drawn 64 " + ((await images[0].toPNG()).length > 1000));
        } catch (error) {
          return new Response(error.message, { status: 500 });
        }
      }`;
    const folder = project("next", {
      "next.config.mjs": config,
      "app/layout.js": "export default ({ children }) => <html><body>{children}</body></html>;",
      "app/page.js": "export default () => <p>flowturbo</p>;",
      "app/api/draw/route.js": route,
    });
    const settings = [
      ["external", drawn],
      ["external without includes", /flowturbo's own models\/shapes is missing .*outputFileTracingIncludes/],
      ["bundled", sentence],
    ];
    for (const [setting, expected] of settings) {
      rmSync(path.join(folder, ".next"), { recursive: true, force: true });
      const command = [process.execPath, "node_modules/next/dist/bin/next", "build"];
      const env = { SETTING: setting, NEXT_TELEMETRY_DISABLED: "1" };
      checks.expect(`Next.js, ${setting}: builds`, await run(folder, command, { env, seconds: 300 }), /(?:)/);
      const away = path.join(temporaryFolder(), "standalone");
      cpSync(path.join(folder, ".next/standalone"), away, { recursive: true, verbatimSymlinks: true });
      const answer = await answerOf(away);
      checks.expect(`Next.js, ${setting}: standalone ${expected === drawn ? "draws" : "names the setting"}`, { code: 0, output: answer }, expected);
    }
  },
};

/** What the standalone server in a folder answers. */
async function answerOf(folder) {
  const port = await new Promise((resolve) => {
    const server = createServer().listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
  const env = { ...process.env, PORT: String(port), HOSTNAME: "127.0.0.1", NEXT_TELEMETRY_DISABLED: "1" };
  const server = spawn(process.execPath, ["server.js"], { cwd: folder, env, stdio: "ignore" });
  try {
    for (let tries = 0; tries < 100; tries++) {
      const answer = await fetch(`http://127.0.0.1:${port}/api/draw`).then((response) => response.text(), () => null);
      if (answer !== null) return answer;
      await new Promise((next) => setTimeout(next, 200));
    }
    return "no answer";
  } finally {
    server.kill("SIGKILL");
  }
}

process.chdir(root);
for (const name of wanted) await trials[name]();
checks.end();
