/**
 * `npm run test:nodes`: the packed package with real binaries of Node (the floor of `engines` and the newest of each line),
 * Bun and Deno, all from npm: a picture is drawn through import, the command line, and require() where it can be. The newest
 * Node below the floor has to say in one sentence that it is too old.
 *
 *   node scripts/node-versions.mjs [--app FOLDER] [--brief] [name ...]     names such as 20.10, 24, bun
 *
 *   --app     a folder with the package installed, in place of one made for this
 *   --brief   one picture with each, without the command line's, aborts and endings
 */

import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { fail, root } from "./headers.mjs";
import { Checks, fetched, install, pack, run, temporaryFolder } from "./installed.mjs";

const { engines } = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8"));
const floor = engines.node.replace(">=", "");
/** The newest version below the floor, each line's first that can require() a module, and the newest of each line. */
const nodes = ["20.9", floor, "20.19", "22.11", "22.12", "22", "24", "26"];
const others = ["bun", "deno"];

const { values, positionals } = parseArgs({ options: { app: { type: "string" }, brief: { type: "boolean" } }, allowPositionals: true });
const wanted = positionals.length > 0 ? positionals : [...nodes, ...others];
for (const name of wanted)
  if (![...nodes, ...others].includes(name)) fail(`Expected one of ${[...nodes, ...others].join(", ")} but received ${name}.`);

/** @returns the command that runs a script */
function fetchRuntime(name) {
  const { platform, arch } = process;
  const of = (module, file, version = "latest") =>
    path.join(fetched(`runtimes/${name}`, [`${module}@${version}`], [file]), module, file);
  if (name === "bun") return [of(`@oven/bun-${platform}-${arch === "arm64" ? "aarch64" : arch}`, "bin/bun")];
  if (name === "deno") return [of(`@deno/${platform}-${arch}${platform === "linux" ? "-glibc" : ""}`, "deno"), "run", "-A"];
  return [of(`node-${platform}-${arch}`, "bin/node", name)];
}

const scripts = {
  // From the load to the picture's bytes.
  "import.mjs": `
    import { FlowTurbo } from "flowturbo";
    const model = await FlowTurbo.load();
    const { images } = await model.generate({ prompt: "a red circle", steps: 2, seed: 1 });
    console.log("drawn", images[0].width, (await images[0].toPNG()).length > 1000);
    await model.dispose();`,
  "require.cjs": `
    const { FlowTurbo } = require("flowturbo");
    (async () => {
      const model = await FlowTurbo.load();
      const { images } = await model.generate({ prompt: "a red circle", steps: 2, seed: 1 });
      console.log("drawn", images[0].width, (await images[0].toPNG()).length > 1000);
      await model.dispose();
    })();`,
  // An abort in the middle; shared launches; and an end without dispose, which the idle child must not prevent.
  "abort.mjs": `
    import { FlowTurbo } from "flowturbo";
    const model = await FlowTurbo.load(undefined, { measureCosts: false });
    const controller = new AbortController();
    const onStep = () => controller.abort(new Error("stopped"));
    await model.generate({ prompt: "a red circle", steps: 900, onStep, signal: controller.signal }).catch((error) => console.log(error.message));
    const drawn = await Promise.all([1, 2, 3].map((seed) => model.generate({ prompt: "a red circle", steps: 2, seed })));
    console.log("drawn", drawn.length);`,
  "endless.mjs": `
    import { FlowTurbo } from "flowturbo";
    const model = await FlowTurbo.load();
    await model.generate({ prompt: "a red circle", steps: 1000, count: 8, onStep: () => console.log("running") });`,
};

const checks = new Checks();
const app = values.app ?? install(temporaryFolder(), [pack()], { type: "module" });
for (const [name, text] of Object.entries(scripts)) writeFileSync(path.join(app, name), text);
const cli = "node_modules/flowturbo/bin/flowturbo.js";

for (const name of wanted) {
  const runtime = fetchRuntime(name);
  const { output } = await run(app, [runtime[0], "--version"]);
  const title = `${others.includes(name) ? name : "Node"} ${output.match(/\d+\.\d+\.\d+/)?.[0]}`;
  const start = (file, ...args) => run(app, [...runtime, file, ...args]);
  if (name === nodes[0]) {
    const sentence = /flowturbo needs Node 20\.10 or newer; this is Node 20\.9/;
    checks.expect(`${title}: the command line says that it is too old`, await start(cli, "doctor"), sentence, 1);
    checks.expect(`${title}: load() says that it is too old`, await start("import.mjs"), sentence, 1);
    continue;
  }
  checks.expect(`${title}: import`, await start("import.mjs"), /drawn 64 true$/);
  if (values.brief) continue;
  const generate = ["generate", "a red circle", "--steps", "2", "--seed", "1"];
  checks.expect(`${title}: command line`, await start(cli, ...generate), /flowturbo-1\.png$/);
  checks.expect(`${title}: doctor`, await start(cli, "doctor"), /✔ onnxruntime[\s\S]*✔ sharp/);
  // Node prints the number of the first version with it in no other way.
  const [, major, minor] = title.match(/(\d+)\.(\d+)/) ?? [];
  const requires = others.includes(name) || major > 22 || (major === "22" && minor >= 12) || (major === "20" && minor >= 19);
  if (requires) checks.expect(`${title}: require()`, await start("require.cjs"), /drawn 64 true$/);
  else checks.expect(`${title}: require() is not there yet`, await start("require.cjs"), /ERR_REQUIRE_ESM/, 1);
  checks.expect(`${title}: abort, shared launches, an end without dispose()`, await start("abort.mjs"), /stopped\ndrawn 3$/);
  if (process.platform === "linux") await checkKilled(title, runtime);
}
checks.end();

/** The process that runs graphs ends with its parent, however that ends. */
async function checkKilled(title, [command, ...args]) {
  const parent = spawn(command, [...args, "endless.mjs"], { cwd: app, stdio: ["ignore", "pipe", "ignore"] });
  const started = await new Promise((resolve) => {
    parent.stdout.once("data", () => resolve(true));
    parent.once("close", () => resolve(false));
  });
  const children = started ? readFileSync(`/proc/${parent.pid}/task/${parent.pid}/children`, "utf8").trim().split(" ") : [];
  parent.kill("SIGKILL");
  const isGone = (pid) => {
    try {
      return /^\S+ \(.*\) [ZX]/s.test(readFileSync(`/proc/${pid}/stat`, "utf8"));
    } catch {
      return true;
    }
  };
  for (let tries = 0; tries < 100 && !children.every(isGone); tries++) await new Promise((next) => setTimeout(next, 100));
  const ended = children.length > 0 && children.every(isGone);
  checks.expect(`${title}: its child ends with it`, { code: ended ? 0 : 1, output: `children: ${children}` }, /\d/);
  for (const pid of children) if (!isGone(pid)) process.kill(Number(pid), "SIGKILL");
}
