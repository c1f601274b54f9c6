// What the documents say about installing, as far as a text can be checked without Docker and other package managers.
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import { providerFiles } from "../../lib/runtimes/onnxruntime/cuda-provider.js";
import { root } from "../support/fixtures.js";

const read = (file: string) => readFileSync(path.join(root, file), "utf8");

describe.each(["Dockerfile", "Dockerfile.nvidia"])("examples/%s", (name) => {
  const text = read(`examples/${name}`);
  const instructions = text
    .replaceAll("\\\n", " ")
    .split("\n")
    .filter((line) => line !== "" && !line.startsWith("#"));
  const at = (pattern: RegExp) => instructions.findIndex((line) => pattern.test(line));
  const entry: string[] = JSON.parse(instructions[at(/^ENTRYPOINT /)]!.slice("ENTRYPOINT ".length));
  const port = instructions[at(/^EXPOSE /)]!.match(/^EXPOSE (\d+)$/)![1]!;

  it("installs without the download, prunes in the same stage, and runs as a user without rights", () => {
    const order = [
      at(/^FROM \S+ AS install$/),
      at(/^RUN ONNXRUNTIME_NODE_INSTALL=skip npm ci --omit=dev$/),
      at(/^RUN npx --no flowturbo prune$/),
      at(/^FROM [^ ]+$/),
      at(/^COPY --from=install \/app\/node_modules /),
      at(/^USER (node|1000:1000)$/),
      at(/^STOPSIGNAL SIGTERM$/),
      at(/^ENTRYPOINT /),
    ];
    expect(order).not.toContain(-1);
    expect(order).toEqual([...order].sort((a, b) => a! - b!));
    // No binaries for musl, and no name of a registry's host.
    for (const line of instructions.filter((each) => each.startsWith("FROM")))
      expect(line).toMatch(/^FROM (node:\d+-(bookworm-)?slim|python:[\d.]+-slim|nvidia\/cuda:13[\w.-]+-cudnn-runtime-ubuntu[\d.]+)( AS \w+)?$/); // biome-ignore format: one line
  });

  it("serves on all interfaces of the container, at the port that it publishes, and asks whether it can draw", () => {
    const [program, script, command, ...flags] = entry;
    expect([program, script, command]).toEqual(["node", "node_modules/flowturbo/bin/flowturbo.js", "serve"]);
    expect(flags).toEqual(["--host", "0.0.0.0", "--port", port]);
    const check = instructions[at(/^HEALTHCHECK /)]!;
    const [runner, flag, code] = JSON.parse(check.slice(check.indexOf("["))) as string[];
    expect([runner, flag]).toEqual(["node", "-e"]);
    expect(code).toContain(`127.0.0.1:${port}/readyz`);
    expect(() => new Function(code!)).not.toThrow();
  });

  it("needs a key: without one the very command ends", () => {
    const args = [path.join(root, "bin/flowturbo.js"), ...entry.slice(2)];
    const env = { ...process.env, FLOWTURBO_API_KEY: "" };
    const { status, stderr } = spawnSync(process.execPath, args, { encoding: "utf8", timeout: 20_000, env });
    expect([status, stderr]).toEqual([2, expect.stringContaining("without a key")]);
    expect(text).toContain("--env FLOWTURBO_API_KEY");
  });

  it("keeps the cache in a volume that its user can write to", () => {
    const folder = "/var/cache/flowturbo";
    expect(instructions).toContain("ENV XDG_CACHE_HOME=/var/cache");
    expect(instructions[at(/^RUN mkdir /)]).toMatch(
      /^RUN mkdir -p \/var\/cache\/flowturbo && chown \S+ \/var\/cache\/flowturbo$/,
    );
    expect(instructions).toContain(`VOLUME ["${folder}"]`);
    expect(read("examples/compose.yaml")).toContain(`:${folder}`);
  });
});

it("examples/Dockerfile.nvidia takes the provider of onnxruntime-node's own version, and says that it has not run", () => {
  const text = read("examples/Dockerfile.nvidia");
  expect(text).toContain("has not been built, nor run on a GPU");
  for (const file of providerFiles) expect(text).toContain(`/provider/wheel/onnxruntime/capi/${file}`);
  expect(text).toContain("COPY --from=install /app/node_modules/onnxruntime-node/package.json");
  expect(text).toMatch(/^ENV FLOWTURBO_ONNXRUNTIME_CUDA_DIR=\/opt\/onnxruntime-cuda$/m);
});

it("this machine's modules, checkpoints and keys are kept out of the images", () => {
  const ignored = read("examples/Dockerfile.dockerignore").split("\n");
  for (const name of ["node_modules", "models", ".env*", "*keys*"]) expect(ignored).toContain(name);
});

it("the README's quick start has the variable that keeps a download from failing, and pruning", () => {
  const start = read("README.md").match(/^## Quick start\n([\s\S]*?)^## /m)![1]!;
  expect(start).toContain("`ONNXRUNTIME_NODE_INSTALL=skip npm install flowturbo`");
  expect(start).toContain("`npx flowturbo prune`");
});

it("strict package managers are told of the one install script that there is among the dependencies", () => {
  const { packages } = JSON.parse(read("package-lock.json")) as { packages: Record<string, { dev?: boolean; hasInstallScript?: boolean }> }; // biome-ignore format: one line
  const withScript = Object.entries(packages)
    .filter(([name, { dev, hasInstallScript }]) => name !== "" && !dev && hasInstallScript)
    .map(([name]) => name.replace("node_modules/", ""));
  expect(withScript).toEqual(["onnxruntime-node"]);
  const readme = read("README.md");
  const guide = read("docs/guides/bundlers.md");
  for (const text of [readme, guide]) expect(text).toContain('"allowScripts": { "onnxruntime-node": false }');
  expect(guide).toContain("allowBuilds: { onnxruntime-node: false }");
  expect(guide).toContain("ignoredBuiltDependencies: [onnxruntime-node]");
});

it("every commit is tried with esbuild, webpack and Vite", () => {
  expect(read(".ci/run")).toMatch(/^for check in .*"test:bundlers -- esbuild webpack vite"/m);
});
